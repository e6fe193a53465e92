# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

from typing import Any

import pytest

from bsfa_calib import Point
from bsfa_vllm.settings import Settings, read_settings

TABLE = {"thresholds": "t.safetensors"}


def read(given: Any = None, **environment: str) -> Settings | None:
    return read_settings({} if given is None else {"bsfa": given}, environment)


def test_nothing_is_set() -> None:
    assert read() is None
    assert read_settings(None, {}) is None
    assert read_settings({"other": 1}, {"BSFA_POINT": "k=3"}) is None


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (TABLE, {}, Settings("t.safetensors")),
        (None, {"BSFA_THRESHOLDS": "e"}, Settings("e")),
        (TABLE, {"BSFA_THRESHOLDS": "e"}, Settings("t.safetensors")),
        ({**TABLE, "point": "k=32"}, {}, Settings("t.safetensors", Point("k", 32))),
        ({**TABLE, "k": 32}, {}, Settings("t.safetensors", Point("k", 32))),
        ({**TABLE, "max_loss": 0}, {}, Settings("t.safetensors", Point("max_loss", 0))),
        ({**TABLE, "k": 8}, {"BSFA_POINT": "k=32"}, Settings("t.safetensors", Point("k", 8))),
        (
            None,
            {"BSFA_THRESHOLDS": "e", "BSFA_TARGET_SPARSITY": "0.9", "BSFA_SELECTION": "int8"},
            Settings("e", Point("target_sparsity", 0.9), "int8"),
        ),
        (
            {**TABLE, "selection": "exact", "check_model": False},
            {"BSFA_SELECTION": "int8"},
            Settings("t.safetensors", selection="exact", check_model=False),
        ),
        (TABLE, {"BSFA_CHECK_MODEL": "0"}, Settings("t.safetensors", check_model=False)),
        (TABLE, {"BSFA_POINT": ""}, Settings("t.safetensors")),
    ],
)
def test_what_is_read(given: Any, environment: dict[str, str], expected: Settings) -> None:
    assert read(given, **environment) == expected


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ("t", {}, "'bsfa' must be an object, got 't'"),
        ({"table": "t"}, {}, "takes thresholds, point, k, .*got 'table'"),
        ({"point": "k=3"}, {}, "names no table: set bsfa.thresholds or .*BSFA_THRESHOLDS"),
        ({"thresholds": 3}, {}, "bsfa.thresholds must be the path of a table, got 3"),
        ({**TABLE, "point": "x=3"}, {}, "bsfa.point: .*axis"),
        ({**TABLE, 1: 2, "table": 3}, {}, "takes thresholds, point, k, .*got 1"),
        ({**TABLE, "k": "many"}, {}, "bsfa.k: "),
        ({**TABLE, "k": [32]}, {}, r"bsfa.k: k must be a number, got \[32\]"),
        ({**TABLE, "target_sparsity": 2}, {}, r"bsfa.target_sparsity: .*in \[0, 1\)"),
        ({**TABLE, "k": 3, "max_loss": 0.1}, {}, "one operating point, got k=3 and max_loss=0.1"),
        (TABLE, {"BSFA_MAX_LOSS": "little"}, "BSFA_MAX_LOSS: "),
        (TABLE, {"BSFA_SELECTION": "fp8"}, "BSFA_SELECTION must be one of exact, .*got 'fp8'"),
        ({**TABLE, "check_model": "perhaps"}, {}, "bsfa.check_model must be true or false"),
        ({**TABLE, "check_model": [1]}, {}, "bsfa.check_model must be true or false"),
    ],
)
def test_what_is_refused(given: Any, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(given, **environment)
