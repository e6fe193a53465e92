# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Which blocks a rule keeps, and what it compares with the thresholds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from bsfa_kernel._calls import (
    BlockMaximaCall,
    SelectCall,
    columns_shape,
    geometry_of,
    most_keys,
)
from bsfa_kernel._checks import (
    check_block_maxima,
    check_select,
    check_thresholds_values,
    check_two_sizes,
    check_voters,
)
from bsfa_kernel.geometry import DEFAULT_GEOMETRY, Geometry, block_count, threshold_row
from bsfa_kernel.reference.context import in_own_dtypes
from bsfa_kernel.reference.parts import parts_of
from bsfa_kernel.reference.rule import row_excesses, verdicts
from bsfa_kernel.reference.scores import (
    QueryBlock,
    computed_in,
    in_blocks,
    scale_of,
    score_chunks,
)

_INF = float("inf")

Decision: TypeAlias = Callable[[QueryBlock, slice, Tensor], tuple[Tensor, Tensor]]
"""Of a query block, some of batch * kv_heads and their scores, as ``score_chunks`` has them: which
visible blocks are kept, bool [kv_heads, group, visible_blocks], and the margins [kv_heads, group].
"""


class SelectionResult(NamedTuple):
    """What ``select_blocks`` computes; shapes of packed queries in brackets."""

    mask: Tensor
    """[batch, heads, q_blocks, k_blocks] ([heads, total_q // q_block + 2 * batch, k_blocks]), bool:
    which blocks; k_blocks = ceil(keys / k_block), of packed and paged keys those of
    ``max_seqlen_k``."""
    margin: Tensor
    """[batch, heads, q_blocks] ([heads, total_q // q_block + 2 * batch]), in the dtype computed in:
    how far the closest verdict was from the other one, in units of scaled scores; inf where nothing
    was decided."""


