# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bsfa_calib.point import AXES


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No settings from outside, and statistics of a test's own."""
    names = ("BSFA_THRESHOLDS", "BSFA_POINT", "BSFA_SELECTION", "BSFA_CHECK_MODEL")
    for name in (*names, *(f"BSFA_{axis.upper()}" for axis in AXES)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(os.environ, "BSFA_STATISTICS", str(tmp_path / "statistics"))
    yield
