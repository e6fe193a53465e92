# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Speed of the attention kernels against sparsity, beside the dense kernels that users have.

Every kernel is checked against the float32 reference at a small size before it is timed, and where
the skipped blocks weigh nothing, also against a dense kernel at the size that is timed. One record
a measurement is appended to a JSON Lines file::

    python benchmarks/attention.py --preset quick --out benchmarks/results/quick.jsonl

``--device cpu`` runs the reference back end on small inputs: a test of this program, and no
measurement.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bsfa_kernel
import inputs
import kernels
from bsfa_kernel import Geometry, _native, reference
from harness import (
    Budget,
    Record,
    Results,
    Timer,
    clocks,
    environment,
    list_of,
    one_of,
    out_of,
    parse_length,
    progress,
    run_program,
    share_text,
)
from inputs import Problem, Shape
from kernels import EXACT, Mode

DENSE = "dense"  # instead of a sparsity: thresholds of -inf

# How far an output may be from the float32 reference, as |difference| / |reference|. Rounding the
# probabilities and the output to the element type gives about a third of it.
ERROR_LIMIT = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
# In 8 bits a scale that is rounded another way may decide otherwise of a few blocks. In 16 bits a
# verdict may differ only where the block maximum is this close to the threshold, in scaled scores.
_FLIPS = 0.01
_MARGIN = 0.01
_CHECKED_SEQLEN = 1000  # no multiple of any block
_CHECKED_SPARSITY = 0.5

# Only to say beforehand how long a sweep will take.
_ASSUMED_TFLOPS = {
    "fa3": 600.0,
    "cudnn": 450.0,
    "fa2": 300.0,
    "bsfa_sm90": 500.0,
    "bsfa_sm80": 300.0,
}
_ASSUMED_SECONDS_A_CASE = 1.0

_SPARSITIES = (DENSE, "0", "0.5", "0.75", "0.9", "0.95")
_BOTH = bsfa_kernel.GEOMETRIES
_BF16, _FP16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Sweep:
    """A product of settings."""

    seqlens: tuple[int, ...]
    sparsities: tuple[str, ...] = _SPARSITIES
    dtypes: tuple[torch.dtype, ...] = (_BF16,)
    head_dims: tuple[int, ...] = (128,)
    heads: tuple[int, ...] = (32,)
    kv_heads: tuple[int, ...] = (8,)
    batches: tuple[int, ...] = (1,)
    geometries: tuple[Geometry, ...] = _BOTH
    rules: tuple[str, ...] = ("absolute",)
    inputs: tuple[str, ...] = ("planted",)
    modes: tuple[Mode, ...] = (EXACT,)
    kernels: tuple[str, ...] = kernels.NAMES
    causal: bool = True


_K = 1024
_LONG = (64 * _K, 128 * _K)
_HOPPER = tuple(name for name in kernels.NAMES if name != "bsfa_sm80")
_PEERS = ("bsfa_sm90", "fa3", "cudnn")
_SKIPPING = ("0.5", "0.75", "0.9", "0.95")
_AMPERE = tuple(name for name in kernels.NAMES if name != "bsfa_sm90")
_DEFAULT_RULE = ("peak_lse",)
# Exact in one kernel; then in two steps, in 8 bits, by every row, by one in two and one in four.
_EVERY_MODE = (EXACT, *(Mode("int8", voters) for voters in bsfa_kernel.VOTERS))

