# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import report
from conftest import attention_record

Records = list[dict[str, Any]]


def save(path: Path, records: Records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def prefill_record(**changes: Any) -> dict[str, Any]:
    return attention_record(
        kind="prefill",
        implementation="bsfa",
        model="llama-3.1-8b, random weights",
        attention_ms=20.0,
        peak_gib=40.0,
        **{"speedup": {"sdpa": 1.6, "fa3": 1.4}, "lean": True, **changes},
    )


def calibration_record(**changes: Any) -> dict[str, Any]:
    return attention_record(
        kind="calibration",
        model="a model",
        samples=4,
        dense_seconds=2.0,
        calibration_seconds=3.0,
        ratio=1.5,
        **changes,
    )


def phase_record(phase: str, done: int, whole: int, **changes: Any) -> dict[str, Any]:
    what = {"model": "a model", "method": "learned", "seqlen": 4096, "serve_seqlen": 131072}
    much = {"phase": phase, "unit": "step", "done": done, "whole": whole}
    time = {"seconds": 2.0 * done, "seconds_each": 2.0, "whole_seconds_estimated": 2.0 * whole}
    rest = {"rule": "peak_lse", "voters": 4, "peak_gib": 60.5, **changes}
    return attention_record(kind="calibration_phase", **{**what, **much, **time, **rest})


def test_the_table_has_a_row_for_each_kernel_and_a_column_for_each_sparsity(
    records: Records,
) -> None:
    lines = report.attention_tables(records).splitlines()
    header = next(line for line in lines if "times FlashAttention-3" in line)
    assert [cell.strip() for cell in header.split("|")[7:-1]] == ["dense", "0.5", "0.9"]
    row = next(line for line in lines[lines.index(header) :] if "BSFA sm_90a" in line)
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *("*BSFA sm_90a*", "absolute", "128x64", "planted", "64K", "16 bits"),
        *("0.98", "1.25", "1.72"),
    ]
    assert any("FLOP limit" in line and "1.33" in line and "1.82" in line for line in lines)
    assert any("50.00 (700)" in line for line in lines)


def test_a_cell_says_which_sparsity_it_has_where_that_is_not_the_one_asked_for() -> None:
    table = report.attention_tables([attention_record(sparsity=0.4)])
    assert "1.25 (at 0.40)" in table


def test_the_latest_record_of_a_measurement_counts(tmp_path: Path) -> None:
    old = attention_record(ms=1.0, date="2026-01-01T00:00:00+00:00")
    new = attention_record(ms=2.0, date="2026-01-03T00:00:00+00:00")
    other = attention_record(seqlen=1024)
    loaded = report.load([save(tmp_path / "a.jsonl", [new, other, old])])
    assert loaded == [new, other]


def test_of_the_records_of_a_run_the_last_one_written_counts(tmp_path: Path) -> None:
    first = attention_record(repetitions=1, ms=3.0, speedup={})
    second = attention_record(repetitions=2, ms=2.5, speedup={"fa3": 1.2})
    earlier = attention_record(repetitions=9, date="2025-01-01T00:00:00+00:00")
    path = save(tmp_path / "new.jsonl", [first, second, earlier])
    assert report.load([path]) == [second]
    results = tmp_path / "results"
    results.mkdir()
    (added,) = report.add([path], results)
    assert [record["repetitions"] for record in report.load([added])] == [2]


