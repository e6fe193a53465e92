# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import models
from bsfa_calib.estimate import unforced_blocks
from bsfa_calib.hook import applied
from bsfa_calib.language_model import LanguageModel
from study import candidates, report, run, tables
from study.emulation import EmulatedSparse

_ABOUT = ("kind", "model", "dtype", "seqlen", "contexts", "calibration_contexts", "backend")


def test_points_between_two_that_were_learned_are_evenly_spaced() -> None:
    learned = [(0.8, np.zeros((1, 2, 1), np.float32)), (0.9, np.ones((1, 2, 1), np.float32))]
    assert candidates.between(learned, 0) == []
    assert candidates.between(learned[:1], 3) == []
    found = candidates.between(learned, 3)
    assert [target for target, _ in found] == pytest.approx([0.825, 0.85, 0.875])
    for share, (_, values) in zip((0.25, 0.5, 0.75), found, strict=True):
        assert values.dtype == np.float32
        assert np.allclose(values, share)


def test_points_that_were_added_later_come_in_their_order(tmp_path: Path) -> None:
    about = dict.fromkeys(_ABOUT, "x")
    arrays = {"sparsity": [0.5], "kl": [0.01], "nll_change": [0.0]}
    path = tmp_path / "study.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for asked in (0.9, 0.5, 0.7):
            file.write(json.dumps({**about, **arrays, "candidate": "c", "asked": asked}) + "\n")
        file.write(json.dumps({**about, **arrays, "candidate": "c", "asked": 1, "dtype": "y"}))
    points = report.earlier(path, about)["c"]
    assert [point.asked for point in points] == [0.5, 0.7, 0.9]


def test_runs_with_other_samples_are_reported_apart(tmp_path: Path) -> None:
    about = {
        **dict.fromkeys(_ABOUT, "x"),
        "kind": "thresholds_study",
        "gpu": "y",
        "contexts": ["a/1", "b/1"],
    }
    path = tmp_path / "study.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for samples, kl in ((4, 0.02), (64, 0.01)):
            for asked in (0.5, 0.7):
                arrays = {"sparsity": [asked] * 2, "kl": [kl] * 2, "nll_change": [0.0] * 2}
                names = [f"a/{i}" for i in range(samples)]
                run = {**about, **arrays, "calibration_contexts": names, "paper_samples": samples}
                file.write(json.dumps({**run, "candidate": "c", "asked": asked}) + "\n")
    few, many = report.report(path).split("\nx, ")
    assert "4 others to calibrate on (4 a)" in few
    assert "0.500 → 0.0200" in few
    assert "0.0100" not in few
    assert "64 others to calibrate on (64 a)" in many
    assert "0.700 → 0.0100" in many