# In each, the most important comes first, so that a budget cuts the rest.
PRESETS: dict[str, tuple[Sweep, ...]] = {
    "quick": (Sweep((16 * _K,), (DENSE, "0.5", "0.9"), geometries=_BOTH[:1]),),
    "sm80": (
        Sweep((64 * _K,), kernels=_AMPERE),
        Sweep((64 * _K,), dtypes=(_FP16,), kernels=_AMPERE, geometries=_BOTH[:1]),
    ),
    "sm90": (
        Sweep(_LONG[:1], kernels=_HOPPER),
        Sweep(_LONG[1:], kernels=_HOPPER),
        Sweep(_LONG[:1], dtypes=(_FP16,), kernels=_HOPPER),
        Sweep(
            _LONG[:1],
            _SKIPPING,
            inputs=("irregular",),
            kernels=("bsfa_sm90", "fa3"),
        ),
        Sweep(
            (2 * _K, 4 * _K, 8 * _K, 16 * _K, 32 * _K),
            (DENSE,),
            (_BF16, _FP16),
            kernels=_HOPPER,
            geometries=_BOTH[:1],
        ),
        Sweep(_LONG[:1], head_dims=(64,), kernels=_HOPPER),
        Sweep(_LONG[1:], dtypes=(_FP16,), kernels=_HOPPER),
        Sweep(_LONG[1:], head_dims=(64,), kernels=_HOPPER),
    ),
    # What docs/results.md shows, the default rule and geometry first.
    "results": (
        Sweep(
            _LONG[:1],
            _SKIPPING,
            rules=_DEFAULT_RULE,
            inputs=("irregular",),
            modes=_EVERY_MODE,
            kernels=_PEERS,
            geometries=_BOTH,
        ),
        Sweep(
            _LONG[1:],
            _SKIPPING,
            rules=_DEFAULT_RULE,
            inputs=("irregular",),
            modes=_EVERY_MODE,
            kernels=_PEERS,
            geometries=_BOTH[:1],
        ),
        Sweep(
            _LONG[:1],
            (DENSE, *_SKIPPING),
            head_dims=(256,),
            heads=(16,),
            kv_heads=(2,),
            rules=_DEFAULT_RULE,
            inputs=("irregular",),
            modes=_EVERY_MODE,
            kernels=_PEERS,
            geometries=_BOTH[:1],
        ),
        Sweep(
            (16 * _K,),
            (DENSE,),
            head_dims=(256,),
            heads=(16,),
            kv_heads=(2,),
            kernels=_PEERS,
            geometries=_BOTH[:1],
        ),
        Sweep(_LONG[:1], (DENSE, "0", *_SKIPPING), kernels=_PEERS, geometries=_BOTH[:1]),
        Sweep(_LONG[:1], _SKIPPING, inputs=("irregular",), kernels=_PEERS, geometries=_BOTH[:1]),
        Sweep(
            _LONG[:1],
            _SKIPPING,
            rules=_DEFAULT_RULE,
            kernels=_PEERS,
            geometries=_BOTH[:1],
        ),
        Sweep(_LONG[1:], (DENSE, *_SKIPPING), kernels=_PEERS, geometries=_BOTH[:1]),
        Sweep(
            tuple(n * _K for n in (2, 4, 8, 16, 32)),
            (DENSE,),
            kernels=_PEERS,
            geometries=_BOTH[:1],
        ),
        Sweep(
            _LONG[:1],
            (DENSE, *_SKIPPING),
            dtypes=(_FP16,),
            rules=_DEFAULT_RULE,
            inputs=("irregular",),
            modes=_EVERY_MODE,
            kernels=_PEERS,
            geometries=_BOTH[:1],
        ),
        Sweep(
            _LONG[:1],
            (DENSE, *_SKIPPING),
            head_dims=(64,),
            rules=_DEFAULT_RULE,
            inputs=("irregular",),
            modes=_EVERY_MODE,
            kernels=_PEERS,
            geometries=_BOTH[:1],
        ),
        Sweep(
            (4 * _K, 8 * _K),
            (DENSE, "0.64", "0.73", "0.83"),
            head_dims=(64,),
            heads=(9,),
            kv_heads=(3,),
            rules=_DEFAULT_RULE,
            inputs=("irregular",),
            kernels=(*_PEERS, "fa2"),
            geometries=_BOTH[:1],
        ),
    ),
    "full": (
        Sweep(tuple(n * _K for n in (2, 4, 8, 16, 32, 64, 128)), (*_SPARSITIES, "1")),
        Sweep((64 * _K,), _SPARSITIES, (_BF16, _FP16), (64, 128)),
        Sweep((64 * _K,), (DENSE, "0.5", "0.9"), kv_heads=(32, 8, 4, 1), geometries=_BOTH[:1]),
        Sweep((64 * _K,), (DENSE, "0.5", "0.9"), rules=bsfa_kernel.RULES[1:]),
        Sweep(
            (64 * _K,),
            ("0.5", "0.75", "0.9"),
            rules=bsfa_kernel.RULES,
            inputs=("irregular",),
            modes=_EVERY_MODE,
        ),
        Sweep(
            (16 * _K,), (DENSE, "0.5", "0.9"), batches=(1, 4), heads=(8, 32), geometries=_BOTH[:1]
        ),
    ),
}

