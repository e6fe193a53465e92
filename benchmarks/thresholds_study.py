# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Which thresholds lose least at equal sparsity, on a real model and on held-out text.

Every candidate is calibrated on some contexts and run on others at several sparsities: the paper's
table (absolute thresholds for k blocks), one like it for a budget of softmax mass instead of k, one
scalar for the whole model under each rule, one scalar a head or a layer, allotted by the measured
effect of the head's error on the predictions or by the mass that it loses
(``study.allotment``), and thresholds learned by gradient
(``bsfa_calib.learning``), in both geometries. What is compared is the KL divergence of the
next-token distributions from dense, and how much can be skipped at a given divergence; intervals
are from a bootstrap over contexts, the same contexts for all.

    python benchmarks/thresholds_study.py --model MODEL --text DIR --length 4096 --contexts 16

Native kernels are used on a GPU where the installation has them, and elsewhere an emulation in
PyTorch. Results are written as they come; what --out holds of the same contexts is not run again,
and thresholds that were learned are kept in the folder --learned.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bsfa_calib import models
from bsfa_calib.hook import Attended, BlockSparse, Method, applied, attention_shape, forced_share
from bsfa_calib.language_model import LanguageModel, Predictions
from bsfa_calib.learned import LADDER, learn_path
from bsfa_calib.learning import Learned, Settings
from bsfa_calib.text import Window, read_windows
from bsfa_calib.thresholds import ThresholdTable
from bsfa_calib.tuning import find_scalar
from bsfa_kernel import Geometry, block_maxima, build_info, reference
from harness import Budget, environment, progress
from study.allotment import (
    Profile,
    allot,
    equal_mass,
    profile_all,
    scalar_for,
    sensitivity_offsets,
)
from study.compare import KL_TARGETS, PAPER, Array, Point, compared, draw, interval_text
from study.emulation import EmulatedSparse

SPARSITIES = (0.45, 0.55, 0.65, 0.75, 0.85, 0.9)
PAPER_SPARSITIES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.75)  # it reaches the same divergence sooner
PAPER_SAMPLES = 16  # it takes the mean over
COARSE, FINE = Geometry(128, 64), Geometry(64, 64)


@dataclass(frozen=True)
class Candidate:
    """A way to choose thresholds.

    Attributes:
        name: what the table calls it; the geometry is part of it.
        rule: one of ``bsfa_kernel.RULES``.
        geometry: the sparsity block.
        variant: how thresholds are chosen: a key of ``_VARIANTS``, ``_LEARNED`` or
            ``_TABLES``, "scalar", or "table", whose file the name is.
        order: of the blocks; see ``emulation.ORDERS``.
    """

    name: str
    rule: str
    geometry: Geometry
    variant: str
    order: str = "last_first"


def grid(rule: str, step: float) -> tuple[float, ...]:
    """Thresholds at which heads are profiled."""
    low, high = (-14.0, 4.0) if rule == "running_max" else (-16.0, 6.0)
    return tuple(np.arange(low, high + step, step).tolist())


_VARIANTS: dict[str, Callable[[Profile, float], Array]] = {
    "head by effect": allot,
    "head by effect, half": lambda made, target: allot(made, target, blend=0.5),
    "head by mass": equal_mass,
    "head offset": lambda made, target: scalar_for(made, target, sensitivity_offsets(made)),
    "head offset, half": lambda made, target: scalar_for(
        made, target, sensitivity_offsets(made, strength=0.5)
    ),
    "layer by effect": lambda made, target: allot(made, target, group="layer"),
}
_LEARNED: dict[str, dict[str, Any]] = {
    "learned": {},
    "learned, at most 0": {"ceiling": 0.0},
    "learned, 4 knots": {"knots": 4},
    "learned from effect": {},
}

# First what the defaults may become, then the rest.
_WANTED = (
    ("running_max", COARSE, ("scalar",)),
    ("running_lse", COARSE, ("scalar", "learned", "head by effect", "head by mass")),
    ("running_lse", COARSE, ("learned, 4 knots", "learned from effect", "learned, at most 0")),
    ("absolute", COARSE, ("mass",)),
    ("running_max", COARSE, ("learned",)),
    ("running_lse", FINE, ("scalar", "learned")),
    ("running_lse", COARSE, ("head by effect, half", "head offset, half", "layer by effect")),
    ("running_max", FINE, ("scalar",)),
    ("running_max", COARSE, ("head by effect",)),
    ("absolute", COARSE, ("learned, 4 knots",)),
    ("running_lse", COARSE, ("head offset",)),
)


