# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
r"""Does an extended model read long texts? Loss by position, and needles, with dense attention.

On one GPU, or on several that share the work::

    accelerate launch --num_processes 8 benchmarks/extend/check.py --model MODEL \
        --adapter ADAPTER --text TEXT --lengths 32K,64K,128K --out ADAPTER/check.jsonl

``TEXT`` is what ``benchmarks/assets.py`` fetches; of the novels, only those that no adapter is
trained on are read. One record a length goes to ``--out``: negative log-likelihood by eighth of the
window, that of the last tokens with a short context and with the whole window before them, and the
share of needles found, in ``bsfa_hf.evaluation``'s wording and in four that training held out.
``benchmarks/extend/README.md`` says what each field means.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness
import models
from extend import data, tasks
from harness import list_of, one_of, parse_length, run_program

BINS = 8
_CHUNK = 4096  # tokens whose logits are held at once
_NEAR, _LAST = 8192, 2048  # the last tokens are read again with no more than this in view

Document = tuple[str, list[int]]


def documents(folder: Path, tokenizer: Any) -> list[Document]:
    """The held-out texts, by name: each novel, all the essays, all the code."""
    found = []
    for name in data.HELD_OUT_NOVELS:
        text = (folder / "novels" / f"{name}.txt").read_text(encoding="utf-8")
        found.append((name, data.encode(tokenizer, text)))
    for kind in ("essays", "code"):
        texts = [
            path.read_text(encoding="utf-8", errors="replace")
            for path in sorted((folder / kind).glob("*.txt"))
        ]
        found.append((kind, data.encode(tokenizer, "\n\n".join(texts))))
    return found


def windows(ids: Sequence[int], length: int, most: int) -> Iterator[tuple[int, Sequence[int]]]:
    """Up to ``most`` windows, evenly spread from the first token to the last; none if too short."""
    free = len(ids) - length
    if free < 0:
        return
    # Windows that overlap by more than half say little new.
    count = max(1, min(most, 1 + 2 * free // length))
    for index in range(count):
        start = free * index // max(count - 1, 1)
        yield start, ids[start : start + length]


@torch.inference_mode()
def token_losses(model: Any, ids: Sequence[int], last: int | None = None) -> Tensor:
    """Negative log-likelihood of each token but the first, [L - 1] float32 in nats; or of the last.

    The logits are made a few thousand tokens at a time.
    """
    inputs = torch.tensor([list(ids)], device=model.device)
    hidden = model.get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state[0, :-1]
    targets = inputs[0, 1:]
    if last is not None:
        hidden, targets = hidden[-last:], targets[-last:]
    head = model.get_output_embeddings()
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(head(part).float(), wanted, reduction="none")
            for part, wanted in zip(
                torch.split(hidden, _CHUNK), torch.split(targets, _CHUNK), strict=True
            )
        ]
    )


@torch.inference_mode()
def answers(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> tuple[bool, float]:
    """Whether greedy decoding gives the answer, and the answer's mean log-likelihood a token."""
    inputs = torch.tensor([[*prompt, *answer]], device=model.device)
    hidden = model.get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[0, -len(answer) - 1 : -1]).float()
    targets = inputs[0, -len(answer) :]
    # Token by token after the right ones: the first mistake of greedy decoding shows the same.
    hit = bool((logits.argmax(-1) == targets).all())
    score = logits.log_softmax(-1).gather(1, targets[:, None]).mean()
    return hit, float(score)


WORDINGS = ("evaluation", "cue", "question")


def key_count(text: str) -> int:
    """A number of needles, for argparse."""
    if not 1 <= int(text) <= len(KEYS):
        raise argparse.ArgumentTypeError(f"must be from 1 to {len(KEYS)}, got {text}")
    return int(text)


@dataclass(frozen=True)
class Case:
    """A needle prompt to be made.

    Attributes:
        wording: ``evaluation``, or ``cue`` (the statement's own words) or ``question`` of
            ``tasks.HELD_OUT``.
        keys: needles; one is asked for.
        index: which of the cases of this kind; depth and text follow from it.
        count: how many there are.
    """

    wording: str
    keys: int
    index: int
    count: int

    @property
    def depth(self) -> float:
        """Where the needle that is asked for lies: 0 the beginning, 1 the end."""
        return self.index / max(1, self.count - 1)


