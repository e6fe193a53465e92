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
    selection: str = "exact"  # "auto" where nothing but the number of keys is left to decide it
    max_seqlen_k: int | None = None


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


def most_keys(call: ForwardCall | SelectCall | AttendCall) -> int:
    """Keys of the longest sequence, or of packed ones what is known of it from their shape."""
    if not isinstance(call, AttendCall) and call.max_seqlen_k is not None:
        return call.max_seqlen_k
    return call.k.shape[-3]


def mask_words(call: SelectCall | AttendCall) -> int:
    """Words that each query block has in the mask that a call makes, or takes of padded tensors."""
    return block_count(block_count(most_keys(call), call.k_block), MASK_BITS)


def select_step(call: ForwardCall) -> SelectCall:
    """The first of the two steps of a call: selection in 8 bits."""
    return SelectCall(
        call.q,
        call.k,
        call.thresholds,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.causal,
        call.scale,
        call.rule,
        call.q_block,
        call.k_block,
        call.voters,
        "int8",
        call.max_seqlen_k,
    )


def attend_step(call: ForwardCall, block_mask: Tensor) -> AttendCall:
    """The second of the two steps of a call: attention over what the first has selected."""
    return AttendCall(
        call.q,
        call.k,
        call.v,
        block_mask,
        call.thresholds,  # those that are NaN make the outputs NaN
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.causal,
        call.scale,
        call.q_block,
        call.k_block,
        call.return_lse,
        call.return_kept,
    )


def geometry_of(call: AnyCall) -> Geometry:
    """The sparsity block of a call."""
    return Geometry(call.q_block, call.k_block)
