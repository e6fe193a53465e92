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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bsfa_calib.thresholds import DEFAULT_VOTERS
from bsfa_kernel import DEFAULT_GEOMETRY
from harness import ROOT, Record, progress, read_records

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
# What makes two attention records comparable: one table.
_SHAPE = ("gpu", "dtype", "head_dim", "heads", "kv_heads", "batch", "causal")
_GROUP = (*_SHAPE, "inputs", "source")
_LONG = (*("gpu", "model", "dtype", "lean", "seqlen", "candidate", "axis", "asked", "contexts"),)
_HOW = ("rule", "geometry", "selection", "voters")
# What the records of a table have in common.
_PREFILL = ("gpu", "model", "dtype", "lean")
_SERVING = ("gpu", "model", "dtype", "vllm", "eager")
_LOAD = (*_SERVING, "shortest", "seqlen", "answer", "rate")
_LEARNED = (*("gpu", "model", "method", "seqlen", "serve_seqlen", "rule", "geometry", "voters"),)
_KEYS = {
    "attention": (
        *(*_GROUP, "kernel", "seqlen", "asked", "rule", "geometry"),
        *("selection", "voters"),
    ),
    "select_blocks": (*_SHAPE, "kernel", "seqlen", "rule", "geometry", "precision", "voters"),
    "attend_blocks": (*_SHAPE, "kernel", "seqlen", "geometry", "asked"),
    "prefill": (*_PREFILL, "implementation", "seqlen", "asked", *_HOW),
    "serving": (*_SERVING, "implementation", "seqlen", "asked", *_HOW),
    "serving_load": (*_LOAD, "implementation", "asked", *_HOW),
    "calibration": ("gpu", "model", "seqlen", "samples", "rule", "geometry", "points"),
    "calibration_phase": (*_LEARNED, "phase"),
    "overhead": ("gpu",),
    "thresholds_study": (
        *("gpu", "model", "dtype", "seqlen", "contexts", "calibration_contexts"),
        *("paper_samples", "candidate", "asked"),
    ),
    "selection_study": (
        *("gpu", "model", "dtype", "seqlen", "contexts", "rule", "geometry", "voters", "asked"),
    ),
    "thresholds_study_summary": ("gpu", "model", "seqlen", "command"),
    "long_text": _LONG,
    "long_tasks": _LONG,
    "evaluation": (
        *("gpu", "model", "dtype", "task", "seqlen", "keys", "method", "rule", "geometry"),
        *("voters", "options", "contexts"),
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
        ValueError: a line is no record, or one of a self-test.
    """
    found = []
    for path in paths:
        for record in read_records(path):
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
    names = _KEYS[record["kind"]]
    # Records of before blocks were selected in a step of its own do not say how they were.
    absent = {"selection": "exact", "voters": 1} if record.get("rule") else {}
    values = (record.get(name, absent.get(name)) for name in names)
    return (record["kind"], *(str(v) if isinstance(v, list | dict) else v for v in values))


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
    dense = [record for record in group if record["asked"] == "dense"]
    if not dense:
        return "No dense measurements."
    lengths = sorted({record["seqlen"] for record in dense})
    rows: dict[str, dict[int, str]] = defaultdict(dict)
    for record in dense:
        name = _row_name(record)
        rows[name][record["seqlen"]] = f"{record['ms']:.2f} ({record['tflops']:.0f})"
    header = ["dense, ms (TFLOP/s)", *(_length(n) for n in lengths)]
    body = [[name, *(row.get(n, "") for n in lengths)] for name, row in sorted(rows.items())]
    return markdown_table(header, body)


def _speedup_table(ours: Sequence[Record], baseline: str, group: Sequence[Record]) -> str:
    """A row for each kernel, rule, geometry, mode, inputs and length; a column a sparsity."""
    others = [record for record in group if record["kernel"] == "flashinfer"]
    chosen = [record for record in (*ours, *others) if baseline in record["speedup"]]
    columns = sorted({record["asked"] for record in chosen}, key=_sparsity_order)
    rows: dict[tuple[Any, ...], dict[str, str]] = defaultdict(dict)
    for record in chosen:
        rule, geometry = record["rule"] or "", record["geometry"] or ""
        key = (
            record["kernel"] == "bsfa_sm80",
            _RULES.index(rule),
            geometry != DEFAULT[1],
            _INPUTS.index(record["inputs"]),
            record["seqlen"],
            *_mode(record),
            (_name(record), rule, geometry, record["inputs"]),
        )
        rows[key][record["asked"]] = _cell(record, record["speedup"][baseline])
    title = f"times {_NAMES.get(baseline, baseline)}"
    header = [title, "rule", "blocks", "pattern", "tokens", "chosen", *columns]
    body = []
    modes = sorted({key[-3:-1] for key in rows})
    for mode in modes:
        limits = [_flop_limit(asked, *mode) for asked in columns]
        body.append([_LIMIT, "", "", "", "", _mode_text(*mode), *limits])
    for (*_, seqlen, selection, voters, names), row in sorted(rows.items()):
        name, rule, geometry, inputs = names
        default = (rule, geometry, voters) == DEFAULT
        mark = "**" if default else "*" if (rule, geometry) == PAPER else ""
        how = _mode_text(selection, voters) if rule else ""
        cells = [f"{mark}{name}{mark}", rule, geometry, inputs, _length(seqlen), how]
        body.append([*cells, *(row.get(c, "") for c in columns)])
    return markdown_table(header, body)


def _mode(record: Record) -> tuple[str, int]:
    """From what scores blocks were chosen, and of how many query rows one voted."""
    return record.get("selection", "exact"), record.get("voters", 1)


def _mode_text(selection: str, voters: int) -> str:
    bits = "16 bits" if selection == "exact" else "8 bits"
    return bits if voters == 1 else f"{bits}, 1 in {voters}"


def _cell(record: Record, ratio: float) -> str:
    asked = 0.0 if record["asked"] == "dense" else float(record["asked"])
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
    for group in grouped(chosen, _PREFILL):
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
    for group in grouped(chosen, _SERVING):
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
    for group in grouped(chosen, _LOAD):
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
            f"Prompts of {lengths} tokens, {first['rate']:g} a second, {first['answer']} answered."
        )
        parts += [title, text, markdown_table(header, body), provenance(group)]
    return "\n\n".join(parts) + ("\n" if parts else "")


def calibration_tables(records: Sequence[Record]) -> str:
    """Markdown: time of a calibration beside that of dense prefill passes over the same samples.

    Below it, time and memory of the phases of learned calibrations.

    Raises:
        ValueError: a record is one of a self-test.
    """
    phases = _phase_tables([r for r in records if r["kind"] == "calibration_phase"])
    chosen = [record for record in records if record["kind"] == "calibration"]
    if not chosen:
        return phases
    for record in chosen:
        _refuse_self_test(record, "calibration")
    header = ["model", "tokens", "samples", "rule", "blocks", "points", "dense passes, s"]
    header += ["calibration, s", "ratio", "peak GiB"]
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
        for record in sorted(chosen, key=lambda r: (r["model"], r["seqlen"], r["rule"]))
    ]
    table = markdown_table(header, body) + "\n\n" + provenance(chosen) + "\n"
    return f"{table}\n{phases}" if phases else table


def _phase_tables(records: Sequence[Record]) -> str:
    """Markdown: a table for each learned calibration, a row for each of its phases."""
    parts = []
    for group in grouped(records, _LEARNED):
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
        seconds = sum(record["seconds"] for record in group)
        every = sum(record["whole_seconds_estimated"] for record in group)
        peak = max(record["peak_gib"] for record in group)
        total = ["sum, or largest", *[""] * 4, f"{seconds:.1f}", "", f"{every:.0f}", f"{peak:.1f}"]
        parts += [markdown_table(header, [*body, total]), provenance(group)]
    return "\n\n".join(parts) + ("\n" if parts else "")


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table with its columns aligned."""
    widths = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, body)])


