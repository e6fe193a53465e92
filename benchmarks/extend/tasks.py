# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Things to find in a long text, and the questions about them: what a model is extended with.

The kinds of task are RULER's (arXiv 2404.06654): needles with one or more keys, values and
questions, chains of variables, and counts of words. No wording is RULER's, nor that of
``bsfa_hf.evaluation``, so that both stay fit to measure with. ``HELD_OUT`` are wordings that no
training window uses either: ``check.py`` asks with them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Draw = random.Random

_THINGS = (
    *("locker code", "ticket number", "phone extension", "serial number", "badge number"),
    *("invoice number", "parcel number", "password", "high score", "membership number"),
    *("access code", "catalogue entry", "licence plate", "call sign", "account", "postcode"),
)
_FRAMES = (
    "The {thing} of {key} is {value}.",
    "The {thing} for {key}: {value}.",
    "For {key}, the {thing} is {value}.",
    "Note that {key} was given the {thing} {value}.",
    "[{key}] {thing} = {value}.",
    "{key} has the {thing} {value}.",
    "Write down under {key}, {thing}: {value}.",
    "As to {key}, its {thing} was changed to {value}.",
)
_REVERSED = (
    "Remember that {value} is the {thing} of {key}.",
    "{value} has been the {thing} of {key} since then.",
)
_QUESTIONS = (
    "What is the {thing} of {key}?",
    "Which {thing} belongs to {key}?",
    "Tell me the {thing} of {key}.",
    "According to the text, what is {key}'s {thing}?",
)
_LEADS = ("", " The {thing} of {key} is", " {key}:", " It is")
_INTRODUCTIONS = (
    "Somewhere in the text that follows there are facts to remember. Questions come at the end.",
    "Read the text below. It contains a few {thing}s, and you will be asked about them.",
    "Keep in mind every {thing} that you come across below.",
    "Below is a long document. A question about it follows.",
)


@dataclass(frozen=True)
class Wording:
    """A way to hide a value and to ask for it.

    Attributes:
        statement: with ``{key}`` and, at its end, ``{value}``.
        question: in words of its own, with ``{key}``.
    """

    statement: str
    question: str

    @property
    def cue(self) -> str:
        """The statement up to its value: the easiest question for a small model."""
        return self.statement.split(" {value}")[0]


HELD_OUT = (
    Wording(
        "The lighthouse at {key} flashes on frequency {value}.",
        "On which frequency does the lighthouse at {key} flash?",
    ),
    Wording(
        "At the auction, the painting called {key} went to bidder {value}.",
        "Which bidder got the painting called {key} at the auction?",
    ),
    Wording(
        "Ship's log: the cargo of {key} was stowed in hold {value}.",
        "In which hold was the cargo of {key} stowed?",
    ),
    Wording(
        "The gardener planted {key} in plot {value}.",
        "In which plot did the gardener plant {key}?",
    ),
)


@dataclass(frozen=True)
class Question:
    """What is asked, what leads over to the answer, and the answer (which begins with a space)."""

    text: str
    lead: str
    answer: str


@dataclass(frozen=True)
class Task:
    """What to hide, and the questions about it.

    Attributes:
        hidden: sentences to be spread over a text in this order.
        questions: at least one.
        introduction: what stands before the text; may be empty.
        haystack: what to hide the sentences in, or None for a text.
    """

    hidden: tuple[str, ...]
    questions: tuple[Question, ...]
    introduction: str = ""
    haystack: Haystack | None = None


# A haystack that is made, not read: the text of about so many characters.
Haystack = Callable[[int], str]


def _number(draw: Draw) -> str:
    digits = draw.choice((4, 5, 6, 7, 7, 7, 8))
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def _code(draw: Draw) -> str:
    # Groups of hexadecimal digits, up to the shape of a UUID.
    groups = draw.choice(((4, 4), (8,), (6, 2), (4, 4, 4), (8, 4, 4, 4, 12)))
    return "-".join(f"{draw.randrange(16**size):0{size}x}" for size in groups)


def _key(draw: Draw, words: Sequence[str]) -> str:
    kind = draw.random()
    if kind < 0.5:
        return draw.choice(words)
    if kind < 0.8:
        return f"{draw.choice(words)}-{draw.choice(words)}"
    if kind < 0.9:
        return draw.choice(words).capitalize()
    return _code(draw)


def _keys(draw: Draw, words: Sequence[str], count: int) -> list[str]:
    # Keys of one kind are the harder to tell apart.
    if draw.random() < 0.5:
        return draw.sample(words, count)
    found: dict[str, None] = {}
    while len(found) < count:
        found[_key(draw, words)] = None
    return list(found)


def _value(draw: Draw, words: Sequence[str]) -> Callable[[], str]:
    kind = draw.random()
    if kind < 0.7:
        return lambda: _number(draw)
    if kind < 0.88:
        return lambda: _code(draw)
    return lambda: draw.choice(words)


