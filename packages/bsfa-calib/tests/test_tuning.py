# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Operating points that are found on a model: scalars, shifts, and what they cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor
from transformers import LlamaForCausalLM

from bsfa_calib import hook, scalar
from bsfa_calib.expected import Expected, Measure, check_layers, verdict, with_expected
from bsfa_calib.hook import HookError, Meter
from bsfa_calib.thresholds import ThresholdTable
from bsfa_calib.tuning import TuningError, find_scalar
from bsfa_kernel import Geometry
from tiny_calib import random_tokens, small_llama, tiny_model

LENGTH = 512


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return small_llama()


@pytest.mark.parametrize("rule", ["absolute", "running_max", "peak_lse"])
def test_a_scalar_is_found_for_a_sparsity(
    model: LlamaForCausalLM, ids: list[int], rule: str
) -> None:
    found = find_scalar(model, [ids], rule=rule, target_sparsity=0.3, tolerance=0.02)
    assert found.sparsity == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("selection", ["int8", "auto"])
def test_a_scalar_is_found_with_the_selection_that_it_is_for(
    model: LlamaForCausalLM, ids: list[int], monkeypatch: pytest.MonkeyPatch, selection: str
) -> None:
    told: list[dict[str, Any]] = []
    right = hook.block_sparse_attention

    def attention(*tensors: Tensor, **options: Any) -> Any:
        told.append(options)
        return right(*tensors, **options)

    monkeypatch.setattr(hook, "block_sparse_attention", attention)
    options: dict[str, Any] = {"rule": "peak_lse", "target_sparsity": 0.3, "tolerance": 0.05}
    find_scalar(model, [ids], selection=selection, **options)
    assert {call["selection"] for call in told} == {selection}
    expected = 0.3 if selection == "auto" else None
    assert {call.get("expected_skipped") for call in told} == {expected}


def test_a_sparsity_beyond_what_is_not_forced_is_refused(
    model: LlamaForCausalLM, ids: list[int]
) -> None:
    with pytest.raises(TuningError, match="are forced"):
        find_scalar(model, [ids[:256]], rule="running_max", target_sparsity=0.9)


def test_a_scalar_of_one_pass_is_measured_on_other_text(model: LlamaForCausalLM) -> None:
    samples = np.random.default_rng(2).integers(0, 256, (3, 1024)).tolist()
    found = scalar.calibrate(model, samples[:2], samples[2:], target_sparsities=(0.5, 0.3))
    table = found.table
    assert (table.points, table.rule, table.geometry) == ((0.3, 0.5), "peak_lse", "128x64")
    assert (table.rows, table.samples, table.voters) == (1, 2, 4)
    assert len(np.unique(table.thresholds)) == 2
    for expected, text in zip(
        found.expected, table.provenance["expected_sparsity"].split(", "), strict=True
    ):
        assert float(text) == pytest.approx(expected.sparsity, rel=1e-4)
        assert expected.kl > 0
    for target, expected in zip((0.3, 0.5), found.expected, strict=True):
        assert 0.6 * target < expected.sparsity < target + 0.05
    with pytest.raises(ValueError, match="at least one sample is needed to measure on"):
        scalar.calibrate(model, samples[:2], [], target_sparsities=(0.5,))


def test_layers_that_run_dense_are_kept_out_of_what_is_promised() -> None:
    model = tiny_model(
        "gemma3_text",
        sliding_window=256,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    samples = [random_tokens(1024, seed) for seed in range(2)]
    found = scalar.calibrate(model, samples[:1], samples[1:], target_sparsities=(0.4,))
    (expected,) = found.expected
    assert np.isneginf(found.table.thresholds[:, 0]).all()
    assert found.table.provenance["dense_layers"] == "layers 0: sliding-window layer"
    assert found.table.statistics["sparsity"][0, 0].max() == 0
    sentence = verdict(found)[0]
    assert "1 of 2 layers run dense (layers 0: sliding-window layer)" in sentence
    assert "multiply them by 0.50" in sentence
    # What is promised is what the hook skips of the other layer.
    measure = Measure(model, samples[1:], rule="peak_lse", geometry=Geometry(128, 64), voters=4)
    assert measure(found.table.thresholds[0]).sparsity == pytest.approx(expected.sparsity)


def test_a_model_of_which_every_layer_runs_dense_is_refused() -> None:
    model = tiny_model("mistral", sliding_window=256)
    with pytest.raises(HookError, match="all run dense: layers 0, 1: sliding-window layer"):
        Measure(model, [random_tokens(512, 0)], rule="absolute", geometry=Geometry(64, 64))
    meter = Meter(dense_layers={0: "x"}, called={0, 1})
    assert check_layers(meter, model) == {0: "x"}


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (Expected(0.5, 0.2, 0.1), "Nothing to gain: even 50%"),
        (Expected(0.2, 0.02, 0.01), "Little to gain: within a KL divergence of 0.03 nats 20%"),
        (Expected(0.75, 0.02, 0.01), "Up to 75% of the blocks"),
    ],
)
def test_the_verdict_says_what_is_gained(expected: Expected, message: str) -> None:
    table = ThresholdTable(np.zeros((1, 2, 4, 1)), (0.5,), axis="target_sparsity")
    (sentence,) = verdict(with_expected(table, [expected], {}))
    assert sentence.startswith(message)
    assert ("1.60x" in sentence) == (expected.sparsity == 0.75)
