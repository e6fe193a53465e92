# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The estimator against hand-worked cases and a slow version of the definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bsfa_kernel
from bsfa_calib import estimate
from bsfa_calib.recording import Recorder, histogram, top_maxima
from bsfa_kernel import Geometry
from bsfa_kernel.geometry import count_visible

PAPERS = Geometry(128, 64)
GEOMETRIES = [PAPERS, Geometry(64, 64)]


def sorted_maxima(
    lengths: list[int], geometry: Geometry = PAPERS, *, heads: int = 3, seed: int = 0
) -> list[np.ndarray]:
    """Random maxima of samples, as `top_maxima` gives them: descending, padded with −inf."""
    generator = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        unforced = estimate.unforced_blocks(length, geometry)
        width = -(-length // geometry.k_block)
        values = generator.normal(size=(heads, len(unforced), width)).astype(np.float32)
        values[:, np.arange(width) >= unforced[:, None]] = -np.inf
        samples.append(-np.sort(-values, axis=-1))
    return samples


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("seqlen", [1, 63, 64, 65, 127, 128, 129, 300, 512, 1000])
def test_block_counts_are_those_of_the_reference(seqlen: int, geometry: Geometry) -> None:
    visible = bsfa_kernel.reference.visible_blocks(seqlen, seqlen, geometry=geometry)
    forced = bsfa_kernel.reference.forced_blocks(seqlen, seqlen, geometry=geometry)
    np.testing.assert_array_equal(
        estimate.unforced_blocks(seqlen, geometry), (visible & ~forced).sum(-1).numpy()
    )


def test_one_sample_gives_the_midpoint_of_the_kth_and_the_next_maximum() -> None:
    # Query block 2 of 128x64 has four unforced blocks.
    top = np.full((1, 3, 6), -np.inf, np.float32)
    top[0, 1, :2] = [3, 1]
    top[0, 2, :4] = [8, 6, 5, -2]
    for aggregate in ("pooled", "mean", "median", "quantile:0.3"):
        result = estimate.estimate_thresholds([top], [1, 2, 3, 4], PAPERS, aggregate=aggregate)
        expected = [
            [-np.inf, 2, 7],
            [-np.inf, -np.inf, 5.5],
            [-np.inf, -np.inf, 1.5],
            [-np.inf, -np.inf, -np.inf],
        ]
        np.testing.assert_array_equal(result.thresholds[:, 0], expected)
        assert result.inexact == 0


@pytest.mark.parametrize(
    ("aggregate", "combine"),
    [
        ("mean", np.mean),
        ("median", np.median),
        ("quantile:0.25", lambda values: np.quantile(values, 0.25)),
    ],
)
def test_samples_are_combined_as_a_loop_over_the_definition_does(
    aggregate: str, combine: Callable[[list[float]], float]
) -> None:
    samples = sorted_maxima([900, 512, 700])
    result = estimate.estimate_thresholds(samples, [1, 3, 7], PAPERS, aggregate=aggregate)
    unforced = estimate.unforced_blocks(900, PAPERS)
    for point, k in enumerate([1, 3, 7]):
        for head in range(3):
            for row in range(8):
                there = [s[head, row] for s in samples if row < s.shape[1]]
                each = [(values[k - 1] + values[k]) / 2 for values in there if unforced[row] > k]
                expected = combine(each) if each else -np.inf
                assert result.thresholds[point, head, row] == pytest.approx(
                    expected, rel=1e-6, abs=1e-6
                )


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 1100), min_size=1, max_size=5),
    geometry=st.sampled_from(GEOMETRIES),
    seed=st.integers(0, 99),
)
def test_pooled_thresholds_keep_k_blocks_on_average(
    lengths: list[int], geometry: Geometry, seed: int
) -> None:
    samples = sorted_maxima(lengths, geometry, seed=seed)
    ks = [1, 2, 5, 9]
    result = estimate.estimate_thresholds(samples, ks, geometry)
    assert result.inexact == 0
    count = estimate.KeptCount(ks)
    for length, sample in zip(lengths, samples, strict=True):
        count.add(sample, result.thresholds, length, geometry)
    most = estimate.unforced_blocks(max(lengths), geometry)[-1]
    for point, k in enumerate(ks):
        expected = k if most > k else np.nan
        np.testing.assert_allclose(count.mean_kept()[point], expected, rtol=1e-6)


