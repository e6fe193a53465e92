# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

import attention
import overhead
import report
import serving
from conftest import attention_record
from harness import FIELDS, ROOT, check_record, read_records

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
    assert "50 prompts of 16K to 128K tokens, 0.5 a second, 64 tokens answered." in table
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


def long_record(kind: str, **changes: Any) -> dict[str, Any]:
    about = {"model": "m", "lean": True, "candidate": "c", "axis": "share", "asked": 0.5}
    lists = {"contexts": ["a 0"], "calibration_contexts": ["b@0"], "sparsity": [0.5]}
    figures = {"kl": [0.01], "nll_change": [0.0], "by_position": [], "attention_ms": 1.0}
    more = {"attention_speedup": {"fa3": 1.5}, "scores": [1.0], "depths": []}
    return attention_record(kind=kind, **{**about, **lists, **figures, **more, **changes})


def step_record(kind: str, **changes: Any) -> dict[str, Any]:
    figures = {"of_dense": {"fa3": 0.1}, "rate": {"fa3": 0.8}, "kept": 0.5}
    how = {"rule": "peak_lse", "precision": "int8", "voters": 4}
    return attention_record(kind=kind, **{**figures, **how, **changes})


def study_record(kind: str, **changes: Any) -> dict[str, Any]:
    lists = {"contexts": ["a@0"], "calibration_contexts": ["b@0"]}
    losses = {"kl": [0.01], "nll_change": [0.0], "compared": {}, "hits": ["1"]}
    figures = {"sparsity": [0.5], "peak_error": {}, "flips": 0.1, **losses}
    how = {"candidate": "c", "asked": 0.5, "voters": 4, "rule": "peak_lse"}
    task = {"task": "text", "keys": 0, "method": "scalar", "options": {}}
    if kind == "selection_study":
        figures |= {"sparsity": {}, "kl": {}}
    return attention_record(
        kind=kind, **{"model": "m", **lists, **figures, **how, **task, **changes}
    )


def one_of(kind: str, **changes: Any) -> dict[str, Any]:
    """A record of a kind."""
    if kind == "overhead":
        return attention_record(kind=kind, **{"host_microseconds": {"bsfa": 20.0}, **changes})
    makers: dict[str, Any] = {
        "attention": attention_record,
        "prefill": prefill_record,
        "serving": serving_record,
        "serving_load": load_record,
        "calibration": calibration_record,
        "calibration_phase": lambda **given: phase_record(
            "points", given.pop("done", 2), 9, **given
        ),
    }
    steps = kind in ("select_blocks", "attend_blocks")
    other = step_record if steps else long_record if kind.startswith("long") else study_record
    made: dict[str, Any] = makers[kind](**changes) if kind in makers else other(kind, **changes)
    check_record(made)
    return made


# Fields of records that are measured, follow from others, or say how it was measured.
MEASURED = {
    *("schema", "kind", "self_test", "date", "command", "gpu", "driver", "card", "clocks"),
    *("torch", "cuda", "cudnn", "python", "packages", "commit", "sources", "backend", "note"),
    *("ms", "ms_min", "spread", "repetitions", "tflops", "tflops_executed", "error", "peak_gib"),
    *("sparsity", "kept", "speedup", "of_dense", "rate", "attention_ms", "layers", "dense_ms"),
    *("ttft_ms", "ttft_p99_ms", "tokens_per_second", "requests_per_second", "host_microseconds"),
    *("dense_seconds", "calibration_seconds", "ratio", "dense_seconds_each", "unit", "passes"),
    *("calibration_seconds_each", "whole", "seconds", "seconds_each", "whole_seconds_estimated"),
    *("kl", "nll_change", "compared", "peak_error", "flips", "by_position", "attention_speedup"),
    *("fa3_layers", "scores", "depths", "hits", "sparse_calls_by_selection"),
}
# Of some kinds they follow from other fields: from a candidate's name, or from the work of a run.
FOLLOWS = {
    "thresholds_study": {"rule", "geometry", "voters", "order", "draws", "steps"},
    "calibration_phase": {"asked"},
    "evaluation": {"calibration_contexts"},
    "thresholds_study_summary": {"contexts"},
}


@pytest.mark.parametrize("kind", report.KINDS)
def test_every_field_of_a_kind_tells_measurements_apart_or_is_measured(kind: str) -> None:
    known = {*report.KINDS[kind].key, *MEASURED, *FOLLOWS.get(kind, ())}
    found = {
        name
        for record in report.load(report.current())
        if record["kind"] == kind
        for name in record
    }
    assert {*FIELDS[kind], *found} <= known


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, field) for kind, own in report.KINDS.items() for field in own.key]
)
def test_records_that_differ_in_what_was_set_are_both_kept(kind: str, field: str) -> None:
    record = one_of(kind)
    old = report.value_of(record, field)
    other = "0.25" if field == "asked" and isinstance(old, str) else ["another"]
    changed = {**record, field: other}
    assert report.latest([record, changed]) == [record, changed]


def test_what_older_records_do_not_say_is_the_default_of_then() -> None:
    for kind, said in (
        ("calibration", {"dtype": "bfloat16"}),
        ("prefill", {"selection": "exact", "voters": 1}),
        ("serving_load", {"selection": "exact", "voters": 1}),
    ):
        record = one_of(kind)
        older = {name: value for name, value in record.items() if name not in said}
        assert report.key_of(older) == report.key_of({**record, **said})


