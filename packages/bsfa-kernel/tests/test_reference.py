# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The reference back end against cases worked by hand, a slow oracle, and invariants."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import cases
import oracle
from bsfa_kernel import GEOMETRIES, RULES, VOTERS, Geometry, block_sparse_attention
from bsfa_kernel.geometry import full_blocks
from bsfa_kernel.reference import (
    attention,
    block_maxima,
    excesses,
    forced_blocks,
    verdicts,
    visible_blocks,
    voting_rows,
)
from compare import by_query

INF = math.inf
TINY = Geometry(2, 2)


def sdpa(q, k, v, *, causal=True, scale=None):
    """Dense attention, its causal mask aligned to the bottom right; 0 for queries without keys."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if causal:
        mask = mask.tril(k.shape[1] - q.shape[1])
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.nan_to_num().transpose(1, 2)


def column(*values):
    """One head of one-dimensional vectors: [1, len(values), 1, 1]."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def one_threshold(value):
    return torch.tensor([[value]], dtype=torch.float64)


# ------------------------------------------------------------------------------- worked by hand


def test_absolute_rule_compares_the_block_maximum():
    # Scores are those of k, as q is 1: block 0 holds 1 and 3, block 1 holds 2 and 0. No mask.
    q, k, v = column(1, 1), column(1, 3, 2, 0), column(10, 20, 30, 40)
    options = {"causal": False, "scale": 1.0, "geometry": TINY}
    assert attention(q, k, v, one_threshold(2.0), **options).mask.tolist() == [[[[True, True]]]]
    result = attention(q, k, v, one_threshold(2.5), **options)
    assert result.mask.tolist() == [[[[True, False]]]]
    assert result.kept.tolist() == [[[1]]]
    weights = [math.exp(1), math.exp(3)]
    expected = (10 * weights[0] + 20 * weights[1]) / sum(weights)
    assert result.out.flatten().tolist() == pytest.approx([expected, expected], rel=1e-14)
    assert result.lse.flatten().tolist() == pytest.approx([math.log(sum(weights))] * 2, rel=1e-14)
    assert result.margin.item() == pytest.approx(0.5)


def test_a_score_equal_to_the_threshold_keeps_the_block():
    q, k = column(1, 1), column(1, 3, 2, 0)
    options = {"causal": False, "scale": 1.0, "geometry": TINY}
    assert attention(q, k, k, one_threshold(3.0), **options).kept.item() == 1
    assert attention(q, k, k, one_threshold(math.nextafter(3, 4)), **options).kept.item() == 0


def test_running_max_compares_with_the_largest_score_seen():
    # Visited from the last block: [5, 4] has no reference yet and is kept, and leaves 5. Then
    # [0, 3] exceeds it by -2, and [1, 2] by -3.
    q, k = column(1), column(1, 2, 0, 3, 5, 4)
    options = {"causal": False, "scale": 1.0, "geometry": TINY, "rule": "running_max"}
    for threshold, mask in (
        (-1.9, [False, False, True]),
        (-2.0, [False, True, True]),
        (-3.0, [True, True, True]),
        (100.0, [False, False, True]),
        (INF, [False, False, False]),
    ):
        result = attention(q, k, k, one_threshold(threshold), **options)
        assert result.mask.flatten().tolist() == mask, threshold
    maxima = block_maxima(q, k, causal=False, scale=1.0, geometry=TINY, rule="running_max")
    assert maxima.flatten().tolist() == [-3.0, -2.0, INF]


@pytest.mark.parametrize("rule", ["running_max", "peak_lse"])
def test_a_block_that_is_skipped_lifts_the_reference_all_the_same(rule):
    # [9, 9] is skipped at +4 over 5 for a threshold of 4.5; then [8, 0] is at -1 or below.
    q, k = column(1), column(8, 0, 9, 9, 5, 4)
    options = {"causal": False, "scale": 1.0, "geometry": TINY, "rule": rule}
    result = attention(q, k, k, one_threshold(4.5), **options)
    assert result.mask.flatten().tolist() == [False, False, True]
    assert result.margin.item() == pytest.approx(0.5, abs=1e-12)
    # At 3 it is kept, and nothing changes for [8, 0].
    result = attention(q, k, k, one_threshold(3.0), **options)
    assert result.mask.flatten().tolist() == [False, True, True]


def test_peak_lse_compares_with_the_log_sum_exp_of_the_peaks_seen():
    q, k = column(1), column(1, 2, 5, 4, 3, 3)
    options = {"causal": False, "scale": 1.0, "geometry": TINY, "rule": "peak_lse"}
    excess = 2 - math.log(math.exp(5) + math.exp(3))
    assert attention(q, k, k, one_threshold(excess - 1e-9), **options).kept.item() == 3
    assert attention(q, k, k, one_threshold(excess + 1e-9), **options).kept.item() == 2
    maxima = block_maxima(q, k, causal=False, scale=1.0, geometry=TINY, rule="peak_lse")
    assert maxima.flatten().tolist() == [pytest.approx(excess), 2, INF]


