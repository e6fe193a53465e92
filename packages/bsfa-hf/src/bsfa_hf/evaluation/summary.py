# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""From records to figures: means over samples, differences from dense, advice in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from bsfa_calib.report import speed_limit
from bsfa_hf.evaluation.intervals import Interval, mean_interval, share_interval
from bsfa_hf.evaluation.results import Record
from bsfa_kernel.geometry import Geometry, forced_share

# Below this, skipping cannot pay for deciding; above that KL, the model is another one.
_LITTLE_SPARSITY = 0.1
_USEFUL_SPARSITY = 0.3
_TOLERABLE_KL = 0.03


class Group(NamedTuple):
    """What records must share to be one row or picture.

    Attributes:
        task: "text", "needle" or a task of the harness.
        length: tokens in a sample; 0 where the task sets it.
        keys: needles in a haystack; 0 for other tasks.
        text: key of the header's texts; "" where the task brings its own.
    """

    task: str
    length: int
    keys: int
    text: str


def group_of(record: Mapping[str, Any]) -> Group:
    """The group of a record."""
    return Group(record["task"], record["length"], record.get("keys", 0), record.get("text", ""))


def group_titles(groups: Iterable[Group], content: Mapping[str, Any]) -> dict[Group, str]:
    """What tables call groups; the text is named where one file has several."""
    groups = sorted(set(groups))
    names = content["header"].get("texts", {})
    several = len({group.text for group in groups if group.task in ("text", "needle")}) > 1
    titles = {}
    for group in groups:
        title = {"text": "Next-token predictions", "needle": "Needles"}.get(group.task, group.task)
        if group.keys:
            title += f", {group.keys} {'key' if group.keys == 1 else 'keys'}"
        title += f", {group.length} tokens" if group.length else ""
        if several and group.task in ("text", "needle"):
            title += f", {names.get(group.text, 'unknown text')}"
        titles[group] = title
    return titles


@dataclass(frozen=True)
class Row:
    """One configuration on one group of samples.

    Attributes:
        group: task, length, keys and text of the samples.
        digest: of the configuration.
        name: of the configuration.
        kind: of the configuration.
        samples: that were evaluated under this configuration and dense.
        sparsity: mean share of blocks skipped.
        seconds: median of the time of the forward passes.
        speedup: median over samples of dense's time by this one's in the same run; None for files
            of before both were in a record.
        kl: mean KL divergence from dense; text only.
        nll_change: mean change of the negative log-likelihood from dense; text only.
        perplexity: text only.
        agreement: share of positions with dense's most likely token; text only.
        accuracy: share of hits, or mean score; not for text.
        accuracy_change: mean change from dense; not for text.
        log_probability_change: of the right answer; needles only.
        bands: KL and change of NLL by (start, stop) of positions; text only.
    """

    group: Group
    digest: str
    name: str
    kind: str
    samples: int
    sparsity: float
    seconds: float
    speedup: float | None
    kl: Interval | None = None
    nll_change: Interval | None = None
    perplexity: float | None = None
    agreement: float | None = None
    accuracy: Interval | None = None
    accuracy_change: Interval | None = None
    log_probability_change: Interval | None = None
    bands: Mapping[tuple[int, int], tuple[Interval, Interval]] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The group's task."""
        return self.group.task

    @property
    def length(self) -> int:
        """The group's length."""
        return self.group.length


def summarise(content: Mapping[str, Any], *, kind: str | None = None) -> list[Row]:
    """Rows by group and configuration, from a file of results.

    Args:
        content: as ``results.load`` gives it.
        kind: only samples of this kind of text.

    Returns:
        Rows, dense first, then by sparsity.
    """
    known = content["header"]["configurations"]
    groups: dict[Group, dict[str, dict[str, Record]]] = {}
    for record in content["records"]:
        if kind is not None and record["kind"] != kind:
            continue
        in_group = groups.setdefault(group_of(record), {})
        in_group.setdefault(record["configuration"], {})[record["sample"]] = record
    rows: list[Row] = []
    for group, by_configuration in sorted(groups.items()):
        dense = by_configuration.get("dense", {})
        found = []
        for digest, records in by_configuration.items():
            pairs = [(r, dense[sample]) for sample, r in records.items() if sample in dense]
            if pairs:
                about = known.get(digest, {"name": digest, "kind": "?"})
                found.append(_row(group, digest, about, pairs))
        rows += sorted(found, key=lambda row: (row.kind != "dense", row.sparsity))
    return rows