# What --device cpu runs unless told otherwise.
_SELF_TEST = (
    Sweep((384,), (DENSE, "0.5"), heads=(4,), kv_heads=(2,), head_dims=(32,), dtypes=(_BF16,)),
)


@dataclass(frozen=True)
class Case:
    """Inputs, and what is measured on them."""

    shape: Shape
    inputs: str
    asked: str
    rule: str
    geometries: tuple[Geometry, ...]
    kernels: tuple[str, ...]
    modes: tuple[Mode, ...] = (EXACT,)

    def __str__(self) -> str:
        shape = self.shape
        return (
            f"{shape.seqlen} tokens, {shape.dtype_name}, head_dim {shape.head_dim}, "
            f"{shape.heads}/{shape.kv_heads} heads, batch {shape.batch}, {self.rule}, "
            f"{' and '.join(map(str, self.geometries))} blocks, "
            f"{self.inputs}, {' '.join(map(str, self.modes))}, {self.asked}"
        )

    @property
    def voters(self) -> tuple[int, ...]:
        """Numbers of voters that thresholds are needed for."""
        return tuple(dict.fromkeys(mode.voters for mode in self.modes))

    @property
    def model_file(self) -> Path | None:
        """Where the inputs come from if they are a real model's."""
        return None if self.inputs in ("planted", "irregular") else Path(self.inputs)

    def expected_seconds(self, timer_seconds: float, least: int) -> float:
        """A rough guess, for plans and budgets."""
        total = _ASSUMED_SECONDS_A_CASE
        share = 0.0 if self.asked == DENSE else float(self.asked)
        for name in self.kernels:
            rate = _ASSUMED_TFLOPS.get(name)
            if rate is None:
                continue
            ours = name.startswith("bsfa")
            seconds = self.shape.flops / rate / 1e12 * (1 - share / 2 if ours else 1)
            total += (4 * seconds + max(timer_seconds, least * seconds)) * (
                len(self.geometries) * len(self.modes) if ours else 1
            )
        return total


def cases(sweeps: tuple[Sweep, ...]) -> Iterator[Case]:
    """The cases of the sweeps, none twice, in an order in which neighbours compare."""
    seen: set[Case] = set()
    for sweep in sweeps:
        for seqlen, dtype, head_dim, heads, kv_heads, batch, kind, rule, asked in itertools.product(
            sweep.seqlens,
            sweep.dtypes,
            sweep.head_dims,
            sweep.heads,
            sweep.kv_heads,
            sweep.batches,
            sweep.inputs,
            sweep.rules,
            sweep.sparsities,
        ):
            if heads % kv_heads or (kind == "irregular" and asked == DENSE):
                continue
            shape = Shape(seqlen, heads, kv_heads, head_dim, batch, sweep.causal, dtype)
            # Irregular inputs are made for one geometry.
            groups = [(g,) for g in sweep.geometries] if kind == "irregular" else [sweep.geometries]
            for geometries in groups:
                # Where everything is kept there is nothing to select.
                modes = (EXACT,) if asked == DENSE else sweep.modes
                case = Case(shape, kind, asked, rule, geometries, sweep.kernels, modes)
                if case not in seen:
                    seen.add(case)
                    yield case


