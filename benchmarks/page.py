# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The page of current results, docs/results.md, from the records in benchmarks/results."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import report
from bsfa_calib.point import AXES
from bsfa_calib.thresholds import write_atomically
from bsfa_kernel import GEOMETRIES, VOTERS
from harness import Record
from report import DEFAULT
from report import PAPER as PAPER_RULE
from study import curves
from study.compare import (
    BLASST,
    BOOTSTRAPS,
    KL_TARGETS,
    PAPER,
    Point,
    compared,
    draw,
    interval_text,
    with_interval,
)

_HEAD = """\
# Results

Made by `python benchmarks/report.py` from the records in `benchmarks/results/`; do not edit.
[benchmarking.md](benchmarking.md) says how a time is taken, [evaluation.md](evaluation.md) how a
loss. "Skipped" is the measured share of the visible sparsity blocks, forced ones included.
"""

_SPEED = """\
## Speed of the attention kernels

Dense time of the peer over ours, in the same process, on the same inputs, in turns. Bold rows have
the default rule, geometry and number of voters, those in italics the paper's rule. Blocks are
chosen from 16-bit scores in one kernel with attention, or from 8-bit scores in a step before it,
rounding included; all rows vote, or one in v. The FLOP limits are what operations allow at the
peer's own rate where a share s is skipped: 1 / (1 - s/2), and 1 / (1 - s + 1/(4v)). `dense` has
thresholds of -inf; `0` has finite thresholds that skip nothing. Irregular patterns draw every block
on its own, planted ones are the same for all heads ([inputs](../benchmarks/README.md#inputs)).
"""

_STEPS = """\
## The two steps alone

`select_blocks` chooses blocks on irregular inputs; its operations are the scores of the rows that
vote. `attend_blocks` attends to random masks; its operations are those of the blocks kept. The
dense kernel runs in the same process, on the same inputs, in turns.
"""

_STUDY = """\
## How much can be skipped at an equal loss

Share of the blocks skipped where the KL divergence of the next-token distributions from dense
attention is 0.01 and 0.03 nats, and how much more that is than with the paper's rule and with one
scalar under running_max (BLASST's rule). Each is compared with dense attention on the same card.
Brackets: 95 % intervals from a bootstrap over contexts. Between measured points the logarithm of
the divergence is linear in the sparsity.
"""

_SELECTION = """\
## What a selection in 8 bits changes

At equal thresholds, one scalar for the model. Differing verdicts are a share of those on unforced
blocks, on the queries and keys of the dense model. KL is the divergence from dense, in nats.
"""

_LONG = """\
## Accuracy against time

`benchmarks/long.py`: one model, length and set of held-out windows a table. Dense is torch's
attention; "dense, by our kernel" is block-sparse attention that keeps every block. KL is the
divergence from dense, NLL the negative log-likelihood, in nats a token, means over windows with 95
% intervals (Student's t). Times are those of one prefill with its cache, and of attention in it;
ratios are those of dense kernels in the same run. Scores are means over tasks like RULER's; their
share of dense's has a 95 % interval from a bootstrap over the prompts of each task.
"""

_LONG_TASKS = """\
## Tasks

Share of the expected answers that the model gives, greedily, of tasks like RULER's in wordings that
it was not trained on. Prompts are read under the attention named, decoding is dense, but for the
sliding window's.
"""

_LONG_POSITION = """\
## The loss by position

The negative log-likelihood of dense attention, in nats a token, and of each way to choose blocks
the KL divergence at its point nearest to 0.01, by position.
"""

_LAW = """\
## How much can be skipped as prompts get longer

The share of the visible blocks that is skipped where the KL divergence from dense is 0.01 and 0.03
nats. Between measured points the logarithm of the divergence is linear in the share. Where windows
differ, of those that reach the divergence the most count. Brackets: 95 % intervals from a bootstrap
over windows; without, draws went beyond the measured points.
"""

_TEXT = """\
## The loss at given thresholds

Mean over held-out contexts of the KL divergence from dense and of the change of the negative
log-likelihood, in nats a token. Brackets: 95 % intervals, Student's t.
"""

_NEEDLES = """\
## Needles

A hit is the exact number of seven digits, asked for among one or four keys at six depths. Dense's
hits are those on the same contexts. Brackets: 95 % intervals from a bootstrap over contexts.
"""


