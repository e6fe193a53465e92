# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Verdicts: which blocks are kept, on every back end that the machine has."""

from __future__ import annotations

import math

import pytest
import torch

import cases
from bsfa_kernel import (
    DEFAULT_GEOMETRY,
    block_sparse_attention,
    reference,
)
from compare import assert_same_verdicts

INF = math.inf


def kept_by(q, k, v, thresholds, **options):
    return block_sparse_attention(q, k, v, thresholds, return_kept=True, **options)[1]


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_verdicts_are_exact_where_thresholds_stand_in_gaps(target, case, rule, geometry, keep):
    dtype = torch.bfloat16 if case.seed % 2 else torch.float16
    target.require("forward", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    voters = cases.voters_of(case, rule, geometry, keep)
    thresholds, clear = cases.separating_thresholds(
        case, q, k, rule=rule, geometry=geometry, keep=keep, voters=voters
    )
    options = {"causal": case.causal, "scale": case.scale, "rule": rule, "geometry": geometry}
    options["voters"] = voters
    expected = reference.attention(q, k, v, thresholds, compute_dtype=torch.float64, **options)
    assert_same_verdicts(kept_by(q, k, v, thresholds, **options), expected.kept, clear)


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_infinite_thresholds_keep_all_or_the_forced_blocks(target, case, rule, geometry):
    dtype = torch.float16 if case.seed % 2 else torch.bfloat16
    target.require("forward", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    lengths = case.seqlen_q, case.seqlen_k
    for threshold, blocks in (
        (-INF, reference.visible_blocks(*lengths, causal=case.causal, geometry=geometry)),
        (INF, reference.forced_blocks(*lengths, causal=case.causal, geometry=geometry)),
    ):
        thresholds = torch.full((case.heads, 1), threshold, device=target.device)
        options = {"causal": case.causal, "rule": rule, "geometry": geometry}
        out, lse, kept = block_sparse_attention(
            q, k, v, thresholds, return_lse=True, return_kept=True, **options
        )
        assert torch.equal(kept.cpu(), blocks.sum(-1).int().expand(case.batch, case.heads, -1))
        assert not out.isnan().any()
        assert not lse.isnan().any()
        assert (out[(lse == -INF).transpose(1, 2)] == 0).all()


def whole_numbers(case, dtype, device):
    """q and k whose scores at a scale of 1/8 are sums without rounding, in any order."""
    generator = torch.Generator().manual_seed(case.seed)
    q, k, v = case.inputs(dtype, device)
    q, k = (torch.randint(-2, 3, x.shape, generator=generator).to(device, dtype) for x in (q, k))
    return q, k, v


@pytest.mark.parametrize(
    "case",
    [
        cases.Case(
            "ties", "", batch=2, seqlen_q=500, seqlen_k=500, heads=4, kv_heads=2, scale=0.125
        ),
        cases.Case(
            "ties full", "", seqlen_q=300, seqlen_k=700, causal=False, scale=0.125, head_dim=128
        ),
    ],
    ids=str,
)
def test_a_score_equal_to_the_threshold_keeps_the_block(target, case, dtype, geometry):
    target.require("forward", dtype, case.head_dim)
    q, k, v = whole_numbers(case, dtype, target.device)
    options = {"causal": case.causal, "scale": case.scale, "geometry": geometry}
    maxima = reference.block_maxima(q, k, **options)
    forced = reference.forced_blocks(
        case.seqlen_q, case.seqlen_k, causal=case.causal, geometry=geometry
    ).to(target.device)
    for quantile in (0.1, 0.5, 0.9):
        finite = maxima[maxima.isfinite()].sort().values
        threshold = finite[int(quantile * (len(finite) - 1))]
        for bound in (threshold, threshold.nextafter(torch.full_like(threshold, INF))):
            thresholds = bound.repeat(case.heads, 1)
            expected = ((maxima >= bound) & maxima.isfinite() | forced).sum(-1).int()
            assert torch.equal(kept_by(q, k, v, thresholds, **options), expected)


def test_near_ties_fall_either_way_and_nothing_else_does(target, dtype, geometry):
    case = cases.Case("near ties", "", seqlen_q=1024, seqlen_k=1024, heads=4, kv_heads=2)
    target.require("forward", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    maxima = reference.block_maxima(q, k, geometry=geometry, compute_dtype=torch.float64)
    forced = reference.forced_blocks(1024, 1024, geometry=geometry).to(target.device)
    rows = maxima.shape[2]
    # Each row's threshold is the maximum of one of its blocks, as near as float32 has it.
    first_blocks = maxima[0, :, :, 0].float().contiguous()
    kept = kept_by(q, k, v, first_blocks, geometry=geometry)
    bound = first_blocks.double()[None, :, :, None]
    least = ((maxima >= bound + cases.VERDICT_MARGIN) | forced).sum(-1)
    most = ((maxima >= bound - cases.VERDICT_MARGIN) | forced).sum(-1)
    assert kept.shape == (1, 4, rows)
    assert (least <= kept).all()
    assert (kept <= most).all()


def test_each_head_and_row_has_its_own_threshold(target, rule, geometry):
    case = cases.Case("own", "", batch=2, seqlen_q=700, seqlen_k=700, heads=6, kv_heads=2)
    target.require("forward", torch.bfloat16, case.head_dim)
    q, k, v = case.inputs(torch.bfloat16, target.device)
    rows = cases.rows_of(case, geometry)
    generator = torch.Generator().manual_seed(5)
    keeps_all = torch.rand((6, rows), generator=generator) < 0.5
    thresholds = torch.where(keeps_all, -INF, INF).to(target.device)
    visible = reference.visible_blocks(700, 700, geometry=geometry).sum(-1)
    forced = reference.forced_blocks(700, 700, geometry=geometry).sum(-1)
    expected = torch.where(keeps_all, visible, forced).int().expand(2, -1, -1)
    kept = kept_by(q, k, v, thresholds, rule=rule, geometry=geometry)
    assert torch.equal(kept.cpu(), expected)


@pytest.mark.parametrize("table_rows", [1, 3, 100])
@pytest.mark.parametrize("lengths", [(256, 1000), (130, 450), (500, 300)])
def test_rows_are_absolute_and_the_last_serves_all_later_ones(
    target, geometry, table_rows, lengths
):
    seqlen_q, seqlen_k = lengths
    case = cases.Case("rows", "", seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    target.require("forward", torch.float16, case.head_dim)
    q, k, v = case.inputs(torch.float16, target.device)
    keeps_all = torch.arange(table_rows) % 2 == table_rows % 2
    thresholds = torch.where(keeps_all, -INF, INF).repeat(2, 1).to(target.device)
    visible = reference.visible_blocks(seqlen_q, seqlen_k, geometry=geometry).sum(-1)
    forced = reference.forced_blocks(seqlen_q, seqlen_k, geometry=geometry).sum(-1)
    used = torch.tensor(
        [
            min(max((seqlen_k - seqlen_q) // geometry.q_block + i, 0), table_rows - 1)
            for i in range(len(visible))
        ]
    )
    expected = torch.where(keeps_all[used], visible, forced).int().expand(1, 2, -1)
    assert torch.equal(kept_by(q, k, v, thresholds, geometry=geometry).cpu(), expected)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_planted_sparsity_is_found(target, dtype, share):
    # One dimension of q is constant, and the same one of k says which blocks matter.
    case = cases.Case(
        "planted", "", seqlen_q=1024, seqlen_k=1024, heads=2, kv_heads=1, head_dim=128
    )
    target.require("forward", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    q[..., 0] = 16.0
    matters = torch.ones(16, dtype=torch.bool)
    matters[: round(16 * share)] = False
    k[..., 0] = torch.where(matters, 0.0, -16.0).repeat_interleave(64)[None, :, None].to(k)
    thresholds = torch.full((2, 1), -8.0, device=target.device)
    visible = reference.visible_blocks(1024, 1024)
    forced = reference.forced_blocks(1024, 1024)
    expected = (visible & (matters | forced)).sum(-1).int().expand(1, 2, -1)
    assert torch.equal(kept_by(q, k, v, thresholds).cpu(), expected)


def test_relative_rules_skip_what_the_absolute_rule_cannot(target, dtype):
    # Rows of different scale: an absolute threshold sees the loud rows alone.
    case = cases.Case("loud", "", seqlen_q=512, seqlen_k=512, heads=1, kv_heads=1)
    target.require("forward", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    threshold = torch.zeros((1, 1), device=target.device)
    for rule in ("running_max", "peak_lse"):
        clear = reference.attention(q, k, v, threshold, rule=rule, compute_dtype=torch.float64)
        kept = kept_by(q, k, v, threshold, rule=rule)
        assert_same_verdicts(kept, clear.kept, clear.margin > cases.VERDICT_MARGIN)
    dense = reference.visible_blocks(512, 512, geometry=DEFAULT_GEOMETRY).sum()
    assert kept.sum() < dense
