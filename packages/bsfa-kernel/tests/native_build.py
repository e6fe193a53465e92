# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Where the tests of the native library find it, its sources and the tools to build with."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from bsfa_kernel import _native

PACKAGE = Path(__file__).parents[1]
INCLUDE = PACKAGE / "include"
NATIVE_TESTS = Path(__file__).parent / "native"
MODULES = next(path for path in (PACKAGE / "cmake", PACKAGE.parents[1] / "cmake") if path.is_dir())
"""The CMake modules: in an sdist, or in the repository."""


def library() -> Path:
    """The library that is tested: $BSFA_LIBRARY, or that of the installed package."""
    path = _native.library_path()
    assert path.is_file(), f"no native library at {path}: install the wheel, or set BSFA_LIBRARY"
    return path


def tool(name: str) -> str:
    """The path of a program that the tests need."""
    path = shutil.which(name)
    assert path is not None, f"these tests need {name} on the PATH"
    return path


def run(
    *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with more variables in its environment, and return what it said."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=1800,
    )


def run_well(
    *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Run a command that must succeed."""
    result = run(*command, cwd=cwd, env=env)
    assert result.returncode == 0, result.stdout
    return result.stdout
