# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""``bsfa info``: what is installed, and what a threshold table holds."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np


def add_subcommand(subparsers: Any) -> None:
    """Add ``info`` to the subcommands of a parser."""
    parser = subparsers.add_parser(
        "info",
        help="versions, kernels and GPUs, or what a threshold table holds",
        description="Without a table: versions, kernels and GPUs.",
        allow_abbrev=False,
    )
    parser.add_argument("thresholds", nargs="?", metavar="TABLE", help="threshold table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    if arguments.thresholds is not None:
        print(_table(arguments.thresholds))
        return 0
    import torch

    from bsfa_hf.cli import installed
    from bsfa_kernel import build_info

    print(f"bsfa-hf {installed('bsfa-hf')}, bsfa-calib {installed('bsfa-calib')}")
    print(f"torch {torch.__version__}, transformers {installed('transformers')}")
    print(build_info())
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            print(f"GPU {index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    else:
        print("no GPU that torch can use")
    return 0


def _table(path: str) -> str:
    from bsfa_calib.binding import load_table

    table = load_table(path)
    finite = table.thresholds[np.isfinite(table.thresholds)]
    spread = f"{finite.min():.3g} to {finite.max():.3g}" if finite.size else "none finite"
    return "\n".join(
        [
            f"model       {table.model or 'unknown'} {table.revision}".rstrip(),
            f"shape       {table.layers} layers, {table.heads} heads, {table.rows} positions",
            f"rule        {table.rule}, blocks of {table.q_block}x{table.k_block}",
            f"{table.axis:<11} {', '.join(str(point) for point in table.points)}",
            f"made from   {table.samples} samples of up to {table.max_seqlen} tokens "
            f"({table.aggregate or 'aggregation unknown'})",
            f"thresholds  {spread}",
            *(f"{key:<11} {value}" for key, value in sorted(table.provenance.items())),
        ]
    )
