# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The command ``bsfa-calibrate``: calibrate a model, look at tables, convert the paper's files."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bsfa_calib import ThresholdTable, __version__, report
from bsfa_calib.thresholds import RULES

if TYPE_CHECKING:
    from bsfa_calib.data import Split

_COMMANDS = ("run", "info", "convert", "plot")
_DEFAULT_K_VALUES = "16,32,64,96,128"
_DEFAULT_MAX_SEQ_LEN = 16384
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 2
    if arguments[0] not in (*_COMMANDS, "-h", "--help", "--version"):
        arguments.insert(0, "run")
    options = parser.parse_args([_underscored(argument) for argument in arguments])
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("bsfa-calibrate: %(levelname)s: %(message)s"))
    logger = logging.getLogger("bsfa_calib")
    logger.addHandler(handler)
    try:
        return int(options.function(options, arguments))
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"bsfa-calibrate: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        extra = "plot" if (error.name or "").startswith("matplotlib") else "capture"
        print(
            f"bsfa-calibrate: error: {options.command} needs {error.name}: "
            f'pip install "bsfa-calib[{extra}]"',
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nbsfa-calibrate: interrupted", file=sys.stderr)
        return _INTERRUPTED
    finally:
        logger.removeHandler(handler)


def parse_k_values(text: str) -> tuple[int, ...]:
    """The numbers in a list such as ``4-64`` or ``16,32,64-68``, ascending.

    Raises:
        ValueError: the text is not such a list.
    """
    values: set[int] = set()
    for part in text.replace(" ", ",").split(","):
        if not part:
            continue
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"k values must be like '16,32,64' or '4-64', got {text!r}")
        low, high = int(first), int(last) if dash else int(first)
        if low < 1 or high < low or high > 1_000_000:
            raise ValueError(
                f"k values must be at least 1 and ranges must ascend, got {part!r} in {text!r}"
            )
        values.update(range(low, high + 1))
    if not values:
        raise ValueError("no k value is given")
    return tuple(sorted(values))


def _underscored(argument: str) -> str:
    """``--max_seq_len`` for ``--max-seq-len``; anything but an option stays as it is."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


class _Parser(argparse.ArgumentParser):
    """Points to the help on errors."""

    def error(self, message: str) -> NoReturn:
        """Print the message and where help is."""
        print(f"{self.prog}: error: {message}\nSee {self.prog} --help.", file=sys.stderr)
        raise SystemExit(2)


def _checked(convert: Any) -> Any:
    """A converter whose ValueError argparse shows in full."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converted


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise ValueError(f"must be an integer of at least 1, got {text!r}")
    return value


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"must be an integer of at least 0, got {text!r}")
    return int(text)


