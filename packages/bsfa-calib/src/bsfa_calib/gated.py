# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Block-sparse attention with gradients, at q, k, v and at the thresholds.

The forward pass is that of docs/semantics.md: a verdict is a step of excess - threshold, and the
excess of a block, its rows' peaks over their references, depends on no threshold. The derivative of
a step is nothing almost everywhere; the backward pass puts that of a logistic function of (excess -
threshold) / width in its place, under relative rules down to five widths below. What a verdict is
worth, the derivative of the loss with respect to a factor of all the block's weights, is exact, so
that the gradient of a threshold is the mean worth of the blocks near it.

Voting rows see all keys. All else is computed for lists of blocks, as the kernels do: the forward
pass and the gradients of q, k and v for blocks that are kept, what a verdict is worth for those and
the skipped ones near the threshold.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bsfa_kernel import GEOMETRIES, RULES, VOTERS, Geometry
from bsfa_kernel.geometry import count_visible, full_blocks
from bsfa_kernel.reference import verdicts
from bsfa_kernel.reference.context import without_autocast

_SCORES_AT_A_TIME_CPU = 1 << 24
_SCORES_AT_A_TIME_GPU = 1 << 26
# Widths below a threshold at which the slope of a verdict ends under relative rules, so that no
# block further down is computed: its weights are small, and 0.7 % of the logistic function's rise
# is left. Under the absolute rule a block may have large weights far below a threshold.
_REACH = 5.0


class Gated(NamedTuple):
    """What attention with gradients gives.

    Attributes:
        out: [seqlen, heads, head_dim], in the dtype of q.
        skipped: float32 [heads]: share of the visible blocks, without a gradient.
        slope: float32 [heads, q_blocks]: its derivative with respect to the thresholds, the
            logistic function standing for the verdicts again.
    """

    out: Tensor
    skipped: Tensor
    slope: Tensor


