# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Finding and loading models, and what is said when there is none."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from bsfa_calib import models
from bsfa_calib.models import ModelError, identity, load, locate


def test_a_directory_is_loaded_as_it_is(model_directory: Path) -> None:
    model, tokenizer = load(model_directory, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer("ab")["input_ids"][0] == 256
    assert identity(model_directory, model) == ("tiny-llama", "")


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_a_cpu_by_any_name_computes_in_float32(model_directory: Path, device: str) -> None:
    assert load(model_directory, device=device).model.dtype == torch.float32


@pytest.mark.parametrize("name", ["/no/such/model", "./none", "models.gguf", "a/b/c", "", "~/none"])
def test_a_path_without_a_model_is_refused_without_a_network(name: str) -> None:
    with pytest.raises(ModelError, match="there is no model at"):
        load(name)


def test_a_directory_name_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    with pytest.raises(ModelError, match="there is no model at 'models/tiny'"):
        locate("models/tiny")
    assert locate("owner/name") == ("owner/name", None)


def test_an_offline_hub_id_that_is_not_cached_is_refused() -> None:
    with pytest.raises(ModelError, match="the model owner/no-such-model cannot be loaded"):
        load("owner/no-such-model", offline=True)


@pytest.mark.parametrize("missing", [["gguf"], ["accelerate"], ["gguf", "accelerate"]])
def test_what_a_gguf_file_needs_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    there = models.find_spec
    monkeypatch.setattr(models, "find_spec", lambda n: None if n in missing else there(n))
    with pytest.raises(ImportError, match=rf"needs {' and '.join(missing)}, which .*\[capture\]"):
        load(path)


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "weights.bin"
    other.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"name a \.gguf file or a model directory"):
        locate(other)
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="not a GGUF file"):
        locate(fake)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds 0 \.gguf files and no config.json"):
        locate(tmp_path / "empty")


def test_a_truncated_gguf_file_is_refused(tmp_path: Path) -> None:
    fake = tmp_path / "cut.gguf"
    fake.write_bytes(b"GGUF\x03\0\0\0" + b"\x01" + b"\0" * 30)
    with pytest.raises(ModelError, match=r"cut\.gguf cannot be loaded"):
        load(fake)


def test_a_gguf_file_that_ends_in_its_header_is_refused(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    key = b"general.name"
    header = struct.pack("<4sIQQQ", b"GGUF", 3, 1, 1, len(key)) + key
    cut.write_bytes(header + struct.pack("<IQ", 8, 1000) + b"short")
    with pytest.raises(ModelError, match=r"cut\.gguf cannot be loaded"):
        load(cut)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused(model_directory: Path, device: str) -> None:
    with pytest.raises(ModelError, match="tiny-llama cannot be loaded"):
        load(model_directory, device=device)


def test_an_unknown_dtype_is_refused(model_directory: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of"):
        load(model_directory, dtype="int8")
