# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Points found at a length longer than that of the thresholds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from bsfa_calib import ThresholdTable, learned, scalar, serving
from bsfa_calib.capture import CaptureError, Settings, block_counts
from bsfa_calib.cli import main
from bsfa_calib.estimate import skipped_share
from bsfa_calib.expected import Calibrated, Expected, Measure
from bsfa_calib.hook import BlockSparse, applied
from bsfa_calib.language_model import LanguageModel
from bsfa_calib.learned import ThresholdPath, check_points, learn_path, serving_rungs
from bsfa_calib.learning import Settings as Learning
from bsfa_calib.progress import Interrupted
from bsfa_calib.serving import find_points, path_of, serve
from bsfa_calib.tuning import TuningError
from bsfa_kernel import Geometry
from tiny_calib import random_tokens, small_llama, tiny_model

SHORT, LONG = 256, 1024
# In a length this short the default's forced blocks leave hardly one to skip.
GEOMETRY = Geometry(64, 64)
FINE: dict[str, Any] = {"geometry": GEOMETRY, "voters": 1}
TARGETS = (0.3, 0.6)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return small_llama()


@pytest.fixture(scope="module")
def longer() -> list[list[int]]:
    return np.random.default_rng(7).integers(0, 256, (2, LONG)).tolist()


def learned_short(model: Any, voters: int = 1, knots: int = 1) -> ThresholdPath:
    samples = np.random.default_rng(1).integers(0, 256, (2, SHORT)).tolist()
    made = learn_path(
        model,
        samples,
        target_sparsities=TARGETS,
        geometry=GEOMETRY,
        voters=voters,
        rungs=(0.3, 0.45),
        serve_length=LONG,
        settings=Learning(steps=6, further_steps=3, knots=knots),
    )
    return ThresholdPath(made)


@pytest.fixture(scope="module")
def path(llama: LlamaForCausalLM) -> ThresholdPath:
    return learned_short(llama)


def skipped_by_the_shipped_function(
    model: Any, table: ThresholdTable, index: int, samples: list[list[int]]
) -> float:
    """Share that block-sparse attention leaves out, over layers, heads and samples."""
    values = torch.tensor(table.thresholds[index])
    geometry = Geometry(table.q_block, table.k_block)
    method = BlockSparse(values, table.rule, geometry, voters=table.voters)
    shares = []
    language_model = LanguageModel(model)
    for ids in samples:
        with applied(model, method) as meter:
            language_model.predict(ids)
            shares += np.ravel(meter.take()).tolist()
    return float(np.mean(shares))


def assert_points(
    model: Any, found: Calibrated, samples: list[list[int]], targets: tuple[float, ...]
) -> None:
    table = found.table
    assert (table.axis, table.points) == ("target_sparsity", targets)
    for index, target in enumerate(targets):
        share = table.expected_sparsity(f"target_sparsity={target:g}")
        assert share == pytest.approx(target, abs=0.015)
        kept = skipped_by_the_shipped_function(model, table, index, samples)
        assert kept == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("voters", [1, 4])
def test_thresholds_of_a_short_length_skip_what_was_asked_for_at_a_longer_one(
    llama: LlamaForCausalLM, longer: list[list[int]], voters: int
) -> None:
    path = learned_short(llama, voters)
    options: dict[str, Any] = {"geometry": GEOMETRY, "voters": voters}
    found = serve(llama, path, longer, made_at=SHORT, target_sparsities=(0.6, 0.3), **options)
    assert_points(llama, found, longer, TARGETS)
    table = found.table
    assert (table.max_seqlen, table.serve_seqlen, table.seqlen) == (SHORT, LONG, LONG)
    assert (table.voters, table.aggregate) == (voters, "learned")
    assert [one.kl for one in found.expected] == sorted(one.kl for one in found.expected)
    assert found.expected[0].kl > 0
    # Heads differ as they were learned to: the points lie on the path.
    measure = Measure(llama, longer, rule="peak_lse", geometry=GEOMETRY, voters=voters)
    for thresholds, expected in zip(table.thresholds, found.expected, strict=True):
        assert thresholds.std() > 0
        again = measure(thresholds)
        assert (again.sparsity, again.kl) == pytest.approx((expected.sparsity, expected.kl))