def _sparsity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ValueError(f"a sparsity must be at least 0 and below 1, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bsfa-calibrate",
        description="Calibrate thresholds for block-sparse attention.",
        epilog="run is the default: bsfa-calibrate --model NAME --text FILE ...",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bsfa-calib {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)

    info = commands.add_parser("info", help="say what a threshold file holds")
    info.add_argument("file", help="a .safetensors table")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(function=_info)

    convert = commands.add_parser("convert", help="convert a .pt file of the paper's repository")
    convert.add_argument("file", help="the .pt file")
    convert.add_argument("output", help="the .safetensors table to write")
    convert.add_argument("--name", default="", help="name of the model that it belongs to")
    convert.set_defaults(function=_convert)

    plot = commands.add_parser("plot", help="draw thresholds and predicted sparsity")
    plot.add_argument("file", help="a .safetensors table")
    plot.add_argument("output", help="the image to write, as thresholds.png")
    plot.add_argument(
        "--points", nargs="+", type=float, help="operating points to draw (k values); default three"
    )
    plot.set_defaults(function=_plot)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="calibrate a model (the default)",
        description="Measure a model on text, and write a threshold table.",
        allow_abbrev=False,
    )
    run.add_argument(
        "--model",
        "--model_name",
        required=True,
        metavar="NAME",
        help="model directory, .gguf file or Hub id",
    )
    text = run.add_argument_group("text")
    text.add_argument(
        "--data_file",
        metavar="FILE",
        help="JSON list, or JSON lines, of objects with input_text and, if they like, task_name",
    )
    text.add_argument(
        "--text",
        nargs="+",
        metavar="PATH",
        help="plain text (also .xz, .gz), cut into samples of --max_seq_len tokens; a file or a "
        "directory is a task, a directory of directories several",
    )
    text.add_argument(
        "--max_seq_len",
        type=_checked(_positive),
        metavar="N",
        help="most tokens in a sample (default: 16384, or as many as the model takes)",
    )
    text.add_argument(
        "--num_examples",
        type=_checked(_positive),
        default=16,
        metavar="N",
        help="samples of each task (default: 16)",
    )
    text.add_argument(
        "--holdout_samples",
        type=_checked(_not_negative),
        default=1,
        metavar="N",
        help="further samples of each task to test the thresholds on (default: 1)",
    )
    what = run.add_argument_group("thresholds")
    what.add_argument(
        "--thresholds_save_path",
        default="thresholds.safetensors",
        metavar="FILE",
        help="table to write (default: thresholds.safetensors)",
    )
    what.add_argument(
        "--k_values",
        type=_checked(parse_k_values),
        metavar="LIST",
        help=f"blocks to keep a query block, as 4-64 or 16,32,64 (default: {_DEFAULT_K_VALUES})",
    )
    what.add_argument(
        "--target_sparsity",
        nargs="+",
        type=_checked(_sparsity),
        metavar="S",
        help="shares of blocks to skip, as 0.5 0.7: one scalar for the model instead of k",
    )
    what.add_argument("--rule", choices=RULES, default="absolute", help="default: absolute")
    what.add_argument(
        "--aggregate",
        default="pooled",
        metavar="HOW",
        help="how samples are combined: pooled (default), mean (the paper's), median, quantile:Q",
    )
    what.add_argument(
        "--q_block_size",
        type=_checked(_positive),
        default=128,
        metavar="N",
        help="queries in a block (default: 128)",
    )
    what.add_argument(
        "--k_block_size",
        type=_checked(_positive),
        default=64,
        metavar="N",
        help="keys in a block (default: 64)",
    )
    what.add_argument(
        "--keep_maxima",
        type=_checked(_positive),
        metavar="N",
        help="block maxima kept a query block (default: 4 times the largest k)",
    )
    what.add_argument("--name", help="name of the model in the table")
    how = run.add_argument_group("running")
    how.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="default: float32 on a CPU, bfloat16 on a GPU",
    )
    how.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU if any)"
    )
    how.add_argument(
        "--offline", action="store_true", help="take Hub ids from the local cache only"
    )
    how.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="where the samples that are done are kept until all are (default: FILE.samples)",
    )
    how.add_argument(
        "--resume",
        action="store_true",
        default=True,
        help="use the samples that an interrupted run has kept (the default)",
    )
    how.add_argument(
        "--no_resume", dest="resume", action="store_false", help="measure every sample again"
    )
    how.add_argument(
        "--keep_samples",
        action="store_true",
        help="keep what was measured on the samples, for other options later",
    )
    for ignored in ("--num_layers", "--num_heads", "--chunk_size"):
        how.add_argument(ignored, type=_checked(_positive), help=argparse.SUPPRESS)
    run.set_defaults(function=_run)


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if (options.data_file is None) == (options.text is None):
        raise ValueError("name the text to calibrate on, with either --data_file or --text")
    if options.k_values and options.target_sparsity:
        raise ValueError("give either --k_values or --target_sparsity")
    if options.target_sparsity is None and options.k_values is None:
        options.k_values = parse_k_values(_DEFAULT_K_VALUES)
    from bsfa_calib import data, estimate, models

    estimate.parse_aggregate(options.aggregate)
    _check_geometry(options)
    output = _output_path(options.thresholds_save_path)
    # Mistakes in the data should show before the model is loaded.
    documents = data.read_json(options.data_file) if options.data_file else []
    tasks = data.text_tasks(options.text or [])
    models.locate(options.model)
    print(f"loading {options.model}", file=sys.stderr)
    loaded = models.load(
        options.model, dtype=options.dtype, device=options.device, offline=options.offline
    )
    cut = {
        "max_seq_len": _max_seq_len(options, loaded.model),
        "examples": options.num_examples,
        "held_out": options.holdout_samples,
    }
    if documents:
        split = data.split_documents(documents, loaded.tokenizer, **cut)
    else:
        split = data.split_texts(tasks, loaded.tokenizer, **cut)
    return _calibrate(options, arguments, loaded.model, split, output)


