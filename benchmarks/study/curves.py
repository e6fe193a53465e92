# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Tables and pictures of what ``long.py`` measured: accuracy against time, and against length."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import report
from bsfa_hf.evaluation.intervals import mean_interval
from harness import Record
from study.compare import BOOTSTRAPS, KL_TARGETS, Point, interval_text, sparsity_at, with_interval
from study.lengths import CONTROL

DENSE = "dense"
# What a candidate's name begins with, in the order of rows.
_ORDER = (
    *(DENSE, CONTROL, "peak_lse, learned", "peak_lse, one scalar", "running_max", "absolute"),
    *("sliding", "antidiagonal", "Sparge"),
)
_NOTES = {"running_max": " (BLASST's rule)", "absolute": " (the paper's)"}
_MODEL = ("gpu", "model", "dtype", "lean")
_MARKERS = "osD^vP*X<>hp"
_LAYOUT: dict[str, Any] = {"layout": "constrained"}
_Point = tuple[str, str, float]


def texts(records: Sequence[Record]) -> list[list[Record]]:
    """Records on text by model, length and windows."""
    return _in_order(_alike(records, "long_text"))


def tasks(records: Sequence[Record]) -> list[list[Record]]:
    """Records on tasks by model, length and prompts."""
    return _in_order(_alike(records, "long_tasks"))


def _alike(records: Sequence[Record], kind: str) -> list[list[Record]]:
    found = [record for record in records if record["kind"] == kind]
    return report.grouped(found, (*_MODEL, "seqlen", "contexts"))


def _in_order(groups: Iterable[list[Record]]) -> list[list[Record]]:
    """By length, then the most contexts first; in each group as rows go."""
    return sorted(
        (sorted(group, key=_order) for group in groups),
        key=lambda group: (group[0]["seqlen"], -len(group[0]["contexts"])),
    )


# A record on tasks, and dense's on the same prompts, if there is one.
Scored = tuple[Record, Record | None]


def scored(records: Sequence[Record]) -> dict[tuple[str, ...], dict[_Point, Scored]]:
    """By model and length: of each point on tasks, the most prompts, those of all seeds joined."""
    found: dict[tuple[str, ...], dict[_Point, dict[str, Scored]]] = {}
    for group in reversed(tasks(records)):  # those with the most prompts last
        dense = next((record for record in group if record["candidate"] == DENSE), None)
        by_point = found.setdefault(_whose(group[0]), {})
        for record in group:
            by_point.setdefault(_point(record), {})[_seed(record)] = record, dense
    return {
        whose: {point: _joined(list(by_seed.values())) for point, by_seed in by_point.items()}
        for whose, by_point in found.items()
    }


def _joined(pairs: Sequence[Scored]) -> Scored:
    """The prompts of several seeds as if they were of one record, and dense's."""
    records, dense = zip(*pairs, strict=True)
    joined = _one_of(records)
    if records[0] is dense[0]:
        return joined, joined
    return joined, None if None in dense else _one_of(dense)


def _one_of(records: Sequence[Record]) -> Record:
    lists = {
        name: [value for record in records for value in record[name]]
        for name in ("contexts", "scores", "sparsity")
    }
    return {**records[0], **lists}


def _order(record: Record) -> tuple[Any, ...]:
    name = record["candidate"]
    rank = max((i for i, start in enumerate(_ORDER) if name.startswith(start)), default=99)
    return rank, name, float(np.mean(record["sparsity"]))


def label(candidate: str) -> str:
    """A candidate's name in tables, in which rules are also called by who proposed them."""
    rule = candidate.split(",")[0]
    return candidate + _NOTES.get(rule, "")