def _row(
    group: Group,
    digest: str,
    about: Mapping[str, Any],
    pairs: Sequence[tuple[Record, Record]],
) -> Row:
    speedups = [
        record["dense_seconds"] / max(record["seconds"], 1e-9)
        for record, _ in pairs
        if "dense_seconds" in record
    ]
    common: dict[str, Any] = {
        "group": group,
        "digest": digest,
        "name": about["name"],
        "kind": about["kind"],
        "samples": len(pairs),
        "sparsity": _mean([record["sparsity"] for record, _ in pairs]),
        "seconds": median(record["seconds"] for record, _ in pairs),
        "speedup": median(speedups) if speedups else None,
    }
    if group.task == "text":
        return Row(**common, **_text_figures(pairs))
    if group.task == "needle":
        hits = [int(record["hit"]) for record, _ in pairs]
        return Row(
            **common,
            accuracy=share_interval(sum(hits), len(hits)),
            accuracy_change=mean_interval([int(r["hit"]) - int(d["hit"]) for r, d in pairs]),
            log_probability_change=mean_interval(
                [r["log_probability"] - d["log_probability"] for r, d in pairs]
            ),
        )
    scored = [(r, d) for r, d in pairs if r["score"] is not None and d["score"] is not None]
    if not scored:
        return Row(**common)
    return Row(
        **common,
        accuracy=mean_interval([r["score"] for r, _ in scored]),
        accuracy_change=mean_interval([r["score"] - d["score"] for r, d in scored]),
    )


def _text_figures(pairs: Sequence[tuple[Record, Record]]) -> dict[str, Any]:
    changes = [_over_bands(r, "nll") - _over_bands(d, "nll") for r, d in pairs]
    bands = {}
    for index, band in enumerate(pairs[0][0]["bands"]):
        bands[band["start"], band["stop"]] = (
            mean_interval([r["bands"][index]["kl"] for r, _ in pairs]),
            mean_interval([r["bands"][index]["nll"] - d["bands"][index]["nll"] for r, d in pairs]),
        )
    return {
        "kl": mean_interval([_over_bands(r, "kl") for r, _ in pairs]),
        "nll_change": mean_interval(changes),
        "perplexity": _exp(_mean([_over_bands(r, "nll") for r, _ in pairs])),
        "agreement": _mean([_over_bands(r, "agreement") for r, _ in pairs]),
        "bands": bands,
    }


def _over_bands(record: Record, name: str) -> float:
    positions = sum(band["positions"] for band in record["bands"])
    return float(sum(band[name] * band["positions"] for band in record["bands"]) / positions)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:  # of a model that predicts nothing
        return math.inf


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))


def advice(content: Mapping[str, Any]) -> list[str]:
    """Whether it is worth it, in a sentence for each length and text."""
    known = content["header"]["configurations"]
    thinned = [row for row in summarise(content) if row.kind in ("table", "scalar")]
    sentences = []
    places = sorted(
        {(row.length, row.group.text) for row in thinned if row.task in ("text", "needle")}
    )
    several = len({text for _, text in places}) > 1
    names = content["header"].get("texts", {})
    for length, text in places:
        where = f"At {length} tokens"
        where += f" of {names.get(text, 'unknown text')}" if several else ""
        here = [row for row in thinned if (row.length, row.group.text) == (length, text)]
        on_text = [row for row in here if row.task == "text"]
        rows = on_text or [row for row in here if row.task == "needle"]
        best = max(rows, key=lambda row: row.sparsity)
        if best.sparsity < _LITTLE_SPARSITY:
            sentences.append(_nothing_to_gain(where, best, known[best.digest]))
        elif on_text:
            sentences.append(_gain(where, on_text, known))
    return sentences


