# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Calibration samples: token ids from JSON data files and from plain text."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

# Compressed suffixes that are read as text.
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}

# More characters than this a token are not expected; bounds how much of a large file is tokenised.
_CHARACTERS_A_TOKEN = 8


class DataError(ValueError):
    """Calibration data cannot be used; the message names file, line and what is wrong."""


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """Token ids of a text, under ``input_ids``."""


@dataclass(frozen=True)
class Document:
    """A text to calibrate on.

    Attributes:
        text: the text.
        task: the group that it belongs to; samples are taken from every group alike.
        source: where it came from, for messages.
    """

    text: str
    task: str
    source: str


@dataclass(frozen=True)
class Sample:
    """Token ids of one calibration sample.

    Attributes:
        tokens: the token ids.
        task: the group that it belongs to.
        source: where it came from, for messages.
    """

    tokens: tuple[int, ...]
    task: str
    source: str


@dataclass(frozen=True)
class Split:
    """Samples to calibrate on, and others of the same kind to test the thresholds on."""

    calibration: tuple[Sample, ...]
    held_out: tuple[Sample, ...]


def read_json(path: str | os.PathLike[str]) -> list[Document]:
    """Documents of a JSON file: a list of objects, or one object a line.

    An object has the text as ``input_text`` and, if it likes, a group as ``task_name``.

    Raises:
        DataError: the file is missing or is not that; the message names the line.
    """
    text = _read(Path(path))
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(_json_problem(path, error, 1)) from None
        located = [(f"{path}: sample {index}", entry) for index, entry in enumerate(entries, 1)]
    else:
        located = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    located.append((f"{path}:{number}", json.loads(line)))
                except (json.JSONDecodeError, RecursionError) as error:
                    raise DataError(_json_problem(path, error, number)) from None
    documents = [_document(entry, where) for where, entry in located]
    if not documents:
        raise DataError(f"{path}: the file holds no samples")
    return documents


def split_documents(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    examples: int,
    held_out: int,
) -> Split:
    """Take samples from every task alike: the first ones to calibrate on, the next ones held out.

    Args:
        documents: texts, each of which gives one sample, cut to max_seq_len tokens.
        tokenizer: the model's.
        max_seq_len: most tokens in a sample.
        examples: samples of each task to calibrate on.
        held_out: samples of each task to hold out, if there are so many.
    """
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.task, []).append(document)
    streams = {
        task: (_truncated(document, tokenizer, max_seq_len) for document in group)
        for task, group in groups.items()
    }
    return _taken(streams, examples, held_out)


def text_tasks(paths: Sequence[str | os.PathLike[str]]) -> dict[str, list[Path]]:
    """The text files of each task.

    A file is a task; so is a directory, with all files below it; a directory that holds directories
    stands for those. Hidden files are passed over.

    Raises:
        DataError: a path is missing or holds no file, or two tasks have one name.
    """
    tasks: dict[str, list[Path]] = {}
    for path in map(Path, paths):
        folders = _visible(path, Path.is_dir) if path.is_dir() else []
        for root in folders or [path]:
            if not root.exists():
                raise DataError(f"{root}: there is no such file or directory")
            files = [root] if root.is_file() else _visible(root, Path.is_file, deep=True)
            if not files:
                raise DataError(f"{root}: there is no text file in this directory")
            name = root.name.split(".")[0] if root.is_file() else root.resolve().name
            if name in tasks:
                raise DataError(f"{root}: another text is named {name!r}; rename one of them")
            tasks[name] = files
    return tasks


def split_texts(
    tasks: Mapping[str, Sequence[Path]],
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    examples: int,
    held_out: int,
) -> Split:
    """Cut plain text into samples of max_seq_len tokens, and take from every task alike.

    Files take turns. Those shorter than a sample are joined by an empty line, end to end, until
    they fill one. Every sample starts with the tokenizer's special tokens, as a prompt does.

    Args:
        tasks: text files by task, as `text_tasks` gives them.
        tokenizer: the model's.
        max_seq_len: tokens in a sample; fewer only where a task has no more.
        examples: samples of each task to calibrate on.
        held_out: samples of each task to hold out, if there are so many.

    Raises:
        DataError: a file is not text, or a task holds none.
    """
    prefix = special_prefix(tokenizer)
    wanted = examples + held_out
    streams = {
        task: _text_samples(task, files, tokenizer, prefix, max_seq_len, wanted)
        for task, files in tasks.items()
    }
    return _taken(streams, examples, held_out)


