# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The flags of ``calibrate``: what each method takes, and what it is without being told."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bsfa_calib.cli.common import (
    ceiling,
    checked,
    k_values,
    loss,
    not_negative,
    positive,
    seed,
    sparsity,
)
from bsfa_calib.report import printable
from bsfa_calib.thresholds import DEFAULT_VOTERS, RULES, VOTERS

METHODS = ("learned", "scalar", "topk")

# Points of a table that is calibrated without saying which.
TARGETS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)

# Who takes the flags that not all take; "points" is learned with --points-only.
_MADE, _ALL = METHODS, (*METHODS, "points")
_TAKERS: dict[str, tuple[str, ...]] = {
    "target_sparsity": ("learned", "scalar", "points"),
    "max_loss": ("learned", "points"),
    "k": ("topk",),
    "rule": _MADE,
    "geometry": _MADE,
    "voters": _MADE,
    "holdout": _MADE,
    "serve_length": ("learned", "scalar"),
    "serve_samples": ("learned", "scalar"),
    "start": ("learned", "points"),
    "points_only": ("points",),
    "steps": ("learned",),
    "further_steps": ("learned",),
    "knots": ("learned",),
    "ceiling": ("learned",),
    "seed": ("learned",),
    "backend": ("learned", "scalar", "points"),
    "aggregate": ("topk",),
    "keep_maxima": ("topk",),
}
_DEFAULTS: dict[str, Any] = {
    "length": 4096,
    "samples": 24,
    "holdout": 6,
    "serve_samples": 2,
    "steps": 60,
    "further_steps": 30,
    "knots": 1,
    "ceiling": math.inf,
    "seed": 0,
    "k": (16, 32, 64, 96, 128),
    "aggregate": "pooled",
    "out": "thresholds.safetensors",
    "dtype": "auto",
    "device": "auto",
    "backend": "auto",
    "offline": False,
    "resume": True,
    "keep_checkpoint": False,
}
_BY_METHOD: dict[str, dict[str, Any]] = {
    "learned": {"rule": "peak_lse", "geometry": "128x64", "voters": DEFAULT_VOTERS},
    "scalar": {"rule": "peak_lse", "geometry": "128x64", "voters": DEFAULT_VOTERS},
    "topk": {"rule": "absolute", "geometry": "128x64", "voters": 1},
    "points": {"samples": 4, "holdout": 0},
}
FLAGS = (
    *("method", "model", "text", "text_part", "name", "checkpoint"),
    *dict.fromkeys((*_TAKERS, *_DEFAULTS)),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser every flag; one that is not given is None."""
    add = parser.add_argument
    add("--model", required=True, help="model directory, .gguf file or Hub id")
    add("--method", choices=METHODS, help="default: learned")
    text = parser.add_argument_group("text")
    add = text.add_argument
    add(
        "--text",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="text files (also .xz, .gz, .json, .jsonl), or a folder of them; of a folder, each "
        "subfolder is a kind of text, and samples are taken from every kind in turn",
    )
    add("--text-part", metavar="A:B", help="of each file (default: 0:0.5; of JSON samples 0:1)")
    add("--length", type=checked(positive), metavar="N", help="tokens in a sample (default: 4096)")
    add("--samples", type=checked(positive), metavar="N", help="to calibrate on (default: 24)")
    add("--holdout", type=checked(not_negative), metavar="N", help="more, to measure on (6)")
    add(
        "--serve-length",
        type=checked(positive),
        metavar="N",
        help="learned, scalar: find and measure the points on longer samples, of this many tokens, "
        "instead of on those held out",
    )
    add("--serve-samples", type=checked(positive), metavar="N", help="of them (default: 2)")
    points = parser.add_argument_group("operating points").add_mutually_exclusive_group()
    points.add_argument(
        "--target-sparsity",
        type=checked(sparsity),
        nargs="+",
        metavar="S",
        help="shares of blocks to skip (not for topk; default: "
        f"{' '.join(map(str, TARGETS))}, as far as they can be reached at the length)",
    )
    points.add_argument(
        "--max-loss",
        type=checked(loss),
        nargs="+",
        metavar="KL",
        help="learned: instead, the most that can be skipped within these divergences from dense",
    )
    points.add_argument(
        "--k",
        type=checked(k_values),
        metavar="LIST",
        help="topk: blocks to keep a query block, as 4-64 or 16,32,64 (default: 16,32,64,96,128)",
    )
    what = parser.add_argument_group("thresholds")
    add = what.add_argument
    add("--rule", choices=RULES, help="default: peak_lse; absolute for topk")
    add("--geometry", metavar="QxK", help="queries x keys of a block: 128x64 (default) or 64x64")
    add(
        "--voters",
        type=int,
        choices=VOTERS,
        help="one query row in so many votes on a block; the last query block votes whole "
        f"(default: {DEFAULT_VOTERS}; 1 for topk)",
    )
    add(
        "--start",
        type=Path,
        metavar="TABLE",
        help="learned: start from its point that skips most nearly as much; fewer steps do",
    )
    add(
        "--points-only",
        action="store_const",
        const=True,
        help="learn nothing: find the points on the thresholds of --start, on --samples (default: "
        "4) of --length",
    )
    add("--steps", type=checked(positive), help="learned: for the first sparsity (default: 60)")
    add("--further-steps", type=checked(positive), help="learned: for the others (default: 30)")
    add("--knots", type=checked(positive), help="learned: thresholds a head (default: 1)")
    add("--ceiling", type=checked(ceiling), help="learned: the most a threshold may be")
    add("--seed", type=checked(seed), help="learned: of the order of the samples (default: 0)")
    add("--aggregate", metavar="HOW", help="topk: pooled (default), mean, median, quantile:Q")
    add(
        "--keep-maxima",
        type=checked(positive),
        metavar="N",
        help="topk: block maxima kept a query block (default: 4 times the largest k)",
    )
    how = parser.add_argument_group("running")
    add = how.add_argument
    add("--out", metavar="FILE", help="table to write (default: thresholds.safetensors)")
    add("--name", help="name of the model in the table")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="in which the model will be used, and in which thresholds are made (default: float32 "
        "on a CPU, else bfloat16)",
    )
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    add("--backend", choices=("auto", "reference"), help="to measure with (default: auto)")
    add("--offline", action="store_const", const=True, help="take nothing from the network")
    add(
        "--checkpoint",
        metavar="DIR",
        help="what is done is kept here until all is (default: FILE.checkpoint)",
    )
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="use what an interrupted run has kept (the default)",
    )
    add(
        "--keep-checkpoint",
        action="store_const",
        const=True,
        help="keep what was done, for other points later",
    )


def complete(arguments: argparse.Namespace, *, paper: bool = False) -> str:
    """Refuse flags that are not for the method, and fill in what was not given.

    Args:
        arguments: changed in place.
        paper: whether they come from the paper's flags, which leave more to the model.

    Returns:
        The method; "points" for learned with --points-only.

    Raises:
        ValueError: a flag is not for the method, or breaks a rule.
    """
    method = arguments.method or "learned"
    shown = f"--method {method}"
    if arguments.points_only and method == "learned":
        method, shown = "points", "--points-only"
    for name in FLAGS:
        if getattr(arguments, name) is not None and method not in _TAKERS.get(name, _ALL):
            raise ValueError(f"--{name.replace('_', '-')} is not for {shown}")
    if method == "points" and arguments.start is None:
        raise ValueError("--points-only needs --start")
    serves = arguments.serve_length is not None
    if arguments.serve_samples is not None and not serves:
        raise ValueError("--serve-samples needs --serve-length")
    if serves and arguments.holdout:
        raise ValueError(
            "--holdout is not for --serve-length: points are measured on the serving samples"
        )
    if serves:
        arguments.holdout = 0
    elif not paper and method == "learned" and arguments.holdout == 0:
        raise ValueError("--holdout must be at least 1 for --method learned, got 0")
    defaults: Mapping[str, Any] = {**_DEFAULTS, **_BY_METHOD[method]}
    for name in FLAGS:
        if getattr(arguments, name) is None and not (name == "length" and paper):
            setattr(arguments, name, defaults.get(name))
    if serves and arguments.serve_length < arguments.length:
        raise ValueError(
            f"--serve-length must be at least --length, {arguments.length}, got "
            f"{arguments.serve_length}"
        )
    return method


def command(arguments: argparse.Namespace) -> str:
    """The flags that were given, as a command."""
    words = ["bsfa-calibrate", "calibrate"]
    for name in FLAGS:
        value = getattr(arguments, name)
        flag = f"--{name.replace('_', '-')}"
        if name == "resume" or value is None:
            continue
        if value is True:
            words.append(flag)
        elif name == "k":
            words += [flag, ",".join(map(str, value))]
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return printable(shlex.join(words))
