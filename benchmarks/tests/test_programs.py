# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
import dataclasses
import functools
import importlib
import inspect
import math
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attention
import bsfa_kernel
import harness
import inputs
import kernels
import report
from bsfa_calib.expected import Expected
from bsfa_kernel import reference
from conftest import fake_fa3

TINY = ["--model-shape", "tiny", "--device", "cpu", "--dtype", "float32"]


def test_the_self_test_measures_every_rule_and_kind_of_input(tmp_path: Path) -> None:
    out = tmp_path / "self-test.jsonl"
    arguments = ["--device", "cpu", "--out", str(out), "--inputs", "planted,irregular"]
    arguments += ["--rules", "absolute,peak_lse", "--modes", "exact,int8,int8:4"]
    assert attention.main(arguments) == 0
    records = list(harness.read_records(out))
    assert all(record["self_test"] for record in records)
    ours = [record for record in records if record["kernel"] == "bsfa_reference"]
    assert {record["rule"] for record in ours} == {"absolute", "peak_lse"}
    modes = {(record["selection"], record["voters"]) for record in ours}
    assert modes == {("exact", 1), ("int8", 1), ("int8", 4)}
    assert {record["geometry"] for record in ours} == {"128x64", "64x64"}
    assert {record["inputs"] for record in ours} == {"planted", "irregular"}
    assert all(record["sparsity"] == 0.0 for record in ours if record["asked"] == "dense")
    assert all(record["sparsity"] > 0.1 for record in ours if record["asked"] == "0.5")
    assert all("math" in record["speedup"] for record in ours)
    assert all(record["error"] < 1e-2 for record in ours)


def test_a_wrong_kernel_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right: Callable[..., Any] = bsfa_kernel.block_sparse_attention

    def wrong(*args: object, **options: object) -> Any:
        result = right(*args, **options)
        return result if isinstance(result, tuple) else result * 1.1

    monkeypatch.setattr(bsfa_kernel, "block_sparse_attention", wrong)
    out = tmp_path / "self-test.jsonl"
    assert attention.main(["--device", "cpu", "--out", str(out)]) == 1
    assert {record["kernel"] for record in harness.read_records(out)} == {"math"}
    assert "bsfa_reference was left out: its error is" in capsys.readouterr().out


