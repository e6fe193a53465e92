# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The ways to choose thresholds that a study compares, and how each makes them."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bsfa_calib.hook import attention_shape
from bsfa_calib.learned import LADDER, learn_path
from bsfa_calib.learning import Learned, Settings
from bsfa_calib.thresholds import ThresholdTable
from bsfa_calib.tuning import find_scalar
from bsfa_kernel import VOTERS, Geometry
from harness import Budget, progress
from study.allotment import (
    Profile,
    allot,
    equal_mass,
    profile_all,
    scalar_for,
    sensitivity_offsets,
)
from study.compare import PAPER
from study.tables import COARSE, mass_thresholds, paper_thresholds

SPARSITIES = (0.45, 0.55, 0.65, 0.75, 0.85, 0.9)
PAPER_SPARSITIES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.75)  # it reaches the same divergence sooner
PAPER_SAMPLES = 16  # it takes the mean over
FINE = Geometry(64, 64)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """A way to choose thresholds.

    Attributes:
        name: what the table calls it; the geometry is part of it.
        rule: one of ``bsfa_kernel.RULES``.
        geometry: the sparsity block.
        variant: how thresholds are chosen: a key of ``VARIANTS``, ``LEARNED`` or
            ``TABLES``, "scalar", or "table", whose file the name is.
        order: of the blocks; see ``study.emulation.ORDERS``.
        voters: one query row in 1, 2 or 4 votes.
    """

    name: str
    rule: str
    geometry: Geometry
    variant: str
    order: str = "last_first"
    voters: int = 1


def grid(rule: str, step: float) -> tuple[float, ...]:
    """Thresholds at which heads are profiled."""
    low, high = (-16.0, 6.0) if rule == "absolute" else (-14.0, 4.0)
    return tuple(np.arange(low, high + step, step).tolist())


VARIANTS: dict[str, Callable[[Profile, float], Array]] = {
    "head by effect": allot,
    "head by effect, half": lambda made, target: allot(made, target, blend=0.5),
    "head by mass": equal_mass,
    "head offset": lambda made, target: scalar_for(made, target, sensitivity_offsets(made)),
    "head offset, half": lambda made, target: scalar_for(
        made, target, sensitivity_offsets(made, strength=0.5)
    ),
    "layer by effect": lambda made, target: allot(made, target, group="layer"),
}
LEARNED: dict[str, dict[str, Any]] = {
    "learned": {},
    "learned, at most 0": {"ceiling": 0.0},
    "learned, 4 knots": {"knots": 4},
    "learned from effect": {},
}

# Beside peak_lse, learned and one scalar, in both geometries by all numbers of voters.
_WANTED = (
    ("running_max", COARSE, ("scalar",)),
    ("peak_lse", COARSE, ("head by effect", "head by mass")),
    ("peak_lse", COARSE, ("learned, 4 knots", "learned from effect", "learned, at most 0")),
    ("absolute", COARSE, ("mass",)),
    ("running_max", COARSE, ("learned",)),
    ("peak_lse", COARSE, ("head by effect, half", "head offset, half", "layer by effect")),
    ("running_max", FINE, ("scalar",)),
    ("running_max", COARSE, ("head by effect",)),
    ("absolute", COARSE, ("learned, 4 knots",)),
    ("peak_lse", COARSE, ("head offset",)),
)


def candidates(*, orders: bool, only: Sequence[str]) -> list[Candidate]:
    """All candidates whose name holds one of ``only``, those that matter most first."""
    found = [Candidate(PAPER, "absolute", COARSE, "paper")]
    choices = itertools.product((COARSE, FINE), reversed(VOTERS), ("scalar", "learned"))
    for geometry, voters, variant in choices:
        name = f"peak_lse {variant} {geometry}{f', 1 in {voters}' if voters > 1 else ''}"
        found.append(Candidate(name, "peak_lse", geometry, variant, voters=voters))
    for rule, geometry, variants in _WANTED:
        found += [Candidate(f"{rule} {v} {geometry}", rule, geometry, v) for v in variants]
    for order in ("sink_last_first", "first_last") if orders else ():
        for variant in ("head by effect",):
            name = f"peak_lse {variant} {COARSE}, {order.replace('_', ' ')}"
            found.append(Candidate(name, "peak_lse", COARSE, variant, order))
    return [c for c in found if not only or any(part in c.name for part in only)]


def chosen_candidates(arguments: argparse.Namespace) -> list[Candidate]:
    """What the arguments ask to compare.

    Raises:
        ValueError: nothing is called so, or a table cannot be read.
        FileNotFoundError: there is no such table.
    """
    chosen = [table_candidate(path) for path in arguments.tables]
    if arguments.only != ["tables"]:
        chosen = [*candidates(orders=arguments.orders, only=arguments.only), *chosen]
    if not chosen:
        known = ", ".join(candidate.name for candidate in candidates(orders=True, only=()))
        raise ValueError(
            f"--only {' '.join(map(repr, arguments.only))} names no candidate; there are {known}, "
            "and tables with --tables"
        )
    return chosen


def table_candidate(path: Path) -> Candidate:
    """A table that was calibrated before, at all its points."""
    table = ThresholdTable.load(path)
    geometry = Geometry(table.q_block, table.k_block)
    return Candidate(str(path), table.rule, geometry, "table", voters=table.voters)