def prompt(
    case: Case, texts: list[Document], tokenizer: Any, length: int
) -> tuple[list[int], list[int]]:
    """The tokens of a case's prompt and of its answer, together at most ``length``."""
    seed = f"{case.wording} {case.keys} {case.index} {length}"
    draw = random.Random(seed)
    usable = [ids for name, ids in texts if name != "code" and len(ids) >= length]
    if not usable:
        raise ValueError(f"no text but code has {length} tokens")
    ids = usable[case.index % len(usable)]
    start = draw.randrange(len(ids) - length + 1)
    haystack = ids[start : start + length]
    if case.wording == "evaluation":
        from bsfa_hf.evaluation.needle import make_prompt

        made = make_prompt(
            haystack,
            tokenizer,
            length=length,
            depth=case.depth,
            keys=case.keys,
            seed=draw.randrange(1 << 30),
        )
        return list(made.prompt), list(made.answer)
    wording = tasks.HELD_OUT[case.index % len(tasks.HELD_OUT)]
    keys = draw.sample(KEYS, case.keys)
    values = [str(draw.randrange(1_000_000, 10_000_000)) for _ in keys]
    cue = wording.cue.format(key=keys[0])
    if case.wording == "question":
        cue = f"Question: {wording.question.format(key=keys[0])}\nAnswer:"
    tail = data.encode(tokenizer, f"\n\n{cue}")
    answer = data.encode(tokenizer, f" {values[0]}")
    hidden = [
        data.encode(tokenizer, f" {wording.statement.format(key=key, value=value)}.")
        for key, value in zip(keys, values, strict=True)
    ]
    room = length - len(tail) - len(answer) - sum(map(len, hidden))
    depths = [case.depth, *(draw.random() for _ in hidden[1:])]
    made_ids = hide(haystack[:room], hidden, depths, tokenizer)
    return made_ids + tail, answer


KEYS = (
    *("Ardmore", "Belhaven", "Corsica", "Dunwich", "Elmhurst", "Fairlight", "Galway", "Holbrook"),
    *("Inverness", "Jasper", "Kirkwall", "Lindisfarne", "Marlow", "Norwich", "Oakham", "Penzance"),
    *("Quebec", "Ravenna", "Salerno", "Tobermory", "Ullapool", "Verona", "Whitby", "Yarmouth"),
)


def hide(
    haystack: Sequence[int], hidden: Sequence[list[int]], depths: Sequence[float], tokenizer: Any
) -> list[int]:
    """Tokens of a text with sentences put in at its sentence ends next to the given depths.

    Args:
        haystack: tokens of the text.
        hidden: tokens of each sentence.
        depths: of each, from 0 for the text's beginning to 1 for its end.
        tokenizer: of both.
    """
    full_stops = _full_stops(tokenizer)
    ends = [i + 1 for i, token in enumerate(haystack) if token in full_stops]
    places = [_nearest(ends, depth * len(haystack), len(haystack)) for depth in depths]
    made = list(haystack)
    # Later places first, so that earlier ones keep their index; at one place in their own order.
    for place, _, sentence in sorted(
        zip(places, range(len(hidden)), hidden, strict=True), reverse=True
    ):
        made[place:place] = sentence
    return made


def _nearest(ends: list[int], place: float, length: int) -> int:
    return min(ends, key=lambda end: abs(end - place)) if ends else round(min(place, length))


@functools.lru_cache(maxsize=1)
def _full_stops(tokenizer: Any) -> frozenset[int]:
    """Tokens that end a sentence."""
    every = range(len(tokenizer))
    return frozenset(token for token in every if tokenizer.decode([token]) in (".", ".\n"))


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, after Wilson."""
    z, share = 1.96, hits / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return tuple(max(0.0, (middle + s) / (1 + z * z / count)) for s in (-spread, spread))  # type: ignore[return-value]


def command_line(words: Sequence[str]) -> str:
    """The command, without the place of this repository and of other files, and without --out."""
    kept = ["python", "benchmarks/extend/check.py"]
    rest = iter(words)
    for word in rest:
        if word == "--out":
            next(rest, None)
            continue
        path = Path(word).resolve()
        if path.is_relative_to(harness.ROOT) and path.exists():
            word = path.relative_to(harness.ROOT).as_posix()
        elif "/" in word:
            word = path.name
        kept.append(word)
    return shlex.join(kept)


def summary(
    losses: list[dict[str, Any]], found: list[dict[str, Any]], positions: int, length: int
) -> dict[str, Any]:
    """The part of a record that is a length's."""
    nll = {}
    for name in sorted({one["text"] for one in losses}):
        rows = [one for one in losses if one["text"] == name]
        nll[name] = {
            "windows": len(rows),
            **{
                key: [round(sum(c) / len(c), 4) for c in zip(*(r[key] for r in rows), strict=True)]
                for key in ("by_position", "last_near_far")
            },
        }
    every = {
        key: [round(sum(c) / len(c), 4) for c in zip(*(n[key] for n in nll.values()), strict=True)]
        for key in ("by_position", "last_near_far")
    }
    needles = []
    for wording, keys in sorted({(one["wording"], one["keys"]) for one in found}):
        rows = [one for one in found if (one["wording"], one["keys"]) == (wording, keys)]
        hits = sum(one["hit"] for one in rows)
        needles.append(
            {
                "wording": wording,
                "keys": keys,
                "hits": hits,
                "count": len(rows),
                "share": round(hits / len(rows), 4),
                "interval": [round(v, 4) for v in wilson(hits, len(rows))],
                "log_likelihood": round(sum(r["score"] for r in rows) / len(rows), 4),
                "missed_depths": [round(r["depth"], 3) for r in rows if not r["hit"]],
            }
        )
    return {
        "seqlen": length,
        "max_position_embeddings": positions,
        "nll": nll,
        "nll_mean": every,
        "needles": needles,
    }


