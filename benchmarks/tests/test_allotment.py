# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Emulation of many thresholds, and the allotment of sparsity among heads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bsfa_calib.hook import applied
from bsfa_calib.language_model import LanguageModel
from bsfa_kernel import RULES, Geometry, reference
from bsfa_kernel.geometry import count_visible
from selection_study import Rounding
from study import allotment
from study.allotment import (
    Profile,
    allot,
    equal_mass,
    profile,
    scalar_for,
    sensitivity_offsets,
)
from study.emulation import EmulatedSparse, emulate
from study.rivals import Sparge, Window
from study.tables import Maxima


@pytest.fixture(scope="module")
def small_model() -> Any:
    torch.manual_seed(0)
    settings: Any = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "attn_implementation": "sdpa",
        "initializer_range": 0.2,
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    return model.eval()


@pytest.mark.parametrize("voters", [1, 4])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("geometry", [Geometry(128, 64), Geometry(64, 64)])
@pytest.mark.parametrize("sinks", [None, [-30.0, 4.0, -math.inf, 30.0]], ids=["plain", "sinks"])
def test_emulation_decides_and_computes_as_the_reference(
    rule: str, geometry: Geometry, voters: int, sinks: list[float] | None
) -> None:
    torch.manual_seed(0)
    q = 2 * torch.randn(2, 512, 4, 16)
    k, v = torch.randn(2, 2, 512, 2, 16)
    centre = {"absolute": 9.0, "running_max": 2.5, "peak_lse": 1.5}[rule]
    thresholds = centre + torch.randn(3, 4, 512 // geometry.q_block)
    thresholds[0] = -math.inf
    thresholds[1, 2] = math.inf
    options: dict[str, Any] = {"rule": rule, "geometry": geometry, "scale": 0.25, "voters": voters}
    options["sinks"] = None if sinks is None else torch.tensor(sinks)
    alone = emulate(q, k, v, thresholds[2:], **options)
    found = emulate(q, k, v, thresholds, **options)
    visible = count_visible(512, 512, geometry)
    for point in range(3):
        expected = reference.attention(q, k, v, thresholds[point], **options)
        skipped = 1 - expected.kept.sum(-1) / visible
        assert torch.allclose(found.skipped[point], skipped, atol=1e-6)
        assert torch.allclose(found.out[point], expected.out, atol=1e-5)
        if point == 0:
            whole = expected.lse
        lost = 1 - (expected.lse - whole).exp()
        assert torch.allclose(found.lost[point], lost, atol=1e-5)
    assert torch.allclose(alone.out[0], found.out[2], atol=1e-5)
    assert 0.05 < found.skipped[2].mean() < 0.7


def test_lengths_that_are_no_multiple_of_a_block_are_refused() -> None:
    x = torch.zeros(1, 100, 2, 16)
    with pytest.raises(ValueError, match="multiples of 128x64, got 100"):
        emulate(
            *(x, x, x, torch.zeros(1, 2, 1)),
            rule="absolute",
            geometry=Geometry(128, 64),
            scale=1.0,
        )


def test_the_order_decides_what_a_relative_rule_meets_first() -> None:
    torch.manual_seed(0)
    q = torch.ones(1, 256, 1, 16)
    k = torch.zeros(1, 256, 1, 16)
    k[:, :64] = 1.0  # all the mass is in the first block
    v = torch.randn(1, 256, 1, 16)
    options = {"rule": "peak_lse", "geometry": Geometry(64, 64), "scale": 1.0}
    thresholds = torch.full((1, 1, 1), -8.0)
    skipped = {
        order: float(emulate(q, k, v, thresholds, order=order, **options).skipped)  # type: ignore[arg-type]
        for order in ("last_first", "sink_last_first")
    }
    assert skipped["last_first"] == 0
    assert skipped["sink_last_first"] == pytest.approx(3 / 10)


def test_sinks_that_a_study_does_not_know_are_refused() -> None:
    x, sinks = torch.randn(1, 256, 2, 16), torch.zeros(2)
    methods = (
        Maxima(masses=True),
        Rounding(torch.zeros(3, 1), "peak_lse", Geometry(64, 64)),
        Sparge(lambda **_: None, 0.5),
    )
    for method in methods:
        with pytest.raises(ValueError, match="knows no attention sinks"):
            method(x, x, x, 0, 0.25, sinks)
    # A mask of blocks is computed with them, and the paper's maxima are the same.
    everything = Window(256)(x, x, x, 0, 0.25, sinks).out
    nothing = torch.full((2, 1), -math.inf)
    expected = reference.attention(x, x, x, nothing, scale=0.25, sinks=sinks).out
    assert torch.allclose(everything, expected, atol=1e-6)
    assert not torch.allclose(everything, Window(256)(x, x, x, 0, 0.25).out, atol=1e-3)
    plain, sunk = Maxima(), Maxima()
    plain(x, x, x, 0, 0.25)
    sunk(x, x, x, 0, 0.25, sinks)
    assert np.array_equal(plain.layers[0], sunk.layers[0])


def test_the_expected_divergence_is_near_the_measured_one(small_model: LlamaForCausalLM) -> None:
    ids = np.random.default_rng(0).integers(0, 128, 512).tolist()
    geometry, threshold = Geometry(64, 64), 0.5
    measured = profile(
        small_model,
        [ids],
        (threshold, threshold + 1),
        rule="peak_lse",
        geometry=geometry,
        draws=8,
    )
    language_model = LanguageModel(small_model)
    dense = language_model.predict(ids)
    layer, head = np.unravel_index(np.argmax(measured.error[0]), measured.error[0].shape)
    values = torch.full((2, 4, 1), -math.inf)
    values[layer, head] = threshold
    with applied(small_model, EmulatedSparse(values, "peak_lse", geometry)) as meter:
        found = language_model.predict(ids)
        skipped = meter.take()
    (band,) = language_model.compare(found, dense, ids)
    assert skipped[layer][head] == pytest.approx(measured.skipped[0, layer, head], abs=1e-3)
    assert band.kl == pytest.approx(measured.error[0, layer, head], rel=0.6)


def test_the_mass_of_a_profile_is_that_which_rows_lose_on_average(
    small_model: LlamaForCausalLM,
) -> None:
    given = {}

    def record(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, scale: float, sinks: Any
    ) -> None:
        given[layer] = (q, k, v, scale)

    geometry, thresholds = Geometry(64, 64), (-1.0, 0.5, 2.0)
    contexts = [np.random.default_rng(seed).integers(0, 128, 256).tolist() for seed in (0, 1)]
    measured = profile(small_model, contexts, thresholds, rule="peak_lse", geometry=geometry)
    expected = np.zeros((3, 2, 4))
    language_model = LanguageModel(small_model)
    for ids in contexts:
        with applied(small_model, record):
            language_model.predict(ids)
        for layer, (q, k, v, scale) in given.items():
            lse = [
                reference.attention(
                    *(q.double(), k.double(), v.double(), torch.full((4, 1), threshold)),
                    scale=scale,
                    rule="peak_lse",
                    geometry=geometry,
                    compute_dtype=torch.float64,
                ).lse[0]
                for threshold in (-math.inf, *thresholds)
            ]
            for point, sparse in enumerate(lse[1:]):
                lost = 1 - (sparse - lse[0]).exp()
                expected[point, layer] += lost.mean(-1).numpy() / len(contexts)
    assert expected[2].min() > 0.05
    assert np.allclose(measured.mass, expected, atol=1e-5)


def test_no_curve_that_is_interpolated_falls(
    small_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = np.broadcast_to([[[0.1], [0.3], [0.2]]], (4, 3, 4))
    monkeypatch.setattr(allotment, "_measure", lambda *_: measured)
    found = profile(small_model, [[0] * 64], (-1, 0, 1), rule="absolute", geometry=Geometry(64, 64))
    for curves in (found.skipped, found.error, found.mass):
        assert curves[:, 1, 2] == pytest.approx([0.1, 0.3, 0.3])


def a_profile(costs: list[float]) -> Profile:
    """Heads that skip alike, and whose error is a cost times the square of the share skipped.

    The mass that they lose is a cost times exp(threshold), that of the last head at most exp(-4).
    """
    thresholds = np.linspace(-10, 0, 21)
    share = (thresholds + 10) / 10
    skipped = np.repeat(share[:, None, None], len(costs), axis=2)
    error = np.asarray(costs) * skipped**2
    mass = np.asarray(costs) * np.exp(thresholds)[:, None, None]
    mass[..., -1] = np.minimum(mass[..., -1], math.exp(-4))
    return Profile(thresholds, skipped, error, skipped**2, mass, 1)


def test_a_scalar_skips_the_share_that_was_asked_for() -> None:
    measured = a_profile([1, 1, 1])
    assert np.allclose(scalar_for(measured, 0.3), -7)
    offsets = np.array([[0.0, 1.0, -1.0]])
    found = scalar_for(measured, 0.3, offsets)
    assert np.allclose(found, -7 + offsets)
    assert measured.skipped_at(found).mean() == pytest.approx(0.3)


def test_heads_that_cost_less_skip_more() -> None:
    measured = a_profile([1.0, 4.0])
    found = allot(measured, 0.5)
    share = measured.skipped_at(found)[0]
    assert share.mean() == pytest.approx(0.5, abs=1e-6)
    # Equal marginal costs: s1 = 4 s2.
    assert share.tolist() == pytest.approx([0.8, 0.2], abs=0.03)
    assert np.allclose(allot(measured, 0.5, group="layer"), -5, atol=0.01)
    assert np.allclose(allot(measured, 0.5, blend=0), -5, atol=0.01)
    half = measured.skipped_at(allot(measured, 0.5, blend=0.5))[0]
    assert half.tolist() == pytest.approx([0.65, 0.35], abs=0.02)


@pytest.mark.parametrize("target", [0.2, 0.3, 0.45])
def test_heads_lose_equal_mass(target: float) -> None:
    costs = np.array([1.0, 4.0, 0.3, 1.0])
    measured = a_profile(costs.tolist())
    found = equal_mass(measured, target)
    assert found.shape == (1, 4)
    assert measured.skipped_at(found).mean() == pytest.approx(target, abs=1e-6)
    mass = costs * np.exp(found[0])
    assert mass == pytest.approx(np.full(4, mass[0]), rel=1e-5)


def test_a_head_that_never_loses_the_budget_takes_the_highest_threshold() -> None:
    measured = a_profile([1.0, 1.0])
    found = equal_mass(measured, 0.9)
    assert found[0] == pytest.approx([-2.0, 0.0], abs=1e-5)
    assert np.allclose(equal_mass(measured, 1.0), 0)
    assert np.allclose(equal_mass(measured, 0.0), -10)


def test_mass_that_is_lost_at_no_profiled_threshold_costs_nothing() -> None:
    measured = a_profile([1.0, 0.0, 1.0])
    found = equal_mass(measured, 0.5)
    assert found[0] == pytest.approx([-7.5, 0.0, -7.5], abs=1e-5)


def test_sensitive_heads_get_lower_thresholds() -> None:
    offsets = sensitivity_offsets(a_profile([1.0, math.e**2]))
    assert offsets.tolist() == [pytest.approx([0.5, -0.5])]


def test_a_profile_needs_ascending_thresholds(small_model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="ascend"):
        profile(small_model, [[0] * 64], (0, -1), rule="absolute", geometry=Geometry(64, 64))