def test_kept_counts_and_sparsity_are_those_of_the_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    seqlen, heads = 900, 2
    q, k = (torch.randn(1, seqlen, heads, 16, generator=generator) for _ in range(2))
    maxima = bsfa_kernel.block_maxima(q, k)[0]
    recorder = Recorder("absolute", 128, 64, lambda layer, values: None)
    top = top_maxima(maxima, recorder, seqlen, 100).numpy()
    result = estimate.estimate_thresholds([top], [2, 5], PAPERS)
    count = estimate.KeptCount([2, 5])
    count.add(top, result.thresholds, seqlen, PAPERS)
    visible = count_visible(seqlen, seqlen, PAPERS)
    for point in range(2):
        thresholds = torch.from_numpy(result.thresholds[point].copy())
        kept = bsfa_kernel.reference.attention(q, k, k, thresholds).kept[0].numpy()
        share = 1 - kept.sum(-1) / visible
        np.testing.assert_allclose(count.sparsity()[point], share, rtol=1e-6)


def test_thresholds_fall_as_k_rises() -> None:
    result = estimate.estimate_thresholds(sorted_maxima([2000, 1500]), list(range(1, 30)), PAPERS)
    assert (result.thresholds[1:] <= result.thresholds[:-1]).all()


def test_a_tie_keeps_its_blocks_and_a_hair_of_a_gap_is_respected() -> None:
    above = np.nextafter(np.float32(1), np.float32(2))
    top = np.full((1, 3, 6), -np.inf, np.float32)
    top[0, 1, :2] = [1, 1]
    top[0, 2, :4] = [above, 1, 1, 1]
    result = estimate.estimate_thresholds([top], [1], PAPERS)
    assert estimate.kept_blocks(top, result.thresholds)[..., 0].tolist() == [[0, 2, 1]]


def test_pooling_cut_samples_is_exact_or_says_that_it_is_not() -> None:
    samples = sorted_maxima([2000] * 6)
    full = estimate.estimate_thresholds(samples, [4, 6], PAPERS)
    for keep in (8, 12, 20):
        cut = estimate.estimate_thresholds(
            [sample[..., :keep] for sample in samples], [4, 6], PAPERS
        )
        wrong = np.count_nonzero(cut.thresholds != full.thresholds)
        assert wrong <= cut.inexact
        assert (cut.thresholds <= full.thresholds).all()
    assert cut.inexact == 0


def test_leading_dimensions_are_free() -> None:
    samples = sorted_maxima([700, 900], heads=6)
    flat = estimate.estimate_thresholds(samples, [2, 3], PAPERS)
    shaped = estimate.estimate_thresholds(
        [sample.reshape(2, 3, *sample.shape[1:]) for sample in samples],
        [2, 3],
        PAPERS,
    )
    np.testing.assert_array_equal(
        shaped.thresholds, flat.thresholds.reshape(2, 2, 3, *flat.thresholds.shape[2:])
    )


def test_too_few_maxima_no_samples_and_unknown_aggregates_are_refused() -> None:
    samples = sorted_maxima([900])
    with pytest.raises(ValueError, match="k=5 needs 6 maxima a query block, got 4"):
        estimate.estimate_thresholds([s[..., :4] for s in samples], [5], PAPERS)
    with pytest.raises(ValueError, match="at least one sample"):
        estimate.estimate_thresholds([], [5], PAPERS)
    for aggregate in ("mode", "quantile", "quantile:2", "quantile:-1", "quantile:x"):
        with pytest.raises(ValueError, match="aggregate must be one of"):
            estimate.parse_aggregate(aggregate)