def main(arguments: list[str] | None = None) -> int:
    """Check the model that the command line names."""
    from accelerate import PartialState  # type: ignore[import-untyped]
    from accelerate.utils import gather_object  # type: ignore[import-untyped]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models.add_model_options(parser, None)  # prompts are drawn by their numbers
    parser.add_argument("--lengths", type=list_of(parse_length), default=(32768, 65536, 131072))
    parser.add_argument("--windows", type=int, default=3, help="at most, of each held-out text")
    parser.add_argument("--needles", type=int, default=48, help="prompts a wording and key count")
    parser.add_argument("--keys", type=list_of(key_count), default=(1, 4), help="such as 1,4")
    parser.add_argument("--wordings", type=list_of(one_of(WORDINGS)), default=WORDINGS)
    parser.add_argument("--out", type=Path, required=True, help="file of records, appended to")
    options = parser.parse_args(arguments)
    if options.text is None:
        parser.error("--text must name the folder that benchmarks/assets.py fetched")
    results = harness.Results(options.out)
    state: Any = PartialState(cpu=options.device == "cpu")
    if options.device == "cuda":
        options.device = str(state.device)
    model, tokenizer, name = models.load(options)
    if tokenizer is None:
        parser.error("a model with random weights has no tokenizer: name a --model")
    texts = documents(options.text, tokenizer)
    positions = model.config.get_text_config(decoder=True).max_position_embeddings
    command = command_line(sys.argv[1:] if arguments is None else arguments)
    for length in options.lengths:
        jobs: list[Any] = [
            (text, start, ids)
            for text, every in texts
            for start, ids in windows(every, length, options.windows)
        ]
        cases = [
            Case(wording, keys, index, options.needles)
            for wording in options.wordings
            for keys in options.keys
            for index in range(options.needles)
        ]
        losses, found = [], []
        for text, _, ids in jobs[state.process_index :: state.num_processes]:
            every_loss = token_losses(model, ids)
            near = far = every_loss[-_LAST:]
            if length > _NEAR:
                near = token_losses(model, ids[-_NEAR:], _LAST)
            losses.append(
                {
                    "text": text,
                    "by_position": [float(b.mean()) for b in every_loss.tensor_split(BINS)],
                    "last_near_far": [float(near.mean()), float(far.mean())],
                }
            )
        for case in cases[state.process_index :: state.num_processes]:
            hit, score = answers(model, *prompt(case, texts, tokenizer, length))
            found.append(
                {
                    "wording": case.wording,
                    "keys": case.keys,
                    "depth": case.depth,
                    "hit": hit,
                    "score": score,
                }
            )
        losses, found = gather_object(losses), gather_object(found)
        if state.is_main_process:
            machine = harness.environment(model.device, command=command)
            machine.pop("sources", None)  # of the native kernels, which nothing here runs
            record = {
                **machine,
                "kind": "extension",
                "model": name,
                "dtype": options.dtype,
                **summary(losses, found, positions, length),
            }
            results.append(record)
            print(report(record), flush=True)
    return 0


def report(record: dict[str, Any]) -> str:
    """A record in a few lines."""
    lines = [f"{record['model']}, {record['seqlen']} tokens"]
    for name, nll in [*record["nll"].items(), ("mean", record["nll_mean"])]:
        near, far = nll["last_near_far"]
        by = " ".join(f"{value:.3f}" for value in nll["by_position"])
        lines.append(f"  {name:14} nll {by}   last: near {near:.3f}, far {far:.3f}")
    for one in record["needles"]:
        low, high = one["interval"]
        lines.append(
            f"  {one['wording']:10} {one['keys']} keys: {one['hits']}/{one['count']} = "
            f"{one['share']:.0%} ({low:.0%} to {high:.0%}), log-likelihood "
            f"{one['log_likelihood']:.3f}; missed at {one['missed_depths']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