# Of the needles of records of before they named theirs.
_DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def _candidates() -> dict[str, str]:
    """What rows call the study's candidates, in their order. Tables go by their file's name."""
    found, scalars = {}, {}
    for geometry, voters in itertools.product(GEOMETRIES, reversed(VOTERS)):
        table, study, text = "", "", ""
        if voters > 1:
            table, study = f"-1in{voters}", f", 1 in {voters}"
            text = f", one row in {voters} votes"
        learned = f"peak_lse, learned, {geometry}{text}"
        if ("peak_lse", str(geometry), voters) == DEFAULT:
            learned = f"**{learned} (default)**"
        for length in ("4k", "8k"):
            found[f"{length}-learned-{geometry}{table}"] = learned
        found[f"peak_lse learned {geometry}{study}"] = learned
        scalars[f"peak_lse scalar {geometry}{study}"] = f"peak_lse, one scalar, {geometry}{text}"
    return {
        **found,
        **scalars,
        BLASST: "running_max, one scalar, 128x64 (BLASST's rule)",
        PAPER: "*absolute, k blocks, 128x64 (the paper's)*",
    }


_CANDIDATES = _candidates()


def study_tables(records: Sequence[Record]) -> str:
    """Markdown: sparsity at equal loss, by length."""
    parts = []
    chosen = [record for record in records if record["kind"] == "thresholds_study"]
    for group in _studies(chosen):
        results = _points(group)
        contexts = len(group[0]["contexts"])
        summary = compared(results, contexts)
        header = ["thresholds"]
        for target in KL_TARGETS:
            header += [f"at KL {target:g}", "over the paper's", "over running_max"]
        body = []
        for name in sorted(results, key=_order):
            cells = [
                summary[name].get(f"{label}_at_{target:g}")
                for target in KL_TARGETS
                for label in ("sparsity", "over_paper", "over_running_max")
            ]
            texts = ["" if cell is None else interval_text(cell) for cell in cells]
            body.append([_called(name), *texts])
        parts.append(f"### {group[0]['seqlen']} tokens, {contexts} contexts{_where(*group)}")
        parts += [report.markdown_table(header, body), report.provenance(group)]
    return "\n\n".join(parts)


def _studies(records: Sequence[Record]) -> list[list[Record]]:
    """Records by the model and the contexts: a loss is compared with dense on its own card."""
    names = [name for name in report.KINDS["thresholds_study"].table if name != "gpu"]
    groups = report.grouped(records, names)
    return sorted(groups, key=lambda group: int(group[0]["seqlen"]))


def _points(group: Sequence[Record]) -> dict[str, list[Point]]:
    results: dict[str, list[Point]] = {}
    for record in sorted(group, key=lambda record: record["asked"]):
        arrays = (np.asarray(record[name]) for name in ("sparsity", "kl", "nll_change"))
        results.setdefault(record["candidate"], []).append(Point(record["asked"], *arrays))
    return results


def _short(candidate: str) -> str:
    return Path(candidate).stem if candidate.endswith(".safetensors") else candidate


def _called(candidate: str) -> str:
    return _CANDIDATES.get(_short(candidate), _short(candidate))


def _order(candidate: str) -> tuple[int, str]:
    """What has no place of its own comes last, by name."""
    places = {name: place for place, name in enumerate(_CANDIDATES)}
    return places.get(_short(candidate), len(places)), _short(candidate)


def _where(*records: Record) -> str:
    gpus = " and ".join(dict.fromkeys(record["gpu"] for record in records))
    return f": {records[0]['model']}, {records[0]['dtype']} ({gpus})"


class _Label(NamedTuple):
    """A configuration, sorted by what is recommended first."""

    order: int
    sparsity: float
    text: str


