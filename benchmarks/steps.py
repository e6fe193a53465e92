# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Speed of ``select_blocks`` and ``attend_blocks`` alone, beside a dense kernel.

Each is checked against the reference at a small size before it is timed. Blocks are selected on
irregular inputs (``inputs.py``), by every number of voters; attention is over random masks::

    python benchmarks/steps.py --seqlens 64K,128K --out benchmarks/results/steps.jsonl

``--device cpu`` runs the reference back end on small inputs: a test of this program, and no
measurement.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bsfa_kernel
import inputs
import kernels
from attention import (
    ERROR_LIMIT,
    error,
    parse_dtype,
    wrong_verdicts,
)
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
    parse_fraction,
    parse_length,
    progress,
    run_program,
)
from inputs import Problem, Shape

SELECT, ATTEND = "select_blocks", "attend_blocks"
KEPT = (1.0, 0.5, 0.25, 0.1, 0.05)

# Of the visible blocks, skipped by what is selected; it hardly matters to the time.
_SKIPPED = 0.9
# Where about as many unforced blocks are to be kept as skipped, a wrong verdict is seen.
_CHECKED_SKIPPED = 0.5
_CHECKED_SEQLEN = 1000


@dataclass
class Entry:
    """A call to time, and what its record will say."""

    kernel: str
    call: Callable[[], Tensor]
    kind: str = ""
    facts: Record | None = None
    share: float = 1.0
    """Of a dense kernel's operations, those that this call does."""

    def __str__(self) -> str:
        facts = self.facts or {}
        shown = (facts[name] for name in ("precision", "voters", "asked") if name in facts)
        return " ".join(map(str, (self.kernel, self.kind, *shown))).strip()


