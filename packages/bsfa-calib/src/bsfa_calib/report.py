# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What a threshold table holds and what it can be expected to do, in words and tables."""

from __future__ import annotations

import json

import numpy as np

from bsfa_calib.thresholds import FloatArray, ThresholdTable

# How far the blocks kept on held-out text may be from k before a warning is due.
_HELD_OUT_TOLERANCE = 0.25

_VOTING = {1: "every query row", 2: "one query row in 2", 4: "one query row in 4"}

_COLUMNS = {
    "sparsity": "sparsity",
    "kept": "kept",
    "held_out_sparsity": "held-out sparsity",
    "held_out_kept": "held-out kept",
}


def model_means(table: ThresholdTable, name: str, *, dense_too: bool = True) -> FloatArray | None:
    """Mean of a statistic over the layers and heads that were measured, ``[points]``.

    None if the table does not hold the statistic, NaN where it was measured nowhere.

    Args:
        table: whose statistics are meant.
        name: of the statistic.
        dense_too: whether layers that run dense count, as a sparsity of 0.
    """
    values = table.statistics.get(name)
    if values is None:
        return None
    if not dense_too:
        values = values[:, ~np.isneginf(table.thresholds).all(axis=(0, 2, 3))]
    measured = ~np.isnan(values)
    total = np.where(measured, values, 0).sum(axis=(1, 2), dtype=np.float64)
    with np.errstate(invalid="ignore"):
        count = measured.sum(axis=(1, 2)).astype(np.float64)
        return np.asarray(total / np.where(count, count, np.nan), dtype=np.float32)


def describe(table: ThresholdTable, checksum: str | None = None) -> str:
    """The table's facts, one a line; ``checksum`` is that of its file, found to hold."""
    seen = np.isfinite(table.thresholds)
    spread = (
        f"{table.thresholds[seen].min():.3f} to {table.thresholds[seen].max():.3f}"
        if seen.any()
        else "none finite"
    )
    facts = {
        "model": table.model or "not stated",
        "revision": table.revision or "not stated",
        "rule": table.rule,
        "voters": _VOTING[table.voters],
        "geometry": f"{table.geometry} (queries x keys)",
        "shape": f"{table.layers} layers, {table.heads} heads, {table.rows} rows",
        "thresholds": f"{spread} (scaled scores)",
        "longest sample": f"{table.max_seqlen} tokens",
        **({"points found at": f"{table.serve_seqlen} tokens"} if table.serve_seqlen else {}),
        "samples": f"{table.samples}, combined by {table.aggregate or 'an unknown rule'}",
        "checksum": f"{checksum}, holds"
        if checksum
        else "none: damage to the file may go unnoticed",
    }
    for name, value in table.provenance.items():
        facts[f"{name} (provenance)" if name in facts else name] = value
    shown = {printable(name): printable(value) for name, value in facts.items()}
    width = max(map(len, shown))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


