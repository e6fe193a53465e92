# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What an installation says of itself."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

import bsfa_kernel
from bsfa_kernel import Geometry, Kernel, _native

DESCRIPTION = {
    "version": "1.2.3",
    "abi_version": 1,
    "cuda": "13.0",
    "kernels": [
        {
            "name": "forward",
            "arch": arch,
            "ptx": arch == 80,
            "dtype": "bfloat16",
            "head_dim": 128,
            "head_dims": [96, 128],
            "geometries": ["128x64", "64x64"],
        }
        for arch in (80, 90)
    ],
}


def described_as(monkeypatch, text: str) -> bsfa_kernel.BuildInfo:
    monkeypatch.setattr(_native, "build_info_json", lambda: text)
    monkeypatch.setattr(_native, "version", lambda: "1.2.3")
    return bsfa_kernel.build_info()


def test_build_info_tells_what_the_library_tells(monkeypatch):
    info = described_as(monkeypatch, json.dumps(DESCRIPTION))
    assert info.available
    assert info.reason == ""
    assert (info.library_version, info.cuda) == ("1.2.3", "13.0")
    assert info.kernels[1] == Kernel(
        "forward", 90, False, "bfloat16", 128, (Geometry(128, 64), Geometry(64, 64)), (96, 128)
    )
    assert (info.architectures, info.dtypes) == ((80, 90), ("bfloat16",))
    assert info.head_dims == (96, 128)
    words = str(info)
    assert (
        "forward: sm_80 and later, by PTX, bfloat16, head_dim 96 to 128, 128x64 and 64x64" in words
    )
    assert "CUDA 13.0" in words


def test_a_library_without_kernels_is_said_in_words(monkeypatch):
    without = {**DESCRIPTION, "cuda": None, "kernels": []}
    info = described_as(monkeypatch, json.dumps(without))
    assert info.available
    assert info.architectures == ()
    assert "CUDA tensors: not possible" in str(info)
    assert "built without CUDA" in str(info)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kernels": [{}]}', '{"kernels": [{"geometries": 1}]}']
)
def test_a_library_that_describes_itself_badly_is_not_available(monkeypatch, text):
    info = described_as(monkeypatch, text)
    assert not info.available
    assert "does not describe its build as expected" in info.reason


def test_the_version_has_one_source():
    try:
        expected = metadata.version("bsfa-kernel")
    except metadata.PackageNotFoundError:
        expected = "0+unknown"
    assert bsfa_kernel.__version__ == bsfa_kernel.build_info().version == expected


def test_the_package_says_that_it_is_typed():
    assert (Path(bsfa_kernel.__file__).parent / "py.typed").is_file()


def test_all_public_names_exist():
    assert all(hasattr(bsfa_kernel, name) for name in bsfa_kernel.__all__)
