# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The table and its file format: what comes back, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bsfa_calib
from bsfa_calib import ThresholdFileError, ThresholdTable
from bsfa_calib.point import as_point
from bsfa_calib.thresholds import checksum_of, table_files, write_atomically
from make_golden import golden_table

GOLDEN = Path(__file__).parent / "golden"


def header_and_data(path: Path, *, with_checksum: bool = False) -> tuple[dict[str, Any], bytes]:
    """A file's parts, without its checksum, so that changes meet the other rules of the format."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    if not with_checksum:
        header["__metadata__"].pop("checksum", None)
    return header, content[8 + size :]


def write_raw(path: Path, header: Any, data: bytes) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    golden_table().save(path)
    return path


def assert_same(left: ThresholdTable, right: ThresholdTable) -> None:
    for name in ("points", "axis", "geometry", "rule", "voters", "model", "revision", "max_seqlen"):
        assert getattr(left, name) == getattr(right, name)
    for name in ("samples", "aggregate", "provenance"):
        assert getattr(left, name) == getattr(right, name)
    np.testing.assert_array_equal(left.thresholds, right.thresholds)
    assert left.statistics.keys() == right.statistics.keys()
    for name, statistic in left.statistics.items():
        np.testing.assert_array_equal(statistic, right.statistics[name])


@pytest.mark.parametrize("version", [1, 2])
def test_every_golden_version_is_read(version: int) -> None:
    table = golden_table(version)
    assert_same(ThresholdTable.load(GOLDEN / f"v{version}.safetensors"), table)
    assert table.voters == (1 if version == 1 else 4)


@pytest.mark.parametrize("version", [1, 2])
def test_the_current_writer_gives_the_golden_tensors_and_metadata(
    version: int, tmp_path: Path
) -> None:
    path = tmp_path / "new.safetensors"
    golden_table(version).save(path)
    header, data = header_and_data(path)
    expected_header, expected_data = header_and_data(GOLDEN / f"v{version}.safetensors")
    for each in (header, expected_header):
        each["__metadata__"].pop("created_by")  # which the checksum depends on
    assert header == expected_header
    assert data == expected_data


def test_the_safetensors_library_reads_the_same_tensors(good: Path) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(good)
    np.testing.assert_array_equal(tensors["thresholds"], golden_table().thresholds)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 4),
    axis=st.sampled_from(["k", "target_sparsity", "max_loss"]),
    texts=st.lists(st.text(max_size=20), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
)
def test_any_table_comes_back_as_it_was(
    shape: tuple[int, int, int, int], axis: str, texts: list[str], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    thresholds = generator.normal(size=shape).astype(np.float32)
    points = tuple(range(3, 3 + shape[0])) if axis == "k" else tuple(np.arange(shape[0]) / 7)
    table = ThresholdTable(
        thresholds, points, axis, model=texts[0], provenance={texts[1]: texts[2]}
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "new" / "table.safetensors"
        table.save(path)
        assert_same(ThresholdTable.load(path), table)
        assert [entry.name for entry in path.parent.iterdir()] == ["table.safetensors"]


def checksum_by_the_page(path: Path) -> str:
    """The checksum as docs/threshold-format.md says that it is made, from the bytes of a file."""
    header, data = header_and_data(path)

    def number(value: int) -> bytes:
        return value.to_bytes(8, "little")

    def text(value: str) -> bytes:
        return number(len(value.encode())) + value.encode()

    metadata = header.pop("__metadata__")
    content = number(len(metadata))
    for key in sorted(metadata, key=str.encode):
        content += text(key) + text(metadata[key])
    for name in sorted(header, key=str.encode):
        entry = header[name]
        content += text(name) + text(entry["dtype"]) + number(len(entry["shape"]))
        content += b"".join(map(number, entry["shape"]))
        content += data[slice(*entry["data_offsets"])]
    return "sha256:" + hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("version", [1, 2])
def test_every_table_is_written_with_its_checksum(version: int, tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    table = golden_table(version)
    dataclasses.replace(table, provenance={"ä": "🙂", "Z": "\0\n"}).save(path)
    header, _ = header_and_data(path, with_checksum=True)
    assert header["__metadata__"]["version"] == str(version)
    assert header["__metadata__"]["checksum"] == checksum_by_the_page(path) == checksum_of(path)


def test_the_golden_file_with_a_checksum_holds_it_and_older_ones_have_none() -> None:
    path = GOLDEN / "v2-checksum.safetensors"
    assert_same(ThresholdTable.load(path), golden_table(2))
    assert checksum_of(path) == checksum_by_the_page(path)
    assert [checksum_of(GOLDEN / f"v{version}.safetensors") for version in (1, 2)] == [None, None]


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0), bit=st.integers(0, 7), in_data=st.booleans())
def test_no_flipped_bit_gives_another_table(place: int, bit: int, in_data: bool) -> None:
    table = golden_table(2)
    content = bytearray((GOLDEN / "v2-checksum.safetensors").read_bytes())
    _, data = header_and_data(GOLDEN / "v2-checksum.safetensors")
    index = len(content) - 1 - place % len(data) if in_data else place % len(content)
    content[index] ^= 1 << bit
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "damaged.safetensors"
        path.write_bytes(content)
        try:
            found = ThresholdTable.load(path)
        except ThresholdFileError:
            return
        # The flip took the checksum's own name, and nothing else.
        assert not in_data
        assert checksum_of(path) is None
        assert_same(found, table)


def test_every_single_bit_of_a_small_tables_data_is_watched(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    ThresholdTable(np.full((1, 1, 2, 1), 0.5, np.float32), (4,)).save(path)
    content = path.read_bytes()
    for position in range(8 * 8):
        damaged = bytearray(content)
        damaged[len(content) - 8 + position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ThresholdFileError, match="the file is damaged, or was changed by hand"):
            ThresholdTable.load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("points", "[16, 65]"),
        ("rule", "absolute"),
        ("block", "64x64"),
        ("voters", "2"),
        ("axis", "max_loss"),
        ("max_seqlen", "513"),
        ("model", "example/tine"),
        ("provenance", "{}"),
        ("novelty", "new"),
        ("voters", None),
        ("version", "1"),
        ("model", "\ud800"),
    ],
)
def test_metadata_that_are_not_those_of_the_checksum_are_refused(
    tmp_path: Path, key: str, value: str | None
) -> None:
    path = tmp_path / "t.safetensors"
    golden_table(2).save(path)
    header, data = header_and_data(path, with_checksum=True)
    stated = header["__metadata__"]["checksum"]
    if value is None:
        del header["__metadata__"][key]
    else:
        header["__metadata__"][key] = value
    write_raw(path, header, data)
    with pytest.raises(ThresholdFileError) as caught:
        ThresholdTable.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: the file is damaged, or was changed by hand: its content")
    assert f"must be {stated[:19]}…, as its metadata states" in message
    if value != "\ud800":
        assert f"has the checksum {checksum_by_the_page(path)[:19]}…" in message


def test_names_and_shapes_of_tensors_are_part_of_the_checksum(good: Path) -> None:
    header, data = header_and_data(good, with_checksum=True)
    renamed = dict(header)
    renamed["statistics.spassity"] = renamed.pop("statistics.sparsity")
    reshaped = header | {"thresholds": header["thresholds"] | {"shape": [2, 3, 2, 4]}}
    for each in (renamed, reshaped):
        with pytest.raises(ThresholdFileError, match="has the checksum"):
            ThresholdTable.load(write_raw(good, each, data))


def test_the_order_of_a_file_is_no_part_of_the_checksum(good: Path) -> None:
    header, data = header_and_data(good, with_checksum=True)
    moved = {"__metadata__": dict(reversed(header.pop("__metadata__").items()))}
    ordered = b""
    for name, entry in sorted(header.items(), key=lambda e: e[1]["data_offsets"], reverse=True):
        start = len(ordered)
        ordered += data[slice(*entry["data_offsets"])]
        moved[name] = entry | {"data_offsets": [start, len(ordered)]}
    assert ordered != data
    write_raw(good, moved, ordered)
    assert_same(ThresholdTable.load(good), golden_table())


@pytest.mark.parametrize(
    "stated",
    ["", "sha256:", "0" * 64, f"sha256:{'0' * 63}", f"sha256:{'A' * 64}", f"sha256:{'0' * 64}\n"],
)
def test_what_is_no_checksum_is_refused(good: Path, stated: str) -> None:
    header, data = header_and_data(good)
    header["__metadata__"]["checksum"] = stated
    with pytest.raises(
        ThresholdFileError, match="must be 'sha256:' and 64 hexadecimal digits, got"
    ):
        ThresholdTable.load(write_raw(good, header, data))


def test_a_file_without_a_checksum_is_read_as_ever(good: Path) -> None:
    write_raw(good, *header_and_data(good))
    assert_same(ThresholdTable.load(good), golden_table())
    assert checksum_of(good) is None
    with pytest.raises(FileNotFoundError, match="there is no threshold file"):
        checksum_of(good.with_name("none.safetensors"))


@settings(max_examples=150, deadline=None)
@given(position=st.floats(0, 1), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_file_is_refused_or_read_but_never_crashes(
    position: float, value: int, cut: bool
) -> None:
    content = bytearray((GOLDEN / "v2-checksum.safetensors").read_bytes())
    index = int(position * (len(content) - 1))
    if cut:
        del content[index:]
    else:
        content[index] = value
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "damaged.safetensors"
        path.write_bytes(content)
        if cut:
            with pytest.raises(ThresholdFileError, match=r"damaged\.safetensors"):
                ThresholdTable.load(path)
        else:
            with contextlib.suppress(ThresholdFileError):
                ThresholdTable.load(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no threshold file"):
        ThresholdTable.load(tmp_path / "none.safetensors")


def test_a_directory_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ThresholdFileError, match="is not a file"):
        ThresholdTable.load(tmp_path)
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    with pytest.raises(ThresholdFileError, match="0 bytes, too few"):
        ThresholdTable.load(empty)


def test_a_newer_version_is_refused_with_advice(good: Path, tmp_path: Path) -> None:
    header, data = header_and_data(good)
    header["__metadata__"]["version"] = "3"
    path = write_raw(tmp_path / "newer.safetensors", header, data)
    with pytest.raises(ThresholdFileError, match=r"version 3, .*pip install --upgrade bsfa-calib"):
        ThresholdTable.load(path)


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "paper.pt"
    torch.save({"thresholds": torch.zeros(1)}, path)
    with pytest.raises(ThresholdFileError, match="bsfa-calibrate table convert"):
        ThresholdTable.load(path)


@pytest.mark.parametrize("size", [640, 896, 1152, 1408])
def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "table.safetensors"
    for length in range(size):
        table = ThresholdTable(np.zeros((1, 1, 1, 1), np.float32), (4,), model="m" * length)
        table.save(path)
        (found,) = struct.unpack("<Q", path.read_bytes()[:8])
        if found == size:
            break
    assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    assert ThresholdTable.load(path).model == table.model


def test_tensors_of_another_origin_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "weights.safetensors"
    save_file({"thresholds": np.zeros((1, 1, 1, 1), np.float32)}, path)
    with pytest.raises(ThresholdFileError, match="no format=bsfa-thresholds"):
        ThresholdTable.load(path)


@pytest.mark.parametrize("size", [2**63, 2**40, 2**20 + 1])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b"{}")
    with pytest.raises(ThresholdFileError, match="header of at most"):
        ThresholdTable.load(path)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"nonsense", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 2}', b"{}", b"3", b"null"],
    ids=["list", "text", "bytes", "nested", "twice", "empty", "number", "null"],
)
def test_a_foreign_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path = write_raw(tmp_path / "foreign.safetensors", header, b"")
    with pytest.raises(ThresholdFileError, match="not a threshold table"):
        ThresholdTable.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F64"}, "must have dtype F32"),
        ({"dtype": "I32"}, "must have dtype F32"),
        ({"shape": [2**40, 2**40, 1, 1]}, "does not fit"),
        ({"shape": [2, 2, 3, 5]}, "does not fit"),
        ({"shape": [-2, -2, 3, 4]}, "is damaged"),
        ({"shape": [2, 2, 3, 4.0]}, "is damaged"),
        ({"shape": [True, 2, 2, 12]}, "is damaged"),
        ({"shape": [1] * 60 + [2, 2, 3, 4]}, "is damaged"),
        ({"shape": [2**60]}, "is damaged"),
        ({"shape": "2234"}, "is damaged"),
        ({"shape": [4, 3, 4]}, "points, layers, heads, rows"),
        ({"data_offsets": [0, 2**40]}, "does not fit"),
        ({"data_offsets": [8, 200]}, "does not fit"),
        ({"data_offsets": [192, 0]}, "does not fit"),
        ({"data_offsets": [0]}, "is damaged"),
        ({"extra": 1}, "is damaged"),
    ],
)
def test_an_absurd_tensor_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "one.safetensors"
    ThresholdTable(golden_table().thresholds[:, :, :, :], (16, 64)).save(path)
    header, data = header_and_data(path)
    header["thresholds"] |= change
    with pytest.raises(ThresholdFileError, match=message):
        ThresholdTable.load(write_raw(path, header, data))


def test_tensors_that_overlap_are_refused(good: Path) -> None:
    header, data = header_and_data(good)
    header["statistics.sparsity"]["data_offsets"] = header["thresholds"]["data_offsets"]
    with pytest.raises(ThresholdFileError, match="does not fit"):
        ThresholdTable.load(write_raw(good, header, data))


def test_bytes_that_no_tensor_owns_are_refused(good: Path) -> None:
    header, data = header_and_data(good)
    with pytest.raises(ThresholdFileError, match="but its header speaks of"):
        ThresholdTable.load(write_raw(good, header, data + b"more"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": "[16]"}, "hold 2 points, but 1 are listed"),
        ({"points": "[16, 16]"}, "16 follows 16"),
        ({"points": "[64, 16]"}, "16 follows 64"),
        ({"points": "[0, 16]"}, "at least 1, got 0"),
        ({"points": "[16, 1e999]"}, "at least 1, got inf"),
        ({"points": "[16, 64.5]"}, "must be an integer"),
        ({"points": "[16, NaN]"}, "at least 1, got nan"),
        ({"points": '[16, "64"]'}, "must be a number"),
        ({"points": "[16, true]"}, "must be a number"),
        ({"points": "{}"}, "'points' must be a JSON list"),
        ({"points": "[" * 100_000}, "'points' must be a JSON list"),
        ({"points": "[" + "9" * 5000 + "]"}, "points"),
        ({"points": "[16, " + "9" * 400 + "]"}, "points"),
        ({"axis": "target_sparsity"}, r"must be in \[0, 1\), got 16"),
        ({"axis": "depth"}, "axis must be one of"),
        ({"rule": "always"}, "rule must be one of"),
        ({"unit": "probability"}, "unit must be 'scaled-score'"),
        ({"block": "128"}, "as '128x64'"),
        ({"block": "128x0"}, "k_block must be an integer of at least 1"),
        ({"block": "128x-64"}, "whole number"),
        ({"block": "9" * 20 + "x64"}, "whole number"),
        ({"samples": "many"}, "'samples' must be a whole number"),
        ({"provenance": "[]"}, "'provenance' must be a JSON object"),
        ({"provenance": '{"a": 1}'}, "provenance must map strings to strings"),
        ({"version": "one"}, "version must be an integer"),
        ({"version": ""}, "version must be an integer"),
        ({"version": "0"}, "version must be an integer"),
        ({"model": 3}, "must be a string"),
    ],
)
def test_inconsistent_metadata_is_refused(good: Path, change: dict[str, Any], message: str) -> None:
    header, data = header_and_data(good)
    header["__metadata__"] |= change
    with pytest.raises(ThresholdFileError, match=message):
        ThresholdTable.load(write_raw(good, header, data))


@pytest.mark.parametrize("key", ["points", "axis", "block", "rule", "unit", "version"])
def test_missing_metadata_is_refused(good: Path, key: str) -> None:
    header, data = header_and_data(good)
    del header["__metadata__"][key]
    with pytest.raises(ThresholdFileError, match=key):
        ThresholdTable.load(write_raw(good, header, data))


def test_unknown_metadata_and_tensors_are_passed_over(good: Path) -> None:
    header, data = header_and_data(good)
    header["__metadata__"]["novelty"] = "yes"
    end = len(data)
    header["novelty"] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    assert_same(ThresholdTable.load(write_raw(good, header, data + b"\0" * 4)), golden_table())


def test_nan_in_a_file_is_refused(good: Path) -> None:
    header, data = header_and_data(good)
    start = header["thresholds"]["data_offsets"][0] + 4 * 5
    data = data[:start] + struct.pack("<f", float("nan")) + data[start + 4 :]
    with pytest.raises(ThresholdFileError, match=r"NaN, but that at \[0, 0, 1, 1\] is"):
        ThresholdTable.load(write_raw(good, header, data))


def test_of_points_a_rounding_error_apart_the_nearest_is_selected() -> None:
    points = (0.1 + 0.2, np.nextafter(0.1 + 0.2, 1.0).item(), 0.75)
    values = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1)
    table = ThresholdTable(thresholds=values, points=points, axis="target_sparsity")
    assert [table.index(target_sparsity=point) for point in points] == [0, 1, 2]
    assert table.index(target_sparsity=0.3) == 0
    assert table.index(target_sparsity=0.75 + 1e-12) == 2


def test_selecting_gives_the_thresholds_of_a_point() -> None:
    table = golden_table()
    np.testing.assert_array_equal(table.select(k=64), table.thresholds[1])
    assert not table.select(k=64).flags.writeable
    sparse = ThresholdTable(np.zeros((2, 1, 1, 1)), (0.5, 0.7), "target_sparsity")
    assert sparse.select(target_sparsity=0.7).shape == (1, 1, 1)


def test_an_unknown_point_is_refused_with_those_there_are() -> None:
    table = ThresholdTable(np.zeros((61, 1, 1, 1)), tuple(range(4, 65)))
    with pytest.raises(ValueError, match="no k=3; its points are k = 4-64"):
        table.select(k=3)
    with pytest.raises(ValueError, match=r"no target_sparsity=0\.5; its points are k = 4-64"):
        table.select(target_sparsity=0.5)
    with pytest.raises(ValueError, match="name one operating point"):
        table.select()
    with pytest.raises(ValueError, match="name one operating point"):
        table.select(k=4, max_loss=0.1)
    for other in (8, ["k", 8]):
        with pytest.raises(TypeError, match="a point is a Point or its text, got"):
            as_point(other)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="k must be a number, got '4'"):
        table.select(k="4")  # type: ignore[arg-type]
    sparse = ThresholdTable(np.zeros((2, 1, 1, 1)), (0.5, 0.7), "target_sparsity")
    with pytest.raises(ValueError, match=r"no k values, its points are target_sparsity = 0.5, 0.7"):
        _ = sparse.k_values


def test_a_head_slice_holds_the_heads_of_a_rank() -> None:
    table = golden_table()
    part = table.head_slice(1, 3)
    np.testing.assert_array_equal(part.thresholds, table.thresholds[:, :, 1:3])
    np.testing.assert_array_equal(
        part.statistics["sparsity"], table.statistics["sparsity"][:, :, 1:3]
    )
    for start, stop in ((0, 4), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="non-empty range within 0:3"):
            table.head_slice(start, stop)


def test_the_table_keeps_its_own_read_only_copy() -> None:
    values = np.zeros((1, 1, 1, 1), np.float32)
    table = ThresholdTable(values, (4,))
    values[:] = 1
    assert table.thresholds.max() == 0
    with pytest.raises(ValueError, match="read-only"):
        table.thresholds[:] = 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"thresholds": np.zeros((1, 1, 1, 0))}, "none of them 0"),
        ({"thresholds": np.zeros((1, 1, 1))}, "points, layers, heads, rows"),
        ({"thresholds": np.full((1, 1, 1, 1), np.nan)}, "must not be NaN"),
        ({"points": ()}, "at least one point"),
        ({"rule": "none"}, "rule must be one of"),
        ({"q_block": 0}, "q_block must be an integer of at least 1"),
        ({"q_block": 128.0}, "q_block must be an integer"),
        ({"samples": -1}, "samples must be an integer of at least 0"),
        ({"model": None}, "model must be a string"),
        ({"statistics": {"sparsity": np.zeros(3)}}, "statistic 'sparsity' must have shape"),
    ],
)
def test_a_table_checks_its_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThresholdTable(**{"thresholds": np.zeros((1, 1, 1, 1)), "points": (4,), **fields})


def test_an_interrupted_save_leaves_the_old_file(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        ThresholdTable(np.zeros((1, 1, 1, 1)), (4,)).save(good)
    assert_same(ThresholdTable.load(good), golden_table())
    assert [path.name for path in good.parent.iterdir()] == [good.name]


def test_what_could_not_be_read_again_is_not_written(good: Path) -> None:
    table = ThresholdTable(np.zeros((1, 1, 1, 1)), (4,), provenance={"data": "a" * (1 << 20)})
    with pytest.raises(ValueError, match=r"must fit into 1048576 bytes, got \d+; shorten its prov"):
        table.save(good)
    assert_same(ThresholdTable.load(good), golden_table())


def test_the_version_is_that_of_the_installed_package() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'\nversion = "{bsfa_calib.__version__}"\n' in pyproject


def test_tables_of_a_folder_are_found_and_what_other_systems_leave_is_not(tmp_path: Path) -> None:
    for name in ("b/8k.safetensors", "a/4k.safetensors", "a/._4k.safetensors", ".c/x.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "notes.txt").write_text("")
    (tmp_path / "a" / "folder.safetensors").mkdir()
    (tmp_path / "a" / "nowhere.safetensors").symlink_to("none")
    found = [str(path.relative_to(tmp_path)) for path in table_files(tmp_path)]
    assert found == ["a/4k.safetensors", "b/8k.safetensors"]


def test_a_table_of_the_rule_that_was_replaced_names_the_command_that_makes_a_new_one(
    good: Path,
) -> None:
    header, data = header_and_data(good)
    header["__metadata__"] |= {"rule": "running_lse", "block": "64x64", "max_seqlen": "4096"}
    write_raw(good, header, data)
    with pytest.raises(ThresholdFileError) as caught:
        ThresholdTable.load(good)
    message = str(caught.value)
    assert message.startswith(f"{good}: this table was calibrated for the rule running_lse, which")
    command = (
        "bsfa calibrate --model example/tiny --text FOLDER --length 4096 --out NEW.safetensors"
    )
    assert message.endswith(command)


@pytest.mark.parametrize("voters", [0, 3, 8, 2.0, True, "2"])
def test_a_number_of_voters_that_no_kernel_has_is_refused(voters: Any) -> None:
    with pytest.raises(ValueError, match=rf"voters must be one of \(1, 2, 4\), got {voters!r}"):
        ThresholdTable(np.zeros((1, 1, 1, 1), np.float32), (4,), voters=voters)


def test_voters_in_a_file_must_be_a_known_number(tmp_path: Path) -> None:
    path = tmp_path / "four.safetensors"
    golden_table(2).save(path)
    header, data = header_and_data(path)
    header["__metadata__"]["voters"] = "3"
    with pytest.raises(ThresholdFileError, match=r"voters must be one of \(1, 2, 4\), got 3"):
        ThresholdTable.load(write_raw(path, header, data))


def test_a_table_knows_what_each_point_is_expected_to_skip() -> None:
    values = np.zeros((2, 2, 2, 1), np.float32)
    values[:, 0] = -np.inf  # runs dense
    named = {"axis": "target_sparsity"}
    plain = ThresholdTable(values, (0.5, 0.75), **named)
    assert plain.expected_sparsity("target_sparsity=0.75") == 0.75
    measured = ThresholdTable(
        values, (0.5, 0.75), **named, provenance={"expected_sparsity": "0.49, 0.74"}
    )
    assert measured.expected_sparsity("target_sparsity=0.5") == 0.49
    share = np.array([[[0, 0], [0.2, 0.4]], [[0, 0], [0.1, 0.1]]], np.float32)
    blocks = ThresholdTable(values, (4, 8), statistics={"sparsity": share})
    assert blocks.expected_sparsity("k=4") == pytest.approx(0.3)
    for unusable in (np.nan, np.inf, -0.1, 1.5):
        held_out = np.full_like(share, unusable)
        both = {"held_out_sparsity": held_out, "sparsity": share}
        known = ThresholdTable(values, (4, 8), statistics=both)
        assert known.expected_sparsity("k=4") == pytest.approx(0.3)
        neither = ThresholdTable(values, (4, 8), statistics={"sparsity": held_out})
        assert neither.expected_sparsity("k=4") is None
    assert ThresholdTable(values, (4, 8)).expected_sparsity("k=8") is None
    assert ThresholdTable(values[:1], (0.5,), **named).expected_sparsity() == 0.5
    with pytest.raises(ValueError, match="has no k=5"):
        blocks.expected_sparsity("k=5")


def test_files_follow_the_umask_which_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")
            write_atomically(tmp_path / "folder" / "a.json", b"old")
            write_atomically(tmp_path / "folder" / "a.json", b"new")
    finally:
        os.umask(before)
    (path,) = (tmp_path / "folder").iterdir()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_replaced_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match=r"a\.json"):
        write_atomically(tmp_path / "a.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