def test_of_the_rows_of_a_block_the_last_of_each_two_or_four_votes():
    # The scores in key block 0 are the queries themselves, and those in later ones are 0. As many
    # queries as keys start a query block.
    k = column(1, 1, 0, 0, 0)
    options = {"causal": False, "scale": 1.0, "geometry": Geometry(4, 2)}
    for values, voters, keep in (
        ((9, 1, 1, 1, 0), 1, True),
        ((9, 1, 1, 1, 0), 2, False),
        ((1, 9, 1, 1, 0), 2, True),
        ((1, 9, 1, 1, 0), 4, False),
        ((1, 1, 9, 1, 0), 2, False),
        ((1, 1, 1, 9, 0), 4, True),
        ((0, 0, 0, 0, 9), 4, False),
    ):
        q = column(*values)
        result = attention(q, k, k, one_threshold(5.0), voters=voters, **options)
        # In the last query block, of one row, every row votes.
        assert result.mask[0, 0].tolist() == [[keep, False, True], [values[4] == 9, False, True]]


def test_rows_vote_by_their_absolute_position():
    # Queries are at positions 2 to 8: rows 2 and 3 of block 0, block 1, and row 0 of block 2.
    k = column(1, 1, *[0] * 7)
    options = {"causal": False, "scale": 1.0, "geometry": Geometry(4, 2)}
    for values, voters, keep in (
        ((9, 0, 0, 0, 0, 0, 0), 1, [True, False, False]),
        ((9, 0, 0, 0, 0, 0, 0), 2, [False, False, False]),
        ((0, 9, 0, 0, 0, 0, 0), 2, [True, False, False]),
        ((0, 9, 0, 0, 0, 0, 0), 4, [True, False, False]),
        ((0, 0, 9, 9, 0, 0, 0), 2, [False, True, False]),
        ((0, 0, 9, 9, 9, 0, 0), 4, [False, False, False]),
        ((0, 0, 0, 0, 0, 9, 9), 4, [False, True, True]),
    ):
        result = attention(column(*values), k, k, one_threshold(5.0), voters=voters, **options)
        assert result.mask[0, 0, :, 0].tolist() == keep
        assert result.kept.tolist() == [[[1 + kept for kept in keep]]]  # the last block is ragged


def test_one_row_is_enough_to_keep_a_block():
    # Row 0 (q = 1) meets -4 in block 0, row 1 (q = -1) meets +4.
    q, k = column(1, -1), column(-4, -4, 0, 0)
    options = {"causal": False, "scale": 1.0, "geometry": TINY, "rule": "running_max"}
    assert attention(q, k, k, one_threshold(4.0), **options).mask.flatten().tolist() == [True, True]


def test_the_diagonal_block_is_kept_whatever_the_threshold():
    q, k = column(1, 1, 1, 1), column(3, 3, 3, 3)
    result = attention(q, k, k, one_threshold(INF), scale=1.0, geometry=TINY)
    assert result.mask[0, 0].tolist() == [[True, False], [False, True]]


def test_a_block_whose_last_key_every_row_sees_is_not_forced():
    # Query 0 sees keys 0 and 1, so block 0 holds no masked score; block 1 does.
    geometry = Geometry(3, 2)
    assert forced_blocks(2, 3, geometry=geometry).tolist() == [[False, True]]
    assert visible_blocks(2, 3, geometry=geometry).tolist() == [[True, True]]


def test_rows_that_are_missing_from_the_last_query_block_force_nothing():
    # Query 2 is alone in its block, and sees keys 0 to 2: each block of one key whole.
    forced = forced_blocks(3, 3, geometry=Geometry(2, 1))
    assert forced.tolist() == [[False, True, False], [False, False, False]]


def test_rows_that_are_missing_from_the_first_query_block_force_nothing():
    # Query 0 is at position 1, alone in its block, and sees keys 0 and 1: block 0 whole.
    assert forced_blocks(3, 4, geometry=TINY).tolist() == [[False, False], [False, True]]
    assert visible_blocks(3, 4, geometry=TINY).tolist() == [[True, False], [True, True]]


def test_ragged_keys_force_the_last_block_without_a_mask():
    # The queries are at positions 3 and 4, in two query blocks.
    forced = forced_blocks(2, 5, causal=False, geometry=TINY)
    assert forced.tolist() == [[False, False, True]] * 2


