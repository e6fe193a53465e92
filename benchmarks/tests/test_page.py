# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The page of current results is what the records give."""

import re
from pathlib import Path
from typing import Any

import pytest

import evaluation
import page
import report
from conftest import attention_record
from harness import ROOT, check_record, run_program
from study import curves

DOCS = ROOT / "docs" / "results.md"
UPDATE = "python benchmarks/report.py"


@pytest.fixture(scope="module")
def current() -> list[dict[str, Any]]:
    return report.load(report.current())


@pytest.fixture(scope="module")
def written(current: list[dict[str, Any]]) -> str:
    return page.text(current, page.linked(DOCS))


def test_the_page_is_what_the_records_give(written: str) -> None:
    assert DOCS.read_text(encoding="utf-8") == written, UPDATE


def test_a_changed_record_would_change_the_page(current: list[dict[str, Any]]) -> None:
    chosen = [record for record in current if record["kind"] == "evaluation"]
    assert {record["task"] for record in chosen} == {"text", "needle"}
    sparse = next(r for r in chosen if r["task"] == "needle" and r["method"] != "dense")
    changed = {**sparse, "hits": ["0" * len(hits) for hits in sparse["hits"]]}
    others = [record for record in chosen if record is not sparse]
    assert page.text([*others, changed]) != page.text(chosen)


def test_every_kind_has_a_section(current: list[dict[str, Any]], written: str) -> None:
    for kind in ("Speed", "Time to first token", "equal loss", "Needles", "calibration", "Host"):
        assert any(line.startswith("## ") and kind in line for line in written.splitlines()), kind
    assert "## Needles" not in page.text([r for r in current if r.get("task") == "text"])


def test_prose_lines_are_short(written: str) -> None:
    fenced = False
    for line in written.splitlines():
        fenced ^= line.startswith("```")
        assert fenced or line.startswith(("|", "![", "###")) or len(line) <= 120


