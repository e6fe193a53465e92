# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Packages are built after what they need, and tools are pinned once."""

from __future__ import annotations

from pathlib import Path

import pytest
from packages import build_order, hook_version, oldest_releases

from conftest import write_package

ROOT = Path(__file__).resolve().parents[2]


def test_a_package_comes_after_all_that_it_needs_and_nothing_else_is_built(tmp_path: Path) -> None:
    write_package(tmp_path, "a-patch", "1.0", "m-tables>=1", "k-kernel>=1", "torch>=2")
    write_package(tmp_path, "k-kernel", "1.0", "torch>=2")
    write_package(tmp_path, "m-tables", "1.0", "numpy")
    write_package(tmp_path, "z-server", "1.0", "m_tables[capture]>=1", "k-kernel")
    assert build_order(tmp_path, "z-server") == ["m-tables", "k-kernel", "z-server"]
    assert build_order(tmp_path) == ["m-tables", "k-kernel", "a-patch", "z-server"]


def test_extras_count(tmp_path: Path) -> None:
    write_package(tmp_path, "kernel", "1.0")
    write_package(tmp_path, "calib", "1.0")
    with (tmp_path / "calib" / "pyproject.toml").open("a") as file:
        file.write('[project.optional-dependencies]\ncapture = ["kernel>=1"]\n')
    assert build_order(tmp_path, "calib") == ["kernel", "calib"]


def test_the_oldest_release_is_the_highest_of_the_lower_bounds(tmp_path: Path) -> None:
    write_package(tmp_path, "calib", "1.0", "numpy>=1.9", "kernel>=1,<2", "Torch>=2.9", "gguf")
    write_package(tmp_path, "kernel", "1.0", "numpy>=1.24,<3", "torch>=2.10")
    assert oldest_releases(tmp_path) == {"numpy": "1.24", "torch": "2.10"}
    assert oldest_releases(ROOT / "packages").keys() >= {"accelerate", "gguf", "transformers"}


def test_a_circle_and_an_unknown_package_are_refused(tmp_path: Path) -> None:
    write_package(tmp_path, "a", "1.0", "b>=1")
    write_package(tmp_path, "b", "1.0", "a>=1")
    with pytest.raises(ValueError, match="a -> b -> a"):
        build_order(tmp_path)
    with pytest.raises(ValueError, match="one of a, b, got 'c'"):
        build_order(tmp_path, "c")


def test_the_packages_of_the_tree_have_an_order() -> None:
    order = build_order(ROOT / "packages")
    assert order.index("bsfa-kernel") < order.index("bsfa-calib") < order.index("bsfa-hf")


def test_tools_are_pinned_by_the_hooks(tmp_path: Path) -> None:
    configuration = ROOT / ".pre-commit-config.yaml"
    for repository in ("ruff-pre-commit", "mirrors-clang-format"):
        assert hook_version(configuration, repository).count(".") == 2
    unpinned = tmp_path / ".pre-commit-config.yaml"
    unpinned.write_text("repos:\n  - repo: https://example.org/ruff-pre-commit\n    rev: main\n")
    with pytest.raises(ValueError, match="must pin ruff-pre-commit"):
        hook_version(unpinned, "ruff-pre-commit")