def grouped(records: Sequence[Record], names: Sequence[str]) -> list[list[Record]]:
    """Records that agree in the fields of these names, in the order of their first ones."""
    groups: dict[str, list[Record]] = defaultdict(list)  # lists are no keys
    for record in records:
        groups[repr([record.get(name) for name in names])].append(record)
    return list(groups.values())


def plot_attention(records: Sequence[Record], folder: Path) -> list[Path]:
    """Speed-up against sparsity: one picture a group, one panel a baseline. Returns the files.

    A picture has the length that most lines are of, the longest of several.
    """
    pyplot = load_pyplot()
    files = []
    chosen = [record for record in records if record["kind"] == "attention"]
    for group in grouped(chosen, (*_GROUP,)):
        ours = [r for r in group if (r["rule"] or r["kernel"] == "flashinfer") and r["speedup"]]
        baselines = [b for b in _BASELINES if any(b in r["speedup"] for r in ours)]
        lines = grouped(ours, ("kernel", "geometry", "rule", "seqlen", "selection", "voters"))
        lines = [line for line in lines if len({r["asked"] for r in line}) > 2]
        if not lines or not baselines:
            continue
        lengths = Counter(line[0]["seqlen"] for line in lines)
        length = max(lengths, key=lambda seqlen: (lengths[seqlen], seqlen))
        lines = [line for line in lines if line[0]["seqlen"] == length]
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
        first = group[0]
        title = f"{describe(first)}, {_length(length)} tokens, {first['inputs']} inputs"
        figure.suptitle(title, fontsize=9)
        rules = "" if any(r["rule"] == "absolute" for r in ours) else "-relative"
        name = (
            f"attention-{first['dtype']}-d{first['head_dim']}-h{first['heads']}-{first['kv_heads']}"
            f"-b{first['batch']}-{first['inputs']}{rules}.png"
        )
        files.append(save(figure, folder / name))
    return files