def _label(record: Record) -> _Label:
    options, geometry = record["options"], record["geometry"]
    skipped = float(np.mean(record["sparsity"]))
    method, rule = record["method"], record["rule"] or "unknown rule"
    if method == "dense":
        return _Label(0, 0.0, "dense")
    if method == "sliding_window":
        text = f"sliding window of {options['window']} keys"
        sink = int(options.get("sink", 0))
        return _Label(6, skipped, f"{text} and the first {sink}" if sink else text)
    if method not in ("table", "scalar"):
        text = ", ".join((method, *(f"{name} = {options[name]}" for name in sorted(options))))
        return _Label(7, skipped, text)
    blocks = geometry
    if record["voters"] > 1:
        blocks += f", 1 in {record['voters']}"
    calls = record.get("sparse_calls_by_selection", {})
    if calls.get("int8"):
        blocks += ", 16 and 8 bits" if calls.get("exact") else ", 8 bits"
    if method == "scalar":
        order = 3 if rule == DEFAULT[0] else 4
        return _Label(order, skipped, f"{rule}, one scalar, {blocks}")
    named = options.get("point") or next(
        f"{axis}={options[axis]}" for axis in AXES if axis in options
    )
    axis, _, value = named.partition("=")
    if axis == "k":
        text = f"{rule}, k = {value}, {blocks}"
        is_paper = (rule, blocks) == PAPER_RULE
        return _Label(5, skipped, f"*{text} (the paper's)*" if is_paper else text)
    text = f"{rule}, {Path(options['file']).stem}, {blocks}, {axis} = {value}"
    default = (rule, geometry, record["voters"]) == DEFAULT
    return _Label(1 if default else 2, skipped, f"**{text}**" if default else text)


def _method(record: Record) -> str:
    """What records of one configuration share."""
    fields = ("method", "rule", "geometry", "voters")
    return f"{[record[name] for name in fields]} {sorted(record['options'].items())}"


def selection_tables(records: Sequence[Record]) -> str:
    """Markdown: what a selection in 8 bits changes, by length."""
    chosen = [record for record in records if record["kind"] == "selection_study"]
    parts = []
    for group in report.grouped(chosen, report.KINDS["selection_study"].table):
        first = group[0]
        error = first["peak_error"]
        parts.append(
            f"### {first['seqlen']} tokens, {len(first['contexts'])} contexts, {first['rule']}, "
            f"{first['geometry']}{_where(first)}"
        )
        parts.append(
            f"A peak is off by {error['rms']:.4f} nats (root mean square), 999 of 1000 by at most "
            f"{error['p999']:.3f}, the largest by {error['largest']:.3f}."
        )
        header = ["rows that vote", "asked", "verdicts that differ"]
        header += ["skipped, 16 bits", "8 bits", "KL, 16 bits", "KL, 8 bits"]
        body = [
            [
                *(f"1 in {record['voters']}", f"{record['asked']:g}", f"{record['flips']:.3%}"),
                *(f"{np.mean(record['sparsity'][name]):.4f}" for name in ("exact", "int8")),
                *(f"{np.mean(record['kl'][name]):.5f}" for name in ("exact", "int8")),
            ]
            for record in sorted(group, key=lambda record: (record["voters"], record["asked"]))
        ]
        parts += [report.markdown_table(header, body), report.provenance(group)]
    return "\n\n".join(parts)


def text_tables(records: Sequence[Record]) -> str:
    """Markdown: the loss on text, by length."""
    chosen = [r for r in records if r["kind"] == "evaluation" and r["task"] == "text"]
    parts = []
    for group in report.grouped(chosen, (*report.KINDS["evaluation"].table, "contexts")):
        body = []
        for record in sorted(group, key=_label):
            if record["method"] == "dense":
                continue
            kl, change = (_mean_interval(record[name]) for name in ("kl", "nll_change"))
            body.append(
                [
                    _label(record).text,
                    f"{np.mean(record['sparsity']):.3f}",
                    f"{kl[0]:.4f} [{kl[1]:.4f}, {kl[2]:.4f}]",
                    f"{change[0]:+.4f} [{change[1]:+.4f}, {change[2]:+.4f}]",
                ]
            )
        contexts = len(group[0]["contexts"])
        parts.append(f"### {group[0]['seqlen']} tokens, {contexts} contexts{_where(group[0])}")
        header = ["thresholds", "skipped", "KL divergence", "change of NLL"]
        parts += [report.markdown_table(header, body), report.provenance(group)]
    return "\n\n".join(parts)


def _mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    from bsfa_hf.evaluation.intervals import mean_interval

    mean, low, high = mean_interval(values)
    return (mean, mean, mean) if low is None or high is None else (mean, low, high)


