# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The commands ``calibrate`` and ``table``, for ``bsfa-calibrate`` and whoever else mounts them.

``bsfa-calibrate`` without a command takes the flags of the paper's script (`bsfa_calib.cli.paper`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bsfa_calib import __version__
from bsfa_calib.cli.calibrate import add_calibrate
from bsfa_calib.cli.common import USAGE_ERROR, Parser, guarded
from bsfa_calib.cli.paper import add_paper, underscored
from bsfa_calib.cli.table import add_table

__all__ = ["add_calibrate", "add_table", "guarded", "main"]

_PROGRAM = "bsfa-calibrate"
_EPILOG = """
With the flags of the paper's script and no command, calibrates its thresholds:
  bsfa-calibrate --model NAME --data_file FILE --k_values 16,32,64   (see bsfa-calibrate run --help)
BSFA_TRACEBACK=1 shows where an error comes from.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``bsfa-calibrate``; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not arguments:
        parser.print_help()
        return USAGE_ERROR
    if arguments[0] in ("info", "convert", "plot"):
        arguments.insert(0, "table")
    elif arguments[0].startswith("--") and arguments[0] not in ("--help", "--version"):
        arguments.insert(0, "calibrate" if "--method" in arguments else "run")
    if arguments[0] == "run":
        arguments = [underscored(argument) for argument in arguments]
    options = parser.parse_args(arguments)
    return guarded(_PROGRAM, lambda: int(options.run(options)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROGRAM,
        description="Calibrate thresholds for block-sparse attention, and look at tables of them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bsfa-calib {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_calibrate(commands)
    add_table(commands)
    add_paper(commands)
    return parser
