# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""A release with a wrong tag, or with a wheel that runs nowhere else, is stopped."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
from release import LIBRARY, check_platform, manylinux_of, package_of

from conftest import write_package

ROOT = Path(__file__).resolve().parents[2]


def write_wheel(root: Path, tags: str, *names: str) -> Path:
    path = root / f"bsfa_kernel-0.1.0-{tags}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names or (LIBRARY,):
            archive.writestr(name, b"")
    return path


def test_a_tag_names_its_package(tmp_path: Path) -> None:
    write_package(tmp_path, "bsfa-calib", "0.2.0rc1")
    assert package_of("bsfa-calib-v0.2.0rc1", tmp_path) == "bsfa-calib"


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("v0.2.0", "must be PACKAGE-vVERSION"),
        ("bsfa-calib-v", "must be PACKAGE-vVERSION"),
        ("bsfa-calib-v0.2.0 --yes", "must be PACKAGE-vVERSION"),
        ("bsfa-other-v0.2.0", "must name one of bsfa-calib, it names 'bsfa-other'"),
        ("bsfa-calib-v0.2.1", "which is 0.2.0"),
        ("bsfa-calib-v0.2", "which is 0.2.0"),
    ],
)
def test_a_wrong_tag_is_refused(tmp_path: Path, tag: str, message: str) -> None:
    write_package(tmp_path, "bsfa-calib", "0.2.0")
    with pytest.raises(ValueError, match=re.escape(message)):
        package_of(tag, tmp_path)


def test_a_manylinux_wheel_passes_and_says_what_it_needs(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "py3-none-manylinux_2_27_x86_64.manylinux_2_28_x86_64")
    assert manylinux_of(wheel) == (2, 27)
    assert "glibc 2.27 and newer" in check_platform(wheel, (2, 28))
    assert "glibc 2.34" in check_platform(write_wheel(tmp_path, "py3-none-manylinux_2_34_x86_64"))


@pytest.mark.parametrize(
    ("tags", "names", "message"),
    [
        ("py3-none-linux_x86_64", (), "must be manylinux"),
        ("py3-none-manylinux_2_34_x86_64", (), "must run with glibc 2.28, it needs 2.34"),
        ("cp312-cp312-manylinux_2_28_x86_64", (), "must be py3-none"),
        (
            "py3-none-manylinux_2_28_x86_64",
            (LIBRARY, "bsfa_kernel.libs/libcudart-1.so.13"),
            "libcudart",
        ),
    ],
)
def test_a_wheel_that_the_index_or_an_old_system_would_refuse_is_refused(
    tmp_path: Path, tags: str, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_platform(write_wheel(tmp_path, tags, *names), (2, 28))


def test_releases_are_built_with_the_compiler_whose_kernels_were_reviewed() -> None:
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    image = re.search(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel-rockylinux8", workflow)
    resources = ROOT / "packages" / "bsfa-kernel" / "tests" / "resources.toml"
    reviewed = re.search(r'^nvcc = "(\d+\.\d+)\.', resources.read_text(), re.MULTILINE)
    assert image is not None
    assert reviewed is not None
    assert image[1] == reviewed[1]
