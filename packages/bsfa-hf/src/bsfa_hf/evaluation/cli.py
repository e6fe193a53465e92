# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""``bsfa calibrate``, ``bsfa evaluate``, ``bsfa plot`` and ``bsfa limit-loss``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bsfa_hf.evaluation.configurations import Configuration, make_configuration, parse_configuration

_DESCRIPTION = """
Evaluate a model under several attention configurations, each paired with dense on the same
samples: KL divergence of the next-token distributions from dense, perplexity by position, needles
in a haystack, and tasks of lm-evaluation-harness. Results are written as they come; the same
command goes on where it was stopped.
"""

_EPILOG = """
configurations ([NAME=]KIND[:option=value,...]):
  table:file=T.safetensors,k=32          thresholds of a file; or target_sparsity=, or max_loss=
  scalar:rule=running_max,threshold=-7   one threshold for the whole model (this rule is BLASST's)
  scalar:rule=running_lse,sparsity=0.7   found on text that is not evaluated on; geometry=64x64
  sliding_window:window=1024,sink=64     the last 1024 keys and the first 64
  sparge_attn:topk=0.5                   SpargeAttention, where it is installed

several GPUs: accelerate launch --num_processes 8 -m bsfa_hf evaluate ...
"""


# Points of a table that is calibrated without saying which.
_TARGETS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)


def add_subcommands(subparsers: Any) -> None:
    """Add ``calibrate``, ``evaluate``, ``plot`` and ``limit-loss`` to the subcommands of a parser.

    Each sets ``run``, a function that takes the parsed arguments and returns an exit status.
    """
    _add_calibrate(subparsers)
    evaluate = subparsers.add_parser(
        "evaluate",
        help="accuracy of a model under several attention configurations, paired with dense",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("--model", required=True, help="directory, .gguf file or Hub id")
    evaluate.add_argument("--thresholds", type=Path, metavar="FILE", help="threshold table")
    evaluate.add_argument("--k", type=int, nargs="+", default=[], help="points of the table")
    evaluate.add_argument(
        "--target-sparsity", type=float, nargs="+", default=[], help="points of the table"
    )
    evaluate.add_argument(
        "--max-loss", type=float, nargs="+", default=[], help="points of the table"
    )
    evaluate.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="[NAME=]KIND[:...]",
        help="one more configuration; may be repeated (see below)",
    )
    evaluate.add_argument(
        "--tasks",
        default="kl,perplexity",
        help="kl, perplexity, needle, ruler (its tasks that need no download), single tasks of "
        "RULER, or harness:NAME for any task of lm-evaluation-harness, as "
        "harness:longbench_hotpotqa (default: %(default)s)",
    )
    evaluate.add_argument("--lengths", default="4096", help="tokens in a sample, as 2048,4096")
    evaluate.add_argument("--samples", type=int, default=8, help="for each length (default: 8)")
    evaluate.add_argument("--text", type=Path, metavar="DIR", help="text files, a folder a kind")
    evaluate.add_argument(
        "--text-part",
        default="0.5:1",
        metavar="A:B",
        help="stretch of each file to evaluate on; calibrate on another (default: %(default)s)",
    )
    evaluate.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="of needles")
    evaluate.add_argument("--needle-keys", type=int, default=1, help="needles in a haystack")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--out", type=Path, default=Path("results.json"))
    evaluate.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    evaluate.add_argument(
        "--backend",
        choices=("auto", "reference"),
        default="auto",
        help="reference: the slow one in PyTorch, on any device",
    )
    evaluate.add_argument("--offline", action="store_true", help="take nothing from the network")
    evaluate.set_defaults(run=_reporting(_evaluate))

    plot = subparsers.add_parser(
        "plot",
        help="plots and a table from the results of evaluate",
        description="Accuracy against sparsity and time, sparsity of each layer and head, "
        "heat maps of needles (PNG, needs matplotlib), and table.md.",
    )
    plot.add_argument("results", type=Path, nargs="+", help="files that evaluate wrote")
    plot.add_argument("--out", type=Path, default=Path("plots"), metavar="DIR")
    plot.set_defaults(run=_reporting(_plot))

    limit = subparsers.add_parser(
        "limit-loss",
        help="the most sparsity of a table whose loss stays within a bound",
        description="Shift all thresholds of a table by one number, found by bisection, so that "
        "the mean KL divergence of the next-token distributions from dense stays within a bound on "
        "your text; the new table has one point, on the axis max_loss.",
    )
    limit.add_argument("--model", required=True, help="directory, .gguf file or Hub id")
    limit.add_argument("--thresholds", type=Path, required=True, metavar="FILE")
    limit.add_argument("--max-loss", type=float, required=True, help="KL divergence, in nats")
    limit.add_argument("--text", type=Path, required=True, metavar="DIR")
    limit.add_argument("--text-part", default="0:0.5", metavar="A:B", help="of each file")
    limit.add_argument("--length", type=int, default=4096, help="tokens in a sample")
    limit.add_argument("--samples", type=int, default=4)
    limit.add_argument("--out", type=Path, required=True, metavar="FILE")
    limit.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    limit.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    limit.add_argument("--backend", choices=("auto", "reference"), default="auto")
    limit.add_argument("--offline", action="store_true", help="take nothing from the network")
    limit.set_defaults(run=_reporting(_limit_loss))