def make(case: Case, device: torch.device, *, seed: int) -> Problem:
    """The inputs of a case, with thresholds."""
    asked = None if case.asked == DENSE else float(case.asked)
    options: dict[str, Any] = {"rule": case.rule, "voters": case.voters}
    if case.model_file is not None:
        problem = inputs.from_model(
            case.model_file,
            asked,
            device,
            dtype=case.shape.dtype,
            geometries=case.geometries,
            **options,
        )
    elif case.inputs == "irregular":
        (geometry,) = case.geometries
        problem = inputs.irregular(
            case.shape, asked or 0.0, device, geometry=geometry, seed=seed, **options
        )
    else:
        problem = inputs.planted(
            case.shape, asked or 0.0, device, geometries=case.geometries, seed=seed, **options
        )
    if asked is None:
        keys = itertools.product(case.geometries, case.voters)
        problem.thresholds = dict.fromkeys(keys, inputs.keep_everything(problem))
        problem.same_as_dense = True
    return problem


def error(out: Tensor, expected: Tensor) -> float:
    """|out - expected| / |expected|, in float32; NaN wherever there is one."""
    difference = torch.linalg.vector_norm((out - expected).float())
    return float(difference / torch.linalg.vector_norm(expected.float()))


@dataclass
class Checks:
    """Compares each kernel with the float32 reference, once for each kind of call."""

    device: torch.device
    seed: int
    results: dict[tuple[object, ...], tuple[float | None, str]] = field(default_factory=dict)

    def dense(self, kernel: kernels.DenseKernel, shape: Shape) -> tuple[float | None, str]:
        """The error of a dense kernel, and why it must not be timed ("" if it may)."""
        return self._once(
            (kernel.name, self._small(shape)), lambda: self._check_dense(kernel, self._small(shape))
        )

    def ours(
        self, kernel: kernels.Bsfa, case: Case, geometry: Geometry, mode: Mode
    ) -> tuple[float | None, str]:
        """The error of a kernel of this project, and why it must not be timed ("" if it may)."""
        kind = case.inputs if case.inputs == "irregular" else "planted"
        sparsity = str(_CHECKED_SPARSITY)
        small = Case(self._small(case.shape), kind, sparsity, case.rule, (geometry,), (), (mode,))
        return self._once((kernel.name, small), lambda: self._check_ours(kernel, small))

    def _once(
        self, key: tuple[object, ...], check: Callable[[], tuple[float | None, str]]
    ) -> tuple[float | None, str]:
        if key not in self.results:
            try:
                self.results[key] = check()
            except (RuntimeError, NotImplementedError, ValueError) as reason:
                self.results[key] = None, " ".join(str(reason).split())[:300]
        return self.results[key]

    def _small(self, shape: Shape) -> Shape:
        return replace(shape, seqlen=min(shape.seqlen, _CHECKED_SEQLEN), batch=min(shape.batch, 2))

    def _check_dense(self, kernel: kernels.DenseKernel, shape: Shape) -> tuple[float | None, str]:
        problem = inputs.dense(shape, self.device, seed=self.seed)
        out = kernel.prepare(problem)()
        dtype = torch.bfloat16 if kernel.note(problem) == "in bfloat16" else shape.dtype
        visible = reference.visible_blocks(shape.seqlen, shape.seqlen, causal=shape.causal)
        mask = bsfa_kernel.pack_blocks(visible.expand(shape.batch, shape.heads, -1, -1))
        expected = _reference(problem, mask.to(self.device), _BOTH[0])
        return _verdict(error(out, expected.out), dtype)

    def _check_ours(self, kernel: kernels.Bsfa, case: Case) -> tuple[float | None, str]:
        problem = make(case, self.device, seed=self.seed)
        (geometry,), (mode,) = case.geometries, case.modes
        call, kept = kernel.prepare(problem, geometry, mode)
        # A verdict within rounding is free, and what depends on it is not compared. Two steps
        # attend to the very blocks that the first selects.
        if mode.selection == "exact":
            mask = bsfa_kernel.pack_blocks(_reference_mask(problem, geometry, mode))
            free = _within_rounding(problem, geometry, mode).any(-1)
        else:
            mask = _selected(kernel, problem, geometry, mode)
            free = torch.zeros_like(kept, dtype=torch.bool)
            if reason := wrong_verdicts(mask, problem, geometry, mode):
                return None, reason
        expected = _reference(problem, mask, geometry)
        others = kept != expected.kept
        if share := float((others & ~free).float().mean()):
            return None, f"{share:.1%} of the query blocks keep other blocks than the reference"
        same = (~others).repeat_interleave(geometry.q_block, dim=-1)[..., : case.shape.seqlen]
        rows = same.transpose(1, 2)  # [batch, seqlen, heads]
        return _verdict(error(call()[rows], expected.out[rows]), case.shape.dtype)