@dataclass
class Memo:
    """What a call came to, for a call with the same arguments.

    Attributes:
        found: output, LSE, verdicts and slopes; None before the first call.
    """

    found: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    *,
    rule: str,
    geometry: Geometry,
    scale: float,
    voters: int = 1,
    width: float = 0.5,
    sinks: Tensor | None = None,
    memo: Memo | None = None,
) -> Gated:
    """Causal block-sparse attention of one whole prompt.

    Args:
        q: [seqlen, heads, head_dim]; seqlen is a multiple of both sides of a block. Any dtype:
            scores are float32, and what the backward pass needs is kept in the dtype of q.
        k: [seqlen, kv_heads, head_dim]; heads is a multiple of kv_heads.
        v: as k.
        thresholds: float32 [heads, q_blocks].
        rule: one of ``bsfa_kernel.RULES``.
        geometry: the sparsity block, one of ``GEOMETRIES``.
        scale: factor of the scores.
        voters: one query row in 1, 2 or 4 votes.
        width: of the logistic function, in units of scaled scores.
        sinks: float32 [heads], a score of each head without a value, or None; no gradient.
        memo: takes what is computed, and gives it to the next call, which must have the same
            arguments: that of a layer that is recomputed in the backward pass.

    Raises:
        ValueError: an argument breaks a rule.
    """
    if not all(x.ndim == 3 and x.numel() and x.is_floating_point() for x in (q, k, v)):
        given = ", ".join(f"{list(x.shape)} {x.dtype}" for x in (q, k, v))
        raise ValueError(f"q, k and v must be of floating point, 3-D and not empty, got {given}")
    seqlen, heads, head_dim = q.shape
    if geometry not in GEOMETRIES:
        raise ValueError(f"blocks must be {' or '.join(map(str, GEOMETRIES))}, got {geometry}")
    q_block = geometry.q_block
    if seqlen % q_block or k.shape[0] != seqlen:
        raise ValueError(f"lengths must be equal and multiples of {geometry}, got {seqlen} queries")
    if k.shape[2] != head_dim or v.shape != k.shape or heads % k.shape[1]:
        raise ValueError(
            f"k and v must be [{seqlen}, kv_heads, {head_dim}] with kv_heads a divisor of {heads}, "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    if voters not in VOTERS:
        raise ValueError(f"voters must be one of {VOTERS}, got {voters}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, got {rule!r}")
    if thresholds.shape != (heads, seqlen // q_block):
        raise ValueError(
            f"thresholds must be [{heads}, {seqlen // q_block}], got {list(thresholds.shape)}"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be [{heads}], got {list(sinks.shape)}")
    if not width > 0:
        raise ValueError(f"width must be above 0, got {width}")
    by_head = (x.transpose(0, 1) for x in (q, k, v))
    out, skipped, slope = _GatedAttention.apply(  # type: ignore[no-untyped-call]
        *by_head, thresholds, _Options(rule, geometry, scale, voters, width, sinks, memo)
    )
    return Gated(out.transpose(0, 1), skipped, slope)


class _Options(NamedTuple):
    """The arguments of ``gated_attention`` that get no gradient."""

    rule: str
    geometry: Geometry
    scale: float
    voters: int
    width: float
    sinks: Tensor | None
    memo: Memo | None


class _Lists(NamedTuple):
    """Query blocks that list about as many key blocks, padded to equal lengths.

    Attributes:
        rows: int [lists], head * q_blocks + query block.
        blocks: int [lists, longest], kv_head * k_blocks + key block, from the last to the first;
            the padding repeats a list's first entry.
        filled: how many blocks the shortest list has.
        padding: bool [lists, longest - filled], which of the entries from there on are padding.
    """

    rows: Tensor
    blocks: Tensor
    filled: int
    padding: Tensor


class _GatedAttention(torch.autograd.Function):
    """Of q [heads, seqlen, head_dim], k and v [kv_heads, ...] and thresholds [heads, q_blocks]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, thresholds: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        memo = options.memo or Memo()
        if memo.found is None:
            with without_autocast(q.device.type):
                memo.found = _attend(q, k, v, thresholds, options)
        out, lse, kept, slope = memo.found
        ctx.save_for_backward(q, k, v, out, lse, kept, slope)
        ctx.options = options
        visible = count_visible(q.shape[1], q.shape[1], options.geometry)
        skipped = 1 - kept.sum((1, 2)).float() / visible
        of_row = slope.sum(-1) / visible
        ctx.mark_non_differentiable(skipped, of_row)
        # Not the tensor of the memo, which would then hold the graph.
        return out.detach(), skipped, of_row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, kept, slope = ctx.saved_tensors
        found = _Backward(q, k, v, out, lse, slope, gradients[0], ctx.options)
        group = q.shape[0] // k.shape[0]
        with without_autocast(q.device.type):
            for chosen, are_kept in ((kept, True), (~kept & (slope != 0), False)):
                for lists in _lists(chosen, group, ctx.options.geometry, q.shape[2]):
                    found.add(lists, are_kept)
        return *found.of_inputs((q, k, v)), found.of_thresholds.view(slope.shape[:2]), None


class _Backward:
    """Gradients under way. q and what is of its rows is by query block, k and v by key block."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        slope: Tensor,
        upstream: Tensor,
        options: _Options,
    ) -> None:
        self.geometry, self.scale = options.geometry, options.scale
        self.q = _blocks(q, self.geometry.q_block) * self.scale
        self.k, self.v = (_blocks(x, self.geometry.k_block) for x in (k, v))
        self.upstream = _blocks(upstream, self.geometry.q_block)
        self.lse = lse.view(*self.q.shape[:2], 1)
        self.slope = slope.flatten(0, 1)
        self.delta = (self.upstream * _blocks(out, self.geometry.q_block)).sum(-1, keepdim=True)
        self.of_q = torch.empty_like(self.q)
        self.of_k, self.of_v = torch.zeros_like(self.k), torch.zeros_like(self.v)
        self.of_thresholds = slope.new_zeros(len(self.q))

    def add(self, lists: _Lists, are_kept: bool) -> None:
        """What lists of blocks give: thresholds their worth; q, k and v theirs if they are kept."""
        rows, blocks = lists.rows, lists.blocks
        q, upstream, keys = self.q[rows], self.upstream[rows], _listed(self.k, blocks)
        weights = _scores(q, keys, lists, self.geometry, forced=are_kept)
        weights.sub_(self.lse[rows]).exp_()
        worth = upstream @ _listed(self.v, blocks).transpose(1, 2)
        worth.sub_(self.delta[rows]).mul_(weights)
        of_block = worth.view(*worth.shape[:2], -1, self.geometry.k_block).sum((1, 3))
        slopes = self.slope[rows].gather(1, blocks % self.slope.shape[-1])
        self.of_thresholds[rows] -= (of_block * slopes).sum(-1)
        if are_kept:
            self.of_q[rows] = worth @ keys
            self._add(self.of_k, blocks, worth.transpose(1, 2) @ q)
            self._add(self.of_v, blocks, weights.transpose(1, 2) @ upstream)

    @staticmethod
    def _add(gradient: Tensor, blocks: Tensor, added: Tensor) -> None:
        gradient.index_add_(0, blocks.flatten(), added.view(-1, *gradient.shape[1:]))

    def of_inputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of q, k and v, in their shapes and dtypes."""
        found = (self.of_q.mul_(self.scale), self.of_k, self.of_v)
        return [x.view(y.shape).to(y.dtype) for x, y in zip(found, inputs, strict=True)]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, thresholds: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, LSE [heads, seqlen, 1], and verdicts and slopes [heads, q_blocks, k_blocks]."""
    geometry, sinks = options.geometry, options.sinks
    kept, slope = _verdicts(q, k, thresholds, options)
    group = q.shape[0] // k.shape[0]
    queries = _blocks(q, geometry.q_block) * options.scale
    k, v = (_blocks(x, geometry.k_block) for x in (k, v))
    out = torch.empty_like(queries)
    lse = queries.new_empty((*queries.shape[:2], 1))
    for lists in _lists(kept, group, geometry, q.shape[2]):
        rows = lists.rows
        scores = _scores(queries[rows], _listed(k, lists.blocks), lists, geometry, forced=True)
        largest = scores.amax(-1, keepdim=True)
        if sinks is not None:
            first = sinks.detach().float()[rows // kept.shape[1], None, None]
            largest = torch.maximum(largest, first)
        weights = scores.sub_(largest).exp_()
        denominator = weights.sum(-1, keepdim=True)
        if sinks is not None:
            denominator += (first - largest).exp()
        out[rows] = weights @ _listed(v, lists.blocks) / denominator
        lse[rows] = denominator.log() + largest
    return out.view(q.shape).to(q.dtype), lse.view(*q.shape[:2], 1), kept, slope


def _verdicts(q: Tensor, k: Tensor, thresholds: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """Which visible blocks are kept, bool, and slopes, float32; both [heads, q_blocks, k_blocks].

    Only the rows that vote are looked at.
    """
    rule, geometry, scale, voters, width, sinks, _ = options
    heads, seqlen, head_dim = q.shape
    q_block, k_block = geometry
    q_blocks, k_blocks = seqlen // q_block, seqlen // k_block
    kept = torch.zeros((heads, q_blocks, k_blocks), dtype=torch.bool, device=q.device)
    slope = torch.zeros(kept.shape, device=q.device)
    k = k.float()
    first = None if sinks is None else sinks.detach().float().view(-1, 1, 1)
    reach = torch.inf if rule == "absolute" else _REACH
    for start, stop, every in _chunks(q, geometry, voters):
        keys = stop * q_block
        voting = slice(start * q_block + every - 1, keys, every)
        some = (q[:, voting].float() * scale).reshape(k.shape[0], -1, head_dim)
        scores = (some @ k[:, :keys].transpose(1, 2)).view(heads, -1, keys)
        place = torch.arange(keys, device=q.device)
        hidden = place[start * q_block :] > place[voting, None]
        scores[:, :, start * q_block :].masked_fill_(hidden, -torch.inf)
        peaks = scores.view(heads, stop - start, -1, keys // k_block, k_block).amax(-1)
        index = torch.arange(start, stop, device=q.device)
        full = full_blocks(index, seqlen, seqlen, geometry)
        own = thresholds[:, start:stop]
        reference = None if first is None else first.expand(peaks.shape[:-1])
        verdict, excess = verdicts(peaks, own, rule=rule, reference=reference, full=full)
        # Counted from the first forced block; those of a query block hold its own keys.
        forced = torch.arange(keys // k_block, device=q.device) - full[:, None]
        kept[:, start:stop, : keys // k_block] = verdict & (forced < q_block // k_block)
        distance = (excess - own[..., None]) / width
        share = torch.sigmoid(distance)
        rise = share * (1 - share) / width
        slope[:, start:stop, : keys // k_block] = rise.masked_fill_(
            (forced >= 0) | (distance < -reach), 0.0
        )
    return kept, slope


def _chunks(q: Tensor, geometry: Geometry, voters: int) -> Iterator[tuple[int, int, int]]:
    """Query blocks whose verdicts are found together: the first, one past the last, voters.

    Who votes is said in ``bsfa_kernel.reference.voting_rows``: in the last query block all rows.
    """
    heads, seqlen, _ = q.shape
    budget = _scores_at_a_time(q)
    last = seqlen // geometry.q_block - 1
    start = 0
    while start < last:
        # The largest number of rows with rows * (start + rows) scores a head within the budget.
        before = start * geometry.q_block
        rows = int((before * before / 4 + budget * voters / heads) ** 0.5 - before / 2)
        stop = min(start + max(rows // geometry.q_block, 1), last)
        yield start, stop, voters
        start = stop
    yield last, last + 1, 1


def _lists(chosen: Tensor, group: int, geometry: Geometry, head_dim: int) -> Iterator[_Lists]:
    """The blocks chosen of each query block, bool [heads, q_blocks, k_blocks], as lists.

    Query blocks without any have no list. ``group`` query heads share a kv head.
    """
    _, q_blocks, k_blocks = chosen.shape
    counts = chosen.sum(-1).flatten()
    ordered, order = counts.sort()
    lengths: list[int] = ordered.tolist()
    # Of a block the scores are held, and its keys and values.
    largest = geometry.k_block * max(geometry.q_block, head_dim)
    budget = _scores_at_a_time(chosen) // largest
    first, stop = bisect.bisect_right(lengths, 0), len(lengths)
    while stop > first:
        longest = lengths[stop - 1]
        start = max(stop - max(budget // longest, 1), first)
        rows, filled = order[start:stop], lengths[start]
        backwards = chosen.flatten(0, 1)[rows].flip(-1).byte()
        places = backwards.sort(dim=-1, descending=True, stable=True).indices[:, :longest]
        padding = torch.arange(longest, device=rows.device) >= counts[rows, None]
        blocks = k_blocks - 1 - torch.where(padding, places[:, :1], places)
        blocks += (rows // (q_blocks * group) * k_blocks)[:, None]
        yield _Lists(rows, blocks, filled, padding[:, filled:])
        stop = start


def _scores(q: Tensor, keys: Tensor, lists: _Lists, geometry: Geometry, *, forced: bool) -> Tensor:
    """Scores [lists, q_block, longest * k_block]; -inf for padding.

    Args:
        q: of the rows of the lists, times the scale.
        keys: of their blocks.
        lists: which those are.
        geometry: the sparsity block.
        forced: whether lists begin with the blocks that hold keys which some query does not see.
    """
    q_block, k_block = geometry
    scores = q @ keys.transpose(1, 2)
    if forced:
        own = torch.arange(q_block, device=q.device)
        key = own.view(-1, k_block).flip(0).flatten()  # as listed, from the last block to the first
        scores[:, :, :q_block].masked_fill_(key > own[:, None], -torch.inf)
    by_block = scores.view(*scores.shape[:2], -1, k_block)
    by_block[:, :, lists.filled :].masked_fill_(lists.padding[:, None, :, None], -torch.inf)
    return scores


def _blocks(x: Tensor, size: int) -> Tensor:
    """float32 [heads * blocks, size, head_dim] of [heads, seqlen, head_dim]."""
    return x.float().reshape(-1, size, x.shape[-1])


def _listed(x: Tensor, blocks: Tensor) -> Tensor:
    """[lists, keys, head_dim]: what lists of blocks name, one behind the other."""
    return x[blocks].flatten(1, 2)


def _scores_at_a_time(x: Tensor) -> int:
    return _SCORES_AT_A_TIME_CPU if x.device.type == "cpu" else _SCORES_AT_A_TIME_GPU