def _introduction(draw: Draw, thing: str) -> str:
    return draw.choice(_INTRODUCTIONS).format(thing=thing) if draw.random() < 0.5 else ""


def _ask(draw: Draw, frame: str, thing: str, key: str, value: str, style: int) -> Question:
    if style == 0 and frame in _FRAMES:  # the statement's own words
        cue = frame.split(" {value}")[0].format(thing=thing, key=key)
        return Question("", cue, f" {value}")
    lead = draw.choice(_LEADS).format(thing=thing, key=key)
    question = draw.choice(_QUESTIONS).format(thing=thing, key=key)
    return Question(question, lead.strip(), f" {value}")


def needles(draw: Draw, words: Sequence[str], *, count: int, questions: int) -> Task:
    """Keys with a value each, and questions for some of them, one by one or several at once."""
    thing = draw.choice(_THINGS)
    frame = draw.choice(_FRAMES + _REVERSED)
    value = _value(draw, words)
    keys = _keys(draw, words, count)
    values = {key: value() for key in keys}
    hidden = [frame.format(thing=thing, key=key, value=values[key]) for key in keys]
    asked = draw.sample(keys, min(questions, count))
    style = draw.randrange(2)
    if count >= 3 and draw.random() < 0.2:
        size = draw.randrange(2, min(count, 5) + 1)
        groups = [asked[i : i + size] for i in range(0, len(asked), size)]
        found = tuple(
            Question(
                f"Give the {thing}s of these, in this order: {', '.join(group)}.",
                "They are",
                " " + ", ".join(values[key] for key in group),
            )
            for group in groups
        )
    else:
        found = tuple(_ask(draw, frame, thing, key, values[key], style) for key in asked)
    return Task(tuple(hidden), found, _introduction(draw, thing))


def many_values(draw: Draw, words: Sequence[str], *, keys: int, values: int) -> Task:
    """Keys with several values each; all values of a key are asked for, in the text's order."""
    thing = draw.choice(_THINGS)
    frame = draw.choice(_FRAMES[:4])
    value = _value(draw, words)
    names = _keys(draw, words, keys)
    pairs = [(name, value()) for name in names for _ in range(values)]
    draw.shuffle(pairs)
    questions = []
    for name in names:
        lead = draw.choice((f"Every {thing} of {name}:", "They are", f"The {thing}s of {name} are"))
        answer = " " + ", ".join(found for key, found in pairs if key == name)
        questions.append(
            Question(f"List each {thing} that the text gives for {name}.", lead, answer)
        )
    hidden = [frame.format(thing=thing, key=name, value=found) for name, found in pairs]
    return Task(tuple(hidden), tuple(questions), _introduction(draw, thing))


_ROWS = (
    "{key}: {value}\n",
    "{key},{value}\n",
    "- {key} → {value}\n",
    '"{key}": "{value}",\n',
    "{key} | {value}\n",
    "The entry {key} has the value {value}.\n",
)


def table(draw: Draw, words: Sequence[str], *, questions: int) -> Task:
    """A text that is nothing but keys and values: every line a needle."""
    row = draw.choice(_ROWS)
    value = _value(draw, words)
    coded = draw.random() < 0.3
    asked_keys = [_code(draw) if coded else _pair(draw, words) for _ in range(questions)]
    asked = {key: value() for key in asked_keys}
    style = draw.randrange(2)

    def haystack(characters: int) -> str:
        lines: list[str] = []
        size = 0
        while size < characters:
            key = _code(draw) if coded else _pair(draw, words)
            if key in asked:
                continue
            lines.append(row.format(key=key, value=value()))
            size += len(lines[-1])
        return "".join(lines)

    found = []
    for key, wanted in asked.items():
        cue = row.split("{value}")[0].format(key=key)
        # The quotation mark of a row belongs to its value's token, so it is asked with the value.
        lead = cue.rstrip() if cue.endswith(" ") else ""
        if style == 0 and lead:
            found.append(Question("", lead, f" {wanted}"))
        else:
            found.append(Question(f"Which value stands beside {key}?", "It is", f" {wanted}"))
    hidden = tuple(row.format(key=key, value=wanted) for key, wanted in asked.items())
    return Task(hidden, tuple(found), "A table of keys and values.", haystack)


def _pair(draw: Draw, words: Sequence[str]) -> str:
    return f"{draw.choice(words)}-{draw.choice(words)}"


_CHAINS = (
    ("Box {name} holds {value}.", "Box {name} holds whatever box {other} holds."),
    ("let {name} := {value};", "let {name} := {other};"),
    ("Set {name} to {value}.", "Copy {other} into {name}."),
    ("{name} was worth {value}.", "{name} was worth as much as {other}."),
)


