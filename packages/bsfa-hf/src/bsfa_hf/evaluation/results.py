# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The file of results: a record for each sample and configuration, found again on resuming."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bsfa_calib.thresholds import write_atomically

FORMAT = "bsfa-evaluation"
VERSION = 1

Record = dict[str, Any]

# The file is written anew each time, so not after every record of a fast run.
_SECONDS_BETWEEN_WRITES = 5.0
# By how much two searches on one text may differ, in units of scaled scores.
SAME_THRESHOLD = 0.02

# The fields that a file must have, and their types.
_NUMBER = (float, int)
_HEADER: dict[str, tuple[type, ...]] = dict.fromkeys(
    ("model", "configurations", "environment"), (dict,)
)
_CONFIGURATION: dict[str, tuple[type, ...]] = dict.fromkeys(("name", "kind"), (str,))
_RECORD: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("task", "sample", "kind", "configuration"), (str,)),
    **dict.fromkeys(("sparsity", "seconds"), _NUMBER),
    "length": (int,),
    "skipped": (list,),
}
_FIGURES: dict[str, dict[str, tuple[type, ...]]] = {
    "text": {"bands": (list,)},
    "needle": {
        "keys": (int,),
        "hit": (bool,),
        **dict.fromkeys(("depth", "log_probability"), _NUMBER),
    },
}
_SCORE: dict[str, tuple[type, ...]] = {"score": (float, int, type(None))}
_BAND: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("start", "stop", "positions"), (int,)),
    **dict.fromkeys(("kl", "nll", "agreement"), _NUMBER),
}


# Fields that some records and headers have.
_OPTIONAL: dict[str, dict[str, tuple[type, ...]]] = {
    "header": {"texts": (dict,)},
    "configuration": {"thresholds": (dict,)},
    "record": {"dense_seconds": _NUMBER, "text": (str,), "keys": (int,)},
}


class ResultsError(ValueError):
    """A file does not hold the results of this evaluation; the message says why."""


class NotFiniteError(ResultsError):
    """A figure of a record is not a number or infinite; the message says which."""


class Results:
    """Records by task, length, text, sample and configuration.

    Attributes:
        path: where they are written.
        header: what holds for the whole file: model, configurations, texts, environment.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Open a file of results, or begin one.

        Args:
            path: of the file.
            header: must have "model", a description of the model.

        Raises:
            ResultsError: the file is damaged, foreign, or of another model or device.
        """
        self.path = path
        self.header = dict(header)
        self._records: dict[str, Record] = {}
        self._written = time.monotonic()
        if path.exists():
            found = load(path)
            self.header = joined(
                found["header"], path, self.header, "this run", "name another file with --out"
            )
            self._records = {record_key(record): record for record in found["records"]}

    def __contains__(self, key: str) -> bool:
        return key in self._records

    @property
    def records(self) -> list[Record]:
        """All records, in the order in which they came."""
        return list(self._records.values())

    def add(self, record: Record) -> None:
        """Add a record; the file has it after a few seconds, or after ``write``."""
        self._records[record_key(record)] = record
        if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
            self.write()

    def merge(self, path: Path) -> None:
        """Add the records of another file, and write.

        Raises:
            ResultsError: that file is damaged, foreign, or of another model or device.
        """
        other = load(path)
        self.header = joined(self.header, self.path, other["header"], path, "keep them apart")
        self._records.update({record_key(record): record for record in other["records"]})
        self.write()

    def write(self) -> None:
        """Write the file; it is whole at every moment.

        Raises:
            OSError: it cannot be written.
        """
        content = {
            "format": FORMAT,
            "version": VERSION,
            "header": self.header,
            "records": self.records,
        }
        write_atomically(self.path, json.dumps(content, allow_nan=False).encode())
        self._written = time.monotonic()


