# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""``table info``, ``table plot`` and ``table convert``."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from bsfa_calib import report
from bsfa_calib.cli.common import table_path
from bsfa_calib.convert import is_of_paper, load_table
from bsfa_calib.report import printable
from bsfa_calib.thresholds import checksum_of


def add_table(subparsers: Any) -> None:
    """Add ``table`` to the commands of a parser; each of its own sets ``run``."""
    parser = subparsers.add_parser(
        "table",
        help="look at a threshold table, draw it, or convert one of the paper's repository",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="say what a table holds", allow_abbrev=False)
    info.add_argument("file", help="a .safetensors table, or a .pt file of the paper's repository")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    plot = commands.add_parser(
        "plot", help="draw thresholds and predicted sparsity", allow_abbrev=False
    )
    plot.add_argument("file", help="a .safetensors table, or a .pt file of the paper's repository")
    plot.add_argument("output", help="the image to write, as thresholds.png")
    plot.add_argument(
        "--points", nargs="+", type=float, help="operating points to draw (default: three)"
    )
    plot.set_defaults(run=_plot)

    convert = commands.add_parser(
        "convert",
        help="convert a .pt file of the paper's repository, or write a table anew with a checksum",
        allow_abbrev=False,
    )
    convert.add_argument("file", help="the .pt file, or a .safetensors table")
    convert.add_argument("output", help="the .safetensors table to write; may be the same")
    convert.add_argument(
        "--name", default="", help="name of the model that it belongs to (default: as in the file)"
    )
    convert.set_defaults(run=_convert)


def _info(arguments: argparse.Namespace) -> int:
    table = load_table(arguments.file)
    checksum = None if is_of_paper(arguments.file) else checksum_of(arguments.file)
    if arguments.json:
        print(report.as_json(table, checksum))
        return 0
    print(report.describe(table, checksum))
    print()
    print(report.operating_points(table))
    for sentence in report.verdict(table):
        print(sentence)
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from bsfa_calib.plot import plot

    plot(load_table(arguments.file), arguments.output, points=arguments.points)
    print(f"wrote {printable(arguments.output)}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    output = table_path(arguments.output)
    table = load_table(arguments.file)
    if arguments.name:
        table = dataclasses.replace(table, model=arguments.name)
    table.save(output)
    print(
        f"wrote {printable(str(output))}: {table.axis} = {', '.join(map(str, table.points))}; "
        f"{table.layers} layers, {table.heads} heads, {table.rows} rows; geometry "
        f"{table.geometry}"
    )
    return 0