def accuracy_tables(records: Sequence[Record]) -> str:
    """Markdown: loss, times and task scores of every point, by length."""
    on_tasks = scored(records)
    parts = []
    for group in texts(records):
        first = group[0]
        baselines = list(first["speedup"])
        scores = on_tasks.get(_whose(first), {})
        header = ["blocks chosen by", "point", "skipped", "KL divergence", "change of NLL"]
        header += ["first token, ms", *(f"times {report.name_of(b)}" for b in baselines)]
        header += ["attention, ms", *(f"times {report.name_of(b)}" for b in baselines)]
        header += ["prompts", "tasks", "share of dense's"] if scores else []
        body = []
        for record in group:
            dense = record["candidate"] == DENSE
            row = [label(record["candidate"]), "" if dense else _asked(record)]
            row += [f"{np.mean(record['sparsity']):.3f}"]
            row += ["", ""] if dense else [_interval(record[n]) for n in ("kl", "nll_change")]
            for time, ratios in (("ms", "speedup"), ("attention_ms", "attention_speedup")):
                row.append(f"{record[time]:.0f}")
                row += [
                    f"{record[ratios][b]:.2f}" if b in record[ratios] else "" for b in baselines
                ]
            if scores:
                row += _score_cells(*scores.get(_point(record), (None, None)))
            body.append(row)
        windows = len(first["contexts"])
        parts.append(f"### {_length(first)}, {windows} windows{_where(first)}")
        parts += [report.markdown_table(header, body), report.provenance(group)]
    return "\n\n".join(parts)


def task_tables(records: Sequence[Record]) -> str:
    """Markdown: the score of each task, by length."""
    parts = []
    for group in tasks(records):
        names = list(dict.fromkeys(_task(context) for r in group for context in r["contexts"]))
        body = [
            [
                label(record["candidate"]),
                "" if record["candidate"] == DENSE else _asked(record),
                f"{np.mean(record['sparsity']):.3f}",
                *(f"{np.mean(by[n]):.2f}" if n in (by := _by_task(record)) else "" for n in names),
                f"{_mean_score(record):.3f}",
            ]
            for record in group
        ]
        first = group[0]
        prompts = f"{len(first['contexts'])} prompts{_seed(first)}"
        parts.append(f"### {_length(first)}, {prompts}{_where(first)}")
        header = ["blocks chosen by", "point", "skipped", *names, "mean"]
        parts += [report.markdown_table(header, body), report.provenance(group)]
    return "\n\n".join(parts)


def position_tables(records: Sequence[Record]) -> str:
    """Markdown: by position, dense's NLL, and the KL of each candidate's point nearest to 0.01."""
    parts = []
    for group in texts(records):
        first = group[0]
        bands = [(int(low), int(high)) for low, high, *_ in first["by_position"]]
        header = ["blocks chosen by", "point", *(f"{low} to {high - 1}" for low, high in bands)]
        body = []
        for record in _nearest(group, KL_TARGETS[0]):
            dense = record["candidate"] == DENSE
            figures = [nll if dense else kl for _, _, kl, nll in record["by_position"]]
            point = "NLL" if dense else f"{_asked(record)}: KL"
            digits = 3 if dense else 4
            cells = [f"{figure:.{digits}f}" for figure in figures]
            body.append([label(record["candidate"]), point, *cells])
        parts.append(f"### {_length(first)}, {len(first['contexts'])} windows{_where(first)}")
        parts.append(report.markdown_table(header, body))
    return "\n\n".join(parts)


def _nearest(group: Sequence[Record], loss: float) -> list[Record]:
    """Dense, and of each candidate the point whose loss is closest."""
    found: dict[str, Record] = {}
    for record in group:
        other = found.get(record["candidate"])
        if record["candidate"] != CONTROL and (
            other is None or _distance(record, loss) < _distance(other, loss)
        ):
            found[record["candidate"]] = record
    return list(found.values())


def _distance(record: Record, loss: float) -> float:
    return abs(math.log(max(float(np.mean(record["kl"])), 1e-9) / loss))


def law_tables(records: Sequence[Record]) -> str:
    """Markdown: the share skipped at each loss, by length."""
    parts = []
    for group in _by_model(records):
        lengths = sorted({int(record["seqlen"]) for record in group})
        parts.append(f"### {_where(group[0]).removeprefix(': ')}")
        for target in KL_TARGETS:
            found = law(group, target)
            header = [f"blocks chosen by: skipped at KL {target:g}"]
            header += [f"{tokens / 1024:g}K" for tokens in lengths]
            body = [
                [label(name), *(interval_text(by[n]) if n in by else "" for n in lengths)]
                for name, by in found.items()
            ]
            parts.append(report.markdown_table(header, body))
        parts.append(report.provenance(group))
    return "\n\n".join(parts)


