# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What a study found: points of each candidate, and how much it skips at a given divergence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness import progress
from study.candidates import PAPER_SAMPLES
from study.compare import KL_TARGETS, Point, compared, draw, interval_text


def earlier(path: Path, about: dict[str, Any]) -> dict[str, list[Point]]:
    """Points by candidate that a file holds of the same model and the same contexts."""
    results: dict[str, list[Point]] = {}
    if not path.exists():
        return results
    for record in _records(path):
        if record["kind"] == about["kind"] and _run(record) == _run(about):
            arrays = (np.asarray(record[name]) for name in ("sparsity", "kl", "nll_change"))
            point = Point(record["asked"], *arrays)
            results.setdefault(record["candidate"], []).append(point)
    for points in results.values():
        points.sort(key=lambda point: point.asked)
    return results


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, older ones too.

    Raises:
        ValueError: a line is no record; the message names the file and line.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if not isinstance(record, dict) or "kind" not in record:
            raise ValueError(f"{path}:{number}: a record must be an object with a kind")
        yield record


def _run(record: dict[str, Any]) -> tuple[Any, ...]:
    """What records must share for their points to belong together."""
    names = ("model", "dtype", "seqlen", "contexts", "calibration_contexts", "backend")
    samples = record.get("paper_samples", PAPER_SAMPLES)  # an older record says nothing
    return (*(record.get(name) for name in names), samples)


def _runs(path: Path) -> list[dict[str, Any]]:
    """The first record of every run that a file holds; see ``_run`` for which are one.

    Raises:
        ValueError: there is none, or a line is no record.
    """
    found: list[dict[str, Any]] = []
    for record in _records(path):
        if record["kind"] == "thresholds_study" and _run(record) not in map(_run, found):
            found.append(record)
    if not found:
        raise ValueError(f"{path} must hold records of a study of thresholds, and has none")
    return found


def report(path: Path) -> str:
    """What a file of results says, run by run; several runs on the same contexts are one."""
    sections = []
    for about in _runs(path):
        results = earlier(path, about)
        kinds = [name.split("/")[0] for name in about["contexts"]]
        learned_on = [name.split("/")[0] for name in about["calibration_contexts"]]
        shares = ", ".join(f"{learned_on.count(kind)} {kind}" for kind in sorted(set(learned_on)))
        heading = (
            f"{about['model']}, {about['seqlen']} tokens, {about['dtype']}, {about['backend']} on "
            f"{about['gpu']}; {len(kinds)} contexts, {len(learned_on)} others to calibrate on "
            f"({shares})"
        )
        sections.append(f"{heading}\n\n{table(results, compared(results, len(kinds)), kinds)}\n")
    return "\n".join(sections)


def plot(path: Path, picture: Path) -> None:
    """Draw divergence against sparsity for every candidate of a file of results."""
    runs = _runs(path)
    curves = []
    for number, run in enumerate(runs, start=1):
        samples = len(run["calibration_contexts"])
        which = f", run {number} ({samples} samples)" if len(runs) > 1 else ""
        for name, points in earlier(path, run).items():
            label = Path(name).stem if name.endswith(".safetensors") else name
            curves.append((f"{label}{which}", points))
    draw(curves, f"{runs[0]['model']}, {runs[0]['seqlen']} tokens", picture)
    progress(f"wrote {picture}")


def table(
    results: dict[str, list[Point]],
    summary: dict[str, dict[str, list[float]]],
    of_contexts: Sequence[str],
) -> str:
    """What came out, as Markdown, given the kind of each context."""
    kinds = sorted(set(of_contexts))
    lines = [
        "| thresholds | sparsity → KL, nats (change of NLL) | "
        + " | ".join(f"KL of {kind}" for kind in kinds)
        + " |",
        "|" + " --- |" * (2 + len(kinds)),
    ]
    for name, points in results.items():
        shown = "; ".join(
            f"{p.sparsity.mean():.3f} → {p.kl.mean():.4f} ({p.nll.mean():+.4f})" for p in points
        )
        of_kind = []
        for kind in kinds:
            chosen = np.array([each == kind for each in of_contexts])
            of_kind.append(
                "; ".join(
                    f"{p.sparsity[chosen].mean():.2f} → {p.kl[chosen].mean():.4f}" for p in points
                )
            )
        lines.append(f"| {name} | {shown} | " + " | ".join(of_kind) + " |")
    titles = ["thresholds"]
    for target in KL_TARGETS:
        titles += [
            f"sparsity at KL {target:g}",
            f"over the paper's, at {target:g}",
            f"over running_max, at {target:g}",
        ]
    lines += ["", "| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for name, row in summary.items():
        cells = []
        for target in KL_TARGETS:
            for label in ("sparsity", "over_paper", "over_running_max"):
                value = row.get(f"{label}_at_{target:g}")
                cells.append("" if value is None else interval_text(value))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plain(summary: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float | None]]]:
    """The same for a record, in which NaN is null."""
    return {
        name: {key: [None if np.isnan(x) else x for x in value] for key, value in row.items()}
        for name, row in summary.items()
    }