def test_the_histogram_gives_the_scalar_at_which_a_share_is_skipped() -> None:
    generator = torch.Generator().manual_seed(1)
    seqlen = 2048
    blocks = seqlen // 128, seqlen // 64
    maxima = torch.randn(4, *blocks, generator=generator) * 6 - 3
    recorder = Recorder("running_max", 128, 64, lambda layer, values: None)
    counts = histogram(maxima, recorder, seqlen).numpy()
    visible = count_visible(seqlen, seqlen, PAPERS)
    targets = [0.0, 0.25, 0.5, 0.8]
    scalars = estimate.scalar_thresholds(counts, visible * 4, targets)
    unforced = estimate.unforced_blocks(seqlen, PAPERS)
    chosen = maxima.numpy()[:, np.arange(blocks[1]) < unforced[:, None]]
    for target, scalar in zip(targets, scalars, strict=True):
        assert (chosen < scalar).sum() / (visible * 4) == pytest.approx(target, abs=2e-3)
    shares = estimate.skipped_share(counts, visible, scalars)
    exact = (chosen[:, :, None] < scalars).sum(axis=1) / visible
    np.testing.assert_allclose(shares, exact.T, atol=8e-3)


def test_values_beyond_the_histogram_are_counted_at_its_ends() -> None:
    maxima = torch.tensor([-1e9, 1e9, -float("inf"), 5.0]).reshape(1, 1, 4).repeat(1, 3, 1)
    recorder = Recorder("absolute", 128, 64, lambda layer, values: None)
    counts = histogram(maxima, recorder, 384)[0]
    assert counts[0] == 1 + 2
    assert counts[-1] == 2
    assert counts.sum() == 6


def test_a_sparsity_that_forced_blocks_forbid_is_refused() -> None:
    counts = np.zeros((1, estimate.HISTOGRAM_BINS), np.int64)
    counts[0, 4000:4100] = 1
    with pytest.raises(ValueError, match=r"0.9 cannot be reached .* 0.500 of their blocks"):
        estimate.scalar_thresholds(counts, 200, [0.9])
    with pytest.raises(ValueError, match="no block may be skipped"):
        estimate.scalar_thresholds(np.zeros_like(counts), 200, [0.1])


@pytest.mark.parametrize("voters", [1, 2, 4])
@pytest.mark.parametrize("rule", bsfa_kernel.RULES)
def test_the_share_that_a_scalar_is_predicted_to_skip_is_what_the_reference_skips(
    rule: str, voters: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    seqlen, heads = 1500, 4
    q, k = (torch.randn(1, seqlen, heads, 16, generator=generator) for _ in range(2))
    q[..., 0] = 3
    k[..., 0] = torch.linspace(0, 25, seqlen)[:, None]  # near keys matter more, as in real text
    found: list[torch.Tensor] = []
    recorder = Recorder(rule, 128, 64, lambda layer, values: found.append(values), voters)
    recorder(q, k, k, 0, 0.25)
    counts = histogram(found[0].clone(), recorder, seqlen).numpy()
    visible = heads * count_visible(seqlen, seqlen, PAPERS)
    forced = bsfa_kernel.reference.forced_blocks(seqlen, seqlen)
    free = bsfa_kernel.reference.visible_blocks(seqlen, seqlen) & ~forced
    targets = [0.2, 0.5, 0.7]
    for target, scalar in zip(
        targets, estimate.scalar_thresholds(counts, visible, targets), strict=True
    ):
        thresholds = torch.full((heads, 1), float(scalar))
        kept = bsfa_kernel.reference.attention(q, k, k, thresholds, rule=rule, voters=voters).kept
        skipped = 1 - int(kept.sum()) / visible
        assert skipped == pytest.approx(target, abs=0.01)
        below = (found[0] < np.float32(scalar)) & free
        assert skipped == pytest.approx(int(below.sum()) / visible, abs=1e-12)