def _add_calibrate(subparsers: Any) -> None:
    calibrate = subparsers.add_parser(
        "calibrate",
        help="learn thresholds for a model: the least loss at each sparsity",
        description="Learn one threshold a head by gradient, so that the next-token distributions "
        "move least from dense at a given sparsity, and write a table of a few kilobytes with the "
        "points asked for. What to expect of each is measured on further samples. The same command "
        "goes on where it was stopped.",
    )
    add = calibrate.add_argument
    add("--model", required=True, help="directory, .gguf file or Hub id")
    add("--text", type=Path, required=True, metavar="DIR", help="text files, a folder a kind")
    add("--text-part", default="0:0.5", metavar="A:B", help="of each file (default: %(default)s)")
    add("--length", type=int, default=4096, help="tokens in a sample, a multiple of 64")
    add("--samples", type=int, default=24, help="to learn from (default: %(default)s)")
    add("--holdout", type=int, default=6, help="more, to measure on (default: %(default)s)")
    points = calibrate.add_mutually_exclusive_group()
    points.add_argument(
        "--target-sparsity",
        type=float,
        nargs="+",
        metavar="S",
        help=f"shares of blocks to skip (default: {' '.join(map(str, _TARGETS))}, as far as they "
        "can be reached at the length)",
    )
    points.add_argument(
        "--max-loss",
        type=float,
        nargs="+",
        metavar="KL",
        help="instead: the most that can be skipped within these divergences from dense, in nats",
    )
    add("--rule", choices=("running_lse", "running_max", "absolute"), default="running_lse")
    add("--geometry", default="64x64", help="64x64 or 128x64")
    add("--start", type=Path, metavar="TABLE", help="start from these thresholds; fewer steps do")
    add("--steps", type=int, default=60, help="of a sample each, for the first sparsity learned")
    add("--further-steps", type=int, default=30, help="for each of the others")
    add("--knots", type=int, default=1, help="thresholds a head, over the position")
    add("--ceiling", type=float, default=math.inf, help="the most a threshold may be")
    add("--seed", type=int, default=0)
    add("--learned", type=Path, metavar="FILE", help="keep what was learned here, for other points")
    add("--out", type=Path, default=Path("thresholds.safetensors"), metavar="FILE")
    add("--name", help="name of the model in the table")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the use (default: %(default)s, bfloat16 on a GPU)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--backend", choices=("auto", "reference"), default="auto")
    add("--offline", action="store_true", help="take nothing from the network")
    calibrate.set_defaults(run=_reporting(_calibrate))


def configurations(arguments: argparse.Namespace) -> tuple[Configuration, ...]:
    """The configurations that the arguments name.

    Raises:
        ConfigurationError: one of them cannot be had.
    """
    points = [
        (axis, value)
        for axis in ("k", "target_sparsity", "max_loss")
        for value in getattr(arguments, axis)
    ]
    found = []
    if points and arguments.thresholds is None:
        raise ValueError("points of a table need its file: give --thresholds")
    if arguments.thresholds is not None and not points:
        raise ValueError("a table needs points: give --k, --target-sparsity or --max-loss")
    for axis, value in points:
        options = {"file": str(arguments.thresholds), axis: str(value)}
        found.append(make_configuration("table", options))
    found += [parse_configuration(text) for text in arguments.config]
    if not found:
        raise ValueError("nothing to compare with dense: give --thresholds and points, or --config")
    return tuple(found)


