# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The page of current results is what the records give."""

from pathlib import Path
from typing import Any

import pytest

import evaluation
import page
import report
from conftest import attention_record
from harness import ROOT, check_record

DOCS, IMAGES = ROOT / "docs" / "results.md", ROOT / "docs" / "images"
UPDATE = "python benchmarks/report.py"


@pytest.fixture(scope="module")
def current() -> list[dict[str, Any]]:
    return report.load(report.current())


@pytest.fixture(scope="module")
def written(current: list[dict[str, Any]]) -> str:
    return page.text(current, page.picture_names(DOCS, IMAGES))


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


def test_writing_draws_pictures_and_deletes_those_of_before(tmp_path: Path) -> None:
    docs, images = tmp_path / "docs" / "results.md", tmp_path / "docs" / "images"
    images.mkdir(parents=True)
    (images / "attention-old.png").touch()
    (images / "logo.png").touch()
    records = [
        attention_record(asked=asked, sparsity=float(asked)) for asked in ("0", "0.5", "0.9")
    ]
    picture, page_path = page.write(records, docs, images)
    assert page_path == docs
    assert f"(images/{picture.name})" in docs.read_text(encoding="utf-8")
    assert {path.name for path in images.iterdir()} == {picture.name, "logo.png"}


def test_a_study_is_one_table_over_cards_and_marks_the_default() -> None:
    def record(candidate: str, gpu: str, asked: float, kl: float) -> dict[str, Any]:
        about = {"model": "m", "dtype": "float16", "seqlen": 4096, "contexts": ["a", "b"]}
        made_with = {"torch": "2", "date": "2026-01-02", "command": "c", "sources": ""}
        figures = {"sparsity": [asked] * 2, "kl": [kl] * 2, "nll_change": [0.0] * 2}
        one = {**about, **made_with, **figures, "gpu": gpu, "asked": asked}
        return {**one, "kind": "thresholds_study", "candidate": candidate}

    ours, paper = "4k-learned-128x64-1in4.safetensors", "absolute top-k 128x64"
    records = [
        record(name, gpu, asked, kl)
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
    other = {**record(ours, "B", 0.6, 0.01), "contexts": ["a", "c"]}
    assert page.study_tables([*records, other]).count("### ") == 2


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


def test_an_evaluation_without_dense_or_of_another_format_is_refused() -> None:
    sparse = [r for r in evaluated()["records"] if r["configuration"] == "x"]
    with pytest.raises(ValueError, match="dense"):
        evaluation.condense(evaluated(records=sparse), date="d", command="c")
    with pytest.raises(ValueError, match="format"):
        evaluation.condense(evaluated(format="other"), date="d", command="c")