def _selected(kernel: kernels.Bsfa, problem: Problem, geometry: Geometry, mode: Mode) -> Tensor:
    """The block mask that a kernel's first step gives."""
    with _native.force_arch(kernel.arch):
        return bsfa_kernel.select_blocks(
            *(problem.q, problem.k, problem.thresholds[geometry, mode.voters]),
            causal=problem.shape.causal,
            rule=problem.rule,
            geometry=geometry,
            voters=mode.voters,
            precision=mode.selection,
        )


def wrong_verdicts(mask: Tensor, problem: Problem, geometry: Geometry, mode: Mode) -> str:
    """What is wrong with a selection, but for verdicts within rounding; "" if nothing is.

    Args:
        mask: block mask, int64 [batch, heads, q_blocks, words].
        problem: of a small size, with thresholds.
        geometry: of the blocks.
        mode: the precision that they were selected in, and of how many query rows one voted.
    """
    expected = _reference_mask(problem, geometry, mode)
    differs = bsfa_kernel.unpack_blocks(mask, expected.shape[-1]) != expected
    free = _unforced_blocks(problem.shape, geometry, mask.device)
    if bool((differs & ~free).any()):
        return "a forced block is not kept, or one that is not visible is"
    limit = _FLIPS
    if mode.selection == "exact":
        differs &= ~_within_rounding(problem, geometry, mode)
        limit = 0.0
    elif problem.inputs == "planted":  # all maxima are far from their thresholds
        limit = 0.0
    share = float(differs[..., free].float().mean())
    return f"{share:.2%} of the verdicts are not the reference's" if share > limit else ""


def _within_rounding(problem: Problem, geometry: Geometry, mode: Mode) -> Tensor:
    """Where exact verdicts are free: bool [batch, heads, q_blocks, k_blocks]."""
    maxima = reference.block_maxima(
        *(problem.q, problem.k),
        causal=problem.shape.causal,
        rule=problem.rule,
        geometry=geometry,
        voters=mode.voters,
        compute_dtype=torch.float32,
    )
    close = (maxima - problem.thresholds[geometry, mode.voters][:, :, None]).abs() <= _MARGIN
    return close & _unforced_blocks(problem.shape, geometry, close.device)


def _unforced_blocks(shape: Shape, geometry: Geometry, device: torch.device) -> Tensor:
    """The visible blocks on which there are verdicts: bool [q_blocks, k_blocks]."""
    options: dict[str, Any] = {"causal": shape.causal, "geometry": geometry}
    visible = reference.visible_blocks(shape.seqlen, shape.seqlen, **options)
    return (visible & ~reference.forced_blocks(shape.seqlen, shape.seqlen, **options)).to(device)


def _reference_mask(problem: Problem, geometry: Geometry, mode: Mode) -> Tensor:
    """The blocks that the reference selects: bool [batch, heads, q_blocks, k_blocks]."""
    found: Tensor = reference.select_blocks(
        *(problem.q.float(), problem.k.float(), problem.thresholds[geometry, mode.voters]),
        causal=problem.shape.causal,
        rule=problem.rule,
        geometry=geometry,
        voters=mode.voters,
        precision=mode.selection,
    ).mask
    return found


def _reference(problem: Problem, mask: Tensor, geometry: Geometry) -> Any:
    """What the reference computes in float32 over the blocks of a mask."""
    q, k, v = problem.q.float(), problem.k.float(), problem.v.float()
    options: dict[str, Any] = {"causal": problem.shape.causal, "geometry": geometry}
    return reference.attend_blocks(q, k, v, mask, **options)