def test_thresholds_that_follow_the_position_are_pointed_too(
    llama: LlamaForCausalLM, longer: list[list[int]]
) -> None:
    path = learned_short(llama, knots=2)
    assert path.points.shape[-1] == SHORT // GEOMETRY.q_block
    found = serve(llama, path, longer, made_at=SHORT, target_sparsities=TARGETS, **FINE)
    assert_points(llama, found, longer, TARGETS)


@pytest.mark.parametrize("rule", ["absolute", "running_max", "peak_lse"])
def test_scalars_of_a_short_length_are_pointed_under_every_rule(
    llama: LlamaForCausalLM, longer: list[list[int]], rule: str
) -> None:
    short = [ids[:SHORT] for ids in longer[:1]]
    table = scalar.one_pass(llama, short, target_sparsities=(0.2, 0.4), rule=rule, **FINE)
    options: dict[str, Any] = {"rule": rule, "aggregate": table.aggregate, **FINE}
    found = serve(
        llama, path_of(table), longer, made_at=SHORT, target_sparsities=TARGETS, **options
    )
    assert_points(llama, found, longer, TARGETS)
    assert found.table.rule == rule
    assert found.table.statistics == {}
    for thresholds in found.table.thresholds:
        assert len(np.unique(thresholds)) == 1


def test_the_share_is_foretold_from_one_pass_and_few_measurements_do(
    llama: LlamaForCausalLM, longer: list[list[int]], path: ThresholdPath
) -> None:
    told: list[str] = []
    options: dict[str, Any] = {"target_sparsities": TARGETS, "progress": told.append, **FINE}
    serve(llama, path, longer, made_at=SHORT, **options)
    assert 2 <= sum("measured in 0:" in line for line in told) <= 6
    assert told[-1].startswith("target_sparsity 0.6: skips 0.")
    # Of the first layer, whose inputs nothing changes, the histogram says exactly what is skipped.
    settings = Settings(target_sparsities=TARGETS, rule="peak_lse", geometry=GEOMETRY)
    counted = block_counts(llama, longer, settings)
    (foretold,) = skipped_share(counted.counts[0], counted.visible, np.array([-1.0]))
    method = BlockSparse(torch.full((2, 4, 1), -1.0), "peak_lse", GEOMETRY)
    first = []
    language_model = LanguageModel(llama)
    for ids in longer:
        with applied(llama, method) as meter:
            language_model.predict(ids)
            first.append(meter.take()[0])
    assert np.mean(first, 0) == pytest.approx(foretold, abs=0.01)


def test_a_bound_on_the_loss_is_kept_at_the_longer_length(
    llama: LlamaForCausalLM, longer: list[list[int]], path: ThresholdPath
) -> None:
    found = serve(llama, path, longer, made_at=SHORT, max_losses=(0.02,), **FINE)
    (expected,) = found.expected
    assert 0.01 < expected.kl <= 0.02
    assert (found.table.axis, found.table.serve_seqlen) == ("max_loss", LONG)
    measure = Measure(llama, longer, rule="peak_lse", geometry=GEOMETRY)
    assert measure(found.table.thresholds[0]).kl == pytest.approx(expected.kl)


def test_a_table_for_k_blocks_gets_points_by_share_and_by_loss(
    llama: LlamaForCausalLM, longer: list[list[int]]
) -> None:
    rows = np.linspace(-1, 1, SHORT // 64, dtype=np.float32)
    heads = np.linspace(-0.5, 0.5, 8, dtype=np.float32).reshape(2, 4, 1)
    # Thresholds that keep more blocks are lower; points ascend.
    values = np.stack([heads + rows + 1, heads + rows - 2])
    table = ThresholdTable(values, (2, 8), "k", 64, 64, "peak_lse", max_seqlen=SHORT)
    by_share = find_points(llama, table, longer, target_sparsities=TARGETS)
    assert [one.sparsity for one in by_share.expected] == pytest.approx(TARGETS, abs=0.01)
    assert (by_share.table.axis, by_share.table.serve_seqlen) == ("target_sparsity", LONG)
    (strict, loose) = find_points(llama, table, longer, max_losses=(1e-3, 1e-2)).expected
    assert strict.kl <= 1e-3 < loose.kl <= 1e-2
    assert strict.sparsity < loose.sparsity


def test_points_of_a_table_are_found_for_prompts_shorter_than_its_samples(
    llama: LlamaForCausalLM, longer: list[list[int]]
) -> None:
    values = np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 2, 4, 1)
    table = ThresholdTable(
        *(values, (0.5,), "target_sparsity", 64, 64, "peak_lse"), max_seqlen=2 * LONG
    )
    found = find_points(llama, table, longer, target_sparsities=(0.4,))
    assert found.expected[0].sparsity == pytest.approx(0.4, abs=0.01)
    assert (found.table.max_seqlen, found.table.serve_seqlen) == (LONG, 0)
    with pytest.raises(TuningError, match=r"below 0\.882, got 0\.99"):
        find_points(llama, table, longer, target_sparsities=(0.99,))