def _nothing_to_gain(where: str, best: Row, about: Mapping[str, Any]) -> str:
    geometry = Geometry.parse(about.get("geometry", "128x64"))
    forced = forced_share(best.length, best.length, geometry)
    why = (
        f"{forced:.0%} of the blocks of so short a prompt are forced"
        if forced > 0.5
        else "nearly every block of scores holds something that the thresholds keep; lower k, or "
        "a higher target sparsity, would skip more if the loss allows it"
    )
    return (
        f"{where} there is nothing to gain: at most {best.sparsity:.1%} of the "
        f"blocks are skipped ({best.name}). The reason: {why}. Leave this model dense here."
    )


def _gain(where: str, rows: Sequence[Row], known: Mapping[str, Mapping[str, Any]]) -> str:
    tolerable = [row for row in rows if row.kl is not None and row.kl.mean <= _TOLERABLE_KL]
    top = max(tolerable, key=lambda row: row.sparsity, default=None)
    if top is None or top.sparsity < _USEFUL_SPARSITY:
        reached = "none" if top is None else f"{top.sparsity:.0%} ({top.name})"
        return (
            f"{where} these configurations gain little: the most that is "
            f"skipped at a KL divergence of at most {_TOLERABLE_KL:g} nats is {reached}. "
            "Heads that attend to everything alike (flat heads) cannot be thinned out; "
            "a relative rule, a finer geometry or longer prompts may help."
        )
    limit = speed_limit(top.sparsity, known[top.digest].get("voters", 1))
    return (
        f"{where} {top.name} skips {top.sparsity:.0%} of the blocks at a KL "
        f"divergence of {top.kl} nats; the limit of attention's speed-up is then {limit}."
    )


_Column = tuple[str, Callable[[Row], str]]


def markdown(content: Mapping[str, Any]) -> str:
    """Tables of all groups, and the advice, as Markdown."""
    rows = summarise(content)
    header = content["header"]
    environment = header.get("environment", {})
    parts = [
        f"Model {header['model'].get('name') or header['model'].get('digest')}, "
        f"{environment.get('dtype', '?')} on {environment.get('device', '?')}, "
        f"{environment.get('backend', '?')} back end. Intervals are 95 %, over samples; "
        "changes are from dense on the same samples."
    ]
    for group, title in group_titles((row.group for row in rows), content).items():
        chosen = [row for row in rows if row.group == group]
        parts.append(f"### {title}")
        parts.append(_table(chosen, _columns(group.task)))
        if group.task == "text" and len(chosen[0].bands) > 1:
            parts.append("KL divergence by position:")
            parts.append(_table(chosen, _band_columns(chosen[0])))
    parts += advice(content)
    return "\n\n".join(parts) + "\n"


def _columns(task: str) -> list[_Column]:
    columns: list[_Column] = [
        ("configuration", lambda row: row.name),
        ("samples", lambda row: str(row.samples)),
        ("sparsity", lambda row: f"{row.sparsity:.3f}"),
    ]
    if task == "text":
        columns += [
            ("KL, nats", lambda row: _shown(row.kl)),
            ("change of NLL", lambda row: _shown(row.nll_change)),
            ("perplexity", lambda row: _number(row.perplexity, ".3f")),
            ("same top token", lambda row: _number(row.agreement, ".4f")),
        ]
    else:
        columns += [
            ("accuracy", lambda row: _shown(row.accuracy)),
            ("change", lambda row: _shown(row.accuracy_change)),
        ]
    if task == "needle":
        columns.append(("change of answer's log p", lambda row: _shown(row.log_probability_change)))
    return [
        *columns,
        ("seconds", lambda row: f"{row.seconds:.3f}"),
        ("speed-up", lambda row: _number(row.speedup, ".2f")),
    ]


def _band_columns(first: Row) -> list[_Column]:
    columns: list[_Column] = [("configuration", lambda row: row.name)]
    for edges in first.bands:

        def cell(row: Row, edges: tuple[int, int] = edges) -> str:
            return _shown(row.bands[edges][0]) if edges in row.bands else ""

        columns.append((f"{edges[0]} to {edges[1] - 1}", cell))
    return columns


def _table(rows: Sequence[Row], columns: Sequence[_Column]) -> str:
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row).replace("|", "\\|") for _, cell in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(interval: Interval | None) -> str:
    return "" if interval is None else str(interval)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
