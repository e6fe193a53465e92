# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""``bsfa demo``: questions about a long text, answered dense and block-sparse side by side.

A text holds several needles. Its beginning, up to the last whole query block that all questions
share, is read once; each question goes on from there. A chunk of a prefill reads the same
thresholds, so that this gives the logits of reading it whole; where not every row votes, the last
query block of the beginning votes whole and may keep a few blocks more.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bsfa_calib import Point, ThresholdTable
from bsfa_calib.convert import load_table
from bsfa_calib.data import Document, read_documents
from bsfa_calib.statistics import Statistics
from bsfa_calib.text import encode, read_windows, special_prefix
from bsfa_calib.tuning import check_target
from bsfa_hf.cli import common
from bsfa_hf.cli.generate import gain_note
from bsfa_hf.evaluation.needle import INTRODUCTION, NEEDLE
from bsfa_hf.integration import enabled
from bsfa_kernel import DEFAULT_GEOMETRY
from bsfa_kernel.geometry import forced_share

Texts: TypeAlias = "Mapping[str, Sequence[Document]]"

_SHORTEST = 512
_SCORED = 512
_ANSWER_TOKENS = 12
# Readings that are timed on a GPU.
_TIMED = 5
_CALIBRATION_SAMPLES = 2
_CALIBRATION_SPARSITIES = (0.4, 0.5, 0.6, 0.7)
_WORDS = ("anchor", "basket", "candle", "falcon", "garden", "island", "lantern", "marble", "orchid")
# What is hidden; the question is the sentence up to the number. Small models mix up sentences that
# differ in one word or end alike, dense or not.
_NEEDLES = (
    NEEDLE,
    "The code of the safe behind the {word}: {number}.",
    "The telephone of the office at the {word}: {number}.",
    "The serial number of the ticket to the {word}: {number}.",
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def add_subcommand(subparsers: Any) -> None:
    """Add ``demo`` to the subcommands of a parser."""
    parser = subparsers.add_parser(
        "demo",
        help="questions about a long text, dense and block-sparse side by side",
        description="Hide numbers in a long text, ask for them with dense and with block-sparse "
        "attention, and compare answers, perplexity, kept blocks and time.",
        allow_abbrev=False,
    )
    common.add_model_options(parser)
    common.add_table_options(parser)
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="find one threshold for the model now, in the first half of the text's files",
    )
    parser.add_argument(
        "--text", required=True, type=Path, metavar="PATH", help="a text file, or a folder of them"
    )
    parser.add_argument(
        "--tokens", type=common.positive, default=4096, help="of text and needles (default: 4096)"
    )
    parser.add_argument(
        "--questions", type=common.positive, default=4, help=f"1 to {len(_WORDS)} (default: 4)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of needles, their places and the text")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Question:
    """A question about a needle: the whole prompt, which the number should follow."""

    asked: str
    number: str
    ids: list[int]


