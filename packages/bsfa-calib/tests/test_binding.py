# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Tying tables to models, without transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bsfa_calib import Point, ThresholdTable
from bsfa_calib.binding import ModelShape, bind, make_state, same_model
from bsfa_calib.convert import load_table
from bsfa_calib.reasons import Reason
from bsfa_calib.statistics import Statistics
from bsfa_kernel import GEOMETRIES, Geometry, reference

CPU = [torch.device("cpu")]
SHAPE = ModelShape(layers=2, heads=4, names=("Model-1",), shown="org/Model-1")

_WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
import numpy as np
import torch
from bsfa_calib import ThresholdTable
from bsfa_calib.binding import ModelShape, bind
table = ThresholdTable(np.zeros((1, 2, 4, 1), np.float32), (0.5,), axis="target_sparsity")
state = bind(table, ModelShape(2, 4), devices=[torch.device("cpu")])
kept = torch.ones(4, 2, dtype=torch.int32)
state.statistics.count_sparse(0, [kept], [(256, 256)], state.geometry)
print(state.statistics.mean_kept_fraction)
"""


def a_table(**changes: Any) -> ThresholdTable:
    values = np.arange(3 * 2 * 4 * 5, dtype=np.float32).reshape(3, 2, 4, 5)
    fields = {"thresholds": values, "points": (4, 8, 16), "model": "org/Model-1", **changes}
    return ThresholdTable(**fields)


def test_binding_needs_no_transformers() -> None:
    command = [sys.executable, "-c", _WITHOUT_TRANSFORMERS]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) == pytest.approx(2 * 4 / (6 * 4))


@pytest.mark.parametrize("point", [Point("k", 8), "k=8"], ids=str)
def test_a_state_holds_the_thresholds_of_its_point(point: Any, tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    table = a_table()
    table.save(path)
    state = bind(path, SHAPE, point, devices=CPU)
    assert torch.equal(torch.stack(state.thresholds), torch.tensor(table.select(k=8)))
    assert (state.rule, state.geometry) == ("absolute", Geometry(128, 64))
    assert state.description == "org/Model-1 at k=8"
    assert (state.statistics.layers, state.statistics.heads) == (2, 4)


def test_a_rank_gets_its_heads() -> None:
    state = bind(a_table(), SHAPE, "k=4", devices=CPU * 2, heads=slice(2, 4))
    expected = torch.tensor(a_table().select(k=4)[:, 2:4])
    assert torch.equal(torch.stack(state.thresholds), expected)
    assert state.statistics.heads == 2


@pytest.mark.parametrize("heads", [slice(0, 0), slice(4, 8), slice(2, 9), slice(-2, 4)], ids=str)
def test_heads_that_the_table_lacks_are_refused(heads: slice) -> None:
    with pytest.raises(ValueError, match=f"heads {heads.start}:{heads.stop} must be .* 0:4"):
        bind(a_table(), SHAPE, "k=4", devices=CPU, heads=heads)


def test_a_single_point_needs_no_name() -> None:
    table = a_table(thresholds=np.zeros((1, 2, 4, 1)), points=(0.5,), axis="max_loss")
    assert bind(table, SHAPE, devices=CPU).description.endswith("max_loss=0.5")


@pytest.mark.parametrize(
    ("changes", "point", "message"),
    [
        ({}, None, "name one operating point"),
        ({}, "k=5", "no k=5; its points are k = 4, 8, 16"),
        ({}, "five", "AXIS=NUMBER"),
        ({"model": "org/Model-2"}, "k=4", r"org/Model-2, and this model is org/Model-1; .*check"),
        ({"thresholds": np.zeros((3, 3, 4, 1))}, "k=4", "3 layers and 4 query heads, and this"),
        ({"q_block": 32, "k_block": 32}, "k=4", "blocks of 32x32, and the kernels have 128x64"),
    ],
    ids=str,
)
def test_a_table_that_does_not_fit_is_refused(
    changes: dict[str, Any], point: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bind(a_table(**changes), SHAPE, point, devices=CPU)


def test_a_table_of_another_name_is_taken_if_told_to() -> None:
    state = bind(a_table(model="Model-2"), SHAPE, "k=4", devices=CPU, check_model=False)
    assert state.description == "Model-2 at k=4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "best"}, "rule must be one of"),
        ({"voters": 3}, r"voters must be one of \(1, 2, 4\), got 3"),
        ({"selection": "fp4"}, "selection must be one of exact, int8, auto, got 'fp4'"),
    ],
    ids=str,
)
def test_what_no_kernel_has_is_refused(changes: dict[str, Any], message: str) -> None:
    options = {"rule": "absolute", "geometry": GEOMETRIES[0], "devices": CPU, "description": "x"}
    with pytest.raises(ValueError, match=message):
        make_state(np.zeros((2, 4, 1)), **{**options, **changes})


def test_a_state_takes_voters_and_the_expected_share_from_the_table() -> None:
    table = a_table(voters=4, statistics={"sparsity": np.full((3, 2, 4), 0.6, np.float32)})
    state = bind(table, SHAPE, "k=8", devices=CPU, selection="int8")
    assert (state.voters, state.selection) == (4, "int8")
    assert state.expected_skipped == pytest.approx(0.6)
    assert bind(a_table(), SHAPE, "k=8", devices=CPU).expected_skipped is None


def test_thresholds_for_another_number_of_voters_are_refused() -> None:
    assert bind(a_table(voters=2), SHAPE, "k=4", devices=CPU, voters=2).voters == 2
    message = "org/Model-1 hold where one query row in 2 votes, not one in 4: calibrate others"
    with pytest.raises(ValueError, match=message):
        bind(a_table(voters=2), SHAPE, "k=4", devices=CPU, voters=4)


@pytest.mark.parametrize(
    ("name", "names", "same"),
    [
        ("org/Model-1", ("Model-1",), True),
        ("SmolLM2-135M-Instruct.Q4_1", ("SmolLM2-135M-Instruct",), True),
        ("org/Model-1", ("snapshot", "owner/Model-1"), True),
        ("org/Model-1", ("org/Model-10",), False),
        ("", ("org/Model-1",), True),
        ("org/Model-1", (), True),
    ],
)
def test_names_of_one_model_are_recognised(name: str, names: tuple[str, ...], same: bool) -> None:
    assert same_model(name, names) is same


def test_a_table_is_passed_on_as_it_is() -> None:
    table = a_table()
    assert load_table(table) is table


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_statistics_count_the_blocks_of_the_semantics(geometry: Geometry) -> None:
    lengths = [(300, 300), (70, 500)]
    kept = [torch.full((2, 3), 4, dtype=torch.int32), torch.ones((2, 1), dtype=torch.int32)]
    statistics = Statistics(CPU * 2, 2)
    statistics.count_sparse(1, kept, lengths, geometry, "int8")
    statistics.count_dense(0, Reason.DECODE)
    visible = sum(int(reference.visible_blocks(*each, geometry=geometry).sum()) for each in lengths)
    assert statistics.visible_blocks == [0, visible]
    assert statistics.kept_blocks.tolist() == [[0, 0], [13, 13]]
    assert statistics.query_blocks[1] == sum(-(-q // geometry.q_block) for q, _ in lengths)
    assert statistics.dense_calls == {"decode step": 1}
    assert (statistics.sparse_calls, statistics.calls) == (1, 2)
    assert statistics.sparse_calls_by_selection == {"exact": 0, "int8": 1}
    assert "which 1 of them chose in 8 bits" in statistics.summary()
    statistics.count_sparse(1, kept, lengths, geometry)
    assert statistics.sparse_calls_by_selection == {"exact": 1, "int8": 1}


def test_what_moves_in_inference_mode_can_be_changed_outside_of_it() -> None:
    state = bind(a_table(), SHAPE, "k=4", devices=CPU)
    kept = torch.ones((4, 4), dtype=torch.int32, device="meta")
    for inference in (True, False):
        with torch.inference_mode(inference):
            state.statistics.count_sparse(0, [kept], [(256, 256)], state.geometry)
            state.layer_thresholds(0, kept.device).fill_(1)
    assert state.thresholds[0].device.type == "meta"
    assert state.statistics.sparse_calls == 2