def test_a_share_is_one_however_it_is_written() -> None:
    shares = [
        attention_record(asked=text, date=f"2026-01-0{i}")
        for i, text in enumerate(("0.5", "0.50", ".5", "5e-1"), start=1)
    ]
    assert report.latest(shares) == shares[-1:]
    (header,) = [
        x
        for x in report.attention_tables(shares[1:2]).splitlines()
        if "pattern" in x and "Attention-3" in x
    ]
    assert header.split("|")[-2].strip() == "0.5"
    assert attention.parse_sparsity("0.50") == serving.parse_share(".5") == "0.5"
    assert attention.parse_sparsity("-0") == attention.parse_sparsity("0.0") == "0"
    assert attention.parse_sparsity("dense") == "dense"


def rows_of(table: str, start: str) -> list[list[str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return [row for row in cells if row and row[0].strip("*").startswith(start)]


def test_rows_of_attention_say_from_where_their_inputs_are() -> None:
    sources = [("M, layer 0", 3.0), ("M, layer 15", 1.2)]
    ours = [
        attention_record(inputs="model", source=source, speedup={"fa3": ratio})
        for source, ratio in sources
    ]
    found = rows_of(report.attention_tables(ours), "BSFA sm_90a")
    assert [(row[3], row[-1]) for row in found] == [
        *(("model, M, layer 0", "3.00"), ("model, M, layer 15", "1.20")),
    ]
    dense: dict[str, Any] = {
        "kernel": "fa3",
        "rule": None,
        "geometry": None,
        "asked": "dense",
        "speedup": {},
    }
    peers = [
        attention_record(**dense, inputs="model", source=source, ms=ms) for source, ms in sources
    ]
    found = rows_of(report.attention_tables([*ours, *peers]), "FlashAttention-3")
    assert [row[0] for row in found] == [
        *("FlashAttention-3, M, layer 0", "FlashAttention-3, M, layer 15"),
    ]


def test_servers_under_other_numbers_of_requests_have_tables_of_their_own() -> None:
    dense = {"implementation": "vllm", "asked": "dense", "geometry": None, "rule": None}
    records = [load_record(requests=8), load_record(requests=8, **dense)]
    table = report.serving_tables(report.latest([*records, load_record(**dense, requests=50)]))
    assert table.count("### ") == 2
    assert "\n8 prompts of " in table
    assert "\n50 prompts of " in table


def test_calibrations_in_another_dtype_or_on_another_card_have_tables_of_their_own() -> None:
    others = [calibration_record(dtype="float16"), calibration_record(gpu="B")]
    table = report.calibration_tables(report.latest([calibration_record(), *others]))
    titles = [line for line in table.splitlines() if line.startswith("###")]
    assert titles == ["### bfloat16 (A GPU)", "### float16 (A GPU)", "### bfloat16 (B)"]


def test_a_sum_of_phases_is_of_one_run() -> None:
    few, more = ({"steps": steps} for steps in (6, 12))
    runs = [
        phase_record(phase, done, 9, work=work)
        for work, done in ((few, 1), (more, 3))
        for phase in ("learning", "points")
    ]
    sums = rows_of(report.calibration_tables(report.latest(runs)), "sum")
    assert [row[5] for row in sums] == ["4.0", "12.0"]
    later = {**runs[0], "date": "2026-03-01T00:00:00+00:00"}
    mixed = report.latest([*runs[:2], later])
    assert len(mixed) == 2
    assert not rows_of(report.calibration_tables(mixed), "sum")


@pytest.mark.parametrize("kind", report.KINDS)
def test_every_kind_is_compared_by_a_figure_or_said_not_to_be(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = report.KINDS[kind].figures
    record = one_of(kind)
    old = save(tmp_path / "old.jsonl", [record])
    if not figures:
        assert report.main(["compare", str(old), str(old)]) == 1
        assert (
            f"not compared, as a loss goes with a share skipped: {kind}" in capsys.readouterr().err
        )
        return
    for figure in figures:
        value = record[figure.field]
        worse = 0.5 if figure.more_is_better else 2.0
        changed = (
            {name: worse * each for name, each in value.items()}
            if isinstance(value, dict)
            else worse * value
        )
        after = [{**record, figure.field: changed}]
        if figure is not figures[0]:  # a first one that both have comes before
            after[0][figures[0].field] = {}
        ((ratio, what, a, b),) = report.compare([record], after)
        assert ratio == pytest.approx(0.5)
        assert what.startswith(kind)
        assert a != b
    assert report.main(["compare", str(old), str(old)]) == 0


def test_adding_that_is_interrupted_leaves_the_records_as_they_were(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    kept = save(results / "attention.jsonl", records)
    before = kept.read_bytes()
    new = save(tmp_path / "new.jsonl", [attention_record(seqlen=1024)])

    def full(*_: object) -> None:
        raise OSError("no space left on the device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        report.add([new], results)
    assert kept.read_bytes() == before
    assert list(results.iterdir()) == [kept]


def test_a_kind_without_a_report_is_refused(tmp_path: Path) -> None:
    assert {*FIELDS} - {*report.KINDS} == {"extension"}
    path = ROOT / "benchmarks" / "extend" / "smollm2-135m-instruct-32k" / "check.jsonl"
    with pytest.raises(ValueError, match="got 'extension'"):
        report.add([path], tmp_path)


def test_the_overhead_record_goes_into_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead, "host_microseconds", lambda *_: 1.5)
    out = tmp_path / "new" / "overhead.jsonl"
    assert overhead.main(["--device", "cpu", "--out", str(out)]) == 0
    (record,) = read_records(out)
    assert record["host_microseconds"]["torch.empty_like"] == 1.5
    assert record["self_test"]