def test_points_of_a_table_of_another_model_are_refused(llama: LlamaForCausalLM) -> None:
    table = ThresholdTable(np.full((1, 3, 4, 1), 2.0), (0.5,), axis="target_sparsity")
    with pytest.raises(TuningError, match="for 3 layers of 4 heads, and the model has 2 of 4"):
        find_points(llama, table, [[0] * 64], max_losses=(1.0,))


def table_of(values: Any, made_at: int = SHORT) -> ThresholdTable:
    """A table of two layers of four heads, with a point for each of some thresholds."""
    heads = np.linspace(-0.5, 0.5, 8, dtype=np.float32).reshape(2, 4, 1)
    thresholds = np.stack([heads + value for value in values])
    points = tuple(0.1 * (index + 1) for index in range(len(values)))
    return ThresholdTable(
        *(thresholds, points, "target_sparsity", 64, 64, "peak_lse"), max_seqlen=made_at
    )


@pytest.mark.parametrize("threshold", [-40.0, 40.0])
@pytest.mark.parametrize("made_at", [SHORT, 2 * LONG])
def test_points_far_from_the_thresholds_of_a_table_are_found(
    llama: LlamaForCausalLM, longer: list[list[int]], threshold: float, made_at: int
) -> None:
    table = table_of([threshold], made_at)
    by_share = find_points(llama, table, longer, target_sparsities=TARGETS)
    assert [one.sparsity for one in by_share.expected] == pytest.approx(TARGETS, abs=0.01)
    (strict, loose) = find_points(llama, table, longer, max_losses=(0.01, 0.1)).expected
    assert 0.008 < strict.kl <= 0.01
    assert 0.09 < loose.kl <= 0.1
    # Where everything that may be is skipped within the bound, no more is looked for.
    told: list[str] = []
    (most,) = find_points(llama, table, longer, max_losses=(99.0,), progress=told.append).expected
    assert most.sparsity == pytest.approx(1 - 0.118, abs=0.001)
    assert len(told) < 9


def test_heads_that_keep_everything_go_on_doing_so(
    llama: LlamaForCausalLM, longer: list[list[int]]
) -> None:
    table = table_of([0.0, 1.0])
    values = table.thresholds.copy()
    values[:, 1, 2] = -np.inf
    table = dataclasses.replace(table, thresholds=values)
    for more in (0.3, 0.7):
        found = find_points(llama, table, longer, target_sparsities=(more,))
        assert found.expected[0].sparsity == pytest.approx(more, abs=0.01)
        assert np.isneginf(found.table.thresholds[:, 1, 2]).all()
        assert np.isneginf(found.table.thresholds).sum() == 1
    with pytest.raises(TuningError, match=r"0\.87 cannot be reached .* found skips 0\.7"):
        find_points(llama, table, longer, target_sparsities=(0.87,))
    nothing = dataclasses.replace(table, thresholds=np.full_like(values, -np.inf))
    with pytest.raises(TuningError, match="some threshold must be above −inf"):
        find_points(llama, nothing, longer, max_losses=(0.1,))


def test_rows_that_keep_everything_at_large_k_only_are_continued() -> None:
    values = np.full((3, 1, 1, 3), -np.inf, np.float32)
    values[0, ..., 1:], values[1, ..., 2] = 3.0, 1.0
    path = path_of(ThresholdTable(values, (2, 4, 8), "k"))
    expected = [[-np.inf, -5, -3], [-np.inf, -1, 1], [-np.inf, 3, 3]]
    np.testing.assert_array_equal(path.points[:, 0, 0], expected)
    for place, value in ((-1.0, -9), (0.0, -5), (0.5, -3), (1.0, -1), (1.5, 1), (2.0, 3), (3, 7)):
        np.testing.assert_array_equal(path.at(place)[0, 0, :2], [-np.inf, value])


