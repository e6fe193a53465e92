# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""From a file of ``bsfa evaluate`` to records of kind "evaluation", one a configuration.

::

    python benchmarks/evaluation.py text.json --command "bsfa evaluate ..." --out text.jsonl

``report.py add text.jsonl`` then takes them over into ``benchmarks/results``. What a figure needs
is kept for every context, so that intervals can be made from the records: sparsity, divergence and
change of the negative log-likelihood on text; hits, a character a depth, on needles.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bsfa_hf.evaluation.results import load
from harness import SCHEMA, Record, Results, run_program


def condense(content: Mapping[str, Any], *, date: str, command: str) -> list[Record]:
    """The records of a file of results of ``bsfa evaluate``.

    Args:
        content: as ``bsfa_hf.evaluation.results.load`` gives it; tasks other than text and needles
            are left out.
        date: when it was measured, UTC, in ISO form.
        command: how to measure it again.

    Raises:
        ValueError: the file has several texts, or a configuration shares no sample with dense.
    """
    header = content["header"]
    made_with = header["environment"]
    chosen = [record for record in content["records"] if record["task"] in ("text", "needle")]
    texts = {record.get("text", "") for record in chosen}
    if len(texts) > 1:  # contexts of two may have one name
        raise ValueError(f"results must be on one text, or one part of it, got {len(texts)}")
    groups: dict[tuple[str, int, int], dict[str, list[Mapping[str, Any]]]] = {}
    for record in chosen:
        key = (record["task"], record["length"], record.get("keys", 0))
        groups.setdefault(key, defaultdict(list))[record["configuration"]].append(record)
    found = []
    for (task, seqlen, keys), by_configuration in sorted(groups.items()):
        dense = {record["sample"]: record for record in by_configuration.get("dense", [])}
        for name, all_records in by_configuration.items():
            about = header["configurations"][name]
            options = about["options"]
            records = [record for record in all_records if record["sample"] in dense]
            if not records:
                raise ValueError(
                    f"{about.get('name', name)} on {task} at {seqlen} tokens must share samples "
                    "with dense, and shares none"
                )
            figures = _text(records, dense) if task == "text" else _needles(records)
            found.append(
                {
                    "schema": SCHEMA,
                    "kind": "evaluation",
                    "self_test": made_with["device"] == "CPU",
                    "date": date,
                    "command": command,
                    "gpu": made_with["device"],
                    "driver": None,
                    "torch": made_with["torch"],
                    "cuda": None,
                    "commit": None,
                    "sources": "",
                    "model": header["model"]["name"],
                    "dtype": made_with["dtype"],
                    "backend": made_with["backend"],
                    "task": task,
                    "seqlen": seqlen,
                    "keys": keys,
                    "method": about["kind"],
                    # Files of before tables were described say it of scalars alone.
                    "rule": about.get("rule", options.get("rule", "")),
                    "geometry": about["geometry"],
                    "voters": about.get("voters", int(options.get("voters", 1))),
                    "options": options,
                    "sparse_calls_by_selection": _selected(records),
                    **figures,
                }
            )
    return found


def _selected(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Calls by the scores that blocks were chosen from; empty where nothing chooses blocks."""
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.get("sparse_calls_by_selection", {}))
    return dict(total)


def _text(records: Iterable[Mapping[str, Any]], dense: Mapping[str, Mapping[str, Any]]) -> Record:
    chosen = [(record, dense[record["sample"]]) for record in records]
    return {
        # A file's name may have spaces; the digest after it has none.
        "contexts": [record["sample"].rsplit(" ", 1)[0] for record, _ in chosen],
        "sparsity": [record["sparsity"] for record, _ in chosen],
        "kl": [_over_bands(record, "kl") for record, _ in chosen],
        "nll_change": [_over_bands(r, "nll") - _over_bands(d, "nll") for r, d in chosen],
    }


def _over_bands(record: Mapping[str, Any], name: str) -> float:
    positions = sum(band["positions"] for band in record["bands"])
    return float(sum(band[name] * band["positions"] for band in record["bands"]) / positions)


def _needles(records: Iterable[Mapping[str, Any]]) -> Record:
    by_context: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        place = re.sub(r"^\d+ keys, depth [\d.]+, ", "", record["sample"])
        by_context[f"{record['kind']}, {place}"].append(record)
    for cells in by_context.values():
        cells.sort(key=lambda cell: cell["depth"])
    return {
        "contexts": list(by_context),
        "sparsity": [
            sum(cell["sparsity"] for cell in cells) / len(cells) for cells in by_context.values()
        ],
        "depths": [[cell["depth"] for cell in cells] for cells in by_context.values()],
        "hits": ["".join("01"[cell["hit"]] for cell in cells) for cells in by_context.values()],
    }


def iso_date(text: str) -> str:
    """A date in ISO form, for argparse: the latest record is the one that counts."""
    try:
        datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be as 2026-11-29T08:00:00+00:00: {error}") from None
    return text


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="From bsfa evaluate's files to records.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--command", required=True, help="how it was measured")
    parser.add_argument("--date", type=iso_date, help="when it was measured (default: the file's)")
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines file to append to")
    arguments = parser.parse_args(argv)
    content = load(arguments.file)
    written = datetime.fromtimestamp(arguments.file.stat().st_mtime, timezone.utc)
    try:
        records = condense(
            content,
            date=arguments.date or written.isoformat(timespec="seconds"),
            command=arguments.command,
        )
    except ValueError as error:
        raise ValueError(f"{arguments.file}: {error}") from error
    results = Results(arguments.out)
    for record in records:
        results.append(record)
    return 0


if __name__ == "__main__":
    run_program(main)
