# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Times to first token of one prompt, by implementations that take turns.

A program may be stopped at any time. Every repetition is therefore written when it is known, and
again where a later one changes its median or its ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from attention import DENSE
from bsfa_kernel import Geometry
from harness import Budget, Record, Results, clocks
from kernels import Mode


@dataclass(eq=False)
class Run:
    """One way to compute the attention, and its times in milliseconds.

    Attributes:
        times: of its repetitions.
        clocks: before its first repetition, and after its last.
        record: the last that was written.
    """

    implementation: str
    asked: str = DENSE
    rule: str | None = None
    geometry: Geometry | None = None
    mode: Mode | None = None
    sparsity: float = 0.0
    times: list[float] = field(default_factory=list)
    clocks: dict[str, dict[str, int]] = field(default_factory=dict)
    record: Record = field(default_factory=dict)

    def __str__(self) -> str:
        parts = (self.implementation, self.asked, self.rule, self.geometry, self.mode)
        return " ".join(str(part) for part in parts if part is not None)

    def facts(self) -> Record:
        """What its record says beside times."""
        return {
            "implementation": self.implementation,
            "asked": self.asked,
            "sparsity": self.sparsity,
            "rule": self.rule,
            "geometry": str(self.geometry) if self.geometry else None,
            **(self.mode._asdict() if self.mode else {}),
        }


_Run = TypeVar("_Run", bound=Run)


class Turns:
    """The runs of one prompt, each compared with the dense ones among them."""

    def __init__(
        self, results: Results, about: Record, device: torch.device, runs: Iterable[Run] = ()
    ) -> None:
        """Nothing is measured yet, but for ``runs``.

        Args:
            results: where records go.
            about: what all of them say; ``seqlen`` among it.
            device: whose clocks are read.
            runs: that were timed elsewhere.
        """
        self.runs = list(runs)
        self._results, self._about, self._device = results, about, device

    def time(self, run: _Run, work: Callable[[_Run], float]) -> None:
        """Time a run once more, and write its record.

        Args:
            run: one that is timed here, of which the first comes to ``runs``.
            work: times a run, in milliseconds.
        """
        before = clocks(self._device)
        ms = work(run)
        run.clocks = {"before": run.clocks.get("before", before), "after": clocks(self._device)}
        run.times.append(ms)
        if run not in self.runs:
            self.runs.append(run)
        self._write(run, self._record(run))

    def refresh(self) -> None:
        """Write the records again that other runs' times have changed."""
        for run in self.runs:
            record = self._record(run)
            if record != run.record:
                self._write(run, record)

    def repeat(
        self, runs: list[_Run], repetitions: int, budget: Budget, work: Callable[[_Run], float]
    ) -> str:
        """Let runs that were timed once take turns.

        Args:
            runs: of these.
            repetitions: of each, the first among them.
            budget: a round that would not fit is not begun.
            work: times a run, in milliseconds.

        Returns:
            What is left out for the budget, or "".
        """
        self.refresh()
        for repetition in range(1, repetitions if runs else 1):
            if not budget.allows(sum(run.times[-1] for run in runs) / 1000):
                which = f"repetitions {repetition + 1} to {repetitions}"
                return f"left out for the budget: {self._about['seqlen']} tokens, {which}"
            for run in runs:
                self.time(run, work)
            self.refresh()
        return ""

    def _write(self, run: Run, record: Record) -> None:
        self._results.append(record)
        run.record = record

    def _record(self, run: Run) -> Record:
        """What is known of a run by now."""
        dense = {
            other.implementation: statistics.median(other.times)
            for other in self.runs
            if other.asked == DENSE
        }
        ms = statistics.median(run.times)
        return {
            **self._about,
            **run.facts(),
            "ms": ms,
            "ms_min": min(run.times),
            "repetitions": len(run.times),
            "speedup": {n: other / ms for n, other in dense.items() if n != run.implementation},
            "clocks": run.clocks,
        }
