# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Tables and plots from result files, and the page of current results.

::

    python benchmarks/report.py                                # records into docs/results.md
    python benchmarks/report.py add new.jsonl                  # new records into the current ones
    python benchmarks/report.py table benchmarks/results/*.jsonl  # to the terminal
    python benchmarks/report.py compare old.jsonl new.jsonl       # two runs, by ratio

Where several records measure the same thing, the latest counts. Records of a self-test are refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bsfa_calib.thresholds import DEFAULT_VOTERS, write_atomically
from bsfa_kernel import DEFAULT_GEOMETRY
from harness import ROOT, Record, progress, read_records, share_text

RESULTS = ROOT / "benchmarks" / "results"

_BASELINES = ("fa3", "vllm", "cudnn", "fa2", "sdpa", "math")
_NAMES = {
    "fa3": "FlashAttention-3",
    "vllm": "vLLM's default back end",
    "cudnn": "cuDNN (torch SDPA)",
    "fa2": "FlashAttention-2 (torch SDPA)",
    "flashinfer": "FlashInfer skip-softmax",
    "bsfa_sm80": "BSFA sm_80",
    "bsfa_sm90": "BSFA sm_90a",
    "sdpa": "torch SDPA",
    "bsfa": "BSFA",
    "math": "torch's plain attention",
    "bsfa_reference": "BSFA's reference back end",
}


class Figure(NamedTuple):
    """What two runs are compared by: a number, or numbers by the name of a dense kernel or call."""

    field: str
    text: str
    more_is_better: bool = False


@dataclass(frozen=True)
class Kind:
    """What was set in a kind of records; all other fields are measured, or say how.

    Args:
        table: what the records of a table have in common.
        row: what tells the measurements of a table apart.
        figures: the first that both have is what two runs are compared by. Losses have none: how
            far one is off says little without the share skipped.
    """

    table: tuple[str, ...]
    row: tuple[str, ...]
    figures: tuple[Figure, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        """What tells measurements apart."""
        return (*self.table, *self.row)

    def line(self, *columns: str) -> tuple[str, ...]:
        """What tells lines of a table apart whose columns are these fields."""
        return tuple(name for name in self.row if name not in columns)


_HOW = ("rule", "geometry", "selection", "voters")
_SHAPE = ("gpu", "dtype", "head_dim", "heads", "kv_heads", "batch", "causal")
_MODEL = ("gpu", "model", "dtype")
_SERVING = (*_MODEL, "vllm", "eager")
_MS = Figure("ms", "{:.3f} ms")
_SPEEDUP = (Figure("speedup", "{:.3f}x {}", more_is_better=True), _MS)
_LONG = Kind(
    (*_MODEL, "lean", "seqlen", "contexts"),
    ("candidate", "axis", "asked", *_HOW, "calibration_contexts"),
)
KINDS = {
    "attention": Kind(
        _SHAPE, ("inputs", "source", "kernel", "seqlen", "asked", *_HOW), figures=_SPEEDUP
    ),
    "select_blocks": Kind(
        _SHAPE,
        ("kernel", "seqlen", "rule", "geometry", "precision", "voters"),
        figures=(Figure("of_dense", "{:.3f} of the time of {}"), _MS),
    ),
    "attend_blocks": Kind(
        _SHAPE,
        ("kernel", "seqlen", "geometry", "asked"),
        figures=(Figure("rate", "{:.3f} of the rate of {}", more_is_better=True), _MS),
    ),
    "prefill": Kind(
        (*_MODEL, "lean"), ("implementation", "seqlen", "asked", *_HOW), figures=_SPEEDUP
    ),
    "serving": Kind(_SERVING, ("implementation", "seqlen", "asked", *_HOW), figures=_SPEEDUP),
    "serving_load": Kind(
        (*_SERVING, "shortest", "seqlen", "answer", "rate", "requests"),
        ("implementation", "asked", *_HOW),
        figures=(Figure("tokens_per_second", "{:.0f} tokens/s", more_is_better=True),),
    ),
    "calibration": Kind(
        ("gpu", "dtype"),
        ("model", "seqlen", "samples", "rule", "geometry", "points"),
        figures=(Figure("ratio", "{:.2f}"),),
    ),
    "calibration_phase": Kind(
        (*_MODEL, "method", "seqlen", "serve_seqlen", "rule", "geometry", "voters", "work"),
        ("phase", "done"),
        figures=(Figure("seconds_each", "{:.2f} s"),),
    ),
    "overhead": Kind(("gpu",), (), figures=(Figure("host_microseconds", "{:.1f} µs {}"),)),
    "thresholds_study": Kind(
        (*_MODEL, "seqlen", "contexts"),
        ("calibration_contexts", "paper_samples", "candidate", "asked"),
    ),
    "selection_study": Kind(
        (*_MODEL, "seqlen", "contexts", "rule", "geometry"), ("voters", "asked")
    ),
    "thresholds_study_summary": Kind(("gpu", "model", "seqlen", "command"), ()),
    "long_text": replace(_LONG, figures=_SPEEDUP),
    "long_tasks": _LONG,
    "evaluation": Kind(
        (*_MODEL, "task", "seqlen"),
        ("keys", "method", "rule", "geometry", "voters", "options", "contexts"),
    ),
}
# The order of rows: what is recommended comes first.
_RULES = ("peak_lse", "running_max", "absolute", "")
_INPUTS = ("model", "irregular", "planted")
DEFAULT = ("peak_lse", str(DEFAULT_GEOMETRY), DEFAULT_VOTERS)
PAPER = ("absolute", "128x64")
# a cell says which sparsity it has where that is further from the one asked for
_LIMIT = "FLOP limit, at its rate"
_SPARSITY_TOLERANCE = 0.01


def current() -> list[Path]:
    """The files of current results."""
    return sorted(RESULTS.glob("*.jsonl"))


def load(paths: Iterable[Path]) -> list[Record]:
    """The latest record of each measurement in the files.

    Raises:
        ValueError: a line is no record, or one of a self-test or of a kind without a report.
    """
    found = []
    for path in paths:
        for record in read_records(path):
            if record["kind"] not in KINDS:
                raise ValueError(
                    f"{path}: reports take records of kind {', '.join(KINDS)}, "
                    f"got {record['kind']!r}"
                )
            _refuse_self_test(record, str(path))
            found.append(record)
    return latest(found)


def latest(records: Iterable[Record]) -> list[Record]:
    """The record of each measurement that counts: the latest.

    Programs write a record again when more is known of it. The records of a run have one date, and
    of those the one that was written last counts.
    """
    found: dict[tuple[object, ...], Record] = {}
    for record in records:
        key = key_of(record)
        if key not in found or record["date"] >= found[key]["date"]:
            found[key] = record
    return list(found.values())


def key_of(record: Record) -> tuple[object, ...]:
    """What a record measures."""
    return (record["kind"], *_values(record, KINDS[record["kind"]].key))


def _values(record: Record, names: Iterable[str]) -> tuple[object, ...]:
    values = (value_of(record, name) for name in names)
    return tuple(str(v) if isinstance(v, list | dict) else v for v in values)


def value_of(record: Record, name: str) -> Any:
    """What was set, in one form: what older records do not say is what it was by default."""
    value = record.get(name)
    if name == "asked" and isinstance(value, str):
        return share_text(value)
    if name == "calibration_contexts" and record["kind"].startswith("long"):
        return value if record.get("rule") else None  # without thresholds, they are for others
    if value is not None:
        return value
    # Records of before blocks were selected in a step of its own do not say how they were.
    absent = {"selection": "exact", "voters": 1} if record.get("rule") else {}
    if record["kind"] == "calibration":
        absent["dtype"] = "bfloat16"
    return absent.get(name)


def told_apart(
    names: Sequence[str], groups: Sequence[Sequence[Record]], fields: Iterable[str]
) -> list[list[str]]:
    """Of groups that have a name in common, their values of the fields in which they differ."""
    found = []
    for name, group in zip(names, groups, strict=True):
        same = [other[0] for text, other in zip(names, groups, strict=True) if text == name]
        differ = [field for field in fields if len({_values(r, (field,)) for r in same}) > 1]
        found.append([said for field in differ if (said := _said(group[0], field))])
    return found


def _said(record: Record, field: str) -> str:
    value = value_of(record, field)
    if isinstance(value, bool):
        return field if value else f"not {field}"
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _refuse_self_test(record: Record, where: str) -> None:
    if record["self_test"]:
        raise ValueError(
            f"{where}: a record of a self-test ({record['command']}) measures nothing; "
            "reports take records of a GPU only"
        )


def attention_tables(records: Sequence[Record], *, self_test: bool = False) -> str:
    """Markdown: the dense kernels' times, then speed-up by sparsity over each of them.

    Args:
        records: of any kind; those of attention count.
        self_test: take records of a self-test too, as the self-test does to show that it ran.

    Raises:
        ValueError: a record is one of a self-test.
    """
    chosen = [record for record in records if record["kind"] == "attention"]
    if not self_test:
        for record in chosen:
            _refuse_self_test(record, "attention")
    parts = []
    for group in _by_importance(grouped(chosen, _SHAPE)):
        ours = [record for record in group if record["rule"] is not None]
        parts.append(f"### {describe(group[0])}")
        parts.extend(
            _speedup_table(ours, baseline, group)
            for baseline in _BASELINES
            if any(baseline in record["speedup"] for record in ours)
        )
        parts.append(_dense_table(group))
        parts.append(provenance(group))
    return "\n\n".join(parts) + ("\n" if parts else "")


def _by_importance(groups: Iterable[list[Record]]) -> list[list[Record]]:
    """Groups, the shape with the most heads first; bfloat16 before float16, long heads first."""
    return sorted(
        groups,
        key=lambda g: (-g[0]["heads"], g[0]["dtype"] != "bfloat16", -g[0]["head_dim"]),
    )


def describe(record: Record) -> str:
    """The shape of a record of attention, in words."""
    mask = "causal" if record["causal"] else "not causal"
    return (
        f"{record['dtype']}, head_dim {record['head_dim']}, {record['heads']} heads, "
        f"{record['kv_heads']} kv heads, batch {record['batch']}, {mask} ({record['gpu']})"
    )


def _dense_table(group: Sequence[Record]) -> str:
    dense = [record for record in group if _is_dense(record)]
    if not dense:
        return "No dense measurements."
    lengths = sorted({record["seqlen"] for record in dense})
    header = ["dense, ms (TFLOP/s)", *(_length(n) for n in lengths)]
    fields = KINDS["attention"].line("asked", "seqlen")
    lines = grouped(dense, fields)
    names = [_row_name(line[0]) for line in lines]
    body = []
    for name, line, further in zip(names, lines, told_apart(names, lines, fields), strict=True):
        cells = {r["seqlen"]: f"{r['ms']:.2f} ({r['tflops']:.0f})" for r in line}
        body.append([", ".join([name, *further]), *(cells.get(n, "") for n in lengths)])
    return markdown_table(header, sorted(body))


def _speedup_table(ours: Sequence[Record], baseline: str, group: Sequence[Record]) -> str:
    """A row for all that is set but the sparsity, which has the columns."""
    others = [record for record in group if record["kernel"] == "flashinfer"]
    chosen = [record for record in (*ours, *others) if baseline in record["speedup"]]
    columns = sorted({value_of(record, "asked") for record in chosen}, key=_sparsity_order)
    title = f"times {_NAMES.get(baseline, baseline)}"
    header = [title, "rule", "blocks", "pattern", "tokens", "chosen", *columns]
    body = []
    for mode in sorted({_mode(record) for record in chosen}):
        limits = [_flop_limit(asked, *mode) for asked in columns]
        body.append([_LIMIT, "", "", "", "", _mode_text(*mode), *limits])
    lines = grouped(chosen, KINDS["attention"].line("asked"))
    for line in sorted(lines, key=lambda line: _row_order(line[0])):
        first = line[0]
        rule, geometry = first["rule"] or "", first["geometry"] or ""
        mark = "**" if _is_default(first) else "*" if (rule, geometry) == PAPER else ""
        pattern = ", ".join(filter(None, (first["inputs"], first.get("source"))))
        how = _mode_text(*_mode(first)) if rule else ""
        cells = {value_of(r, "asked"): _cell(r, r["speedup"][baseline]) for r in line}
        row = [
            f"{mark}{_name(first)}{mark}",
            rule,
            geometry,
            pattern,
            _length(first["seqlen"]),
            how,
        ]
        body.append([*row, *(cells.get(c, "") for c in columns)])
    return markdown_table(header, body)


def _row_order(record: Record) -> tuple[Any, ...]:
    """What is recommended comes first."""
    rule, geometry = record["rule"] or "", record["geometry"] or ""
    return (
        record["kernel"] == "bsfa_sm80",
        _RULES.index(rule),
        geometry != DEFAULT[1],
        _INPUTS.index(record["inputs"]),
        record.get("source") or "",
        record["seqlen"],
        *_mode(record),
        (_name(record), geometry),
    )


def _mode(record: Record) -> tuple[str, int]:
    """From what scores blocks were chosen, and of how many query rows one voted."""
    return value_of(record, "selection") or "exact", value_of(record, "voters") or 1


def _mode_text(selection: str, voters: int) -> str:
    bits = "16 bits" if selection == "exact" else "8 bits"
    return bits if voters == 1 else f"{bits}, 1 in {voters}"


def _cell(record: Record, ratio: float) -> str:
    asked = 0.0 if _is_dense(record) else float(record["asked"])
    if abs(record["sparsity"] - asked) <= _SPARSITY_TOLERANCE:
        return f"{ratio:.2f}"
    return f"{ratio:.2f} (at {record['sparsity']:.2f})"


def _flop_limit(asked: str, selection: str, voters: int) -> str:
    """Of a dense kernel's products, half are scores; those of 8 bits take half the time."""
    share = 0.0 if asked == "dense" else float(asked)
    if selection == "exact" or asked == "dense":
        return f"{1 / (1 - share / 2):.2f}"
    return f"{1 / (1 - share + 0.25 / voters):.2f}"


def name_of(kernel: str) -> str:
    """A kernel's name in words."""
    return _NAMES.get(kernel, kernel)


def _name(record: Record) -> str:
    return name_of(record["kernel"])


def _row_name(record: Record) -> str:
    note = f" ({record['note']})" if record.get("note") else ""
    return f"{_name(record)}, {record['geometry']}" if record["geometry"] else _name(record) + note


def _is_default(record: Record) -> bool:
    _, voters = _mode(record)
    return (record["rule"], record["geometry"], voters) == DEFAULT


def _is_dense(record: Record) -> bool:
    return bool(record["asked"] == "dense")


def _sparsity_order(asked: str) -> float:
    return -1.0 if asked == "dense" else float(asked)


def _length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def provenance(group: Sequence[Record]) -> str:
    """When, with what and how records were measured, folded."""

    def joined(name: str) -> str:
        return ", ".join(sorted({str(record[name]) for record in group if record.get(name)}))

    about = f"Measured {', '.join(sorted({record['date'][:10] for record in group}))}"
    packages = {
        f"{name} {version}"
        for record in group
        for name, version in record.get("packages", {}).items()
        if name != "bsfa-kernel"
    }
    versions = [f"torch {joined('torch')}"]
    versions += [f"CUDA {joined('cuda')}"] if joined("cuda") else []
    versions += [f"driver {joined('driver')}"] if joined("driver") else []
    about += f": {', '.join([*versions, *sorted(packages)])}."
    if joined("sources"):
        about += f" Kernel sources {joined('sources')}."
    commands = map(_folded, sorted({record["command"] for record in group}))
    lines = ["<details><summary>Date, versions, commands</summary>", "", *_wrapped(about), ""]
    return "\n".join([*lines, "```", *commands, "```", "", "</details>"])


def _folded(command: str) -> str:
    """A command in lines that a shell takes as one, broken before options."""
    lines, width = [""], 150
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)


def step_tables(records: Sequence[Record]) -> str:
    """Markdown: select_blocks and attend_blocks alone, beside each dense kernel.

    Raises:
        ValueError: a record is one of a self-test.
    """
    chosen = [record for record in records if record["kind"] in ("select_blocks", "attend_blocks")]
    for record in chosen:
        _refuse_self_test(record, record["kind"])
    parts = []
    for group in _by_importance(grouped(chosen, _SHAPE)):
        parts.append(f"### {describe(group[0])}")
        kinds = {kind: [r for r in group if r["kind"] == kind] for kind in _STEPS}
        for kind, title in _STEPS.items():
            baselines = [b for b in _BASELINES if any(b in r["of_dense"] for r in kinds[kind])]
            if kinds[kind]:
                parts.append(_step_table(kinds[kind], title, baselines))
        parts.append(provenance(group))
    return "\n\n".join(parts) + ("\n" if parts else "")


# What a cell says of the time, for each baseline.
_STEPS = {"select_blocks": "share of its time", "attend_blocks": "rate a block kept"}


def _step_table(records: Sequence[Record], title: str, baselines: Sequence[str]) -> str:
    selecting = records[0]["kind"] == "select_blocks"
    header = [records[0]["kind"], "blocks", "tokens"]
    header += ["rule", "scores"] if selecting else ["kept"]
    header += ["ms", "TFLOP/s", *(f"{_NAMES[b]}: {title}" for b in baselines)]
    body = []
    for record in sorted(records, key=_step_order):
        values = record["of_dense" if selecting else "rate"]
        precision = record.get("precision", "exact")
        which = (
            [record["rule"], _mode_text(precision, record["voters"])]
            if selecting
            else [f"{record['kept']:.3f}"]
        )
        body.append(
            [
                *(_name(record), record["geometry"], _length(record["seqlen"]), *which),
                *(f"{record['ms']:.2f}", f"{record['tflops']:.0f}"),
                *(f"{values[b]:.3f}" if b in values else "" for b in baselines),
            ]
        )
    return markdown_table(header, body)


def _step_order(record: Record) -> tuple[Any, ...]:
    how = (record.get("precision", ""), record.get("voters", 0), -float(record.get("asked", 0)))
    return (
        record["kernel"] == "bsfa_sm80",
        record["geometry"] != DEFAULT[1],
        record["seqlen"],
        *how,
    )


def prefill_tables(records: Sequence[Record]) -> str:
    """Markdown: time to first token, by length.

    Raises:
        ValueError: a record is one of a self-test.
    """
    chosen = [record for record in records if record["kind"] == "prefill"]
    parts = []
    for group in grouped(chosen, KINDS["prefill"].table):
        for record in group:
            _refuse_self_test(record, "prefill")
        baselines = [b for b in _BASELINES if any(b in r["speedup"] for r in group)]
        header = ["tokens", "attention", "blocks skipped", "time to first token, s"]
        header += ["attention's share", *(f"times {_NAMES[b]}" for b in baselines), "peak GiB"]
        group = sorted(group, key=lambda r: (r["seqlen"], _sparsity_order(r["asked"]), r["ms"]))
        body = [
            [
                _length(record["seqlen"]),
                _implementation(record),
                f"{record['sparsity']:.1%}",
                f"{record['ms'] / 1000:.2f}",
                f"{record['attention_ms'] / record['ms']:.0%}",
                *(
                    f"{record['speedup'][b]:.2f}" if b in record["speedup"] else ""
                    for b in baselines
                ),
                f"{record['peak_gib']:.1f}" if "peak_gib" in record else "",
            ]
            for record in group
        ]
        parts += [f"### {_prefill_title(group[0])}", markdown_table(header, body)]
        parts.append(provenance(group))
    return "\n\n".join(parts) + ("\n" if parts else "")


def _prefill_title(record: Record) -> str:
    lean = ", lean" if record["lean"] else ""
    return f"{record['model']}, {record['dtype']}{lean} ({record['gpu']})"


def _serving_title(record: Record) -> str:
    eager = ", eager" if record["eager"] else ""
    return f"{record['model']}, {record['dtype']}, vLLM {record['vllm']}{eager}"


def _implementation(record: Record) -> str:
    name = str(_NAMES.get(record["implementation"], record["implementation"]))
    if not record["geometry"]:
        layers = record.get("layers", {})
        own, every = layers.get(record["implementation"], 0), sum(layers.values())
        return f"{name}, {own} of {every} layers" if own < every else name
    selection = record.get("selection", "exact")
    how = selection if selection == "auto" else _mode_text(selection, 1)
    voters = f", 1 in {record['voters']}" if record.get("voters", 1) > 1 else ""
    return f"{name}, {record['rule']}, {record['geometry']}, {how}{voters}"


def serving_tables(records: Sequence[Record]) -> str:
    """Markdown: time to first token in vLLM, by length, and servers under load.

    Raises:
        ValueError: a record is one of a self-test.
    """
    parts = []
    chosen = [record for record in records if record["kind"] == "serving"]
    for group in grouped(chosen, KINDS["serving"].table):
        for record in group:
            _refuse_self_test(record, "serving")
        baselines = [b for b in _BASELINES if any(b in r["speedup"] for r in group)]
        header = ["tokens", "attention", "blocks skipped", "time to first token, s"]
        header += [f"times {_NAMES[b]}" for b in baselines]
        group = sorted(group, key=lambda r: (r["seqlen"], _sparsity_order(r["asked"]), r["ms"]))
        body = [
            [
                _length(record["seqlen"]),
                _implementation(record),
                f"{record['sparsity']:.1%}",
                f"{record['ms'] / 1000:.3f}",
                *(
                    f"{record['speedup'][b]:.2f}" if b in record["speedup"] else ""
                    for b in baselines
                ),
            ]
            for record in group
        ]
        title = f"### {_serving_title(group[0])} ({group[0]['gpu']})"
        parts += [title, markdown_table(header, body), provenance(group)]
    chosen = [record for record in records if record["kind"] == "serving_load"]
    for group in grouped(chosen, KINDS["serving_load"].table):
        for record in group:
            _refuse_self_test(record, "serving_load")
        first = group[0]
        header = ["attention", "blocks skipped", "tokens a second", "first token, s", "p99, s"]
        body = [
            [
                _implementation(record),
                f"{record['sparsity']:.1%}",
                f"{record['tokens_per_second']:.0f}",
                f"{record['ttft_ms'] / 1000:.2f}",
                f"{record['ttft_p99_ms'] / 1000:.2f}",
            ]
            for record in sorted(group, key=lambda r: _sparsity_order(r["asked"]))
        ]
        lengths = f"{_length(first['shortest'])} to {_length(first['seqlen'])}"
        title = f"### {_serving_title(first)}, under load ({first['gpu']})"
        text = (
            f"{first['requests']} prompts of {lengths} tokens, {first['rate']:g} a second, "
            f"{first['answer']} tokens answered."
        )
        parts += [title, text, markdown_table(header, body), provenance(group)]
    return "\n\n".join(parts) + ("\n" if parts else "")


def calibration_tables(records: Sequence[Record]) -> str:
    """Markdown: time of a calibration beside that of dense prefill passes over the same samples.

    Below it, time and memory of the phases of learned calibrations.

    Raises:
        ValueError: a record is one of a self-test.
    """
    parts = []
    chosen = [record for record in records if record["kind"] == "calibration"]
    for record in chosen:
        _refuse_self_test(record, "calibration")
    header = ["model", "tokens", "samples", "rule", "blocks", "points", "dense passes, s"]
    header += ["calibration, s", "ratio", "peak GiB"]
    for group in grouped(chosen, KINDS["calibration"].table):
        body = [
            [
                record["model"],
                _length(record["seqlen"]),
                str(record["samples"]),
                record["rule"],
                record["geometry"],
                record.get("points", ""),
                f"{record['dense_seconds']:.2f}",
                f"{record['calibration_seconds']:.2f}",
                f"{record['ratio']:.2f}",
                f"{record['peak_gib']:.1f}" if "peak_gib" in record else "",
            ]
            for record in sorted(group, key=lambda r: (r["model"], r["seqlen"], r["rule"]))
        ]
        parts.append(f"### {value_of(group[0], 'dtype')} ({group[0]['gpu']})")
        parts += [markdown_table(header, body), provenance(group)]
    parts += _phase_tables([r for r in records if r["kind"] == "calibration_phase"])
    return "\n\n".join(parts) + ("\n" if parts else "")


def _phase_tables(records: Sequence[Record]) -> list[str]:
    """Parts of a page: a table for each learned calibration, a row for each of its phases."""
    parts = []
    for group in grouped(records, KINDS["calibration_phase"].table):
        for record in group:
            _refuse_self_test(record, "calibration_phase")
        first = group[0]
        lengths = f"{_length(first['seqlen'])}, points found at {_length(first['serve_seqlen'])}"
        parts += [
            f"### {first['model']}, {first['method']} at {lengths} ({first['gpu']})",
            f"{first['rule']}, {first['geometry']}, one voter in {first['voters']}. Measured is "
            "what was done; the\nlast column but one is computed: seconds each, times all that "
            "`bsfa calibrate` does.",
        ]
        header = ["phase", "dtype", "done", "of all", "by the", "seconds", "seconds each"]
        header += ["all, s (computed)", "peak GiB"]
        body = [
            [
                *(record["phase"], record["dtype"], str(record["done"]), str(record["whole"])),
                *(record["unit"], f"{record['seconds']:.1f}", f"{record['seconds_each']:.2f}"),
                f"{record['whole_seconds_estimated']:.0f}",
                f"{record['peak_gib']:.1f}",
            ]
            for record in group
        ]
        if len({record["date"] for record in group}) == 1:  # phases of several runs are no sum
            seconds, every = (
                sum(record[name] for record in group)
                for name in ("seconds", "whole_seconds_estimated")
            )
            peak = max(record["peak_gib"] for record in group)
            total = [f"{seconds:.1f}", "", f"{every:.0f}", f"{peak:.1f}"]
            body.append(["sum, or largest", *[""] * 4, *total])
        parts += [markdown_table(header, body), provenance(group)]
    return parts


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table with its columns aligned."""
    widths = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, body)])


def grouped(records: Sequence[Record], names: Sequence[str]) -> list[list[Record]]:
    """Records that agree in the fields of these names, in the order of their first ones."""
    groups: dict[tuple[object, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[_values(record, names)].append(record)
    return list(groups.values())


def plot_attention(records: Sequence[Record], folder: Path) -> list[Path]:
    """Speed-up against sparsity: one picture a group, one panel a baseline. Returns the files.

    A picture has the length that most lines are of, the longest of several.
    """
    pyplot = load_pyplot()
    files = []
    for name, ours, lines in _attention_pictures(records):
        lengths = Counter(line[0]["seqlen"] for line in lines)
        length = max(lengths, key=lambda seqlen: (lengths[seqlen], seqlen))
        lines = [line for line in lines if line[0]["seqlen"] == length]
        # What was timed beside one or two points alone is for the table.
        baselines = [
            b for b in _BASELINES if any(sum(b in r["speedup"] for r in x) > 2 for x in lines)
        ]
        if not baselines:
            continue
        figure, axes = pyplot.subplots(
            *(1, len(baselines)),
            figsize=(5 * len(baselines), 5.6),
            squeeze=False,
            sharex=True,
            layout="constrained",
        )
        shares = [i / 100 for i in range(101)]
        for axis, baseline in zip(axes[0], baselines, strict=True):
            for line in sorted(lines, key=lambda x: _row_name(x[0])):
                compared = [r for r in line if baseline in r["speedup"]]
                dense, points = (
                    sorted((r["sparsity"], r["speedup"][baseline]) for r in compared if test(r))
                    for test in (_is_dense, lambda r: not _is_dense(r))
                )
                if not points:  # this baseline was not in the line's run
                    continue
                rule = f", {line[0]['rule']}" if line[0]["rule"] is not None else ""
                (drawn,) = axis.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=3,
                    linewidth=3 if _is_default(line[0]) else 1.2,
                    label=f"{_row_name(line[0])}{rule}, {_mode_text(*_mode(line[0]))}",
                )
                if dense:  # a kernel that is told to keep everything need not vote
                    axis.plot(*zip(*dense, strict=True), "D", color=drawn.get_color(), mfc="none")
            for mode in sorted({_mode(record) for record in ours}) if baseline != "fa2" else ():
                limits = [float(_flop_limit(f"{share}", *mode)) for share in shares]
                axis.plot(shares, limits, "--", color="grey", lw=0.8, label=_LIMIT)
            axis.axhline(1.0, color="grey", lw=0.8)
            axis.set(
                xlabel="share of the blocks skipped",
                ylabel=f"times {_NAMES.get(baseline, baseline)}",
            )
            axis.set_ylim(0, 1.1 * max(r["speedup"].get(baseline, 0) for x in lines for r in x))
            axis.grid(alpha=0.3)
        named: dict[str, Any] = {}
        for axis in axes[0]:
            named |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        figure.legend(named.values(), named, fontsize=7, loc="outside lower center", ncols=2)
        first = ours[0]
        inputs = f"{first['inputs']} inputs"
        if first.get("source"):
            inputs += f" ({first['source']})"
        title = f"{describe(first)}, {_length(length)} tokens, {inputs}"
        figure.suptitle(title, fontsize=9)
        files.append(save(figure, folder / f"{name}.png"))
    return files


def _attention_pictures(
    records: Sequence[Record],
) -> Iterator[tuple[str, list[Record], list[list[Record]]]]:
    """Of each picture its name, and the records and lines that are drawn."""
    fields = (*KINDS["attention"].table, "inputs", "source")
    chosen = [
        record
        for record in records
        if record["kind"] == "attention"
        and record["speedup"]
        and (record["rule"] or record["kernel"] == "flashinfer")
    ]
    drawn = []
    for ours in grouped(chosen, fields):
        lines = grouped(ours, KINDS["attention"].line("asked"))
        if lines := [x for x in lines if len({value_of(r, "asked") for r in x}) > 2]:
            drawn.append((ours, lines))
    groups = [ours for ours, _ in drawn]
    names = [
        f"attention-{r['dtype']}-d{r['head_dim']}-h{r['heads']}-{r['kv_heads']}-b{r['batch']}"
        f"-{r['inputs']}{'' if any(one['rule'] == 'absolute' for one in ours) else '-relative'}"
        for ours in groups
        for r in ours[:1]
    ]
    further = told_apart(names, groups, fields)
    for name, more, (ours, lines) in zip(names, further, drawn, strict=True):
        yield "-".join([name, *map(slug, more)]), ours, lines


def slug(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def plot_prefill(records: Sequence[Record], folder: Path) -> list[Path]:
    """Time to first token against length, one picture a table. Returns the files."""
    pyplot = load_pyplot()
    files = []
    chosen = [record for record in records if record["kind"] == "prefill"]
    for group in grouped(chosen, KINDS["prefill"].table):
        figure, axis = pyplot.subplots(figsize=(6, 4.2))
        for line in grouped(group, KINDS["prefill"].line("seqlen")):
            points = sorted((r["seqlen"] / 1024, r["ms"] / 1000) for r in line)
            asked = line[0]["asked"]
            label = _implementation(line[0]) + ("" if asked == "dense" else f", {asked} skipped")
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set(xlabel="prompt, thousands (1024) of tokens", ylabel="time to first token, s")
        title = _prefill_title(group[0])
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        name = "-".join("".join(c if c.isalnum() or c in "-." else " " for c in title).split())
        files.append(save(figure, folder / f"prefill-{name}.png"))
    return files


def load_pyplot() -> Any:
    """matplotlib's, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> Path:
    """Write a picture, and forget the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    # Without the writer's version and the date, equal data gives equal files.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    load_pyplot().close(figure)
    return path


def overhead_tables(records: Sequence[Record]) -> str:
    """Markdown: host time of a call.

    Raises:
        ValueError: a record is one of a self-test.
    """
    parts = []
    for record in records:
        if record["kind"] == "overhead":
            _refuse_self_test(record, "overhead")
            body = [[name, f"{us:.1f}"] for name, us in record["host_microseconds"].items()]
            parts += [markdown_table(["call", "host time, µs"], body), provenance([record])]
    return "\n\n".join(parts) + ("\n" if parts else "")


def add(files: Iterable[Path], results: Path = RESULTS, *, drop: Sequence[str] = ()) -> list[Path]:
    """Take records over into the current ones: one file a kind, the latest of each measurement.

    Args:
        files: new records.
        results: the folder of the current ones.
        drop: builds, by the hash of their kernel sources, whose records go.

    Returns:
        The files written.

    Raises:
        ValueError: a line is no record, or one of a self-test.
    """
    kinds: dict[str, list[Record]] = defaultdict(list)
    current = sorted(results.glob("*.jsonl"))
    before = {key_of(record): record.get("repetitions", 0) for record in load(current)}
    for record in load([*current, *files]):
        repetitions = record.get("repetitions", 0)
        if repetitions < before.get(key_of(record), 0):
            progress(
                f"{repetitions} repetitions replace more: {' '.join(map(str, key_of(record)))}"
            )
        # A summary of a study follows from the study's records.
        if record["sources"] not in drop and record["kind"] != "thresholds_study_summary":
            kinds[record["kind"]].append(record)
    written = []
    for kind, records in sorted(kinds.items()):
        path = results / f"{kind}.jsonl"
        lines = [json.dumps(_rounded(record), ensure_ascii=False) for record in records]
        write_atomically(path, ("\n".join(lines) + "\n").encode())
        written.append(path)
    for path in set(results.glob("*.jsonl")) - set(written):
        path.unlink()
    return written


def _rounded(value: Any) -> Any:
    """The same with six significant digits, more than any measurement has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def compare(old: Sequence[Record], new: Sequence[Record]) -> list[tuple[float, str, str, str]]:
    """What two runs have in common, and how they differ.

    Speed-ups are compared over the first dense kernel that both have, which a change of card or
    clocks leaves alone.

    Returns:
        (new over old, what, old, new) of each figure, the worst first; below 1 is worse.
    """
    before = {key_of(record): record for record in old}
    rows = []
    for record in new:
        key = key_of(record)
        if (other := before.get(key)) is None:
            continue
        what = " ".join(
            [record["kind"], *(str(part) for part in key[1:] if part not in (None, ""))]
        )
        for figure, name, a, b in _shared(other, record):
            ratio = b / a if figure.more_is_better else a / b
            rows.append((ratio, what, figure.text.format(a, name), figure.text.format(b, name)))
    return sorted(rows)


def _shared(old: Record, new: Record) -> list[tuple[Figure, str, float, float]]:
    """The figure that two records are compared by, with its name and values."""
    for figure in KINDS[new["kind"]].figures:
        a, b = (record.get(figure.field) for record in (old, new))
        if isinstance(a, dict) and isinstance(b, dict):
            names = [name for name in a if name in b]
            names = [name for name in _BASELINES if name in names][:1] or names
            if names:
                return [(figure, name, a[name], b[name]) for name in names]
        elif a is not None and b is not None:
            return [(figure, "", a, b)]
    return []


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Tables and plots from result files.")
    commands = parser.add_subparsers(dest="command")
    writer = commands.add_parser("write", help="write the page of current results")
    writer.add_argument("--docs", type=Path, default=ROOT / "docs" / "results.md")
    writer.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    adder = commands.add_parser("add", help="take records over into benchmarks/results")
    adder.add_argument("files", nargs="*", type=Path)
    adder.add_argument(
        "--drop",
        nargs="+",
        default=[],
        metavar="SOURCES",
        help="drop the records of these builds, which the page names by a hash",
    )
    table = commands.add_parser("table", help="print the tables")
    table.add_argument("files", nargs="+", type=Path)
    comparer = commands.add_parser("compare", help="compare two runs by ratio")
    comparer.add_argument("old", type=Path)
    comparer.add_argument("new", type=Path)
    comparer.add_argument(
        "--tolerance",
        type=float,
        default=0.05,
        help="exit with 1 where a figure is worse by more than this share (default %(default)s)",
    )
    arguments = parser.parse_args(argv or sys.argv[1:] or ["write"])
    try:
        if arguments.command == "compare":
            old, new = load([arguments.old]), load([arguments.new])
            rows = compare(old, new)
            losses = sorted({r["kind"] for r in [*old, *new] if not KINDS[r["kind"]].figures})
            if losses:
                progress(f"not compared, as a loss goes with a share skipped: {', '.join(losses)}")
            if not rows:
                progress("the files have no measurement with a figure to compare in common")
                return 1
            header = ["new over old", "measurement", "old", "new"]
            print(markdown_table(header, [[f"{r:.3f}", *rest] for r, *rest in rows]))
            return 1 if rows[0][0] < 1 - arguments.tolerance else 0
        if arguments.command == "add":
            for path in add(arguments.files, drop=arguments.drop):
                print(path)
            return 0
        files = arguments.files if arguments.command == "table" else current()
        records = load(files)
        if arguments.command == "write":
            import page

            for path in page.write(records, arguments.docs, arguments.images):
                print(path)
            return 0
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    else:
        kinds = (attention_tables, step_tables, prefill_tables, serving_tables)
        for tables in (*kinds, calibration_tables):
            print(tables(records), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
