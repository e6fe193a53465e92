# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The documents agree with the tree: links, paths, figures that cite a record, the example.

A table whose figures are from records says so in a comment above it, a line each for the rows::

    <!-- records FILE: FIELD by COLUMN where NAME=VALUE NAME=VALUE
    "LABEL": NAME=VALUE
    "LABEL": NAME=VALUE -->

FILE is in ``benchmarks/results``. Each cell of such a row must be FIELD of the one record that has
these values, those of all rows and its own, and in COLUMN what the head of the table says; both may
be a path such as ``speedup.fa3``. Where a row is one record, a field a cell is named, in order::

    <!-- records FILE: FIELD, FIELD where NAME=VALUE
    "LABEL": NAME=VALUE -->

Of a list, such as the divergence of each context, the mean counts. A cell is compared to its last
digit.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import ROOT, Record, read_records
from report import RESULTS, current

EXTERNAL = re.compile(r"[a-z]+:")
COMMENT = re.compile(
    r"<!-- records (\S+): (\S+(?:, \S+)*)(?: by (\S+))?(?: where (.+))?\n((?:\".+?\":.*\n?)+)-->"
)
FOLDERS = "docs|benchmarks|packages|thresholds"
NAMED = re.compile(rf"(?<![\w./:-])(?:{FOLDERS})/[\w./-]+\.(?:md|py|toml)\b")
SOURCES = ("*.py", "*.cuh", "*.cu", "*.hpp", "*.cpp", "*.h", "*.yml", "*.cmake")
BUILT = {".cache", ".git", ".nox", ".venv", "build", "dist", "venv"}
LONGEST_LINE = 200


def files(*patterns: str) -> list[Path]:
    """Files of the repository, none in folders that hold what was built or fetched."""
    found = sorted({path for pattern in patterns for path in ROOT.rglob(pattern)})
    return [path for path in found if not BUILT & set(path.relative_to(ROOT).parts[:-1])]


def prose(text: str) -> str:
    """Markdown without fenced code, inline code and comments."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors that the headings of a page have, as GitHub makes them."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.+?)\s*$", text, flags=re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
        anchor = kept.replace(" ", "-")
        again = next(i for i in range(len(found) + 1) if f"{anchor}-{i}" not in found or i == 0)
        found.add(anchor if anchor not in found else f"{anchor}-{again + 1}")
    return found


def broken_links(page: Path) -> Iterator[str]:
    """What is wrong with the relative links of a page."""
    for target in re.findall(r"\]\(<?([^)\s>]+)", prose(page.read_text(encoding="utf-8"))):
        if EXTERNAL.match(target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            yield f"{target}: there is no {name}"
        elif anchor and path.suffix == ".md" and anchor not in anchors(path.read_text("utf-8")):
            yield f"{target}: {path.name} has no heading #{anchor}"


def value_at(record: Record, path: str) -> Any:
    """A field of a record, or None: "speedup.fa3"."""
    value: Any = record
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def same(value: Any, text: str) -> bool:
    """Whether a record's value is what a document writes; 0.5, 0.50 and "0.5" are one."""
    try:
        return float(value) == float(text)
    except (TypeError, ValueError):
        return str(value) == text


def cells(line: str) -> list[str]:
    return [cell.strip().strip("*`") for cell in line.strip().strip("|").split("|")]


def table_below(text: str) -> list[str]:
    """The lines of the first table."""
    found = re.search(r"^\|.*\n(?:\|.*\n?)*", text, re.MULTILINE)
    return found[0].splitlines() if found else ["|"]


def citations(text: str) -> Iterator[tuple[str, str, re.Match[str]]]:
    """Of each row that is cited: its label, what its records have, and the comment."""
    for comment in COMMENT.finditer(text):
        for label, own in re.findall(r'^"(.+?)":(.*)$', comment[5], re.MULTILINE):
            yield label, f"{comment[4] or ''} {own}", comment


def wrong_figures(text: str, results: Path = RESULTS) -> Iterator[str]:
    """What disagrees between the tables of a page and the records that they cite."""
    for label, where, cited in citations(text):
        file, field, column = cited.group(1, 2, 3)
        wanted = dict(part.split("=", 1) for part in shlex.split(where))
        chosen = [
            record
            for record in read_records(results / file)
            if all(same(value_at(record, name), value) for name, value in wanted.items())
        ]
        header, *rows = map(cells, table_below(text[cited.end() :]))
        row = next((row for row in rows if row[0] == label), None)
        if row is None or len(row) != len(header):
            yield f"the table below has no row {label!r} as wide as its head"
            continue
        fields = field.split(", ")
        if column is None and len(fields) != len(row) - 1:
            yield f"{label}: {len(row) - 1} cells, {len(fields)} fields"
            continue
        compared = 0
        for place, (head, cell) in enumerate(list(zip(header, row, strict=True))[1:]):
            matching = [r for r in chosen if column is None or same(value_at(r, column), head)]
            number = re.match(r"[+-]?\d+(?:\.(\d+))?", cell)
            if number is None:
                continue
            compared += 1
            if len(matching) != 1:
                yield f"{label}, {head}: {len(matching)} records in {file}, there must be one"
                continue
            value = value_at(matching[0], fields[place if column is None else 0])
            value = statistics.fmean(value) if isinstance(value, list) else value
            if f"{value:.{len(number[1] or '')}f}" != number[0].lstrip("+"):
                yield f"{label}, {head}: {cell}, the record has {value}"
        if compared == 0:
            yield f"{label}: the row has no figure"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


