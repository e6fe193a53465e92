# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Held-out text: which files, which part of them, and windows of a given length in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".md", ".rst", ".py", ".log")

# Characters set aside for a token; what is too little is seen and doubled.
_CHARACTERS_A_TOKEN = 6


@dataclass(frozen=True)
class Window:
    """A stretch of text.

    Attributes:
        kind: the folder that it is from, as "novels"; what results are grouped by.
        name: kind, file and position: the same for the same files, part, length and tokenizer.
        ids: its tokens.
    """

    kind: str
    name: str
    ids: tuple[int, ...]


def find_files(directory: Path) -> dict[str, list[Path]]:
    """Text files by kind: those of each subfolder, and those of the folder itself as "text".

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it holds no text files.
    """
    if not directory.exists():
        raise FileNotFoundError(f"there is no folder or file {directory}")
    if directory.is_file():
        return {"text": [directory]}
    kinds: dict[str, list[Path]] = {}
    for path in sorted(directory.rglob("*")):
        parts = path.relative_to(directory).parts
        if path.is_file() and path.suffix in SUFFIXES and not parts[0].startswith("."):
            kinds.setdefault(parts[0] if len(parts) > 1 else "text", []).append(path)
    if not kinds:
        raise ValueError(f"{directory} holds no text files ({', '.join(SUFFIXES)})")
    return kinds


def check_part(part: tuple[float, float]) -> None:
    """Refuse what is not a stretch of 0 to 1.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= part[0] < part[1] <= 1:
        raise ValueError(f"a part of a text is A:B with 0 <= A < B <= 1, got {part[0]}:{part[1]}")


def read_windows(
    directory: Path,
    tokenizer: Any,
    *,
    length: int,
    count: int,
    part: tuple[float, float] = (0.0, 1.0),
) -> list[Window]:
    """Windows that do not overlap, taken in turn from every kind, and in a kind from every file.

    Files too short for one window are joined with others of their kind.

    Args:
        directory: a folder of text files, or of one subfolder a kind; or one file.
        tokenizer: of transformers.
        length: tokens in a window.
        count: windows wanted.
        part: the stretch of each file that may be used, as shares of its characters. Calibrating on
            one and evaluating on another keeps the evaluation honest.

    Returns:
        ``count`` windows.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the text is too short; the message says how many windows it gives.
    """
    check_part(part)
    if length < 1 or count < 1:
        raise ValueError(f"length and count must be at least 1, got {length} and {count}")
    by_kind = [
        _windows_of_kind(kind, files, tokenizer, length, count, part)
        for kind, files in find_files(directory).items()
    ]
    windows: list[Window] = []
    for turn in range(max(map(len, by_kind))):
        windows += [of_kind[turn] for of_kind in by_kind if turn < len(of_kind)]
    if len(windows) < count:
        raise ValueError(
            f"{count} windows of {length} tokens were asked for, and the part "
            f"{part[0]:g}:{part[1]:g} of the text in {directory} gives {len(windows)}; "
            "give more text, ask for fewer or shorter samples, or take a larger part"
        )
    return windows[:count]


def _windows_of_kind(
    kind: str,
    files: Sequence[Path],
    tokenizer: Any,
    length: int,
    count: int,
    part: tuple[float, float],
) -> list[Window]:
    wanted_characters = length * _CHARACTERS_A_TOKEN
    long: list[tuple[str, str]] = []
    joined: list[str] = []
    joined_name = ""
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        text = text[int(len(text) * part[0]) : int(len(text) * part[1])]
        if len(text) >= wanted_characters:
            long.append((path.name, text))
        elif text.strip():
            joined.append(text)
            joined_name = joined_name or f"{path.name}+"
    streams = [*long, *([(joined_name, "\n\n".join(joined))] if joined else [])]
    if not streams:
        return []
    each = math.ceil(count / len(streams))
    while True:
        cut = [_cut(kind, name, text, tokenizer, length, each) for name, text in streams]
        windows: list[Window] = []
        for turn in range(max(map(len, cut))):
            windows += [found[turn] for found in cut if turn < len(found)]
        # A stream that gave all it was asked for may have more.
        if len(windows) >= count or all(len(found) < each for found in cut):
            return windows[:count]
        each *= 2


def _cut(kind: str, name: str, text: str, tokenizer: Any, length: int, count: int) -> list[Window]:
    characters = count * length * _CHARACTERS_A_TOKEN
    while True:
        ids = encode(tokenizer, text[:characters])
        if len(ids) >= count * length or characters >= len(text):
            break
        characters *= 2
    return [
        Window(kind, f"{kind}/{name}@{start}", tuple(ids[start : start + length]))
        for start in range(0, min(len(ids) // length, count) * length, length)
    ]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text without anything added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
