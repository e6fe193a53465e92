# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Samples of text in tokens: windows of a given length, in turn from every kind and file."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from bsfa_calib.data import DataError, Document, PathLike, read_documents

__all__ = [
    *("DataError", "Source", "Split", "Tokenizer", "Window", "check_part", "encode", "find_files"),
    *("parse_part", "read_documents", "read_windows", "special_prefix", "split_by_kind"),
]

# Characters set aside for a token; what is too little is seen and doubled.
_CHARACTERS_A_TOKEN = 6
# Tokens before the end of a text that is cut off there: the last ones would be others in the whole.
_SEAM = 16

Source: TypeAlias = "PathLike | Sequence[PathLike] | Mapping[str, Sequence[Document]]"
"""Folders or files, or what `bsfa_calib.data.read_documents` made of them."""


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """Token ids of a text, under ``input_ids``."""


@dataclass(frozen=True)
class Window:
    """A stretch of text.

    Attributes:
        kind: the folder that it is from, as "novels"; what results are grouped by.
        name: kind, file and position: the same for the same files, part, length and tokenizer.
        ids: its tokens, after the special ones that the tokenizer puts before a prompt.
        special: how many of those there are.
    """

    kind: str
    name: str
    ids: tuple[int, ...]
    special: int = 0

    @property
    def body(self) -> tuple[int, ...]:
        """The tokens of the text alone."""
        return self.ids[self.special :]


@dataclass(frozen=True)
class Split:
    """Windows to calibrate on, and others of the same kinds to test the thresholds on.

    Attributes:
        calibration: to calibrate on.
        held_out: to test on.
        serving: longer ones, to find the points on.
    """

    calibration: tuple[Window, ...]
    held_out: tuple[Window, ...]
    serving: tuple[Window, ...] = ()


