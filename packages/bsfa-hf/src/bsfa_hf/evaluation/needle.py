# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Needles in a haystack: prompts whose answer is one number hidden at a given depth.

The needle's and the question's wording is that of RULER's number needles (arXiv 2404.06654); the
question repeats the needle's own words, which small models can answer as well.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bsfa_calib.text import encode, special_prefix

NEEDLE = "One of the special magic numbers for {word} is: {number}."
QUESTION = "\n\nOne of the special magic numbers for {word} is:"
INTRODUCTION = (
    "Special magic numbers are hidden in the text below. Remember them: one will be asked for.\n\n"
)
_NOISE = (
    "The lake is calm and grey. The road goes up the hill. Bread is on the table. "
    "We walk there, and we walk home. "
)
_WORDS = (
    *("apple", "anchor", "basket", "bridge", "candle", "carpet", "cherry", "copper", "cotton"),
    *("desert", "dragon", "engine", "falcon", "feather", "forest", "garden", "ginger", "guitar"),
    *("hammer", "harbor", "island", "jacket", "kettle", "ladder", "lantern", "lemon", "magnet"),
    *("marble", "meadow", "mirror", "needle", "orange", "orchid", "paddle", "pepper", "pillow"),
    *("planet", "pocket", "rabbit", "ribbon", "rocket", "saddle", "shadow", "silver", "spider"),
    *("summit", "tunnel", "turtle", "valley", "velvet", "violin", "walnut", "window", "winter"),
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt and the answer that should follow.

    Attributes:
        prompt: tokens up to the question's end.
        answer: tokens of the number.
        text: what the prompt says, for whoever looks.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str


def noise(tokenizer: Any, length: int) -> tuple[int, ...]:
    """A haystack of ``length`` tokens that says nothing, over and over."""
    once = len(encode(tokenizer, _NOISE))
    return tuple(encode(tokenizer, _NOISE * (length // once + 2))[:length])


def check_needles(depth: float, keys: int) -> None:
    """Refuse what no prompt can be made with.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"a needle's depth must be between 0 and 1, got {depth}")
    if not 1 <= keys <= len(_WORDS):
        raise ValueError(f"the needles' keys must be between 1 and {len(_WORDS)}, got {keys}")


def make_prompt(
    haystack: Sequence[int],
    tokenizer: Any,
    *,
    length: int,
    depth: float,
    keys: int = 1,
    seed: int = 0,
) -> NeedlePrompt:
    """Hide numbers in a text, and ask for one of them.

    Args:
        haystack: tokens of the text, at least ``length``.
        tokenizer: of transformers.
        length: tokens of prompt and answer together, at most.
        depth: where the needle that is asked for lies: 0 is the beginning, 1 the end.
        keys: needles; the others lie at random depths.
        seed: what numbers, words and random depths are drawn with.

    Returns:
        The prompt.

    Raises:
        ValueError: the length leaves no room for a haystack, or an argument is out of range.
    """
    check_needles(depth, keys)
    draw = random.Random(seed)
    words = draw.sample(_WORDS, keys)
    numbers = [str(draw.randrange(1_000_000, 10_000_000)) for _ in words]
    needles = [NEEDLE.format(word=w, number=n) for w, n in zip(words, numbers, strict=True)]
    question = QUESTION.format(word=words[0])
    answer = f" {numbers[0]}"
    added = INTRODUCTION + " ".join(needles) + question + answer
    special = special_prefix(tokenizer)
    room = length - len(special) - len(encode(tokenizer, added)) - 4 * keys
    if room < 16:
        raise ValueError(f"{length} tokens are too few for {keys} needles and a haystack")

    while True:
        sentences = _SENTENCE_END.split(tokenizer.decode(haystack[:room]).strip())
        places = [depth, *(draw.random() for _ in needles[1:])]
        # Later places first, so that earlier ones keep their index.
        for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
            sentences.insert(round(place * len(sentences)), needle)
        text = INTRODUCTION + " ".join(sentences) + question
        prompt = special + encode(tokenizer, text)
        both = special + encode(tokenizer, text + answer)
        if len(both) <= length:
            break
        room -= len(both) - length  # text that was decoded and encoded again can grow
    if both[: len(prompt)] != prompt:  # a token across the seam
        both = prompt + encode(tokenizer, answer)
    return NeedlePrompt(tuple(prompt), tuple(both[len(prompt) :]), text)