PAGES = files("*.md")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text("# The `rule`, again\n\n## A\n\n## A\n", encoding="utf-8")
    page = tmp_path / "page.md"
    good = "[a](other.md#the-rule-again) [b](https://x.org/y) `[c](no.md)` [d](other.md#a-1)"
    page.write_text(good, encoding="utf-8")
    assert list(broken_links(page)) == []
    page.write_text(f"{good} [e](none.md) [f](other.md#b) ![g](#here)", encoding="utf-8")
    assert [problem.split(":")[0] for problem in broken_links(page)] == [
        *("none.md", "other.md#b", "#here"),
    ]


def test_paths_that_pages_and_sources_name_exist() -> None:
    sources = [*PAGES, *files(*SOURCES)]
    missing = {
        f"{name_of(path)}: {named}"
        for path in sources
        if "CHANGELOG" not in path.name and path != Path(__file__).resolve()
        for named in NAMED.findall(path.read_text(encoding="utf-8"))
        if not any((base / named).exists() for base in (ROOT, path.parent, path.parent.parent))
    }
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_figures_that_cite_a_record_agree_with_it(page: Path) -> None:
    assert list(wrong_figures(page.read_text(encoding="utf-8"))) == []


def test_some_tables_cite_records() -> None:
    citing = [page for page in PAGES if COMMENT.search(page.read_text(encoding="utf-8"))]
    assert ROOT / "docs" / "performance.md" in citing
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- record") == len(COMMENT.findall(text)), page


def test_a_figure_that_disagrees_is_found() -> None:
    file = RESULTS / "attention.jsonl"
    record = next(r for r in read_records(file) if r["asked"] == "0.5" and "fa3" in r["speedup"])
    names = ("gpu", "kernel", "rule", "geometry", "seqlen", "inputs", "dtype", "head_dim", "heads")
    where = " ".join(shlex.quote(f"{name}={record[name]}") for name in names)

    def table(figure: str, label: str = "ours", head: str = "0.50") -> list[str]:
        comment = f'<!-- records {file.name}: speedup.fa3 by asked where {where}\n"ours": -->'
        rows = f"| x | {head} |\n| --- | --- |\n| {label} | {figure} |\n"
        return list(wrong_figures(f"{comment}\n\n{rows}"))

    right = record["speedup"]["fa3"]
    assert table(f"**{right:.2f}**") == table(f"{right:.3f} (a note)") == []
    assert "the record has" in table(f"{right + 0.01:.2f}")[0]
    assert "no row 'ours'" in table(f"{right:.2f}", label="theirs")[0]
    assert "0 records" in table(f"{right:.2f}", head="0.123")[0]
    assert "no figure" in table("-")[0]


def test_a_row_of_one_record_is_compared_field_by_field() -> None:
    file = RESULTS / "long_text.jsonl"
    record = next(r for r in read_records(file) if r["axis"] == "k")
    names = ("candidate", "seqlen", "asked", "model")
    where = " ".join(shlex.quote(f"{name}={record[name]}") for name in names)

    def row(*cells: str) -> list[str]:
        comment = f'<!-- records {file.name}: kl, speedup.fa3\n"k": {where} -->'
        lines = [f"| x {'| y ' * len(cells)}|", f"| {'--- | ' * (len(cells) + 1)}"]
        return list(wrong_figures("\n".join([comment, "", *lines, f"| k | {' | '.join(cells)} |"])))

    kl, ratio = statistics.fmean(record["kl"]), record["speedup"]["fa3"]
    assert row(f"{kl:.4f}", f"{ratio:.2f}") == row(f"{kl:.4f}", "–") == []
    assert "the record has" in row(f"{kl + 0.01:.4f}", f"{ratio:.2f}")[0]
    assert "1 cells, 2 fields" in row(f"{kl:.4f}")[0]


def test_current_records_are_checked_one_file_a_kind() -> None:
    assert [path.name for path in RESULTS.iterdir() if path.suffix != ".jsonl"] == []
    for path in current():
        assert {record["kind"] for record in read_records(path)} == {path.stem}


def python_examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def has(module: str, name: str) -> bool:
    """Whether a module has an attribute or a submodule of this name."""
    loaded = importlib.import_module(module)
    if hasattr(loaded, name):
        return True
    is_package = hasattr(loaded, "__path__")
    return is_package and importlib.util.find_spec(f"{module}.{name}") is not None


def unknown_names(source: str) -> list[str]:
    """What an example takes from the packages of this repository that they do not have."""
    tree = ast.parse(source)
    modules: dict[str, Any] = {}
    unknown = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("bsfa"):
                    bound = alias.asname or alias.name.partition(".")[0]
                    loaded = importlib.import_module(alias.name)
                    root = importlib.import_module(alias.name.partition(".")[0])
                    modules[bound] = loaded if alias.asname else root
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bsfa"):
            unknown += [a.name for a in node.names if not has(str(node.module), a.name)]
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
            and not hasattr(modules[node.value.id], node.attr)
        ):
            unknown.append(f"{node.value.id}.{node.attr}")
    return unknown


@pytest.mark.parametrize("page", [p for p in PAGES if python_examples(p)], ids=name_of)
def test_python_examples_parse_and_their_names_exist(page: Path) -> None:
    for source in python_examples(page):
        assert unknown_names(source) == []
        for path in re.findall(r"thresholds/[\w./-]+\.safetensors", source):
            assert (ROOT / path).exists()


def test_the_readme_has_an_example() -> None:
    assert any("bsfa_hf" in source for source in python_examples(ROOT / "README.md"))


def test_an_example_with_an_unknown_name_is_found() -> None:
    source = "import bsfa_kernel\nfrom bsfa_calib import ThresholdTable, nothing\nbsfa_kernel.no()"
    assert unknown_names(source) == ["nothing", "bsfa_kernel.no"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_of_prose_are_short(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    prose_lines = [line for line in lines if not line.startswith(("|", "!["))]
    assert [line for line in prose_lines if len(line) > LONGEST_LINE] == []