@dataclass
class Run:
    """What a model made of the questions."""

    answers: list[str]
    logits: Tensor
    seconds: float


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and print its table."""
    started = time.perf_counter()
    if arguments.questions > len(_WORDS):
        raise ValueError(f"--questions must be at most {len(_WORDS)}, got {arguments.questions}")
    if arguments.tokens < _SHORTEST:
        raise ValueError(f"--tokens must be at least {_SHORTEST}, got {arguments.tokens}")
    if arguments.calibrate and arguments.thresholds:
        raise ValueError(
            f"--calibrate makes a table and --thresholds names one, {arguments.thresholds}: give "
            "one of them"
        )
    if arguments.calibrate:
        _targets(arguments)
    texts = _prose(read_documents(arguments.text))
    table = common.named_table(arguments)
    loaded = common.load_model(arguments)
    text = _haystack(arguments, loaded.tokenizer, texts)
    questions = make_questions(
        text, loaded.tokenizer, arguments.tokens, arguments.questions, arguments.seed
    )
    table = table or _table(arguments, loaded, texts)
    point = common.choose_point(table, arguments, len(questions[0].ids))

    common.check_positions(loaded.model, len(questions[0].ids))
    common.note(f"{len(questions)} questions about {len(questions[0].ids)} tokens: dense")
    dense = _ask(loaded, questions, table.q_block)
    common.note(f"dense read the prompt in {dense.seconds:.2f} s; block-sparse")
    options: Any = {"check_model": not arguments.any_model, "selection": arguments.selection}
    with enabled(loaded.model, table, point, **options) as stats:
        sparse = _ask(loaded, questions, table.q_block)
    common.note(f"block-sparse read the prompt in {sparse.seconds:.2f} s")

    print(_report(loaded, table, point, questions, dense, sparse, stats))
    gain_note(stats, len(questions[0].ids))
    common.note(f"done in {time.perf_counter() - started:.0f} s")
    return 0


def _prose(documents: Texts) -> Texts:
    """The kind of text that reads best: essays, if there are some."""
    return {"essays": documents["essays"]} if "essays" in documents else documents


def _haystack(arguments: argparse.Namespace, tokenizer: Any, texts: Texts) -> str:
    """Text of one kind, from the second half of its files."""
    windows = read_windows(
        texts, tokenizer, length=arguments.tokens, count=1 + arguments.seed % 8, part=(0.5, 1.0)
    )
    window = windows[-1]
    common.note(f"text: {window.name}")
    return str(tokenizer.decode(window.body))


def make_questions(
    text: str, tokenizer: Any, tokens: int, number: int, seed: int
) -> list[Question]:
    """Hide needles in a text, at depths that cover it evenly, and ask for each.

    Args:
        text: the text.
        tokenizer: of transformers.
        tokens: of text and needles, about.
        number: of needles.
        seed: what words and numbers are drawn with.
    """
    draw = random.Random(seed)
    words = draw.sample(_WORDS, number)
    numbers = [str(draw.randrange(1_000_000, 10_000_000)) for _ in words]
    forms = draw.sample(_NEEDLES, len(_NEEDLES)) * (1 + number // len(_NEEDLES))
    needles = [
        form.format(word=word, number=value)
        for form, word, value in zip(forms, words, numbers, strict=False)
    ]
    asked = [
        needle.removesuffix(f" {value}.") for needle, value in zip(needles, numbers, strict=True)
    ]
    sentences = _SENTENCE_END.split(text.strip())
    added = len(encode(tokenizer, INTRODUCTION + " ".join(needles)))
    while len(sentences) > 1 and len(encode(tokenizer, " ".join(sentences))) + added > tokens:
        sentences = sentences[: max(1, len(sentences) - max(1, len(sentences) // 50))]
    for index in reversed(range(number)):
        sentences.insert(round((index + 0.5) / number * len(sentences)), needles[index])
    context = INTRODUCTION + " ".join(sentences)
    special = special_prefix(tokenizer)
    return [
        Question(text, value, [*special, *encode(tokenizer, f"{context}\n\n{text}")])
        for text, value in zip(asked, numbers, strict=True)
    ]


def _table(arguments: argparse.Namespace, loaded: common.Loaded, texts: Texts) -> ThresholdTable:
    """The shipped table, or one that is made now."""
    if not arguments.calibrate:
        path = common.find_table(loaded, arguments.tokens, common.named_point(arguments))
        if path is not None:
            common.note(f"thresholds: {path}")
            return load_table(path)
        common.note(f"no table for {loaded.name} in ./thresholds: calibrating")
    from bsfa_calib import models
    from bsfa_calib.capture import Progress
    from bsfa_calib.scalar import one_pass

    targets = _targets(arguments)
    windows = read_windows(
        texts,
        loaded.tokenizer,
        length=arguments.tokens,
        count=_CALIBRATION_SAMPLES,
        part=(0.0, 0.5),
    )
    name, revision = models.identity(arguments.model, loaded.model)

    def progress(state: Progress) -> None:
        if state.layer is None:
            common.note(f"calibrated on {state.sample} of {state.samples} samples")

    with common.quiet():
        table = one_pass(
            loaded.model,
            [list(window.ids) for window in windows],
            target_sparsities=targets,
            progress=progress,
        )
    return replace(table, model=name, revision=revision)


def _targets(arguments: argparse.Namespace) -> tuple[float, ...]:
    """The sparsities to calibrate: the one that is named, or those that the length allows.

    Raises:
        ValueError: a point of another axis is named, or a sparsity that the length does not allow.
    """
    point = common.named_point(arguments)
    if point is None:
        forced = forced_share(arguments.tokens, arguments.tokens, DEFAULT_GEOMETRY)
        return tuple(target for target in _CALIBRATION_SPARSITIES if target < 1 - forced)
    if point.axis != "target_sparsity":
        raise ValueError(
            f"demo calibrates for a target_sparsity, got {point}: give --target-sparsity, or a "
            "table with --thresholds"
        )
    check_target(point.value, [arguments.tokens], DEFAULT_GEOMETRY)
    return (point.value,)


def _ask(loaded: common.Loaded, questions: list[Question], q_block: int) -> Run:
    """Read the text and answer every question; times are those of reading one whole prompt."""
    ids = [question.ids for question in questions]
    shared = _shared(ids, q_block)
    scored = min(_SCORED, shared - 1)
    text = common.read(loaded.model, ids[0][:shared], keep=scored + 1)
    answers, seconds = [], text.seconds
    for index, tokens in enumerate(ids):
        reading = common.read(loaded.model, tokens[shared:], text.cache)
        if index == 0:
            seconds += reading.seconds
        answers.append(common.answer(loaded.model, loaded.tokenizer, reading, _ANSWER_TOKENS))
    if loaded.model.device.type == "cuda":
        # By now everything is warm.
        seconds = median(common.read(loaded.model, ids[0]).seconds for _ in range(_TIMED))
    return Run(answers, text.logits[:-1].log_softmax(-1), seconds)


def _shared(prompts: list[list[int]], q_block: int) -> int:
    """Tokens in the query blocks that all prompts begin with; each has one more at least."""
    shared, most = 0, min(map(len, prompts)) - 1
    while shared < most and len({tokens[shared] for tokens in prompts}) == 1:
        shared += 1
    return shared // q_block * q_block


def _report(
    loaded: common.Loaded,
    table: ThresholdTable,
    point: Point,
    questions: list[Question],
    dense: Run,
    sparse: Run,
    stats: Statistics,
) -> str:
    """The tables, for people, and in a sentence what they say."""
    length = len(questions[0].ids)
    rows = [["asked for", "answer", "dense", "", "block-sparse", ""]]
    for question, first, second in zip(questions, dense.answers, sparse.answers, strict=True):
        marks = ["hit" if question.number in said else "miss" for said in (first, second)]
        rows.append([question.asked, question.number, first[:12], marks[0], second[:12], marks[1]])
    hits = [sum(row[column] == "hit" for row in rows) for column in (3, 5)]
    scored, start = _scored_tokens(questions, dense, table.q_block)
    perplexity = [
        math.exp(-run.logits.gather(1, scored[:, None]).mean().item()) for run in (dense, sparse)
    ]
    divergence = (dense.logits.exp() * (dense.logits - sparse.logits)).sum(-1).mean().item()
    kept = 1.0 if math.isnan(stats.mean_kept_fraction) else stats.mean_kept_fraction
    summary = [
        ["", "dense", "block-sparse"],
        ["questions answered", f"{hits[0]} of {len(questions)}", f"{hits[1]} of {len(questions)}"],
        [
            f"perplexity (tokens {start} to {start + len(scored)})",
            *(f"{value:.3f}" for value in perplexity),
        ],
        ["KL divergence from dense, nats a token", "0", f"{divergence:.4f}"],
        ["key blocks kept", "100%", f"{kept:.1%}"],
    ]
    both = sum(row[3] == row[5] == "hit" for row in rows)
    change = perplexity[1] / perplexity[0] - 1
    sentence = (
        f"Left out: {1 - kept:.0%} of the key blocks; {both} of the {hits[0]} answers that dense "
        f"attention gives are kept, and perplexity changes by {change:+.2%}."
    )
    return "\n".join(
        [
            f"{Path(loaded.name).name}: {length} tokens, {point}, rule {table.rule}, blocks of "
            f"{table.q_block}x{table.k_block}"
            + (f", one query row in {table.voters} votes" if table.voters > 1 else ""),
            "",
            common.columns(rows),
            "",
            common.columns(summary),
            "",
            "key blocks kept, by layer:",
            *_by_layer(stats),
            "",
            sentence,
            _about_time(dense.seconds, sparse.seconds, loaded.model.device.type == "cpu"),
        ]
    )


def _about_time(dense: float, sparse: float, on_cpu: bool) -> str:
    if on_cpu:
        return (
            f"Time to read the prompt: {dense:.0f} s dense, {sparse:.0f} s block-sparse. On a CPU "
            "this is the time of a reference in PyTorch; it says nothing of the CUDA kernels."
        )
    return (
        f"Time to read the prompt: {dense * 1000:.1f} ms dense, {sparse * 1000:.1f} ms "
        f"block-sparse (median of {_TIMED}, the whole model); the longer the prompt, the larger "
        "the share of attention."
    )


def _scored_tokens(questions: list[Question], run: Run, q_block: int) -> tuple[Tensor, int]:
    """The tokens that the logits predict, and the position of the first."""
    ids = [question.ids for question in questions]
    shared = _shared(ids, q_block)
    start = shared - len(run.logits)
    return torch.tensor(ids[0][start:shared], device=run.logits.device), start


def _by_layer(stats: Statistics) -> list[str]:
    cells = ["dense" if math.isnan(share) else f"{share:.0%}" for share in stats.kept_fraction]
    lines = []
    for start in range(0, len(cells), 10):
        row = "".join(f"{cell:>7}" for cell in cells[start : start + 10])
        lines.append(f"  {start:>3}-{min(start + 9, len(cells) - 1):<3}{row}")
    return lines