def of_blocks(q: torch.Tensor, k: torch.Tensor, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Maxima and mean masses, float64 [heads, q_blocks, k_blocks], of q and k [1, seqlen, ...]."""
    _, seqlen, heads, _ = q.shape
    maxima = np.full((heads, seqlen // 128, seqlen // 64), -np.inf)
    masses = np.zeros_like(maxima)
    for head in range(heads):
        keys = k[0, :, head * k.shape[2] // heads].double().numpy()
        for row in range(seqlen):
            scores = scale * (keys[: row + 1] @ q[0, row, head].double().numpy())
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            for start in range(0, row + 1, 64):
                block = (head, row // 128, start // 64)
                maxima[block] = max(maxima[block], scores[start : start + 64].max())
                masses[block] += weights[start : start + 64].sum() / 128
    return maxima, masses


def test_masses_of_blocks_and_their_order_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    q = 2 * torch.randn(1, 512, 4, 16)
    k, v = torch.randn(2, 1, 512, 2, 16)
    maxima, masses = of_blocks(q, k, 0.25)
    found = tables.block_masses(q, k, 0.25)
    assert np.allclose(found.numpy(), masses, atol=1e-6)
    recording = tables.Maxima(masses=True)
    recording(q, k, v, 3, 0.25)
    for query_block, free in enumerate((0, 2, 4, 6)):
        for head in range(4):
            order = np.argsort(-maxima[head, query_block, :free])
            for recorded, expected in ((recording.layers, maxima), (recording.masses, masses)):
                row = recorded[3][head, query_block]
                assert np.allclose(row[:free], expected[head, query_block, order], atol=1e-5)
            assert np.all(recording.layers[3][head, query_block, free:] == -np.inf)
            assert np.all(recording.masses[3][head, query_block, free:] == 0)


def ordered(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Maxima in descending order, many of them equal, and masses, float32 [2, 3, 4, 5, 10]."""
    random = np.random.default_rng(seed)
    shape = (2, 3, 4, 5, 10)
    maxima = -np.sort(-random.integers(-9, 9, shape).astype(np.float32), -1)
    masses = random.exponential(0.1, shape).astype(np.float32) * np.exp(maxima / 4)
    hidden = np.arange(10) >= unforced_blocks(640, tables.COARSE)[:, None]
    return np.where(hidden, -np.inf, maxima), np.where(hidden, np.float32(0), masses)


@pytest.mark.parametrize("budget", [0.0, 0.02, 0.2, 1.0, 1e3])
def test_as_many_blocks_are_dropped_as_the_budget_allows(budget: float) -> None:
    maxima, masses = ordered(0)
    free = unforced_blocks(640, tables.COARSE)
    lost = tables.lost_mass(maxima, masses)
    found = tables.budget_thresholds(maxima, lost, free, budget)
    assert found.shape == maxima.shape[:-1]
    dropped = 0
    for index in np.ndindex(*found.shape):
        unforced = free[index[-1]]
        values = maxima[index][:unforced]
        weights = masses[index][:unforced].astype(np.float64)
        threshold = -np.inf
        levels = np.unique(values)  # ascending; equal maxima share their verdict
        for level, above in itertools.pairwise([*levels, np.inf]):
            if weights[values <= level].sum() > budget:
                break
            threshold = (level + above) / 2
        if np.isinf(threshold) and threshold > 0:
            assert values.max() < np.float32(found[index]) < values.max() + 1e-3
        else:
            assert found[index] == threshold
        dropped += int(np.sum(values < found[index]))
    share = float(dropped) / (free.sum() * 2 * 3 * 4)
    assert share == {0.0: 0, 1e3: 1}.get(budget, share)
    assert (0 < share < 1) == (0 < budget < 1e3)


def test_blocks_that_lose_exactly_the_budget_are_dropped() -> None:
    maxima = np.array([[3, 2, 1, -np.inf]], np.float32)
    lost = tables.lost_mass(maxima, np.array([[0.5, 0.25, 0.125, 0]], np.float32))
    assert lost.tolist() == [[0.875, 0.375, 0.125, 0]]
    for budget, expected in ((0.124, -np.inf), (0.125, 1.5), (0.375, 2.5)):
        found = tables.budget_thresholds(maxima, lost, np.array([3]), budget)
        assert found.tolist() == [expected]


@pytest.fixture(scope="module")
def small_model() -> LlamaForCausalLM:
    """With weights so large that its attention has something to choose between."""
    model: LlamaForCausalLM = models.build("tiny", dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(25)
    return model


def test_a_table_of_a_mass_budget_skips_the_share_asked_for(small_model: LlamaForCausalLM) -> None:
    random = np.random.default_rng(0)
    contexts = [random.integers(0, 128, 1024).tolist() for _ in range(2)]
    thresholds = tables.mass_thresholds(small_model, contexts)
    language_model = LanguageModel(small_model)
    earlier = np.full((2, 4, 8), -np.inf)
    for target in (0.15, 0.3, 0.5):
        values = thresholds(target)
        assert values.dtype == np.float32
        assert values.shape == (2, 4, 8)
        assert np.all(values >= earlier)
        shares = []
        method = EmulatedSparse(torch.tensor(values), "absolute", tables.COARSE)
        for ids in contexts:
            with applied(small_model, method) as meter:
                language_model.predict(ids)
                shares.append(meter.take())
        assert np.mean(shares) == pytest.approx(target, abs=0.05)
        earlier = values


def test_a_table_of_a_mass_budget_is_the_mean_over_contexts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maxima, masses = ordered(1)
    maxima[1], masses[1] = maxima[0] + 0.25, masses[0]
    monkeypatch.setattr(tables, "_ordered", lambda *_, **__: (maxima, masses))
    values = tables.mass_thresholds(None, [[0] * 640] * 2)(0.4)
    finite = values[np.isfinite(values)]
    assert finite.size > 30
    # Maxima of the first context are integers, half way between two are multiples of a half.
    assert (2 * (finite - 0.125)) % 1 == pytest.approx(0, abs=1e-5)


def test_a_row_that_may_drop_nothing_in_some_context_keeps_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maxima, masses = ordered(1)
    masses[0, 1, 2, 3] = np.where(np.isinf(maxima[0, 1, 2, 3]), 0, 9)
    monkeypatch.setattr(tables, "_ordered", lambda *_, **__: (maxima, masses))
    contexts = [[0] * 640] * 2
    values = tables.mass_thresholds(None, contexts)(0.4)
    assert values[1, 2, 3] == -np.inf
    assert np.all(values[:, :, 0] == -np.inf)  # forced blocks alone
    unforced = np.arange(10) < unforced_blocks(640, tables.COARSE)[:, None]
    skipped = (maxima < values[..., None]) & unforced
    assert skipped.sum() / (2 * 3 * 4 * 30) == pytest.approx(0.4, abs=0.03)


def test_both_candidates_with_a_mass_budget_are_tried() -> None:
    found = candidates.candidates(orders=False, only=["mass"])
    assert [(one.name, one.rule) for one in found] == [
        ("peak_lse head by mass 128x64", "peak_lse"),
        ("absolute mass 128x64", "absolute"),
    ]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--only", "nonsense"], "--only 'nonsense' names no candidate; there are absolute top-k"),
        (["--only", "tables"], "--only 'tables' names no candidate"),
        (["--tables", "none.safetensors"], "there is no threshold file none.safetensors"),
        (["--length", "4100"], "--length must be a multiple of 128, got 4100"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_model_is_loaded(
    asked: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["thresholds_study.py", "--model", "m", "--text", "t", *asked])
    with pytest.raises(SystemExit):
        run.main()
    assert message in " ".join(capsys.readouterr().err.split())