def _verdict(measured: float, dtype: torch.dtype) -> tuple[float | None, str]:
    limit = ERROR_LIMIT[dtype]
    if measured <= limit:  # false for NaN
        return measured, ""
    return measured, f"its error is {measured:.2e}, more than {limit:.0e}"


@dataclass
class Entry:
    """A call to time, and what its record will say."""

    kernel: str
    call: Callable[[], Tensor]
    error: float | None
    sparsity: float = 0.0
    geometry: Geometry | None = None
    mode: Mode | None = None
    note: str = ""

    def __str__(self) -> str:
        parts = (self.kernel, self.geometry, self.mode if self.mode != EXACT else None)
        return " ".join(str(part) for part in parts if part is not None)


class Benchmark:
    """Runs cases and writes their records."""

    def __init__(self, device: torch.device, results: Results, timer: Timer, *, seed: int) -> None:
        """Prepare; nothing runs yet."""
        self.device = device
        self.results = results
        self.timer = timer
        self.seed = seed
        self.checks = Checks(device, seed)
        self.environment = environment(device)
        self.records: list[Record] = []
        self.rejected: dict[str, str] = {}
        self._cuda = device.type == "cuda"

    def run(self, case: Case) -> None:
        """Measure one case."""
        problem = make(case, self.device, seed=self.seed)
        case = replace(case, shape=problem.shape)
        dense = self._dense_entries(case, problem)
        ours = self._our_entries(case, problem, dense)
        entries = {str(entry): entry for entry in (*dense, *ours)}
        before = clocks(self.device)
        measured = self.timer.measure({name: entry.call for name, entry in entries.items()})
        after = clocks(self.device)
        for name, reason in measured.failures.items():
            self._reject(name, case, reason)
        baselines = {
            entries[name].kernel: timing.median
            for name, timing in measured.timings.items()
            if entries[name] in dense
        }
        for name, timing in measured.timings.items():
            entry = entries[name]
            record = self._record(case, problem, entry, timing.fields(), baselines)
            record["clocks"] = {"before": before, "after": after}
            self.results.append(record)
            self.records.append(record)
            ratios = ", ".join(f"{v:.2f}x {k}" for k, v in record["speedup"].items())
            progress(f"  {name:30} {timing.median:9.3f} ms  s={entry.sparsity:.3f}  {ratios}")

    def _dense_entries(self, case: Case, problem: Problem) -> list[Entry]:
        entries = []
        for kernel in kernels.DENSE if self._cuda else kernels.SELF_TEST_DENSE:
            if self._cuda and kernel.name not in case.kernels:
                continue
            if reason := kernel.available(case.shape, self.device):
                self._reject(kernel.name, case, reason)
                continue
            error, reason = self.checks.dense(kernel, case.shape)
            if reason:
                self._reject(kernel.name, case, reason)
                continue
            call = kernel.prepare(problem)
            entries.append(Entry(kernel.name, call, error, note=kernel.note(problem)))
        return entries

    def _our_entries(self, case: Case, problem: Problem, dense: list[Entry]) -> list[Entry]:
        entries: list[Entry] = []
        # What the outputs must be, where nothing that matters is skipped.
        expected = dense[0].call() if dense and problem.same_as_dense else None
        for kernel in kernels.OURS if self._cuda else (kernels.Bsfa(0),):
            if self._cuda and kernel.name not in case.kernels:
                continue
            for geometry, mode in itertools.product(case.geometries, case.modes):
                name = kernel.name if mode == EXACT else f"{kernel.name} {mode}"
                if reason := kernel.available(case.shape, self.device, mode.selection):
                    self._reject(name, case, reason)
                    continue
                error, reason = self.checks.ours(kernel, case, geometry, mode)
                if reason:
                    self._reject(name, case, reason)
                    continue
                try:
                    call, kept = kernel.prepare(problem, geometry, mode)
                    reason = self._compare(call(), expected)
                except (RuntimeError, NotImplementedError) as failure:
                    reason = " ".join(str(failure).split())[:300]
                if reason:
                    self._reject(name, case, reason)
                    continue
                sparsity = inputs.measured_sparsity(kept, case.shape, geometry)
                entries.append(Entry(kernel.name, call, error, sparsity, geometry, mode))
        if entries and problem.same_as_dense and problem.rule == "absolute" and self._cuda:
            entries += self._flashinfer(case, problem, entries[0].sparsity, expected)
        return entries

    def _flashinfer(
        self, case: Case, problem: Problem, sparsity: float, expected: Tensor | None
    ) -> list[Entry]:
        kernel = kernels.FlashInferSkipSoftmax()
        if kernel.name not in case.kernels:
            return []
        if reason := kernel.available(case.shape, self.device):
            self._reject(kernel.name, case, reason)
            return []
        skip_below = None if case.asked == DENSE else -inputs.PLANTED_SHIFT / 2
        try:
            call = kernel.prepare(problem, skip_below=skip_below)
            reason = self._compare(call(), expected)
        except Exception as failure:  # it compiles at run time, which fails in many ways
            reason = " ".join(str(failure).split())[:300]
        if reason:
            self._reject(kernel.name, case, reason)
            return []
        note = "the sparsity is that of the inputs"
        return [Entry(kernel.name, call, None, sparsity, note=note)]

    def _compare(self, out: Tensor, expected: Tensor | None) -> str:
        """Why an output at the timed size is wrong; "" where it is not, or nothing is known."""
        if expected is None:
            return ""
        difference = error(out, expected)
        limit = 2 * max(ERROR_LIMIT.values())
        if difference <= limit:
            return ""
        return f"at this size its output is {difference:.2e} from a dense kernel's"

    def _reject(self, kernel: str, case: Case, reason: str) -> None:
        if self.rejected.get(kernel) != reason:
            progress(f"  {kernel}: not timed: {reason}")
        self.rejected[kernel] = reason

    def _record(
        self,
        case: Case,
        problem: Problem,
        entry: Entry,
        timing: Record,
        baselines: dict[str, float],
    ) -> Record:
        shape = case.shape
        tflops = shape.flops / timing["ms"] / 1e9
        ours = entry.kernel.startswith("bsfa")
        return {
            **self.environment,
            "kind": "attention",
            "kernel": entry.kernel,
            **shape.fields(),
            "inputs": problem.inputs,
            "source": problem.source,
            "asked": case.asked,
            "sparsity": entry.sparsity,
            "rule": case.rule if ours else None,
            "geometry": str(entry.geometry) if entry.geometry else None,
            **(entry.mode._asdict() if entry.mode else {}),
            **timing,
            "tflops": tflops,
            "speedup": {
                name: ms / timing["ms"] for name, ms in baselines.items() if name != entry.kernel
            },
            "error": entry.error,
            "note": entry.note,
        }


