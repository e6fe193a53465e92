# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Ways to choose thresholds, compared by the sparsity that they reach at an equal loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

KL_TARGETS = (0.01, 0.03)
PAPER, BLASST = "absolute top-k 128x64", "running_max scalar 128x64"
BOOTSTRAPS = 2000

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """A candidate at one sparsity; arrays are [contexts]."""

    asked: float
    sparsity: Array
    kl: Array
    nll: Array


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
            row[f"sparsity_at_{target:g}"] = with_interval(mean[name], drawn[name])
            for baseline, label in ((PAPER, "over_paper"), (BLASST, "over_running_max")):
                if baseline in results and baseline != name:
                    row[f"{label}_at_{target:g}"] = with_interval(
                        mean[name] - mean[baseline], drawn[name] - drawn[baseline]
                    )
    return found


def with_interval(mean: float, drawn: Array) -> list[float]:
    """A mean with the 95 % interval of its bootstrap draws: [mean, low, high]."""
    known = drawn[np.isfinite(drawn)]
    # Where draws fall off the end of the curve often, an interval would be made up.
    if len(known) < 0.9 * len(drawn):
        return [mean, float("nan"), float("nan")]
    low, high = np.quantile(known, [0.025, 0.975])
    return [mean, float(low), float(high)]


def interval_text(value: Sequence[float]) -> str:
    """A share with its interval, as ``compared`` gives it."""
    mean, low, high = value
    if np.isnan(mean):
        return "out of range"
    return f"{mean:.3f}" if np.isnan(low) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def draw(curves: Sequence[tuple[str, Sequence[Point]]], title: str, picture: Path) -> None:
    """Draw divergence against sparsity, one curve a candidate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.4, 4.2), layout="constrained")
    markers = "osD^vP*X<>"
    for index, (label, points) in enumerate(curves):
        shares = [point.sparsity.mean() for point in points]
        losses = [point.kl.mean() for point in points]
        style = "-" if index < len(markers) else "--"  # colours, too, begin anew
        axes.semilogy(shares, losses, style, marker=markers[index % len(markers)], label=label)
    for target in KL_TARGETS:
        axes.axhline(target, color="grey", linewidth=0.6, linestyle=":")
    axes.set_xlabel("share of the visible blocks skipped")
    axes.set_ylabel("KL divergence from dense, nats")
    axes.set_title(title, fontsize="medium")
    figure.legend(fontsize="small", loc="outside right upper")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
