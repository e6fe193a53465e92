# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What the subcommands share: options, models, tables, and reading a prompt."""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import io
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bsfa_calib import ThresholdTable
from bsfa_calib.binding import same_model
from bsfa_calib.cli.common import checked
from bsfa_calib.cli.common import positive as _positive
from bsfa_calib.convert import load_table
from bsfa_calib.language_model import cache_argument
from bsfa_calib.point import AXES, Point
from bsfa_calib.report import printable
from bsfa_calib.thresholds import ThresholdFileError, table_files
from bsfa_hf.state import model_names
from bsfa_kernel import SELECTIONS

# Converters for argparse.
positive = checked(_positive)

# Where no operating point is given: a loss in nats that costs no answers, and a share of blocks
# where the table does not say what to expect.
_SMALL_LOSS = 0.003
_USUAL_SPARSITY = 0.7

_MISSING_EXTRA = "this command needs {}, which the extra bsfa-hf[cli] brings"


def note(text: str) -> None:
    """Tell the user what is going on, in a line on stderr."""
    print(f"bsfa: {printable(text)}", file=sys.stderr, flush=True)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that name a model and how to load it."""
    parser.add_argument("--model", required=True, help="directory, .gguf file or Hub id")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--offline", action="store_true", help="take nothing from the network")


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Options that name a table and its operating point."""
    parser.add_argument(
        "--thresholds",
        metavar="FILE",
        help="threshold table (default: the shortest in ./thresholds/<model> that is long enough)",
    )
    add_point_options(parser)
    add_selection_option(parser)
    add_any_model_option(parser)


def add_selection_option(parser: argparse.ArgumentParser) -> None:
    """An option that says from what scores blocks are chosen."""
    parser.add_argument(
        "--selection",
        choices=SELECTIONS,
        help="choose blocks from 16-bit scores, from 8-bit ones, or as is faster for what the "
        "table is expected to skip (default: BSFA_SELECTION, else auto)",
    )


def add_any_model_option(parser: argparse.ArgumentParser) -> None:
    """An option that takes a table of another model."""
    parser.add_argument(
        "--any-model",
        action="store_true",
        help="take a table that names another model, if its shape fits",
    )


def add_point_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Options that name an operating point, or several on one axis."""
    group = parser.add_mutually_exclusive_group()
    more: dict[str, Any] = {"nargs": "+"} if several else {}
    what = "operating points" if several else "operating point"
    group.add_argument(
        "--point",
        metavar="AXIS=NUMBER",
        help=f"{what} of the table, as target_sparsity=0.7",
        **more,
    )
    for axis in AXES:
        option = "--" + axis.replace("_", "-")
        kind = int if axis == "k" else float
        group.add_argument(
            option, type=kind, metavar="NUMBER", help=f"short for --point {axis}=NUMBER", **more
        )


def named_points(arguments: argparse.Namespace) -> list[Point]:
    """The operating points that `add_point_options` read.

    Raises:
        ValueError: one is not a point.
    """
    given = {axis: getattr(arguments, axis) for axis in ("point", *AXES)}
    return [
        Point.parse(value) if axis == "point" else Point(axis, value)
        for axis, values in given.items()
        for value in (values if isinstance(values, list) else [values])
        if value is not None
    ]


def named_point(arguments: argparse.Namespace) -> Point | None:
    """The operating point that the arguments name, if they name one."""
    points = named_points(arguments)
    return points[0] if points else None


def named_table(arguments: argparse.Namespace) -> ThresholdTable | None:
    """The table that the arguments name, if they name one; it holds the point that they name.

    Raises:
        ValueError: the file is not a table, or a point is not one or not in the table.
    """
    point = named_point(arguments)
    table = load_table(arguments.thresholds) if arguments.thresholds else None
    if table is not None and point is not None:
        table.select(point)
    return table


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer and what the user called it."""

    model: Any
    tokenizer: Any
    name: str

    @property
    def names(self) -> list[str]:
        """The names that the model may go by."""
        given = Path(self.name).stem if self.name.endswith(".gguf") else self.name
        return [given, *model_names(self.model.config)]