def needle_tables(records: Sequence[Record]) -> str:
    """Markdown: hits by number of keys, and the share of dense's that is left, by length."""
    chosen = [r for r in records if r["kind"] == "evaluation" and r["task"] == "needle"]
    parts = []
    for group in report.grouped(chosen, report.KINDS["evaluation"].table):
        keys = sorted({record["keys"] for record in group})
        dense: dict[int, dict[str, dict[float, bool]]] = {}
        for record in group:
            if record["method"] == "dense":
                of_keys = dense.setdefault(record["keys"], {})
                for context, found in _cells(record).items():
                    of_keys.setdefault(context, {}).update(found)
        header = ["thresholds", "skipped", "contexts", *(f"{n} keys: hits" for n in keys)]
        header = [title.replace("1 keys", "1 key") for title in header] + ["share of dense's hits"]
        body = []
        by_method: dict[str, list[Record]] = {}
        for record in sorted(group, key=_label):
            if record["method"] != "dense":
                by_method.setdefault(_method(record), []).append(record)
        for alike in by_method.values():
            counted = {
                record["keys"]: _counted(_cells(record), dense.get(record["keys"], {}))
                for record in alike
            }
            contexts = sorted(set.intersection(*(set(found) for found in counted.values())))
            if not contexts:
                raise ValueError(
                    f"{_label(alike[0]).text} at {alike[0]['seqlen']} tokens must share a context "
                    "and a depth with dense"
                )
            counts = {n: np.array([found[c] for c in contexts]) for n, found in counted.items()}
            body.append(
                [
                    _label(alike[0]).text,
                    f"{np.mean([np.mean(record['sparsity']) for record in alike]):.3f}",
                    str(len(contexts)),
                    *(_hits(counts[n]) if n in counts else "" for n in keys),
                    _share(np.sum(list(counts.values()), axis=0)),
                ]
            )
        parts.append(f"### {group[0]['seqlen']} tokens{_where(group[0])}")
        parts += [report.markdown_table(header, body), report.provenance(group)]
    return "\n\n".join(parts)


def _cells(record: Record) -> dict[str, dict[float, bool]]:
    """Whether a needle was hit, by context and depth."""
    depths = record.get("depths", [_DEPTHS] * len(record["contexts"]))
    return {
        context: {depth: hit == "1" for depth, hit in zip(at, hits, strict=True)}
        for context, at, hits in zip(record["contexts"], depths, record["hits"], strict=True)
    }


def _counted(
    ours: dict[str, dict[float, bool]], dense: dict[str, dict[float, bool]]
) -> dict[str, tuple[int, ...]]:
    """Hits, dense's hits, and cells, by context: of the cells that both have."""
    found = {}
    for context, cells in ours.items():
        both = cells.keys() & dense.get(context, {}).keys()
        if both:
            hits = (sum(of[depth] for depth in both) for of in (cells, dense[context]))
            found[context] = (*hits, len(both))
    return found


def _hits(counts: np.ndarray) -> str:
    """Hits of all, and dense's hits on the same contexts."""
    ours, dense, total = counts.sum(axis=0)
    return f"{ours} of {total} (dense {dense})"


def _share(counts: np.ndarray) -> str:
    """Share of dense's hits that are left, from (hits, dense's hits, cells) [contexts, 3]."""
    draws = np.random.default_rng(0).integers(0, len(counts), (BOOTSTRAPS, len(counts)))
    ours, dense = (counts[draws, column].sum(axis=1) for column in (0, 1))
    mean, low, high = with_interval(counts[:, 0].sum() / counts[:, 1].sum(), ours / dense)
    return f"{mean:.1%} [{low:.1%}, {high:.1%}]"


def text(records: Sequence[Record], pictures: Sequence[str] = ()) -> str:
    """The whole page.

    Args:
        records: of every kind.
        pictures: the paths of what ``draw_pictures`` draws, relative to the page.
    """
    long = _told_apart(records)
    sections = [
        (_SPEED, "attention-", report.attention_tables(records)),
        (_STEPS, "", report.step_tables(records)),
        ("## Time to first token\n", "prefill-", report.prefill_tables(records)),
        (_LONG, "long-accuracy-", curves.accuracy_tables(long)),
        (_LONG_TASKS, "long-needles", curves.task_tables(long)),
        (_LONG_POSITION, "", curves.position_tables(long)),
        (_LAW, "long-law-", curves.law_tables(long)),
        ("## Serving with vLLM\n", "", report.serving_tables(records)),
        (_STUDY, "accuracy-", study_tables(records)),
        (_SELECTION, "", selection_tables(records)),
        (_TEXT, "", text_tables(records)),
        (_NEEDLES, "", needle_tables(records)),
        ("## Time of a calibration\n", "", report.calibration_tables(records)),
        ("## Host time of a call\n", "", report.overhead_tables(records)),
    ]
    parts = [_HEAD]
    for introduction, prefix, tables in sections:
        if not tables:
            continue
        shown = [p for p in pictures if prefix and Path(p).name.startswith(prefix)]
        parts.append(introduction)
        parts += [f"![{Path(path).stem}]({path})\n" for path in shown]
        parts.append(f"{tables.rstrip()}\n")
    return "\n".join(parts)


