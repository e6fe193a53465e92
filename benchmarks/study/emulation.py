# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Block-sparse attention under many thresholds at once, for whole prompts.

The verdicts of ``bsfa_kernel.reference``, for all query blocks together: a few large
operations rather than many small ones, which is what a GPU wants, and what makes a study of
thresholds affordable. Memory grows with the square of the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bsfa_calib.hook import Attended
from bsfa_kernel import RULES, Geometry
from bsfa_kernel.geometry import count_visible, full_blocks
from bsfa_kernel.reference import verdicts, voting_rows

ORDERS = ("last_first", "sink_last_first", "first_last")

_SCORES_AT_A_TIME_CPU = 1 << 24
_SCORES_AT_A_TIME_GPU = 1 << 29


class Emulated(NamedTuple):
    """What each of T thresholds gives.

    Attributes:
        out: float32 [T, batch, seqlen, heads, head_dim].
        skipped: float32 [T, batch, heads]: share of the visible blocks.
        lost: float32 [T, batch, heads, seqlen]: softmax mass of the skipped blocks.
    """

    out: Tensor
    skipped: Tensor
    lost: Tensor


def emulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    *,
    order: str = "last_first",
    rule: str,
    geometry: Geometry,
    scale: float,
    voters: int = 1,
    sinks: Tensor | None = None,
) -> Emulated:
    """Causal attention of whole prompts under several thresholds.

    Args: as in ``bsfa_calib.gated.gated_attention``, but q, k and v of a batch and thresholds
    [T, heads, rows] of one row, or one for each query block. ``order`` is that in which blocks are
    decided after the forced ones: "last_first" (the semantics), "sink_last_first" (block 0, then
    last to first), or "first_last".

    Raises:
        ValueError: an argument breaks a rule.
    """
    batch, seqlen, heads, head_dim = q.shape
    q_block, k_block = geometry
    if seqlen % q_block or seqlen % k_block or k.shape[1] != seqlen:
        raise ValueError(f"lengths must be equal and multiples of {geometry}, got {seqlen} queries")
    if rule not in RULES or order not in ORDERS:
        raise ValueError(f"rule must be one of {RULES} and order of {ORDERS}, got {rule}, {order}")
    q_blocks = seqlen // q_block
    if thresholds.shape[2] not in (1, q_blocks):
        raise ValueError(f"thresholds need 1 or {q_blocks} rows, got {thresholds.shape[2]}")
    voting = voting_rows(seqlen, seqlen, geometry, voters).to(q.device)
    points = thresholds.shape[0]
    out = q.new_empty((points, batch, seqlen, heads, head_dim), dtype=torch.float32)
    skipped = q.new_empty((points, batch, heads), dtype=torch.float32)
    lost = q.new_empty((points, batch, heads, seqlen), dtype=torch.float32)
    for index in range(batch):
        for part in _head_chunks(q, k):
            kv_heads = [head * k.shape[2] // heads for head in part]
            some = _emulate_heads(
                q[index, :, part].transpose(0, 1).float() * scale,
                k[index, :, kv_heads].transpose(0, 1).float(),
                v[index, :, kv_heads].transpose(0, 1).float(),
                thresholds[:, part],
                None if sinks is None else sinks[part].float(),
                geometry,
                partial(_kept, rule=rule, order=order, voting=voting),
            )
            out[:, index, :, part] = some.out.transpose(1, 2)
            skipped[:, index, part] = some.skipped
            lost[:, index, part] = some.lost
    return Emulated(out, skipped, lost)


@dataclass(frozen=True)
class EmulatedSparse:
    """A method (see ``bsfa_calib.hook.Method``) that emulates; for orders that no kernel has.

    Attributes:
        thresholds: float32 [layers, heads, rows].
        rule: one of ``bsfa_kernel.RULES``.
        geometry: the sparsity block.
        order: one of ``ORDERS``.
        voters: one query row in 1, 2 or 4 votes.
    """

    thresholds: Tensor
    rule: str
    geometry: Geometry
    order: str = "last_first"
    voters: int = 1

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Attended:
        """See ``bsfa_calib.hook.Method``."""
        found = emulate(
            *(q, k, v, self.thresholds[layer][None]),
            rule=self.rule,
            geometry=self.geometry,
            scale=scale,
            order=self.order,
            voters=self.voters,
            sinks=sinks,
        )
        return Attended(found.out[0].to(q.dtype), found.skipped[0, 0])


def refuse_sinks(sinks: Tensor | None) -> None:
    """Refuse a model whose sinks a part of a study does not know.

    Raises:
        ValueError: there are sinks.
    """
    if sinks is not None:
        raise ValueError("this part of the study knows no attention sinks, which this model has")


def _head_chunks(q: Tensor, k: Tensor) -> Iterator[list[int]]:
    """Query heads that are computed together."""
    budget = _SCORES_AT_A_TIME_CPU if q.device.type == "cpu" else _SCORES_AT_A_TIME_GPU
    step = max(budget // (q.shape[1] * k.shape[1]), 1)
    for start in range(0, q.shape[2], step):
        yield list(range(start, min(start + step, q.shape[2])))


def _emulate_heads(
    scaled_q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    sinks: Tensor | None,
    geometry: Geometry,
    decide: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Emulated:
    """Of q, k and v [heads, seqlen, head_dim], thresholds [T, heads, rows] and sinks [heads]."""
    heads, seqlen, head_dim = scaled_q.shape
    q_block, k_block = geometry
    q_blocks, k_blocks = seqlen // q_block, seqlen // k_block
    positions = torch.arange(seqlen, device=k.device)
    hidden = torch.where(positions > positions[:, None], -torch.inf, 0.0)
    scores = torch.baddbmm(hidden, scaled_q, k.transpose(1, 2))
    largest = scores.amax(-1)
    if sinks is not None:
        largest = torch.maximum(largest, sinks[:, None])
    weights = scores.sub_(largest[..., None])
    # [k_blocks, heads, q_blocks, q_block]: verdicts are made of one block of keys at a time.
    row_maxima = weights.view(heads, q_blocks, q_block, k_blocks, k_block).amax(-1)
    row_maxima = row_maxima.permute(3, 0, 1, 2).contiguous()
    weights = weights.exp_().view(heads, q_blocks, q_block, k_blocks, k_block)
    masses = weights.sum(-1).permute(3, 0, 1, 2).contiguous()
    by_block = largest.view(heads, q_blocks, q_block)
    kept = decide(
        (row_maxima + by_block).movedim(0, -1),
        thresholds.expand(-1, -1, q_blocks),
        full_blocks(torch.arange(q_blocks, device=k.device), seqlen, seqlen, geometry),
        None if sinks is None else sinks[:, None, None].expand(by_block.shape),
    )

    points = len(thresholds)
    chosen = kept.permute(1, 2, 0, 3).float()  # [heads, q_blocks, T, k_blocks]
    total = masses.permute(1, 2, 0, 3)  # [heads, q_blocks, k_blocks, q_block]
    denominator = chosen @ total
    whole = total.sum(2, keepdim=True)
    if sinks is not None:
        of_sink = (sinks[:, None, None] - by_block).exp()[:, :, None]
        denominator, whole = denominator + of_sink, whole + of_sink
    if points == 1:
        weights *= kept[0, :, :, None, :, None]
        numerator = torch.bmm(weights.view(heads, seqlen, seqlen), v)
    else:
        # What every block of keys adds, so that a threshold only has to add up those it keeps.
        blockwise = weights.permute(0, 3, 1, 2, 4).reshape(heads * k_blocks, seqlen, k_block)
        values = v.reshape(heads * k_blocks, k_block, head_dim)
        added = torch.bmm(blockwise, values).view(heads, k_blocks, q_blocks, q_block * head_dim)
        numerator = chosen @ added.transpose(1, 2)
    out = numerator.view(heads, q_blocks, points, q_block, head_dim) / denominator[..., None]
    out = out.permute(2, 0, 1, 3, 4).reshape(points, heads, seqlen, head_dim)
    share = 1 - denominator / whole
    lost = share.clamp_(min=0).permute(2, 0, 1, 3).reshape(points, heads, seqlen)
    visible = count_visible(seqlen, seqlen, geometry)
    beyond = (torch.arange(k_blocks, device=k.device) * k_block) >= (
        torch.arange(1, q_blocks + 1, device=k.device)[:, None] * q_block
    )
    counted = (kept & ~beyond).sum((2, 3)).float()
    return Emulated(out, 1 - counted / visible, lost)


def _kept(
    row_maxima: Tensor,
    thresholds: Tensor,
    full: Tensor,
    first: Tensor | None,
    *,
    rule: str,
    order: str,
    voting: Tensor,
) -> Tensor:
    """Which blocks each threshold keeps.

    Args:
        row_maxima: [heads, q_blocks, q_block, k_blocks], scaled scores.
        thresholds: [T, heads, q_blocks].
        full: [q_blocks], number of unforced blocks.
        first: [heads, q_blocks, q_block], what relative rules compare with at first, if anything.
        rule: one of ``bsfa_kernel.RULES``.
        order: one of ``ORDERS``.
        voting: bool [q_blocks, q_block], which rows vote.

    Returns:
        bool [T, heads, q_blocks, k_blocks]; True beyond the unforced blocks.
    """
    if order == "last_first" or rule == "absolute":
        return verdicts(
            *(row_maxima, thresholds), rule=rule, reference=first, voting=voting, full=full
        ).keep
    # What comes last is decided first. Forced blocks are met before all, and not again.
    k_blocks = row_maxima.shape[-1]
    first_last = list(range(k_blocks))
    columns = [*first_last[1:], 0] if order == "sink_last_first" else first_last[::-1]
    index = torch.tensor(columns, device=full.device)
    forced = (torch.arange(k_blocks, device=full.device) >= full[:, None])[:, None]
    known = row_maxima.masked_fill(~forced, -torch.inf)
    if first is not None:
        known = torch.cat((known, first[..., None]), -1)
    found = verdicts(
        row_maxima.masked_fill(forced, -torch.inf)[..., index],
        thresholds,
        rule=rule,
        voting=voting,
        reference=known.amax(-1) if rule == "running_max" else known.logsumexp(-1),
    )
    keep = torch.empty_like(found.keep)
    keep[..., index] = found.keep
    return keep | forced[:, 0]