def _calibrate(
    options: argparse.Namespace,
    arguments: Sequence[str],
    model: Any,
    split: Split,
    output: Path,
) -> int:
    from bsfa_calib import capture, models
    from bsfa_calib.progress import Interrupted, ProgressReporter

    _check_shape(options, model)
    name, revision = models.identity(options.model, model)
    checkpoint = Path(options.checkpoint or f"{output}.samples")
    if not options.resume:
        for old in checkpoint.glob("sample-*.safetensors"):
            old.unlink()
    print(_what_is_read(split), file=sys.stderr)
    reporter = ProgressReporter()
    try:
        with reporter.interruptible():
            table = capture.calibrate(
                model,
                [sample.tokens for sample in split.calibration],
                held_out=[sample.tokens for sample in split.held_out],
                k_values=options.k_values,
                target_sparsities=options.target_sparsity,
                rule=options.rule,
                q_block=options.q_block_size,
                k_block=options.k_block_size,
                aggregate=options.aggregate,
                keep_maxima=options.keep_maxima,
                checkpoint=checkpoint,
                model_name=options.name or name,
                revision=revision,
                provenance=_provenance(options, arguments, model, split),
                progress=reporter,
            )
    except (Interrupted, KeyboardInterrupt):
        done = len(list(checkpoint.glob("sample-*.safetensors")))
        print(
            f"bsfa-calibrate: interrupted; {done} samples are done and kept in {checkpoint}. The "
            "same command goes on from there.",
            file=sys.stderr,
        )
        return _INTERRUPTED
    table.save(output)
    if not options.keep_samples:
        for old in checkpoint.glob("sample-*.safetensors"):
            old.unlink()
        with contextlib.suppress(OSError):
            checkpoint.rmdir()
    print(report.operating_points(table))
    for sentence in report.verdict(table):
        print(sentence)
    print(f"wrote {output} ({output.stat().st_size / 1e6:.2f} MB)")
    return 0


def _info(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    table = ThresholdTable.load(options.file)
    if options.json:
        print(report.as_json(table))
        return 0
    print(report.describe(table))
    print()
    print(report.operating_points(table))
    for sentence in report.verdict(table):
        print(sentence)
    return 0


def _convert(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    from bsfa_calib.convert import load_pt

    output = _output_path(options.output)
    table = load_pt(options.file, model=options.name)
    table.save(output)
    print(
        f"wrote {output}: k = {', '.join(map(str, table.k_values))}; {table.layers} layers, "
        f"{table.heads} heads, {table.rows} query blocks; geometry {table.geometry}"
    )
    return 0


def _plot(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    from bsfa_calib.plot import plot

    table = ThresholdTable.load(options.file)
    plot(table, options.output, points=options.points)
    print(f"wrote {options.output}")
    return 0


def _output_path(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name a file in it")
    if path.suffix == ".safetensors":
        return path
    renamed = path.with_suffix(".safetensors")
    print(f"note: tables are safetensors files, so {renamed} is written", file=sys.stderr)
    return renamed


def _check_geometry(options: argparse.Namespace) -> None:
    from bsfa_kernel import GEOMETRIES

    wanted = (options.q_block_size, options.k_block_size)
    if wanted not in [tuple(geometry) for geometry in GEOMETRIES]:
        raise ValueError(
            f"the block sizes must be one of {', '.join(map(str, GEOMETRIES))} (queries x keys), "
            f"got {wanted[0]}x{wanted[1]}"
        )


def _check_shape(options: argparse.Namespace, model: Any) -> None:
    config = model.config.get_text_config()
    for name, there in (
        ("num_layers", config.num_hidden_layers),
        ("num_heads", config.num_attention_heads),
    ):
        stated = getattr(options, name)
        if stated is not None and stated != there:
            raise ValueError(f"--{name} says {stated}, but the model has {there}")


def _max_seq_len(options: argparse.Namespace, model: Any) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if options.max_seq_len is None:
        return min(_DEFAULT_MAX_SEQ_LEN, positions or _DEFAULT_MAX_SEQ_LEN)
    if positions is not None and options.max_seq_len > positions:
        raise ValueError(
            f"--max_seq_len {options.max_seq_len} exceeds the model's {positions} positions"
        )
    return int(options.max_seq_len)


def _what_is_read(split: Split) -> str:
    counts: dict[str, list[int]] = {}
    for kind, samples in enumerate((split.calibration, split.held_out)):
        for sample in samples:
            counts.setdefault(sample.task, [0, 0])[kind] += 1
    tasks = "; ".join(
        f"{task or 'text'}: {used} + {held} held out" for task, (used, held) in counts.items()
    )
    lengths = [len(sample.tokens) for sample in split.calibration]
    return (
        f"{len(split.calibration)} samples of {min(lengths)} to {max(lengths)} tokens, "
        f"{len(split.held_out)} held out ({tasks})"
    )


def _provenance(
    options: argparse.Namespace, arguments: Sequence[str], model: Any, split: Split
) -> dict[str, str]:
    import torch

    import bsfa_kernel

    versions = [f"bsfa-calib {__version__}", f"bsfa-kernel {bsfa_kernel.__version__}"]
    for package in ("torch", "transformers", "gguf"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    on_gpu = model.device.type == "cuda"
    facts = {
        "command": shlex.join(["bsfa-calibrate", *arguments]),
        "versions": ", ".join(versions),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
    }
    for key, samples in (("data", split.calibration), ("held_out", split.held_out)):
        if samples:
            facts[key] = "; ".join(f"{s.task}: {s.source}".lstrip(": ") for s in samples)
    return facts


if __name__ == "__main__":
    sys.exit(main())
