# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The version check must be able to fail."""

from __future__ import annotations

from pathlib import Path

import check_versions
import pytest

from conftest import write_package


def test_packages_that_fit_have_no_problems(tmp_path: Path) -> None:
    write_package(tmp_path, "kernel", "0.1.0")
    write_package(tmp_path, "hf", "0.3.0", "kernel>=0.1,<0.2", "torch>=2.9")
    assert check_versions.problems(tmp_path) == []


@pytest.mark.parametrize(
    ("version", "pin", "message"),
    [
        ("0.2.0", "kernel>=0.1,<0.2", "the tree has kernel 0.2.0"),
        ("0.1.0", "kernel", "without a range"),
    ],
)
def test_a_pin_that_the_tree_breaks_is_named(
    tmp_path: Path, version: str, pin: str, message: str
) -> None:
    write_package(tmp_path, "kernel", version)
    write_package(tmp_path, "hf", "0.3.0", pin)
    (problem,) = check_versions.problems(tmp_path)
    assert message in problem


def test_a_version_without_a_changelog_entry_is_named(tmp_path: Path) -> None:
    write_package(tmp_path, "kernel", "0.2.0", log="# Changes\n\n## 0.1.0\n")
    (problem,) = check_versions.problems(tmp_path)
    assert "## 0.2.0" in problem


def test_an_empty_tree_is_a_problem(tmp_path: Path) -> None:
    assert check_versions.problems(tmp_path)
