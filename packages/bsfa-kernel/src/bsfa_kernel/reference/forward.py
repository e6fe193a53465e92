# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Attention over the blocks that a rule or a mask keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from bsfa_kernel._calls import (
    MASK_BITS,
    AttendCall,
    ForwardCall,
    columns_shape,
    geometry_of,
)
from bsfa_kernel._checks import (
    check_attend,
    check_forward,
    check_thresholds_values,
    check_two_sizes,
)
from bsfa_kernel.geometry import DEFAULT_GEOMETRY, Geometry, block_count
from bsfa_kernel.masks import unpack_blocks
from bsfa_kernel.reference.context import in_own_dtypes
from bsfa_kernel.reference.parts import Part, parts_of
from bsfa_kernel.reference.scores import (
    QueryBlock,
    computed_in,
    heads_first,
    in_blocks,
    scale_of,
    score_chunks,
)
from bsfa_kernel.reference.selection import Decision, decision_by_rule, sinks_by_kv_head

_INF = float("inf")

# Share of kept blocks below which a CPU is faster on a copy of them than on all, masked.
_WORTH_GATHERING = 0.6

_LOG2_E = 1.4426950408889634


class AttentionResult(NamedTuple):
    """What ``attention`` computes: shapes of docs/semantics.md, of packed queries in brackets."""

    out: Tensor
    """[batch, seqlen_q, heads, head_dim] ([total_q, heads, head_dim]), in q's dtype or, if given,
    ``compute_dtype``."""
    lse: Tensor
    """[batch, heads, seqlen_q] ([heads, total_q]), in the dtype computed in."""
    kept: Tensor
    """[batch, heads, q_blocks] ([heads, total_q // q_block + 2 * batch]), int32: how many
    blocks."""
    mask: Tensor
    """[batch, heads, q_blocks, k_blocks] ([heads, total_q // q_block + 2 * batch, k_blocks]), bool:
    which blocks; k_blocks are those of the longest sequence."""
    margin: Tensor
    """As ``kept``, in the dtype computed in: how far the closest verdict of the query block was
    from the other one, in units of scaled scores; inf where nothing was decided. Arithmetic that
    errs by less must come to the same verdicts."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    rule: str = "absolute",
    geometry: Geometry = DEFAULT_GEOMETRY,
    voters: int = 1,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    sinks: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> AttentionResult:
    """``bsfa_kernel.block_sparse_attention``, and all that can be known of its verdicts.

    Args: as there; tensors may be float16, bfloat16, float32 or float64, on any device and with any
    strides, thresholds and sinks also float64, and the geometry any, so that cases can be worked by
    hand.
    ``compute_dtype``, float32 or float64, is what is computed in and returned; by default float64
    inputs are computed in float64, all others in float32, and the output has q's dtype.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument that breaks a rule; the message names rule and value.
    """
    return run(
        ForwardCall(
            q,
            k,
            v,
            thresholds,
            cu_seqlens_q,
            cu_seqlens_k,
            causal,
            scale,
            rule,
            *check_two_sizes(geometry),
            voters,
            return_lse=True,
            return_kept=True,
            block_table=block_table,
            seqused_k=seqused_k,
            sinks=sinks,
        ),
        compute_dtype,
    )


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    geometry: Geometry = DEFAULT_GEOMETRY,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    sinks: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> AttentionResult:
    """``bsfa_kernel.attend_blocks``, with the mask of what was attended; no margin is finite.

    Args: as there, and as in ``attention``, and so are the errors.
    """
    return run_attend(
        AttendCall(
            q,
            k,
            v,
            block_mask,
            None,
            cu_seqlens_q,
            cu_seqlens_k,
            causal,
            scale,
            *check_two_sizes(geometry),
            return_lse=True,
            return_kept=True,
            block_table=block_table,
            seqused_k=seqused_k,
            sinks=sinks,
        ),
        compute_dtype,
    )


@in_own_dtypes
def run(call: ForwardCall, compute_dtype: torch.dtype | None = None) -> AttentionResult:
    """``attention`` of a call."""
    check_forward(call, any_geometry=True)
    check_thresholds_values(call.thresholds)
    return _run(
        call,
        compute_dtype,
        lambda q, k, _: decision_by_rule(
            call.thresholds,
            q,
            k,
            rule=call.rule,
            geometry=geometry_of(call),
            voters=call.voters,
            sinks=call.sinks,
        ),
    )


@in_own_dtypes
def run_attend(call: AttendCall, compute_dtype: torch.dtype | None = None) -> AttentionResult:
    """``attend_blocks`` of a call."""
    check_attend(call, any_geometry=True)
    if call.thresholds is not None:
        check_thresholds_values(call.thresholds)

    def decision(q: Tensor, k: Tensor, part: Part) -> Decision | None:
        k_blocks = block_count(part.seqlen_k, call.k_block)
        if k_blocks > MASK_BITS * call.block_mask.shape[-1]:
            return None
        mask = unpack_blocks(part.of_columns(call.block_mask), k_blocks)
        rows = len(q) * k.shape[2]  # of heads that share keys
        mask = mask.reshape(rows, q.shape[2] // k.shape[2], *mask.shape[-2:])

        def masked(block: QueryBlock, chunk: slice, scores: Tensor) -> tuple[Tensor, Tensor]:
            keep = mask[chunk, :, block.index, : block.visible_blocks]
            return keep, scores.new_full(keep.shape[:2], _INF)

        return masked

    return _run(call, compute_dtype, decision)


_DecisionOf: TypeAlias = Callable[[Tensor, Tensor, Part], Decision | None]
"""The decision of a part of a call, given its q and k; None where its outputs are NaN."""


def _run(
    call: ForwardCall | AttendCall, compute_dtype: torch.dtype | None, decision_of: _DecisionOf
) -> AttentionResult:
    """Attention, part by part."""
    dtype = computed_in(call.q, compute_dtype)
    parts = parts_of(call)
    longest = max((part.seqlen_k for part in parts), default=0)
    result = _empty_result(call, compute_dtype, dtype, block_count(longest, call.k_block))
    for part in parts:
        q, k, v = part.of_queries(call.q), part.of_keys(call.k), part.of_keys(call.v)
        mask = part.of_columns(result.mask)[..., : block_count(part.seqlen_k, call.k_block)]
        its_result = AttentionResult(
            out=part.of_queries(result.out),
            lse=part.of_lse(result.lse),
            kept=part.of_columns(result.kept),
            mask=mask,
            margin=part.of_columns(result.margin),
        )
        _attend(call, q, k, v, its_result, dtype, decision_of(q, k, part))
    return result


def _empty_result(
    call: ForwardCall | AttendCall,
    out_dtype: torch.dtype | None,
    dtype: torch.dtype,
    k_blocks: int,
) -> AttentionResult:
    """The outputs of a call in which no query sees a key."""
    q, kept_shape = call.q, columns_shape(call)
    *batch, seqlen_q, heads, _ = q.shape
    device = q.device
    return AttentionResult(
        out=torch.zeros(q.shape, dtype=out_dtype or q.dtype, device=device),
        lse=torch.full((*batch, heads, seqlen_q), -_INF, dtype=dtype, device=device),
        kept=torch.zeros(kept_shape, dtype=torch.int32, device=device),
        mask=torch.zeros((*kept_shape, k_blocks), dtype=torch.bool, device=device),
        margin=torch.full(kept_shape, _INF, dtype=dtype, device=device),
    )


def _attend(
    call: ForwardCall | AttendCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    result: AttentionResult,
    dtype: torch.dtype,
    decide: Decision | None,
) -> None:
    """Fill ``result``, which holds what queries without keys give; of padded tensors."""
    if decide is None:
        result.out.fill_(torch.nan)
        result.lse.fill_(torch.nan)
        return
    batch, seqlen_q, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    values = heads_first(v, dtype, call.k_block)
    gather_below = _WORTH_GATHERING if q.device.type == "cpu" else 0.0
    if not values.isfinite().all():
        gather_below = 1.0  # a weight of 0 would not take a NaN out

    shape = (batch * kv_heads, heads // kv_heads)
    out = values.new_zeros((*shape, seqlen_q, head_dim))
    lse = values.new_full((*shape, seqlen_q), -_INF)
    mask = torch.zeros((*shape, *result.mask.shape[-2:]), dtype=torch.bool, device=q.device)
    margin = values.new_full((*shape, mask.shape[2]), _INF)
    for block, chunk, scores in score_chunks(
        q,
        k,
        causal=call.causal,
        scale=scale_of(q, call.scale),
        geometry=geometry_of(call),
        dtype=dtype,
    ):
        keep, margin[chunk, :, block.index] = decide(block, chunk, scores)
        weighted, norm = _attend_kept(scores, keep, values[chunk], block, gather_below)
        out[chunk, :, block.rows] = weighted.view(*norm.shape, head_dim)
        lse[chunk, :, block.rows] = norm
        mask[chunk, :, block.index, : block.visible_blocks] = keep

    if call.sinks is not None:
        _add_sinks(out, lse, sinks_by_kv_head(call.sinks, batch, kv_heads)[..., None])
    result.out.copy_(out.view(batch, heads, seqlen_q, head_dim).transpose(1, 2))
    result.lse.copy_(lse.view(result.lse.shape))
    result.mask.copy_(mask.view(result.mask.shape))
    result.kept.copy_(result.mask.sum(-1))
    result.margin.copy_(margin.view(result.margin.shape))


def _attend_kept(
    scores: Tensor, keep: Tensor, values: Tensor, block: QueryBlock, gather_below: float
) -> tuple[Tensor, Tensor]:
    """Softmax times values over the blocks kept. Overwrites the scores.

    Args:
        scores: [kv_heads, group, rows, k_blocks * k_block], -inf where unseen.
        keep: bool [kv_heads, group, k_blocks].
        values: [kv_heads, at least those keys, head_dim].
        block: the query block.
        gather_below: the share of kept blocks below which to work on a copy of them.

    Returns:
        [kv_heads, group * rows, head_dim], and the log-sum-exp [kv_heads, group, rows].
    """
    share = int(keep.sum()) / max(keep.numel(), 1)
    if share < min(gather_below, 1.0):
        return _attend_gathered(scores, keep, values, block)
    if share < 1.0:
        in_blocks(scores, block.k_block).masked_fill_(~keep[:, :, None, :, None], -_INF)
    # Unseen keys at the end of the last block take no part: there may be NaN in their values.
    seen = slice(0, block.visible_keys)
    return _softmax_times(scores[..., seen], values[:, seen])


def _attend_gathered(
    scores: Tensor, keep: Tensor, values: Tensor, block: QueryBlock
) -> tuple[Tensor, Tensor]:
    """``_attend_kept`` on a copy of what is kept, head by head."""
    kv_heads, group, rows, width = scores.shape
    out = scores.new_zeros((kv_heads, group, rows, values.shape[-1]))
    lse = scores.new_full((kv_heads, group, rows), -_INF)
    blocks = in_blocks(scores, block.k_block)
    value_blocks = values[:, :width].view(kv_heads, -1, block.k_block, values.shape[-1])
    for kv_head in range(kv_heads):
        for member in range(group):
            chosen = keep[kv_head, member].nonzero().squeeze(1)
            if len(chosen) == 0:
                continue
            count = len(chosen) * block.k_block
            if keep[kv_head, member, -1]:
                count -= width - block.visible_keys
            kept_scores = blocks[kv_head, member].index_select(1, chosen).flatten(1)
            kept_values = value_blocks[kv_head].index_select(0, chosen).flatten(0, 1)
            weighted, norm = _softmax_times(
                kept_scores[None, None, :, :count], kept_values[None, :count]
            )
            out[kv_head, member], lse[kv_head, member] = weighted[0], norm[0, 0]
    return out.flatten(1, 2), lse


def _add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Let a score without a value join each row's softmax.

    Args:
        out: [kv_heads, group, rows, head_dim], overwritten.
        lse: [kv_heads, group, rows], overwritten.
        sinks: [kv_heads, group, 1].
    """
    with_sink = torch.logaddexp(lse, sinks.to(lse.dtype).masked_fill(sinks == _INF, torch.nan))
    share = (lse - with_sink).exp_().masked_fill_(with_sink == -_INF, 1.0)
    out.mul_(share[..., None])
    lse.copy_(with_sink)


def _exp_(x: Tensor) -> Tensor:
    """exp, in place; by exp2, which keeps its speed on a CPU where results are tiny or 0."""
    return x.mul_(_LOG2_E).exp2_()


def _softmax_times(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension, times the values. Overwrites the scores.

    Args:
        scores: [kv_heads, group, rows, keys], -inf where left out.
        values: [kv_heads, keys, head_dim].

    Returns:
        [kv_heads, group * rows, head_dim], and the log-sum-exp [kv_heads, group, rows]; 0 and -inf
        for rows with nothing left.
    """
    largest = scores.amax(-1, keepdim=True)
    weights = _exp_(scores.sub_(largest.masked_fill(largest == -_INF, 0.0)))
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights.flatten(1, 2), values)
    out /= total.masked_fill(total == 0, 1.0).flatten(1, 2)
    return out, (largest + total.log()).squeeze(-1)
