# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The threshold table and its file format (docs/threshold-format.md is normative)."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shlex
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from bsfa_calib._version import __version__
from bsfa_calib.point import AXES, Point, PointLike, PointOptions, as_point

if TYPE_CHECKING:
    from typing_extensions import Unpack

FloatArray = npt.NDArray[np.float32]

FORMAT_NAME = "bsfa-thresholds"
FORMAT_VERSION = 2
UNIT = "scaled-score"
RULES = ("absolute", "running_max", "peak_lse")
VOTERS = (1, 2, 4)
# Unless told otherwise, learned thresholds and scalars are made for this: why is in
# docs/performance-accuracy.md.
DEFAULT_VOTERS = 4
_REPLACED_RULE = "running_lse"

# No threshold table has a larger header: one with every field filled in takes a few kilobytes.
_MAX_HEADER_BYTES = 1 << 20
_STATISTIC_PREFIX = "statistics."
_CHECKSUM_KEY = "checksum"
_CHECKSUM_PREFIX = "sha256:"
_SHOWN_OF_CHECKSUM = len(_CHECKSUM_PREFIX) + 12
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class ThresholdFileError(ValueError):
    """A file is not a threshold table that this version can read; the message says what to do."""


@dataclass(frozen=True, eq=False)
class ThresholdTable:
    """Thresholds of one model for every operating point, layer, head and query-block position.

    Attributes:
        thresholds: float32 ``[points, layers, heads, rows]``, in units of scaled scores. Row i
            serves query block i, the last row every later one; one row is one scalar a head. −inf
            keeps everything, +inf the forced blocks only.
        points: the operating points, ascending: integers for axis ``"k"``, else floats.
        axis: what a point is: ``"k"`` (unforced blocks that a query block keeps on average),
            ``"target_sparsity"`` (share of blocks skipped) or ``"max_loss"``.
        q_block: queries in a sparsity block.
        k_block: keys in a sparsity block.
        rule: ``"absolute"``, ``"running_max"`` or ``"peak_lse"`` (docs/semantics.md).
        voters: one query row in 1, 2 or 4 votes; the thresholds hold for this number alone.
        model: name of the model that the thresholds belong to.
        revision: its revision, commit or checksum; may be empty.
        max_seqlen: tokens in the longest calibration sample.
        serve_seqlen: tokens in the longest sample that the points were found on, where these are
            others and longer; 0 if they are not.
        samples: number of calibration samples.
        aggregate: how the samples were combined, as ``"pooled"`` or ``"mean"``.
        provenance: anything else worth knowing: data, command, versions.
        statistics: what calibration measured, float32 ``[points, layers, heads]`` by name, NaN
            where there was nothing to measure: ``sparsity`` (share of visible blocks skipped on the
            calibration samples), ``kept`` (unforced blocks kept by a query block that has more than
            k of them) and the same with the prefix ``held_out_``.

    Raises:
        ValueError: a field breaks a rule; the message gives the rule and the value.
    """

    thresholds: FloatArray
    points: tuple[float | int, ...]
    axis: str = "k"
    q_block: int = 128
    k_block: int = 64
    rule: str = "absolute"
    voters: int = 1
    model: str = ""
    revision: str = ""
    max_seqlen: int = 0
    serve_seqlen: int = 0
    samples: int = 0
    aggregate: str = ""
    provenance: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, FloatArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field, and make the arrays read-only."""
        object.__setattr__(self, "points", _checked_points(self.points, self.axis))
        object.__setattr__(self, "provenance", dict(self.provenance))
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if type(self.voters) is not int or self.voters not in VOTERS:
            raise ValueError(f"voters must be one of {VOTERS}, got {self.voters!r}")
        for name in ("q_block", "k_block"):
            _check_count(name, getattr(self, name), 1)
        for name in ("max_seqlen", "serve_seqlen", "samples"):
            _check_count(name, getattr(self, name), 0)
        if 0 < self.serve_seqlen < self.max_seqlen:
            raise ValueError(
                f"serve_seqlen must be 0 or at least max_seqlen = {self.max_seqlen}, "
                f"got {self.serve_seqlen}"
            )
        for name in ("model", "revision", "aggregate"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a string, got {getattr(self, name)!r}")
        for key, value in self.provenance.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise ValueError(f"provenance must map strings to strings, got {key!r}: {value!r}")

        values = _read_only(self.thresholds)
        if values.ndim != 4 or 0 in values.shape:
            raise ValueError(
                "thresholds must have shape [points, layers, heads, rows], none of them 0, "
                f"got {list(values.shape)}"
            )
        if values.shape[0] != len(self.points):
            raise ValueError(
                f"thresholds hold {values.shape[0]} points, but {len(self.points)} are listed: "
                f"{_listed(self.points)}"
            )
        if np.isnan(values).any():
            where = [int(i) for i in np.argwhere(np.isnan(values))[0]]
            raise ValueError(f"thresholds must not be NaN, but that at {where} is")
        object.__setattr__(self, "thresholds", values)

        statistics = {}
        for name, array in self.statistics.items():
            statistic = _read_only(array)
            if statistic.shape != values.shape[:3]:
                raise ValueError(
                    f"statistic {name!r} must have shape [points, layers, heads] = "
                    f"{list(values.shape[:3])}, got {list(statistic.shape)}"
                )
            statistics[name] = statistic
        object.__setattr__(self, "statistics", statistics)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.thresholds.shape[1])

    @property
    def heads(self) -> int:
        """Number of query heads a layer."""
        return int(self.thresholds.shape[2])

    @property
    def rows(self) -> int:
        """Number of query-block positions; 1 is a scalar a head."""
        return int(self.thresholds.shape[3])

    @property
    def seqlen(self) -> int:
        """Tokens in the longest sample that the points were found on; 0: not known."""
        return self.serve_seqlen or self.max_seqlen

    @property
    def geometry(self) -> str:
        """The sparsity block, as ``"128x64"``."""
        return f"{self.q_block}x{self.k_block}"

    @property
    def k_values(self) -> tuple[int, ...]:
        """The k values that the table holds.

        Raises:
            ValueError: the points of this table are not k values.
        """
        if self.axis != "k":
            raise ValueError(f"this table has no k values, its points are {self._described()}")
        return cast("tuple[int, ...]", self.points)

    def select(self, point: PointLike | None = None, **named: Unpack[PointOptions]) -> FloatArray:
        """Thresholds of one operating point.

        Args:
            point: the point, or its text, as ``"target_sparsity=0.75"``.
            named: or the point by the name of its axis, as ``k=32``.

        Returns:
            float32 ``[layers, heads, rows]``, read-only.

        Raises:
            ValueError: not exactly one point was named, or the table does not hold it.
            TypeError: the point is not a number.
        """
        return cast("FloatArray", self.thresholds[self.index(point, **named)])

    def index(self, point: PointLike | None = None, **named: Unpack[PointOptions]) -> int:
        """Position of an operating point in ``points``; arguments and errors as for `select`."""
        chosen = as_point(point, **named)
        if chosen is None:
            raise ValueError(
                f"name one operating point of {' or '.join(AXES)}, got none; this table has "
                f"{self._described()}"
            )
        if chosen.axis == self.axis:
            value = chosen.value
            nearest = min(range(len(self.points)), key=lambda i: abs(self.points[i] - value))
            if math.isclose(self.points[nearest], value, rel_tol=1e-9, abs_tol=0.0):
                return nearest
        raise ValueError(f"this table has no {chosen}; its points are {self._described()}")

    def expected_sparsity(self, point: PointLike | None = None) -> float | None:
        """Share of the blocks that an operating point skips in the layers that can skip any.

        What was measured on held-out text counts first, then what calibration measured, then what
        was asked for. A measured value that is no share, within 0 to 1, is passed over.

        Args:
            point: the point, or its text; not needed if the table holds a single one.

        Returns:
            The share; None where the table says nothing of it.

        Raises:
            ValueError: the table does not hold the point.
        """
        index = 0 if point is None and len(self.points) == 1 else self.index(point)
        with contextlib.suppress(KeyError, ValueError, IndexError):
            share = float(self.provenance["expected_sparsity"].split(",")[index])
            if 0 <= share <= 1:
                return share
        able = ~np.isneginf(self.thresholds[index]).all(-1)
        for name in ("held_out_sparsity", "sparsity"):
            if name in self.statistics:
                values = self.statistics[name][index][able]
                values = values[~np.isnan(values)].astype(np.float64)
                if values.size and 0 <= (share := float(values.mean())) <= 1:
                    return share
        return float(self.points[index]) if self.axis == "target_sparsity" else None

    def head_slice(self, start: int, stop: int) -> ThresholdTable:
        """The table of heads ``start`` to ``stop - 1``, for a tensor-parallel rank.

        Raises:
            ValueError: the range is empty or reaches beyond the heads.
        """
        if not 0 <= start < stop <= self.heads:
            raise ValueError(
                f"heads {start}:{stop} must be a non-empty range within 0:{self.heads}"
            )
        return replace(
            self,
            thresholds=self.thresholds[:, :, start:stop],
            statistics={n: s[:, :, start:stop] for n, s in self.statistics.items()},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table; the file appears under its name only when it is complete.

        Raises:
            OSError: the file cannot be written.
            ValueError: the provenance is too long for a file that can be read.
        """
        from safetensors.numpy import save

        metadata = {
            "format": FORMAT_NAME,
            "version": "1",
            "unit": UNIT,
            "axis": self.axis,
            "points": json.dumps(list(self.points)),
            "block": self.geometry,
            "rule": self.rule,
            "model": self.model,
            "revision": self.revision,
            "max_seqlen": str(self.max_seqlen),
            "samples": str(self.samples),
            "aggregate": self.aggregate,
            "provenance": json.dumps(self.provenance, sort_keys=True),
            "created_by": f"bsfa-calib {__version__}",
        }
        if self.serve_seqlen:
            metadata["serve_seqlen"] = str(self.serve_seqlen)
        if self.voters > 1:
            # A reader of version 1 would let every row vote; where that is right it may read on.
            metadata |= {"version": str(FORMAT_VERSION), "voters": str(self.voters)}
        tensors = {"thresholds": np.ascontiguousarray(self.thresholds)}
        for name, statistic in self.statistics.items():
            tensors[_STATISTIC_PREFIX + name] = np.ascontiguousarray(statistic)
        metadata[_CHECKSUM_KEY] = checksum(metadata, sorted(tensors.items()))
        content = save(tensors, metadata=metadata)
        (header_size,) = struct.unpack("<Q", content[:8])
        if header_size > _MAX_HEADER_BYTES:
            raise ValueError(
                f"the metadata of a table must fit into {_MAX_HEADER_BYTES} bytes, got "
                f"{header_size}; shorten its provenance"
            )
        write_atomically(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ThresholdTable:
        """Read a table, and check its content against the checksum, if the file states one.

        Raises:
            FileNotFoundError: there is no such file.
            ThresholdFileError: the file is truncated, foreign, damaged or of a newer version.
        """
        with _reading(path) as name:
            return cls(**_fields(*_read_tensors(name)))

    def _described(self) -> str:
        return f"{self.axis} = {_listed(self.points)}"


def table_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Tables in the folders of a folder, sorted by name; what is hidden or no file is passed over.

    So are those that other systems leave beside a file, as ``._8k.safetensors``.
    """
    return [
        path
        for path in sorted(Path(folder).glob("*/*.safetensors"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def checksum(
    metadata: Mapping[str, str], tensors: Iterable[tuple[str, npt.NDArray[np.generic]]]
) -> str:
    """The checksum of what a safetensors file means; docs/threshold-format.md says how it is made.

    Args:
        metadata: of the file; a checksum among it is left out.
        tensors: names and arrays, in the order of the names' code points.

    Returns:
        ``sha256:`` and 64 hexadecimal digits.
    """
    digest = hashlib.sha256()

    def add_number(value: int) -> None:
        digest.update(struct.pack("<Q", value))

    def add_text(text: str) -> None:
        # JSON can hold half a surrogate pair, which is no text; it has to differ, not to crash.
        encoded = text.encode("utf-8", "surrogatepass")
        add_number(len(encoded))
        digest.update(encoded)

    entries = sorted(entry for entry in metadata.items() if entry[0] != _CHECKSUM_KEY)
    add_number(len(entries))
    for key, value in entries:
        add_text(key)
        add_text(value)
    for name, array in tensors:
        add_text(name)
        add_text(f"{array.dtype.kind.upper()}{8 * array.dtype.itemsize}")
        add_number(array.ndim)
        for extent in array.shape:
            add_number(extent)
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return _CHECKSUM_PREFIX + digest.hexdigest()


def checksum_of(path: str | os.PathLike[str]) -> str | None:
    """The checksum that a table's file states, after a check that it holds; None: it has none.

    Raises:
        FileNotFoundError: there is no such file.
        ThresholdFileError: the checksum does not hold, or the file is not a threshold table.
    """
    with _reading(path) as name:
        return _read_tensors(name)[0].get(_CHECKSUM_KEY)


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[str]:
    """The name of a file that is there; errors within get it, and those of values a remedy."""
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(f"there is no threshold file {name}")
    if not os.path.isfile(name):
        raise ThresholdFileError(f"{name} is not a file; name one .safetensors table")
    try:
        yield name
    except ThresholdFileError as error:
        raise ThresholdFileError(f"{name}: {error}") from None
    except ValueError as error:
        raise ThresholdFileError(f"{name}: {error}; make the file again") from None


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file under a temporary name in the same directory, then give it its name."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile: its files are for their owner alone, and a process's umask, which others'
    # are to follow, cannot be read without setting it, in all threads.
    temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _checked_points(points: Sequence[float | int], axis: str) -> tuple[float | int, ...]:
    """Points as a tuple of int (axis "k") or float, checked to be ascending and in range."""
    checked: list[float | int] = []
    for point in points:
        value = point.item() if isinstance(point, np.generic) else point
        try:
            checked.append(Point(axis, value).value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"points must be numbers on one axis: {error}") from None
    if not checked:
        raise ValueError("a table needs at least one point")
    for before, after in itertools.pairwise(checked):
        if after <= before:
            raise ValueError(f"points must ascend without repetition, but {after} follows {before}")
    return tuple(checked)


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _read_only(array: npt.ArrayLike) -> FloatArray:
    values = np.array(array, dtype=np.float32, copy=True)
    values.setflags(write=False)
    return values


def _listed(points: Sequence[float | int]) -> str:
    """Points for a message; runs of consecutive integers as ``4-64``."""
    parts: list[str] = []
    start = 0
    while start < len(points):
        stop = start
        while (
            stop + 1 < len(points)
            and isinstance(points[stop], int)
            and points[stop + 1] == points[stop] + 1
        ):
            stop += 1
        if stop - start >= 2:
            parts.append(f"{points[start]}-{points[stop]}")
        else:
            parts.extend(str(point) for point in points[start : stop + 1])
        start = stop + 1
    return ", ".join(parts)


def _read_tensors(name: str) -> tuple[dict[str, str], dict[str, FloatArray]]:
    """Metadata and float32 tensors of a safetensors file, with nothing taken on trust.

    The file is read here rather than by the safetensors library so that no number in the header is
    acted on before it has been checked against the size of the file.
    """
    size = os.path.getsize(name)
    with open(name, "rb") as file:
        start = file.read(8)
        # A header of 640 bytes begins like a pickle, but for the zeros of its length.
        if start.startswith(_PICKLE_STARTS) and any(start[2:]):
            raise ThresholdFileError(
                "this is a PyTorch file, not a threshold table; if it holds thresholds of the "
                "paper's repository, convert it with `bsfa-calibrate table convert`"
            )
        if len(start) < 8:
            raise ThresholdFileError(
                f"the file has {size} bytes, too few for a threshold table; get it again"
            )
        (header_size,) = struct.unpack("<Q", start)
        if header_size > _MAX_HEADER_BYTES:
            raise ThresholdFileError(
                "this is not a threshold table: it does not start as a safetensors file with a "
                f"header of at most {_MAX_HEADER_BYTES} bytes"
            )
        header_bytes = file.read(header_size)
        if len(header_bytes) < header_size:
            raise ThresholdFileError(
                "the file ends within its header: it is cut short, get it again"
            )
        metadata, entries = _parsed_header(header_bytes)
        data_size = size - 8 - header_size
        tensors = {}
        end = 0
        for tensor, (shape, (begin, stop)) in sorted(entries.items(), key=lambda e: e[1][1]):
            if begin != end or stop - begin != 4 * math.prod(shape):
                raise ThresholdFileError(
                    f"tensor {tensor!r} of shape {list(shape)} takes bytes {begin} to {stop}, "
                    "which does not fit: the header is damaged"
                )
            end = stop
            if end > data_size:
                raise ThresholdFileError(
                    f"tensor {tensor!r} ends at byte {end} of the data, but the file holds "
                    f"{data_size}: it is cut short, get it again"
                )
            data = file.read(stop - begin)
            tensors[tensor] = np.frombuffer(data, dtype="<f4").reshape(shape)
        if end != data_size:
            raise ThresholdFileError(
                f"the file holds {data_size} bytes of data, but its header speaks of {end}"
            )
    _check_sum(metadata, tensors)
    return metadata, tensors


def _check_sum(metadata: Mapping[str, str], tensors: Mapping[str, FloatArray]) -> None:
    """Refuse a file whose checksum is not that of its content; older ones state none.

    Raises:
        ThresholdFileError: it is not, or is no checksum.
    """
    stated = metadata.get(_CHECKSUM_KEY)
    if stated is None:
        return
    if not re.fullmatch(_CHECKSUM_PREFIX + "[0-9a-f]{64}", stated):
        raise ThresholdFileError(
            f"metadata {_CHECKSUM_KEY!r} must be '{_CHECKSUM_PREFIX}' and 64 hexadecimal digits, "
            f"got {stated!r:.80}; get the file again"
        )
    found = checksum(metadata, sorted(tensors.items()))
    if found != stated:
        raise ThresholdFileError(
            f"the file is damaged, or was changed by hand: its content has the checksum "
            f"{found[:_SHOWN_OF_CHECKSUM]}…, which must be {stated[:_SHOWN_OF_CHECKSUM]}…, as its "
            "metadata states; get it again"
        )


_Entry = tuple[tuple[int, ...], tuple[int, int]]


def _parsed_header(header: bytes) -> tuple[dict[str, str], dict[str, _Entry]]:
    """Metadata, and shape and byte range of each tensor, from a safetensors header."""
    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError):
        raise ThresholdFileError(
            "this is not a threshold table: its header is not that of a safetensors file"
        ) from None
    if not isinstance(parsed, dict):
        raise ThresholdFileError("this is not a threshold table: its header is not a JSON object")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT_NAME:
        raise ThresholdFileError(
            f"this safetensors file is not a threshold table: its metadata has no "
            f"format={FORMAT_NAME}"
        )
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ThresholdFileError(f"metadata {key!r} must be a string, got {value!r:.80}")
    _check_version(metadata.get("version", ""))
    return metadata, {name: _entry(name, entry) for name, entry in parsed.items()}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _check_version(version: str) -> None:
    if not version.isascii() or not version.isdigit() or len(version) > 9 or int(version) < 1:
        raise ThresholdFileError(f"version must be an integer of at least 1, got {version!r:.80}")
    if int(version) > FORMAT_VERSION:
        raise ThresholdFileError(
            f"the table has format version {version}, and this bsfa-calib reads up to "
            f"{FORMAT_VERSION}; install a newer one: pip install --upgrade bsfa-calib"
        )


def _entry(name: str, entry: object) -> _Entry:
    """Shape and byte range of a tensor, if the header gives it as float32 and in whole numbers."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ThresholdFileError(f"the header's entry for tensor {name!r:.80} is damaged")
    if entry["dtype"] != "F32":
        raise ThresholdFileError(
            f"tensor {name!r:.80} must have dtype F32, got {entry['dtype']!r:.80}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n < 1 << 48 for n in numbers
        ):
            raise ThresholdFileError(f"the header's entry for tensor {name!r:.80} is damaged")
    if len(shape) > 8 or len(offsets) != 2:
        raise ThresholdFileError(f"the header's entry for tensor {name!r:.80} is damaged")
    return tuple(shape), (offsets[0], offsets[1])


def _fields(metadata: Mapping[str, str], tensors: Mapping[str, FloatArray]) -> dict[str, Any]:
    """The arguments of ThresholdTable that a file's metadata and tensors stand for."""
    if "thresholds" not in tensors:
        raise ThresholdFileError("the file holds no tensor 'thresholds'; make it again")
    if metadata.get("unit") != UNIT:
        raise ThresholdFileError(
            f"unit must be {UNIT!r}, got {metadata.get('unit', '')!r:.80}; make the file again"
        )
    _refuse_replaced_rule(metadata)
    block = _required(metadata, "block").split("x")
    if len(block) != 2:
        raise ThresholdFileError(f"block must be as '128x64', got {metadata['block']!r:.80}")
    return {
        "thresholds": tensors["thresholds"],
        "points": _json(metadata, "points", list),
        "axis": _required(metadata, "axis"),
        "q_block": _integer("block", block[0]),
        "k_block": _integer("block", block[1]),
        "rule": _required(metadata, "rule"),
        "voters": _integer("voters", metadata.get("voters", "1")),
        "model": metadata.get("model", ""),
        "revision": metadata.get("revision", ""),
        "max_seqlen": _integer("max_seqlen", metadata.get("max_seqlen", "0")),
        "serve_seqlen": _integer("serve_seqlen", metadata.get("serve_seqlen", "0")),
        "samples": _integer("samples", metadata.get("samples", "0")),
        "aggregate": metadata.get("aggregate", ""),
        "provenance": _json(metadata, "provenance", dict) if "provenance" in metadata else {},
        "statistics": {
            name.removeprefix(_STATISTIC_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(_STATISTIC_PREFIX)
        },
    }


def _refuse_replaced_rule(metadata: Mapping[str, str]) -> None:
    """Refuse a table of the rule that peak_lse replaced, with the command that makes a new one.

    Raises:
        ThresholdFileError: it is one.
    """
    if metadata.get("rule") != _REPLACED_RULE:
        return
    model = metadata.get("model") or "MODEL"
    length, served = (metadata.get(key, "0") for key in ("max_seqlen", "serve_seqlen"))
    command = ["bsfa", "calibrate", "--model", model, "--text", "FOLDER"]
    command += ["--length", length] if length not in ("", "0") else []
    command += ["--serve-length", served] if served not in ("", "0") else []
    command += ["--out", "NEW.safetensors"]
    raise ThresholdFileError(
        f"this table was calibrated for the rule {_REPLACED_RULE}, which peak_lse has replaced; "
        f"thresholds cannot be carried over. Make a new table: {shlex.join(command)}"
    )


def _required(metadata: Mapping[str, str], key: str) -> str:
    if key not in metadata:
        raise ThresholdFileError(f"metadata {key!r} is missing; make the file again")
    return metadata[key]


def _integer(key: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise ThresholdFileError(f"metadata {key!r} must be a whole number, got {text!r:.80}")
    return int(text)


def _json(metadata: Mapping[str, str], key: str, kind: type) -> Any:
    text = _required(metadata, key)
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        wanted = "a JSON list" if kind is list else "a JSON object"
        raise ThresholdFileError(f"metadata {key!r} must be {wanted}, got {text!r:.80}")
    return value
