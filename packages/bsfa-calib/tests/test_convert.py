# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The paper's .pt files: converted where they are that, refused where they are not."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bsfa_calib import ThresholdFileError, ThresholdTable
from bsfa_calib.cli import main
from bsfa_calib.convert import load_pt
from bsfa_calib.thresholds import checksum_of


def paper_file(path: Path, **changes: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    content = {
        "thresholds": torch.randn(3, 2, 4, 6, generator=generator),
        "k_values": [64, 16, 32],
        "max_num_blocks": 6,
        "num_layers": 2,
        "num_heads": 4,
        "q_block_size": 128,
        "k_block_size": 64,
        "aggregation_method": "mean",
        **changes,
    }
    torch.save({key: value for key, value in content.items() if value is not ...}, path)
    return path


def test_a_paper_file_becomes_a_table_sorted_by_k(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = paper_file(tmp_path / "paper.pt")
    output = tmp_path / "table.safetensors"
    assert main(["convert", str(path), str(output), "--name", "llama"]) == 0
    assert "k = 16, 32, 64; 2 layers, 4 heads, 6 rows; geometry 128x64" in capsys.readouterr().out
    table = ThresholdTable.load(output)
    expected = torch.load(path, weights_only=True)["thresholds"].numpy()
    np.testing.assert_array_equal(table.select(k=64), expected[0])
    np.testing.assert_array_equal(table.select(k=16), expected[1])
    assert (table.geometry, table.rule, table.aggregate) == ("128x64", "absolute", "mean")
    assert (table.model, table.max_seqlen, table.samples) == ("llama", 768, 0)


def test_a_table_is_written_anew_with_a_checksum_and_the_same_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = Path(__file__).parent / "golden" / "v2.safetensors"
    path = tmp_path / "table.safetensors"
    path.write_bytes(old.read_bytes())
    assert main(["table", "convert", str(path), str(path)]) == 0
    assert "k = 16, 64; 2 layers, 3 heads, 4 rows" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert checksum_of(path) is not None
    table, before = ThresholdTable.load(path), ThresholdTable.load(old)
    assert table.thresholds.tobytes() == before.thresholds.tobytes()
    assert (table.model, table.provenance) == (before.model, before.provenance)
    assert main(["table", "convert", str(path), str(path), "--name", "llama"]) == 0
    assert ThresholdTable.load(path).model == "llama"


@pytest.mark.parametrize("name", ["a", "a.SAFETENSORS", "a.bin"])
def test_files_are_told_by_their_content(tmp_path: Path, name: str) -> None:
    output = str(tmp_path / "table.safetensors")
    path = tmp_path / name
    path.write_bytes((Path(__file__).parent / "golden" / "v2.safetensors").read_bytes())
    for command in (["info", str(path)], ["convert", str(path), output]):
        assert main(["table", *command]) == 0
    assert ThresholdTable.load(output).points == (16, 64)
    paper_file(path)
    for command in (["info", str(path)], ["convert", str(path), output, "--name", "llama"]):
        assert main(["table", *command]) == 0
    table = ThresholdTable.load(output)
    assert (table.points, table.model) == ((16, 32, 64), "llama")


def test_numbers_that_are_stored_negated_are_read_as_what_they_are(tmp_path: Path) -> None:
    negated: torch.Tensor = torch._neg_view(torch.randn(3, 2, 4, 6))
    table = load_pt(paper_file(tmp_path / "a.pt", thresholds=negated))
    np.testing.assert_array_equal(table.select(k=64), negated[0].resolve_neg().numpy())


def test_a_file_that_states_no_geometry_has_that_of_the_paper(tmp_path: Path) -> None:
    path = paper_file(tmp_path / "a.pt", q_block_size=..., k_block_size=..., num_layers=...)
    assert load_pt(path).geometry == "128x64"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholds": ...}, "it has no 'thresholds', only 'k_values'"),
        ({"thresholds": [1.0]}, "must be a dense tensor .*, got list"),
        ({"thresholds": torch.zeros(3, 2, 4, 6, dtype=torch.int32)}, "floating-point numbers"),
        ({"thresholds": torch.zeros(3, 2, 4)}, r"\[k_values, layers, heads, q_blocks\]"),
        ({"thresholds": torch.zeros(3, 2, 4, 6).to_sparse()}, "must be a dense tensor"),
        ({"thresholds": torch.full((3, 2, 4, 6), float("nan"))}, "must not be NaN"),
        ({"k_values": [1, 2]}, "lists 2 values, 'thresholds' holds 3"),
        ({"k_values": [1, 2, 2]}, "2 follows 2"),
        ({"k_values": [1, 2, "3"]}, "must be a list of integers"),
        ({"k_values": {1: 2}}, "must be a list of integers"),
        ({"num_heads": 8}, "'num_heads' is 8, but"),
        ({"q_block_size": "128"}, "'q_block_size' must be an integer from 1"),
        ({"q_block_size": None}, "'q_block_size' must be an integer from 1 to 1048576, got None"),
        ({"num_layers": torch.ones(2)}, "'num_layers' must be an integer"),
        ({"thresholds": torch.zeros(3, 2, 4, 6, device="meta")}, "must be a dense tensor"),
        ({"thresholds": torch.zeros(1).expand(3, 1000, 1000, 10**6)}, "it stores 4 bytes only"),
        ({"k_values": torch.ones(1, dtype=torch.int64).expand(10**12)}, "it stores 8 bytes only"),
    ],
)
def test_a_paper_file_with_another_layout_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ThresholdFileError, match=message):
        load_pt(paper_file(tmp_path / "a.pt", **changes))


def test_a_message_is_short_whatever_the_file_holds(tmp_path: Path) -> None:
    for changes in ({"q_block_size": "x" * 10**5}, {"thresholds": ..., "y" * 10**5: 1}):
        with pytest.raises(ThresholdFileError) as caught:
            load_pt(paper_file(tmp_path / "a.pt", **changes))
        assert len(str(caught.value)) < 400


def test_a_flipped_bit_in_a_paper_file_is_refused(tmp_path: Path) -> None:
    path = paper_file(tmp_path / "paper.pt")
    numbers = torch.load(path, weights_only=True)["thresholds"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(numbers) + 5] ^= 4
    path.write_bytes(content)
    with pytest.raises(ThresholdFileError, match=r"is damaged: its part '.*' has another CRC-32"):
        load_pt(path)


def test_a_file_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    path = paper_file(
        tmp_path / "a.pt", thresholds=torch.zeros(3, 100, 100, 10), num_layers=100, num_heads=100
    )
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(ThresholdFileError, match=r"it unpacks to \d+ bytes, more than it has"):
        load_pt(packed)
    assert load_pt(path).layers == 100


class Payload:
    """An object whose unpickling would run a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_paper_file_is_never_run(tmp_path: Path) -> None:
    target = tmp_path / "owned"
    torch.save({"thresholds": Payload(target)}, tmp_path / "evil.pt")
    with pytest.raises(ThresholdFileError, match="cannot be read as plain tensors"):
        load_pt(tmp_path / "evil.pt")
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02garbage", b"text"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(ThresholdFileError, match="not a threshold file of the paper"):
        load_pt(path)
    torch.save([1, 2], path)
    with pytest.raises(ThresholdFileError, match="must hold a dict, got list"):
        load_pt(path)
