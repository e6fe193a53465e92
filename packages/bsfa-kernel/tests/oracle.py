# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""docs/semantics.md once more, score by score in plain Python.

Written from that page alone and as slowly as it reads, so that an error in the reference back end
is not repeated here. Everything is float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

INF = math.inf


class Expected(NamedTuple):
    out: np.ndarray  # [batch, seqlen_q, heads, head_dim]
    lse: np.ndarray  # [batch, heads, seqlen_q]
    kept: np.ndarray  # [batch, heads, q_blocks]
    mask: np.ndarray  # [batch, heads, q_blocks, k_blocks]
    maxima: np.ndarray  # [batch, heads, q_blocks, k_blocks]
    voted: np.ndarray  # maxima over the voting rows alone


@np.errstate(invalid="ignore")
def attend(
    q, k, v, thresholds, *, causal, scale, rule, q_block, k_block, voters=1, sinks=None
) -> Expected:
    """All that the package's functions return, for arrays [batch, seqlen, heads, head_dim]."""
    batch, seqlen_q, heads, head_dim = q.shape
    _, seqlen_k, kv_heads, _ = k.shape
    blocks, k_blocks = query_blocks(seqlen_q, seqlen_k, q_block), -(-seqlen_k // k_block)
    q_blocks = len(blocks)
    out = np.zeros((batch, seqlen_q, heads, head_dim))
    lse = np.full((batch, heads, seqlen_q), -INF)
    mask = np.zeros((batch, heads, q_blocks, k_blocks), bool)
    maxima = np.full((batch, heads, q_blocks, k_blocks), -INF)
    voted = maxima.copy()
    for b in range(batch):
        for h in range(heads):
            kv_head = h // (heads // kv_heads)
            sink = -INF if sinks is None else float(sinks[h])
            for i in range(q_blocks):
                rows = blocks[i]
                scores = {
                    r: {
                        j: scale * float(np.dot(q[b, r, h], k[b, j, kv_head]))
                        for j in range(seqlen_k)
                        if not causal or j <= r + seqlen_k - seqlen_q
                    }
                    for r in rows
                }
                position = max((rows[0] + seqlen_k - seqlen_q) // q_block, 0)
                threshold = float(thresholds[h, min(position, thresholds.shape[1] - 1)])
                voting = [
                    r
                    for r in rows
                    if i == q_blocks - 1 or votes(r, seqlen_q, seqlen_k, q_block, voters)
                ]
                kept_blocks, voted[b, h, i] = visit(
                    scores, voting, k_blocks, k_block, rule, threshold, sink
                )
                _, maxima[b, h, i] = visit(scores, rows, k_blocks, k_block, rule, threshold, sink)
                for block in kept_blocks:
                    mask[b, h, i, block] = True
                for r in rows:
                    left = {j: s for j, s in scores[r].items() if j // k_block in kept_blocks}
                    lse[b, h, r] = log_sum_exp([*left.values(), sink])
                    if math.isnan(lse[b, h, r]):
                        out[b, r, h] = math.nan
                    elif lse[b, h, r] != -INF:
                        for j, s in left.items():
                            out[b, r, h] += math.exp(s - lse[b, h, r]) * v[b, j, kv_head]
    return Expected(out, lse, mask.sum(-1), mask, maxima, voted)


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def select(q, k, thresholds, *, causal, scale, rule, q_block, voters, precision, sinks=None):
    """A block mask of arrays [batch, seqlen, heads, head_dim], and how clear its verdicts are.

    Row by row and block by block, on whole arrays of scores: for longer sequences than ``attend``.

    Returns:
        bool [batch, heads, q_blocks, k_blocks], and [batch, heads, q_blocks]: the distance of the
        closest verdict from the other one.
    """
    batch, seqlen_q, heads, _ = q.shape
    _, seqlen_k, kv_heads, _ = k.shape
    blocks, k_blocks = query_blocks(seqlen_q, seqlen_k, q_block), -(-seqlen_k // 64)
    q_blocks = len(blocks)
    mask = np.zeros((batch, heads, q_blocks, k_blocks), bool)
    margin = np.full((batch, heads, q_blocks), INF)
    seen = sees(seqlen_q, seqlen_k, causal)
    for b, h, i in np.ndindex(batch, heads, q_blocks):
        keys = k[b, :, h // (heads // kv_heads)]
        first = blocks[i][0]
        rows = slice(first, blocks[i][-1] + 1)
        queries = q[b, rows, h]
        if precision == "exact":
            scores = scale * queries @ keys.T
        else:
            scores = rounded_scores(queries, keys, scale, rule == "absolute" or sinks is not None)
        position = max((first + seqlen_k - seqlen_q) // q_block, 0)
        threshold = float(thresholds[h, min(position, thresholds.shape[1] - 1)])
        sink = -INF if sinks is None else float(sinks[h])
        references: list[list[float]] = [[sink] for _ in queries]
        for j in reversed(range(k_blocks)):
            columns = slice(64 * j, 64 * j + 64)
            visible = seen[rows, columns]
            if not visible.any():
                continue
            excess = []
            for r, row in enumerate(scores[:, columns]):
                if not visible[r].any():
                    continue
                peak = np.max(row[visible[r]])  # NaN if one is
                reference = 0.0
                if rule != "absolute":
                    reference = log_sum_exp(references[r])
                if rule == "running_max" and not math.isnan(reference):
                    reference = max(references[r])
                references[r].append(peak)
                if i == q_blocks - 1 or votes(first + r, seqlen_q, seqlen_k, q_block, voters):
                    excess.append(peak - reference)  # -inf of both: NaN, which keeps
            if not visible.all() or visible.shape[1] < 64:
                mask[b, h, i, j] = True
                continue
            largest = max(INF if math.isnan(x) else x for x in excess)  # NaN keeps
            mask[b, h, i, j] = threshold < INF and largest >= threshold
            distance = abs(largest - threshold)
            margin[b, h, i] = min(margin[b, h, i], INF if math.isnan(distance) else distance)
    return mask, margin


def query_blocks(seqlen_q, seqlen_k, q_block):
    """The queries of each block: those whose absolute positions have the same quotient."""
    blocks: dict[int, list[int]] = {}
    for r in range(seqlen_q):
        blocks.setdefault((r + seqlen_k - seqlen_q) // q_block, []).append(r)
    return list(blocks.values())


def votes(r, seqlen_q, seqlen_k, q_block, voters):
    """Whether a query votes in a block that is not the last."""
    return (r + seqlen_k - seqlen_q) % q_block % voters == voters - 1


def sees(seqlen_q, seqlen_k, causal):
    """Which keys a query sees, bool [seqlen_q, seqlen_k]."""
    if not causal:
        return np.ones((seqlen_q, seqlen_k), bool)
    return np.arange(seqlen_k) <= np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q


def rounded_scores(queries, keys, scale, with_offset):
    """Scores of one head in 8 bits, [queries, keys]."""
    sample = keys[:: -(-len(keys) // 1024)]
    offset = np.array([c[np.isfinite(c)].sum() / max(np.isfinite(c).sum(), 1) for c in sample.T])
    scores = np.empty((len(queries), len(keys)))
    whole_q, scale_q = round_rows(queries)
    for start in range(0, len(keys), 64):
        block = keys[start : start + 64] - offset
        whole_k, (scale_k,) = round_rows(block.reshape(1, -1))
        products = whole_q @ whole_k.reshape(block.shape).T
        scores[:, start : start + 64] = scale * scale_q[:, None] * scale_k * products
    if with_offset:
        scores += (scale * queries @ offset)[:, None]
    return scores


def round_rows(x):
    """Whole numbers up to 127 for each row, and its scale."""
    whole, scales = np.zeros_like(x), np.zeros(len(x))
    for r, row in enumerate(x):
        largest = np.max(np.abs(row))
        if not np.isfinite(largest):
            scales[r] = math.nan
        elif largest >= 2.0**-100:
            scales[r] = largest / 127
            whole[r] = np.round(row * (127 / largest))
    return whole, scales


def attend_mask(q, k, v, mask, *, causal, scale, q_block, sinks=None):
    """out, lse and kept of a mask, bool [batch, heads, q_blocks, k_blocks]."""
    batch, seqlen_q, heads, head_dim = q.shape
    _, seqlen_k, kv_heads, _ = k.shape
    out = np.zeros((batch, seqlen_q, heads, head_dim))
    lse = np.full((batch, heads, seqlen_q), -INF)
    kept = np.zeros(mask.shape[:3], np.int32)
    seen = sees(seqlen_q, seqlen_k, causal)
    blocks = query_blocks(seqlen_q, seqlen_k, q_block)
    assert len(blocks) == mask.shape[2]
    for b, h, i in np.ndindex(*mask.shape[:3]):
        rows = slice(blocks[i][0], blocks[i][-1] + 1)
        visible = [j for j in range(mask.shape[3]) if seen[rows, 64 * j : 64 * j + 64].any()]
        kept[b, h, i] = sum(mask[b, h, i, j] for j in visible)
        for r in blocks[i]:
            keys = [j for j in range(seqlen_k) if seen[r, j] and mask[b, h, i, j // 64]]
            scores = scale * k[b, keys, h // (heads // kv_heads)] @ q[b, r, h]
            sink = -INF if sinks is None else float(sinks[h])
            lse[b, h, r] = log_sum_exp([*scores.tolist(), sink])
            if lse[b, h, r] != -INF:
                weights = np.exp(scores - lse[b, h, r])
                out[b, r, h] = weights @ v[b, keys, h // (heads // kv_heads)]
    return out, lse, kept


def visit(scores, voting, k_blocks, k_block, rule, threshold, sink):
    """The blocks that a query block keeps, and for each the voters' max(score - reference)."""
    kept = []
    excesses = np.full(k_blocks, -INF)
    seen: dict[int, list[float]] = {r: [sink] for r in voting}  # the row's peaks so far
    for block in range(k_blocks - 1, -1, -1):
        keys = range(block * k_block, (block + 1) * k_block)
        if not any(j in row for row in scores.values() for j in keys):
            continue
        keep = any(j not in row for row in scores.values() for j in keys)
        for r in voting:
            here = [scores[r][j] for j in keys if j in scores[r]]
            if not here:
                continue
            peak = math.nan if any(map(math.isnan, here)) else max(here)
            reference = 0.0
            if rule == "peak_lse":
                reference = log_sum_exp(seen[r])
            elif rule == "running_max":
                reference = log_sum_exp(seen[r])
                if not math.isnan(reference):
                    reference = max(seen[r])
            seen[r].append(peak)
            if peak != -INF:
                excesses[block] = np.maximum(excesses[block], peak - reference)  # with NaN, NaN
            if threshold < INF and not peak < threshold + reference:
                keep = True
        if keep:
            kept.append(block)
    return kept, excesses


def log_sum_exp(values) -> float:
    if any(math.isnan(value) or value == INF for value in values):
        return math.nan  # inf - inf
    largest = max(values, default=-INF)
    if largest == -INF:
        return -INF
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values))
