# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""``calibrate``: from a model and a text to a table, by any method."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bsfa_calib import __version__, report
from bsfa_calib.cli.common import (
    INTERRUPTED,
    checked,
    k_values,
    loss,
    not_negative,
    note,
    positive,
    sparsity,
    table_path,
)
from bsfa_calib.report import printable
from bsfa_calib.thresholds import RULES, ThresholdTable

if TYPE_CHECKING:
    from bsfa_calib.data import Document
    from bsfa_calib.expected import Calibrated
    from bsfa_calib.text import Split
    from bsfa_kernel import Geometry

METHODS = ("learned", "scalar", "topk")

# Points of a table that is calibrated without saying which.
_TARGETS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)

_DESCRIPTION = """
Calibrate thresholds for a model on your own text, and write a table.

  learned  one threshold a head, learned by gradient: the least loss at each sparsity
  scalar   one threshold for the whole model at each sparsity, found in one pass
  topk     the paper's: for every layer, head and position a threshold that keeps k blocks

What to expect of each point is measured on further samples. The same command goes on where it was
stopped.
"""

# Every flag, its default and who takes it: "all", or the methods, of which "shift" is
# learned with --shift-only. A default that differs by method is a dict.
_ALL = ("learned", "scalar", "topk", "shift")
_MADE = ("learned", "scalar", "topk")
_TAKERS: dict[str, tuple[str, ...]] = {
    "target_sparsity": ("learned", "scalar"),
    "max_loss": ("learned", "shift"),
    "k": ("topk",),
    "rule": _MADE,
    "geometry": _MADE,
    "holdout": _MADE,
    "start": ("learned", "shift"),
    "shift_only": ("shift",),
    "steps": ("learned",),
    "further_steps": ("learned",),
    "knots": ("learned",),
    "ceiling": ("learned",),
    "seed": ("learned",),
    "backend": ("learned", "scalar", "shift"),
    "aggregate": ("topk",),
    "keep_maxima": ("topk",),
    "checkpoint": _MADE,
    "resume": _MADE,
    "keep_checkpoint": _MADE,
}
_DEFAULTS: dict[str, Any] = {
    "length": 4096,
    "samples": 24,
    "holdout": 6,
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
    "learned": {"rule": "running_lse", "geometry": "64x64"},
    "scalar": {"rule": "running_lse", "geometry": "64x64"},
    "topk": {"rule": "absolute", "geometry": "128x64"},
    "shift": {"samples": 4},
}
FLAGS = (
    *("method", "model", "text", "text_part", "name"),
    *dict.fromkeys((*_TAKERS, *_DEFAULTS)),
)


@dataclasses.dataclass(frozen=True)
class Paper:
    """What the flags of the paper's script ask for beyond those of ``calibrate``.

    Attributes:
        json: the text is a JSON file, whatever its suffix.
        longest: most tokens in a sample where no length is given.
        layers: of the model, as the user states them.
        heads: likewise.
    """

    json: bool
    longest: int
    layers: int | None
    heads: int | None


