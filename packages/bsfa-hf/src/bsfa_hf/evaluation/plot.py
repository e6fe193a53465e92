# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Plots and tables from files of results."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bsfa_hf.evaluation.intervals import Interval
from bsfa_hf.evaluation.results import Record, joined, load, record_key
from bsfa_hf.evaluation.summary import Group, Row, group_of, group_titles, markdown, summarise

# Told apart in black and white too: colour and marker go together.
_COLOURS = ("#0b6e99", "#c8553d", "#5b8c5a", "#8a5a83", "#c99700", "#4f4f4f", "#2ca6a4", "#a13d63")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


class PlotError(RuntimeError):
    """Nothing can be plotted; the message says why."""


def plot_results(paths: Sequence[Path], out: Path) -> list[Path]:
    """Plot files of results of one model.

    Args:
        paths: files that ``bsfa evaluate`` wrote on one device.
        out: folder for what is made.

    Returns:
        What was made: table.md, and of these what the results have figures for: accuracy-*.png (KL
        divergence, change of NLL, or accuracy, against sparsity and against time), heads-*.png
        (sparsity by layer and head), needle-*.png (hits by length and depth).

    Raises:
        PlotError: matplotlib is not installed, or there is nothing to plot.
        ResultsError: as `merged`.
    """
    content = merged(paths)
    rows = summarise(content)
    if not rows:
        raise PlotError("there are no results of a configuration and of dense on the same sample")
    out.mkdir(parents=True, exist_ok=True)
    table = out / "table.md"
    table.write_text(markdown(content), encoding="utf-8")
    made = [table]
    plt = _pyplot()
    titles = group_titles(map(group_of, content["records"]), content)
    for group in dict.fromkeys(row.group for row in rows):
        chosen = [row for row in rows if row.group == group]
        if any(row.kind != "dense" for row in chosen):
            path = out / f"accuracy-{_file_name(group, titles)}.png"
            made.append(_plot_accuracy(plt, chosen, content, titles[group], path))
    made += _plot_heads(plt, titles, content, out)
    made += _plot_needles(plt, titles, content, out)
    return made


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """Several files of results of one model on one device as one.

    Of two records of one configuration on one sample, that with the shorter time counts, whatever
    the order of the files.

    Raises:
        ResultsError: they are of different models or devices, have different thresholds for one
            configuration, or are not files of results.
    """
    contents = [load(path) for path in paths]
    header = contents[0]["header"]
    for path, content in zip(paths, contents, strict=True):
        header = joined(header, paths[0], content["header"], path, "plot them apart")
    records: dict[str, Record] = {}
    for record in (record for content in contents for record in content["records"]):
        key = record_key(record)
        if key not in records or record["seconds"] < records[key]["seconds"]:
            records[key] = record
    return {"header": header, "records": list(records.values())}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise PlotError(
            "plots need matplotlib, which the extra bsfa-hf[plot] brings. table.md was written "
            "without it"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _file_name(group: Group, titles: Iterable[Group]) -> str:
    """What files call a group; with the text where there are several."""
    keys = f"-{group.keys}" if group.keys else ""
    return f"{_slug(group.task)}{keys}-{group.length}{_text_slug(group, titles)}"


def _text_slug(group: Group, titles: Iterable[Group]) -> str:
    several = len({each.text for each in titles if each.task in ("text", "needle")}) > 1
    return f"-{_slug(group.text)}" if several and group.text else ""


def _plot_accuracy(
    plt: Any, rows: Sequence[Row], content: Mapping[str, Any], title: str, path: Path
) -> Path:
    """Against sparsity on the left, and against time relative to dense on the right."""
    text = rows[0].task == "text"
    label = "KL divergence from dense, nats" if text else "accuracy"
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.0), sharey=True, layout="constrained")
    families = _families(rows, content)
    for index, (family, members) in enumerate(families.items()):
        values = [_shown_value(row) for row in members]
        style: dict[str, Any] = {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "markersize": 5,
            "linewidth": 1.2,
            "capsize": 2,
            "elinewidth": 0.8,
        }
        means = [value.mean for value in values]
        errors = np.abs(
            [
                [v.mean - (v.low if v.low is not None else v.mean) for v in values],
                [(v.high if v.high is not None else v.mean) - v.mean for v in values],
            ]
        )
        if text:  # on a logarithmic axis an interval that reaches 0 has no lower end
            errors[0] = np.minimum(errors[0], 0.9 * np.asarray(means))
        for axis, xs in (
            (axes[0], [row.sparsity for row in members]),
            # Without a time it has no place there.
            (axes[1], [1 / row.speedup if row.speedup else math.nan for row in members]),
        ):
            axis.errorbar(xs, means, yerr=errors, label=family, **style)
    axes[0].set_xlabel("share of score blocks skipped")
    axes[1].set_xlabel("time of a forward pass, dense = 1")
    axes[0].set_ylabel(label)
    axes[1].axvline(1.0, color="#999999", linewidth=0.8, linestyle=":")
    dense = next((row for row in rows if row.kind == "dense"), None)
    if text:
        axes[0].set_yscale("log")
    elif dense is not None and dense.accuracy is not None:
        for axis in axes:
            axis.axhline(dense.accuracy.mean, color="#333333", linewidth=0.8, linestyle="--")
    for axis in axes:
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}, {max(row.samples for row in rows)} samples", fontsize=10)
    return _save(plt, figure, path)


