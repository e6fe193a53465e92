# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""How a call finds the blocks to keep: in one kernel, or in a step of its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

import torch

from bsfa_kernel import _native
from bsfa_kernel._checks import as_geometry, check_selection, check_tensor, check_voters
from bsfa_kernel.build_info import build_info
from bsfa_kernel.geometry import DEFAULT_GEOMETRY, Geometry
from bsfa_kernel.rules import Precision, Selection

# By q_block and voters. Plain dicts of numbers: torch.compile reads no others in a traced call.
_CROSSOVERS = {128: {1: 0.45, 2: 0.3, 4: 0.2}, 64: {1: 0.72, 2: 0.6, 4: 0.55}}

CROSSOVERS: Mapping[Geometry, Mapping[int, float]] = MappingProxyType(
    {Geometry(q_block, 64): MappingProxyType(row) for q_block, row in _CROSSOVERS.items()}
)
"""By geometry and voters: the share of blocks skipped from which on ``selection="auto"`` takes two
steps.

Measured at head_dim 128, rule peak_lse, blocks skipped irregularly: 128x64 on an H200 at 8K, 16K
and 64K tokens, 64x64 on an H100 at 64K; each has a margin, for which see docs/lab/selection.md.
Other GPUs, head dimensions and rules go by them too, without having been measured."""

MIN_SEQLEN_K = 8192
"""Keys of a call below which ``selection="auto"`` stays in one kernel: shorter calls were not
measured, and what two steps cost at least weighs more in them."""


def check_expected_skipped(expected_skipped: object, selection: str) -> None:
    """Refuse what is no share, or not looked at with this selection.

    Raises:
        TypeError: ``expected_skipped`` is no number.
        ValueError: it breaks a rule.
    """
    if expected_skipped is None:
        return
    if isinstance(expected_skipped, bool) or not isinstance(expected_skipped, (int, float)):
        raise TypeError(
            f"expected_skipped must be a number or None, got {type(expected_skipped).__name__}"
        )
    if not 0 <= expected_skipped <= 1:
        raise ValueError(f"expected_skipped must be between 0 and 1, got {expected_skipped}")
    if selection != "auto":
        raise ValueError(
            f"expected_skipped is for selection='auto'; got {expected_skipped} with "
            f"selection={selection!r}"
        )


def resolve_selection(
    selection: str,
    q: torch.Tensor,
    seqlen_k: int,
    *,
    geometry: Geometry = DEFAULT_GEOMETRY,
    voters: int = 1,
    expected_skipped: float | None = None,
) -> Precision:
    """How ``block_sparse_attention`` would find the blocks of a call; what "auto" comes to.

    "auto" is "int8", two steps, where ``q`` is on a GPU for which the library has kernels of both,
    ``expected_skipped`` is at least ``CROSSOVERS[geometry][voters]`` and the call has at least
    8192 keys; else "exact", one kernel. Other selections are returned as they are.

    Args:
        selection: one of ``SELECTIONS``.
        q: the queries, or any tensor of their device, dtype and last dimension.
        seqlen_k: keys of the call; of packed and paged ones ``max_seqlen_k`` or, where that is not
            given, total_k or max_pages * page_size.
        geometry: the sparsity block, one of ``GEOMETRIES``.
        voters: one of ``VOTERS``.
        expected_skipped: for "auto": the share of blocks that is expected to be skipped; "exact"
            where it is not known.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument that breaks a rule; the message names rule and value.
    """
    check_selection(selection)
    check_tensor(q, "q")
    if isinstance(seqlen_k, bool) or not isinstance(seqlen_k, (int, torch.SymInt)):
        raise TypeError(f"seqlen_k must be a whole number, got {type(seqlen_k).__name__}")
    if seqlen_k < 0:
        raise ValueError(f"seqlen_k must be at least 0, got {seqlen_k}")
    geometry = as_geometry(geometry)
    check_voters(voters)
    check_expected_skipped(expected_skipped, selection)
    left = selection
    if selection == "auto":
        left = resolve_but_for_length(expected_skipped, geometry, voters, q)
    return "int8" if takes_two_steps(left, seqlen_k) else "exact"


def resolve_but_for_length(
    expected_skipped: float | None, geometry: Geometry, voters: int, q: torch.Tensor
) -> Selection:
    """What "auto" comes to before lengths are known: "exact", or still "auto".

    A graph that is traced for all lengths holds this, so that it holds no condition on them.
    """
    if expected_skipped is None or not q.is_cuda:
        return "exact"
    if expected_skipped < _CROSSOVERS[geometry.q_block][voters]:
        return "exact"
    head_dims = _head_dims_with_both_steps(q.get_device(), q.dtype, _native.insisted_arch())
    return "auto" if any(q.shape[-1] == head_dim for head_dim in head_dims) else "exact"


def takes_two_steps(selection: str, seqlen_k: int) -> bool:
    """Whether blocks are selected in a step of its own; ``selection`` is resolved but for this."""
    return selection == "int8" or (selection == "auto" and seqlen_k >= MIN_SEQLEN_K)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _head_dims_with_both_steps(device: int, dtype: torch.dtype, arch: int) -> tuple[int, ...]:
    """Those that the library has both kernels for; asked once when a graph is compiled."""
    return _find_head_dims(device, dtype, arch)


@functools.cache
def _find_head_dims(device: int, dtype: torch.dtype, arch: int) -> tuple[int, ...]:
    major, _ = torch.cuda.get_device_capability(device)
    found = {
        (kernel.name, head_dim)
        for kernel in build_info().kernels
        for head_dim in kernel.head_dims
        if kernel.dtype == str(dtype).removeprefix("torch.")
        and (kernel.arch == arch or arch == 0)
        and (kernel.arch // 10 == major or (kernel.ptx and major > 8))
    }
    selected, attended = (
        {size for name, size in found if name == step}
        for step in ("select_blocks", "attend_blocks")
    )
    return tuple(sorted(selected & attended))