def law(group: Sequence[Record], target: float) -> dict[str, dict[int, list[float]]]:
    """By candidate and length, the share skipped at a loss: [mean, low, high].

    Intervals are 95 % of a bootstrap over contexts.
    """
    found: dict[str, dict[int, list[float]]] = {}
    kept = (DENSE, CONTROL)
    sparse = sorted((r for r in group if r["candidate"] not in kept), key=_order)
    for line in report.grouped(sparse, ("candidate", "seqlen")):
        # Of the windows on which the loss is reached the most: one point on many says nothing.
        shares = [
            _share_at(same, target) for same in _in_order(report.grouped(line, ("contexts",)))
        ]
        reached = next((share for share in shares if not np.isnan(share[0])), shares[0])
        found.setdefault(line[0]["candidate"], {})[line[0]["seqlen"]] = reached
    return found


def _share_at(line: Sequence[Record], target: float) -> list[float]:
    """The share skipped at a loss, from records on the same windows: [mean, low, high]."""
    windows = len(line[0]["contexts"])
    points = [
        Point(r["asked"], *(np.asarray(r[n]) for n in ("sparsity", "kl", "nll_change")))
        for r in line
    ]
    mean = sparsity_at(points, target, np.arange(windows))
    if windows == 1:
        return [mean, np.nan, np.nan]
    draws = np.random.default_rng(0).integers(0, windows, (BOOTSTRAPS, windows))
    return with_interval(mean, np.array([sparsity_at(points, target, draw) for draw in draws]))


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw accuracy against time for each length, needles, and skipped against length."""
    on_tasks = scored(records)
    # Of each length, the windows that the most was measured on.
    widest = {_whose(group[0]): group for group in sorted(texts(records), key=len)}
    suffixes = _suffixes(list(widest.values()), "seqlen")
    files = [
        _draw_curves(group, on_tasks.get(whose, {}), folder, suffix)
        for (whose, group), suffix in zip(widest.items(), suffixes, strict=True)
    ]
    by_lengths: dict[bool, list[list[Record]]] = {True: [], False: []}
    for group in _by_model(records):
        by_lengths[len({record["seqlen"] for record in group}) > 1].append(group)
    files += [
        _draw_law(
            group, [one for one in by_lengths[False] if _card(one) == _card(group)], folder, suffix
        )
        for group, suffix in zip(
            by_lengths[True], _suffixes(by_lengths[True], "model"), strict=True
        )
    ]
    by_prompts = ([r for r in group if r["depths"]] for group in tasks(records))
    if needles := [rows for rows in by_prompts if len(rows) > 1]:  # dense alone shows nothing
        files.append(_draw_needles(needles, folder))
    return files


def _suffixes(groups: Sequence[Sequence[Record]], named: str) -> list[str]:
    """What tells the pictures of groups apart that are named by one field and have it in common."""
    names = [str(group[0][named]) for group in groups]
    found = report.told_apart(names, groups, _MODEL)
    return ["".join(f"-{report.slug(each)}" for each in more) for more in found]


def _draw_curves(
    group: Sequence[Record], scores: dict[_Point, Scored], folder: Path, suffix: str
) -> Path:
    pyplot = report.load_pyplot()
    lines = [
        line for line in report.grouped(group, ("candidate",)) if line[0]["candidate"] != DENSE
    ]
    shares = {
        point: _mean_score(score) / max(_mean_score(dense), 1e-9)
        for point, (score, dense) in scores.items()
        if dense is not None
    }
    # Where dense attention alone did the tasks, there is nothing to compare.
    panels = 3 if any(_point(record) in shares for line in lines for record in line) else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(5 * panels, 5), **_LAYOUT)
    for index, line in enumerate(sorted(lines, key=lambda one: _order(one[0]))):
        style = _style(index)
        losses = [max(float(np.mean(record["kl"])), 1e-6) for record in line]
        first, attention = ([_over_fastest(r, n) for r in line] for n in _RATIOS)
        axes[0].plot(attention, losses, label=label(line[0]["candidate"]), **style)
        axes[1].plot(first, losses, **style)
        if done := [record for record in line if _point(record) in shares]:
            times = [_over_fastest(record, "attention_speedup") for record in done]
            axes[2].plot(times, [shares[_point(record)] for record in done], **style)
    names = ["attention, times the fastest dense", "time to first token, times the fastest dense"]
    for axis, name in zip(axes, [*names, names[0]], strict=False):
        axis.set(xlabel=name, ylabel="KL divergence from dense, nats", yscale="log")
        axis.axvline(1.0, color="grey", lw=0.6)
        axis.grid(alpha=0.3)
    for axis in axes[:2]:
        for target in KL_TARGETS:
            axis.axhline(target, color="grey", lw=0.6, ls=":")
    if panels == 3:
        axes[2].set(ylabel="score on tasks, share of dense's", yscale="linear")
        axes[2].axhline(0.99, color="grey", lw=0.6, ls=":")
    figure.suptitle(f"{group[0]['model']}, {_length(group[0])}, {group[0]['gpu']}", fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    seqlen = group[0]["seqlen"]
    return report.save(figure, folder / f"long-accuracy-{seqlen:06}{suffix}.png")


def _style(index: int) -> dict[str, Any]:
    """Of a candidate's line; the first ten are drawn through."""
    return {
        "marker": _MARKERS[index % len(_MARKERS)],
        "color": f"C{index % 10}",
        "linestyle": "-" if index < 10 else "--",
        "markersize": 4,
    }


