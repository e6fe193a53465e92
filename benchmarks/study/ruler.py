# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Tasks like RULER's (arXiv 2404.06654) that need no download, and how a model answers them.

Needles with one or several keys, values and questions, chains of variables, common words, and
frequent coded words, made from the paper's description in wordings of this project's that no
adapter in ``extend`` was trained on. A prompt has exactly as many tokens as asked for, so that
prompts are answered together: each is read on its own under the attention in force, decoding is
dense. A score is the share of the expected answers that the model's text has.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bsfa_calib.language_model import cache_argument
from bsfa_calib.text import encode
from bsfa_hf.evaluation.needle import INTRODUCTION, NEEDLE, noise
from extend.check import Document, hide

TASKS = ("single", "multikey", "multivalue", "multiquery", "variables", "common", "frequent")
# Tokens of an answer, and what a prompt leaves free for it.
ANSWER = 64
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# A prompt's tokens, and what the answer is to hold.
_Content: TypeAlias = tuple[tuple[int, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Prompt:
    """A task's prompt.

    Attributes:
        task: one of ``TASKS``.
        name: task, number and seed: those of one name have the same tokens at a length, but for
            the depth of a single needle.
        ids: its tokens.
        answers: what the answer is to hold.
        depth: of the needle that is asked for, 0 to 1, where there is one.
    """

    task: str
    name: str
    ids: tuple[int, ...]
    answers: tuple[str, ...]
    depth: float | None = None


@dataclass(frozen=True)
class Maker:
    """Makes prompts.

    Attributes:
        tokenizer: of transformers.
        texts: haystacks: tokens of documents of at least a prompt's length, by name.
        words: different words, a few hundred at least.
        seed: of all that is drawn.
    """

    tokenizer: Any
    texts: Sequence[Document]
    words: Sequence[str]
    seed: int = 0

    def make(self, task: str, length: int, index: int, count: int) -> Prompt:
        """The prompt of a task with exactly ``length`` tokens.

        Args:
            task: one of ``TASKS``.
            length: tokens.
            index: which of the task's prompts; text, words and depths follow from it.
            count: how many there are: those of a single needle lie at evenly spread depths.

        Raises:
            ValueError: there is no such task, or no text is long enough.
        """
        if task not in TASKS:
            raise ValueError(f"a task is one of {', '.join(TASKS)}, got {task!r}")
        seed = f" of seed {self.seed}" if self.seed else ""
        draw = random.Random(f"{task} {length} {index}{seed}")
        depth = None
        if task in ("common", "frequent"):
            kind = self._common if task == "common" else self._frequent
            ids, answers = kind(draw, length)
        elif task == "variables":
            ids, answers = self._variables(draw, length)
        else:
            depth = index / max(count - 1, 1) if task == "single" else draw.random()
            ids, answers = self._needles(draw, task, length, depth)
        return Prompt(task, f"{task} {index}{seed}", ids, answers, depth)

    def _needles(self, draw: random.Random, task: str, length: int, depth: float) -> _Content:
        keys = draw.sample(self.words, 1 if task in ("single", "multivalue") else 4)
        pairs = [(key, str(draw.randrange(1_000_000, 10_000_000))) for key in keys]
        if task == "multivalue":
            pairs += [(keys[0], str(draw.randrange(1_000_000, 10_000_000))) for _ in range(3)]
        asked = pairs if task in ("multivalue", "multiquery") else pairs[:1]
        cue = NEEDLE.split(" {number}")[0].format(word=keys[0])
        if task == "multivalue":
            cue = f"The special magic numbers for {keys[0]} are:"
        elif task == "multiquery":
            cue = f"The special magic numbers for {', '.join(keys[:-1])} and {keys[-1]} are:"
        hidden = [NEEDLE.format(word=key, number=number) for key, number in pairs]
        depths = [depth, *(draw.random() for _ in hidden[1:])]
        ids = self._hidden(draw, length, INTRODUCTION, hidden, depths, f"\n\n{cue}")
        return ids, tuple(number for _, number in asked)

    def _variables(self, draw: random.Random, length: int) -> _Content:
        """A chain of five variables, in the order of the text; its first has a number."""
        names = ["".join(draw.choice(_LETTERS.upper()) for _ in range(5)) for _ in range(5)]
        number = str(draw.randrange(10_000, 100_000))
        hidden = [f"Variable {names[0]} is assigned {number}."]
        hidden += [
            f"Variable {after} is assigned what variable {before} has."
            for before, after in itertools.pairwise(names)
        ]
        tail = (
            f"\n\nQuestion: Find all variables that are assigned {number}, be it through others.\n"
            f"Answer: The variables that are assigned {number} are"
        )
        depths = sorted(draw.random() for _ in hidden)
        introduction = "Keep track of the variables that are assigned below.\n\n"
        ids = self._hidden(draw, length, introduction, hidden, depths, tail, quiet=True)
        return ids, tuple(names)

    def _common(self, draw: random.Random, length: int) -> _Content:
        """Ten words ten times as common as the rest."""
        chosen = draw.sample(self.words, len(self.words))
        favourites, others = chosen[:10], chosen[10:]
        head = encode(self.tokenizer, "Remember which words come up most in this list.\n\n")
        tail = encode(
            self.tokenizer,
            "\n\nQuestion: Which 10 words are the most common in the list above?\n"
            "Answer: The 10 most common words are",
        )
        room = length - len(head) - len(tail)
        pieces = {word: encode(self.tokenizer, f" {word} |") for word in chosen}
        size = sum(map(len, pieces.values())) / len(pieces)
        # Thirty times against three, as often as the length allows; and short lists have few words.
        total = room / size
        times = max(total / (300 + 3 * len(others)), min(1.0, total / 600))
        few = max(int((total - 300 * times) / (3 * times)), 1)
        order = favourites * round(30 * times) + others[:few] * max(round(3 * times), 1)
        draw.shuffle(order)
        return self._listed(head, order, pieces, room, tail), tuple(favourites)

    def _frequent(self, draw: random.Random, length: int) -> _Content:
        """Made-up words, the n-th as common as 1 / n²; the three commonest are asked for."""
        names = ["".join(draw.choice(_LETTERS) for _ in range(6)) for _ in range(200)]
        head = encode(self.tokenizer, "Read the coded text below.\n\n")
        tail = encode(
            self.tokenizer,
            "\n\nQuestion: Which three coded words appear most often in the coded text?\n"
            "Answer: The three words that appear most often are",
        )
        room = length - len(head) - len(tail)
        pieces = {name: encode(self.tokenizer, f" {name}") for name in names}
        weights = [1 / (rank + 1) ** 2 for rank in range(len(names))]
        order = draw.choices(names, weights, k=room)
        used, count = 0, 0
        while used < room:
            used += len(pieces[order[count]])
            count += 1
        commonest = [name for name, _ in Counter(order[:count]).most_common(3)]
        return self._listed(head, order[:count], pieces, room, tail), tuple(commonest)

    def _listed(
        self,
        head: list[int],
        order: Sequence[str],
        pieces: dict[str, list[int]],
        room: int,
        tail: list[int],
    ) -> tuple[int, ...]:
        body = [token for word in order for token in pieces[word]][:room]
        while len(body) < room:  # a list that comes out short goes on from its beginning
            body += body[: room - len(body)]
        return (*head, *body, *tail)

    def _hidden(
        self,
        draw: random.Random,
        length: int,
        introduction: str,
        sentences: Sequence[str],
        depths: Sequence[float],
        tail: str,
        *,
        quiet: bool = False,
    ) -> tuple[int, ...]:
        """Tokens of an introduction, of a text with sentences hidden in it, and of a tail."""
        head, end = (encode(self.tokenizer, text) for text in (introduction, tail))
        hidden = [encode(self.tokenizer, f" {sentence}") for sentence in sentences]
        room = length - len(head) - len(end) - sum(map(len, hidden))
        if room < 16:
            raise ValueError(f"{length} tokens are too few to hide {len(hidden)} sentences in")
        if quiet:
            # Text that is encoded as a whole may have fewer tokens than its sentences have.
            haystack: Sequence[int] = noise(self.tokenizer, 2 * room)[:room]
        else:
            usable = [ids for _, ids in self.texts if len(ids) >= room]
            if not usable:
                raise ValueError(f"no text has {room} tokens")
            ids = draw.choice(usable)
            start = draw.randrange(len(ids) - room + 1)
            haystack = ids[start : start + room]
        return (*head, *hide(haystack, hidden, depths, self.tokenizer), *end)


def vocabulary(texts: Sequence[str]) -> list[str]:
    """Plain words of five to nine letters that come up in texts, in alphabetical order."""
    found = {word for text in texts for word in re.findall(r"(?<![\w'])[a-z]{5,9}(?![\w'])", text)}
    return sorted(found)


def score(text: str, answers: Sequence[str]) -> float:
    """The share of the answers that a text has."""
    lower = text.lower()
    return sum(answer.lower() in lower for answer in answers) / len(answers)


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reading: Callable[[], AbstractContextManager[Any]],
    *,
    together: int = 8,
    crop: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[str, Any]]:
    """What a model answers, greedily, and what ``reading`` gave while it read each prompt.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompts: all of one length.
        reading: the attention that prompts are read under; gives a callable that is called when
            its prompt is read.
        together: prompts decoded at a time; their caches are held at once.
        crop: what is left of the cached keys and values [1, kv_heads, seqlen, head_dim] for
            decoding; all by default.

    Yields:
        The text up to the first line's end, and what the callable returned.
    """
    for start in range(0, len(prompts), together):
        some = prompts[start : start + together]
        firsts, caches, told = [], [], []
        for prompt in some:
            with reading() as read:
                first, cache = _read(model, prompt.ids)
                told.append(read())
            firsts.append(first)
            caches.append(
                [
                    tuple(crop(x) if crop else x for x in (layer.keys, layer.values))
                    for layer in cache.layers
                ]
            )
        tokens = _decode(model, torch.stack(firsts), caches, len(some[0].ids))
        for row, seen in zip(tokens, told, strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            yield text.strip().partition("\n")[0], seen


@torch.inference_mode()
def _read(model: Any, ids: Sequence[int]) -> tuple[Tensor, Any]:
    """The token that follows a prompt, [1], and the cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    inputs = torch.tensor([list(ids)], device=model.device)
    options = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
    return model(input_ids=inputs, **options).logits[0, -1:].argmax(-1), cache


@torch.inference_mode()
def _decode(
    model: Any, first: Tensor, caches: list[list[tuple[Tensor, ...]]], position: int
) -> list[list[int]]:
    """Greedy tokens of prompts together, up to ``ANSWER`` of each."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for layer in range(len(caches[0])):
        each = [prompt[layer] for prompt in caches]
        keys, values = (torch.cat(part) for part in zip(*each, strict=True))
        cache.update(keys, values, layer)
        for prompt in caches:  # the copy is all that is needed of it
            prompt[layer] = ()
    options = {cache_argument(model): cache, "use_cache": True}
    found = [first]
    for step in range(ANSWER - 1):
        places = torch.full_like(found[-1], position + step)
        logits = model(input_ids=found[-1], position_ids=places, **options).logits
        found.append(logits[:, -1:].argmax(-1))
    rows: list[list[int]] = torch.cat(found, 1).tolist()
    return rows