class Benchmark:
    """Measures shapes and writes their records."""

    def __init__(self, arguments: argparse.Namespace, results: Results, timer: Timer) -> None:
        """Prepare; nothing runs yet."""
        self.arguments, self.results, self.timer = arguments, results, timer
        self.device = timer.device
        self.environment = environment(self.device)
        self.records: list[Record] = []
        self.rejected: dict[str, str] = {}
        self._sound: dict[tuple[object, ...], str] = {}

    def run(self, shape: Shape) -> None:
        """Measure both steps of one shape."""
        geometry = self.arguments.geometry
        problem = self._problem(shape, _SKIPPED)
        cuda = self.device.type == "cuda"
        dense = []
        for kernel in kernels.DENSE if cuda else kernels.SELF_TEST_DENSE:
            if kernel.name not in ("fa3", "cudnn", "math"):
                continue
            if reason := kernel.available(shape, self.device):
                self._reject(kernel.name, reason)
                continue
            dense.append(Entry(kernel.name, kernel.prepare(problem)))
        ours = []
        for each in kernels.OURS if cuda else (kernels.Bsfa(0),):
            for step, entries_of in ((SELECT, self._selecting), (ATTEND, self._attending)):
                if reason := each.lacks({step}, shape, self.device):
                    self._reject(f"{each.name} {step}", reason)
                    continue
                for entry in entries_of(each, problem, geometry):
                    if reason := self._check(each, entry, shape):
                        self._reject(str(entry), reason)
                    else:
                        ours.append(entry)
        for entry in ours:
            self._measure(entry, dense, shape, geometry)

    def _measure(
        self, entry: Entry, dense: Sequence[Entry], shape: Shape, geometry: Geometry
    ) -> None:
        """Measure an entry in turns with the dense kernels alone.

        Among many entries, a dense kernel would have its turn behind one that draws less power,
        and be up to a tenth faster than beside the entry that it is compared with.
        """
        before = clocks(self.device)
        measured = self.timer.measure({str(each): each.call for each in (*dense, entry)})
        after = clocks(self.device)
        for name, reason in measured.failures.items():
            self._reject(name, reason)
        timings = measured.timings
        if str(entry) not in timings:
            return
        timing = timings[str(entry)]
        ms = timing.median
        times = {e.kernel: timings[str(e)].median for e in dense if str(e) in timings}
        record = {
            **self.environment,
            "kind": entry.kind,
            "kernel": entry.kernel,
            **shape.fields(),
            "geometry": str(geometry),
            **(entry.facts or {}),
            **timing.fields(),
            "tflops": shape.flops * entry.share / ms / 1e9,
            "of_dense": {other: ms / dense_ms for other, dense_ms in times.items()},
            "rate": {other: dense_ms * entry.share / ms for other, dense_ms in times.items()},
            "clocks": {"before": before, "after": after},
        }
        self.results.append(record)
        self.records.append(record)
        shown = ", ".join(f"{v:.3f} of {k}'s rate" for k, v in record["rate"].items())
        progress(f"  {entry!s:40} {ms:9.3f} ms  {shown}")

    def _problem(self, shape: Shape, skipped: float) -> Problem:
        return inputs.irregular(
            shape,
            skipped,
            self.device,
            geometry=self.arguments.geometry,
            rule=self.arguments.rule,
            voters=bsfa_kernel.VOTERS,
            seed=self.arguments.seed,
        )

    def _selecting(
        self, kernel: kernels.Bsfa, problem: Problem, geometry: Geometry
    ) -> Iterator[Entry]:
        for precision, voters in itertools.product(self.arguments.precisions, bsfa_kernel.VOTERS):
            options: dict[str, Any] = {
                "causal": problem.shape.causal,
                "rule": problem.rule,
                "geometry": geometry,
                "voters": voters,
                "precision": precision,
            }
            thresholds = problem.thresholds[geometry, voters]

            def call(options: Any = options, thresholds: Tensor = thresholds) -> Tensor:
                with _native.force_arch(kernel.arch):
                    return bsfa_kernel.select_blocks(problem.q, problem.k, thresholds, **options)

            facts = {"rule": problem.rule, "precision": precision, "voters": voters}
            yield Entry(kernel.name, call, SELECT, facts, 0.5 / voters)

    def _attending(
        self, kernel: kernels.Bsfa, problem: Problem, geometry: Geometry
    ) -> Iterator[Entry]:
        for kept in self.arguments.kept:
            mask, share = random_mask(problem.shape, kept, geometry, self.device)

            def call(mask: Tensor = mask) -> Tensor:
                with _native.force_arch(kernel.arch):
                    return bsfa_kernel.attend_blocks(
                        *(problem.q, problem.k, problem.v, mask),
                        causal=problem.shape.causal,
                        geometry=geometry,
                    )

            facts = {"asked": f"{kept:g}", "kept": share}
            yield Entry(kernel.name, call, ATTEND, facts, share)

    def _check(self, kernel: kernels.Bsfa, entry: Entry, shape: Shape) -> str:
        """Why a call must not be timed; "" if it may."""
        facts = {k: v for k, v in (entry.facts or {}).items() if k != "kept"}
        small = replace(shape, seqlen=min(shape.seqlen, _CHECKED_SEQLEN))
        key = (kernel.name, entry.kind, small, *facts.values())
        if key not in self._sound:
            problem = self._problem(small, _CHECKED_SKIPPED)
            steps = {SELECT: self._selecting, ATTEND: self._attending}
            same = steps[entry.kind](kernel, problem, self.arguments.geometry)
            (call,) = [e.call for e in same if str(e) == str(entry)]
            try:
                self._sound[key] = self._wrong(entry.kind, call(), problem, facts)
            except (RuntimeError, NotImplementedError) as failure:
                self._sound[key] = " ".join(str(failure).split())[:300]
        return self._sound[key]

    def _wrong(self, kind: str, found: Tensor, problem: Problem, facts: Record) -> str:
        """What is wrong with a result of the small size."""
        geometry, shape = self.arguments.geometry, problem.shape
        if kind == SELECT:
            return wrong_verdicts(
                found, problem, geometry, kernels.Mode(facts["precision"], facts["voters"])
            )
        options: dict[str, Any] = {"causal": shape.causal, "geometry": geometry}
        q, k, v = problem.q.float(), problem.k.float(), problem.v.float()
        mask, _ = random_mask(shape, float(facts["asked"]), geometry, self.device)
        off = error(found, reference.attend_blocks(q, k, v, mask, **options).out)
        limit = ERROR_LIMIT[shape.dtype]
        return "" if off <= limit else f"its error is {off:.2e}, more than {limit:.0e}"

    def _reject(self, name: str, reason: str) -> None:
        if self.rejected.get(name) != reason:
            progress(f"  {name}: not timed: {reason}")
        self.rejected[name] = reason


