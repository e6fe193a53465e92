# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""compute-sanitizer finds no error in any kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "sanitize.py"


@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_the_sanitizer_finds_no_error(arch, tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        if os.environ.get("BSFA_REQUIRE_SANITIZER") == "1":
            pytest.fail("BSFA_REQUIRE_SANITIZER=1, and there is no compute-sanitizer")
        pytest.skip("no compute-sanitizer on this GPU machine")
    command = [
        *(sanitizer, "--tool", tool, "--error-exitcode", "99", "--launch-timeout", "300"),
        *(sys.executable, str(SCRIPT), str(arch.arch)),
    ]
    # Each tensor its own allocation, so that reads beyond one are seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=1800
    )
    printed = done.stdout + done.stderr
    first = printed.find("=========", printed.find("=========") + 1)  # behind the sanitizer's greeting
    shown = printed[first : first + 4000] + printed[-1000:]
    assert done.returncode == 0, shown
    assert "ERROR SUMMARY: 0 errors" in printed, shown
    assert "kinds of call done" in done.stdout, shown