def special_prefix(tokenizer: Tokenizer) -> list[int]:
    """Special tokens that the tokenizer puts before a text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def _taken(streams: Mapping[str, Iterator[Sample]], examples: int, held_out: int) -> Split:
    calibration: list[Sample] = []
    rest: list[Sample] = []
    for stream in streams.values():
        calibration += itertools.islice(stream, examples)
        rest += itertools.islice(stream, held_out)
    return Split(tuple(calibration), tuple(rest))


def _truncated(document: Document, tokenizer: Tokenizer, max_seq_len: int) -> Sample:
    tokens = tokenizer(document.text, truncation=True, max_length=max_seq_len)["input_ids"]
    return Sample(tuple(tokens), document.task, document.source)


def _text_samples(
    task: str,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    prefix: list[int],
    max_seq_len: int,
    wanted: int,
) -> Iterator[Sample]:
    body = max_seq_len - len(prefix)
    if body < 1:
        raise DataError(f"max_seq_len must be greater than {len(prefix)}, got {max_seq_len}")
    limit = wanted * max_seq_len * _CHARACTERS_A_TOKEN
    long: list[list[Sample]] = []
    short: list[int] = []
    packed: list[Sample] = []
    for path in files:
        text = _read(path)[:limit]
        tokens = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(tokens) >= body:
            pieces = itertools.islice(range(0, len(tokens) - body + 1, body), wanted)
            starts = [(start, tokens[start : start + body]) for start in pieces]
            long.append(
                [
                    Sample((*prefix, *piece), task, f"{path.name} from token {start}")
                    for start, piece in starts
                ]
            )
            continue
        gap = tokenizer("\n\n", add_special_tokens=False)["input_ids"] if short else []
        short += [*gap, *tokens]
        while len(short) >= body and len(packed) < wanted:
            packed.append(Sample((*prefix, *short[:body]), task, f"files up to {path.name}"))
            short = short[body:]
    turns = [*long, packed] if packed else long
    if not turns and short:
        turns = [[Sample((*prefix, *short), task, "all of the text")]]
    if not turns:
        raise DataError(f"{files[0]}: there is no text for the task {task!r}")
    for row in itertools.zip_longest(*turns):
        yield from (sample for sample in row if sample is not None)


def _document(entry: object, where: str) -> Document:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a sample must be an object, got {type(entry).__name__}")
    text = entry.get("input_text")
    if not isinstance(text, str):
        raise DataError(
            f"{where}: a sample must have a string 'input_text', got "
            f"{'none' if 'input_text' not in entry else repr(text)[:80]}; its keys are "
            f"{', '.join(map(repr, entry)) or 'none'}"
        )
    if not text.strip():
        raise DataError(f"{where}: 'input_text' is empty")
    task = entry.get("task_name", "")
    if not isinstance(task, str):
        raise DataError(f"{where}: 'task_name' must be a string, got {repr(task)[:80]}")
    return Document(text, task, where)


def _json_problem(
    path: str | os.PathLike[str], error: json.JSONDecodeError | RecursionError, line: int
) -> str:
    if isinstance(error, RecursionError):
        return f"{path}:{line}: not valid JSON: nested too deeply"
    number = line + error.lineno - 1
    return f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})"


def _visible(root: Path, kind: Any, *, deep: bool = False) -> list[Path]:
    found = root.rglob("*") if deep else root.iterdir()
    return sorted(
        path
        for path in found
        if kind(path) and not any(p.startswith(".") for p in path.relative_to(root).parts)
    )


def _read(path: Path) -> str:
    opener = _OPENERS.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            data: bytes = file.read()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text: {error.reason}") from None
