# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Write manifest.toml from the tables in this directory, or check that it is up to date.

Usage::

    python thresholds/update_manifest.py            # write it
    python thresholds/update_manifest.py --check    # status 1 if it is not what would be written
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from bsfa_calib import ThresholdTable, report

ROOT = Path(__file__).resolve().parent
MANIFEST = ROOT / "manifest.toml"

_HEADER = """\
# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
#
# The tables in this directory, how they were made, and what they were measured to do.
# Written by update_manifest.py.
"""
# Of the provenance; "start_" is what the thresholds come from that points were found on.
_FACTS = (
    *("command", "start_command", "versions", "device", "dtype"),
    *("data", "start_data", "held_out", "start_held_out", "served", "dense_layers"),
)


def table_paths() -> list[Path]:
    """Every table that is shipped, in the order of the manifest."""
    return sorted(ROOT.glob("*/*.safetensors"))


def entry(path: Path) -> str:
    """The manifest's entry for a table."""
    table = ThresholdTable.load(path)
    content = path.read_bytes()
    file = path.relative_to(ROOT).as_posix()
    fields: dict[str, object] = {
        "file": file,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "model": table.model,
        "revision": table.revision,
        "rule": table.rule,
        "block": table.geometry,
        "voters": table.voters,
        "axis": table.axis,
        "points": list(table.points),
        "max_seqlen": table.max_seqlen,
        **({"serve_seqlen": table.serve_seqlen} if table.serve_seqlen else {}),
        "samples": table.samples,
        "aggregate": table.aggregate,
    }
    for key in _FACTS:
        if key in table.provenance:
            fields[key] = table.provenance[key]
    for key in ("expected_sparsity", "expected_kl", "expected_nll"):
        if key in table.provenance:
            fields[key] = [float(value) for value in table.provenance[key].split(", ")]
    for name in ("sparsity", "kept", "held_out_sparsity", "held_out_kept"):
        means = report.model_means(table, name)
        if means is not None:
            fields[name] = [float("nan") if m != m else round(float(m), 4) for m in means]
    lines = [f"{key} = {_toml(value)}" for key, value in fields.items()]
    return "\n".join(["[[table]]", *lines]) + "\n"


def _toml(value: object) -> str:
    """A string, number or list of numbers in TOML, which JSON is close enough to."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float) and value != value:
        return "nan"
    return json.dumps(value, ensure_ascii=False)


def manifest() -> str:
    """The whole manifest."""
    return "\n".join([_HEADER, *map(entry, table_paths())])


def main() -> int:
    """Write or check the manifest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    wanted = manifest()
    if not options.check:
        MANIFEST.write_text(wanted, encoding="utf-8")
        return 0
    if MANIFEST.exists() and MANIFEST.read_text(encoding="utf-8") == wanted:
        return 0
    print(
        f"{MANIFEST.name} is out of date: run python thresholds/update_manifest.py", file=sys.stderr
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
