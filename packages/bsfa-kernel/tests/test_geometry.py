# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Counts of blocks, against masks that are written out score by score."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsfa_kernel import geometry as g
from bsfa_kernel.geometry import GEOMETRIES, Geometry, block_count

SIZES = st.tuples(st.integers(0, 400), st.integers(0, 400))
BLOCKS = st.sampled_from([*GEOMETRIES, Geometry(2, 2), Geometry(3, 2), Geometry(6, 4)])


def seen_scores(seqlen_q, seqlen_k, geometry, causal):
    """bool [q_blocks, k_blocks, q_block, k_block], and which of the scores exist."""
    positions = range(seqlen_k - seqlen_q, seqlen_k)
    blocks = sorted({position // geometry.q_block for position in positions})
    q_blocks, k_blocks = len(blocks), block_count(seqlen_k, geometry.k_block)
    rows = np.array([i * geometry.q_block + r for i in blocks for r in range(geometry.q_block)])
    rows = rows.astype(int)[:, None]
    keys = np.arange(k_blocks * geometry.k_block)
    there = (rows >= seqlen_k - seqlen_q) & (rows < seqlen_k)
    seen = there & (keys < seqlen_k)
    if causal:
        seen &= keys <= rows
    shape = (q_blocks, geometry.q_block, k_blocks, geometry.k_block)
    exist = np.broadcast_to(there, seen.shape).reshape(shape).swapaxes(1, 2)
    return seen.reshape(shape).swapaxes(1, 2), exist


@settings(max_examples=max(100, settings().max_examples))
@given(SIZES, BLOCKS, st.booleans())
def test_counts_are_those_of_the_scores_one_by_one(sizes, geometry, causal):
    seen, exist = seen_scores(*sizes, geometry, causal)
    visible = seen.any((2, 3)).sum(1)
    full = (seen | ~exist).all((2, 3)).sum(1)
    arguments = (*sizes, geometry)
    indices = range(len(visible))
    assert g.query_block_count(*arguments) == len(visible)
    exist_in_first = exist[:1, :1, :, 0].reshape(-1)
    if exist_in_first.any():
        assert g.query_lead(*arguments) == exist_in_first.argmax()
    assert [g.visible_blocks(i, *arguments, causal=causal) for i in indices] == visible.tolist()
    assert [g.full_blocks(i, *arguments, causal=causal) for i in indices] == full.tolist()
    assert g.count_visible(*arguments, causal=causal) == visible.sum()
    assert g.count_full(*arguments, causal=causal) == full.sum()
    assert g.can_skip(*arguments, causal=causal) == full.any()
    expected = 1 - full.sum() / visible.sum() if visible.any() else 1.0
    assert g.forced_share(*arguments, causal=causal) == pytest.approx(expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("function", [g.visible_keys, g.visible_blocks, g.full_blocks])
def test_arrays_and_tensors_of_indices_are_counted_like_numbers(function, causal):
    arguments = (700, 1100, GEOMETRIES[0])
    expected = [function(i, *arguments, causal=causal) for i in range(6)]
    for indices, dtype in ((np.arange(6), np.int64), (torch.arange(6), torch.int64)):
        counts = function(indices, *arguments, causal=causal)
        assert counts.dtype == dtype
        assert counts.tolist() == expected


def test_counts_trace_with_symbolic_lengths():
    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def count(q, k):
        arguments = (q.shape[0], k.shape[0], GEOMETRIES[1])
        indices = torch.arange(g.query_block_count(*arguments))
        total = torch.full((), g.count_visible(*arguments) - g.count_full(*arguments))
        return g.visible_blocks(indices, *arguments) - g.full_blocks(indices, *arguments), total

    for sizes in ((700, 1100), (900, 1000), (330, 400)):
        forced, total = count(torch.empty(sizes[0]), torch.empty(sizes[1]))
        seen, exist = seen_scores(*sizes, GEOMETRIES[1], True)
        expected = seen.any((2, 3)).sum(1) - (seen | ~exist).all((2, 3)).sum(1)
        assert forced.tolist() == expected.tolist()
        assert total == expected.sum()
