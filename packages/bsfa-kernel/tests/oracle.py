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


@np.errstate(invalid="ignore")
def attend(q, k, v, thresholds, *, causal, scale, rule, q_block, k_block, voters=1) -> Expected:
    """All that the package's functions return, for arrays [batch, seqlen, heads, head_dim]."""
    batch, seqlen_q, heads, head_dim = q.shape
    _, seqlen_k, kv_heads, _ = k.shape
    q_blocks, k_blocks = -(-seqlen_q // q_block), -(-seqlen_k // k_block)
    out = np.zeros((batch, seqlen_q, heads, head_dim))
    lse = np.full((batch, heads, seqlen_q), -INF)
    mask = np.zeros((batch, heads, q_blocks, k_blocks), bool)
    maxima = np.full((batch, heads, q_blocks, k_blocks), -INF)
    for b in range(batch):
        for h in range(heads):
            kv_head = h // (heads // kv_heads)
            for i in range(q_blocks):
                rows = range(i * q_block, min((i + 1) * q_block, seqlen_q))
                scores = {
                    r: {
                        j: scale * float(np.dot(q[b, r, h], k[b, j, kv_head]))
                        for j in range(seqlen_k)
                        if not causal or j <= r + seqlen_k - seqlen_q
                    }
                    for r in rows
                }
                position = max(i * q_block + seqlen_k - seqlen_q, 0) // q_block
                threshold = float(thresholds[h, min(position, thresholds.shape[1] - 1)])
                voting = [
                    r for r in rows if i == q_blocks - 1 or (r - i * q_block) % voters == voters - 1
                ]
                kept_blocks, _ = visit(scores, voting, k_blocks, k_block, rule, threshold)
                _, maxima[b, h, i] = visit(scores, rows, k_blocks, k_block, rule, threshold)
                for block in kept_blocks:
                    mask[b, h, i, block] = True
                for r in rows:
                    left = {j: s for j, s in scores[r].items() if j // k_block in kept_blocks}
                    if left:
                        lse[b, h, r] = log_sum_exp(list(left.values()))
                    if lse[b, h, r] != -INF:
                        for j, s in left.items():
                            out[b, r, h] += math.exp(s - lse[b, h, r]) * v[b, j, kv_head]
    return Expected(out, lse, mask.sum(-1), mask, maxima)


def visit(scores, voting, k_blocks, k_block, rule, threshold):
    """The blocks that a query block keeps, and for each the voters' max(score - reference)."""
    kept = []
    excesses = np.full(k_blocks, -INF)
    seen = {r: [] for r in voting}  # the row's peaks so far
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
                    reference = max(seen[r], default=-INF)
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
