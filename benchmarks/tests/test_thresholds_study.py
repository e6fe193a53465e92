# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
import json
from pathlib import Path

import numpy as np
import pytest

import thresholds_study

_ABOUT = ("kind", "model", "dtype", "seqlen", "contexts", "calibration_contexts", "backend")


def test_points_between_two_that_were_learned_are_evenly_spaced() -> None:
    learned = [(0.8, np.zeros((1, 2, 1), np.float32)), (0.9, np.ones((1, 2, 1), np.float32))]
    assert thresholds_study.between(learned, 0) == []
    assert thresholds_study.between(learned[:1], 3) == []
    found = thresholds_study.between(learned, 3)
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
    points = thresholds_study.earlier(path, about)["c"]
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
    few, many = thresholds_study.report(path).split("\nx, ")
    assert "4 others to calibrate on (4 a)" in few
    assert "0.500 → 0.0200" in few
    assert "0.0100" not in few
    assert "64 others to calibrate on (64 a)" in many
    assert "0.700 → 0.0100" in many
