# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Text from files: plain, compressed or JSON, decoded strictly, by kind.

Everything is read and checked here, without a tokenizer, so that what is wrong with a file is said
before a model is loaded.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

PathLike: TypeAlias = "str | os.PathLike[str]"

# What files of a folder are read. A file that is named itself may be called anything.
SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", ".log", "")
JSON_SUFFIXES = (".json", ".jsonl")

# The kind of files that lie in no folder of a kind.
PLAIN = "text"

_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}


class DataError(ValueError):
    """A text cannot be used; the message names file, line and what is wrong."""


@dataclass(frozen=True)
class Document:
    """A text.

    Attributes:
        text: the text.
        kind: the group that it belongs to; samples are taken from every group alike.
        source: where it came from, for messages and records.
        whole: whether it is one sample, as those of a JSON file are, rather than text to be cut.
    """

    text: str
    kind: str
    source: str
    whole: bool = False


def find_files(paths: PathLike | Sequence[PathLike]) -> dict[str, list[Path]]:
    """Text files by kind.

    Of one folder, each subfolder is a kind, with all text files below it, and the files of the
    folder itself are the kind "text". One file is the kind "text". Of several paths, each gives
    its folder's kinds, and what lies in none is called by the folder's or file's name. Hidden
    files, and in folders those with other suffixes than ``SUFFIXES``, are passed over.

    Args:
        paths: a folder or file, or several.

    Raises:
        DataError: a path is missing or holds no text file, or two kinds have one name.
    """
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    kinds: dict[str, list[Path]] = {}
    for path in map(Path, several):
        if not path.exists():
            raise DataError(f"{path}: there is no such file or directory")
        plain = PLAIN
        if len(several) > 1:
            plain = path.resolve().name if path.is_dir() else path.name.split(".")[0]
        found = _folder(path, plain) if path.is_dir() else {plain: [path]}
        if not found:
            known = ", ".join(suffix or "none" for suffix in SUFFIXES)
            raise DataError(f"{path}: there is no text file in this directory (suffixes: {known})")
        for kind, files in found.items():
            if kind in kinds:
                raise DataError(f"{path}: another text is named {kind!r}; rename one of them")
            kinds[kind] = files
    return kinds


def read_documents(paths: PathLike | Sequence[PathLike]) -> dict[str, list[Document]]:
    """All texts of folders and files by kind, read and checked.

    A file with a suffix of ``JSON_SUFFIXES`` that is named itself holds samples (`read_json`);
    their ``task_name`` is their kind.

    Args:
        paths: as for `find_files`.

    Raises:
        DataError: as `find_files`, `read_text` and `read_json`.
    """
    documents: dict[str, list[Document]] = {}
    for kind, files in find_files(paths).items():
        for path in files:
            if _suffix(path) in JSON_SUFFIXES:
                found = read_json(path)
            else:
                found = [Document(read_text(path), kind, path.name)]
            for name, group in by_kind(found, kind).items():
                documents.setdefault(name, []).extend(group)
    return documents


def by_kind(documents: Sequence[Document], default: str = PLAIN) -> dict[str, list[Document]]:
    """Documents by their kind, or by a default where they have none."""
    kinds: dict[str, list[Document]] = {}
    for one in documents:
        kinds.setdefault(one.kind or default, []).append(one)
    return kinds


def read_text(path: PathLike) -> str:
    """A file's text: UTF-8, with or without a byte order mark; ``.xz`` and ``.gz`` are unpacked.

    Raises:
        DataError: the file is missing, damaged, or not such text.
    """
    opener = _OPENERS.get(Path(path).suffix, open)
    try:
        with opener(path, "rb") as file:
            data: bytes = file.read()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (OSError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # With a mark, positions are counted from after it.
        start = error.start + len(data) - len(error.object)
        raise DataError(f"{_place(path, data, start)}: not UTF-8 text: {error.reason}") from None
    if "\0" in text:
        place = _place(path, data, data.index(b"\0"))
        raise DataError(f"{place}: not text: it holds NUL characters")
    return text


def read_json(path: PathLike) -> list[Document]:
    """Samples of a JSON file: a list of objects, or one object a line.

    An object has the text as ``input_text`` and an optional group as ``task_name``.

    Raises:
        DataError: the file is missing or is not that; the message names the line.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(_json_problem(path, error, 1)) from None
        located = [(f"{path}: sample {index}", entry) for index, entry in enumerate(entries, 1)]
    else:
        located = []
        # Other line separators of Unicode may stand within a JSON string.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    located.append((f"{path}:{number}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise DataError(_json_problem(path, error, number)) from None
    documents = [_document(entry, where) for where, entry in located]
    if not documents:
        raise DataError(f"{path}: the file holds no samples")
    return documents


def check_text(name: str, text: str) -> str:
    """The text, if it can be encoded as UTF-8 and holds no NUL, as that of files.

    Args:
        name: where the text is from, for the message.
        text: a text that Python made of bytes or of JSON.

    Raises:
        DataError: it holds lone surrogates, as undecodable bytes of a command line become, or NUL.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} is not text: character {error.start + 1} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}"
        ) from None
    if "\0" in text:
        raise DataError(f"{name} is not text: character {text.index(chr(0)) + 1} is NUL")
    return text


def _folder(root: Path, plain: str) -> dict[str, list[Path]]:
    kinds: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") for part in parts)
        if not hidden and path.is_file() and _suffix(path) in SUFFIXES:
            kinds.setdefault(parts[0] if len(parts) > 1 else plain, []).append(path)
    return kinds


def _suffix(path: Path) -> str:
    """The suffix, before that of a compression."""
    return (path.with_suffix("") if path.suffix in _OPENERS else path).suffix


def _place(path: PathLike, data: bytes, start: int) -> str:
    return f"{path}:{data.count(10, 0, start) + 1} (byte {start + 1})"


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
    check_text(f"{where}: 'input_text'", text)
    check_text(f"{where}: 'task_name'", task)
    return Document(text, task, where, whole=True)


def _json_problem(path: PathLike, error: ValueError | RecursionError, line: int) -> str:
    if isinstance(error, RecursionError):
        return f"{path}:{line}: not valid JSON: nested too deeply"
    if not isinstance(error, json.JSONDecodeError):  # a number of too many digits
        return f"{path}:{line}: not valid JSON: {error}"
    number = line + error.lineno - 1
    return f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})"
