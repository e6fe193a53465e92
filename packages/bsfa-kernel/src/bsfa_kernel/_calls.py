# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The arguments of a call as one value, from the public function to the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bsfa_kernel.geometry import Geometry

if TYPE_CHECKING:
    from torch import Tensor


class ForwardCall(NamedTuple):
    """Arguments of attention, in the order of the operator's schema; shapes in ``attention.py``."""

    q: Tensor
    k: Tensor
    v: Tensor
    thresholds: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    causal: bool
    scale: float | None
    rule: str
    q_block: int
    k_block: int
    voters: int
    return_lse: bool
    return_kept: bool


class BlockMaximaCall(NamedTuple):
    """Arguments of block_maxima, in the order of the operator's schema."""

    q: Tensor
    k: Tensor
    causal: bool
    scale: float | None
    rule: str
    q_block: int
    k_block: int


def geometry_of(call: ForwardCall | BlockMaximaCall) -> Geometry:
    """The sparsity block of a call."""
    return Geometry(call.q_block, call.k_block)