def parse_sparsity(text: str) -> str:
    """A share from 0 to 1, or "dense"."""
    if text != DENSE and not 0.0 <= float(text) <= 1.0:
        raise ValueError(text)
    return share_text(text)


def parse_dtype(text: str) -> torch.dtype:
    """An element type by its name."""
    return _DTYPES[one_of(_DTYPES)(text)]


_DTYPES = {"bfloat16": _BF16, "float16": _FP16}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description="Time attention kernels against sparsity.",
        epilog="Lists are comma-separated, and replace those of every sweep of the preset.",
    )
    add = result.add_argument
    add("--preset", choices=PRESETS, default="quick", help="which sweeps (default %(default)s)")
    add("--seqlens", type=list_of(parse_length), help="such as 2K,64K")
    add("--sparsities", type=list_of(parse_sparsity), help="such as dense,0,0.5")
    add("--dtypes", type=list_of(parse_dtype), help="of bfloat16,float16")
    add("--head-dims", type=list_of(int))
    add("--heads", type=list_of(int))
    add("--kv-heads", type=list_of(int))
    add("--batches", type=list_of(int))
    add("--geometries", type=list_of(Geometry.parse), help="of 128x64,64x64")
    add(
        "--rules", type=list_of(one_of(bsfa_kernel.RULES)), help=f"of {','.join(bsfa_kernel.RULES)}"
    )
    add("--inputs", type=list_of(str), help="of planted,irregular and files of inputs.py")
    add("--modes", type=list_of(Mode.parse), help="of exact,int8,int8:2,int8:4 (:VOTERS)")
    add("--kernels", type=list_of(one_of(kernels.NAMES)), help=f"of {','.join(kernels.NAMES)}")
    add("--device", default="cuda", help="cuda, cuda:1, ..., or cpu for a self-test")
    add("--seed", type=int, default=0)
    add("--seconds", type=float, default=0.5, help="a kernel and case (default %(default)s)")
    add("--budget-seconds", type=float, help="start nothing that would end later than this")
    add("--list", action="store_true", help="list the cases and the expected time, and stop")
    add("--out", type=Path, help="result file (default benchmarks/results/PRESET.jsonl)")
    return result