def test_queries_before_the_first_key_give_zero_and_minus_infinity():
    q, k = column(1, 1, 1), column(2)
    result = attention(q, k, k, one_threshold(-INF), geometry=TINY)
    assert result.out.flatten().tolist() == [0, 0, 2]
    assert result.lse.flatten().tolist() == [-INF, -INF, 2]
    assert result.kept.flatten().tolist() == [0, 1]


def test_thresholds_are_read_at_the_absolute_position():
    # 2 queries after 4 cached keys are the third query block of the prefill.
    q, k = column(1, 1), column(*[1] * 6)
    thresholds = torch.tensor([[-INF, -INF, INF, -INF]])
    result = attention(q, k, k, thresholds, geometry=TINY)
    assert result.mask.flatten().tolist() == [False, False, True]
    result = attention(q, k, k, thresholds[:, :1], geometry=TINY)
    assert result.mask.flatten().tolist() == [True, True, True]
    # 3 queries after 3 cached keys begin in the second block, and end with the third.
    result = attention(column(1, 1, 1), k, k, thresholds, geometry=TINY)
    assert result.mask[0, 0].tolist() == [[True, True, False], [False, False, True]]
    # Positions before the first key are those of the first row.
    result = attention(column(1, 1, 1), column(1), column(1), thresholds, geometry=TINY)
    assert result.mask[0, 0].tolist() == [[False], [True]]


# ----------------------------------------------------------------------------- the slow oracle


