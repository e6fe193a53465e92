# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Scores of padded tensors, a query block and some heads at a time; exact, or in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bsfa_kernel.geometry import (
    Geometry,
    block_count,
    full_blocks,
    query_block_count,
    query_lead,
    visible_keys,
)

_INF = float("inf")

# Scores computed at a time: 16 MB of float32 stay near a CPU's cache; a GPU wants large launches.
_SCORES_AT_A_TIME_CPU = 2**22
_SCORES_AT_A_TIME_GPU = 2**27

# Selection in 8 bits: keys that share a scale, keys that the offset is a mean of, the largest
# rounded value, and the largest element below which everything is 0.
_ROUNDED_KEYS = 64
_OFFSET_KEYS = 1024
_LARGEST_INT8 = 127.0
_SMALLEST = 2.0**-100


@dataclass(frozen=True)
class QueryBlock:
    """One block of queries and the keys it sees."""

    index: int
    start: int
    stop: int
    first_row: int  # that of its first query; more than 0 where the sequence begins inside it
    full_blocks: int  # key blocks of which every query sees every key: those that a verdict is on
    visible_keys: int  # keys that some query sees
    k_block: int
    last: bool  # of its sequence in the call

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def voting(self, voters: int) -> slice:
        """Which of its rows vote."""
        return (
            slice(None)
            if self.last
            else slice((voters - 1 - self.first_row) % voters, None, voters)
        )

    @property
    def visible_blocks(self) -> int:
        return block_count(self.visible_keys, self.k_block)


def query_blocks(
    seqlen_q: int, seqlen_k: int, causal: bool, geometry: Geometry
) -> Iterator[QueryBlock]:
    """The query blocks that see a key."""
    sizes = (seqlen_q, seqlen_k, geometry)
    lead = query_lead(*sizes)
    for index in range(query_block_count(*sizes)):
        anchor = index * geometry.q_block - lead
        start, stop = max(anchor, 0), min(anchor + geometry.q_block, seqlen_q)
        block = QueryBlock(
            index,
            start,
            stop,
            start - anchor,
            full_blocks(index, *sizes, causal=causal),
            visible_keys(index, *sizes, causal=causal),
            geometry.k_block,
            stop == seqlen_q,
        )
        if block.visible_keys > 0:
            yield block


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor of the scores."""
    return float(q.shape[-1]) ** -0.5 if scale is None else float(scale)


def computed_in(q: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a call is computed in.

    Raises:
        ValueError: another one is asked for than float32 or float64.
    """
    if compute_dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"compute_dtype must be float32 or float64, got {compute_dtype}")
    if compute_dtype is not None:
        return compute_dtype
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def heads_first(x: Tensor, dtype: torch.dtype, block: int = 1) -> Tensor:
    """[batch, seqlen, kv_heads, head_dim] -> contiguous [batch * kv_heads, length, head_dim].

    The length is a multiple of ``block``, filled up with zeros.
    """
    batch, seqlen, kv_heads, head_dim = x.shape
    length = block_count(seqlen, block) * block
    copy = torch.empty((batch, kv_heads, length, head_dim), dtype=dtype, device=x.device)
    copy[:, :, :seqlen].copy_(x.transpose(1, 2))
    copy[:, :, seqlen:] = 0
    return copy.view(batch * kv_heads, length, head_dim)


