# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Block-sparse attention with gradients, at q, k, v and at the thresholds.

The forward pass is that of docs/semantics.md: a verdict is a step of excess - threshold, and the
excess of a block, its rows' peaks over their references, depends on no threshold. The derivative of
a step is nothing almost everywhere; the backward pass puts that of a logistic function of (excess -
threshold) / width in its place. What a verdict is worth, the derivative of the loss with respect to
a factor of all the block's weights, is exact, so that the gradient of a threshold is the mean worth
of the blocks near it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsfa_kernel import RULES, Geometry
from bsfa_kernel.geometry import count_visible, full_blocks
from bsfa_kernel.reference import verdicts, voting_rows

_SCORES_AT_A_TIME_CPU = 1 << 24
_SCORES_AT_A_TIME_GPU = 1 << 26


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
        k: [seqlen, kv_heads, head_dim].
        v: as k.
        thresholds: float32 [heads, q_blocks].
        rule: one of ``bsfa_kernel.RULES``.
        geometry: the sparsity block.
        scale: factor of the scores.
        voters: one query row in 1, 2 or 4 votes.
        width: of the logistic function, in units of scaled scores.
        sinks: float32 [heads], a score of each head without a value, or None; no gradient.
        memo: takes what is computed, and gives it to the next call, which must have the same
            arguments: that of a layer that is recomputed in the backward pass.

    Raises:
        ValueError: an argument breaks a rule.
    """
    seqlen, heads, _ = q.shape
    q_block, k_block = geometry
    if seqlen % q_block or q_block % k_block or k.shape[0] != seqlen:
        raise ValueError(f"lengths must be equal and multiples of {geometry}, got {seqlen} queries")
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


class _Part(NamedTuple):
    """Scores of the queries from ``start`` to ``stop`` with all keys before ``stop``."""

    start: int
    stop: int
    blocks: slice


class _GatedAttention(torch.autograd.Function):
    """Of q [heads, seqlen, head_dim], k and v [kv_heads, ...] and thresholds [heads, q_blocks]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, thresholds: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        memo = options.memo or Memo()
        if memo.found is None:
            memo.found = _attend(q, k, v, thresholds, options)
        out, lse, kept, slope = memo.found
        ctx.save_for_backward(q, k, v, out, lse, kept, slope)
        ctx.options = options
        (_, q_blocks, k_blocks), seqlen = kept.shape, q.shape[1]
        q_block, k_block = options.geometry
        index = torch.arange(q_blocks, device=q.device)
        seen = torch.arange(k_blocks, device=q.device) * k_block < (index[:, None] + 1) * q_block
        visible = count_visible(seqlen, seqlen, options.geometry)
        skipped = 1 - (kept & seen).sum((1, 2)).float() / visible
        of_row = slope.sum(-1) / visible
        ctx.mark_non_differentiable(skipped, of_row)
        # Not the tensor of the memo, which would then hold the graph.
        return out.detach(), skipped, of_row

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *given, lse, kept, slope = ctx.saved_tensors
        dtype = given[0].dtype
        q, k, v, out, out_gradient = (x.float() for x in (*given, gradients[0]))
        geometry, scale = ctx.options.geometry, ctx.options.scale
        heads, seqlen, head_dim = q.shape
        q_block, k_block = geometry
        kv_heads = k.shape[0]
        group = heads // kv_heads
        out_gradient = out_gradient.contiguous()
        q_gradient = torch.empty_like(q)
        k_gradient, v_gradient = torch.zeros_like(k), torch.zeros_like(v)
        threshold_gradient = q.new_zeros((heads, seqlen // q_block))
        for part in _parts(q, geometry):
            here, before = slice(part.start, part.stop), slice(0, part.stop)
            weights = _scores(q, k, part, group, scale).sub_(lse[:, here]).exp_()
            upstream = out_gradient[:, here]
            worth = upstream @ _repeated(v[:, before], group).transpose(1, 2)
            worth -= (upstream * out[:, here]).sum(-1, keepdim=True)
            worth *= weights
            shape = (heads, part.blocks.stop - part.blocks.start, q_block, -1, k_block)
            verdict = kept[:, part.blocks, None, : part.stop // k_block, None]
            by_block = worth.view(shape)
            of_block = by_block.sum((2, 4)) * slope[:, part.blocks, : part.stop // k_block]
            threshold_gradient[:, part.blocks] = -of_block.sum(-1)
            by_block *= verdict
            weights.view(shape).mul_(verdict)
            q_gradient[:, here] = worth @ _repeated(k[:, before], group) * scale
            added = worth.transpose(1, 2) @ q[:, here] * scale
            k_gradient[:, before] += added.view(kv_heads, group, -1, head_dim).sum(1)
            added = weights.transpose(1, 2) @ upstream
            v_gradient[:, before] += added.view(kv_heads, group, -1, head_dim).sum(1)
        of_inputs = (x.to(dtype) for x in (q_gradient, k_gradient, v_gradient))
        return *of_inputs, threshold_gradient, None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, thresholds: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, LSE [heads, seqlen, 1], and verdicts and slopes [heads, q_blocks, k_blocks]."""
    rule, geometry, scale, voters, width, sinks, _ = options
    heads, seqlen, _ = q.shape
    q_block, k_block = geometry
    group = heads // k.shape[0]
    out = torch.empty_like(q)
    q, k, v = (x.float() for x in (q, k, v))
    lse = q.new_empty((heads, seqlen, 1))
    q_blocks, k_blocks = seqlen // q_block, seqlen // k_block
    voting = voting_rows(seqlen, seqlen, geometry, voters).to(q.device)
    kept = torch.zeros((heads, q_blocks, k_blocks), dtype=torch.bool, device=q.device)
    slope = q.new_zeros((heads, q_blocks, k_blocks))
    first = None if sinks is None else sinks.detach().float().view(-1, 1, 1)
    for part in _parts(q, geometry):
        weights = _scores(q, k, part, group, scale)
        rows, columns = part.blocks.stop - part.blocks.start, part.stop // k_block
        by_block = weights.view(heads, rows, q_block, columns, k_block)
        peaks = by_block.amax(-1)
        largest = peaks.amax(-1, keepdim=True)
        reference = None
        if first is not None:
            reference = first.expand(peaks.shape[:-1])
            largest = torch.maximum(largest, reference[..., None])
        by_block = by_block.sub_(largest[..., None]).exp_()
        masses = by_block.sum(-1)
        index = torch.arange(part.blocks.start, part.blocks.stop, device=q.device)
        full = full_blocks(index, seqlen, seqlen, geometry)
        chosen = thresholds[:, part.blocks]
        verdict, excess = verdicts(
            *(peaks, chosen),
            rule=rule,
            reference=reference,
            voting=voting[part.blocks],
            full=full,
        )
        share = torch.sigmoid((excess - chosen[..., None]) / width)
        free = torch.arange(columns, device=q.device) < full[:, None]
        kept[:, part.blocks, :columns] = verdict
        slope[:, part.blocks, :columns] = share * (1 - share) / width * free
        denominator = (masses * verdict[:, :, None]).sum(-1)
        if reference is not None:
            denominator += (reference - largest[..., 0]).exp()
        by_block *= verdict[:, :, None, :, None]
        numerator = weights @ _repeated(v[:, : part.stop], group)
        here = slice(part.start, part.stop)
        denominator = denominator.view(heads, -1, 1)
        out[:, here] = numerator / denominator
        lse[:, here] = denominator.log() + largest.view(heads, -1, 1)
    return out, lse, kept, slope


def _parts(q: Tensor, geometry: Geometry) -> Iterator[_Part]:
    """Stretches of queries that are computed together."""
    heads, seqlen, _ = q.shape
    budget = _SCORES_AT_A_TIME_CPU if q.device.type == "cpu" else _SCORES_AT_A_TIME_GPU
    start = 0
    while start < seqlen:
        # The largest number of rows with rows * (start + rows) scores a head within the budget.
        rows = int((start * start / 4 + budget / heads) ** 0.5 - start / 2)
        rows = max(rows // geometry.q_block, 1) * geometry.q_block
        stop = min(start + rows, seqlen)
        yield _Part(start, stop, slice(start // geometry.q_block, stop // geometry.q_block))
        start = stop


def _repeated(x: Tensor, group: int) -> Tensor:
    """[kv_heads, ...] for every query head."""
    return x.repeat_interleave(group, 0)


def _scores(q: Tensor, k: Tensor, part: _Part, group: int, scale: float) -> Tensor:
    """[heads, rows, stop], -inf where a key is not seen."""
    some = q[:, part.start : part.stop] * scale
    scores = torch.bmm(some, _repeated(k[:, : part.stop], group).transpose(1, 2))
    own = part.stop - part.start  # of earlier keys, each query sees all
    hidden = torch.ones((own, own), dtype=torch.bool, device=q.device).triu_(1)
    scores[:, :, part.start :].masked_fill_(hidden, -torch.inf)
    return scores
