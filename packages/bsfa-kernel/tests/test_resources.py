# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What the kernels take of a GPU is what was reviewed: a performance test that needs no GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import bsfa_kernel
from native_build import INCLUDE, NATIVE_TESTS, PACKAGE, library, run_well, tool
from resources import (
    Resources,
    format_reviewed,
    parse_report,
    read_reviewed,
    report_path,
)

REPORT = """\
# ptxas -v of nvcc 13.0.88

# csrc/sm80/instantiations/half_64.cu
ptxas info    : 9 bytes gmem, 72 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN4bsfa4sm806kernelILi64EEEvi' for 'sm_80'
ptxas info    : Function properties for _ZN4bsfa4sm806kernelILi64EEEvi
    64 bytes stack frame, 72 bytes spill stores, 148 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 64 bytes cumulative stack size, 16 bytes smem
ptxas info    : Compile time = 12.5 ms
"""
KERNEL = Resources("bsfa::sm80::kernel<64>", "sm_80", 255, 1, 64, 72, 148, 16)

# On an SM: an A100's has 164 KiB of shared memory and an H100's 228; each block takes 1 KiB more.
SHARED_OF_SM = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024}
SHARED_OF_SYSTEM = 1024


def differences(built: list[Resources], reviewed: list[Resources]) -> list[str]:
    """What is built otherwise than it was reviewed; the build may have fewer kernels."""
    known = {(entry.kernel, entry.target): entry for entry in reviewed}
    return [
        f"built {entry}, reviewed {known.get((entry.kernel, entry.target))}"
        for entry in built
        if known.get((entry.kernel, entry.target)) != entry
    ]


def test_kernels_take_what_was_reviewed() -> None:
    if bsfa_kernel.build_info().cuda is None:
        assert not report_path().exists()
        return
    version, built = parse_report(report_path().read_text())
    reviewed_version, reviewed = read_reviewed()
    assert len(built) >= len(bsfa_kernel.build_info().kernels)
    if version.split(".")[:2] != reviewed_version.split(".")[:2]:
        # Another compiler allocates otherwise; the list of kernels is the same.
        built = [
            known
            for entry in built
            for known in reviewed
            if (known.kernel, known.target) == (entry.kernel, entry.target)
        ] + [entry for entry in built if entry.kernel not in {known.kernel for known in reviewed}]
    message = "if this is intended: python packages/bsfa-kernel/tests/resources.py"
    assert differences(built, reviewed) == [], message


def serialised(report: str) -> list[str]:
    """What ptxas says (C7510 to C7520) where it waits for each wgmma: several times as slow."""
    return [line for line in report.splitlines() if "Potential Performance Loss" in line]


def test_no_wgmma_is_serialised() -> None:
    if bsfa_kernel.build_info().cuda is None:
        pytest.skip("the library was built without CUDA")
    assert serialised(report_path().read_text()) == []


def test_serialised_wgmma_is_noticed() -> None:
    warning = (
        "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources for the wgmma pipeline"
    )
    assert serialised(f"{REPORT}\n{warning}\n") == [warning]


def test_report_is_read_in_full() -> None:
    assert parse_report(REPORT) == ("13.0.88", [KERNEL])


@pytest.mark.parametrize(
    "change",
    [{"registers": 254}, {"spill_loads": 152}, {"barriers": 2}, {"static_shared": 0}],
    ids=str,
)
def test_comparison_notices(change: dict[str, int]) -> None:
    assert differences([KERNEL], [KERNEL]) == []
    assert len(differences([replace(KERNEL, **change)], [KERNEL])) == 1


def test_comparison_notices_a_kernel_that_nobody_reviewed() -> None:
    assert len(differences([KERNEL], [])) == 1


def test_report_that_breaks_off_is_refused() -> None:
    with pytest.raises(ValueError, match="ptxas says too little"):
        parse_report(REPORT[: REPORT.index("    64 bytes")])
    with pytest.raises(ValueError, match="not a report of ptxas"):
        parse_report("nothing")