def in_blocks(scores: Tensor, k_block: int) -> Tensor:
    """A view of [..., keys] as [..., k_blocks, k_block]."""
    return scores.view(*scores.shape[:-1], scores.shape[-1] // k_block, k_block)


def score_chunks(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    scale: float,
    geometry: Geometry,
    dtype: torch.dtype,
    rounded_for: str | None = None,
    voters: int = 1,
) -> Iterator[tuple[QueryBlock, slice, Tensor]]:
    """The scaled scores of each query block, of as many heads at a time as the cache holds.

    Args:
        q: [batch, seqlen_q, heads, head_dim].
        k: [batch, seqlen_k, kv_heads, head_dim].
        causal: whether a causal mask hides scores.
        scale: factor of the scores.
        geometry: the sparsity block.
        dtype: of the scores.
        rounded_for: the rule for which the scores are to be those of queries and keys in 8 bits.
        voters: the rows of one query in so many, those that vote; others are not computed.

    Yields:
        The query block; which of batch * kv_heads; and [those, group, rows, visible blocks *
        k_block], -inf where no query of the sequence sees the key or the mask hides it.
    """
    seqlen_q, heads = q.shape[1:3]
    seqlen_k, kv_heads = k.shape[1:3]
    if 0 in (len(q), heads, seqlen_k):
        return
    block_scores = _RoundedScores if rounded_for else _ExactScores
    scores_of = block_scores(k, scale, geometry.k_block, dtype, rounded_for)
    for block in query_blocks(seqlen_q, seqlen_k, causal, geometry):
        queries = torch.arange(block.start, block.stop, device=q.device)[block.voting(voters)]
        voting = q[:, block.rows][:, block.voting(voters)]
        prepared = scores_of.prepare(_grouped_queries(voting, kv_heads, dtype))
        count, rows = prepared[0].shape[:2]
        width = block.visible_blocks * geometry.k_block
        for chunk in _chunks(count, rows * width, q.device):
            scores = scores_of(tuple(x[chunk] for x in prepared), chunk, width)
            scores = scores.view(-1, heads // kv_heads, len(queries), width)
            offset = seqlen_k - seqlen_q if causal else seqlen_k
            _hide_unseen(scores, block, queries + offset, seqlen_k)
            yield block, chunk, scores


def _grouped_queries(q: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[batch, rows, heads, head_dim] -> [batch * kv_heads, group * rows, head_dim].

    The query heads that read one kv head lie side by side, so that nothing of it is repeated.
    """
    batch, rows, heads, head_dim = q.shape
    group = heads // kv_heads
    copy = torch.empty((batch, heads, rows, head_dim), dtype=dtype, device=q.device)
    copy.copy_(q.transpose(1, 2))
    return copy.view(batch * kv_heads, group * rows, head_dim)


def _chunks(total: int, scores_each: int, device: torch.device) -> Iterator[slice]:
    """Slices of the kv heads, so that the scores computed at a time stay bounded."""
    budget = _SCORES_AT_A_TIME_CPU if device.type == "cpu" else _SCORES_AT_A_TIME_GPU
    step = max(budget // max(scores_each, 1), 1)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _hide_unseen(scores: Tensor, block: QueryBlock, last_seen: Tensor, seqlen_k: int) -> None:
    """Set the scores [..., rows, keys] of keys after the last that a row sees to -inf."""
    first_key = block.full_blocks * block.k_block
    keys = torch.arange(first_key, scores.shape[-1], device=scores.device)
    unseen = keys > last_seen.clamp(max=seqlen_k - 1)[:, None]
    scores[..., first_key:].masked_fill_(unseen, -_INF)


class _ExactScores:
    """Products of the tensors as they are."""

    def __init__(
        self, k: Tensor, scale: float, k_block: int, dtype: torch.dtype, rule: str | None
    ) -> None:
        self.keys = heads_first(k, dtype, k_block)
        self.scale = scale

    def prepare(self, queries: Tensor) -> tuple[Tensor, ...]:
        """What is made once of the queries [batch * kv_heads, rows, head_dim]; overwrites them."""
        return (queries.mul_(self.scale),)

    def __call__(self, prepared: tuple[Tensor, ...], chunk: slice, width: int) -> Tensor:
        """The scores of some heads with the first ``width`` keys, [heads, rows, width]."""
        return torch.bmm(prepared[0], self.keys[chunk, :width].transpose(1, 2))


class _RoundedScores:
    """Products of queries and keys in 8 bits: docs/semantics.md, "Selection in 8 bits".

    The products are whole numbers below 2^24, which float32 holds exactly.
    """

    def __init__(
        self, k: Tensor, scale: float, k_block: int, dtype: torch.dtype, rule: str | None
    ) -> None:
        seqlen_k = k.shape[1]
        keys = heads_first(k, dtype, k_block)
        every = block_count(seqlen_k, _OFFSET_KEYS)
        sample = keys[:, :seqlen_k:every]
        finite = sample.isfinite()
        count = finite.sum(1, keepdim=True).clamp(min=1)
        offset = sample.where(finite, 0.0).sum(1, keepdim=True) / count
        keys[:, :seqlen_k] -= offset
        length = keys.shape[1]
        padded = torch.nn.functional.pad(keys, (0, 0, 0, -length % _ROUNDED_KEYS))
        groups = padded.view(len(padded), -1, _ROUNDED_KEYS * padded.shape[2])
        rounded, scales = _rounded(groups)
        self.keys = rounded.view(padded.shape)[:, :length]
        self.scales = scales.repeat_interleave(_ROUNDED_KEYS, 1)[:, None, :length, 0]
        self.offset = offset.transpose(1, 2) if rule == "absolute" else None
        self.scale = scale

    def prepare(self, queries: Tensor) -> tuple[Tensor, ...]:
        rounded, scales = _rounded(queries)
        if self.offset is None:
            return rounded, scales * self.scale
        return rounded, scales * self.scale, torch.bmm(queries, self.offset) * self.scale

    def __call__(self, prepared: tuple[Tensor, ...], chunk: slice, width: int) -> Tensor:
        rounded, scales, *shift = prepared
        scores = torch.bmm(rounded, self.keys[chunk, :width].transpose(1, 2))
        scores.mul_(scales).mul_(self.scales[chunk, :, :width])
        return scores.add_(shift[0]) if shift else scores


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of [..., elements] as whole numbers up to 127, and its scale [..., 1]."""
    largest = x.abs().amax(-1, keepdim=True)
    scales = largest / _LARGEST_INT8
    scales = scales.masked_fill(~largest.isfinite(), torch.nan)
    scales = scales.masked_fill(largest < _SMALLEST, 0.0)
    none = ~(scales > 0)
    values = (x * (_LARGEST_INT8 / largest.masked_fill(none, 1.0))).round()
    return values.masked_fill_(none, 0.0), scales
