# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The semantics of docs/semantics.md in PyTorch: the CPU back end, and the oracle of the tests.

Written to be read beside that page, and to be fast enough to run a small model: it works query
block by query block, and on so many heads at a time as keep the scores in cache, so that memory
grows with the length and not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from bsfa_kernel._calls import BlockMaximaCall, ForwardCall, geometry_of
from bsfa_kernel._checks import (
    check_block_maxima,
    check_cu_seqlens_values,
    check_forward,
    check_rule,
    check_thresholds_values,
    check_voters,
)
from bsfa_kernel.geometry import (
    DEFAULT_GEOMETRY,
    Geometry,
    block_count,
    full_blocks,
    threshold_row,
    visible_keys,
)

_INF = float("inf")

# Scores computed at a time: 16 MB of float32 stay near a CPU's cache; a GPU wants large launches.
_SCORES_AT_A_TIME_CPU = 2**22
_SCORES_AT_A_TIME_GPU = 2**27

# Share of kept blocks below which a CPU is faster on a copy of them than on all, masked.
_WORTH_GATHERING = 0.6

_LOG2_E = 1.4426950408889634


class AttentionResult(NamedTuple):
    """What ``attention`` computes; shapes as in docs/semantics.md, those of varlen in brackets."""

    out: Tensor
    """[batch, seqlen_q, heads, head_dim] ([total_q, heads, head_dim]), in q's dtype or, if given,
    ``compute_dtype``."""
    lse: Tensor
    """[batch, heads, seqlen_q] ([heads, total_q]), in the dtype computed in."""
    kept: Tensor
    """[batch, heads, q_blocks] ([heads, total_q // q_block + batch]), int32: how many blocks."""
    mask: Tensor
    """[batch, heads, q_blocks, k_blocks] ([heads, total_q // q_block + batch, k_blocks of the
    longest sequence]), bool: which blocks."""
    margin: Tensor
    """As ``kept``, in the dtype computed in: how far the closest verdict of the query block was
    from the other one, in units of scaled scores; inf where nothing was decided. Arithmetic that
    errs by less must come to the same verdicts."""


class Verdicts(NamedTuple):
    """What ``verdicts`` decides."""

    keep: Tensor
    """[..., k_blocks], bool; True for forced blocks and all beyond them."""
    excess: Tensor
    """[..., k_blocks]: what was compared with the threshold, the maximum over the rows of row
    maximum - reference; inf where nothing was decided."""


@dataclass(frozen=True)
class _QueryBlock:
    """One block of queries and the keys it sees."""

    index: int
    start: int
    stop: int
    full_blocks: int  # key blocks of which every query sees every key: those that a verdict is on
    visible_keys: int  # keys that some query sees

    @property
    def rows(self) -> int:
        return self.stop - self.start


def _query_blocks(
    seqlen_q: int, seqlen_k: int, causal: bool, geometry: Geometry
) -> Iterator[_QueryBlock]:
    sizes = (seqlen_q, seqlen_k, geometry)
    for index in range(block_count(seqlen_q, geometry.q_block)):
        start = index * geometry.q_block
        yield _QueryBlock(
            index,
            start,
            min(start + geometry.q_block, seqlen_q),
            full_blocks(index, *sizes, causal=causal),
            visible_keys(index, *sizes, causal=causal),
        )


def visible_blocks(
    seqlen_q: int, seqlen_k: int, *, causal: bool = True, geometry: Geometry = DEFAULT_GEOMETRY
) -> Tensor:
    """The blocks in which some query sees some key, bool [q_blocks, k_blocks]."""
    rows = torch.arange(block_count(seqlen_q, geometry.q_block))[:, None]
    first_keys = torch.arange(block_count(seqlen_k, geometry.k_block)) * geometry.k_block
    return first_keys < visible_keys(rows, seqlen_q, seqlen_k, geometry, causal=causal)