@st.composite
def small_calls(draw):
    """Arguments of calls that are small enough to work out score by score."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    seqlen_q, seqlen_k = draw(st.integers(1, 9)), draw(st.integers(1, 13))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shapes = [(1, seqlen_q, kv_heads * group, 3)] + [(1, seqlen_k, kv_heads, 3)] * 2
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    for x in (q, k):
        value = draw(st.sampled_from([None, None, None, math.nan, INF, -INF]))
        if value is not None:
            x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    rows = draw(st.integers(1, 4))
    thresholds = torch.randn((kv_heads * group, rows), generator=generator)
    thresholds *= draw(st.sampled_from([0.5, 2.0]))
    special = draw(st.sampled_from([None, None, None, -INF, INF]))
    if special is not None:
        thresholds[draw(st.integers(0, len(thresholds) - 1)), 0] = special
    voters = draw(st.sampled_from([1, 1, 2, 4]))
    options = {
        "causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([0.5, 1.0, 1.7])),
        "rule": draw(st.sampled_from(RULES)),
        "geometry": Geometry(voters * draw(st.integers(1, 4 // voters)), draw(st.integers(1, 4))),
        "voters": voters,
        "sinks": cases.random_sinks(lambda x: draw(st.sampled_from(x)), kv_heads * group),
    }
    return q, k, v, thresholds, options


@settings(max_examples=max(60, settings().max_examples))
@given(small_calls())
def test_reference_matches_the_score_by_score_oracle(call):
    q, k, v, thresholds, options = call
    expected = oracle.attend(
        *(x.numpy() for x in (q, k, v, thresholds)),
        causal=options["causal"],
        scale=options["scale"],
        rule=options["rule"],
        q_block=options["geometry"].q_block,
        k_block=options["geometry"].k_block,
        voters=options["voters"],
        sinks=options["sinks"],
    )
    result = attention(q, k, v, thresholds, **options)
    if (result.margin > 1e-12).all():
        assert result.mask.tolist() == expected.mask.tolist()
        assert result.kept.tolist() == expected.kept.tolist()
        exactly = {"rtol": 0, "atol": 1e-12, "equal_nan": True}
        torch.testing.assert_close(result.out, torch.from_numpy(expected.out), **exactly)
        torch.testing.assert_close(result.lse, torch.from_numpy(expected.lse), **exactly)
    for voters, wanted in ((options["voters"], expected.voted), (1, expected.maxima)):
        maxima = block_maxima(q, k, **{**options, "voters": voters})
        torch.testing.assert_close(
            maxima, torch.from_numpy(wanted), rtol=0, atol=1e-12, equal_nan=True
        )


@settings(max_examples=max(30, settings().max_examples))
@given(st.integers(0, 400), st.integers(0, 400), st.booleans(), st.sampled_from(GEOMETRIES))
def test_forced_and_visible_blocks_are_those_that_hold_masked_and_visible_scores(
    seqlen_q, seqlen_k, causal, geometry
):
    first, k_blocks = seqlen_k - seqlen_q, -(-seqlen_k // geometry.k_block)
    positions = torch.arange(first, seqlen_k)
    of_rows = positions.div(geometry.q_block, rounding_mode="floor")
    seen = torch.zeros(seqlen_q, k_blocks * geometry.k_block, dtype=torch.bool)
    seen[:, :seqlen_k] = True
    if causal:
        seen = seen.tril(seqlen_k - seqlen_q)
    visible = visible_blocks(seqlen_q, seqlen_k, causal=causal, geometry=geometry)
    forced = forced_blocks(seqlen_q, seqlen_k, causal=causal, geometry=geometry)
    query_blocks = of_rows.unique()
    assert visible.shape == forced.shape == (len(query_blocks), k_blocks)
    for i, block in enumerate(query_blocks):
        rows = seen[of_rows == block]
        blocks = rows.view(len(rows), k_blocks, geometry.k_block)
        assert torch.equal(visible[i], blocks.any(2).any(0))
        assert torch.equal(forced[i], blocks.any(2).any(0) & (~blocks).any(2).any(0))


# ------------------------------------------------------------------------------------ verdicts


def row_maxima(q, k, geometry, causal):
    """The peaks of all rows and blocks, [heads, q_blocks, q_block, k_blocks]."""
    scores = (q[0].transpose(0, 1) * q.shape[-1] ** -0.5) @ k[0].transpose(0, 1).transpose(1, 2)
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
        scores = scores.masked_fill(hidden, -INF)
    heads, seqlen_q, seqlen_k = scores.shape
    blocks = scores.view(heads, seqlen_q // geometry.q_block, geometry.q_block, -1)
    return blocks.unflatten(-1, (seqlen_k // geometry.k_block, geometry.k_block)).amax(-1)


@pytest.mark.parametrize("voters", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_all_query_blocks_and_several_thresholds_are_decided_at_once(
    rule, geometry, causal, voters
):
    case = cases.Case("at_once", "", seqlen_q=384, seqlen_k=640, heads=3, kv_heads=3)
    q, k, v = case.inputs(torch.float64)
    maxima = row_maxima(q, k, geometry, causal)
    q_blocks = maxima.shape[1]
    indices = torch.arange(q_blocks)
    full = full_blocks(indices, case.seqlen_q, case.seqlen_k, geometry, causal=causal)
    visible = visible_blocks(case.seqlen_q, case.seqlen_k, causal=causal, geometry=geometry)
    chosen = torch.tensor([-INF, -1.0, 0.0, 1.0, INF]) + (3.0 if rule == "absolute" else 0.0)
    thresholds = (chosen[:, None, None] + torch.arange(3)[:, None] / 8).expand(5, 3, q_blocks)
    voting = voting_rows(case.seqlen_q, case.seqlen_k, geometry, voters)
    decided = verdicts(maxima, thresholds, rule=rule, voting=voting, full=full)
    assert decided.excess.shape == decided.keep.shape == (5, 3, q_blocks, maxima.shape[-1])
    assert (decided.keep | visible | (decided.excess == INF)).all()
    forced = torch.arange(maxima.shape[-1]) >= full[:, None]
    assert ((decided.excess == INF) >= forced).all()
    assert 0 < decided.keep[1:4][..., ~forced].double().mean() < 1
    for index, part in enumerate(thresholds):
        options = {"rule": rule, "geometry": geometry, "causal": causal, "voters": voters}
        one = attention(q, k, v, part[:, :1], **options)
        assert torch.equal(decided.keep[index] & visible, one.mask[0])
        unforced = decided.excess[index][:, ~forced] - part[:, :1].double()
        if part[0, 0].isfinite():
            closest = unforced.abs().nan_to_num(nan=INF).amin()
            torch.testing.assert_close(closest, one.margin.amin(), rtol=0, atol=1e-12)


def test_later_blocks_may_be_visited_before():
    maxima = torch.tensor([[[3.0, 1.0, 2.0]]], dtype=torch.float64)  # of one row
    known = torch.tensor([[2.5]], dtype=torch.float64)
    for rule, excess in (
        ("running_max", [0.5, -1.5, -0.5]),
        (
            "peak_lse",
            [
                3 - math.log(math.exp(1) + math.exp(2) + math.exp(2.5)),
                1 - math.log(math.exp(2) + math.exp(2.5)),
                -0.5,
            ],
        ),
    ):
        decided = verdicts(maxima, torch.tensor([-0.25]), rule=rule, reference=known)
        assert decided.excess[0].tolist() == pytest.approx(excess, abs=1e-12)
        assert decided.keep.tolist() == [[True, False, False]]
    assert verdicts(maxima, torch.tensor([2.0]), rule="absolute").keep.tolist() == [
        [True, False, True]
    ]


@pytest.mark.parametrize("worth", [math.nan, INF])
@pytest.mark.parametrize("rule", ["running_max", "peak_lse"])
def test_a_row_that_has_seen_nan_or_infinity_keeps_all_further_blocks(rule, worth):
    maxima = torch.tensor([[-9.0, -INF, worth, -9.0, 0.0]])
    keep = verdicts(maxima, torch.tensor(-1.0), rule=rule).keep.tolist()
    assert keep == [True, True, True, False, True]
    not_voting = verdicts(
        torch.cat((maxima, torch.zeros(1, 5))),
        torch.tensor(0.1),
        rule=rule,
        voting=torch.tensor([False, True]),
    )
    assert not_voting.keep.tolist() == [False, False, False, False, True]


@pytest.mark.parametrize("rule", RULES)
def test_of_no_rows_or_no_blocks_there_is_an_excess_each(rule):
    assert excesses(torch.zeros(2, 3, 0), rule=rule).shape == (2, 0)
    assert torch.equal(excesses(torch.zeros(2, 0, 5), rule=rule), torch.full((2, 5), -INF))


def test_references_hold_over_wide_ranges():
    # Of one row: what is seen first is all but nothing beside what comes later, and the reverse.
    maxima = torch.tensor([[0.0, 700.0, -1e4, -1e4 - 1, -3e4]])
    found = excesses(maxima, rule="peak_lse")
    expected = [-700.0, 10700.0 - math.log1p(1 / math.e), 1.0, 19999.0, INF]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("seqlen_q", [0, 1, 3, 64, 65, 128, 200])
@pytest.mark.parametrize("offset", [-201, -1, 0, 1, 64, 100, 127])
def test_voting_rows(seqlen_q, offset, geometry):
    seqlen_k = max(seqlen_q + offset, 0)
    positions = range(seqlen_k - seqlen_q, seqlen_k)
    first = positions.start // geometry.q_block * geometry.q_block
    last = (seqlen_k - 1) // geometry.q_block * geometry.q_block
    for voters in VOTERS:
        rows = voting_rows(seqlen_q, seqlen_k, geometry, voters)
        q_blocks = (last - first) // geometry.q_block + 1 if seqlen_q else 0
        assert rows.shape == (q_blocks, geometry.q_block)
        flat = rows.flatten().tolist()
        assert flat == [
            r in positions and (r >= last or r % voters == voters - 1)
            for r in range(first, first + len(flat))
        ]
    with pytest.raises(ValueError, match="voters must be one of 1, 2, 4; got 3"):
        voting_rows(seqlen_q, seqlen_k, geometry, 3)
    with pytest.raises(ValueError, match="voters must divide the queries of a block, got 4 and 2"):
        voting_rows(seqlen_q, seqlen_k, TINY, 4)


def test_verdicts_refuse_an_unknown_rule():
    with pytest.raises(ValueError, match="rule must be one of"):
        verdicts(torch.zeros(1, 4, 2), torch.zeros(1), rule="largest")


# ---------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_minus_infinity_is_dense_attention(case, rule, geometry):
    q, k, v = case.inputs(torch.float64)
    thresholds = torch.full((case.heads, 1), -INF)
    options = {"causal": case.causal, "scale": case.scale}
    result = attention(q, k, v, thresholds, rule=rule, geometry=geometry, **options)
    dense = sdpa(q, k, v, **options)
    torch.testing.assert_close(result.out, dense, rtol=0, atol=1e-13)
    visible = visible_blocks(case.seqlen_q, case.seqlen_k, causal=case.causal, geometry=geometry)
    assert (result.mask == visible).all()


def test_minus_infinity_is_dense_attention_to_rounding_in_float32(rule):
    case = cases.Case("single", "", batch=2, seqlen_q=500, seqlen_k=700, heads=6, kv_heads=2)
    q, k, v = case.inputs()
    out = block_sparse_attention(q, k, v, torch.full((6, 1), -INF), rule=rule)
    torch.testing.assert_close(out, sdpa(q, k, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_plus_infinity_keeps_the_forced_blocks_only(case, rule, geometry):
    q, k, v = case.inputs()
    thresholds = torch.full((case.heads, 1), INF)
    result = attention(
        q, k, v, thresholds, rule=rule, geometry=geometry, causal=case.causal, scale=case.scale
    )
    forced = forced_blocks(case.seqlen_q, case.seqlen_k, causal=case.causal, geometry=geometry)
    assert (result.mask == forced).all()
    assert not result.out.isnan().any()


@pytest.mark.parametrize("case", cases.CORRECTNESS + cases.OFFSET, ids=str)
def test_sparse_output_is_dense_attention_on_the_blocks_kept(case, rule, geometry):
    q, k, v = case.inputs(torch.float64)
    options = {"rule": rule, "geometry": geometry, "causal": case.causal, "scale": case.scale}
    thresholds, _ = cases.separating_thresholds(case, q, k, rule=rule, geometry=geometry, tries=1)
    result = attention(q, k, v, thresholds, **options)
    mask = by_query(result.mask, case.seqlen_q, case.seqlen_k, geometry)
    mask = mask.repeat_interleave(geometry.k_block, 3)[..., : case.seqlen_k]
    if case.causal:
        mask &= torch.ones(mask.shape[2:], dtype=torch.bool).tril(case.seqlen_k - case.seqlen_q)
    dense = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=case.scale, enable_gqa=True
    )
    dense = dense.nan_to_num().transpose(1, 2)
    torch.testing.assert_close(result.out, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", cases.CORRECTNESS + cases.OFFSET, ids=str)
def test_a_block_is_kept_at_its_own_maximum_and_not_above(case, geometry):
    q, k, v = case.inputs(torch.float64)
    options = {"geometry": geometry, "causal": case.causal, "scale": case.scale}
    maxima = block_maxima(q, k, **options)
    forced = forced_blocks(case.seqlen_q, case.seqlen_k, causal=case.causal, geometry=geometry)
    threshold = maxima[maxima.isfinite()].median()
    for bound in (threshold, torch.nextafter(threshold, torch.tensor(INF, dtype=torch.float64))):
        thresholds = bound.expand(case.heads, 1)
        result = attention(q, k, v, thresholds, **options)
        assert torch.equal(result.mask, (maxima >= bound) | forced)


@pytest.mark.parametrize("voters", [1, 2, 4])
def test_maxima_of_the_voters_are_what_decides(rule, geometry, voters):
    case = cases.Case("voters", "", batch=2, seqlen_q=500, seqlen_k=700, heads=4, kv_heads=2)
    q, k, v = case.inputs(torch.float64)
    options = {"rule": rule, "geometry": geometry, "voters": voters}
    maxima = block_maxima(q, k, **options)
    forced = forced_blocks(case.seqlen_q, case.seqlen_k, geometry=geometry)
    threshold = maxima[maxima.isfinite()].median()
    for bound in (threshold, torch.nextafter(threshold, torch.tensor(INF, dtype=torch.float64))):
        found = attention(q, k, v, bound.expand(case.heads, 1), **options).mask
        free = ~forced.expand(found.shape)
        # In one product with fewer rows a score may be rounded otherwise.
        clear = (maxima - bound).abs() > 1e-12
        assert torch.equal(found[free & clear], (maxima >= bound)[free & clear])
    assert ((maxima < block_maxima(q, k, rule=rule, geometry=geometry)).any()) == (voters > 1)


def test_maxima_refuse_voters_that_are_none():
    q, k, _ = cases.Case("refused", "", seqlen_q=10, seqlen_k=10).inputs()
    for voters, message in ((3, "voters must be one of 1, 2, 4; got 3"), (True, "got True")):
        with pytest.raises(ValueError, match=message):
            block_maxima(q, k, voters=voters)
    with pytest.raises(ValueError, match="voters must divide the queries of a block, got 4 and 2"):
        block_maxima(q, k, voters=4, geometry=TINY)


def test_keeping_more_never_follows_from_a_higher_absolute_threshold(geometry):
    q, k, v = cases.Case("monotone", "", seqlen_q=700, seqlen_k=700, heads=3, kv_heads=3).inputs()
    previous = None
    for threshold in (-INF, 1.0, 2.0, 2.5, 3.0, 3.5, 4.0, INF):
        mask = attention(q, k, v, torch.full((3, 1), threshold), geometry=geometry).mask
        assert previous is None or not (mask & ~previous).any()
        previous = mask


@pytest.mark.parametrize("chunk_blocks", [1, 2])
def test_chunks_of_whole_query_blocks_give_what_the_whole_gives(rule, geometry, chunk_blocks):
    case = cases.Case("chunks", "", batch=2, seqlen_q=650, seqlen_k=650, heads=4, kv_heads=2)
    q, k, v = case.inputs(torch.float64)
    options = {"rule": rule, "geometry": geometry}
    thresholds, _ = cases.separating_thresholds(case, q, k, tries=1, **options)
    whole = attention(q, k, v, thresholds, **options)
    step = chunk_blocks * geometry.q_block
    for start in range(0, 650, step):
        stop = min(start + step, 650)
        part = attention(q[:, start:stop], k[:, :stop], v[:, :stop], thresholds, **options)
        torch.testing.assert_close(part.out, whole.out[:, start:stop], rtol=0, atol=1e-13)
        torch.testing.assert_close(part.lse, whole.lse[:, :, start:stop], rtol=0, atol=1e-13)
        first = start // geometry.q_block
        assert torch.equal(part.kept, whole.kept[:, :, first : first + part.kept.shape[2]])


@pytest.mark.parametrize("cuts", [(100,), (1, 2, 300), (64, 191, 449, 513), (649,)])
def test_a_cut_anywhere_changes_only_the_query_blocks_that_it_goes_through(rule, geometry, cuts):
    case = cases.Case("cuts", "", batch=2, seqlen_q=650, seqlen_k=650, heads=4, kv_heads=2)
    q, k, v = case.inputs(torch.float64)
    options = {"rule": rule, "geometry": geometry}
    thresholds, _ = cases.separating_thresholds(case, q, k, tries=1, **options)
    assert thresholds.shape[1] > 1
    dense = torch.full((4, 1), -INF)
    whole, whole_dense = (attention(q, k, v, x, **options) for x in (thresholds, dense))
    assert whole.mask.sum() < whole_dense.mask.sum()
    for start, stop in pairwise((0, *cuts, 650)):
        tensors = q[:, start:stop], k[:, :stop], v[:, :stop]
        part = attention(*tensors, dense, **options)
        torch.testing.assert_close(part.out, whole_dense.out[:, start:stop], rtol=0, atol=1e-13)
        part = attention(*tensors, thresholds, **options)
        first, blocks = start // geometry.q_block, part.kept.shape[2]
        uncut = slice(start % geometry.q_block > 0, blocks - (stop % geometry.q_block > 0))
        if stop == 650:
            uncut = slice(uncut.start, blocks)
        expected = whole.mask[:, :, first : first + blocks, : part.mask.shape[3]]
        assert torch.equal(part.mask[:, :, uncut], expected[:, :, uncut])
        rows = torch.zeros(blocks, dtype=torch.bool)
        rows[uncut] = True
        rows = by_query(rows, stop - start, stop, geometry, 0)
        expected = whole.out[:, start:stop]
        torch.testing.assert_close(part.out[:, rows], expected[:, rows], rtol=0, atol=1e-13)


def test_grouped_heads_give_what_repeated_keys_give(rule):
    case = cases.Case("repeat", "", batch=2, seqlen_q=300, seqlen_k=300, heads=6, kv_heads=2)
    q, k, v = case.inputs(torch.float64)
    thresholds = torch.linspace(-1, 2, 6)[:, None]
    grouped = attention(q, k, v, thresholds, rule=rule)
    repeated = attention(
        q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), thresholds, rule=rule
    )
    assert torch.equal(grouped.mask, repeated.mask)
    torch.testing.assert_close(grouped.out, repeated.out, rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", cases.PACKED, ids=str)
def test_packed_sequences_give_what_each_gives_alone(case, rule, geometry):
    q, k, v = case.inputs(torch.float64)
    starts_q, starts_k = case.cu_seqlens()
    thresholds = torch.linspace(-1, 2.5, case.heads * 3).view(case.heads, 3)
    options = {"rule": rule, "geometry": geometry, "causal": case.causal}
    packed = attention(q, k, v, thresholds, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, **options)
    covered = torch.zeros_like(packed.kept, dtype=torch.bool)
    for index in range(len(case.lengths)):
        queries = slice(starts_q[index], starts_q[index + 1])
        keys = slice(starts_k[index], starts_k[index + 1])
        alone = attention(q[None, queries], k[None, keys], v[None, keys], thresholds, **options)
        assert torch.equal(packed.out[queries], alone.out[0])
        assert torch.equal(packed.lse[:, queries], alone.lse[0])
        first = int(starts_q[index]) // geometry.q_block + 2 * index
        columns = slice(first, first + alone.kept.shape[2])
        assert torch.equal(packed.kept[:, columns], alone.kept[0])
        assert torch.equal(packed.mask[:, columns, : alone.mask.shape[3]], alone.mask[0])
        assert not covered[:, columns].any(), "two sequences share a column"
        covered[:, columns] = True
    assert (packed.kept[~covered] == 0).all()


def test_order_of_batch_and_heads_does_not_matter(rule):
    case = cases.Case("order", "", batch=3, seqlen_q=200, seqlen_k=260, heads=4, kv_heads=4)
    q, k, v = case.inputs(torch.float64)
    thresholds = torch.linspace(-1, 2, 4)[:, None]
    straight = attention(q, k, v, thresholds, rule=rule)
    turned = attention(*(x.flip(0).flip(2) for x in (q, k, v)), thresholds.flip(0), rule=rule)
    assert torch.equal(straight.mask, turned.mask.flip(0).flip(1))
    torch.testing.assert_close(turned.out.flip(0).flip(2), straight.out, rtol=0, atol=1e-13)


def test_strides_do_not_matter(rule):
    case = cases.Case("strides", "", batch=2, seqlen_q=200, seqlen_k=260, heads=4, kv_heads=2)
    q, k, v = case.inputs()
    strided = [x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0) for x in (q, k, v)]
    assert all(x.stride(-1) != 1 for x in strided)
    thresholds = torch.linspace(-1, 2, 4)[:, None]
    expected = block_sparse_attention(q, k, v, thresholds, rule=rule)
    out = block_sparse_attention(*strided, thresholds, rule=rule)
    assert torch.equal(out, expected)
    assert out.is_contiguous()


def test_work_by_chunks_of_heads_changes_nothing(rule, monkeypatch):
    case = cases.Case(
        "chunks of heads", "", batch=2, seqlen_q=300, seqlen_k=300, heads=6, kv_heads=3
    )
    q, k, v = case.inputs(torch.float64)
    thresholds = torch.linspace(-1, 2, 6)[:, None]
    whole = attention(q, k, v, thresholds, rule=rule)
    maxima = block_maxima(q, k, rule=rule)
    monkeypatch.setattr("bsfa_kernel.reference.scores._SCORES_AT_A_TIME_CPU", 1)
    torch.testing.assert_close(attention(q, k, v, thresholds, rule=rule), whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(block_maxima(q, k, rule=rule), maxima, rtol=0, atol=1e-13)


def test_gathering_the_blocks_kept_changes_nothing(rule, monkeypatch):
    case = cases.Case("gather", "", batch=2, seqlen_q=500, seqlen_k=700, heads=4, kv_heads=2)
    q, k, v = case.inputs(torch.float64)
    thresholds = torch.linspace(-2, 3, 4)[:, None]
    results = []
    for share in (0.0, 1.0):
        monkeypatch.setattr("bsfa_kernel.reference.forward._WORTH_GATHERING", share)
        results.append(attention(q, k, v, thresholds, rule=rule))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-13)


def test_values_of_skipped_blocks_do_not_matter_even_if_they_are_nan(rule):
    q, k, v = cases.Case("poison", "", seqlen_q=256, seqlen_k=512, heads=1, kv_heads=1).inputs()
    thresholds = torch.tensor([[1.0 if rule == "absolute" else -1.0]])
    k[:, :128] *= 0.01
    clean = attention(q, k, v, thresholds, rule=rule)
    skipped = ~clean.mask[0, 0].any(0)
    assert skipped.any()
    v[0, skipped.repeat_interleave(64)] = math.nan
    poisoned = attention(q, k, v, thresholds, rule=rule)
    torch.testing.assert_close(poisoned.out, clean.out, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_sixteen_bit_inputs_are_computed_in_float32(dtype):
    q, k, v = cases.Case("sixteen", "", heads=2, kv_heads=1).inputs(dtype)
    thresholds = torch.full((2, 1), 1.0)
    result = attention(q, k, v, thresholds)
    exact = attention(q.double(), k.double(), v.double(), thresholds)
    assert result.out.dtype == dtype
    assert result.lse.dtype == torch.float32
    torch.testing.assert_close(result.lse.double(), exact.lse, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.out, exact.out.to(dtype), rtol=1e-2, atol=1e-3)


def test_compute_dtype_sets_the_dtype_of_the_outputs():
    q, k, v = cases.Case("oracle", "").inputs(torch.bfloat16)
    result = attention(q, k, v, torch.zeros(2, 1), compute_dtype=torch.float64)
    assert result.out.dtype == result.lse.dtype == torch.float64
    maxima = block_maxima(q, k, compute_dtype=torch.float64)
    assert maxima.dtype == torch.float64
    with pytest.raises(ValueError, match="compute_dtype must be float32 or float64"):
        attention(q, k, v, torch.zeros(2, 1), compute_dtype=torch.float16)


def test_margin_is_the_distance_to_the_closest_verdict(geometry):
    q, k, v = cases.Case("margin", "", seqlen_q=400, seqlen_k=400).inputs(torch.float64)
    thresholds = torch.full((2, 1), 3.0)
    result = attention(q, k, v, thresholds, geometry=geometry)
    maxima = block_maxima(q, k, geometry=geometry)
    undecided = ~forced_blocks(400, 400, geometry=geometry) & maxima.isfinite()
    distance = (maxima - 3.0).abs().masked_fill(~undecided, INF)
    torch.testing.assert_close(result.margin, distance.amin(-1), rtol=0, atol=1e-12)


def test_margin_tells_which_perturbations_leave_the_verdicts_alone(rule):
    case = cases.Case("margins", "", seqlen_q=400, seqlen_k=400, heads=4, kv_heads=2)
    q, k, v = case.inputs(torch.float64)
    thresholds = torch.linspace(-1, 2, 4)[:, None].double()
    result = attention(q, k, v, thresholds, rule=rule)
    for sign in (-1, 1):
        moved = attention(q, k, v, thresholds + sign * 1e-3, rule=rule)
        stable = result.margin > 1e-3
        assert stable.any()
        assert torch.equal(moved.kept[stable], result.kept[stable])