def load_model(arguments: argparse.Namespace) -> Loaded:
    """Load the model that the arguments name.

    Raises:
        ImportError: what loading needs is not installed.
        ValueError: there is no such model.
    """
    try:
        from bsfa_calib import models
    except ImportError as error:
        raise ImportError(_MISSING_EXTRA.format(error.name)) from error
    started = time.perf_counter()
    note(f"loading {arguments.model}")
    # Loading a GGUF file draws a bar that no setting turns off.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        loaded = models.load(
            arguments.model,
            dtype=arguments.dtype,
            device=arguments.device,
            offline=arguments.offline,
        )
    model: Any = loaded.model
    note(
        f"loaded in {time.perf_counter() - started:.0f} s: {type(model).__name__}, "
        f"{str(model.dtype).removeprefix('torch.')} on {model.device}"
    )
    return Loaded(model, loaded.tokenizer, os.fspath(arguments.model))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the chatter of transformers off the terminal."""
    from transformers.utils import logging as transformers_logging

    untyped: Any = transformers_logging
    verbosity = untyped.get_verbosity()
    bars = untyped.is_progress_bar_enabled()
    untyped.set_verbosity_error()
    untyped.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        untyped.set_verbosity(verbosity)
        if bars:
            untyped.enable_progress_bar()


def find_table(loaded: Loaded, tokens: int, wanted: Point | None = None) -> Path | None:
    """The shipped table for a model and a prompt: the shortest that suffices, else the longest.

    Of several for one length, that with the point ``wanted``, else that of 128x64, else that under
    which fewer rows vote, else that with more points. Looked for in ``thresholds/<model>`` of the
    current directory and those above it. Tables of learned thresholds
    come before those for k blocks, unless ``wanted`` names an axis. What cannot be read is told and
    passed over.

    Raises:
        ThresholdFileError: none of the model's tables can be read.
    """
    found: list[tuple[ThresholdTable, Path]] = []
    unreadable: list[ThresholdFileError] = []
    readable = 0
    here = Path.cwd()
    for root in (here, *here.parents):
        folder = root / "thresholds"
        if not folder.is_dir():
            continue
        for path in table_files(folder):
            if same_model(path.parent.name, loaded.names):
                try:
                    table = load_table(path)
                except ThresholdFileError as error:
                    note(f"passed over: {error}")
                    unreadable.append(error)
                    continue
                readable += 1
                if wanted is None or wanted.axis == table.axis:
                    found.append((table, path))
        if found:
            break
    if unreadable and not readable:
        raise unreadable[0]
    if not found:
        return None
    learned = [entry for entry in found if entry[0].axis == "target_sparsity"]
    found = learned or found

    def fit(entry: tuple[ThresholdTable, Path]) -> tuple[bool, int, int, int]:
        table = entry[0]
        has_it = wanted is not None and wanted.value in table.points
        return has_it, table.q_block * table.k_block, table.voters, len(table.points)

    found.sort(key=fit, reverse=True)
    longest = max(found, key=lambda entry: entry[0].seqlen)
    fitting = [entry for entry in found if entry[0].seqlen >= tokens]
    return min(fitting, key=lambda entry: entry[0].seqlen, default=longest)[1]


def choose_point(table: ThresholdTable, arguments: argparse.Namespace, tokens: int) -> Point:
    """The operating point that the arguments name, or one that skips something at this length.

    Raises:
        ValueError: the table does not hold the point.
    """
    named = named_point(arguments)
    if named is not None:
        table.select(named)  # an unknown point is refused before any work is done
        return named
    if table.axis == "k":
        wanted: float = tokens / table.k_block / 3
    elif table.axis == "target_sparsity":
        wanted = _careful(table)
    else:
        wanted = float(table.points[len(table.points) // 2])
    point = Point(table.axis, min(table.points, key=lambda point: abs(point - wanted)))
    note(f"no operating point given: taking {point}")
    return point


def _careful(table: ThresholdTable) -> float:
    """The most that a table skips at a loss of at most ``_SMALL_LOSS``, by what it expects."""
    try:
        losses = [float(loss) for loss in table.provenance["expected_kl"].split(",")]
    except (KeyError, ValueError):
        return _USUAL_SPARSITY
    small = [
        point for point, loss in zip(table.points, losses, strict=False) if loss <= _SMALL_LOSS
    ]
    return max(small, default=table.points[0])


def check_positions(model: Any, tokens: int) -> None:
    """Tell the user of a prompt that is longer than the model's positions."""
    config = model.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        note(
            f"warning: the prompt has {tokens} tokens, and the model was made for {positions} "
            "positions: what it says beyond them may be worthless, dense or not"
        )


@dataclass
class Reading:
    """A prompt that has been read.

    Attributes:
        logits: float32 [positions, vocabulary], of the last tokens read.
        cache: the keys and values.
        seconds: what it took.
    """

    logits: Tensor
    cache: Any
    seconds: float


@torch.inference_mode()
def read(
    model: Any, ids: list[int], cache: Any = None, *, keep: int = 1, grow: bool = False
) -> Reading:
    """Let a model read tokens on top of a cache.

    Args:
        model: the model.
        ids: the tokens.
        cache: what it has read before.
        keep: of how many tokens the logits are wanted.
        grow: whether the cache may be changed; else a copy is.
    """
    from transformers import DynamicCache

    if cache is None:
        cache = DynamicCache(config=model.config)
    elif not grow:
        cache = copy.deepcopy(cache)
    options: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = keep
    synchronize(model.device)
    started = time.perf_counter()
    logits = model(input_ids=torch.tensor([ids], device=model.device), **options).logits
    synchronize(model.device)
    return Reading(logits[0, -keep:].float(), cache, time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def answer(model: Any, tokenizer: Any, reading: Reading, tokens: int) -> str:
    """What the model says next, greedily, up to the end of the line."""
    ids: list[int] = []
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    for _ in range(tokens):
        token = int(reading.logits[-1].argmax())
        if token in ends:
            break
        ids.append(token)
        text: str = tokenizer.decode(ids)
        if text.strip() and "\n" in text.lstrip():
            break
        if len(ids) < tokens:
            reading = read(model, [token], reading.cache, grow=True)
    return str(tokenizer.decode(ids)).strip().split("\n")[0]


def columns(rows: list[list[str]]) -> str:
    """Rows as aligned text; the first is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)