def forced_blocks(
    seqlen_q: int, seqlen_k: int, *, causal: bool = True, geometry: Geometry = DEFAULT_GEOMETRY
) -> Tensor:
    """The blocks that are always kept, as ``visible_blocks``: visible ones with a masked score."""
    visible = visible_blocks(seqlen_q, seqlen_k, causal=causal, geometry=geometry)
    rows = torch.arange(visible.shape[0])[:, None]
    full = full_blocks(rows, seqlen_q, seqlen_k, geometry, causal=causal)
    return visible & (torch.arange(visible.shape[1]) >= full)


@torch.no_grad()
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
    compute_dtype: torch.dtype | None = None,
) -> AttentionResult:
    """``bsfa_kernel.block_sparse_attention``, and all that can be known of its verdicts.

    Args: as there; tensors may be float16, bfloat16, float32 or float64, on any device and with any
    strides, thresholds also float64, and the geometry any, so that cases can be worked by hand.
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
            *_two_sizes(geometry),
            voters,
            return_lse=True,
            return_kept=True,
        ),
        compute_dtype,
    )


@torch.no_grad()
def run(call: ForwardCall, compute_dtype: torch.dtype | None = None) -> AttentionResult:
    """``attention`` of a call."""
    check_forward(call, any_geometry=True)
    check_thresholds_values(call.thresholds)
    q, k, cu_seqlens_q, cu_seqlens_k = call.q, call.k, call.cu_seqlens_q, call.cu_seqlens_k
    dtype = _compute_dtype(q, compute_dtype)
    heads = q.shape[-2]

    if cu_seqlens_q is None or cu_seqlens_k is None:
        batch, seqlen_q = q.shape[:2]
        q_blocks = block_count(seqlen_q, call.q_block)
        k_blocks = block_count(k.shape[1], call.k_block)
        result = _empty_result(
            q, compute_dtype, dtype, (batch, heads, seqlen_q), (batch, heads, q_blocks), k_blocks
        )
        _attend(call, result, dtype)
        return result

    check_cu_seqlens_values(cu_seqlens_q, "cu_seqlens_q", "total_q", q.shape[0])
    check_cu_seqlens_values(cu_seqlens_k, "cu_seqlens_k", "total_k", k.shape[0])
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    batch = len(starts_q) - 1
    longest = max((e - b for b, e in pairwise(starts_k)), default=0)
    columns = q.shape[0] // call.q_block + batch
    result = _empty_result(
        q,
        compute_dtype,
        dtype,
        (heads, q.shape[0]),
        (heads, columns),
        block_count(longest, call.k_block),
    )
    for index in range(batch):
        queries = slice(starts_q[index], starts_q[index + 1])
        keys = slice(starts_k[index], starts_k[index + 1])
        length_q, length_k = queries.stop - queries.start, keys.stop - keys.start
        first = starts_q[index] // call.q_block + index
        blocks = slice(first, first + block_count(length_q, call.q_block))
        k_blocks = block_count(length_k, call.k_block)
        part = AttentionResult(
            out=result.out[None, queries],
            lse=result.lse[None, :, queries],
            kept=result.kept[None, :, blocks],
            mask=result.mask[None, :, blocks, :k_blocks],
            margin=result.margin[None, :, blocks],
        )
        sequence = call._replace(q=q[None, queries], k=k[None, keys], v=call.v[None, keys])
        _attend(sequence, part, dtype)
    return result


def _two_sizes(geometry: Geometry) -> tuple[int, int]:
    if len(geometry) != 2:
        raise ValueError(f"geometry must be two positive numbers, got {tuple(geometry)}")
    return geometry[0], geometry[1]


def _scale(call: ForwardCall | BlockMaximaCall) -> float:
    return float(call.q.shape[-1]) ** -0.5 if call.scale is None else float(call.scale)


def _compute_dtype(q: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    if compute_dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"compute_dtype must be float32 or float64, got {compute_dtype}")
    if compute_dtype is not None:
        return compute_dtype
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _empty_result(
    q: Tensor,
    out_dtype: torch.dtype | None,
    dtype: torch.dtype,
    lse_shape: tuple[int, ...],
    kept_shape: tuple[int, ...],
    k_blocks: int,
) -> AttentionResult:
    """The outputs of a call in which no query sees a key."""
    device = q.device
    return AttentionResult(
        out=torch.zeros(q.shape, dtype=out_dtype or q.dtype, device=device),
        lse=torch.full(lse_shape, -_INF, dtype=dtype, device=device),
        kept=torch.zeros(kept_shape, dtype=torch.int32, device=device),
        mask=torch.zeros((*kept_shape, k_blocks), dtype=torch.bool, device=device),
        margin=torch.full(kept_shape, _INF, dtype=dtype, device=device),
    )


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[batch, seqlen, kv_heads, head_dim] -> contiguous [batch * kv_heads, seqlen, head_dim]."""
    batch, seqlen, kv_heads, head_dim = x.shape
    copy = torch.empty((batch, kv_heads, seqlen, head_dim), dtype=dtype, device=x.device)
    copy.copy_(x.transpose(1, 2))
    return copy.view(batch * kv_heads, seqlen, head_dim)