def candidates(*, orders: bool, only: Sequence[str]) -> list[Candidate]:
    """All candidates whose name holds one of ``only``, those that matter most first."""
    found = [Candidate(PAPER, "absolute", COARSE, "paper")]
    for rule, geometry, variants in _WANTED:
        found += [Candidate(f"{rule} {v} {geometry}", rule, geometry, v) for v in variants]
    for order in ("sink_last_first", "first_last") if orders else ():
        for variant in ("head by effect",):
            name = f"running_lse {variant} {COARSE}, {order.replace('_', ' ')}"
            found.append(Candidate(name, "running_lse", COARSE, variant, order))
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
    return Candidate(str(path), table.rule, Geometry(table.q_block, table.k_block), "table")


def unforced(length: int) -> npt.NDArray[np.int64]:
    """Blocks that each query block of the paper's geometry may skip."""
    return np.asarray((np.arange(0, length, 128) + 1) // 64, np.int64)


def block_masses(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax mass of each block, mean over its 128 rows; float32 [heads, q_blocks, k_blocks].

    Args:
        q: [1, seqlen, heads, head_dim]; seqlen is a multiple of 128.
        k: [1, seqlen, kv_heads, head_dim].
        scale: factor of the scores.
    """
    _, seqlen, heads, _ = q.shape
    positions = torch.arange(seqlen, device=q.device)
    hidden = torch.where(positions > positions[:, None], -torch.inf, 0.0)
    masses = q.new_empty((heads, seqlen // 128, seqlen // 64), dtype=torch.float32)
    for head in range(heads):  # the scores of all heads together would fill gigabytes
        keys = k[0, :, head * k.shape[2] // heads].float()
        weights = torch.addmm(hidden, q[0, :, head].float() * scale, keys.T).softmax(-1)
        masses[head] = weights.view(seqlen // 128, 128, seqlen // 64, 64).sum(-1).mean(1)
    return masses


class _Maxima:
    """Dense attention that keeps the block maxima, the unforced ones in descending order.

    Attributes:
        layers: of each layer, float32 [heads, q_blocks, k_blocks]; -inf after the unforced ones.
        masses: if asked for: the masses of those blocks, in the same order; 0 after them.
    """

    def __init__(self, *, masses: bool = False) -> None:
        self.layers: dict[int, npt.NDArray[np.float32]] = {}
        self.masses: dict[int, npt.NDArray[np.float32]] = {}
        self._with_masses = masses

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, scale: float
    ) -> Attended:
        native = q.device.type == "cuda" and q.dtype != torch.float32
        measure = block_maxima if native else reference.block_maxima
        maxima = measure(q, k, scale=scale, geometry=COARSE)[0]
        free = torch.as_tensor(unforced(q.shape[1]), device=q.device)
        hidden = torch.arange(maxima.shape[-1], device=q.device) >= free[:, None]
        ordered, order = maxima.masked_fill(hidden, -torch.inf).sort(-1, descending=True)
        self.layers[layer] = ordered.cpu().numpy()
        if self._with_masses:
            masses = block_masses(q, k, scale).masked_fill(hidden, 0)
            self.masses[layer] = masses.gather(-1, order).cpu().numpy()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        )
        return Attended(out.transpose(1, 2), q.new_zeros(q.shape[1]))


def _ordered(
    model: Any, contexts: Sequence[Sequence[int]], *, masses: bool = False
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """What ``_Maxima`` keeps, each float32 [contexts, layers, heads, q_blocks, k_blocks]."""
    language_model = LanguageModel(model)
    kept: tuple[list[Any], list[Any]] = [], []
    for ids in contexts:
        recording = _Maxima(masses=masses)
        with applied(model, recording):
            language_model.predict(ids)
        for into, of in zip(kept, (recording.layers, recording.masses), strict=True):
            into.append([of[layer] for layer in sorted(of)])
    return np.asarray(kept[0], np.float32), np.asarray(kept[1], np.float32)


def paper_thresholds(
    model: Any, contexts: Sequence[Sequence[int]]
) -> Callable[[float], npt.NDArray[np.float32]]:
    """The paper's rule: for each query block the threshold that keeps k blocks, mean over contexts.

    The k for a sparsity is the one that would keep that share on average.
    """
    length = len(contexts[0])
    free = unforced(length)
    maxima = _ordered(model, contexts)[0].astype(np.float64)
    visible = np.arange(128, length + 1, 128) // 64

    def thresholds(target: float) -> npt.NDArray[np.float32]:
        shares = [(np.maximum(free - k, 0).sum() / visible.sum()) for k in range(1, length // 64)]
        k = 1 + int(np.argmin(np.abs(np.asarray(shares) - target)))
        between = (maxima[..., k - 1] + maxima[..., k]) / 2
        return np.where(free > k, between.mean(0), -np.inf).astype(np.float32)

    return thresholds


def mass_thresholds(
    model: Any, contexts: Sequence[Sequence[int]]
) -> Callable[[float], npt.NDArray[np.float32]]:
    """The paper's rule with a budget of mass: ``budget_thresholds`` of each context, their mean.

    A query block that may drop nothing in some context keeps everything: one -inf makes the mean
    -inf. The budget for a sparsity is the one whose mean thresholds skip that share of all visible
    blocks of these contexts.
    """
    length = len(contexts[0])
    free = unforced(length)
    maxima, masses = _ordered(model, contexts, masses=True)
    lost = lost_mass(maxima, masses)
    droppable = np.arange(maxima.shape[-1]) < free[:, None]
    visible = int((np.arange(128, length + 1, 128) // 64).sum())
    everything = maxima[..., 0, 0].size * visible

    def averaged(budget: float) -> npt.NDArray[np.float32]:
        mean = budget_thresholds(maxima, lost, free, budget).mean(0)
        return np.asarray(mean, np.float32)

    def thresholds(target: float) -> npt.NDArray[np.float32]:
        low, high = -40.0, 0.1  # logarithms of the budget
        for _ in range(30):
            middle = (low + high) / 2
            skipped = (maxima < averaged(float(np.exp(middle)))[..., None]) & droppable
            if skipped.sum() / everything < target:
                low = middle
            else:
                high = middle
        return averaged(float(np.exp(high)))

    return thresholds


def lost_mass(
    maxima: npt.NDArray[np.float32], masses: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Mass lost by dropping a block and all whose maxima are not larger; of ``_ordered``'s shape.

    Args:
        maxima: of blocks, in descending order along the last axis.
        masses: of the same blocks.
    """
    lost = np.flip(np.cumsum(np.flip(masses, -1), -1), -1)
    tied = np.zeros(maxima.shape, bool)
    tied[..., 1:] = maxima[..., 1:] == maxima[..., :-1]
    return np.minimum.accumulate(np.where(tied, np.float32(np.inf), lost), -1)


def budget_thresholds(
    maxima: npt.NDArray[np.float32],
    lost: npt.NDArray[np.float32],
    free: npt.NDArray[np.int64],
    budget: float,
) -> Array:
    """Thresholds under which as many blocks are dropped as lose no more mass than a budget.

    Blocks are dropped in ascending order of their maxima. The threshold lies half way between the
    last dropped and the first kept, is -inf if none is dropped, and just above the largest if all.

    Args:
        maxima: of the unforced blocks in descending order, [..., q_blocks, k_blocks], then -inf.
        lost: see ``lost_mass``.
        free: [q_blocks], number of unforced blocks.
        budget: softmax mass, mean over the rows of a query block.

    Returns:
        float64 [..., q_blocks].
    """
    kept = (lost > budget).sum(-1)
    last = maxima.shape[-1] - 1
    above, below = (
        np.take_along_axis(maxima, np.clip(index, 0, last)[..., None], -1)[..., 0]
        for index in (kept - 1, kept)
    )
    found = (above.astype(np.float64) + below) / 2
    found = np.where(kept == 0, np.nextafter(below, np.float32(np.inf)), found)
    return np.where(kept == free, -np.inf, found)


_TABLES = {"paper": paper_thresholds, "mass": mass_thresholds}


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
        elif candidate.variant in _TABLES:
            if candidate.variant not in self._tables:
                samples = self.contexts[: self.arguments.paper_samples]
                self._tables[candidate.variant] = _TABLES[candidate.variant](self.model, samples)
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
                    backend="auto" if self.native else "reference",
                )
                yield target, np.full((*attention_shape(self.model), 1), found.threshold)
        elif candidate.variant in _LEARNED:
            learned = [(one.target, one.thresholds) for one in self._learned(candidate)]
            start = []
            if self.start is not None:
                start.append((self.start.points[-1], self.start.thresholds[-1]))
            path = [*learned, *between([*start, *learned], self.arguments.between)]
            yield from sorted(path, key=lambda one: one[0])
        else:
            made = self._profile(rule, geometry, candidate.order)
            for target in targets:
                yield target, _VARIANTS[candidate.variant](made, target)[..., None]

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
                settings=Settings(
                    steps=self.arguments.steps,
                    further_steps=self.arguments.further_steps,
                    **_LEARNED[candidate.variant],
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


def run_point(
    language_model: LanguageModel,
    method: Method,
    windows: Sequence[Window],
    dense: Sequence[tuple[Predictions, float]],
    asked: float,
) -> Point:
    """One candidate at one sparsity on all contexts."""
    sparsity, kl, nll = [], [], []
    for window, (expected, dense_nll) in zip(windows, dense, strict=True):
        with applied(language_model.model, method) as meter:
            found = language_model.predict(window.ids)
            sparsity.append(float(np.mean(meter.take())))
        bands = language_model.compare(found, expected, window.ids)
        positions = sum(band.positions for band in bands)
        kl.append(sum(band.kl * band.positions for band in bands) / positions)
        nll.append(sum(band.nll * band.positions for band in bands) / positions - dense_nll)
    return Point(asked, np.asarray(sparsity), np.asarray(kl), np.asarray(nll))


def earlier(path: Path, about: dict[str, Any]) -> dict[str, list[Point]]:
    """Points by candidate that a file holds of the same model and the same contexts."""
    results: dict[str, list[Point]] = {}
    if not path.exists():
        return results
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == about["kind"] and _run(record) == _run(about):
            arrays = (np.asarray(record[name]) for name in ("sparsity", "kl", "nll_change"))
            point = Point(record["asked"], *arrays)
            results.setdefault(record["candidate"], []).append(point)
    for points in results.values():
        points.sort(key=lambda point: point.asked)
    return results


def _run(record: dict[str, Any]) -> tuple[Any, ...]:
    """What records must share for their points to belong together."""
    names = ("model", "dtype", "seqlen", "contexts", "calibration_contexts", "backend")
    samples = record.get("paper_samples", PAPER_SAMPLES)  # an older record says nothing
    return (*(record.get(name) for name in names), samples)


def _runs(path: Path) -> list[dict[str, Any]]:
    """The first record of every run that a file holds; see ``_run`` for which are one."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    found: list[dict[str, Any]] = []
    for record in records:
        if record["kind"] == "thresholds_study" and _run(record) not in map(_run, found):
            found.append(record)
    return found


def main() -> int:
    """Run the study."""
    arguments = _arguments()
    if arguments.report:
        for path in arguments.report:
            print(report(path))
            if arguments.plot is not None:
                plot(path, arguments.plot / f"{path.stem}.png")
        return 0
    budget = Budget(arguments.seconds)
    torch.set_flush_denormal(True)  # a CPU is slow at weights that are almost 0
    # Heads are profiled in float32, whatever the candidates are compared in: gradients are small.
    loaded = models.load(arguments.model, dtype="float32", device=arguments.device)
    model = loaded.model
    language_model = LanguageModel(model)
    device = language_model.device
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    native = arguments.backend == "native" or (
        arguments.backend == "auto" and device.type == "cuda" and bool(build_info().kernels)
    )
    dtype = arguments.dtype or ("float16" if native else "float32")
    calibration = read_windows(
        arguments.calibration_text or arguments.text,
        loaded.tokenizer,
        length=arguments.length,
        count=arguments.calibration_contexts,
        part=(0.0, 0.5),
    )
    windows = read_windows(
        arguments.text,
        loaded.tokenizer,
        length=arguments.length,
        count=arguments.contexts,
        part=(0.5, 1.0),
    )
    kinds = sorted({window.kind for window in windows})
    progress(
        f"{len(calibration)} contexts to calibrate on, {len(windows)} to compare on, of "
        f"{arguments.length} tokens and kinds {', '.join(kinds)}; "
        f"{'native kernels' if native else 'emulation'} on {device}; {budget.spent:.0f} s so far"
    )

    calibration_ids = [window.ids for window in calibration]
    source = Thresholds(arguments, model, calibration_ids, budget, native)

    source.reduced(dtype)
    dense = []
    with applied(model, None):
        for window in windows:
            expected = language_model.predict(window.ids)
            bands = language_model.compare(expected, expected, window.ids)
            nll = sum(b.nll * b.positions for b in bands) / (len(window.ids) - 1)
            dense.append((expected, nll))
    progress(f"dense done; {budget.spent:.0f} s")

    about = {
        "schema": 1,
        "kind": "thresholds_study",
        **environment(device),
        "model": models.identity(arguments.model, model)[0],
        "dtype": dtype,
        "backend": "native" if native else "emulation",
        "seqlen": arguments.length,
        "calibration_contexts": [window.name for window in calibration],
        "contexts": [window.name for window in windows],
        "paper_samples": arguments.paper_samples,
        "draws": arguments.draws,
        "steps": [arguments.steps, arguments.further_steps],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = earlier(arguments.out, about)
    longest = 0.0
    most = 0.98 * (1 - forced_share(arguments.length, COARSE))
    with arguments.out.open("a", encoding="utf-8") as file:
        for candidate in arguments.chosen:
            if not budget.allows(longest):
                progress(f"time is up: {candidate.name} and what follows are left out")
                break
            begin = time.monotonic()
            of_rule = arguments.sparsities
            if candidate.variant in _TABLES:
                of_rule = PAPER_SPARSITIES
            elif candidate.variant == "table":
                of_rule = ThresholdTable.load(candidate.name).points
            known = {point.asked for point in results.get(candidate.name, [])}
            asked_for = [share for share in of_rule if share < most and share not in known]
            if candidate.variant not in _LEARNED and not asked_for and not known:
                progress(f"{candidate.name}: none of {of_rule} can be skipped of so few tokens")
            for asked, values in source.of(candidate, asked_for):
                if asked in known:
                    continue
                method: Method
                if native and candidate.order == "last_first":
                    method = BlockSparse(values, candidate.rule, candidate.geometry)
                else:
                    method = EmulatedSparse(
                        values, candidate.rule, candidate.geometry, candidate.order
                    )
                point = run_point(language_model, method, windows, dense, asked)
                results.setdefault(candidate.name, []).append(point)
                record = {
                    **about,
                    "candidate": candidate.name,
                    "rule": candidate.rule,
                    "geometry": str(candidate.geometry),
                    "order": candidate.order,
                    "asked": asked,
                    "sparsity": point.sparsity.tolist(),
                    "kl": point.kl.tolist(),
                    "nll_change": point.nll.tolist(),
                }
                file.write(json.dumps(record, allow_nan=False) + "\n")
                file.flush()
            longest = max(longest, time.monotonic() - begin)
            progress(f"{candidate.name}; {budget.spent:.0f} s")
        summary = compared(results, len(windows))
        record = {**about, "kind": "thresholds_study_summary", "compared": _plain(summary)}
        file.write(json.dumps(record, allow_nan=False) + "\n")
    print(table(results, summary, [window.kind for window in windows]))
    return 0


def report(path: Path) -> str:
    """What a file of results says, run by run; several runs on the same contexts are one."""
    sections = []
    for about in _runs(path):
        results = earlier(path, about)
        kinds = [name.split("/")[0] for name in about["contexts"]]
        learned_on = [name.split("/")[0] for name in about["calibration_contexts"]]
        shares = ", ".join(f"{learned_on.count(kind)} {kind}" for kind in sorted(set(learned_on)))
        heading = (
            f"{about['model']}, {about['seqlen']} tokens, {about['dtype']}, {about['backend']} on "
            f"{about['gpu']}; {len(kinds)} contexts, {len(learned_on)} others to calibrate on "
            f"({shares})"
        )
        sections.append(f"{heading}\n\n{table(results, compared(results, len(kinds)), kinds)}\n")
    return "\n".join(sections)


def plot(path: Path, picture: Path) -> None:
    """Draw divergence against sparsity for every candidate of a file of results."""
    runs = _runs(path)
    about = runs[0]
    curves = []
    for number, run in enumerate(runs, start=1):
        samples = len(run["calibration_contexts"])
        which = f", run {number} ({samples} samples)" if len(runs) > 1 else ""
        for name, points in earlier(path, run).items():
            label = Path(name).stem if name.endswith(".safetensors") else name
            curves.append((f"{label}{which}", points))
    draw(curves, f"{about['model']}, {about['seqlen']} tokens", picture)
    progress(f"wrote {picture}")


def table(
    results: dict[str, list[Point]],
    summary: dict[str, dict[str, list[float]]],
    of_contexts: Sequence[str],
) -> str:
    """What came out, as Markdown, given the kind of each context."""
    kinds = sorted(set(of_contexts))
    lines = [
        "| thresholds | sparsity → KL, nats (change of NLL) | "
        + " | ".join(f"KL of {kind}" for kind in kinds)
        + " |",
        "|" + " --- |" * (2 + len(kinds)),
    ]
    for name, points in results.items():
        shown = "; ".join(
            f"{p.sparsity.mean():.3f} → {p.kl.mean():.4f} ({p.nll.mean():+.4f})" for p in points
        )
        of_kind = []
        for kind in kinds:
            chosen = np.array([each == kind for each in of_contexts])
            of_kind.append(
                "; ".join(
                    f"{p.sparsity[chosen].mean():.2f} → {p.kl[chosen].mean():.4f}" for p in points
                )
            )
        lines.append(f"| {name} | {shown} | " + " | ".join(of_kind) + " |")
    titles = ["thresholds"]
    for target in KL_TARGETS:
        titles += [
            f"sparsity at KL {target:g}",
            f"over the paper's, at {target:g}",
            f"over running_max, at {target:g}",
        ]
    lines += ["", "| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for name, row in summary.items():
        cells = []
        for target in KL_TARGETS:
            for label in ("sparsity", "over_paper", "over_running_max"):
                value = row.get(f"{label}_at_{target:g}")
                cells.append("" if value is None else interval_text(value))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plain(summary: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float | None]]]:
    return {
        name: {key: [None if np.isnan(x) else x for x in value] for key, value in row.items()}
        for name, row in summary.items()
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path, help="a folder a kind")
    parser.add_argument("--report", type=Path, nargs="+", help="only print what these files hold")
    parser.add_argument("--calibration-text", type=Path, help="calibrate on this text instead")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="with --report: pictures too")
    parser.add_argument("--length", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--calibration-contexts", type=int, default=24)
    parser.add_argument(
        "--paper-samples",
        type=int,
        default=PAPER_SAMPLES,
        help="of them, to take the paper's mean over; fewer where there are fewer",
    )
    parser.add_argument("--profiled", type=int, default=6, help="of them, to measure effects on")
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument(
        "--learned-sparsities",
        type=float,
        nargs="+",
        default=list(LADDER[:3]),
        help="learn on the ladder between the least and the most of these",
    )
    parser.add_argument(
        "--start",
        type=Path,
        metavar="TABLE",
        help="learn on from the last point of this table, at exactly --learned-sparsities",
    )
    parser.add_argument(
        "--between", type=int, default=0, help="points to measure between two that were learned"
    )
    parser.add_argument("--draws", type=int, default=2, help="of tokens, to measure effects with")
    parser.add_argument("--grid-step", type=float, default=1.0, help="of thresholds profiled")
    parser.add_argument("--orders", action="store_true", help="try other orders of the blocks too")
    parser.add_argument("--tables", type=Path, nargs="+", default=[], help="compare these too")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        help="candidates whose name holds this; tables: none but those",
    )
    parser.add_argument("--seconds", type=float, help="leave out what does not fit")
    parser.add_argument("--backend", choices=("auto", "native", "emulation"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="to compare in; by default float16 with native kernels, float32 without",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=80, help="to learn the first sparsity with")
    parser.add_argument("--further-steps", type=int, default=40, help="for every other sparsity")
    parser.add_argument("--learned", type=Path, metavar="DIR", help="keep learned thresholds here")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "thresholds_study.jsonl"
    )
    arguments = parser.parse_args()
    if not arguments.report and (arguments.model is None or arguments.text is None):
        parser.error("--model and --text are needed")
    if arguments.length % 128:
        parser.error(f"--length must be a multiple of 128, got {arguments.length}")
    if arguments.paper_samples < 1:
        parser.error(f"--paper-samples must be at least 1, got {arguments.paper_samples}")
    if arguments.between < 0:
        parser.error(f"--between must be at least 0, got {arguments.between}")
    if not arguments.report:
        try:
            arguments.chosen = chosen_candidates(arguments)
        except (ValueError, FileNotFoundError) as error:
            parser.error(str(error))
    return arguments


if __name__ == "__main__":
    sys.exit(main())