def plot_prefill(records: Sequence[Record], folder: Path) -> list[Path]:
    """Time to first token against length, one picture a table. Returns the files."""
    pyplot = load_pyplot()
    files = []
    chosen = [record for record in records if record["kind"] == "prefill"]
    for group in grouped(chosen, _PREFILL):
        figure, axis = pyplot.subplots(figsize=(6, 4.2))
        lines = grouped(
            group, ("implementation", "asked", "rule", "geometry", "selection", "voters")
        )
        for line in lines:
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
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
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

    For attention and prefill the figure compared is the speed-up over the first baseline that both
    have, which a change of card or clocks leaves alone; the time where they have none.

    Returns:
        (new over old, what, old, new) of each measurement, the worst first; below 1 is slower.
    """
    before = {key_of(record): record for record in old}
    rows = []
    for record in new:
        other = before.get(key_of(record))
        if other is None:
            continue
        what = " ".join(str(part) for part in key_of(record)[1:] if part not in (None, ""))
        if record["kind"] == "calibration":
            a, b = 1 / other["ratio"], 1 / record["ratio"]
            rows.append((b / a, what, f"{other['ratio']:.2f}", f"{record['ratio']:.2f}"))
            continue
        if record["kind"] == "calibration_phase":
            a, b = other["seconds_each"], record["seconds_each"]
            rows.append((a / b, what, f"{a:.2f} s", f"{b:.2f} s"))
            continue
        if record["kind"] == "serving_load":
            a, b = other["tokens_per_second"], record["tokens_per_second"]
            rows.append((b / a, what, f"{a:.0f} tokens/s", f"{b:.0f} tokens/s"))
            continue
        shared = [b for b in _BASELINES if b in record["speedup"] and b in other["speedup"]]
        if shared:
            a, b = other["speedup"][shared[0]], record["speedup"][shared[0]]
            rows.append((b / a, what, f"{a:.3f}x {shared[0]}", f"{b:.3f}x {shared[0]}"))
        else:
            rows.append(
                (
                    other["ms"] / record["ms"],
                    what,
                    f"{other['ms']:.3f} ms",
                    f"{record['ms']:.3f} ms",
                )
            )
    return sorted(rows)


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
            rows = compare(load([arguments.old]), load([arguments.new]))
            header = ["new over old", "measurement", "old", "new"]
            print(markdown_table(header, [[f"{r:.3f}", *rest] for r, *rest in rows]))
            return 1 if any(row[0] < 1 - arguments.tolerance for row in rows) or not rows else 0
        if arguments.command == "add":
            for path in add(arguments.files, drop=arguments.drop):
                print(path)
            return 0
        files = arguments.files if arguments.command == "table" else current()
        records = load(files)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.command == "write":
        import page

        for path in page.write(records, arguments.docs, arguments.images):
            print(path)
    else:
        kinds = (attention_tables, step_tables, prefill_tables, serving_tables)
        for tables in (*kinds, calibration_tables):
            print(tables(records), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
