# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import harness

CPU = torch.device("cpu")


def test_lengths_are_numbers_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=harness.list_of(harness.parse_length))
    found = parser.parse_args(["--lengths", "512,32K,1k"]).lengths
    assert found == (512, 32768, 1024)
    for length in ("0", "0K"):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--lengths={length}"])
        assert f"a length must be at least 1, got {length}" in capsys.readouterr().err
    for length in ("", "-5", "1.5K", "64X", " 64K", "\u0664", "512,,1K"):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--lengths={length}"])
        assert "a length is a number of tokens such as 512 or 32K, got" in capsys.readouterr().err


def test_a_record_that_has_its_fields_is_written_and_read_back(
    records: list[dict[str, Any]], tmp_path: Path
) -> None:
    results = harness.Results(tmp_path / "new" / "results.jsonl")
    for record in records:
        results.append(record)
    assert list(harness.read_records(results.path)) == records


def test_a_record_behind_half_a_line_is_a_line_of_its_own(
    records: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    harness.Results(path).append(records[0])
    half = path.read_text()[:40]
    path.write_text(path.read_text() + half)
    harness.Results(path).append(records[0])
    assert [json.loads(line) for line in path.read_text().splitlines() if line != half] == (
        [records[0]] * 2
    )


@pytest.mark.parametrize("name", ["kernel", "sparsity", "speedup", "sources", "date"])
def test_a_record_that_lacks_a_field_is_refused(
    records: list[dict[str, Any]], name: str, tmp_path: Path
) -> None:
    del records[0][name]
    with pytest.raises(ValueError, match=name):
        harness.Results(tmp_path / "results.jsonl").append(records[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ms", "1.0"),
        ("ms", float("nan")),
        ("seqlen", True),
        ("geometry", 64),
        ("kind", "other"),
        ("schema", 2),
    ],
)
def test_a_record_with_a_field_of_another_type_is_refused(
    records: list[dict[str, Any]], name: str, value: object
) -> None:
    with pytest.raises(ValueError, match=name):
        harness.check_record({**records[0], name: value})


def test_a_line_that_is_no_record_is_named(records: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(records[0]) + "\n\n{\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.jsonl:3"):
        list(harness.read_records(path))


def test_a_record_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for line in (json.dumps({"kind": "study", "schema": 1}), "[]"):
        path.write_text(line + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"results\.jsonl:1"):
            list(harness.read_records(path))


def test_an_environment_without_a_gpu_makes_records_self_tests() -> None:
    environment = harness.environment(CPU, command="python benchmarks/attention.py")
    assert environment["self_test"]
    assert environment["gpu"] == "none"
    assert environment["torch"] == torch.__version__


def test_sources_is_a_hash_of_names_and_contents(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    folder = tmp_path / "packages" / "bsfa-kernel" / "csrc"
    folder.mkdir(parents=True)
    hashes = set()
    for name, content in (("a.cu", "1"), ("a.cu", "2"), ("b.cu", "2")):
        (folder / name).write_text(content, encoding="utf-8")
        harness.sources.cache_clear()
        hashes.add(harness.sources())
    harness.sources.cache_clear()
    assert len(hashes) == 3


def test_the_timer_repeats_every_call_and_reports_the_one_that_fails() -> None:
    counts = {"quick": 0, "slow": 0}

    def counted(name: str) -> None:
        counts[name] += 1

    def failing() -> None:
        raise RuntimeError("out of\n memory")

    timer = harness.Timer(CPU, seconds=0.0, rounds=2, least=4)
    measured = timer.measure(
        {"quick": lambda: counted("quick"), "bad": failing, "slow": lambda: counted("slow")}
    )
    assert list(measured.timings) == ["quick", "slow"]
    assert measured.failures == {"bad": "out of memory"}
    assert counts == {"quick": 7, "slow": 7}
    assert len(measured.timings["quick"].samples) == 4


def test_the_median_is_what_a_timing_reports() -> None:
    timing = harness.Timing((5.0, 1.0, 2.0))
    assert timing.fields()["ms"] == 2.0
    assert timing.fields()["ms_min"] == 1.0
    assert timing.fields()["repetitions"] == 3


def test_a_budget_allows_what_fits() -> None:
    assert harness.Budget(None).allows(1e9)
    assert harness.Budget(100.0).allows(50.0)
    assert not harness.Budget(100.0).allows(101.0)


@pytest.mark.parametrize("out", [["--out", "/home/user/a.jsonl"], ["--out=/home/user/a.jsonl"]])
def test_a_record_says_how_to_run_it_again_but_not_where(
    monkeypatch: pytest.MonkeyPatch, out: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["/home/user/attention.py", *out, "--preset", "quick"])
    assert harness.command_line() == "python benchmarks/attention.py --preset quick"