@pytest.mark.parametrize(("flipped", "timed"), [(1, True), (100, False)])
def test_a_verdict_that_rounding_turns_is_free_in_8_bits(
    flipped: int,
    timed: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right: Callable[..., Any] = reference.select_blocks

    def other(q: Any, k: Any, *args: object, **options: Any) -> Any:
        found = right(q, k, *args, **options)
        lengths = (q.shape[1], k.shape[1])
        asked = {"causal": options["causal"], "geometry": options["geometry"]}
        free = reference.visible_blocks(*lengths, **asked)
        free &= ~reference.forced_blocks(*lengths, **asked)
        where = torch.nonzero(free.expand_as(found.mask))[:flipped]
        found.mask[tuple(where.T)] ^= True
        return found

    # The kernels' side of the check calls bsfa_kernel.select_blocks.
    monkeypatch.setattr(reference, "select_blocks", other)
    out = tmp_path / "self-test.jsonl"
    arguments = ["--device", "cpu", "--out", str(out), "--inputs", "irregular", "--seqlens", "1K"]
    arguments += ["--rules", "peak_lse", "--modes", "int8:2", "--geometries", "128x64"]
    assert attention.main([*arguments, "--sparsities", "0.5"]) == (0 if timed else 1)
    ours = [r for r in harness.read_records(out) if r["kernel"] == "bsfa_reference"]
    assert len(ours) == timed
    assert all(record["error"] < 1e-2 for record in ours)
    assert timed or "of the verdicts are not the reference's" in capsys.readouterr().out


def test_an_exact_verdict_near_its_threshold_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = bsfa_kernel.DEFAULT_GEOMETRY
    shape = inputs.Shape(1000, 4, 2, 32)
    case = attention.Case(shape, "irregular", "0.5", "peak_lse", (geometry,), ())
    checks = attention.Checks(torch.device("cpu"), 0)
    kernel = kernels.Bsfa(0)
    right = inputs.irregular

    def moved(by: float) -> Callable[..., inputs.Problem]:
        def made(*args: Any, **options: Any) -> inputs.Problem:
            # The threshold of the last query block of a head is moved onto one of its maxima.
            problem = right(*args, **options)
            maxima = inputs.voting_maxima(problem.q, problem.k, shape, "peak_lse", geometry, 1)
            problem.thresholds[geometry, 1][0, -1] = maxima[0, 0, -1, 5] + by
            return problem

        return made

    def prepare(problem: inputs.Problem, *args: Any) -> Any:
        # The kernel's verdict on that block is the other one.
        lowered = {key: value.clone() for key, value in problem.thresholds.items()}
        lowered[geometry, 1][0, -1] -= 2e-2
        return kernels.Bsfa.prepare(kernel, dataclasses.replace(problem, thresholds=lowered), *args)

    other = types.SimpleNamespace(name="other", arch=0, prepare=prepare)
    for by, sound in ((5e-3, True), (1.5e-2, False)):
        monkeypatch.setattr(inputs, "irregular", moved(by))
        error, reason = checks._check_ours(other, case)  # type: ignore[arg-type]
        assert (reason == "") == sound, reason
        assert not sound or (error is not None and error < 1e-2)


def test_the_judged_settings_are_in_the_presets() -> None:
    for preset, kernel in (("sm80", "bsfa_sm80"), ("sm90", "bsfa_sm90")):
        chosen = list(attention.cases(attention.PRESETS[preset]))
        main = [
            case
            for case in chosen
            if (case.shape.seqlen, case.shape.dtype, case.shape.head_dim, case.inputs)
            == (65536, torch.bfloat16, 128, "planted")
        ]
        assert [case.asked for case in main] == ["dense", "0", "0.5", "0.75", "0.9", "0.95"]
        assert all(kernel in case.kernels and "fa3" in case.kernels for case in main)
        assert len(set(chosen)) == len(chosen)


def test_options_replace_what_a_preset_says(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "sm90", "--seqlens", "2K", "--sparsities", "0.5", "--list"]
    assert attention.main([*arguments, "--dtypes", "float16", "--head-dims", "64"]) == 0
    listed = capsys.readouterr().out
    assert "2048 tokens, float16, head_dim 64" in listed
    assert "bfloat16" not in listed


def test_selection_in_8_bits_is_measured_beside_the_exact_kernel() -> None:
    chosen = list(attention.cases(attention.PRESETS["results"]))
    modes = {str(mode) for case in chosen for mode in case.modes}
    assert modes == {"exact", "int8", "int8:2", "int8:4"}
    for case in chosen:
        assert case.asked != "dense" or case.modes == (kernels.EXACT,)


def test_both_steps_are_measured_alone(tmp_path: Path) -> None:
    import steps

    out = tmp_path / "steps.jsonl"
    arguments = ["--device", "cpu", "--seqlens", "384", "--head-dims", "32", "--heads", "4"]
    arguments += ["--kv-heads", "2", "--precisions", "exact,int8", "--out", str(out)]
    assert steps.main(arguments) == 0
    records = list(harness.read_records(out))
    chosen = [record for record in records if record["kind"] == "select_blocks"]
    assert {(r["precision"], r["voters"]) for r in chosen} == {
        (precision, voters) for precision in ("exact", "int8") for voters in (1, 2, 4)
    }
    attended = [record for record in records if record["kind"] == "attend_blocks"]
    assert [record["asked"] for record in attended] == ["1", "0.5", "0.25", "0.1", "0.05"]
    assert attended[0]["kept"] == 1.0
    for record in attended:
        # Diagonal blocks, a third of all, are always kept.
        expected = record["of_dense"]["math"] * record["rate"]["math"]
        assert expected == pytest.approx(record["kept"])
    with pytest.raises(ValueError, match="self-test"):
        report.step_tables(records)
    for record in records:
        record["self_test"] = False
    tables = report.step_tables(records)
    assert "8 bits, 1 in 4" in tables
    assert "rate a block kept" in tables


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import steps

    right: Callable[..., Any] = bsfa_kernel.attend_blocks
    monkeypatch.setattr(
        bsfa_kernel, "attend_blocks", lambda *args, **options: 1.1 * right(*args, **options)
    )
    out = tmp_path / "steps.jsonl"
    arguments = ["--device", "cpu", "--seqlens", "384", "--head-dims", "32", "--heads", "4"]
    steps.main([*arguments, "--kv-heads", "2", "--out", str(out)])
    assert {record["kind"] for record in harness.read_records(out)} == {"select_blocks"}


@pytest.mark.parametrize("wrong", ["forced blocks only", "every row votes", "none skipped"])
@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_a_wrong_selection_is_not_timed(
    wrong: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import steps

    right: Callable[..., Any] = bsfa_kernel.select_blocks

    def select(q: Any, k: Any, thresholds: torch.Tensor, **options: Any) -> Any:
        if wrong == "every row votes":
            return right(q, k, thresholds, **{**options, "voters": 1})
        limit = math.inf if wrong == "forced blocks only" else -math.inf
        return right(q, k, torch.full_like(thresholds, limit), **options)

    monkeypatch.setattr(bsfa_kernel, "select_blocks", select)
    out = tmp_path / "steps.jsonl"
    arguments = ["--device", "cpu", "--seqlens", "1000", "--head-dims", "32", "--heads", "2"]
    arguments += ["--kv-heads", "1", "--precisions", precision, "--kept", "0.5"]
    steps.main([*arguments, "--out", str(out)])
    timed = [r["voters"] for r in harness.read_records(out) if r["kind"] == "select_blocks"]
    assert timed == ([1] if wrong == "every row votes" else [])
    assert "of the verdicts are not the reference's" in capsys.readouterr().out


def test_a_spent_budget_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "self-test.jsonl"
    assert attention.main(["--device", "cpu", "--out", str(out), "--budget-seconds", "0"]) == 1
    assert "left out for the budget" in capsys.readouterr().out
    assert not out.exists()


def test_prefill_measures_dense_and_sparse(tmp_path: Path) -> None:
    import prefill

    out = tmp_path / "prefill.jsonl"
    options = ["--seqlens", "1K", "--sparsities", "0.5", "--repetitions", "1", "--out", str(out)]
    options += ["--modes", "exact,int8:4"]
    assert prefill.main([*TINY, *options]) == 0
    dense, sparse, by_few = report.latest(harness.read_records(out))
    assert (by_few["selection"], by_few["voters"]) == ("int8", 4)
    assert 0.4 < by_few["sparsity"] < 0.6
    assert (dense["implementation"], dense["sparsity"]) == ("sdpa", 0.0)
    assert sparse["implementation"] == "bsfa"
    assert 0.4 < sparse["sparsity"] < 0.6
    assert 0 < sparse["attention_ms"] < sparse["ms"]
    assert sparse["speedup"]["sdpa"] == pytest.approx(dense["ms"] / sparse["ms"])


def test_calibration_is_timed_against_dense_passes(tmp_path: Path) -> None:
    import calibration

    out = tmp_path / "calibration.jsonl"
    options = ["--seqlen", "512", "--samples", "2", "--k-values", "2", "--out", str(out)]
    assert calibration.main([*TINY, *options]) == 0
    each = list(harness.read_records(out))
    assert [r["repetitions"] for r in each] == [1, 2, 3]
    (record,) = report.latest(each)
    assert record["ratio"] == pytest.approx(record["calibration_seconds"] / record["dense_seconds"])
    assert (record["samples"], record["seqlen"]) == (2, 512)
    assert record["repetitions"] == 3
    for name in ("dense_seconds", "calibration_seconds"):
        assert record[name] == sorted(record[f"{name}_each"])[1]


LEARNED = ["--method", "learned", "--length", "1K", "--serve-length", "2K", "--dtype", "bfloat16"]
FEW = ["--samples", "2", "--steps", "3", "--further-steps", "1", "--serve-samples", "1"]


def test_the_phases_of_a_learned_calibration_are_those_of_the_command(tmp_path: Path) -> None:
    import calibration

    out = tmp_path / "calibration.jsonl"
    points = ["--target-sparsities", "0.6,0.7,0.6", "--out", str(out)]
    assert calibration.main([*TINY, *LEARNED, *FEW, *points]) == 0
    records = list(harness.read_records(out))
    assert [(r["phase"], r["dtype"], r["done"], r["whole"]) for r in records] == [
        ("dense outputs", "bfloat16", 2, 24),
        ("learning", "bfloat16", 3 + 1, 60 + 30),  # at 0.6 and 0.75: 1K leaves room for no more
        ("block maxima", "bfloat16", 1, 2),
        ("points", "bfloat16", 2, 2 * 6),
    ]
    for record in records:
        assert (record["seqlen"], record["serve_seqlen"]) == (1024, 2048)
        assert (record["rule"], record["geometry"], record["voters"]) == ("peak_lse", "128x64", 4)
        assert record["seconds_each"] == pytest.approx(record["seconds"] / record["done"])
        computed = record["seconds_each"] * record["whole"]
        assert record["whole_seconds_estimated"] == pytest.approx(computed)
    _, learning, _, found = records
    assert learning["asked"] == [0.6, 0.75]
    assert all(kl > 0 for kl in learning["kl"])
    assert found["sparsity"] == pytest.approx([0.6, 0.7], abs=0.02)
    assert found["passes"] >= 2


def test_a_learned_calibration_that_does_nothing_is_no_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import calibration
    from bsfa_calib import learned, learning
    from bsfa_calib.expected import Calibrated

    def still(*_: Any, **__: Any) -> list[Any]:
        thresholds = np.full((2, 4, 1), -2.5, np.float32)
        return [learning.Learned(0.6, thresholds, 0.5, 0.1)]

    out = tmp_path / "calibration.jsonl"
    monkeypatch.setattr(learned, "learn_path", still)
    with pytest.raises(RuntimeError, match=r"nothing was learned for 0\.6"):
        calibration.main([*TINY, *LEARNED, *FEW, "--out", str(out)])
    assert [r["phase"] for r in harness.read_records(out)] == ["dense outputs"]
    for sparsity, kl in ((0.0, 0.1), (0.5, float("nan"))):
        table: Any = types.SimpleNamespace(points=(0.6,))
        found = Calibrated(table, (Expected(sparsity, kl, 0.0),))
        with pytest.raises(RuntimeError, match=r"nothing is skipped at 0\.6"):
            calibration._what_was_found(found)


def test_a_learned_calibration_refuses_what_the_command_refuses(tmp_path: Path) -> None:
    import calibration

    lengths = ["--method", "learned", "--length", "2K", "--serve-length", "1K"]
    out = ["--out", str(tmp_path / "c.jsonl")]
    with pytest.raises(SystemExit, match="--k-values and --target-sparsities exclude each other"):
        calibration.main([*TINY, "--k-values", "4", "--target-sparsities", "0.5", *out])
    with pytest.raises(SystemExit, match="--k-values is for --method capture, not learned"):
        calibration.main([*TINY, "--method", "learned", "--k-values", "4"])
    with pytest.raises(SystemExit, match="--steps is for --method learned, not capture"):
        calibration.main([*TINY, "--steps", "4"])
    with pytest.raises(ValueError, match="--serve-length must be at least --length"):
        calibration.main([*TINY, *lengths, *out])
    with pytest.raises(ValueError, match=r"below 0\.882, got 0\.9"):
        calibration.main([*TINY, *LEARNED, "--target-sparsities", "0.9", *out])
    with pytest.raises(SystemExit):
        calibration.main([*TINY, *LEARNED, "--steps", "0", *out])


@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("attention", []),
        ("calibration", TINY),
        ("prefill", TINY),
        ("steps", []),
        ("selection_study", ["--model", "none", "--text", "none"]),
        ("study.run", ["--model", "none", "--text", "none"]),
        ("serving", ["ttft", "--model", "none"]),
    ],
)
def test_a_self_test_writes_into_no_report(
    program: str,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = importlib.import_module(program).main
    words = [*options, *([] if "--device" in options else ["--device", "cpu"])]
    monkeypatch.setattr("sys.argv", [program, *words])
    with pytest.raises(SystemExit) as ended:
        main(*([words] if inspect.signature(main).parameters else []))
    assert ended.value.code == 2
    assert "a self-test must name its --out, which belongs in no report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        ("prefill", ["--rules", "peak_ise"], "must be of absolute, running_max, peak_lse"),
        ("calibration", ["--rules", "none"], "must be of absolute, running_max, peak_lse"),
        ("calibration", ["--target-sparsities", "1.5"], "must be from 0 to 1, got 1.5"),
        ("steps", ["--kept", "2,-1"], "must be from 0 to 1, got 2"),
        ("long", ["--length", "1K", "--shares", "-0.5"], "must be from 0 to 1, got -0.5"),
        ("evaluation", ["none", "--command", "c", "--date", "yesterday"], "must be as 2026-11-29"),
        ("extend.check", ["--wordings", "qestion"], "must be of evaluation, cue, question"),
        ("extend.check", ["--keys", "0"], "must be from 1 to"),
        (
            "extend.data",
            ["none", "--model", "none", "--registries", "pipy"],
            "--registries must be of",
        ),
        ("serving", ["ttft", "--model-shape", "gpt-oss-20b"], "invalid choice: 'gpt-oss-20b'"),
    ],
)
def test_a_word_that_means_nothing_is_refused(
    program: str,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = importlib.import_module(program).main
    monkeypatch.setattr("sys.argv", [program, *options])
    with pytest.raises(SystemExit) as ended:
        main(*([options] if inspect.signature(main).parameters else []))
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_a_user_can_mend_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> int:
        raise ValueError("the model must\nbe there")

    monkeypatch.setattr("sys.argv", ["/somewhere/long.py"])
    with pytest.raises(SystemExit) as ended:
        harness.run_program(fails)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "long.py: error: the model must be there\n"
    monkeypatch.setenv("BSFA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="the model must"):
        harness.run_program(fails)
    for status in (0, 1):
        with pytest.raises(SystemExit) as ended:
            harness.run_program(lambda status=status: status)  # type: ignore[misc]
        assert ended.value.code == status


def test_prefill_leaves_out_a_length_too_short_for_a_share(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import prefill

    out = tmp_path / "prefill.jsonl"
    options = ["--seqlens", "256,1K", "--sparsities", "0.5", "--repetitions", "1"]
    assert prefill.main([*TINY, *options, "--out", str(out)]) == 0
    found = {(r["seqlen"], r["asked"]) for r in harness.read_records(out)}
    assert (256, "0.5") not in found
    assert {(256, "dense"), (1024, "dense"), (1024, "0.5")} <= found
    assert "left out: 256 tokens" in capsys.readouterr().err


def test_prefill_takes_flash_attention_3_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import prefill

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        assert options == {"softmax_scale": 0.25, "causal": True}
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    package = types.ModuleType("fa3_fwd_interface")
    monkeypatch.setattr(package, "flash_attn_func", flash_attn_func, raising=False)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", package)
    monkeypatch.setattr(kernels.FlashAttention3, "available", lambda *_: None)
    out = tmp_path / "prefill.jsonl"
    options = ["--seqlens", "1K", "--sparsities", "0.5", "--repetitions", "1", "--out", str(out)]
    assert prefill.main([*TINY, *options]) == 0
    written = list(harness.read_records(out))
    # Torch's is written again when its ratio to FlashAttention-3's is known.
    assert [record["implementation"] for record in written] == ["sdpa", "fa3", "bsfa", "sdpa"]
    records = report.latest(written)
    assert [set(record["speedup"]) for record in records] == [{"fa3"}, {"sdpa"}, {"sdpa", "fa3"}]
    assert [record["layers"] for record in records] == [{}, {"fa3": 2}, {"bsfa": 2}]


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
SMALL_SHAPES: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {**SMALL, "num_hidden_layers": 4, "head_dim": 16, "num_local_experts": 4},
    "qwen3-next-80b": {
        **SMALL,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 16,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


def small_shape(monkeypatch: pytest.MonkeyPatch, shape: str) -> Any:
    import models

    settings = {**models.SHAPES[shape], **SMALL_SHAPES[shape]}
    monkeypatch.setitem(models.SHAPES, shape, settings)
    return models.build(shape, dtype=torch.float32, device=torch.device("cpu"))


def prefill_small(shape: str, out: Path, *options: str) -> int:
    import prefill

    arguments = ["--model-shape", shape, "--device", "cpu", "--dtype", "float32"]
    arguments += ["--seqlens", "1K", "--sparsities", "0.5", "--repetitions", "1"]
    return prefill.main([*arguments, "--out", str(out), *options])


@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_prefill_measures_models_with_sinks_windows_and_wide_heads(
    shape: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small_shape(monkeypatch, shape)
    told = fake_fa3(monkeypatch)
    out = tmp_path / "prefill.jsonl"
    assert prefill_small(shape, out) == 0
    dense, fa3, sparse = report.latest(harness.read_records(out))
    assert [r["implementation"] for r in (dense, fa3, sparse)] == ["sdpa", "fa3", "bsfa"]
    cut = " with 64 of 512 experts" if shape == "qwen3-next-80b" else ""
    assert sparse["model"] == f"{shape}{cut}, random weights"
    assert 0.4 < sparse["sparsity"] < 0.6
    assert 0 < sparse["attention_ms"] < sparse["ms"]
    # Under bsfa_hf, too, windows are FlashAttention-3's: as often as in its own runs.
    told = [each for each in told if each["tokens"] == 1024]
    windows = [each for each in told if each["window_size"] == (127, 0)]
    full = [each for each in told if each["window_size"] == (-1, -1)]
    gpt_oss = shape == "gpt-oss-20b"
    assert (len(windows), len(full)) == ((8, 4) if gpt_oss else (0, 2))
    assert all(each["return_attn_probs"] == gpt_oss for each in told)
    assert fa3["layers"] == {"fa3": 4 if gpt_oss else 1}
    assert sparse["layers"] == ({"bsfa": 2, "fa3": 2} if gpt_oss else {"bsfa": 1})
    assert fa3["note"] == ""


def test_layers_that_flash_attention_3_cannot_do_are_torchs_and_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_shape(monkeypatch, "gpt-oss-20b")
    told = fake_fa3(monkeypatch, lacks=("local attention",))
    out = tmp_path / "prefill.jsonl"
    assert prefill_small("gpt-oss-20b", out) == 0
    dense, fa3, sparse = report.latest(harness.read_records(out))
    assert [r["implementation"] for r in (dense, fa3, sparse)] == ["sdpa", "fa3", "bsfa"]
    assert all(each["window_size"] == (-1, -1) for each in told)
    assert fa3["layers"] == {"fa3": 2, "torch": 2}
    assert fa3["note"] == "This flash attention build does not support local attention."
    assert sparse["layers"] == {"bsfa": 2, "torch": 2}
    said = capsys.readouterr().err
    assert "layers: 2 fa3, 2 torch (This flash attention build does not support local" in said
    for record in (dense, fa3, sparse):
        record["self_test"] = False
    assert "| FlashAttention-3, 2 of 4 layers |" in report.prefill_tables([dense, fa3, sparse])


@pytest.mark.parametrize("fault", ["it lacks all", "it is wrong"])
def test_flash_attention_3_that_can_do_no_layer_is_left_out(
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small_shape(monkeypatch, "gpt-oss-20b")
    lacking = fault == "it lacks all"
    lacks = ("local attention", "FP32") if lacking else ()
    fake_fa3(monkeypatch, lacks=lacks, factor=1.0 if lacking else 1.1)
    out = tmp_path / "prefill.jsonl"
    assert prefill_small("gpt-oss-20b", out) == 0
    dense, sparse = report.latest(harness.read_records(out))
    assert (dense["implementation"], sparse["implementation"]) == ("sdpa", "bsfa")
    assert sparse["layers"] == {"bsfa": 2, "torch": 2}
    assert set(sparse["speedup"]) == {"sdpa"}
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("left out")]
    assert line.startswith("left out: 1024 tokens, fa3 dense: FlashAttention-3 can do no layer")
    assert ("does not support FP32" if lacking else "its error is 1.00e-01") in line


def test_dense_baselines_give_what_a_model_with_sinks_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import prefill

    model = small_shape(monkeypatch, "gpt-oss-20b")
    for layer in model.model.layers:
        layer.self_attn.sinks.data = torch.tensor([-30.0, 1.0, 3.0, 20.0])
    ids = torch.randint(256, (1, 700), generator=torch.Generator().manual_seed(0))
    # Transformers' function for SDPA would pass over the sinks.
    assert prefill.torch_name(model) != "sdpa"
    for lacks, layers in (((), {"fa3": 4}), (("local attention",), {"fa3": 2, "torch": 2})):
        fake_fa3(monkeypatch, lacks=lacks)
        fa3 = prefill.Fa3Layers()
        prefill.register("test_fa3", fa3)
        for seqlen in (700, 128, 50):
            with torch.no_grad():
                model.set_attn_implementation("eager")
                expected = model(ids[:, :seqlen]).logits
                for name in (prefill.torch_name(model), "test_fa3"):
                    model.set_attn_implementation(name)
                    found = model(ids[:, :seqlen]).logits
                    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            # A window as long as the prompt hides nothing.
            assert fa3.layers() == (layers if seqlen == 700 else {"fa3": 4})


def test_a_dense_baseline_refuses_what_it_would_pass_over() -> None:
    import prefill

    q = torch.zeros(1, 2, 8, 16)
    module = types.SimpleNamespace(layer_idx=0)
    for name in ("softcap", "position_bias", "block_indices"):
        for function in (prefill.torch_attention, prefill.Fa3Layers()):
            with pytest.raises(NotImplementedError, match=f"must have no {name} here"):
                function(module, q, q, q, None, **{name: torch.ones(1)})


def test_what_does_not_fit_into_the_time_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import prefill

    answers = [True, True, True, False, False]  # the length, dense, 0.5, 0.75; the second round
    monkeypatch.setattr(harness.Budget, "allows", lambda *_: answers.pop(0))
    out = tmp_path / "prefill.jsonl"
    options = ["--seqlens", "1K", "--sparsities", "0.5,0.75", "--out", str(out)]
    assert prefill.main([*TINY, *options]) == 0
    assert not answers
    records = list(harness.read_records(out))
    assert [(r["asked"], r["repetitions"]) for r in records] == [("dense", 1), ("0.5", 1)]
    left = [x for x in capsys.readouterr().out.splitlines() if x.startswith("left out")]
    assert left == [
        "left out for the budget: 1024 tokens, bsfa 0.75 peak_lse 128x64 exact",
        "left out for the budget: 1024 tokens, repetitions 2 to 3",
    ]


PREFILL = ["--seqlens", "512", "--sparsities", "0.5", "--repetitions", "1000000"]
CALIBRATION = ["--seqlen", "512", "--k-values", "2", "--repetitions", "1000000"]


@pytest.mark.parametrize(
    ("program", "options", "sent"),
    [
        ("prefill", PREFILL, signal.SIGTERM),
        ("prefill", PREFILL, signal.SIGINT),
        ("calibration", CALIBRATION, signal.SIGTERM),
    ],
)
def test_what_was_measured_before_a_signal_is_kept(
    program: str, options: list[str], sent: signal.Signals, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    path = harness.ROOT / "benchmarks" / f"{program}.py"
    command = [sys.executable, "-X", "faulthandler", str(path), *TINY, *options, "--out", str(out)]
    # Shells let what they start in the background ignore Ctrl-C, which would be handed down.
    default = functools.partial(signal.signal, sent, signal.SIG_DFL)
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        child = subprocess.Popen(command, stderr=stderr, preexec_fn=default)
    try:
        end = time.monotonic() + 120
        while not (out.exists() and out.stat().st_size) and time.monotonic() < end:
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(sent)
        try:
            assert child.wait(60) != 0
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGABRT)  # says where it is
            child.wait(60)
            pytest.fail(f"still running 60 s after {sent.name}:\n{log.read_text()[-4000:]}")
    finally:
        child.kill()
    records = list(harness.read_records(out))
    assert records[0]["repetitions"] == 1


def test_lean_is_for_llama(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import prefill

    small_shape(monkeypatch, "gpt-oss-20b")
    arguments = ["--model-shape", "gpt-oss-20b", "--device", "cpu", "--lean"]
    with pytest.raises(ValueError, match="--lean is for Llama models, got one of type gpt_oss"):
        prefill.main([*arguments, "--out", str(tmp_path / "out.jsonl")])


def test_a_case_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*args: object, **options: object) -> object:
        raise NotImplementedError("there is no such kernel")

    inputs._irregular.cache_clear()
    monkeypatch.setattr(bsfa_kernel, "block_maxima", unsupported)
    out = tmp_path / "self-test.jsonl"
    arguments = ["--device", "cpu", "--out", str(out), "--inputs", "irregular,planted"]
    assert attention.main(arguments) == 1
    assert {record["inputs"] for record in harness.read_records(out)} == {"planted"}
    assert "there is no such kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seqlens", "4K,0", "at least 1, got 0"),
        ("--kernels", "fa3,nope", "got 'nope'"),
        ("--rules", "max", "got 'max'"),
        ("--dtypes", "float31", "got 'float31'"),
        ("--modes", "int8:3", "invalid comma-separated list value: 'int8:3'"),
    ],
)
def test_a_setting_that_is_none_is_refused(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        attention.parser().parse_args([option, value])
    assert message in capsys.readouterr().err
