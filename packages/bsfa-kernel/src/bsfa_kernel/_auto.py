# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""How a call finds the blocks to keep: in one kernel, or in a step of its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

import torch

from bsfa_kernel import _native
from bsfa_kernel.build_info import build_info

Selection: TypeAlias = Literal["exact", "int8", "auto"]

SELECTIONS: tuple[Selection, ...] = ("exact", "int8", "auto")
"""``exact`` decides by the scores that attention uses, in one kernel with it; ``int8`` selects by
scores in 8 bits, then attends to what is selected; ``auto`` takes the faster of both."""

CROSSOVERS: Mapping[int, float] = MappingProxyType({1: 0.55, 2: 0.35, 4: 0.2})
"""By voters: the share of blocks skipped from which on two steps take less time than one kernel."""


def check_selection(selection: object, expected_skipped: object) -> None:
    """Refuse an unknown selection, and what is no share or not looked at.

    Raises:
        TypeError: ``expected_skipped`` is no number.
        ValueError: an argument that breaks a rule.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}; got {selection!r}")
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


def selects_first(
    selection: str, expected_skipped: float | None, voters: int, q: torch.Tensor
) -> bool:
    """Whether blocks are to be selected in a step of its own, in 8 bits."""
    if selection != "auto":
        return selection == "int8"
    if expected_skipped is None or expected_skipped < CROSSOVERS[voters] or not q.is_cuda:
        return False
    head_dims = _head_dims_with_both_steps(q.get_device(), q.dtype, _native.insisted_arch())
    return any(q.shape[-1] == head_dim for head_dim in head_dims)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _head_dims_with_both_steps(device: int, dtype: torch.dtype, arch: int) -> tuple[int, ...]:
    """Those that the library has both kernels for; asked once when a graph is compiled."""
    return _find_head_dims(device, dtype, arch)


@functools.cache
def _find_head_dims(device: int, dtype: torch.dtype, arch: int) -> tuple[int, ...]:
    major, _ = torch.cuda.get_device_capability(device)
    found = {
        (kernel.name, kernel.head_dim)
        for kernel in build_info().kernels
        if kernel.dtype == str(dtype).removeprefix("torch.")
        and (kernel.arch == arch or arch == 0)
        and (kernel.arch // 10 == major or (kernel.ptx and major > 8))
    }
    selected, attended = (
        {size for name, size in found if name == step}
        for step in ("select_blocks", "attend_blocks")
    )
    return tuple(sorted(selected & attended))
