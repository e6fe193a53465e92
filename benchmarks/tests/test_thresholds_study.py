# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
import json
from pathlib import Path

import numpy as np
import pytest

import thresholds_study


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
    same = ("kind", "model", "dtype", "seqlen", "contexts", "calibration_contexts", "backend")
    about = dict.fromkeys(same, "x")
    arrays = {"sparsity": [0.5], "kl": [0.01], "nll_change": [0.0]}
    path = tmp_path / "study.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for asked in (0.9, 0.5, 0.7):
            file.write(json.dumps({**about, **arrays, "candidate": "c", "asked": asked}) + "\n")
        file.write(json.dumps({**about, **arrays, "candidate": "c", "asked": 1, "dtype": "y"}))
    points = thresholds_study.earlier(path, about)["c"]
    assert [point.asked for point in points] == [0.5, 0.7, 0.9]
