# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What a study found: points of each candidate, and how much it skips at a given divergence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harness import progress
from study.candidates import BLASST, PAPER, PAPER_SAMPLES

KL_TARGETS = (0.01, 0.03)
BOOTSTRAPS = 2000

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """A candidate at one sparsity; arrays are [contexts]."""

    asked: float
    sparsity: Array
    kl: Array
    nll: Array


def earlier(path: Path, about: dict[str, Any]) -> dict[str, list[Point]]:
    """Points by candidate that a file holds of the same model and the same contexts."""
    results: dict[str, list[Point]] = {}
    if not path.exists():
        return results
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == about["kind"] and _run(record) == _run(about):
            arrays = (np.asarray(record[name]) for name in ("sparsity", "kl", "nll_change"))
            point = Point(record["asked"], *arrays)
            results.setdefault(record["candidate"], []).append(point)
    for points in results.values():
        points.sort(key=lambda point: point.asked)
    return results


def _run(record: dict[str, Any]) -> tuple[Any, ...]:
    """What records must share for their points to belong together."""
    names = ("model", "dtype", "seqlen", "contexts", "calibration_contexts", "backend")
    samples = record.get("paper_samples", PAPER_SAMPLES)  # an older record says nothing
    return (*(record.get(name) for name in names), samples)


def _runs(path: Path) -> list[dict[str, Any]]:
    """The first record of every run that a file holds; see ``_run`` for which are one."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    found: list[dict[str, Any]] = []
    for record in records:
        if record["kind"] == "thresholds_study" and _run(record) not in map(_run, found):
            found.append(record)
    return found


def sparsity_at(points: Sequence[Point], kl: float, chosen: npt.NDArray[np.int64]) -> float:
    """Sparsity at which a candidate's mean divergence is ``kl``; NaN beyond its points.

    Between points the logarithm of the divergence is linear in the sparsity.
    """
    losses = np.array([point.kl[chosen].mean() for point in points])
    shares = np.array([point.sparsity[chosen].mean() for point in points])
    order = np.argsort(losses)
    losses, shares = np.log(np.maximum(losses[order], 1e-12)), shares[order]
    if len(losses) == 0:
        return float("nan")
    return float(np.interp(np.log(kl), losses, shares, left=np.nan, right=np.nan))


def compared(
    results: dict[str, list[Point]], contexts: int, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Sparsity at each KL target, and points gained over the two baselines: [mean, low, high]."""
    draws = np.random.default_rng(seed).integers(0, contexts, (BOOTSTRAPS, contexts))
    everything = np.arange(contexts)
    found: dict[str, dict[str, list[float]]] = {}
    for target in KL_TARGETS:
        mean = {name: sparsity_at(p, target, everything) for name, p in results.items()}
        drawn = {
            name: np.array([sparsity_at(p, target, draw) for draw in draws])
            for name, p in results.items()
        }
        for name in results:
            row = found.setdefault(name, {})
            row[f"sparsity_at_{target:g}"] = _with_interval(mean[name], drawn[name])
            for baseline, label in ((PAPER, "over_paper"), (BLASST, "over_running_max")):
                if baseline in results and baseline != name:
                    row[f"{label}_at_{target:g}"] = _with_interval(
                        mean[name] - mean[baseline], drawn[name] - drawn[baseline]
                    )
    return found


def _with_interval(mean: float, drawn: Array) -> list[float]:
    known = drawn[np.isfinite(drawn)]
    # Where draws fall off the end of the curve often, an interval would be made up.
    if len(known) < 0.9 * len(drawn):
        return [mean, float("nan"), float("nan")]
    low, high = np.quantile(known, [0.025, 0.975])
    return [mean, float(low), float(high)]


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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = _runs(path)
    about = runs[0]
    figure, axes = pyplot.subplots(figsize=(8.4, 4.2), layout="constrained")
    markers = "osD^vP*X<>"
    curves = []
    for number, run in enumerate(runs, start=1):
        samples = len(run["calibration_contexts"])
        which = f", run {number} ({samples} samples)" if len(runs) > 1 else ""
        curves += [(f"{name}{which}", points) for name, points in earlier(path, run).items()]
    for index, (name, points) in enumerate(curves):
        shares = [point.sparsity.mean() for point in points]
        losses = [point.kl.mean() for point in points]
        style = "-" if index < len(markers) else "--"  # colours, too, begin anew
        label = Path(name).stem if name.endswith(".safetensors") else name
        axes.semilogy(shares, losses, style, marker=markers[index % len(markers)], label=label)
    for target in KL_TARGETS:
        axes.axhline(target, color="grey", linewidth=0.6, linestyle=":")
    axes.set_xlabel("share of the visible blocks skipped")
    axes.set_ylabel("KL divergence from dense, nats")
    axes.set_title(f"{about['model']}, {about['seqlen']} tokens", fontsize="medium")
    figure.legend(fontsize="small", loc="outside right upper")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
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
                cells.append("" if value is None else _interval(value))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(value: Sequence[float]) -> str:
    mean, low, high = value
    if np.isnan(mean):
        return "out of range"
    return f"{mean:.3f}" if np.isnan(low) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def plain(summary: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float | None]]]:
    return {
        name: {key: [None if np.isnan(x) else x for x in value] for key, value in row.items()}
        for name, row in summary.items()
    }