def test_records_of_a_self_test_are_refused(
    records: Records, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records[1]["self_test"] = True
    path = save(tmp_path / "a.jsonl", records)
    with pytest.raises(ValueError, match="self-test"):
        report.load([path])
    with pytest.raises(ValueError, match="self-test"):
        report.attention_tables(records)
    assert report.main(["table", str(path)]) == 2
    assert "self-test" in capsys.readouterr().err


def test_the_default_geometry_comes_first_and_the_papers_rule_last() -> None:
    choices = [
        ("absolute", "128x64", "planted", 1),
        ("peak_lse", "64x64", "planted", 4),
        ("peak_lse", "128x64", "planted", 4),
        ("absolute", "64x64", "irregular", 1),
        ("peak_lse", "128x64", "irregular", 1),
        ("peak_lse", "128x64", "irregular", 4),
        ("running_max", "128x64", "planted", 1),
    ]
    table = report.attention_tables(
        [
            attention_record(rule=r, geometry=g, inputs=i, voters=v, speedup={"fa3": 1.5})
            for r, g, i, v in choices
        ]
    )
    rows = [
        [cell.strip() for cell in (*line.split("|")[1:5], line.split("|")[6])]
        for line in table.splitlines()
        if "BSFA sm_90a" in line and "1.50" in line
    ]
    assert rows == [
        ["BSFA sm_90a", "peak_lse", "128x64", "irregular", "16 bits"],
        ["**BSFA sm_90a**", "peak_lse", "128x64", "irregular", "16 bits, 1 in 4"],
        ["**BSFA sm_90a**", "peak_lse", "128x64", "planted", "16 bits, 1 in 4"],
        ["BSFA sm_90a", "peak_lse", "64x64", "planted", "16 bits, 1 in 4"],
        ["BSFA sm_90a", "running_max", "128x64", "planted", "16 bits"],
        ["*BSFA sm_90a*", "absolute", "128x64", "planted", "16 bits"],
        ["BSFA sm_90a", "absolute", "64x64", "irregular", "16 bits"],
    ]


def test_a_row_says_how_blocks_were_chosen_and_has_a_limit_of_its_own() -> None:
    modes = [{}, {"selection": "int8", "voters": 1}, {"selection": "int8", "voters": 4}]
    table = report.attention_tables([attention_record(**mode) for mode in modes])
    lines = [line for line in table.splitlines() if "|" in line and "1.25" in line]
    assert [line.split("|")[6].strip() for line in lines[:3]] == [
        *("16 bits", "8 bits", "8 bits, 1 in 4"),
    ]
    limits = [line for line in table.splitlines() if "FLOP limit" in line][:3]
    assert [line.split("|")[7].strip() for line in limits] == ["1.33", "1.33", "1.78"]


def test_a_record_that_does_not_say_how_blocks_were_chosen_is_exact() -> None:
    exact = {"selection": "exact", "voters": 1}
    assert report.key_of(attention_record()) == report.key_of(attention_record(**exact))
    four = attention_record(**{**exact, "voters": 4})
    assert report.key_of(four) != report.key_of(attention_record())


def test_adding_keeps_the_latest_of_each_measurement_in_one_file_a_kind(
    records: Records, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    save(results / "old.jsonl", [*records, calibration_record()])
    later = attention_record(date="2026-02-01T00:00:00+00:00", ms=12.3456789, speedup={"fa3": 2.0})
    new = save(tmp_path / "new.jsonl", [later])
    written = report.add([new], results)
    assert sorted(path.name for path in results.iterdir()) == [
        "attention.jsonl",
        "calibration.jsonl",
    ]
    assert sorted(results.iterdir()) == written
    kept = {report.key_of(record): record for record in report.load(written)}
    assert len(kept) == len(records) + 1
    assert kept[report.key_of(later)]["ms"] == 12.3457
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in report.add([new], results)] == before


def test_the_records_of_a_build_can_be_dropped(tmp_path: Path) -> None:
    old = attention_record(asked="0.9", sources="old")
    save(tmp_path / "attention.jsonl", [attention_record(), old])
    (path,) = report.add([], tmp_path, drop=["old"])
    assert [record["sources"] for record in report.load([path])] == [attention_record()["sources"]]


def test_a_summary_that_follows_from_other_records_is_not_kept(tmp_path: Path) -> None:
    summary = {
        **attention_record(),
        "kind": "thresholds_study_summary",
        "model": "m",
        "compared": {},
    }
    new = save(tmp_path / "new", [attention_record(), summary])
    (path,) = report.add([new], tmp_path)
    assert path.name == "attention.jsonl"


def test_adding_a_self_test_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    kept = save(tmp_path / "attention.jsonl", [attention_record()])
    before = kept.read_bytes()
    new = save(tmp_path / "new", [attention_record(self_test=True)])
    with pytest.raises(ValueError, match="self-test"):
        report.add([new], tmp_path)
    assert kept.read_bytes() == before


def test_a_line_has_no_place_beside_a_baseline_that_was_not_in_its_run(
    records: Records, tmp_path: Path
) -> None:
    shorter = [
        attention_record(seqlen=4096, asked=asked, sparsity=sparsity, speedup={"fa3": 1.1})
        for asked, sparsity in (("dense", 0.0), ("0.5", 0.5), ("0.9", 0.9))
    ]
    (picture,) = report.plot_attention([*records, *shorter], tmp_path)
    assert picture.stat().st_size > 0


def serving_record(**changes: Any) -> dict[str, Any]:
    return {**prefill_record(**{"vllm": "0.26.0", "eager": False, **changes}), "kind": "serving"}


def load_record(**changes: Any) -> dict[str, Any]:
    return attention_record(
        kind="serving_load",
        **{
            "implementation": "bsfa",
            "model": "a model",
            "vllm": "0.26.0",
            "eager": False,
            "shortest": 16384,
            "seqlen": 131072,
            "answer": 64,
            "rate": 0.5,
            "requests": 50,
            "ttft_ms": 1500.0,
            "ttft_p99_ms": 9000.0,
            "tokens_per_second": 31000.0,
            "requests_per_second": 0.44,
            **changes,
        },
    )


def test_fewer_repetitions_that_replace_more_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, new = tmp_path / "results", tmp_path / "new.jsonl"
    results.mkdir()
    for repetitions, named in ((3, False), (1, True), (1, False)):
        new.write_text(json.dumps(prefill_record(repetitions=repetitions)) + "\n")
        report.add([new], results)
        assert ("1 repetitions replace more: prefill" in capsys.readouterr().err) == named


def test_how_a_model_ran_is_part_of_what_a_record_measures() -> None:
    prefills = [prefill_record(lean=lean, dtype=d) for lean in (True, False) for d in ("a", "b")]
    assert report.latest([*prefills, prefills[0]]) == prefills
    assert report.prefill_tables(prefills).count("### ") == 4
    for make in (serving_record, load_record):
        records = [make(eager=eager, dtype=d) for eager in (True, False) for d in ("a", "b")]
        assert report.latest(records) == records
        tables = report.serving_tables(records)
        assert tables.count("### ") == 4
        assert tables.count("vLLM 0.26.0, eager") == 2


def test_serving_has_tables_and_is_compared(tmp_path: Path) -> None:
    dense = load_record(implementation="vllm", asked="dense", geometry=None, rule=None)
    table = report.serving_tables([serving_record(), load_record(), dense])
    assert "| times FlashAttention-3 |" in table
    assert "vLLM 0.26.0, under load" in table
    assert "Prompts of 16K to 128K tokens, 0.5 a second, 64 answered." in table
    assert "| 31000" in table
    old = save(tmp_path / "old.jsonl", [serving_record(), load_record()])
    faster = load_record(tokens_per_second=34100.0)
    new = save(tmp_path / "new.jsonl", [serving_record(), faster])
    rows = report.compare(report.load([old]), report.load([new]))
    assert [round(row[0], 3) for row in rows] == [1.0, 1.1]
    with pytest.raises(ValueError, match="self-test"):
        report.serving_tables([load_record(self_test=True)])


def test_long_commands_are_folded_as_a_shell_reads_them() -> None:
    command = "python benchmarks/long.py " + " ".join(f"--option{i} 'a value'" for i in range(30))
    table = report.prefill_tables([prefill_record(command=command)])
    folded = table.split("```\n")[1]
    assert len(folded.splitlines()) > 4
    assert all(len(line) < 160 for line in folded.splitlines())
    assert shlex.split(folded.replace("\\\n", "")) == shlex.split(command)


def test_prefill_and_calibration_have_tables() -> None:
    table = report.prefill_tables([prefill_record()])
    assert "times torch SDPA" in table
    assert "1.40" in table
    assert "1.50" in report.calibration_tables([calibration_record()])


def test_phases_of_a_calibration_say_what_was_measured_and_what_is_computed(
    tmp_path: Path,
) -> None:
    learning = phase_record("learning", 12, 120)
    points = phase_record("points", 2, 14, dtype="bfloat16", peak_gib=40.0)
    text = report.calibration_tables([learning, points])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if len(row) > 1]
    assert rows[0][-2] == "all, s (computed)"
    assert rows[2] == [
        *("learning", "bfloat16", "12", "120", "step", "24.0", "2.00", "240", "60.5"),
    ]
    assert rows[4] == ["sum, or largest", "", "", "", "", "28.0", "", "268", "60.5"]
    assert "learned at 4K, points found at 128K (A GPU)" in text
    both = report.calibration_tables([calibration_record(), learning])
    assert both.index("1.50") < both.index("learned at 4K")
    with pytest.raises(ValueError, match="self-test"):
        report.calibration_tables([phase_record("points", 1, 1, self_test=True)])
    later = phase_record("learning", 12, 120, seconds_each=1.0, date="2026-03-01T00:00:00+00:00")
    files = [save(tmp_path / "old", [learning, points]), save(tmp_path / "new", [later])]
    assert [record["seconds_each"] for record in report.load(files)] == [1.0, 2.0]
    assert report.compare([learning, points], [later])[0][0] == pytest.approx(2.0)


def test_comparing_two_runs_finds_the_ratio_of_what_they_share(
    records: Records, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = [dict(record) for record in records]
    slower[3] = {**slower[3], "speedup": {"fa3": 1.0, "fa2": 2.0}}
    rows = report.compare(records, [*slower, attention_record(seqlen=1024)])
    assert len(rows) == len(records)
    assert rows[0][0] == pytest.approx(1.0 / 1.25)
    assert "0.5" in rows[0][1]
    old = save(tmp_path / "old.jsonl", records)
    new = save(tmp_path / "new.jsonl", slower)
    assert report.main(["compare", str(old), str(old)]) == 0
    assert report.main(["compare", str(old), str(new)]) == 1
    assert report.main(["compare", str(old), str(new), "--tolerance", "0.3"]) == 0
    assert "0.800" in capsys.readouterr().out