def select_blocks(
    q: Tensor,
    k: Tensor,
    thresholds: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    rule: str = "absolute",
    geometry: Geometry = DEFAULT_GEOMETRY,
    voters: int = 1,
    precision: str = "int8",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    sinks: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> SelectionResult:
    """``bsfa_kernel.select_blocks`` block by block, and how close its verdicts were.

    Args: as there, and as in ``attention``, and so are the errors.
    """
    call = SelectCall(
        q,
        k,
        thresholds,
        cu_seqlens_q,
        cu_seqlens_k,
        causal,
        scale,
        rule,
        *check_two_sizes(geometry),
        voters,
        precision,
        max_seqlen_k,
        block_table,
        seqused_k,
        sinks,
    )
    return run_select(call, compute_dtype)


@in_own_dtypes
def run_select(call: SelectCall, compute_dtype: torch.dtype | None = None) -> SelectionResult:
    """``select_blocks`` of a call."""
    check_select(call, any_geometry=True)
    check_thresholds_values(call.thresholds)
    dtype = computed_in(call.q, compute_dtype)
    parts = parts_of(call)
    shape = columns_shape(call)
    k_blocks = block_count(most_keys(call), call.k_block)
    result = SelectionResult(
        mask=torch.zeros((*shape, k_blocks), dtype=torch.bool, device=call.q.device),
        margin=torch.full(shape, _INF, dtype=dtype, device=call.q.device),
    )
    for part in parts:
        its_result = SelectionResult(
            part.of_columns(result.mask)[..., : block_count(part.seqlen_k, call.k_block)],
            part.of_columns(result.margin),
        )
        _select(call, part.of_queries(call.q), part.of_keys(call.k), its_result, dtype)
    return result


def _select(
    call: SelectCall, q: Tensor, k: Tensor, result: SelectionResult, dtype: torch.dtype
) -> None:
    """Fill ``result``, which holds what queries without keys give; of padded tensors."""
    kv_heads = k.shape[2]
    shape = (len(q) * kv_heads, q.shape[2] // kv_heads)
    mask = torch.zeros((*shape, *result.mask.shape[-2:]), dtype=torch.bool, device=q.device)
    margin = torch.full((*shape, mask.shape[2]), _INF, dtype=dtype, device=q.device)
    geometry = geometry_of(call)
    decide = decision_by_rule(
        call.thresholds,
        q,
        k,
        rule=call.rule,
        geometry=geometry,
        voters=call.voters,
        sinks=call.sinks,
    )
    rounded_for = call.rule if call.precision == "int8" else None
    if rounded_for and call.sinks is not None:
        rounded_for = "absolute"  # peaks are compared with the sink, too, which lacks nothing
    for block, chunk, scores in score_chunks(
        q,
        k,
        causal=call.causal,
        scale=scale_of(q, call.scale),
        geometry=geometry,
        dtype=dtype,
        rounded_for=rounded_for,
    ):
        keep, margin[chunk, :, block.index] = decide(block, chunk, scores)
        mask[chunk, :, block.index, : block.visible_blocks] = keep
    result.mask.copy_(mask.view(result.mask.shape))
    result.margin.copy_(margin.view(result.margin.shape))


def decision_by_rule(
    thresholds: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    rule: str,
    geometry: Geometry,
    voters: int,
    sinks: Tensor | None = None,
) -> Decision:
    """The rule's decision of padded q and k, [batch, seqlen, heads, head_dim], by given scores.

    thresholds: float32 [heads, rows]. sinks: [heads], scores.
    """
    batch, seqlen_q = q.shape[:2]
    seqlen_k, kv_heads = k.shape[1:3]
    rows = thresholds.shape[1]
    by_kv_head = thresholds.reshape(kv_heads, -1, rows).repeat(batch, 1, 1)
    first = None if sinks is None else sinks_by_kv_head(sinks, batch, kv_heads)

    def decide(block: QueryBlock, chunk: slice, scores: Tensor) -> tuple[Tensor, Tensor]:
        row = threshold_row(block.start, seqlen_q, seqlen_k, geometry.q_block, rows)
        bounds = by_kv_head[chunk, :, row].to(scores.dtype)
        if (bounds == -_INF).all() or block.full_blocks == 0:  # nothing to decide
            keep = scores.new_ones((*bounds.shape, block.visible_blocks), dtype=torch.bool)
            return keep, torch.full_like(bounds, _INF)
        peaks = in_blocks(scores[:, :, block.voting(voters)], block.k_block).amax(-1)
        reference = None if first is None else first_reference(first[chunk], peaks)
        keep, excess = verdicts(
            peaks, bounds, rule=rule, reference=reference, full=block.full_blocks
        )
        distance = (excess[..., : block.full_blocks] - bounds[..., None]).abs()
        return keep, distance.nan_to_num(_INF, _INF).amin(-1)

    return decide


def sinks_by_kv_head(sinks: Tensor, batch: int, kv_heads: int) -> Tensor:
    """[heads] -> [batch * kv_heads, group]."""
    return sinks.reshape(kv_heads, -1).repeat(batch, 1)


def first_reference(sinks: Tensor, peaks: Tensor) -> Tensor:
    """What relative rules compare with at first: [kv_heads, group] -> [kv_heads, group, rows]."""
    return sinks.to(peaks.dtype)[..., None].expand(peaks.shape[:-1])


def block_maxima(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    rule: str = "absolute",
    geometry: Geometry = DEFAULT_GEOMETRY,
    voters: int = 1,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    sinks: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The quantity that is compared with the thresholds, for every block.

    Args: as in ``attention``. The result is that of ``bsfa_kernel.block_maxima``, in the dtype
    computed in, but over the voting rows alone: others are not computed, which takes that much less
    time. A block without a voting row that sees some of it, which is a forced one, has -inf. The
    errors are those of ``attention``.
    """
    sizes = check_two_sizes(geometry)
    call = BlockMaximaCall(q, k, causal, scale, rule, *sizes, block_table, seqused_k, sinks)
    return run_block_maxima(call, compute_dtype, voters)


@in_own_dtypes
def run_block_maxima(
    call: BlockMaximaCall, compute_dtype: torch.dtype | None = None, voters: int = 1
) -> Tensor:
    """``block_maxima`` of a call."""
    check_block_maxima(call, any_geometry=True)
    check_voters(voters, call.q_block)
    dtype = computed_in(call.q, compute_dtype)
    shape = (*columns_shape(call), block_count(most_keys(call), call.k_block))
    result = torch.full(shape, -_INF, dtype=dtype, device=call.q.device)
    for part in parts_of(call):
        its_result = part.of_columns(result)[..., : block_count(part.seqlen_k, call.k_block)]
        _maxima(call, part.of_queries(call.q), part.of_keys(call.k), its_result, voters)
    return result


def _maxima(call: BlockMaximaCall, q: Tensor, k: Tensor, result: Tensor, voters: int) -> None:
    """Fill ``result``, which holds -inf; of padded tensors."""
    kv_heads = k.shape[2]
    shape = (len(q) * kv_heads, q.shape[2] // kv_heads, *result.shape[-2:])
    maxima = result.new_full(shape, -_INF)
    first = None if call.sinks is None else sinks_by_kv_head(call.sinks, len(q), kv_heads)
    for block, chunk, scores in score_chunks(
        q,
        k,
        causal=call.causal,
        scale=scale_of(q, call.scale),
        geometry=geometry_of(call),
        dtype=result.dtype,
        voters=voters,
    ):
        peaks = in_blocks(scores, call.k_block).amax(-1)
        reference = None if first is None else first_reference(first[chunk], peaks)
        excess = row_excesses(peaks, call.rule, reference).masked_fill(peaks == -_INF, -_INF)
        maxima[chunk, :, block.index, : block.visible_blocks] = excess.amax(2)
    result.copy_(maxima.view(result.shape))