TABLES = {"paper": paper_thresholds, "mass": mass_thresholds}


class Thresholds:
    """Makes the thresholds of candidates, and keeps what several of them need."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        model: Any,
        contexts: Sequence[Sequence[int]],
        budget: Budget,
        native: bool,
    ) -> None:
        """Keep what they are made from; the model is still in float32."""
        self.arguments, self.model, self.contexts = arguments, model, contexts
        self.budget, self.native = budget, native
        self.device = next(model.parameters()).device
        self.dtype = torch.float32
        self.start = ThresholdTable.load(arguments.start) if arguments.start else None
        self._profiles: dict[tuple[str, Geometry, str], Profile] = {}
        self._tables: dict[str, Callable[[float], npt.NDArray[np.float32]]] = {}

    def reduced(self, dtype: str) -> None:
        """From now on, candidates are compared in a dtype; thresholds are made in float32."""
        self.dtype = getattr(torch, dtype)
        self.model.to(self.dtype)

    def of(
        self, candidate: Candidate, targets: Sequence[float]
    ) -> Iterator[tuple[float, torch.Tensor]]:
        """Targets, and thresholds float32 [layers, heads, rows] for each."""
        for target, values in self._of(candidate, targets):
            yield target, torch.tensor(values, dtype=torch.float32, device=self.device)

    def _of(self, candidate: Candidate, targets: Sequence[float]) -> Iterator[tuple[float, Any]]:
        rule, geometry = candidate.rule, candidate.geometry
        if candidate.variant == "table":
            table = ThresholdTable.load(candidate.name)
            for target in targets:
                yield target, table.thresholds[table.points.index(target)]
        elif candidate.variant in TABLES:
            if candidate.variant not in self._tables:
                samples = self.contexts[: self.arguments.paper_samples]
                self._tables[candidate.variant] = TABLES[candidate.variant](self.model, samples)
            for target in targets:
                yield target, self._tables[candidate.variant](target)
        elif candidate.variant == "scalar":
            for target in targets:
                found = find_scalar(
                    self.model,
                    self.contexts[:3],
                    rule=rule,
                    target_sparsity=target,
                    geometry=geometry,
                    voters=candidate.voters,
                    backend="auto" if self.native else "reference",
                )
                yield target, np.full((*attention_shape(self.model), 1), found.threshold)
        elif candidate.variant in LEARNED:
            learned = [(one.target, one.thresholds) for one in self._learned(candidate)]
            start = []
            if self.start is not None:
                start.append((self.start.points[-1], self.start.thresholds[-1]))
            steps = [*learned, *between([*start, *learned], self.arguments.between)]
            yield from sorted(steps, key=lambda one: one[0])
        else:
            made = self._profile(rule, geometry, candidate.order)
            for target in targets:
                yield target, VARIANTS[candidate.variant](made, target)[..., None]

    def _profile(self, rule: str, geometry: Geometry, order: str) -> Profile:
        key = (rule, geometry, order)
        if key not in self._profiles:
            with self._in_float32():
                (self._profiles[key],) = profile_all(
                    self.model,
                    self.contexts[: self.arguments.profiled],
                    [(*key, grid(rule, self.arguments.grid_step))],
                    draws=self.arguments.draws,
                    progress=lambda told: progress(f"  {told}; {self.budget.spent:.0f} s"),
                )
        return self._profiles[key]

    def _learned(self, candidate: Candidate) -> list[Learned]:
        checkpoint = None
        if self.arguments.learned is not None:
            name = candidate.name.replace(" ", "_").replace(",", "")
            checkpoint = self.arguments.learned / f"{name}_{len(self.contexts[0])}.npz"
        start = None
        if candidate.variant == "learned from effect":
            profiled = self._profile(candidate.rule, candidate.geometry, candidate.order)
            start = allot(profiled, LADDER[0]).astype(np.float32)
        rungs = None
        if self.start is not None:
            start, rungs = self.start.thresholds[-1], self.arguments.learned_sparsities
        with self._in_float32():
            return learn_path(
                self.model,
                self.contexts,
                target_sparsities=self.arguments.learned_sparsities,
                rungs=rungs,
                rule=candidate.rule,
                geometry=candidate.geometry,
                voters=candidate.voters,
                settings=Settings(
                    steps=self.arguments.steps,
                    further_steps=self.arguments.further_steps,
                    **LEARNED[candidate.variant],
                ),
                start=start,
                checkpoint=checkpoint,
                progress=lambda told: progress(f"  {told}; {self.budget.spent:.0f} s"),
            )

    @contextlib.contextmanager
    def _in_float32(self) -> Iterator[None]:
        self.model.to(torch.float32)
        try:
            yield
        finally:
            self.model.to(self.dtype)


def between(
    learned: Sequence[tuple[float, Any]], count: int
) -> list[tuple[float, npt.NDArray[np.float32]]]:
    """Targets and thresholds between two neighbours each, ``count`` of them, evenly spaced."""
    found = []
    for (low, first), (high, second) in itertools.pairwise(learned):
        for share in np.arange(1, count + 1) / (count + 1):
            values = np.asarray((1 - share) * first + share * second, np.float32)
            found.append((round(float((1 - share) * low + share * high), 6), values))
    return found