def test_thresholds_of_infinity_lie_on_a_path() -> None:
    values = np.array([[0, -np.inf, 0, np.inf], [2, 0, 1, np.inf], [4, np.inf, -np.inf, np.inf]])
    path = path_of(
        ThresholdTable(values.reshape(3, 1, 4, 1), (0.1, 0.2, 0.3), axis="target_sparsity")
    )
    for place, expected in (
        (0.0, [0, -4, 0, np.inf]),
        (0.5, [1, -2, 0.5, np.inf]),
        (1.0, [2, 0, 1, np.inf]),
        (1.5, [3, np.inf, -np.inf, np.inf]),
    ):
        np.testing.assert_array_equal(path.at(place)[0, :, 0], expected)


def test_what_was_measured_of_shorter_prompts_is_kept_too(
    llama: LlamaForCausalLM,
    longer: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = table_of([0.0], 2 * LONG)
    options: dict[str, Any] = {"target_sparsities": (0.4,), "checkpoint": tmp_path}
    told: list[str] = []

    def stop(text: str) -> None:
        raise Interrupted(text)

    with pytest.raises(Interrupted):
        find_points(llama, table, longer, progress=stop, **options)
    whole = find_points(llama, table, longer, progress=told.append, **options)
    assert told[0].endswith("measured before")
    assert "measured in" in told[1]
    monkeypatch.setattr(Measure, "__call__", None)
    again = find_points(llama, table, longer, **options)
    np.testing.assert_array_equal(again.table.thresholds, whole.table.thresholds)


def test_the_table_says_how_long_prompts_of_different_lengths_are(
    llama: LlamaForCausalLM, longer: list[list[int]]
) -> None:
    mixed = [longer[0][:600], longer[1]]
    for made_at, lengths in ((800, (800, LONG)), (SHORT, (SHORT, LONG)), (2 * LONG, (LONG, 0))):
        found = find_points(llama, table_of([0.0], made_at), mixed, target_sparsities=(0.4,))
        assert (found.table.max_seqlen, found.table.serve_seqlen) == lengths
        assert found.expected[0].sparsity == pytest.approx(0.4, abs=0.01)


def test_what_was_measured_is_kept_and_used_for_the_same_work_only(
    llama: LlamaForCausalLM,
    longer: list[list[int]],
    path: ThresholdPath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"made_at": SHORT, "checkpoint": tmp_path, **FINE}
    told: list[str] = []

    def stop(text: str) -> None:
        raise Interrupted(text)

    with pytest.raises(Interrupted):
        serve(llama, path, longer, target_sparsities=TARGETS, progress=stop, **options)
    whole = serve(llama, path, longer, target_sparsities=TARGETS, progress=told.append, **options)
    assert told[0].endswith("measured before")
    assert told[-2].find("measured in") > 0
    names = sorted(file.name for file in tmp_path.iterdir())
    assert [name.split("-")[0] for name in names] == ["sample", "sample", "served.json"]

    # Nothing runs again once all is there, but on other samples everything does.
    with monkeypatch.context() as patched:
        patched.setattr(serving, "Measure", None)
        again = serve(llama, path, longer, target_sparsities=TARGETS, **options)
    np.testing.assert_array_equal(again.table.thresholds, whole.table.thresholds)
    assert again.expected == whole.expected
    told.clear()
    serve(llama, path, longer[:1], target_sparsities=(0.3,), progress=told.append, **options)
    assert "measured before" not in " ".join(told)


@pytest.mark.parametrize("content", ["", "[]", "mine", '{"key": 1, "measured": [[2, 3]]}', "{}"])
def test_a_file_that_holds_no_measurements_is_left_as_it_is(
    llama: LlamaForCausalLM,
    longer: list[list[int]],
    path: ThresholdPath,
    tmp_path: Path,
    content: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "digest_of", lambda *_: 1)
    (tmp_path / "served.json").write_text(content)
    with pytest.raises(TuningError, match=r"served\.json holds no measurements of points"):
        serve(
            *(llama, path, longer),
            made_at=SHORT,
            target_sparsities=TARGETS,
            checkpoint=tmp_path,
            **FINE,
        )
    assert (tmp_path / "served.json").read_text() == content


def test_measurements_that_were_changed_are_refused_and_those_without_a_checksum_made_again(
    tmp_path: Path,
) -> None:
    file = tmp_path / "served.json"
    found = Expected(0.5, 0.1, 0.2)
    serving._Known(file, "key").add(0.25, found)
    assert serving._Known(file, "key").get(0.25) == found
    whole = file.read_text()
    numbers = (("0.5", "0.7"), ("0.25", "0.24"), ("0.1", "1.1"))
    for old, new in (*numbers, ('m": "', 'm": "0'), ('"key",', '"kez",')):
        assert whole.count(old) == 1
        file.write_text(whole.replace(old, new))
        with pytest.raises(TuningError, match=r"served\.json holds no measurements of points"):
            serving._Known(file, "key")
    file.write_text(json.dumps({"key": "key", "measured": json.loads(whole)["measured"]}))
    assert serving._Known(file, "key").get(0.25) is None


@pytest.mark.parametrize(
    ("length", "arguments", "message"),
    [
        (0, {"target_sparsities": (0.5,)}, "at least one sample is needed"),
        (128, {"target_sparsities": (0.5,)}, "made from, 256 tokens, got 128"),
        (512, {"target_sparsities": (0.9,)}, "for 512 tokens, .* below 0.778, got 0.9"),
        (512, {"max_losses": (0.0,)}, "must be above 0, got 0"),
        (512, {}, "give either"),
        (512, {"max_losses": (0.1,), "target_sparsities": (0.5,)}, "give either"),
    ],
)
def test_what_cannot_be_served_is_refused(
    llama: LlamaForCausalLM,
    path: ThresholdPath,
    length: int,
    arguments: dict[str, tuple[float, ...]],
    message: str,
) -> None:
    samples = [random_tokens(length, 0)] if length else []
    with pytest.raises(ValueError, match=message):
        serve(llama, path, samples, made_at=SHORT, **arguments, **FINE)


def test_rungs_are_those_up_to_the_target_and_targets_are_checked_at_the_serving_length() -> None:
    assert serving_rungs((0.7,), 4096, GEOMETRY) == (0.6, 0.75)
    assert serving_rungs((0.97,), 4096, GEOMETRY) == (0.6, 0.75, 0.85, 0.92)
    assert serving_rungs((), 512, GEOMETRY) == (0.6, 0.75)
    with pytest.raises(TuningError, match="too short"):
        serving_rungs((0.7,), 128, GEOMETRY)
    check_points((0.97,), (), 65536, GEOMETRY)
    with pytest.raises(TuningError, match="for 4096 tokens"):
        check_points((0.97,), (), 4096, GEOMETRY)


def test_layers_that_run_dense_stay_so_and_do_not_count() -> None:
    dense_first = tiny_model(
        "gemma3_text",
        sliding_window=128,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    longer = [random_tokens(LONG, 3)]
    options: dict[str, Any] = {"target_sparsities": TARGETS, **FINE}
    table = scalar.one_pass(dense_first, [longer[0][:SHORT]], target_sparsities=(0.2, 0.4), **FINE)
    assert np.isneginf(table.thresholds[:, 0]).all()
    found = serve(dense_first, path_of(table), longer, made_at=SHORT, **options)
    assert_points(dense_first, found, longer, TARGETS)
    assert np.isneginf(found.table.thresholds[:, 0]).all()
    assert found.table.provenance["dense_layers"] == "layers 0: sliding-window layer"
    every = tiny_model("mistral", sliding_window=128)
    with pytest.raises(CaptureError, match="all run dense"):
        serve(every, path_of(table), longer, made_at=SHORT, **options)


# ------------------------------------------------------------------------------ the command


def command(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    return [
        *("calibrate", "--model", str(model), "--text", str(text), "--length", "512"),
        *("--serve-length", "1024", "--samples", "2", "--device", "cpu", "--geometry", "64x64"),
        *("--out", str(output), *more),
    ]


QUICK = ("--steps", "2", "--further-steps", "1")


@pytest.mark.parametrize("method", ["learned", "scalar"])
@pytest.mark.parametrize("voters", ["1", "4"])
def test_the_command_points_at_the_serving_length(
    model_directory: Path,
    text_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    voters: str,
) -> None:
    output = tmp_path / "table.safetensors"
    more = ("--method", method, "--target-sparsity", "0.4", "0.6", "--voters", voters)
    quick = QUICK if method == "learned" else ()
    assert main(command(model_directory, text_directory, output, *more, *quick)) == 0
    table = ThresholdTable.load(output)
    assert (table.max_seqlen, table.serve_seqlen, table.samples) == (512, 1024, 2)
    assert (table.voters, table.points) == (int(voters), (0.4, 0.6))
    assert table.aggregate == ("learned" if method == "learned" else "pooled")
    shares = [float(x) for x in table.provenance["expected_sparsity"].split(", ")]
    assert shares == pytest.approx([0.4, 0.6], abs=0.02)
    assert len(table.provenance["expected_kl"].split(", ")) == 2
    assert len(table.provenance["served"].split("; ")) == 2
    # No text is in both: 2 samples of 512 tokens take a third of the first half.
    assert table.provenance["data_part"] == "0:0.166667"
    assert table.provenance["served_part"] == "0.166667:0.5"
    printed = capsys.readouterr()
    assert "measured on 2 samples of up to 1024 tokens that nothing was made from" in printed.out
    assert "2 samples of 512 to 512 tokens, 0 held out" in printed.err
    assert "points on 2 of 1024 tokens" in printed.err
    assert "found the points in 0:" in printed.err
    assert ("learned in 0:" in printed.err) == (method == "learned")
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert main(["table", "info", str(output)]) == 0
    shown = capsys.readouterr().out
    facts = dict(line.split("  ", 1) for line in shown.splitlines() if "  " in line.strip())
    assert facts["longest sample"].strip() == "512 tokens"
    assert facts["points found at"].strip() == "1024 tokens"


def test_the_command_goes_on_where_it_was_stopped(
    model_directory: Path,
    text_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "table.safetensors"
    arguments = command(model_directory, text_directory, output, *QUICK)
    arguments += ["--serve-samples", "1", "--target-sparsity", "0.5", "0.6"]
    right = learned.with_expected

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(learned, "with_expected", interrupt)
    assert main(arguments) == 130
    where = f"kept in {output}.checkpoint"
    assert f"what was measured is {where}" in capsys.readouterr().err
    monkeypatch.setattr(learned, "with_expected", right)
    assert main(arguments) == 0
    printed = capsys.readouterr().err
    assert "target 0.6 was learned before" in printed
    assert "sample 1/1 done before" in printed
    assert "measured before" in printed
    assert "measured in" not in printed
    assert not Path(f"{output}.checkpoint").exists()
    assert main([*arguments, "--keep-checkpoint"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--no-resume"]) == 0
    assert "before" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--serve-length", "256"], "--serve-length must be at least --length, 512, got 256"),
        (["--serve-length", "8192"], "samples of 8192 tokens exceed the model's 4096 positions"),
        (["--serve-samples", "99"], "99 windows of 1024 tokens were asked for"),
        (["--target-sparsity", "0.95"], "for 1024 tokens, of which the forced blocks are"),
        (["--holdout", "2"], "--holdout is not for --serve-length"),
        (["--method", "topk"], "--serve-length is not for --method topk"),
        (["--method", "scalar", "--target-sparsity", "0.95"], "for 1024 tokens, of which the"),
    ],
)
def test_what_the_command_cannot_serve_is_told_in_a_line(
    model_directory: Path,
    text_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    output = tmp_path / "table.safetensors"
    assert main(command(model_directory, text_directory, output, *arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bsfa-calibrate: error: ")
    assert message in error
    assert not output.exists()


def test_serving_samples_need_a_serving_length(
    text_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--model", "none", "--text", str(text_directory), "--serve-samples", "3"]
    assert main(["calibrate", *more]) == 2
    assert "--serve-samples needs --serve-length" in capsys.readouterr().err


# ------------------------------------------------------------------------------ the file


def test_both_lengths_are_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    options: dict[str, Any] = {"axis": "target_sparsity", "max_seqlen": 4096}
    ThresholdTable(np.zeros((1, 2, 4, 1)), (0.5,), serve_seqlen=65536, **options).save(file)
    table = ThresholdTable.load(file)
    assert (table.max_seqlen, table.serve_seqlen, table.seqlen) == (4096, 65536, 65536)
    ThresholdTable(np.zeros((1, 2, 4, 1)), (0.5,), **options).save(file)
    assert b"serve_seqlen" not in file.read_bytes()
    table = ThresholdTable.load(file)
    assert (table.serve_seqlen, table.seqlen) == (0, 4096)
    with pytest.raises(ValueError, match="at least max_seqlen = 4096, got 512"):
        ThresholdTable(np.zeros((1, 2, 4, 1)), (0.5,), serve_seqlen=512, **options)
