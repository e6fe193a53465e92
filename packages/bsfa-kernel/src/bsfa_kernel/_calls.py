# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The arguments of a call as one value, from the public function to the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from bsfa_kernel.geometry import Geometry, block_count, query_block_count

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
    block_table: Tensor | None = None
    seqused_k: Tensor | None = None
    sinks: Tensor | None = None


class BlockMaximaCall(NamedTuple):
    """Arguments of block_maxima, in the order of the operator's schema."""

    q: Tensor
    k: Tensor
    causal: bool
    scale: float | None
    rule: str
    q_block: int
    k_block: int
    block_table: Tensor | None = None
    seqused_k: Tensor | None = None
    sinks: Tensor | None = None


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
    block_table: Tensor | None = None
    seqused_k: Tensor | None = None
    sinks: Tensor | None = None


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
    block_table: Tensor | None = None
    seqused_k: Tensor | None = None
    sinks: Tensor | None = None


AnyCall: TypeAlias = ForwardCall | BlockMaximaCall | SelectCall | AttendCall


def starts_of_queries(call: AnyCall) -> Tensor | None:
    """``cu_seqlens_q`` of a call with packed queries."""
    return None if isinstance(call, BlockMaximaCall) else call.cu_seqlens_q


def starts_of_keys(call: AnyCall) -> Tensor | None:
    """``cu_seqlens_k`` of a call with packed keys."""
    return None if isinstance(call, BlockMaximaCall) else call.cu_seqlens_k


def sequence_count(call: AnyCall) -> int:
    """Sequences of a call."""
    starts = starts_of_queries(call)
    return call.q.shape[0] if starts is None else starts.shape[0] - 1


def key_capacity(call: AnyCall) -> int:
    """Keys that a sequence can have by the shape of k, or of the block table."""
    if call.block_table is not None:
        return call.block_table.shape[1] * call.k.shape[1]
    return call.k.shape[-3]


def most_keys(call: AnyCall) -> int:
    """Keys of the longest sequence, or what is known of it without reading a tensor's values."""
    capacity = key_capacity(call)
    if isinstance(call, (ForwardCall, SelectCall)):
        return capacity if call.max_seqlen_k is None else call.max_seqlen_k
    if isinstance(call, AttendCall) and call.block_table is not None:
        return min(capacity, call.block_mask.shape[-1] * MASK_BITS * call.k_block)
    return capacity


def mask_words(call: SelectCall | AttendCall) -> int:
    """Words that each query block has in the mask that a call makes, or takes of padded tensors."""
    return block_count(block_count(most_keys(call), call.k_block), MASK_BITS)


def columns_shape(call: AnyCall) -> tuple[int, ...]:
    """The shape of what has a column for each query block: of kept, and of a block mask's rows.

    Where lengths are in device memory, there are columns for any lengths that they may be.
    """
    starts = starts_of_queries(call)
    if starts is not None:
        total_q, heads, _ = call.q.shape
        return heads, total_q // call.q_block + 2 * (starts.shape[0] - 1)
    batch, seqlen_q, heads, _ = call.q.shape
    if call.seqused_k is not None:
        return batch, heads, block_count(seqlen_q + call.q_block - 1, call.q_block)
    return batch, heads, query_block_count(seqlen_q, call.k.shape[1], geometry_of(call))


def first_column(start: int, index: int, q_block: int) -> int:
    """Where the columns of a packed sequence begin, the ``index``-th, whose first query is start.

    A sequence of n queries has at most n // q_block + 2 query blocks.
    """
    return start // q_block + 2 * index


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
        call.block_table,
        call.seqused_k,
        call.sinks,
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
        call.block_table,
        call.seqused_k,
        call.sinks,
    )


def differentiable(call: AnyCall) -> tuple[Tensor | None, ...]:
    """What a derivative could be asked for by: the floating-point inputs of a call."""
    if isinstance(call, ForwardCall):
        return call.q, call.k, call.v, call.thresholds, call.sinks
    if isinstance(call, SelectCall):
        return call.q, call.k, call.thresholds, call.sinks
    if isinstance(call, AttendCall):
        return call.q, call.k, call.v, call.thresholds, call.sinks
    return call.q, call.k, call.sinks


def geometry_of(call: AnyCall) -> Geometry:
    """The sparsity block of a call."""
    return Geometry(call.q_block, call.k_block)