def sweeps_of(arguments: argparse.Namespace) -> tuple[Sweep, ...]:
    """The sweeps of the preset, with what the command line replaces."""
    names = [field.name for field in fields(Sweep) if hasattr(arguments, field.name)]
    replaced = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    self_test = torch.device(arguments.device).type == "cpu"
    sweeps = _SELF_TEST if self_test else PRESETS[arguments.preset]
    return tuple(replace(sweep, **replaced) for sweep in sweeps)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status is 1 where a kernel of ours is wrong or missing."""
    arguments = parser().parse_args(argv)
    device = torch.device(arguments.device)
    if arguments.device == "cuda":
        device = torch.device("cuda", 0)
    timer_options: dict[str, Any] = {"seconds": arguments.seconds}
    if device.type == "cpu":
        timer_options = {"seconds": 0.0, "rounds": 1, "least": 2}
    chosen = list(cases(sweeps_of(arguments)))
    least = timer_options.get("least", 6)
    expected = [case.expected_seconds(arguments.seconds, least) for case in chosen]
    if arguments.list:
        for case, seconds in zip(chosen, expected, strict=True):
            print(f"{seconds:6.1f} s  {case}")
        print(f"{sum(expected):6.1f} s  {len(chosen)} cases (a rough guess, for an H100)")
        return 0
    arguments.out = out_of(parser(), arguments, arguments.preset)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser().error("there is no CUDA device; --device cpu is a self-test of this program")

    budget = Budget(arguments.budget_seconds)
    results = Results(arguments.out)
    benchmark = Benchmark(device, results, Timer(device, **timer_options), seed=arguments.seed)
    progress(str(bsfa_kernel.build_info()))
    left_out: list[Case] = []
    failed: list[str] = []
    for number, (case, seconds) in enumerate(zip(chosen, expected, strict=True), start=1):
        if not budget.allows(seconds):
            left_out.append(case)
            continue
        progress(f"[{number}/{len(chosen)}, {budget.spent:.0f} s] {case}")
        try:
            benchmark.run(case)
        except (RuntimeError, NotImplementedError) as failure:  # out of memory included
            failed.append(f"{case}: {' '.join(str(failure).split())[:300]}")
            progress(f"  failed: {failed[-1]}")
        if device.type == "cuda":
            torch.cuda.empty_cache()

    import report

    print(report.attention_tables(benchmark.records, self_test=device.type == "cpu"))
    for name, reason in benchmark.rejected.items():
        print(f"{name} was left out: {reason}")
    for message in failed:
        print(f"failed: {message}")
    for case in left_out:
        print(f"left out for the budget: {case}")
    print(f"{len(benchmark.records)} records in {arguments.out}, {budget.spent:.0f} s")
    ours_rejected = any(name.startswith("bsfa") for name in benchmark.rejected)
    return 1 if ours_rejected or failed or not benchmark.records else 0


if __name__ == "__main__":
    run_program(main)
