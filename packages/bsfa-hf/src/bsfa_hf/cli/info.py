# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""``bsfa info``: what is installed."""

from __future__ import annotations

import argparse
from typing import Any


def add_subcommand(subparsers: Any) -> None:
    """Add ``info`` to the subcommands of a parser."""
    parser = subparsers.add_parser(
        "info",
        help="versions, kernels and GPUs",
        description="Versions, kernels and GPUs; bsfa table info FILE says what a table holds.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    del arguments
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