def add_calibrate(subparsers: Any) -> None:
    """Add ``calibrate`` to the commands of a parser.

    It sets ``run``, a function that takes the parsed arguments and returns an exit status.
    """
    parser = subparsers.add_parser(
        "calibrate",
        help="calibrate thresholds for a model on your own text",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # Defaults are filled in later: a flag that is None was not given.
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
    points = parser.add_argument_group("operating points").add_mutually_exclusive_group()
    points.add_argument(
        "--target-sparsity",
        type=checked(sparsity),
        nargs="+",
        metavar="S",
        help="shares of blocks to skip (learned, scalar; default: "
        f"{' '.join(map(str, _TARGETS))}, as far as they can be reached at the length)",
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
    add("--rule", choices=RULES, help="default: running_lse; absolute for topk")
    add("--geometry", metavar="QxK", help="queries x keys of a block: 64x64; 128x64 for topk")
    add("--start", type=Path, metavar="TABLE", help="learned: start from these; fewer steps do")
    add(
        "--shift-only",
        action="store_const",
        const=True,
        help="do not learn: shift the last point of --start by one number, so that the divergence "
        "stays within --max-loss",
    )
    add("--steps", type=checked(positive), help="learned: for the first sparsity (default: 60)")
    add("--further-steps", type=checked(positive), help="learned: for the others (default: 30)")
    add("--knots", type=checked(positive), help="learned: thresholds a head (default: 1)")
    add("--ceiling", type=float, help="learned: the most a threshold may be")
    add("--seed", type=int, help="learned: of the order of the samples (default: 0)")
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
        help="in which the model will be used (default: float32 on a CPU, else bfloat16); learning "
        "runs in float32",
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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, *, paper: Paper | None = None) -> int:
    """Calibrate as the arguments say.

    Args:
        arguments: every one of ``FLAGS``; None where it was not given.
        paper: what else the paper's flags ask for.

    Returns:
        The exit status.

    Raises:
        ValueError: a flag is not for the method, or something cannot be done.
    """
    command = _command(arguments)
    method = _complete(arguments, paper)
    geometry = None if method == "shift" else _geometry(arguments, method)
    output = table_path(arguments.out)
    start = None if arguments.start is None else ThresholdTable.load(arguments.start)
    # Mistakes in the text should show before the model is loaded.
    documents = _documents(arguments, paper)
    part = _part(arguments, documents)

    from bsfa_calib import models

    models.locate(arguments.model)
    note(f"loading {printable(arguments.model)}")
    # Gradients are small: thresholds are learned in float32, and measured in the dtype of the use.
    loaded = models.load(
        arguments.model,
        dtype="float32" if method == "learned" else arguments.dtype,
        device=arguments.device,
        offline=arguments.offline,
    )
    _check_model(arguments, loaded.model, start, paper)
    split = _split(arguments, documents, loaded.tokenizer, part, method, paper)
    note(_what_is_read(split))
    job = _Job(arguments, loaded.model, split, geometry, start, output)
    name, revision = models.identity(arguments.model, loaded.model)
    try:
        table, lines = getattr(job, method)()
    except KeyboardInterrupt:
        note(f"interrupted; {job.kept()}")
        return INTERRUPTED
    table = dataclasses.replace(
        table,
        model=arguments.name or name,
        revision=revision,
        provenance={
            **table.provenance,
            **_provenance(command, loaded.model, split),
        },
    )
    table.save(output)
    job.clean_up()
    print("\n".join(lines(table)))
    print(f"wrote {printable(str(output))} ({output.stat().st_size / 1000:.1f} kB)")
    return 0


class _Job:
    """One calibration, by the method that a name of its own stands for."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        model: Any,
        split: Split,
        geometry: Geometry | None,
        start: ThresholdTable | None,
        output: Path,
    ) -> None:
        self._arguments, self._model, self._geometry = arguments, model, geometry
        self._start = start
        self._samples = [window.ids for window in split.calibration]
        self._held_out = [window.ids for window in split.held_out]
        self._checkpoint = Path(arguments.checkpoint or f"{output}.checkpoint")
        self._learned = self._checkpoint / "learned.npz"
        if arguments.resume is False:
            self._remove()

    def learned(self) -> Any:
        import torch

        from bsfa_calib import learned
        from bsfa_calib.learning import Settings

        arguments, geometry = self._arguments, self._geometry
        assert geometry is not None
        common: dict[str, Any] = {
            "target_sparsities": self._targets(),
            "max_losses": arguments.max_loss or (),
            "rule": arguments.rule,
            "geometry": geometry,
            "progress": note,
        }
        path = learned.learn_path(
            self._model,
            self._samples,
            **common,
            settings=Settings(
                steps=arguments.steps,
                further_steps=arguments.further_steps,
                knots=arguments.knots,
                ceiling=arguments.ceiling,
                seed=arguments.seed,
            ),
            start=None if self._start is None else self._start.thresholds[0],
            checkpoint=self._learned,
        )
        dtype = arguments.dtype
        if dtype == "auto":
            dtype = "float32" if self._model.device.type == "cpu" else "bfloat16"
        self._model.to(getattr(torch, dtype))
        found = learned.calibrate(
            self._model,
            learned.ThresholdPath(path),
            self._held_out,
            **common,
            backend=arguments.backend,
        )
        return self._measured(found, len(self._samples))

    def scalar(self) -> Any:
        from bsfa_calib import scalar
        from bsfa_calib.progress import ProgressReporter

        arguments, geometry = self._arguments, self._geometry
        assert geometry is not None
        reporter = ProgressReporter()
        with reporter.interruptible():
            table = scalar.one_pass(
                self._model,
                self._samples,
                target_sparsities=self._targets(),
                rule=arguments.rule,
                geometry=geometry,
                checkpoint=self._checkpoint,
                progress=reporter,
            )
        if not self._held_out:
            return table, _statistics
        found = scalar.measured(
            self._model, table, self._held_out, backend=arguments.backend, progress=note
        )
        return self._measured(found, table.samples)

    def topk(self) -> Any:
        from bsfa_calib import capture
        from bsfa_calib.progress import ProgressReporter

        arguments, geometry = self._arguments, self._geometry
        assert geometry is not None
        settings = capture.Settings(
            k_values=arguments.k,
            rule=arguments.rule,
            geometry=geometry,
            aggregate=arguments.aggregate,
            keep_maxima=arguments.keep_maxima,
        )
        reporter = ProgressReporter()
        with reporter.interruptible():
            table = capture.calibrate(
                self._model,
                self._samples,
                settings,
                held_out=self._held_out,
                checkpoint=self._checkpoint,
                progress=reporter,
            )
        return table, _statistics

    def shift(self) -> Any:
        from bsfa_calib.tuning import limit_loss

        assert self._start is not None
        found = limit_loss(
            self._model,
            self._start,
            self._samples,
            max_loss=self._arguments.max_loss[0],
            backend=self._arguments.backend,
            progress=note,
        )
        return self._measured(found, self._start.samples)

    def kept(self) -> str:
        """What an interrupted calibration leaves behind, for people."""
        samples = len(list(self._checkpoint.glob("sample-*.safetensors")))
        where = printable(str(self._checkpoint))
        if samples:
            return (
                f"{samples} samples are done and kept in {where}. The same command goes on from "
                "there."
            )
        if self._learned.exists():
            return f"what was learned is kept in {where}. The same command goes on from there."
        return "nothing was done yet that could be kept."

    def clean_up(self) -> None:
        """Remove the checkpoint, unless it is to be kept."""
        if not self._arguments.keep_checkpoint:
            self._remove()

    def _remove(self) -> None:
        for old in (*self._checkpoint.glob("sample-*.safetensors"), self._learned):
            old.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._checkpoint.rmdir()

    def _targets(self) -> Sequence[float]:
        arguments, geometry = self._arguments, self._geometry
        assert geometry is not None
        if arguments.target_sparsity or arguments.max_loss:
            return tuple(arguments.target_sparsity or ())
        from bsfa_calib.learned import reachable

        rungs = reachable(arguments.length, geometry)
        targets = [target for target in _TARGETS if rungs and target <= rungs[-1]]
        if not targets:
            raise ValueError(
                f"nothing to gain: of prompts of {arguments.length} tokens hardly a block can be "
                "skipped at all; calibrate for longer ones, or leave them dense"
            )
        return targets

    def _measured(self, found: Calibrated, samples: int) -> Any:
        """The table of a calibration that was measured, and what is printed about it."""
        from bsfa_calib import expected

        def lines(_table: ThresholdTable) -> list[str]:
            tested = len(self._held_out) or len(self._samples)
            return [
                expected.report(found),
                f"measured on {tested} samples of up to {self._arguments.length} tokens"
                + (" that nothing was made from" if self._held_out else ""),
                *expected.verdict(found),
            ]

        return dataclasses.replace(found.table, samples=samples), lines


def _statistics(table: ThresholdTable) -> list[str]:
    """What the statistics of a table say, in lines."""
    return [report.operating_points(table), *report.verdict(table)]


def _complete(arguments: argparse.Namespace, paper: Paper | None) -> str:
    """Refuse flags that are not for the method, and fill in what was not given.

    Returns:
        The method; "shift" for learned with --shift-only.
    """
    method = arguments.method or "learned"
    shown = f"--method {method}"
    if arguments.shift_only and method == "learned":
        method, shown = "shift", "--shift-only"
    for name in FLAGS:
        if getattr(arguments, name) is not None and method not in _TAKERS.get(name, _ALL):
            raise ValueError(f"--{name.replace('_', '-')} is not for {shown}")
    if method == "shift" and (arguments.start is None or len(arguments.max_loss or ()) != 1):
        raise ValueError("--shift-only needs --start and one --max-loss")
    if paper is None and method == "learned" and arguments.holdout == 0:
        raise ValueError("--holdout must be at least 1 for --method learned, got 0")
    defaults: Mapping[str, Any] = {**_DEFAULTS, **_BY_METHOD[method]}
    for name in FLAGS:
        if getattr(arguments, name) is None and not (name == "length" and paper):
            setattr(arguments, name, defaults.get(name))
    return method


def _geometry(arguments: argparse.Namespace, method: str) -> Geometry:
    from bsfa_kernel import GEOMETRIES, Geometry

    geometry = Geometry.parse(arguments.geometry)
    if geometry not in GEOMETRIES:
        known = " or ".join(map(str, GEOMETRIES))
        raise ValueError(f"--geometry must be {known} (queries x keys), got {geometry}")
    if method == "learned" and arguments.length % geometry.q_block:
        raise ValueError(
            f"--length must be a multiple of {geometry.q_block}, got {arguments.length}"
        )
    if method == "topk":
        from bsfa_calib.estimate import parse_aggregate

        parse_aggregate(arguments.aggregate)
    return geometry


def _documents(arguments: argparse.Namespace, paper: Paper | None) -> dict[str, list[Document]]:
    from bsfa_calib.data import by_kind, read_documents, read_json

    if paper is not None and paper.json:
        return by_kind(read_json(arguments.text[0]))
    return read_documents(arguments.text)


def _part(
    arguments: argparse.Namespace, documents: Mapping[str, Sequence[Document]]
) -> tuple[float, float]:
    from bsfa_calib.text import parse_part

    if arguments.text_part is not None:
        return parse_part(arguments.text_part)
    return (0.0, 1.0) if all(d.whole for group in documents.values() for d in group) else (0.0, 0.5)


def _split(
    arguments: argparse.Namespace,
    documents: Mapping[str, Sequence[Document]],
    tokenizer: Any,
    part: tuple[float, float],
    method: str,
    paper: Paper | None,
) -> Split:
    from bsfa_calib.text import Split, read_windows, split_by_kind

    if paper is not None:
        return split_by_kind(
            documents,
            tokenizer,
            length=arguments.length,
            each=arguments.samples,
            held_out=arguments.holdout,
        )
    windows = read_windows(
        documents,
        tokenizer,
        length=arguments.length,
        count=arguments.samples + (arguments.holdout or 0),
        part=part,
        whole=method != "learned",
    )
    return Split(tuple(windows[: arguments.samples]), tuple(windows[arguments.samples :]))


def _check_model(
    arguments: argparse.Namespace,
    model: Any,
    start: ThresholdTable | None,
    paper: Paper | None,
) -> None:
    """Refuse what does not fit the model, before any sample is read."""
    from bsfa_calib.hook import attention_shape
    from bsfa_calib.tuning import check_shape

    if start is not None:
        check_shape(start, model)
    if paper is not None:
        for flag, stated, there in zip(
            ("num_layers", "num_heads"),
            (paper.layers, paper.heads),
            attention_shape(model),
            strict=True,
        ):
            if stated is not None and stated != there:
                raise ValueError(f"--{flag} says {stated}, but the model has {there}")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if arguments.length is None and paper is not None:
        arguments.length = min(paper.longest, positions or paper.longest)
    if positions is not None and arguments.length > positions:
        raise ValueError(
            f"samples of {arguments.length} tokens exceed the model's {positions} positions"
        )


def _what_is_read(split: Split) -> str:
    counts: dict[str, list[int]] = {}
    for which, windows in enumerate((split.calibration, split.held_out)):
        for window in windows:
            counts.setdefault(window.kind, [0, 0])[which] += 1
    kinds = "; ".join(
        f"{printable(kind)}: {used} + {held} held out" for kind, (used, held) in counts.items()
    )
    lengths = [len(window.ids) for window in split.calibration]
    return (
        f"{len(split.calibration)} samples of {min(lengths)} to {max(lengths)} tokens, "
        f"{len(split.held_out)} held out ({kinds})"
    )


def _command(arguments: argparse.Namespace) -> str:
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


def _provenance(command: str, model: Any, split: Split) -> dict[str, str]:
    import torch

    import bsfa_kernel

    versions = [f"bsfa-calib {__version__}", f"bsfa-kernel {bsfa_kernel.__version__}"]
    for package in ("torch", "transformers", "gguf"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    on_gpu = model.device.type == "cuda"
    facts = {
        "command": command,
        "versions": ", ".join(versions),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
    }
    for key, windows in (("data", split.calibration), ("held_out", split.held_out)):
        if windows:
            facts[key] = printable("; ".join(window.name for window in windows))
    return facts
