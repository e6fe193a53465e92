# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""``bsfa evaluate`` and ``bsfa plot``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bsfa_calib.data import read_documents
from bsfa_calib.text import parse_part
from bsfa_hf.automatic import read_number
from bsfa_hf.cli.common import (
    add_any_model_option,
    add_model_options,
    add_point_options,
    add_selection_option,
    named_points,
    note,
)
from bsfa_hf.evaluation.configurations import Configuration, make_configuration, parse_configuration

# Exit status where some results were left out.
_INCOMPLETE = 1

_DESCRIPTION = """
Evaluate a model under several attention configurations, each paired with dense on the same
samples: KL divergence of the next-token distributions from dense, perplexity by position, needles
in a haystack, and tasks of lm-evaluation-harness. Results are written as they come; the same
command goes on where it was stopped.
"""

_EPILOG = """
configurations ([NAME=]KIND[:option=value,...]):
  table:file=T.safetensors,k=32          thresholds of a file at an operating point of any axis
  scalar:rule=running_max,threshold=-7   one threshold for the whole model (this rule is BLASST's)
  scalar:rule=peak_lse,sparsity=0.7      found on text that is not evaluated on; geometry=64x64
  sliding_window:window=1024,sink=64     the last 1024 keys and the first 64
  sparge_attn:topk=0.5                   SpargeAttention, where it is installed

several GPUs: accelerate launch --num_processes 8 -m bsfa_hf evaluate ...
"""


def add_subcommands(subparsers: Any) -> None:
    """Add ``evaluate`` and ``plot`` to the subcommands of a parser.

    Each sets ``run``, a function that takes the parsed arguments and returns an exit status.
    """
    evaluate = subparsers.add_parser(
        "evaluate",
        help="accuracy of a model under several attention configurations, paired with dense",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(evaluate)
    evaluate.add_argument("--thresholds", type=Path, metavar="FILE", help="threshold table")
    add_point_options(evaluate, several=True)
    add_selection_option(evaluate)
    add_any_model_option(evaluate)
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
    evaluate.set_defaults(run=_evaluate)

    plot = subparsers.add_parser(
        "plot",
        help="plots and a table from the results of evaluate",
        description="Accuracy against sparsity and time, sparsity of each layer and head, "
        "heat maps of needles (PNG, needs matplotlib), and table.md.",
    )
    plot.add_argument("results", type=Path, nargs="+", help="files that evaluate wrote")
    plot.add_argument("--out", type=Path, default=Path("plots"), metavar="DIR")
    plot.set_defaults(run=_plot)


def configurations(arguments: argparse.Namespace) -> tuple[Configuration, ...]:
    """The configurations that the arguments name.

    Raises:
        ConfigurationError: one of them cannot be had.
    """
    points = named_points(arguments)
    found = []
    if points and arguments.thresholds is None:
        raise ValueError("points of a table need its file: give --thresholds")
    if arguments.thresholds is not None and not points:
        raise ValueError("a table needs points: give --point, or one of its short forms")
    for point in points:
        options = {"file": str(arguments.thresholds), point.axis: f"{point.value:.10g}"}
        if arguments.selection is not None:
            options["selection"] = arguments.selection
        found.append(make_configuration("table", options))
    found += [parse_configuration(text, selection=arguments.selection) for text in arguments.config]
    if found and arguments.selection and not any(each.option("selection") for each in found):
        # It would change nothing.
        raise ValueError(
            f"--selection {arguments.selection} is for tables and scalars: no configuration is one"
        )
    if not found:
        raise ValueError("nothing to compare with dense: give --thresholds and points, or --config")
    return tuple(found)


def _evaluate(arguments: argparse.Namespace) -> int:
    chosen = configurations(arguments)
    part = parse_part(arguments.text_part)

    from bsfa_calib import models
    from bsfa_hf.evaluation.run import Evaluation, Plan, distributed, rank_path
    from bsfa_hf.evaluation.summary import markdown

    text = None if arguments.text is None else read_documents(arguments.text)
    plan = Plan(
        configurations=chosen,
        tasks=tuple(filter(None, arguments.tasks.split(","))),
        lengths=tuple(read_number("--lengths", each, int) for each in arguments.lengths.split(",")),
        samples=arguments.samples,
        text=text,
        part=part,
        depths=tuple(read_number("--depths", each, float) for each in arguments.depths.split(",")),
        needle_keys=arguments.needle_keys,
        check_model=not arguments.any_model,
        seed=arguments.seed,
        text_name="" if arguments.text is None else str(arguments.text),
    )
    rank, world = distributed()
    state = None
    device = arguments.device
    if world > 1:
        from accelerate import PartialState  # type: ignore[import-untyped]

        state = PartialState()
        device = str(state.device) if device == "auto" else device
    note(f"loading {arguments.model}")
    loaded = models.load(
        arguments.model, dtype=arguments.dtype, device=device, offline=arguments.offline
    )
    evaluation = Evaluation(
        loaded.model,
        loaded.tokenizer,
        plan,
        arguments.out,
        model_name=models.identity(arguments.model, loaded.model)[0],
        progress=note,
        rank=rank,
        world=world,
    )
    try:
        evaluation.run()
    except KeyboardInterrupt:
        note("the same command goes on from here")
        raise
    status = 0
    if evaluation.left_out:
        status = _INCOMPLETE
        note(
            f"{evaluation.left_out} results were left out because they are not finite (see above); "
            "the same command tries them again"
        )
    if state is not None:
        state.wait_for_everyone()
        if rank > 0:
            return status
        for other in range(1, world):
            path = rank_path(arguments.out, other)
            if path.exists():
                evaluation.results.merge(path)
                path.unlink()
    print(markdown({"header": evaluation.results.header, "records": evaluation.results.records}))
    return status


def _plot(arguments: argparse.Namespace) -> int:
    from bsfa_hf.evaluation.plot import plot_results

    for path in plot_results(arguments.results, arguments.out):
        print(path)
    return 0
