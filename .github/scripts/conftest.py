# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of the repository's own scripts share."""

from __future__ import annotations

from pathlib import Path


def write_package(root: Path, name: str, version: str, *needs: str, log: str | None = None) -> None:
    """Write the metadata and the changelog of a package that requires ``needs``."""
    directory = root / name
    directory.mkdir()
    needs_list = ", ".join(f'"{need}"' for need in needs)
    (directory / "pyproject.toml").write_text(
        f'[project]\nname = "{name}"\nversion = "{version}"\ndependencies = [{needs_list}]\n'
    )
    (directory / "CHANGELOG.md").write_text(log or f"# Changes\n\n## {version}\n\nFirst.\n")
