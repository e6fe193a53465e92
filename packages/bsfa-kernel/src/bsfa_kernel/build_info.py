# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What this installation can compute, and with what."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path

from bsfa_kernel import _native
from bsfa_kernel.geometry import Geometry

DISTRIBUTION = "bsfa-kernel"


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    name: str
    """"forward", "select_blocks", "attend_blocks" or "block_maxima"."""
    arch: int
    """Compute capability it was written for, times ten."""
    ptx: bool
    """Whether later architectures can compile it when they load it."""
    dtype: str
    """"float16" or "bfloat16"."""
    head_dim: int
    """The largest that it serves."""
    geometries: tuple[Geometry, ...]
    head_dims: tuple[int, ...]
    """All that it serves, each at the cost of the largest."""


@dataclass(frozen=True)
class BuildInfo:
    """A description of the installation; ``str()`` puts it in words."""

    version: str
    """Of the Python package."""
    abi_version: int
    """Of the C interface that the Python package speaks."""
    library: Path
    """Where the native library is, or is looked for."""
    available: bool
    """Whether the native library is there and can be used."""
    reason: str
    """Why it cannot; "" where it can."""
    library_version: str | None = None
    cuda: str | None = None
    """Version of the CUDA toolkit that the library was built with; None where without."""
    kernels: tuple[Kernel, ...] = field(default=())

    @property
    def architectures(self) -> tuple[int, ...]:
        """Those that there is a forward kernel for."""
        return tuple(sorted({kernel.arch for kernel in self.kernels if kernel.name == "forward"}))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those that there is a forward kernel for."""
        return tuple(sorted({kernel.dtype for kernel in self.kernels if kernel.name == "forward"}))

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Those that there is a forward kernel for."""
        return tuple(
            sorted(
                {
                    head_dim
                    for kernel in self.kernels
                    if kernel.name == "forward"
                    for head_dim in kernel.head_dims
                }
            )
        )

    def __str__(self) -> str:
        lines = [f"bsfa-kernel {self.version} (ABI {self.abi_version})"]
        lines.append("  CPU tensors: the reference back end (all dtypes, any head dimension)")
        if not self.available:
            lines.append(f"  CUDA tensors: not possible: {self.reason}")
        elif not self.kernels:
            lines.append(
                f"  CUDA tensors: not possible: {self.library} ({self.library_version}) was built "
                + (
                    "without CUDA"
                    if self.cuda is None
                    else f"with CUDA {self.cuda}, without kernels"
                )
            )
        else:
            lines.append(
                f"  CUDA tensors: {self.library} ({self.library_version}, CUDA {self.cuda})"
            )
            lines.extend(
                f"    {kernel.name}: sm_{kernel.arch}{' and later, by PTX' if kernel.ptx else ''}, "
                f"{kernel.dtype}, head_dim {kernel.head_dims[0]} to {kernel.head_dims[-1]}, "
                f"{' and '.join(map(str, kernel.geometries))}"
                for kernel in self.kernels
            )
        return "\n".join(lines)


def package_version() -> str:
    """Version of the installed package; "0+unknown" where imported without being installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0+unknown"


def build_info() -> BuildInfo:
    """What this installation can compute. Loads the native library, and initialises no GPU."""
    unavailable = partial(
        BuildInfo,
        version=package_version(),
        abi_version=_native.ABI_VERSION,
        library=_native.library_path(),
        available=False,
    )
    try:
        described = json.loads(_native.build_info_json())
        kernels = tuple(_kernel(entry) for entry in described["kernels"])
    except NotImplementedError as error:
        return unavailable(reason=str(error))
    except (KeyError, TypeError, ValueError) as error:
        return unavailable(reason=f"the library does not describe its build as expected: {error!r}")
    return BuildInfo(
        version=package_version(),
        abi_version=_native.ABI_VERSION,
        library=_native.library_path(),
        available=True,
        reason="",
        library_version=_native.version(),
        cuda=described.get("cuda"),
        kernels=kernels,
    )


def _kernel(entry: dict[str, object]) -> Kernel:
    geometries, head_dims = entry["geometries"], entry["head_dims"]
    if not isinstance(geometries, list):
        raise TypeError(f"geometries must be a list, got {geometries!r}")
    if not isinstance(head_dims, list) or not head_dims:
        raise TypeError(f"head_dims must be a list of some, got {head_dims!r}")
    return Kernel(
        name=str(entry["name"]),
        arch=int(str(entry["arch"])),
        ptx=bool(entry["ptx"]),
        dtype=str(entry["dtype"]),
        head_dim=int(str(entry["head_dim"])),
        geometries=tuple(_geometry(geometry) for geometry in geometries),
        head_dims=tuple(map(int, head_dims)),
    )


def _geometry(entry: object) -> Geometry:
    if isinstance(entry, str):
        return Geometry.parse(entry)
    if isinstance(entry, list) and len(entry) == 2:
        return Geometry(int(entry[0]), int(entry[1]))
    raise TypeError(f'a geometry must be "128x64" or [128, 64], got {entry!r}')
