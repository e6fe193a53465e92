# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The command ``bsfa``: see block-sparse attention at work, use it, and measure it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import metadata

from bsfa_calib.cli import add_calibrate, add_table, guarded
from bsfa_calib.cli.common import USAGE_ERROR
from bsfa_hf._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if "run" not in arguments:
        parser.print_help()
        return USAGE_ERROR
    return guarded("bsfa", lambda: int(arguments.run(arguments)))


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets ``run``."""
    from bsfa_hf.cli import demo, evaluate, generate, info

    parser = argparse.ArgumentParser(
        prog="bsfa",
        description="Block-sparse attention for the models of Hugging Face transformers.",
        epilog="BSFA_TRACEBACK=1 shows where an error comes from.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bsfa-hf {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    demo.add_subcommand(subparsers)
    generate.add_subcommand(subparsers)
    add_calibrate(subparsers)
    add_table(subparsers)
    evaluate.add_subcommands(subparsers)
    info.add_subcommand(subparsers)
    return parser


def installed(distribution: str) -> str:
    """Version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