def chains(draw: Draw, *, count: int, length: int) -> Task:
    """Variables that take their value from one another; those with a given value are asked for."""
    first, later = draw.choice(_CHAINS)
    letters = draw.choice((3, 4, 5))
    names: dict[str, None] = {}
    while len(names) < count * length:
        names["".join(draw.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(letters))] = None
    every = list(names)
    groups = [every[i * length : (i + 1) * length] for i in range(count)]
    statements: list[list[str]] = []
    questions = []
    for group in groups:
        value = str(draw.randrange(10_000, 1_000_000))
        links = [first.format(name=group[0], value=value)]
        links += [later.format(name=b, other=a) for a, b in itertools.pairwise(group)]
        statements.append(links)
        questions.append(
            Question(
                f"Which names stand for {value}, directly or through another name?",
                draw.choice(("These do:", f"The names with {value} are")),
                " " + ", ".join(group),
            )
        )
    # Chains interleave, each in its own order.
    turns = [index for index in range(count) for _ in range(length)]
    draw.shuffle(turns)
    hidden = [statements[index].pop(0) for index in turns]
    return Task(tuple(hidden), tuple(questions), _introduction(draw, "name"))


def common_words(draw: Draw, words: Sequence[str]) -> Task:
    """A list of words in which a few come up often."""
    count = draw.choice((3, 5, 8, 10))
    often, seldom = draw.choice(((30, 3), (20, 2), (40, 4)))
    separator = draw.choice((", ", "\n", " / ", "; "))
    favourites = draw.sample(words, count)
    others = [word for word in words if word not in favourites]

    def haystack(characters: int) -> str:
        rest = max(characters - count * often * 8, 0)
        pool = draw.sample(others, min(len(others), max(rest // (8 * seldom), 1)))
        # Where there are too few words for the length, all come up more often.
        factor = max(1, rest // (8 * seldom * len(pool)))
        order = favourites * (often * factor) + pool * (seldom * factor)
        draw.shuffle(order)
        return separator.join(order)

    question = Question(
        f"Name the {count} words that the list has most of.",
        "The most frequent are",
        " " + ", ".join(favourites),
    )
    return Task((), (question,), "Here is a list of words; count them.", haystack)


def coded_words(draw: Draw) -> Task:
    """A text in made-up words, some commoner than others; the three commonest are asked for."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    kinds = draw.choice((40, 100, 300))
    drawn: dict[str, None] = {}
    while len(drawn) < kinds:
        drawn["".join(draw.choice(letters) for _ in range(draw.randrange(3, 7)))] = None
    names = list(drawn)
    power = draw.uniform(1.6, 2.4)
    shares = [1 / (rank + 1) ** power for rank in range(kinds)]
    separator = draw.choice((" ", ", ", ". "))

    def haystack(characters: int) -> str:
        scale = characters / 6 / sum(shares)
        made = [name for name, s in zip(names, shares, strict=True) for _ in range(int(s * scale))]
        draw.shuffle(made)
        return separator.join(made)

    question = Question(
        "Which three made-up words come up the most?",
        "From most to less:",
        " " + ", ".join(names[:3]),
    )
    return Task((), (question,), "The following is written in an unknown language.", haystack)


_FILLER = (
    "The rain has stopped. A dog sleeps by the door. ",
    "Trains leave every hour. People read their papers. The clock is slow. ",
    "Nothing happened on Monday. Nothing happened on Tuesday either. ",
    "The tea is hot and the street is quiet. Somebody waters the plants. ",
)


def filler(draw: Draw) -> Haystack:
    """A text that says one thing over and over."""
    sentence = draw.choice(_FILLER)
    return lambda characters: sentence * (characters // len(sentence) + 1)


def draw_task(draw: Draw, words: Sequence[str], length: int) -> Task:
    """A task for a window of ``length`` tokens.

    Args:
        draw: the source of randomness.
        words: at least a few hundred different words.
        length: tokens; longer windows hide more and are asked more.
    """
    most = 8 if length <= 16384 else 16 if length <= 65536 else 24
    kind = draw.random()
    if kind < 0.52:
        count = draw.choice((1, 2, 4, 4, 8, most))
        task = needles(draw, words, count=count, questions=most)
    elif kind < 0.60:
        task = many_values(draw, words, keys=draw.randrange(1, 5), values=draw.randrange(2, 5))
    elif kind < 0.72:
        task = table(draw, words, questions=most)
    elif kind < 0.84:
        task = chains(draw, count=draw.choice((1, 1, 2, 4)), length=draw.choice((3, 4, 5)))
    elif kind < 0.92:
        task = common_words(draw, words)
    else:
        task = coded_words(draw)
    if task.haystack is None and draw.random() < 0.2:
        task = Task(task.hidden, task.questions, task.introduction, filler(draw))
    return task
