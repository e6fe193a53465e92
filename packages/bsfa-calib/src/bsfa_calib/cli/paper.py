# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The flags of the paper's script, as the flags of ``calibrate --method topk`` that they mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bsfa_calib.cli import calibrate
from bsfa_calib.cli.common import checked, k_values, not_negative, positive, sparsity
from bsfa_calib.thresholds import RULES

_MAX_SEQ_LEN = 16384


def underscored(argument: str) -> str:
    """``--max_seq_len`` for ``--max-seq-len``; anything but an option stays as it is."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def add_paper(commands: Any) -> None:
    """Add ``run``, which takes the paper's flags, to the commands of ``bsfa-calibrate``."""
    parser = commands.add_parser(
        "run",
        help="calibrate with the flags of the paper's script (as without a command)",
        description="Measure a model on text, and write a table for k blocks.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", "--model_name", dest="model", required=True, metavar="NAME")
    add("--data_file", metavar="FILE", help="JSON list or lines, of objects with input_text")
    add("--text", nargs="+", metavar="PATH", help="plain text: folders or files")
    add("--max_seq_len", type=checked(positive), metavar="N", help="default: 16384, or less")
    add("--num_examples", type=checked(positive), default=16, metavar="N", help="of each task")
    add("--holdout_samples", type=checked(not_negative), default=1, metavar="N", help="likewise")
    add("--thresholds_save_path", default="thresholds.safetensors", metavar="FILE")
    add("--k_values", type=checked(k_values), metavar="LIST", help="as 4-64 or 16,32,64")
    add("--target_sparsity", nargs="+", type=checked(sparsity), metavar="S", help="scalars instead")
    add("--rule", choices=RULES, default="absolute")
    add("--aggregate", metavar="HOW", help="pooled, mean (the paper's), median, quantile:Q")
    add("--q_block_size", type=checked(positive), default=128, metavar="N")
    add("--k_block_size", type=checked(positive), default=64, metavar="N")
    add("--keep_maxima", type=checked(positive), metavar="N")
    add("--name")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--device", default="auto")
    add("--offline", action="store_true")
    add("--checkpoint", metavar="DIR")
    add("--resume", action=argparse.BooleanOptionalAction)
    add("--no_resume", dest="resume", action="store_false", help=argparse.SUPPRESS)
    add("--keep_samples", action="store_true")
    for stated in ("--num_layers", "--num_heads", "--chunk_size"):
        add(stated, type=checked(positive), help=argparse.SUPPRESS)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if (options.data_file is None) == (options.text is None):
        raise ValueError("name the text to calibrate on, with either --data_file or --text")
    if options.k_values and options.target_sparsity:
        raise ValueError("give either --k_values or --target_sparsity")
    meant = argparse.Namespace(**dict.fromkeys(calibrate.FLAGS))
    meant.method = "scalar" if options.target_sparsity else "topk"
    meant.text = [Path(path) for path in options.text or [options.data_file]]
    meant.length = options.max_seq_len
    meant.samples, meant.holdout = options.num_examples, options.holdout_samples
    meant.out = options.thresholds_save_path
    meant.k = options.k_values
    meant.geometry = f"{options.q_block_size}x{options.k_block_size}"
    meant.keep_checkpoint = options.keep_samples or None
    same = ("model", "target_sparsity", "rule", "aggregate", "keep_maxima", "name", "dtype")
    for name in (*same, "device", "offline", "checkpoint", "resume"):
        setattr(meant, name, getattr(options, name))
    return calibrate.run(
        meant,
        paper=calibrate.Paper(
            json=options.data_file is not None,
            longest=_MAX_SEQ_LEN,
            layers=options.num_layers,
            heads=options.num_heads,
        ),
    )