def test_reviewed_file_is_written_as_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "resources.toml"
    path.write_text(format_reviewed("13.0.88", [KERNEL]))
    assert read_reviewed(path) == ("13.0.88", [KERNEL])


@pytest.mark.slow
def test_shared_memory_of_the_kernels_fits_as_many_blocks_as_they_are_made_for(
    tmp_path: Path,
) -> None:
    if bsfa_kernel.build_info().cuda is None:
        pytest.skip("the library was built without CUDA, and maybe there is no nvcc")
    program = tmp_path / "shared_bytes"
    run_well(
        *(tool("nvcc"), "-std=c++17", "--expt-relaxed-constexpr", "-arch=sm_80"),
        *(f"-I{PACKAGE / 'csrc'}", f"-I{INCLUDE}", f"-I{cutlass_include()}", "-DBSFA_WITH_CUDA"),
        *(NATIVE_TESTS / "shared_bytes.cu", "-o", program),
    )
    lines = [line.split() for line in run_well(program).splitlines()]
    assert len(lines) == 6 * 6
    for target, kernel, dtype, head_dim, blocks, size in lines:
        taken = int(blocks) * (int(size) + SHARED_OF_SYSTEM)
        assert taken <= SHARED_OF_SM[target], (target, kernel, dtype, head_dim, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "names", "places"),
    [
        (64, ("forward", "attend_blocks"), {32, 48}),
        (128, ("forward",), {0, 16}),  # that of lists is as fast elsewhere
    ],
)
def test_the_dense_loop_lies_where_it_is_fast(
    head_dim: int, names: tuple[str, ...], places: set[int]
) -> None:
    """What Config::kDensePadding is for: 4 to 6 % of its time (docs/lab/selection.md)."""
    kernels = [
        kernel
        for kernel in bsfa_kernel.build_info().kernels
        if (kernel.arch, kernel.head_dim) == (90, head_dim) and kernel.name in names
    ]
    if not kernels:
        pytest.skip(f"the library has no sm_90 kernels for head_dim {head_dim}")
    if shutil.which("cuobjdump") is None:
        pytest.skip("needs cuobjdump on the PATH")
    version, _ = parse_report(report_path().read_text())
    if version.split(".")[:2] != read_reviewed()[0].split(".")[:2]:
        pytest.skip("another compiler places the code otherwise")
    dump = run_well(tool("cuobjdump"), "-sass", "-arch", "sm_90a", library())
    called = {"forward": "forward_kernel", "attend_blocks": "attend_shared_kernel"}
    wanted = rf"\S*sm90\d+({'|'.join(called[name] for name in names)})\S*Li{head_dim}E"
    found = [
        dense_loop(function, head_dim)
        for function in dump.split("Function : ")[1:]
        if re.match(wanted, function)
    ]
    assert len(found) == len(kernels)
    assert {place % 128 for place in found} <= places


def dense_loop(disassembly: str, head_dim: int) -> int:
    """Where the loop over pairs of key blocks begins: the shortest one with all their products."""
    # Scores of 128 keys, and values of head_dim channels, 16 of the sum at a time.
    scores, values = head_dim // 16, 128 // 16
    wide = scores + (values if head_dim == 128 else 0)
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) *;", disassembly)
    code = [(int(address, 16), text) for address, text in lines]
    products = [(address, text.split()[0]) for address, text in code if "HGMMA" in text]
    loops = []
    for last, text in code:
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", text)
        if target and (first := int(target[1], 16)) < last:
            kinds = [kind for address, kind in products if first <= address <= last]
            if len(kinds) == scores + values and sum("64x128x16" in k for k in kinds) == wide:
                loops.append((last - first, first))
    assert loops, f"no loop with the {scores + values} products of a dense step"
    return min(loops)[1]


def cutlass_include() -> Path:
    """The headers of the PyPI package nvidia-cutlass."""
    package = importlib.util.find_spec("cutlass_library")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the headers of nvidia-cutlass, which the nox sessions install")
    return Path(package.submodule_search_locations[0]) / "source" / "include"
