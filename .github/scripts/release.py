# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What a release must satisfy: its tag names a package at its version, its wheel runs elsewhere."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from packages import read_projects
from packaging.utils import parse_wheel_filename

LIBRARY = "bsfa_kernel/lib/libbsfa.so"


def package_of(tag: str, packages: Path) -> str:
    """The package that a tag such as ``bsfa-calib-v0.1.0`` releases.

    Raises:
        ValueError: the tag has another form, names no package, or names another version than the
            package's ``pyproject.toml``.
    """
    parts = re.fullmatch(r"([a-z0-9-]+)-v(\d+(?:\.\w+)*)", tag)
    if parts is None:
        raise ValueError(f"a release tag must be PACKAGE-vVERSION, got {tag!r}")
    name, version = parts.groups()
    projects = read_projects(packages)
    if name not in projects:
        raise ValueError(f"{tag} must name one of {', '.join(projects)}, it names {name!r}")
    stated = projects[name][1]["version"]
    if version != stated:
        raise ValueError(f"{tag} must name the version of {name}, which is {stated}")
    return name


def manylinux_of(wheel: Path) -> tuple[int, int] | None:
    """The oldest glibc that a wheel's tags admit, (2, 28) for example; None if they name none."""
    platforms = (tag.platform for tag in parse_wheel_filename(wheel.name)[3])
    found = (re.match(r"manylinux_(\d+)_(\d+)_", platform) for platform in platforms)
    return min(((int(m[1]), int(m[2])) for m in found if m), default=None)


def check_platform(wheel: Path, newest: tuple[int, int] | None = None) -> str:
    """Check that a kernel wheel runs on other machines than the one that built it.

    Args:
        wheel: The wheel as auditwheel left it.
        newest: The newest glibc that it may ask for; any by default.

    Returns:
        What was reached, in words.

    Raises:
        ValueError: the wheel serves one interpreter only, has no manylinux tag or a newer one than
            admitted, or holds another shared library than the kernels'.
    """
    tags = sorted(map(str, parse_wheel_filename(wheel.name)[3]))
    if not all(tag.startswith("py3-none-") for tag in tags):
        raise ValueError(f"a wheel of the kernels must be py3-none, got {', '.join(tags)}")
    reached = manylinux_of(wheel)
    if reached is None:
        raise ValueError(f"a wheel for the index must be manylinux, got {', '.join(tags)}")
    if newest is not None and reached > newest:
        raise ValueError(
            f"the wheel must run with glibc {newest[0]}.{newest[1]}, it needs "
            f"{reached[0]}.{reached[1]}: build it in the release image"
        )
    with zipfile.ZipFile(wheel) as archive:
        libraries = [n for n in archive.namelist() if re.search(r"\.so(\.\d+)*$", n)]
    if libraries != [LIBRARY]:
        raise ValueError(f"the wheel must hold one shared library, {LIBRARY}, got {libraries}")
    return f"{wheel.name} runs with glibc {reached[0]}.{reached[1]} and newer"