def _reporting(
    command: Callable[[argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
    """What the user can mend is told in a line, not in a traceback."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
            if os.environ.get("BSFA_TRACEBACK"):
                raise
            print(f"bsfa: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("bsfa: stopped; the same command goes on from here", file=sys.stderr)
            return 130

    return run


def _evaluate(arguments: argparse.Namespace) -> int:
    chosen = configurations(arguments)
    part = _part(arguments.text_part)

    from bsfa_calib import models
    from bsfa_hf.evaluation.run import Evaluation, Plan, distributed, rank_path
    from bsfa_hf.evaluation.summary import markdown

    plan = Plan(
        configurations=chosen,
        tasks=tuple(filter(None, arguments.tasks.split(","))),
        lengths=tuple(int(length) for length in arguments.lengths.split(",")),
        samples=arguments.samples,
        text=arguments.text,
        part=part,
        depths=tuple(float(depth) for depth in arguments.depths.split(",")),
        needle_keys=arguments.needle_keys,
        backend=arguments.backend,
        seed=arguments.seed,
    )
    rank, world = distributed()
    state = None
    device = arguments.device
    if world > 1:
        from accelerate import PartialState  # type: ignore[import-untyped]

        state = PartialState()
        device = str(state.device) if device == "auto" else device
    _progress(f"loading {arguments.model}")
    loaded = models.load(
        arguments.model, dtype=arguments.dtype, device=device, offline=arguments.offline
    )
    evaluation = Evaluation(
        loaded.model,
        loaded.tokenizer,
        plan,
        arguments.out,
        model_name=models.identity(arguments.model, loaded.model)[0],
        progress=_progress,
        rank=rank,
        world=world,
    )
    evaluation.run()
    if state is not None:
        state.wait_for_everyone()
        if rank > 0:
            return 0
        from bsfa_hf.evaluation.results import load

        for other in range(1, world):
            path = rank_path(arguments.out, other)
            if path.exists():
                evaluation.results.merge(load(path)["records"])
                path.unlink()
    print(markdown({"header": evaluation.results.header, "records": evaluation.results.records}))
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    part = _part(arguments.text_part)

    import torch

    from bsfa_calib import learned as calibration
    from bsfa_calib import models
    from bsfa_calib.hook import attention_shape
    from bsfa_calib.learning import Settings
    from bsfa_calib.text import read_windows
    from bsfa_calib.thresholds import ThresholdTable
    from bsfa_hf.evaluation.run import environment
    from bsfa_kernel import GEOMETRIES, Geometry

    settings = Settings(
        steps=arguments.steps,
        further_steps=arguments.further_steps,
        knots=arguments.knots,
        ceiling=arguments.ceiling,
        seed=arguments.seed,
    )
    geometry = Geometry.parse(arguments.geometry)
    if geometry not in GEOMETRIES:
        known = " or ".join(map(str, GEOMETRIES))
        raise ValueError(f"--geometry must be {known}, got {geometry}")
    if arguments.length % geometry.q_block:
        raise ValueError(
            f"--length must be a multiple of {geometry.q_block}, got {arguments.length}"
        )
    if arguments.holdout < 1:
        raise ValueError(f"--holdout must be at least 1, got {arguments.holdout}")
    targets, losses = arguments.target_sparsity or (), arguments.max_loss or ()
    if not targets and not losses:
        rungs = calibration.reachable(arguments.length, geometry)
        targets = [target for target in _TARGETS if rungs and target <= rungs[-1]]
        if not targets:
            raise ValueError(
                f"nothing to gain: of prompts of {arguments.length} tokens hardly a block can be "
                "skipped at all; calibrate for longer ones, or leave them dense"
            )
    start = None if arguments.start is None else ThresholdTable.load(arguments.start)
    _progress(f"loading {arguments.model}")
    # Gradients are small: thresholds are learned in float32, and measured in the dtype of the use.
    model, tokenizer = models.load(
        arguments.model, dtype="float32", device=arguments.device, offline=arguments.offline
    )
    if start is not None and (start.layers, start.heads) != attention_shape(model):
        raise ValueError(
            f"{arguments.start} is for {start.layers} layers of {start.heads} heads, and the model "
            "has {} of {}".format(*attention_shape(model))
        )
    windows = read_windows(
        arguments.text,
        tokenizer,
        length=arguments.length,
        count=arguments.samples + arguments.holdout,
        part=part,
    )
    used, held_out = windows[: arguments.samples], windows[arguments.samples :]
    checkpoint = arguments.learned or arguments.out.with_suffix(".learned.npz")
    learned = calibration.learn_path(
        model,
        [window.ids for window in used],
        target_sparsities=targets,
        max_losses=losses,
        rule=arguments.rule,
        geometry=geometry,
        settings=settings,
        start=None if start is None else start.thresholds[0],
        checkpoint=checkpoint,
        progress=_progress,
    )
    dtype = arguments.dtype
    if dtype == "auto":
        dtype = "float32" if model.device.type == "cpu" else "bfloat16"
    model.to(getattr(torch, dtype))
    name, revision = models.identity(arguments.model, model)
    facts = environment(model, arguments.backend)
    found = calibration.calibrate(
        model,
        calibration.ThresholdPath(learned),
        [window.ids for window in held_out],
        target_sparsities=targets,
        max_losses=losses,
        rule=arguments.rule,
        geometry=geometry,
        backend=arguments.backend,
        progress=_progress,
    )
    table = dataclasses.replace(
        found.table,
        model=arguments.name or name,
        revision=revision,
        samples=len(used),
        provenance={
            **found.table.provenance,
            "command": shlex.join(["bsfa", *sys.argv[1:]]),
            "versions": ", ".join(
                f"{package} {facts[package]}"
                for package in ("bsfa-hf", "bsfa-kernel", "torch", "transformers")
            ),
            "device": facts["device"],
            "dtype": dtype,
            "data": "; ".join(window.name for window in used),
            "held_out": "; ".join(window.name for window in held_out),
        },
    )
    table.save(arguments.out)
    if arguments.learned is None:
        checkpoint.unlink(missing_ok=True)
    print(f"{table.axis:>15}  {'sparsity':>8}  {'KL, nats':>9}  change of NLL")
    for point, expected in zip(table.points, found.expected, strict=True):
        print(f"{point:15g}  {expected.sparsity:8.3f}  {expected.kl:9.5f}  {expected.nll:+.5f}")
    print(f"measured on {len(held_out)} samples of {arguments.length} tokens not learned from")
    for sentence in calibration.verdict(found.expected):
        print(sentence)
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1000:.1f} kB)")
    return 0


def _limit_loss(arguments: argparse.Namespace) -> int:
    part = _part(arguments.text_part)

    from bsfa_calib import models
    from bsfa_calib.text import read_windows
    from bsfa_calib.thresholds import ThresholdTable
    from bsfa_calib.tuning import limit_loss

    table = ThresholdTable.load(arguments.thresholds)
    _progress(f"loading {arguments.model}")
    loaded = models.load(
        arguments.model, dtype=arguments.dtype, device=arguments.device, offline=arguments.offline
    )
    windows = read_windows(
        arguments.text,
        loaded.tokenizer,
        length=arguments.length,
        count=arguments.samples,
        part=part,
    )
    found = limit_loss(
        loaded.model,
        table,
        [window.ids for window in windows],
        max_loss=arguments.max_loss,
        backend=arguments.backend,
        progress=_progress,
    )
    found.table.save(arguments.out)
    print(
        f"{arguments.out}: thresholds shifted by {found.shift:+.3f} skip {found.sparsity:.3f} of "
        f"the blocks at a KL divergence of {found.kl:.5f} nats, on {len(windows)} samples of "
        f"{arguments.length} tokens"
    )
    return 0


def _part(text: str) -> tuple[float, float]:
    edges = [float(edge) for edge in text.split(":")]
    if len(edges) != 2:
        raise ValueError(f"--text-part is A:B, as 0.5:1, got {text!r}")
    return edges[0], edges[1]


def _plot(arguments: argparse.Namespace) -> int:
    from bsfa_hf.evaluation.plot import plot_results

    for path in plot_results(arguments.results, arguments.out):
        print(path)
    return 0


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """These subcommands as a command of their own."""
    parser = argparse.ArgumentParser(prog="bsfa")
    add_subcommands(parser.add_subparsers(required=True, metavar="command"))
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)