def _told_apart(records: Sequence[Record]) -> list[Record]:
    """Records of ``long.py``; candidates of one name in several settings say in which."""
    kind = report.KINDS["long_text"]
    chosen = [record for record in records if record["kind"] in ("long_text", "long_tasks")]
    # The prompts of several seeds are joined as they come, and draws are to follow from them alone.
    chosen.sort(
        key=lambda r: (r["model"], r["contexts"]) if r["kind"] == "long_tasks" else ("", [])
    )
    whose = [name for name in (*kind.table, "candidate") if name != "contexts"]
    names = [str([record[name] for name in whose]) for record in chosen]
    settings = kind.line("candidate", "axis", "asked")
    further = report.told_apart(names, [[record] for record in chosen], settings)
    return [
        {**record, "candidate": ", ".join([record["candidate"], *more])}
        for record, more in zip(chosen, further, strict=True)
    ]


def draw_pictures(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw every picture of the page.

    Returns:
        The files, by name.

    Raises:
        ValueError: two pictures have one name.
    """
    files = [*report.plot_attention(records, folder), *report.plot_prefill(records, folder)]
    files += [*_draw_studies(records, folder), *curves.draw(_told_apart(records), folder)]
    twice = sorted({path.name for path in files if files.count(path) > 1})
    if twice:
        raise ValueError(f"a picture must have a name of its own, got twice: {', '.join(twice)}")
    return sorted(files)


def _draw_studies(records: Sequence[Record], folder: Path) -> list[Path]:
    chosen = [record for record in records if record["kind"] == "thresholds_study"]
    # Of each length, the contexts that the most was measured on.
    whose = ("model", "dtype", "seqlen")
    most = {str([group[0][n] for n in whose]): group for group in sorted(_studies(chosen), key=len)}
    groups = list(most.values())
    names = [f"accuracy-{group[0]['seqlen']}" for group in groups]
    files = []
    for name, more, group in zip(
        names, report.told_apart(names, groups, whose), groups, strict=True
    ):
        results = _points(group)
        lines = [
            (_called(one).replace("*", ""), results[one]) for one in sorted(results, key=_order)
        ]
        path = folder / f"{'-'.join([name, *map(report.slug, more)])}.png"
        draw(lines, f"{group[0]['model']}, {group[0]['seqlen']} tokens", path)
        files.append(path)
    return files


def links(docs: Path, files: Iterable[Path]) -> list[str]:
    """Pictures as the page links them."""
    return [Path(os.path.relpath(path, docs.parent)).as_posix() for path in files]


def linked(docs: Path) -> list[str]:
    """The pictures that a page has."""
    return re.findall(r"^!\[[^]]*\]\((.+)\)$", docs.read_text(encoding="utf-8"), re.MULTILINE)


def write(records: Sequence[Record], docs: Path, images: Path) -> list[Path]:
    """Write the page and its pictures, and delete those that it had before. Returns the files.

    Raises:
        ValueError: two pictures have one name; then all is left as it was.
    """
    with tempfile.TemporaryDirectory() as folder:
        drawn = {path.name: path.read_bytes() for path in draw_pictures(records, Path(folder))}
    files = [images / name for name in drawn]
    content = text(records, links(docs, files))
    before = [docs.parent / link for link in linked(docs)] if docs.exists() else []
    for path in files:
        write_atomically(path, drawn[path.name])
    write_atomically(docs, content.encode())
    for path in before:
        if path.parent.resolve() == images.resolve() and path.name not in drawn:
            path.unlink(missing_ok=True)
    return [*files, docs]