_RATIOS = ("speedup", "attention_speedup")


def _over_fastest(record: Record, name: str) -> float:
    return float(min(record[name].values()))


def _draw_law(
    group: Sequence[Record], one_length: Sequence[Sequence[Record]], folder: Path, suffix: str
) -> Path:
    """Lines of a model, and hollow markers of models that were measured at one length."""
    pyplot = report.load_pyplot()
    figure, axes = pyplot.subplots(1, len(KL_TARGETS), figsize=(10, 5), sharey=True, **_LAYOUT)
    named: set[str] = set()
    drawn = [group, *one_length]
    seqlens = sorted({int(record["seqlen"]) for records in drawn for record in records})
    for axis, target in zip(axes, KL_TARGETS, strict=True):
        found = [law(records, target) for records in drawn]
        candidates = list(dict.fromkeys(name for each in found for name in each))
        for each, (index, name) in itertools.product(found, enumerate(candidates)):
            by = each.get(name, {})
            known = [(length, *by[length]) for length in sorted(by) if np.isfinite(by[length][0])]
            if not known:
                continue
            lengths, means, lows, highs = (np.array(column) for column in zip(*known, strict=True))
            lows, highs = (np.where(np.isfinite(x), x, means) for x in (lows, highs))
            axis.errorbar(
                lengths,
                1 - means,
                yerr=np.abs([highs - means, means - lows]),
                capsize=2,
                label=None if name in named else label(name),
                **_style(index),
                **({} if each is found[0] else {"markerfacecolor": "white"}),
            )
            named.add(name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(seqlens, [f"{seqlen / 1024:g}K" for seqlen in seqlens])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.set(xlabel="tokens", title=f"KL divergence {target:g}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("share of the visible blocks kept")
    title = f"{group[0]['model']}, {group[0]['gpu']}"
    hollow = [f"{one[0]['model']} ({one[0]['seqlen'] / 1024:g}K)" for one in one_length]
    figure.suptitle("; hollow: ".join([title, *hollow]), fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    return report.save(figure, folder / f"long-law-{report.slug(group[0]['model'])}{suffix}.png")


def _draw_needles(groups: Sequence[Sequence[Record]], folder: Path) -> Path:
    """Scores of a single needle: a row a candidate, a column a depth."""
    pyplot = report.load_pyplot()
    heights = [len(rows) + 3 for rows in groups]
    figure, axes = pyplot.subplots(
        *(len(groups), 1),
        figsize=(7, 0.22 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        **_LAYOUT,
    )
    for axis, rows in zip(axes[:, 0], groups, strict=True):
        cells = np.array([_by_task(record)["single"] for record in rows])
        depths, places = rows[0]["depths"], range(len(rows))
        axis.pcolormesh(depths, places, cells, shading="nearest", vmin=0, vmax=1, cmap="RdYlGn")
        axis.invert_yaxis()
        names = [
            f"{label(r['candidate'])} {'' if r['candidate'] == DENSE else _asked(r)}" for r in rows
        ]
        axis.set_yticks(places, names, fontsize=6)
        axis.tick_params(axis="x", labelsize=7)
        prompts = f"{len(rows[0]['contexts'])} prompts{_seed(rows[0])}"
        axis.set_title(f"one needle by depth, {_length(rows[0])}, {prompts}", fontsize=8)
    return report.save(figure, folder / "long-needles.png")


def _by_model(records: Sequence[Record]) -> Iterable[list[Record]]:
    every = [record for group in texts(records) for record in group]
    return report.grouped(every, _MODEL)


def _card(group: Sequence[Record]) -> tuple[str, ...]:
    return tuple(str(group[0][name]) for name in _MODEL if name != "model")


def _whose(record: Record) -> tuple[str, ...]:
    return tuple(str(record[name]) for name in (*_MODEL, "seqlen"))


def _point(record: Record) -> _Point:
    return record["candidate"], record["axis"], float(record["asked"])


def _asked(record: Record) -> str:
    return f"{record['axis']} {record['asked']:g}"


def _length(record: Record) -> str:
    return f"{record['seqlen'] / 1024:g}K tokens"


def _where(record: Record) -> str:
    return f": {record['model']}, {record['dtype']} ({record['gpu']})"


def _interval(values: Sequence[float]) -> str:
    found = mean_interval(values)
    if found.low is None or found.high is None:
        return f"{found.mean:.4f}"
    return f"{found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]"


def _seed(record: Record) -> str:
    """Of a record on tasks: " of seed" and its number; nothing for seed 0."""
    first: str = record["contexts"][0]
    return first[len(first.partition(" of seed ")[0]) :]


def _task(context: str) -> str:
    return context.partition(" ")[0]


def _by_task(record: Record) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for context, score in zip(record["contexts"], record["scores"], strict=True):
        found.setdefault(_task(context), []).append(score)
    return found


def _mean_score(record: Record) -> float:
    """The mean over tasks, each of the same weight."""
    return float(np.mean([np.mean(scores) for scores in _by_task(record).values()]))


def _score_cells(record: Record | None, dense: Record | None) -> list[str]:
    """Prompts, mean score, and the share of dense's with a bootstrap's interval over prompts."""
    if record is None:
        return ["", "", ""]
    cells = [str(len(record["contexts"])), f"{_mean_score(record):.3f}"]
    if dense is None or record is dense or _mean_score(dense) == 0:
        return [*cells, ""]
    names = np.array([_task(context) for context in record["contexts"]])
    ours, theirs = np.asarray(record["scores"]), np.asarray(dense["scores"])
    generator = np.random.default_rng(0)
    sums = np.zeros((2, BOOTSTRAPS))
    for task in dict.fromkeys(names):
        places = np.flatnonzero(names == task)
        draws = places[generator.integers(0, len(places), (BOOTSTRAPS, len(places)))]
        sums += [ours[draws].mean(1), theirs[draws].mean(1)]
    shares = np.divide(sums[0], sums[1], out=np.full(BOOTSTRAPS, np.nan), where=sums[1] > 0)
    share, low, high = with_interval(_mean_score(record) / _mean_score(dense), shares)
    return [*cells, f"{share:.1%}" if np.isnan(low) else f"{share:.1%} [{low:.1%}, {high:.1%}]"]