def some(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_writing_draws_pictures_and_deletes_only_those_that_the_page_had(tmp_path: Path) -> None:
    docs, images = tmp_path / "docs" / "results.md", tmp_path / "docs" / "images"
    images.mkdir(parents=True)
    docs.write_text("![old](images/attention-old.png)\n![far](../far.png)\n")
    foreign = {"logo.png", "long-holiday.png", "accuracy-text-512.png"}
    for path in (
        *(images / name for name in foreign | {"attention-old.png"}),
        tmp_path / "far.png",
    ):
        path.touch()
    records = [
        attention_record(asked=asked, sparsity=float(asked)) for asked in ("0", "0.5", "0.9")
    ]
    picture, page_path = page.write(records, docs, images)
    assert page_path == docs
    assert page.linked(docs) == [f"images/{picture.name}"]
    assert some(images) == {picture.name, *foreign}
    assert (tmp_path / "far.png").exists()
    others = [{**record, "gpu": gpu} for gpu in ("B GPU", "C GPU") for record in records]
    written = page.write(others, docs, images)
    assert some(images) == {*(path.name for path in written[:-1]), *foreign}
    assert len(written) == 3


def test_what_cannot_be_drawn_leaves_page_and_pictures_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs, images = tmp_path / "results.md", tmp_path / "images"
    records = [
        attention_record(asked=asked, sparsity=float(asked)) for asked in ("0", "0.5", "0.9")
    ]
    page.write(records, docs, images)
    before = docs.read_bytes(), some(images)
    # Names that differ in what files' names do not take.
    alike = [{**record, "gpu": gpu} for gpu in ("A-1", "A 1") for record in records]
    with pytest.raises(ValueError, match=r"name of its own.*planted-A-1\.png"):
        page.write(alike, docs, images)
    monkeypatch.setattr(report, "plot_prefill", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page.write([{**record, "gpu": "B"} for record in records], docs, images)
    assert (docs.read_bytes(), some(images)) == before


@pytest.mark.parametrize(
    "change",
    [
        *({"gpu": "B"}, {"dtype": "float16"}, {"head_dim": 64}, {"heads": 16}, {"kv_heads": 4}),
        *({"batch": 2}, {"causal": False}, {"inputs": "irregular"}, {"source": "M, layer 3"}),
    ],
)
def test_groups_of_attention_have_pictures_of_their_own(
    change: dict[str, Any], tmp_path: Path
) -> None:
    records = [
        attention_record(asked=asked, sparsity=float(asked)) for asked in ("0", "0.5", "0.9")
    ]
    files = page.draw_pictures([*records, *({**r, **change} for r in records)], tmp_path)
    assert len({path.name for path in files}) == 2
    assert some(tmp_path) == {path.name for path in files}


def test_intervals_do_not_depend_on_the_order_of_records(
    current: list[dict[str, Any]], written: str
) -> None:
    tables = page.text([*reversed(current)])
    assert sorted(line for line in tables.splitlines() if line.endswith("%] |")) == sorted(
        line for line in written.splitlines() if line.endswith("%] |")
    )


def study_record(candidate: str, gpu: str, asked: float, kl: float) -> dict[str, Any]:
    about = {"model": "m", "dtype": "float16", "seqlen": 4096, "contexts": ["a", "b"]}
    made_with = {"torch": "2", "date": "2026-01-02", "command": "c", "sources": ""}
    figures = {"sparsity": [asked] * 2, "kl": [kl] * 2, "nll_change": [0.0] * 2}
    one = {**about, **made_with, **figures, "gpu": gpu, "asked": asked}
    return {**one, "kind": "thresholds_study", "candidate": candidate}


def test_a_study_is_one_table_over_cards_and_marks_the_default() -> None:
    ours, paper = "4k-learned-128x64-1in4.safetensors", "absolute top-k 128x64"
    records = [
        study_record(name, gpu, asked, kl)
        for name, gpu, first in ((paper, "A", 0.3), (ours, "B", 0.6))
        for asked, kl in ((first, 0.005), (first + 0.2, 0.05))
    ]
    shown = page.study_tables(records)
    assert "### 4096 tokens, 2 contexts: m, float16 (A and B)" in shown
    (row,) = [line for line in shown.splitlines() if "(default)" in line]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[1] == "**peak_lse, learned, 128x64, one row in 4 votes (default)**"
    assert cells[2] == "0.660 [0.660, 0.660]"
    assert cells[3] == "0.300 [0.300, 0.300]"
    other = {**study_record(ours, "B", 0.6, 0.01), "contexts": ["a", "c"]}
    assert page.study_tables([*records, other]).count("### ") == 2


def test_candidates_without_a_place_come_last_by_their_own_name(tmp_path: Path) -> None:
    names = ["peak_lse head by effect 128x64", "absolute top-k 128x64", "a new one"]
    records = [
        study_record(name, "A", asked, kl)
        for name in names
        for asked, kl in ((0.3, 0.005), (0.5, 0.05))
    ]
    rows = [line.split("|")[1].strip() for line in page.study_tables(records).splitlines()[4:7]]
    assert rows == ["*absolute, k blocks, 128x64 (the paper's)*", "a new one", names[0]]
    others = [{**record, "dtype": "bfloat16"} for record in records]
    files = page.draw_pictures([*records, *others], tmp_path)
    assert [path.name for path in files] == [
        *("accuracy-4096-bfloat16.png", "accuracy-4096-float16.png"),
    ]


def test_candidates_of_long_in_several_settings_are_named_apart(
    current: list[dict[str, Any]],
) -> None:
    group = next(
        group
        for group in curves.texts(current)
        if any(record.get("selection") == "auto" for record in group)
    )
    others = [
        {**record, **change}
        for record in group
        for change in ({"selection": "int8"}, {"calibration_contexts": ["x@0", "y@0"]})
        if record["candidate"].startswith("peak_lse, one scalar")
    ]
    assert others
    every = report.latest([*group, *others])
    assert len(every) == len(group) + len(others)
    rows = [line.split("|")[1].strip() for line in page.text(every).splitlines() if "|" in line]
    named = {row for row in rows if row.startswith("peak_lse, one scalar")}
    assert any(", int8, " in row for row in named)
    assert any(row.endswith(", auto, x@0 and y@0") for row in named)
    assert not named & {record["candidate"] for record in others}


def bands(kl: float, nll: float) -> list[dict[str, Any]]:
    return [
        {"positions": 1, "kl": 3 * kl, "nll": nll},
        {"positions": 2, "kl": 0.0, "nll": nll},
    ]


def evaluated(**changes: Any) -> dict[str, Any]:
    cell = {"length": 4096, "kind": "code", "sparsity": 0.0}
    text = {**cell, "task": "text", "sample": "code/a.txt@0 abc", "bands": bands(0.0, 2.0)}
    needles = [
        {
            **cell,
            "task": "needle",
            "keys": 1,
            "depth": depth,
            "hit": depth > 0,
            "sample": f"1 keys, depth {depth:g}, seed 0, abc",
        }
        for depth in (1.0, 0.0, 0.5)
    ]
    dense = [{**record, "configuration": "dense"} for record in (text, *needles)]
    chosen = {"sparse_calls_by_selection": {"exact": 0, "int8": 2}}
    sparse = [
        {**record, "configuration": "x", "sparsity": 0.5, **chosen} for record in (text, *needles)
    ]
    sparse[0]["bands"] = bands(0.25, 2.5)
    methods = {
        "dense": {"kind": "dense", "options": {}, "geometry": "128x64"},
        "x": {
            "kind": "scalar",
            "options": {"rule": "peak_lse"},
            "rule": "peak_lse",
            "geometry": "64x64",
            "voters": 4,
        },
    }
    made_with = {"device": "A GPU", "dtype": "float16", "backend": "native", "torch": "2.11.0"}
    header = {"model": {"name": "m"}, "configurations": methods, "environment": made_with}
    records = [*dense, *sparse]
    return {"format": "bsfa-evaluation", "header": header, "records": records, **changes}


def test_an_evaluation_is_condensed_by_context() -> None:
    found = evaluation.condense(evaluated(), date="2026-01-02", command="bsfa evaluate")
    for record in found:
        check_record(record)
    text = next(r for r in found if r["task"] == "text" and r["method"] == "scalar")
    assert text["contexts"] == ["code/a.txt@0"]
    assert (text["kl"], text["nll_change"], text["sparsity"]) == ([0.25], [0.5], [0.5])
    needle = next(r for r in found if r["task"] == "needle" and r["method"] == "scalar")
    assert needle["contexts"] == ["code, seed 0, abc"]
    assert needle["hits"] == ["011"]
    assert (needle["rule"], needle["voters"]) == ("peak_lse", 4)
    assert needle["sparse_calls_by_selection"] == {"exact": 0, "int8": 6}
    assert "| peak_lse, one scalar, 64x64, 1 in 4, 8 bits |" in page.text_tables(found)
    tables = page.needle_tables(found)
    assert "2 of 3 (dense 2)" in tables
    assert "100.0%" in tables


def labelled(method: str, options: dict[str, str], **changes: Any) -> str:
    record = {
        "method": method,
        "options": options,
        "rule": "peak_lse",
        "geometry": "128x64",
        "voters": 4,
        "sparsity": [0.5],
        **changes,
    }
    return page._label(record).text


def test_rows_are_labelled_from_what_the_records_say() -> None:
    table = {"file": "a/mine.safetensors", "selection": "auto"}
    learned = {**table, "target_sparsity": "0.65"}
    assert (
        labelled("table", learned) == "**peak_lse, mine, 128x64, 1 in 4, target_sparsity = 0.65**"
    )
    point = {**table, "point": "target_sparsity=0.65"}
    assert labelled("table", point) == labelled("table", learned)
    bound = {**table, "max_loss": "0.01"}
    assert labelled("table", bound, geometry="64x64") == (
        "peak_lse, mine, 64x64, 1 in 4, max_loss = 0.01"
    )
    assert labelled("table", bound, voters=1) == "peak_lse, mine, 128x64, max_loss = 0.01"
    assert labelled("table", bound, rule="running_max", voters=2) == (
        "running_max, mine, 128x64, 1 in 2, max_loss = 0.01"
    )
    both = {"exact": 3, "int8": 4}
    assert labelled("table", bound, sparse_calls_by_selection=both) == (
        "**peak_lse, mine, 128x64, 1 in 4, 16 and 8 bits, max_loss = 0.01**"
    )
    blocks = {**table, "k": "12"}
    assert labelled("table", blocks) == "peak_lse, k = 12, 128x64, 1 in 4"
    paper = {"rule": "absolute", "voters": 1}
    assert labelled("table", blocks, **paper) == "*absolute, k = 12, 128x64 (the paper's)*"
    assert labelled("sliding_window", {"window": "64"}, rule="") == "sliding window of 64 keys"
    assert labelled("sparge_attn", {"topk": "0.5"}, rule="") == "sparge_attn, topk = 0.5"


def test_evaluations_by_other_voters_are_others(current: list[dict[str, Any]]) -> None:
    record = next(r for r in current if r["kind"] == "evaluation" and r["method"] == "scalar")
    assert report.key_of(record) != report.key_of({**record, "voters": 2})


def test_an_evaluation_without_dense_or_on_two_texts_is_refused() -> None:
    sparse = [r for r in evaluated()["records"] if r["configuration"] == "x"]
    with pytest.raises(ValueError, match="must share samples with dense"):
        evaluation.condense(evaluated(records=sparse), date="d", command="c")
    more = [{**record, "text": "another"} for record in evaluated()["records"]]
    with pytest.raises(ValueError, match="on one text, or one part of it, got 2"):
        evaluation.condense(
            evaluated(records=[*evaluated()["records"], *more]), date="d", command="c"
        )


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff", b'{"format": "other"}'], ids=str)
def test_what_is_no_file_of_results_is_told_in_a_line(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "records.jsonl"
    with pytest.raises(SystemExit) as left:
        run_program(lambda: evaluation.main([str(path), "--command", "c", "--out", str(out)]))
    assert left.value.code == 2
    assert re.match(r".*: error: .*results\.json.*\n$", capsys.readouterr().err)
    assert not out.exists()


def test_contexts_are_told_apart_by_the_whole_of_their_names() -> None:
    records = evaluated()["records"]
    for record in records:
        if record["task"] == "text":
            record["sample"] = "code/my file.txt@0 abc"
    found = evaluation.condense(evaluated(records=records), date="d", command="c")
    assert {tuple(r["contexts"]) for r in found if r["task"] == "text"} == {("code/my file.txt@0",)}


@pytest.mark.parametrize("lacks", ["x", "dense"])
def test_hits_are_compared_at_the_depths_that_both_have(lacks: str) -> None:
    records = [
        {**record, "hit": True} if record["task"] == "needle" else record
        for record in evaluated()["records"]
        if (record["configuration"], record.get("depth")) != (lacks, 0.5)
    ]
    found = evaluation.condense(evaluated(records=records), date="2026-01-02", command="c")
    assert "2 of 2 (dense 2)" in page.needle_tables(found)
    assert "| 100.0% [" in page.needle_tables(found)
    # Dense may be of another file, and at as many other depths.
    others = [
        {**record, "depths": [[0.0, 0.25, 1.0]], "hits": ["011"]}
        if record["method"] == "dense" and record["task"] == "needle"
        else record
        for record in evaluation.condense(evaluated(), date="2026-01-02", command="c")
    ]
    assert "1 of 2 (dense 1)" in page.needle_tables(others)


def test_records_of_before_depths_were_named_are_of_the_six(
    current: list[dict[str, Any]],
) -> None:
    old = [r for r in current if r["kind"] == "evaluation" and r["task"] == "needle"]
    assert any("depths" not in record for record in old)
    for record in old:
        depths = ",".join(f"{depth:g}" for depth in page._DEPTHS)
        assert "depths" in record or f"--depths {depths}" in record["command"]