def random_mask(
    shape: Shape, kept: float, geometry: Geometry, device: torch.device
) -> tuple[Tensor, float]:
    """A block mask that keeps each visible block with a probability, and forced ones.

    Returns:
        The mask, and the share of the visible blocks that it keeps.
    """
    options: dict[str, Any] = {"causal": shape.causal, "geometry": geometry}
    visible = reference.visible_blocks(shape.seqlen, shape.seqlen, **options).to(device)
    forced = reference.forced_blocks(shape.seqlen, shape.seqlen, **options).to(device)
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.batch, shape.heads, *visible.shape)
    chosen = torch.rand(size, generator=generator, device=device) < kept
    chosen = (chosen | forced) & visible
    count = int(visible.sum()) * shape.batch * shape.heads
    return bsfa_kernel.pack_blocks(chosen), float(chosen.sum(dtype=torch.int64)) / count


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Time select_blocks and attend_blocks alone.")
    add = result.add_argument
    add("--seqlens", type=list_of(parse_length), default=(65536,), help="such as 64K,128K")
    add("--dtype", type=parse_dtype, default=torch.bfloat16)
    add("--head-dims", type=list_of(int), default=(128,))
    add("--heads", type=int, default=32)
    add("--kv-heads", type=int, default=8)
    add("--geometry", type=Geometry.parse, default=bsfa_kernel.DEFAULT_GEOMETRY)
    add("--rule", type=one_of(bsfa_kernel.RULES), default="peak_lse")
    add("--precisions", type=list_of(one_of(bsfa_kernel.PRECISIONS)), default=("int8",))
    add("--kept", type=list_of(parse_fraction), default=KEPT, help="shares of the blocks in a mask")
    add("--device", default="cuda", help="cuda, or cpu for a self-test")
    add("--seed", type=int, default=0)
    add("--seconds", type=float, default=0.5, help="a call and shape (default %(default)s)")
    add("--budget-seconds", type=float, help="start no shape after this time")
    add("--out", type=Path, help="records (default benchmarks/results/steps.jsonl)")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status is 1 where a kernel of ours is wrong or missing."""
    arguments = parser().parse_args(argv)
    arguments.out = out_of(parser(), arguments, "steps")
    device = torch.device(arguments.device)
    options: dict[str, Any] = {"seconds": arguments.seconds}
    if device.type == "cpu":
        options = {"seconds": 0.0, "rounds": 1, "least": 2}
    budget = Budget(arguments.budget_seconds)
    benchmark = Benchmark(arguments, Results(arguments.out), Timer(device, **options))
    for seqlen, head_dim in itertools.product(arguments.seqlens, arguments.head_dims):
        if not budget.allows():
            print(f"left out for the budget: {seqlen} tokens, head_dim {head_dim}")
            continue
        shape = Shape(seqlen, arguments.heads, arguments.kv_heads, head_dim, dtype=arguments.dtype)
        progress(f"[{budget.spent:.0f} s] {seqlen} tokens, head_dim {head_dim}")
        benchmark.run(shape)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for name, reason in benchmark.rejected.items():
        print(f"{name} was left out: {reason}")
    print(f"{len(benchmark.records)} records in {arguments.out}, {budget.spent:.0f} s")
    ours_rejected = any(name.startswith("bsfa") for name in benchmark.rejected)
    return 1 if ours_rejected or not benchmark.records else 0


if __name__ == "__main__":
    run_program(main)
