# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Which blocks a rule keeps, and what it compares with the thresholds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from bsfa_kernel._calls import BlockMaximaCall, SelectCall, geometry_of
from bsfa_kernel._checks import (
    check_block_maxima,
    check_longest,
    check_packed_values,
    check_select,
    check_thresholds_values,
    check_two_sizes,
    check_voters,
)
from bsfa_kernel.geometry import DEFAULT_GEOMETRY, Geometry, block_count, threshold_row
from bsfa_kernel.reference.rule import row_excesses, verdicts
from bsfa_kernel.reference.scores import (
    QueryBlock,
    computed_in,
    in_blocks,
    scale_of,
    score_chunks,
    sequences,
)

_INF = float("inf")

Decision: TypeAlias = Callable[[QueryBlock, slice, Tensor], tuple[Tensor, Tensor]]
"""Of a query block, some of batch * kv_heads and their scores, as ``score_chunks`` has them: which
visible blocks are kept, bool [kv_heads, group, visible_blocks], and the margins [kv_heads, group].
"""


class SelectionResult(NamedTuple):
    """What ``select_blocks`` computes; shapes of varlen in brackets."""

    mask: Tensor
    """[batch, heads, q_blocks, k_blocks] ([heads, total_q // q_block + batch, ceil(max_seqlen_k /
    k_block)]), bool: which blocks."""
    margin: Tensor
    """[batch, heads, q_blocks] ([heads, total_q // q_block + batch]), in the dtype computed in: how
    far the closest verdict was from the other one, in units of scaled scores; inf where nothing
    was decided."""


@torch.no_grad()
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
    max_seqlen_k: int | None = None,
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
    )
    return run_select(call, compute_dtype)


@torch.no_grad()
def run_select(call: SelectCall, compute_dtype: torch.dtype | None = None) -> SelectionResult:
    """``select_blocks`` of a call."""
    check_select(call, any_geometry=True)
    check_thresholds_values(call.thresholds)
    q, k, starts_q, starts_k = call.q, call.k, call.cu_seqlens_q, call.cu_seqlens_k
    dtype = computed_in(q, compute_dtype)
    heads = q.shape[-2]
    if starts_q is None or starts_k is None:
        k_blocks = block_count(k.shape[1], call.k_block)
        shape = (q.shape[0], heads, block_count(q.shape[1], call.q_block))
        result = _nothing_selected(q, shape, k_blocks, dtype)
        _select(call, q, k, result, dtype)
        return result

    check_packed_values(q, k, starts_q, starts_k)
    parts = list(sequences(starts_q, starts_k, call.q_block))
    longest = k.shape[0] if call.max_seqlen_k is None else call.max_seqlen_k
    check_longest(longest, max((part.keys.stop - part.keys.start for part in parts), default=0))
    columns = q.shape[0] // call.q_block + len(parts)
    result = _nothing_selected(q, (heads, columns), block_count(longest, call.k_block), dtype)
    for part in parts:
        keys = k[None, part.keys]
        k_blocks = block_count(keys.shape[1], call.k_block)
        its_result = SelectionResult(
            mask=result.mask[None, :, part.columns, :k_blocks],
            margin=result.margin[None, :, part.columns],
        )
        _select(call, q[None, part.queries], keys, its_result, dtype)
    return result


def _nothing_selected(
    q: Tensor, shape: tuple[int, ...], k_blocks: int, dtype: torch.dtype
) -> SelectionResult:
    return SelectionResult(
        mask=torch.zeros((*shape, k_blocks), dtype=torch.bool, device=q.device),
        margin=torch.full(shape, _INF, dtype=dtype, device=q.device),
    )


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
        call.thresholds, q, k, rule=call.rule, geometry=geometry, voters=call.voters
    )
    for block, chunk, scores in score_chunks(
        q,
        k,
        causal=call.causal,
        scale=scale_of(q, call.scale),
        geometry=geometry,
        dtype=dtype,
        rounded_for=call.rule if call.precision == "int8" else None,
    ):
        keep, margin[chunk, :, block.index] = decide(block, chunk, scores)
        mask[chunk, :, block.index, : block.visible_blocks] = keep
    result.mask.copy_(mask.view(result.mask.shape))
    result.margin.copy_(margin.view(result.margin.shape))


def decision_by_rule(
    thresholds: Tensor, q: Tensor, k: Tensor, *, rule: str, geometry: Geometry, voters: int
) -> Decision:
    """The rule's decision of padded tensors, by the scores that it is given."""
    batch, seqlen_q = q.shape[:2]
    seqlen_k, kv_heads = k.shape[1:3]
    rows = thresholds.shape[1]
    by_kv_head = thresholds.reshape(kv_heads, -1, rows).repeat(batch, 1, 1)

    def decide(block: QueryBlock, chunk: slice, scores: Tensor) -> tuple[Tensor, Tensor]:
        row = threshold_row(block.start, seqlen_q, seqlen_k, geometry.q_block, rows)
        bounds = by_kv_head[chunk, :, row].to(scores.dtype)
        if (bounds == -_INF).all() or block.full_blocks == 0:  # nothing to decide
            keep = scores.new_ones((*bounds.shape, block.visible_blocks), dtype=torch.bool)
            return keep, torch.full_like(bounds, _INF)
        peaks = in_blocks(scores[:, :, block.voting(voters)], block.k_block).amax(-1)
        keep, excess = verdicts(peaks, bounds, rule=rule, full=block.full_blocks)
        distance = (excess[..., : block.full_blocks] - bounds[..., None]).abs()
        return keep, distance.nan_to_num(_INF, _INF).amin(-1)

    return decide


@torch.no_grad()
def block_maxima(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    rule: str = "absolute",
    geometry: Geometry = DEFAULT_GEOMETRY,
    voters: int = 1,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The quantity that is compared with the thresholds, for every block.

    Args: as in ``attention``. The result is that of ``bsfa_kernel.block_maxima``, in the dtype
    computed in, but over the voting rows alone: others are not computed, which takes that much less
    time. A block without a voting row that sees some of it, which is a forced one, has -inf. The
    errors are those of ``attention``.
    """
    call = BlockMaximaCall(q, k, causal, scale, rule, *check_two_sizes(geometry))
    return run_block_maxima(call, compute_dtype, voters)


@torch.no_grad()
def run_block_maxima(
    call: BlockMaximaCall, compute_dtype: torch.dtype | None = None, voters: int = 1
) -> Tensor:
    """``block_maxima`` of a call."""
    check_block_maxima(call, any_geometry=True)
    check_voters(voters, call.q_block)
    q, k, geometry = call.q, call.k, geometry_of(call)
    dtype = computed_in(q, compute_dtype)
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    sizes = block_count(seqlen_q, geometry.q_block), block_count(seqlen_k, geometry.k_block)
    shape = (batch * kv_heads, heads // kv_heads, *sizes)
    maxima = torch.full(shape, -_INF, dtype=dtype, device=q.device)
    for block, chunk, scores in score_chunks(
        q,
        k,
        causal=call.causal,
        scale=scale_of(q, call.scale),
        geometry=geometry,
        dtype=dtype,
        voters=voters,
    ):
        peaks = in_blocks(scores, geometry.k_block).amax(-1)
        excess = row_excesses(peaks, call.rule).masked_fill(peaks == -_INF, -_INF)
        maxima[chunk, :, block.index, : block.visible_blocks] = excess.amax(2)
    return maxima.view(batch, heads, *sizes)