def _grouped_queries(q: Tensor, kv_heads: int, scale: float, dtype: torch.dtype) -> Tensor:
    """[batch, rows, heads, head_dim] -> scaled [batch * kv_heads, group * rows, head_dim].

    The query heads that read one kv head lie side by side, so that nothing of it is repeated.
    """
    batch, rows, heads, head_dim = q.shape
    group = heads // kv_heads
    scaled = torch.empty((batch, kv_heads, group, rows, head_dim), dtype=dtype, device=q.device)
    scaled.view(batch, heads, rows, head_dim).copy_(q.transpose(1, 2)).mul_(scale)
    return scaled.view(batch * kv_heads, group * rows, head_dim)


def _in_blocks(scores: Tensor, k_block: int) -> Tensor:
    """A view of [..., keys] as [..., k_blocks, k_block]."""
    return scores.view(*scores.shape[:-1], scores.shape[-1] // k_block, k_block)


def _chunks(total: int, scores_each: int, device: torch.device) -> Iterator[slice]:
    """Slices of the kv heads, so that the scores computed at a time stay bounded."""
    budget = _SCORES_AT_A_TIME_CPU if device.type == "cpu" else _SCORES_AT_A_TIME_GPU
    step = max(budget // max(scores_each, 1), 1)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _hide_masked(scores: Tensor, block: _QueryBlock, first_key: int, offset: int) -> None:
    """Set the scores [..., rows, keys] that a causal mask hides to -inf; key 0 is ``first_key``."""
    device = scores.device
    last_seen = torch.arange(block.start, block.stop, device=device) + offset
    keys = torch.arange(first_key, first_key + scores.shape[-1], device=device)
    scores.masked_fill_(keys > last_seen[:, None], -_INF)


def _attend(call: ForwardCall, result: AttentionResult, dtype: torch.dtype) -> None:
    """Fill ``result``, which holds what queries without keys give; of padded tensors."""
    q, k, v, thresholds, _, _, causal, _, rule, *_ = call
    geometry, scale = geometry_of(call), _scale(call)
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    if 0 in (batch, heads, seqlen_k):
        return
    keys, values = _heads_first(k, dtype), _heads_first(v, dtype)
    gather_below = _WORTH_GATHERING if q.device.type == "cpu" else 0.0
    if not values.isfinite().all():
        gather_below = 1.0  # a weight of 0 would not take a NaN out

    for block in _query_blocks(seqlen_q, seqlen_k, causal, geometry):
        if block.visible_keys == 0:
            continue
        rows = slice(block.start, block.stop)
        queries = _grouped_queries(q[:, rows], kv_heads, scale, dtype)
        in_last = block.stop == seqlen_q
        voting = slice(None) if in_last else slice(call.voters - 1, None, call.voters)
        row = threshold_row(block.start, seqlen_q, seqlen_k, geometry.q_block, thresholds.shape[1])
        bounds = thresholds[:, row].to(dtype).reshape(1, kv_heads, group)
        bounds = bounds.expand(batch, -1, -1).reshape(batch * kv_heads, group)

        out = torch.empty_like(queries)
        lse = queries.new_empty((batch * kv_heads, group, block.rows))
        keep = torch.ones(
            (batch * kv_heads, group, block.full_blocks), dtype=torch.bool, device=q.device
        )
        margin = queries.new_full((batch * kv_heads, group), _INF)
        for chunk in _chunks(len(queries), queries.shape[1] * block.visible_keys, q.device):
            scores = torch.bmm(queries[chunk], keys[chunk, : block.visible_keys].transpose(1, 2))
            scores = scores.view(-1, group, block.rows, block.visible_keys)
            undecided = block.full_blocks * geometry.k_block
            blocks = _in_blocks(scores[..., :undecided], geometry.k_block)
            forced = scores[..., undecided:]
            if causal:
                _hide_masked(forced, block, undecided, seqlen_k - seqlen_q)
            if block.full_blocks:
                keep[chunk], margin[chunk] = _decide(
                    scores, block.full_blocks, bounds[chunk], rule, geometry.k_block, voting
                )
                share = keep[chunk].mean(dtype=torch.float32).item()
                if share < gather_below:
                    _attend_gathered(
                        blocks, forced, keep[chunk], values[chunk], out[chunk], lse[chunk]
                    )
                    continue
                if share < 1.0:
                    blocks.masked_fill_(~keep[chunk, :, None, :, None], -_INF)
            out[chunk], lse[chunk] = _softmax_times(scores, values[chunk, : block.visible_keys])

        k_blocks = block_count(block.visible_keys, geometry.k_block)
        result.out[:, rows] = out.view(batch, heads, block.rows, head_dim).transpose(1, 2)
        result.lse[:, :, rows] = lse.view(batch, heads, block.rows)
        keep = keep.view(batch, heads, block.full_blocks)
        result.mask[:, :, block.index, : block.full_blocks] = keep
        result.mask[:, :, block.index, block.full_blocks : k_blocks] = True
        result.kept[:, :, block.index] = keep.sum(-1) + (k_blocks - block.full_blocks)
        result.margin[:, :, block.index] = margin.view(batch, heads)


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


def _attend_gathered(
    blocks: Tensor, forced: Tensor, keep: Tensor, values: Tensor, out: Tensor, lse: Tensor
) -> None:
    """Softmax times values on a copy of what is kept, head by head.

    Args:
        blocks: scores [kv_heads, group, rows, full_blocks, k_block].
        forced: scores [kv_heads, group, rows, keys] of the keys after them, -inf where masked.
        keep: bool [kv_heads, group, full_blocks].
        values: [kv_heads, keys, head_dim].
        out: written, [kv_heads, group * rows, head_dim].
        lse: written, [kv_heads, group, rows].
    """
    kv_heads, group, rows, full_blocks, k_block = blocks.shape
    undecided = full_blocks * k_block
    last_values = values[:, undecided : undecided + forced.shape[-1]]
    value_blocks = values[:, :undecided].view(kv_heads, full_blocks, k_block, -1)
    for kv_head in range(kv_heads):
        for member in range(group):
            chosen = keep[kv_head, member].nonzero().squeeze(1)
            kept_scores = blocks[kv_head, member].index_select(1, chosen).flatten(1)
            kept_scores = torch.cat((kept_scores, forced[kv_head, member]), 1)
            if kept_scores.shape[-1] == 0:
                out[kv_head, member * rows : (member + 1) * rows] = 0
                lse[kv_head, member] = -_INF
                continue
            kept_values = value_blocks[kv_head].index_select(0, chosen).flatten(0, 1)
            kept_values = torch.cat((kept_values, last_values[kv_head]))
            weighted, norm = _softmax_times(kept_scores[None, None], kept_values[None])
            out[kv_head, member * rows : (member + 1) * rows] = weighted[0]
            lse[kv_head, member] = norm[0, 0]


@torch.no_grad()
def excesses(
    row_maxima: Tensor,
    *,
    rule: str,
    reference: Tensor | None = None,
    voting: Tensor | None = None,
) -> Tensor:
    """What the rule of docs/semantics.md compares with the thresholds, for every block.

    Key blocks are visited from the last to the first. All values are scaled scores.

    Args:
        row_maxima: [..., rows, k_blocks], the peak of each row in each block; -inf where it has
            none.
        rule: one of ``RULES``.
        reference: [..., rows], what relative rules compare with at first, of later blocks than are
            given here; -inf by default.
        voting: bool, to be broadcast with [..., rows]: which rows vote, for instance
            ``voting_rows``; all by default. No row needs another, so that rows that do not vote may
            as well be left out of ``row_maxima``.

    Returns:
        [..., k_blocks], the maximum over the voting rows of peak - reference; NaN, which keeps a
        block, where a peak or reference is NaN, or both are infinite.

    Raises:
        ValueError: an unknown rule.
    """
    check_rule(rule)
    excess = _row_excesses(row_maxima, rule, reference)
    if voting is not None:
        excess = excess.masked_fill(~voting[..., None], -_INF)
    return excess.amax(-2)


@torch.no_grad()
def verdicts(
    row_maxima: Tensor,
    thresholds: Tensor,
    *,
    rule: str,
    reference: Tensor | None = None,
    voting: Tensor | None = None,
    full: int | Tensor | None = None,
) -> Verdicts:
    """The rule of docs/semantics.md, for any number of query blocks and thresholds at once.

    Args:
        row_maxima: [..., rows, k_blocks], as in ``excesses``.
        thresholds: [...], which is broadcast with the leading dimensions of ``row_maxima``: several
            thresholds can be tried at once.
        rule: one of ``RULES``.
        reference: [..., rows], as in ``excesses``.
        voting: bool [..., rows], as in ``excesses``.
        full: how many of the blocks are to be decided, int [...] to be broadcast like the
            thresholds; those from there on are forced. All by default.

    Raises:
        ValueError: an unknown rule.
    """
    excess = excesses(row_maxima, rule=rule, reference=reference, voting=voting)
    thresholds = thresholds.to(excess.dtype)[..., None]
    # NaN keeps; +inf keeps no block, not even where a row has seen nothing yet.
    keep = ~(excess < thresholds) & (thresholds < _INF)
    excess = excess.expand(keep.shape)
    if full is not None:
        columns = torch.arange(row_maxima.shape[-1], device=row_maxima.device)
        forced = columns >= torch.as_tensor(full, device=row_maxima.device)[..., None]
        keep, excess = keep | forced, excess.masked_fill(forced, _INF)
    return Verdicts(keep, excess)


def voting_rows(seqlen_q: int, geometry: Geometry, voters: int) -> Tensor:
    """Which rows of each query block of a sequence vote, bool [q_blocks, q_block].

    The last of each ``voters`` rows, and in the last query block all that there are.

    Raises:
        ValueError: ``voters`` is not one of ``VOTERS``, or does not divide ``q_block``.
    """
    check_voters(voters, geometry.q_block)
    rows = torch.arange(geometry.q_block)
    first_rows = torch.arange(block_count(seqlen_q, geometry.q_block))[:, None] * geometry.q_block
    in_last = first_rows + geometry.q_block >= seqlen_q
    return (first_rows + rows < seqlen_q) & ((rows % voters == voters - 1) | in_last)


def _row_excesses(row_maxima: Tensor, rule: str, first: Tensor | None = None) -> Tensor:
    """Peak - reference of each row and block; arguments as of ``excesses``."""
    if rule == "absolute":
        return row_maxima
    # A reference is made of all later blocks, and is NaN from where one held NaN or +inf.
    if first is None:
        first = torch.full_like(row_maxima[..., 0], -_INF)
    seen = torch.cat((row_maxima[..., 1:], first[..., None]), -1)
    seen = seen.masked_fill_(seen == _INF, torch.nan).flip(-1)
    so_far = seen.cummax(-1).values if rule == "running_max" else seen.logcumsumexp(-1)
    return row_maxima - so_far.flip(-1)


def _margin(excess: Tensor, bounds: Tensor) -> Tensor:
    """Distance of the closest verdict from the other one: over the last dimension."""
    return (excess - bounds[..., None]).abs().nan_to_num(nan=_INF).amin(-1)


def _peaks(scores: Tensor, k_block: int) -> Tensor:
    """The largest score of each block of keys, [..., keys] -> [..., k_blocks]."""
    ragged = -scores.shape[-1] % k_block
    if ragged:
        scores = torch.nn.functional.pad(scores, (0, ragged), value=-_INF)
    return _in_blocks(scores, k_block).amax(-1)


def _decide(
    scores: Tensor, full: int, bounds: Tensor, rule: str, k_block: int, voting: slice
) -> tuple[Tensor, Tensor]:
    """Which blocks are kept, and how close the closest verdict was.

    Args:
        scores: [kv_heads, group, rows, keys], -inf where masked.
        full: how many of the blocks are to be decided, at least one.
        bounds: [kv_heads, group], the thresholds.
        rule: one of ``RULES``.
        k_block: keys in a block.
        voting: the rows that vote.

    Returns:
        bool [kv_heads, group, full], and margins [kv_heads, group].
    """
    if (bounds == -_INF).all():  # dense: nothing to decide
        keep = torch.ones((*bounds.shape, full), dtype=torch.bool, device=scores.device)
        return keep, torch.full_like(bounds, _INF)
    decided = verdicts(_peaks(scores[:, :, voting], k_block), bounds, rule=rule, full=full)
    return decided.keep[..., :full], _margin(decided.excess[..., :full], bounds)


@torch.no_grad()
def block_maxima(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    rule: str = "absolute",
    geometry: Geometry = DEFAULT_GEOMETRY,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The quantity that is compared with the thresholds, for every block.

    Args: as in ``attention``. The result is that of ``bsfa_kernel.block_maxima``, in the dtype
    computed in; the errors are those of ``attention``.
    """
    call = BlockMaximaCall(q, k, causal, scale, rule, *_two_sizes(geometry))
    return run_block_maxima(call, compute_dtype)


@torch.no_grad()
def run_block_maxima(call: BlockMaximaCall, compute_dtype: torch.dtype | None = None) -> Tensor:
    """``block_maxima`` of a call."""
    check_block_maxima(call, any_geometry=True)
    q, k, causal, _, rule, *_ = call
    geometry, scale = geometry_of(call), _scale(call)
    dtype = _compute_dtype(q, compute_dtype)
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    maxima = torch.full(
        (
            batch,
            heads,
            block_count(seqlen_q, geometry.q_block),
            block_count(seqlen_k, geometry.k_block),
        ),
        -_INF,
        dtype=dtype,
        device=q.device,
    )
    if maxima.numel() == 0:
        return maxima
    keys = _heads_first(k, dtype)
    for block in _query_blocks(seqlen_q, seqlen_k, causal, geometry):
        if block.visible_keys == 0:
            continue
        queries = _grouped_queries(q[:, block.start : block.stop], kv_heads, scale, dtype)
        k_blocks = block_count(block.visible_keys, geometry.k_block)
        found = queries.new_empty((len(queries), heads // kv_heads, k_blocks))
        for chunk in _chunks(len(queries), queries.shape[1] * block.visible_keys, q.device):
            scores = torch.bmm(queries[chunk], keys[chunk, : block.visible_keys].transpose(1, 2))
            scores = scores.view(-1, heads // kv_heads, block.rows, block.visible_keys)
            undecided = block.full_blocks * geometry.k_block
            if causal:
                _hide_masked(scores[..., undecided:], block, undecided, seqlen_k - seqlen_q)
            peaks = _peaks(scores, geometry.k_block)
            excess = _row_excesses(peaks, rule)
            found[chunk] = excess.masked_fill(peaks == -_INF, -_INF).amax(2)
        maxima[:, :, block.index, :k_blocks] = found.view(batch, heads, k_blocks)
    return maxima