def printable(text: str) -> str:
    """A text in one line that does nothing to a terminal: control characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def operating_points(table: ThresholdTable) -> str:
    """What each operating point gives: one row a point, averaged over layers and heads."""
    columns: list[tuple[str, list[str]]] = [(table.axis, [f"{point:g}" for point in table.points])]
    if table.rows == 1:
        columns.append(("threshold", [_scalar(row) for row in table.thresholds]))
    for name, title in _COLUMNS.items():
        values = model_means(table, name)
        if values is not None:
            percent = name.endswith("sparsity")
            columns.append((title, [_cell(value, percent) for value in values]))
    widths = [max(len(title), *map(len, cells)) for title, cells in columns]
    lines = [
        "  ".join(title.rjust(width) for (title, _), width in zip(columns, widths, strict=True))
    ]
    lines += [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in zip(*(cells for _, cells in columns), strict=True)
    ]
    return "\n".join(lines)


def verdict(table: ThresholdTable) -> list[str]:
    """Sentences on how well the points are met, on held-out text too, and on what they gain."""
    sentences = []
    if "dense_layers" in table.provenance:
        sentences.append(
            f"These run dense and skip nothing: {printable(table.provenance['dense_layers'])}."
        )
    for prefix, text in (("", "the calibration samples"), ("held_out_", "held-out text")):
        name = f"{prefix}kept" if table.axis == "k" else f"{prefix}sparsity"
        means = model_means(table, name, dense_too=False)
        if means is None or np.isnan(means).all():
            continue
        wanted = np.asarray(table.points, np.float64)
        if table.axis == "k":
            off = np.abs(means / wanted - 1)
            worst = int(np.nanargmax(off))
            sentences.append(
                f"On {text}, the mean number of blocks kept is within {off[worst]:.1%} of k (the "
                f"most at k={table.points[worst]}: {means[worst]:.2f})."
            )
            if prefix and off[worst] > _HELD_OUT_TOLERANCE:
                sentences.append(
                    "That is far off: calibrate on more samples, or on text more like yours."
                )
        else:
            off = np.abs(means - wanted)
            sentences.append(
                f"On {text}, the sparsity is within {100 * np.nanmax(off):.1f} points of the "
                "target."
            )
    held_out = any(name.startswith("held_out") for name in table.statistics)
    if "sparsity" in table.statistics and not held_out and "expected_kl" not in table.provenance:
        sentences.append("No text was held out, so that how well this carries over is not known.")
    sparsity = model_means(table, "sparsity")
    if sparsity is not None and table.axis == "k":
        idle = [str(k) for k, share in zip(table.k_values, sparsity, strict=True) if not share > 0]
        if idle:
            which = idle[0] if len(idle) == 1 else f"{idle[0]} to {idle[-1]}"
            sentences.append(
                f"k = {which} keeps every block of prompts up to {table.max_seqlen} tokens: use a "
                "smaller k, or longer samples."
            )
    return sentences


def as_json(table: ThresholdTable, checksum: str | None = None) -> str:
    """The facts and the operating points, for programs; ``checksum`` as for `describe`."""
    means = {name: model_means(table, name) for name in sorted(table.statistics)}
    return json.dumps(
        {
            "axis": table.axis,
            "points": list(table.points),
            "layers": table.layers,
            "heads": table.heads,
            "rows": table.rows,
            "geometry": table.geometry,
            "rule": table.rule,
            "voters": table.voters,
            "model": table.model,
            "revision": table.revision,
            "max_seqlen": table.max_seqlen,
            "serve_seqlen": table.serve_seqlen,
            "samples": table.samples,
            "aggregate": table.aggregate,
            "provenance": table.provenance,
            "checksum": checksum,
            "statistics": {
                name: [None if np.isnan(v) else round(float(v), 6) for v in values]
                for name, values in means.items()
                if values is not None
            },
        },
        indent=2,
    )


def _cell(value: np.float32, percent: bool) -> str:
    if np.isnan(value):
        return "-"
    return f"{100 * value:.1f} %" if percent else f"{value:.2f}"


def _scalar(row: FloatArray) -> str:
    finite = row[np.isfinite(row)]
    if finite.size == 0:
        return "-inf"
    if finite.min() == finite.max():
        return f"{finite.min():.4f}"
    return f"{finite.min():.3f} to {finite.max():.3f}"


def speed_limit(sparsity: float, voters: int) -> str:
    """How many times as fast attention can be at a dense kernel's rate, in words.

    Args:
        sparsity: share of the blocks skipped, in [0, 1].
        voters: one query row in so many votes.
    """
    exact, in_8_bits = 1 / (1 - sparsity / 2), 1 / (1 - sparsity + 0.25 / voters)
    more = f", {in_8_bits:.2f}x if blocks are chosen in 8 bits" if in_8_bits > exact else ""
    return f"{exact:.2f}x{more}"