def check_part(part: tuple[float, float]) -> None:
    """Refuse what is not a stretch of 0 to 1.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= part[0] < part[1] <= 1:
        raise ValueError(f"a part of a text is A:B with 0 <= A < B <= 1, got {part[0]}:{part[1]}")


def parse_part(text: str) -> tuple[float, float]:
    """Read a part of a text, as ``0:0.5``.

    Raises:
        ValueError: it is not one.
    """
    try:
        first, last = (float(edge) for edge in text.split(":"))
    except ValueError:
        raise ValueError(
            f"a part of a text is A:B with 0 <= A < B <= 1, as 0.5:1, got {text!r}"
        ) from None
    check_part((first, last))
    return first, last


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text without anything added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def special_prefix(tokenizer: Tokenizer) -> list[int]:
    """Special tokens that the tokenizer puts before a prompt."""
    bare = encode(tokenizer, "a")
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def read_windows(
    source: Source,
    tokenizer: Tokenizer,
    *,
    length: int,
    count: int,
    part: tuple[float, float] = (0.0, 1.0),
    whole: bool = False,
) -> list[Window]:
    """Windows that do not overlap, taken in turn from every kind, and in a kind from every file.

    Files too short for one window are joined with others of their kind by an empty line.

    Args:
        source: a folder of text files, or of one subfolder a kind; or files.
        tokenizer: of transformers.
        length: tokens in a window, special ones included.
        count: windows wanted.
        part: the stretch of each file that may be used, as shares of its characters. Calibrating on
            one and evaluating on another keeps the evaluation honest.
        whole: let each sample of a JSON file be a window of its own, of at most ``length`` tokens.

    Returns:
        ``count`` windows.

    Raises:
        DataError: there is no such folder or file, or it does not hold text.
        ValueError: the text is too short; the message says how many windows it gives.
    """
    if count < 1:
        raise ValueError(f"length and count must be at least 1, got {length} and {count}")
    by_kind = _by_kind(source, tokenizer, length, count, part, whole)
    windows = list(_in_turn(by_kind.values()))
    if len(windows) < count:
        where = "" if isinstance(source, Mapping) else f" in {source}"
        raise ValueError(
            f"{count} windows of {length} tokens were asked for, and the part "
            f"{part[0]:g}:{part[1]:g} of the text{where} gives {len(windows)}; "
            "give more text, ask for fewer or shorter samples, or take a larger part"
        )
    return windows[:count]


def split_by_kind(
    source: Source,
    tokenizer: Tokenizer,
    *,
    length: int,
    each: int,
    held_out: int,
    part: tuple[float, float] = (0.0, 1.0),
) -> Split:
    """So many windows of every kind to calibrate on, and the next ones held out, if there are any.

    They are those of `read_windows`; a kind with less text than one window gives one that is
    shorter. Samples of JSON files are windows of their own.

    Args:
        source: as for `read_windows`.
        tokenizer: of transformers.
        length: most tokens in a window, special ones included.
        each: windows of each kind to calibrate on.
        held_out: windows of each kind to hold out.
        part: as for `read_windows`.

    Raises:
        DataError: there is no such folder or file, or it holds no text.
    """
    wanted = each + held_out
    by_kind = _by_kind(source, tokenizer, length, wanted, part, True, short=True)
    found = [windows[:wanted] for windows in by_kind.values()]
    if not any(found):
        raise DataError("there is no text to calibrate on: all of it is blank")
    return Split(
        tuple(itertools.chain.from_iterable(windows[:each] for windows in found)),
        tuple(itertools.chain.from_iterable(windows[each:] for windows in found)),
    )


def _by_kind(
    source: Source,
    tokenizer: Tokenizer,
    length: int,
    count: int,
    part: tuple[float, float],
    whole: bool,
    short: bool = False,
) -> dict[str, list[Window]]:
    """Up to ``count`` windows of each kind; ``short``: a single shorter one where there is none."""
    check_part(part)
    prefix = tuple(special_prefix(tokenizer))
    if length <= len(prefix):
        raise ValueError(
            f"length must be greater than {len(prefix)}, the special tokens before a prompt, "
            f"got {length}"
        )
    documents = source if isinstance(source, Mapping) else _read(source)
    cutter = _Cutter(tokenizer, prefix, length - len(prefix), count)
    found: dict[str, list[Window]] = {}
    for kind, texts in documents.items():
        parts = [(one, _part_of(one.text, part)) for one in texts]
        found[kind] = [
            cutter.whole(kind, one.source, text)
            for one, text in itertools.islice(
                ((one, text) for one, text in parts if whole and one.whole and text.strip()), count
            )
        ]
        plain = [(one.source, text) for one, text in parts if not (whole and one.whole)]
        found[kind] += cutter.windows(kind, plain, short and not found[kind])
    return found


def _read(source: PathLike | Sequence[PathLike]) -> dict[str, list[Document]]:
    if isinstance(source, str | os.PathLike):
        return read_documents(source)
    return read_documents(list(source))


def _part_of(text: str, part: tuple[float, float]) -> str:
    return text[int(len(text) * part[0]) : int(len(text) * part[1])]


def _in_turn(streams: Iterable[Sequence[Window]]) -> Iterable[Window]:
    for row in itertools.zip_longest(*streams):
        yield from (window for window in row if window is not None)


@dataclass(frozen=True)
class _Cutter:
    """Cuts the texts of a kind into windows of ``length`` tokens after a prefix."""

    tokenizer: Tokenizer
    prefix: tuple[int, ...]
    length: int
    count: int

    def whole(self, kind: str, name: str, text: str) -> Window:
        """One window of a text, which may be shorter."""
        ids = self._ids(text, self.length)[: self.length]
        return Window(kind, f"{kind}/{name}", (*self.prefix, *ids), len(self.prefix))

    def windows(self, kind: str, texts: Sequence[tuple[str, str]], short: bool) -> list[Window]:
        """Windows of texts with their names, in turn from each, and at most ``count``."""
        streams: list[tuple[str, str]] = []
        joined: list[tuple[str, str]] = []
        for name, text in texts:
            if len(text) >= self.length * _CHARACTERS_A_TOKEN:
                streams.append((name, text))
            elif text.strip():
                joined.append((name, text))
        if joined:
            streams.append((f"{joined[0][0]}+", "\n\n".join(text for _, text in joined)))
        if not streams:
            return []
        each = math.ceil(self.count / len(streams))
        while True:
            cut = [self._cut(kind, name, text, each) for name, text in streams]
            windows = list(_in_turn(cut))
            # A stream that gave all it was asked for may have more.
            if len(windows) >= self.count or all(len(found) < each for found in cut):
                break
            each *= 2
        if not windows and short:
            text = "\n\n".join(text for _, text in streams)
            return [self.whole(kind, f"{streams[0][0]}@0", text)]
        return windows[: self.count]

    def _cut(self, kind: str, name: str, text: str, count: int) -> list[Window]:
        ids = self._ids(text, count * self.length)
        return [
            Window(
                kind,
                f"{kind}/{name}@{start}",
                (*self.prefix, *ids[start : start + self.length]),
                len(self.prefix),
            )
            for start in range(0, min(len(ids) // self.length, count) * self.length, self.length)
        ]

    def _ids(self, text: str, wanted: int) -> list[int]:
        """The first tokens of a text, as many as are wanted or as it has."""
        characters = wanted * _CHARACTERS_A_TOKEN
        while True:
            ids = encode(self.tokenizer, text[:characters])
            if characters >= len(text) or len(ids) >= wanted + _SEAM:
                return ids
            characters *= 2