def check_finite(value: object, name: str = "") -> None:
    """Refuse a record with a number that is not finite.

    Raises:
        NotFiniteError: there is one.
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            check_finite(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            check_finite(part, f"{name}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise NotFiniteError(f"{name} must be finite, got {value}")


def record_key(record: Mapping[str, Any]) -> str:
    """What a record is of: task, length, text, sample and the digest of a configuration."""
    known = [str(record[part]) for part in ("task", "length", "sample", "configuration")]
    return "|".join([*known, str(record.get("text", ""))])


def joined(
    first: Mapping[str, Any], first_name: object, other: Mapping[str, Any], name: object, hint: str
) -> dict[str, Any]:
    """One header for two: configurations, texts and versions of packages of both.

    Args:
        first: a header.
        first_name: what messages call it.
        other: a header.
        name: what messages call it.
        hint: what to do instead, for messages.

    Raises:
        ResultsError: they are of different models or devices, or have different thresholds for one
            configuration.
    """
    made_with: list[dict[str, str]] = [
        dict(header.get("environment", {})) for header in (first, other)
    ]
    of = {
        "model": (first["model"], other["model"]),
        "device": tuple(environment.get("device") for environment in made_with),
    }
    for what, (one, two) in of.items():
        if one != two:
            raise ResultsError(
                f"results in one file must be of one {what}: {first_name} is of another {what} "
                f"than {name}, {one} and {two}; {hint}"
            )
    configurations = dict(first.get("configurations", {}))
    for digest, about in other.get("configurations", {}).items():
        known = configurations.get(digest, {})
        found, new = known.get("thresholds", {}), about.get("thresholds", {})
        for length in found.keys() & new.keys():
            if abs(found[length] - new[length]) > SAME_THRESHOLD:
                raise ResultsError(
                    f"{about['name']} must have one threshold at {length} tokens: {first_name} has "
                    f"{found[length]:g}, and {name} has {new[length]:g}; {hint}"
                )
        configurations[digest] = {**known, **about}
        if found or new:
            configurations[digest]["thresholds"] = {**new, **found}
    old, environment = made_with
    for key, value in old.items():
        values = [*value.split(", "), *environment.get(key, value).split(", ")]
        environment[key] = ", ".join(dict.fromkeys(values))
    return {
        **first,
        **other,
        "configurations": configurations,
        "texts": {**first.get("texts", {}), **other.get("texts", {})},
        "environment": environment,
    }


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of results: a dict with "header" and "records".

    Raises:
        FileNotFoundError: there is none.
        ResultsError: it is damaged, foreign or newer.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path} is not a file of results: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ResultsError(f"{path} is not a file of results: it has no format {FORMAT!r}")
    if not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise ResultsError(
            f"{path} has version {content.get('version')!r}, and this reads up to {VERSION}; "
            "install a newer bsfa-hf"
        )
    records, header = content.get("records"), content.get("header")
    if not isinstance(records, list) or not isinstance(header, dict):
        raise ResultsError(f"{path} has no list of records or no header; make it again")
    try:
        _check_fields("header", header, _HEADER)
        _check_values("environment", header["environment"], (str,))
        _check_values("texts", header.get("texts", {}), (str,))
        for about in header["configurations"].values():
            _check_fields("configuration", about, _CONFIGURATION)
            _check_values("thresholds", about.get("thresholds", {}), _NUMBER)
        for record in records:
            _check_fields("record", record, _RECORD)
            _check_fields("record", record, _FIGURES.get(record["task"], _SCORE))
            for band in record.get("bands", []):
                _check_fields("band", band, _BAND)
            if record["task"] == "text" and sum(b["positions"] for b in record["bands"]) < 1:
                raise ValueError("bands of a record must have positions, and have none")
        check_finite(content)
    except ValueError as error:
        raise ResultsError(f"{path} is damaged: {error}") from error
    return content


def _check_fields(what: str, part: object, fields: Mapping[str, tuple[type, ...]]) -> None:
    if not isinstance(part, dict):
        raise ValueError(f"a {what} must be an object, got {part!r:.100}")
    optional = {n: types for n, types in _OPTIONAL.get(what, {}).items() if n in part}
    for name, types in {**optional, **fields}.items():
        if name not in part or not isinstance(part[name], types):
            found = f"got {part[name]!r:.100}" if name in part else "and it is missing"
            names = " or ".join(each.__name__ for each in types)
            raise ValueError(f"{name} of a {what} must be {names}, {found}")


def _check_values(what: str, part: Mapping[str, object], types: tuple[type, ...]) -> None:
    for name, value in part.items():
        if not isinstance(value, types):
            names = " or ".join(each.__name__ for each in types)
            raise ValueError(f"{name} of {what} must be {names}, got {value!r:.100}")
