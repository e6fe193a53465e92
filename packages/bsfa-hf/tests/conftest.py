# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from bsfa_calib.point import AXES
from tiny import tiny_model


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(min(torch.get_num_threads(), 2))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        points = ("BSFA_THRESHOLDS", "BSFA_POINT", *(f"BSFA_{axis.upper()}" for axis in AXES))
        if name.startswith("CUSTOM_") or name in points:
            monkeypatch.delenv(name)
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> torch.nn.Module:
    """A tiny Llama with grouped queries, on SDPA."""
    return tiny_model("llama")


_OUTCOMES = pytest.StashKey[dict[str, str]]()


@pytest.fixture
def outcomes(request: pytest.FixtureRequest) -> dict[str, str]:
    """How each type of model ran, for the summary."""
    return request.config.stash.setdefault(_OUTCOMES, {})


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    found = config.stash.get(_OUTCOMES, {})
    if found:
        counts = Counter(found.values())
        words = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
        terminalreporter.write_line(f"types of models: {words}")
