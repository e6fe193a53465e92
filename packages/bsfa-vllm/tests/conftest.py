# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from bsfa_calib.point import AXES
from bsfa_vllm import binding, counting


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No settings from outside, and engines and statistics of a test's own."""
    names = ("BSFA_THRESHOLDS", "BSFA_POINT", "BSFA_SELECTION", "BSFA_CHECK_MODEL")
    for name in (*names, *(f"BSFA_{axis.upper()}" for axis in AXES)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(binding, "_engines", weakref.WeakValueDictionary())
    monkeypatch.setitem(os.environ, "BSFA_STATISTICS", str(tmp_path / "statistics"))
    yield
    if counting._writer is not None:
        # What is left goes to this test's folder, not to the next one's.
        counting._writer.finish()
        counting._writer = None
