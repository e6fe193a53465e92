# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The arguments of a call as one value, from the public function to the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from bsfa_kernel.geometry import Geometry, block_count

if TYPE_CHECKING:
    from torch import Tensor

MASK_BITS = 64
"""Key blocks in a word of a block mask."""


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


class SelectCall(NamedTuple):
    """Arguments of select_blocks, in the order of the operator's schema."""

    q: Tensor
    k: Tensor
    thresholds: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    causal: bool
    scale: float | None
    rule: str
    q_block: int
    k_block: int
    voters: int
    precision: str
    max_seqlen_k: int | None


class AttendCall(NamedTuple):
    """Arguments of attend_blocks, in the order of the operator's schema."""

    q: Tensor
    k: Tensor
    v: Tensor
    block_mask: Tensor
    thresholds: Tensor | None  # say only where the outputs are NaN
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    causal: bool
    scale: float | None
    q_block: int
    k_block: int
    return_lse: bool
    return_kept: bool


AnyCall: TypeAlias = ForwardCall | BlockMaximaCall | SelectCall | AttendCall


def mask_words(call: SelectCall | AttendCall) -> int:
    """Words that each query block has in the mask that a call makes, or takes of padded tensors."""
    longest = call.k.shape[-3]
    if isinstance(call, SelectCall) and call.max_seqlen_k is not None:
        longest = call.max_seqlen_k
    return block_count(block_count(longest, call.k_block), MASK_BITS)


def geometry_of(call: AnyCall) -> Geometry:
    """The sparsity block of a call."""
    return Geometry(call.q_block, call.k_block)
