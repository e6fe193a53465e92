# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""``calibrate``: from a model and a text to a table, by any method."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bsfa_calib import __version__
from bsfa_calib.cli.common import INTERRUPTED, note, table_path
from bsfa_calib.cli.flags import add_flags, command, complete
from bsfa_calib.cli.jobs import Job
from bsfa_calib.report import printable
from bsfa_calib.thresholds import ThresholdTable

if TYPE_CHECKING:
    from bsfa_calib.data import Document
    from bsfa_calib.text import Split, Window
    from bsfa_kernel import Geometry

_DESCRIPTION = """
Calibrate thresholds for a model on your own text, and write a table.

  learned  one threshold a head, learned by gradient: the least loss at each sparsity
  scalar   one threshold for the whole model at each sparsity, found in one pass
  topk     the paper's: for every layer, head and position a threshold that keeps k blocks

What to expect of each point is measured on further samples; with --serve-length, on longer ones,
which learned and scalar find their points on then. With --points-only nothing is learned: points of
the table --start are found and measured on the samples. The same command goes on where it was
stopped.
"""


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


_LONGEST_FACT = 16384  # characters of provenance


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
    add_flags(parser)
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
    written = command(arguments)
    method = complete(arguments, paper=paper is not None)
    output = table_path(arguments.out)
    start = None if arguments.start is None else ThresholdTable.load(arguments.start)
    geometry = _geometry(arguments, method, start)
    # Mistakes in the text should show before the model is loaded.
    documents = _documents(arguments, paper)
    part = _part(arguments, documents)

    from bsfa_calib import models

    models.locate(arguments.model)
    note(f"loading {printable(arguments.model)}")
    loaded = models.load(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        offline=arguments.offline,
    )
    _check_model(arguments, loaded.model, start, paper)
    split = _split(arguments, documents, loaded.tokenizer, part, method, paper)
    note(_what_is_read(split))
    job = Job(arguments, loaded.model, split, geometry, start, output)
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
            **_of_start(method, start),
            **table.provenance,
            **_provenance(written, loaded.model, split, method),
            **_parts_of(arguments, part),
        },
    )
    table.save(output)
    job.clean_up()
    print("\n".join(lines(table)))
    print(f"wrote {printable(str(output))} ({output.stat().st_size / 1000:.1f} kB)")
    return 0


def _geometry(arguments: argparse.Namespace, method: str, start: ThresholdTable | None) -> Geometry:
    from bsfa_kernel import GEOMETRIES, Geometry

    if method == "points":
        assert start is not None
        return Geometry(start.q_block, start.k_block)
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
    whole = {document.whole for group in documents.values() for document in group}
    if len(whole) > 1:
        raise ValueError(
            "JSON samples beside other text need --text-part, which holds for both: 0:1 takes all "
            "of each, 0:0.5 the first half"
        )
    return (0.0, 1.0) if whole == {True} else (0.0, 0.5)


def _shared(
    arguments: argparse.Namespace, part: tuple[float, float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The parts of the text for thresholds and for points, by the tokens that each needs.

    So points are found on text that no threshold was made from.
    """
    made = arguments.samples * arguments.length
    share = made / (made + arguments.serve_samples * arguments.serve_length)
    edge = part[0] + share * (part[1] - part[0])
    return (part[0], edge), (edge, part[1])


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
    serving: list[Window] = []
    if arguments.serve_length is not None:
        part, rest = _shared(arguments, part)
        serving = read_windows(
            documents,
            tokenizer,
            length=arguments.serve_length,
            count=arguments.serve_samples,
            part=rest,
        )
    windows = read_windows(
        documents,
        tokenizer,
        length=arguments.length,
        count=arguments.samples + (arguments.holdout or 0),
        part=part,
        whole=method != "learned" and not serving,
    )
    return Split(
        tuple(windows[: arguments.samples]),
        tuple(windows[arguments.samples :]),
        tuple(serving),
    )


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
    longest = arguments.serve_length or arguments.length
    if positions is not None and longest > positions:
        raise ValueError(f"samples of {longest} tokens exceed the model's {positions} positions")


def _what_is_read(split: Split) -> str:
    counts: dict[str, list[int]] = {}
    for which, windows in enumerate((split.calibration, split.held_out)):
        for window in windows:
            counts.setdefault(window.kind, [0, 0])[which] += 1
    kinds = "; ".join(
        f"{printable(kind)}: {used} + {held} held out" for kind, (used, held) in counts.items()
    )
    lengths = [len(window.ids) for window in split.calibration]
    served = [len(window.ids) for window in split.serving]
    return (
        f"{len(split.calibration)} samples of {min(lengths)} to {max(lengths)} tokens, "
        f"{len(split.held_out)} held out ({kinds})"
        + (f"; points on {len(served)} of {max(served)} tokens" if served else "")
    )


def _parts_of(arguments: argparse.Namespace, part: tuple[float, float]) -> dict[str, str]:
    """What parts of the text thresholds and points come from, where these are others."""
    if arguments.serve_length is None:
        return {}
    made, served = _shared(arguments, part)
    return {
        "data_part": f"{made[0]:g}:{made[1]:g}",
        "served_part": f"{served[0]:g}:{served[1]:g}",
    }


def _of_start(method: str, start: ThresholdTable | None) -> dict[str, str]:
    """Where the thresholds come from that learning began with, or that points were found on."""
    if start is None:
        return {}
    if method != "points":
        return {"learned_from": start.model}
    # Of a table whose points were found in the same way, the one behind it.
    made = {key: value for key, value in start.provenance.items() if key.startswith("start_")}
    return made or {
        "start_model": start.model,
        **{
            f"start_{key}": value
            for key, value in start.provenance.items()
            if not key.startswith("expected_")
        },
    }


def _provenance(command: str, model: Any, split: Split, method: str) -> dict[str, str]:
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
    groups = (
        ("served" if method == "points" else "data", split.calibration),
        ("held_out", split.held_out),
        ("served", split.serving),
    )
    for key, windows in groups:
        if windows:
            facts[key] = printable("; ".join(window.name for window in windows))
    return {key: _clipped(value) for key, value in facts.items()}


def _clipped(fact: str) -> str:
    """A fact as long as the header of a table has room for."""
    if len(fact) <= _LONGEST_FACT:
        return fact
    return f"{fact[:_LONGEST_FACT]}... ({len(fact)} characters)"
