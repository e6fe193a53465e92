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
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from harness import SCHEMA, Record, Results, run_program


def condense(content: Mapping[str, Any], *, date: str, command: str) -> list[Record]:
    """The records of a file of results of ``bsfa evaluate``.

    Args:
        content: the file; tasks other than text and needles are left out.
        date: when it was measured, UTC, in ISO form.
        command: how to measure it again.

    Raises:
        ValueError: the file is not one of ``bsfa evaluate``, or a context has no dense result.
    """
    if content.get("format") != "bsfa-evaluation":
        raise ValueError(f"format must be 'bsfa-evaluation', got {content.get('format')!r}")
    header = content["header"]
    made_with = header["environment"]
    groups: dict[tuple[str, int, int], dict[str, list[Mapping[str, Any]]]] = {}
    for record in content["records"]:
        if record["task"] in ("text", "needle"):
            key = (record["task"], record["length"], record.get("keys", 0))
            groups.setdefault(key, defaultdict(list))[record["configuration"]].append(record)
    found = []
    for (task, seqlen, keys), by_configuration in sorted(groups.items()):
        if "dense" not in by_configuration:
            raise ValueError(f"{task} at {seqlen} tokens must have been run dense, too")
        for name, records in by_configuration.items():
            about = header["configurations"][name]
            options = about["options"]
            figures = (
                _text(records, by_configuration["dense"]) if task == "text" else _needles(records)
            )
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


def _text(records: Iterable[Mapping[str, Any]], dense: Iterable[Mapping[str, Any]]) -> Record:
    base = {record["sample"]: record for record in dense}
    chosen = [(record, base[record["sample"]]) for record in records if record["sample"] in base]
    return {
        "contexts": [record["sample"].split()[0] for record, _ in chosen],
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
        "hits": ["".join("01"[cell["hit"]] for cell in cells) for cells in by_context.values()],
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="From bsfa evaluate's files to records.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--command", required=True, help="how it was measured")
    parser.add_argument("--date", help="when it was measured, in ISO form (default: the file's)")
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines file to append to")
    arguments = parser.parse_args(argv)
    written = datetime.fromtimestamp(arguments.file.stat().st_mtime, timezone.utc)
    content = json.loads(arguments.file.read_text(encoding="utf-8"))
    try:
        records = condense(
            content,
            date=arguments.date or written.isoformat(timespec="seconds"),
            command=arguments.command,
        )
    except ValueError as error:
        print(f"error: {arguments.file}: {error}", file=sys.stderr)
        return 2
    results = Results(arguments.out)
    for record in records:
        results.append(record)
    return 0


if __name__ == "__main__":
    run_program(main)
