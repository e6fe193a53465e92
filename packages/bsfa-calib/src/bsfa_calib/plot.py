# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""A picture of a threshold table: thresholds and predicted sparsity of each layer and head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from bsfa_calib.report import model_means, printable
from bsfa_calib.thresholds import FloatArray, ThresholdTable


def default_points(table: ThresholdTable) -> tuple[float | int, ...]:
    """Three points that skip some, much and most, or those there are."""
    sparsity = model_means(table, "sparsity")
    if len(table.points) <= 3:
        return table.points
    if sparsity is None or np.isnan(sparsity).any():
        chosen = {0, len(table.points) // 2, len(table.points) - 1}
    else:
        chosen = {int(np.abs(sparsity - sparsity.max() * part).argmin()) for part in (0.3, 0.6, 1)}
    return tuple(table.points[index] for index in sorted(chosen))


def plot(
    table: ThresholdTable,
    path: str | os.PathLike[str],
    *,
    points: Sequence[float | int] | None = None,
) -> None:
    """Draw a table into an image file. Needs matplotlib (the extra ``plot``).

    Each operating point is a row: the threshold of each layer and head (mean over the rows in which
    it skips anything), its sparsity on held-out text (or, without any, on the calibration samples),
    and the thresholds along the positions.

    Args:
        table: the table.
        path: the image; its suffix gives the format, as .png.
        points: operating points to draw, three of them by default.

    Raises:
        ValueError: the table does not hold a point.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = default_points(table) if points is None else tuple(points)
    figure = Figure(figsize=(15, 0.6 + 4 * len(chosen)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{printable(table.model) or 'thresholds'}: rule {table.rule}, {table.geometry}, up to "
        f"{table.seqlen} tokens"
    )
    axes = figure.subplots(len(chosen), 3, squeeze=False)
    for row, point in zip(axes, chosen, strict=True):
        named: dict[str, Any] = {table.axis: point}
        index = table.index(**named)
        label = f"{table.axis} = {point:g}"
        thresholds = table.thresholds[index]
        _heat_map(row[0], _finite_mean(thresholds), f"threshold, {label}", "viridis", None)
        # With pooled thresholds, every head skips the same share of the calibration samples.
        held_out = "held_out_sparsity" in table.statistics
        sparsity = table.statistics.get("held_out_sparsity" if held_out else "sparsity")
        if sparsity is not None:
            mean = np.nanmean(sparsity[index])
            title = f"{'held-out' if held_out else 'predicted'} sparsity, {label} (mean {mean:.0%})"
            _heat_map(row[1], sparsity[index], title, "magma", (0, 1))
        else:
            row[1].set_axis_off()
            row[1].text(0.5, 0.5, "no sparsity in this table", ha="center", va="center")
        _lines(row[2], table, thresholds, f"threshold by position, {label}")
    figure.savefig(path, dpi=100)


def _finite_mean(thresholds: FloatArray) -> FloatArray:
    """Mean over the rows that hold a finite threshold, NaN if none does: ``[layers, heads]``."""
    finite = np.isfinite(thresholds)
    count = finite.sum(axis=-1)
    total = np.where(finite, thresholds, 0).sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def _heat_map(
    axis: Any, values: FloatArray, title: str, colours: str, limits: tuple[float, float] | None
) -> None:
    low, high = limits if limits else (None, None)
    image = axis.imshow(
        values.T,
        aspect="auto",
        origin="lower",
        cmap=colours,
        vmin=low,
        vmax=high,
        interpolation="nearest",
    )
    axis.figure.colorbar(image, ax=axis)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("layer")
    axis.set_ylabel("head")


def _lines(axis: Any, table: ThresholdTable, thresholds: FloatArray, title: str) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = colormaps["cividis"]
    scale = Normalize(0, max(table.layers - 1, 1))
    tokens = np.arange(table.rows) * table.q_block
    for layer in range(table.layers):
        # A layer's heads have their finite rows in common: those with more than k blocks.
        curve = np.where(np.isfinite(thresholds[layer]), thresholds[layer], np.nan).mean(axis=0)
        axis.plot(
            tokens,
            curve,
            color=colours(scale(layer)),
            linewidth=1,
            marker="o" if table.rows == 1 else None,
        )
    axis.figure.colorbar(ScalarMappable(scale, colours), ax=axis, label="layer")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("first query of the block (tokens)")
    axis.set_ylabel("mean over heads")