def _families(rows: Sequence[Row], content: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Configurations that differ only in how much they skip, by sparsity: a line in the plot."""
    known = content["header"]["configurations"]
    amounts = ("k", "target_sparsity", "max_loss", "threshold", "sparsity", "window", "topk")
    families: dict[str, list[Row]] = {}
    for row in rows:
        if row.kind == "dense" or (row.kl is None and row.accuracy is None):
            continue
        options = known.get(row.digest, {}).get("options", {})
        fixed = [
            {"file": Path(value).stem, "sink": f"sink {value}"}.get(name, value)
            for name, value in options.items()
            if name not in amounts
        ]
        words = [row.kind, *fixed] if row.kind != "table" else fixed
        families.setdefault(" ".join(words).replace("_", " "), []).append(row)
    return {name: sorted(m, key=lambda row: row.sparsity) for name, m in families.items()}


def _shown_value(row: Row) -> Interval:
    value = row.kl if row.kl is not None else row.accuracy
    assert value is not None
    # A KL divergence of exactly 0 has no place on a logarithmic axis.
    return value if row.kl is None else value._replace(mean=max(value.mean, 1e-8))


def _plot_heads(
    plt: Any, titles: Mapping[Group, str], content: Mapping[str, Any], out: Path
) -> list[Path]:
    """Share of blocks skipped by layer and head, one panel a configuration."""
    sums: dict[Group, dict[str, list[Any]]] = {}
    for record in content["records"]:
        if record["skipped"]:
            of_group = sums.setdefault(group_of(record), {})
            of_group.setdefault(record["configuration"], []).append(record["skipped"])
    known = content["header"]["configurations"]
    made = []
    for group, by_configuration in sums.items():
        shown = {
            digest: np.mean(np.asarray(shares, np.float64), axis=0)
            for digest, shares in by_configuration.items()
            if known.get(digest, {}).get("kind") in ("table", "scalar")
            and len({np.shape(share) for share in shares}) == 1
        }
        if not shown:
            continue
        columns = min(len(shown), 3)
        lines = -(-len(shown) // columns)
        size = (3.2 * columns + 0.8, 2.9 * lines + 0.4)
        figure, axes = plt.subplots(
            lines, columns, figsize=size, squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(shown) :]:
            axis.set_visible(False)
        image = None
        for axis, (digest, shares) in zip(axes.flat, shown.items(), strict=False):
            image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axis.set_title(f"{known[digest]['name']}\nmean {shares.mean():.2f}", fontsize=8)
            axis.set_xlabel("head", fontsize=8)
            axis.set_ylabel("layer", fontsize=8)
        figure.colorbar(image, ax=axes, label="share of blocks skipped", shrink=0.8)
        figure.suptitle(titles[group], fontsize=9)
        made.append(_save(plt, figure, out / f"heads-{_file_name(group, titles)}.png"))
    return made


def _plot_needles(
    plt: Any, titles: Mapping[Group, str], content: Mapping[str, Any], out: Path
) -> list[Path]:
    """Share of hits by depth and length, one panel a configuration, dense first."""
    records = [record for record in content["records"] if record["task"] == "needle"]
    known = content["header"]["configurations"]
    pictures: dict[Group, list[Any]] = {}
    for record in records:
        pictures.setdefault(group_of(record)._replace(length=0), []).append(record)
    names = group_titles(pictures, content)
    made = []
    for group, shown in sorted(pictures.items()):
        cells: dict[str, dict[tuple[float, int], list[Any]]] = {}
        for record in shown:
            of = cells.setdefault(record["configuration"], {})
            of.setdefault((record["depth"], record["length"]), []).append(record)
        order = sorted(cells, key=lambda digest: digest != "dense")
        depths = sorted({depth for of in cells.values() for depth, _ in of})
        lengths = sorted({length for of in cells.values() for _, length in of})
        columns = min(len(order), 3)
        lines = -(-len(order) // columns)
        size = (
            (1.3 + 0.6 * len(lengths)) * columns + 1.4,
            (1.0 + 0.4 * len(depths)) * lines + 0.4,
        )
        figure, axes = plt.subplots(
            lines, columns, figsize=size, squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(order) :]:
            axis.set_visible(False)
        image = None
        for axis, digest in zip(axes.flat, order, strict=False):
            grid = np.full((len(depths), len(lengths)), np.nan)
            for (depth, length), found in cells[digest].items():
                share = float(np.mean([record["hit"] for record in found]))
                place = depths.index(depth), lengths.index(length)
                grid[place] = share
                colour = "black" if share > 0.6 else "white"
                text = f"{share:.0%}"
                axis.text(
                    place[1], place[0], text, ha="center", va="center", fontsize=7, color=colour
                )
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axis.set_title(known.get(digest, {}).get("name", digest), fontsize=8)
            axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
            axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
            axis.set_xlabel("tokens", fontsize=8)
            axis.set_ylabel("depth", fontsize=8)
        figure.colorbar(image, ax=axes, label="share of answers right", shrink=0.8)
        figure.suptitle(names[group], fontsize=9)
        name = f"needle-{group.keys}{_text_slug(group, titles)}.png"
        made.append(_save(plt, figure, out / name))
    return made


def _save(plt: Any, figure: Any, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    os.replace(temporary, path)
    return path


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
