# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""One calibration by each method, and what is printed about it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from bsfa_calib import report
from bsfa_calib.cli.common import note
from bsfa_calib.cli.flags import TARGETS
from bsfa_calib.progress import ProgressReporter, clock
from bsfa_calib.report import printable
from bsfa_calib.thresholds import ThresholdTable

if TYPE_CHECKING:
    from bsfa_calib.expected import Calibrated
    from bsfa_calib.learned import ThresholdPath
    from bsfa_calib.text import Split
    from bsfa_kernel import Geometry

# A table, and the lines that say what to expect of it.
Made: TypeAlias = "tuple[ThresholdTable, Callable[[ThresholdTable], list[str]]]"


class Job:
    """One calibration, by the method that a name of its own stands for."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        model: Any,
        split: Split,
        geometry: Geometry,
        start: ThresholdTable | None,
        output: Path,
    ) -> None:
        self._arguments, self._model, self._geometry = arguments, model, geometry
        self._start = start
        self._samples = [window.ids for window in split.calibration]
        self._held_out = [window.ids for window in split.held_out]
        self._serving = [window.ids for window in split.serving]
        self._checkpoint = Path(arguments.checkpoint or f"{output}.checkpoint")
        self._learned = self._checkpoint / "learned.npz"
        self._served = self._checkpoint / "served.json"
        # What another method left in a folder of its choice is none of this one's business.
        learns = (arguments.method or "learned") == "learned" and not arguments.points_only
        self._own = (self._learned, self._served) if learns else (self._served,)
        if arguments.resume is False:
            self._remove()

    def learned(self) -> Made:
        from bsfa_calib import learned
        from bsfa_calib.learning import Settings

        arguments, geometry = self._arguments, self._geometry
        common: dict[str, Any] = {
            "target_sparsities": self._targets(),
            "max_losses": arguments.max_loss or (),
            "rule": arguments.rule,
            "geometry": geometry,
            "voters": arguments.voters,
            "progress": note,
        }
        with self._phase("learned"):
            path = learned.learn_path(
                self._model,
                self._samples,
                **common,
                settings=Settings(
                    steps=arguments.steps,
                    further_steps=arguments.further_steps,
                    knots=arguments.knots,
                    ceiling=arguments.ceiling,
                    seed=arguments.seed,
                ),
                start=self._start,
                serve_length=arguments.serve_length,
                checkpoint=self._learned,
            )
        if self._serving:
            return self._serve(learned.ThresholdPath(path), len(self._samples), "learned")
        found = learned.calibrate(
            self._model,
            learned.ThresholdPath(path),
            self._held_out,
            **common,
            backend=arguments.backend,
        )
        return self._measured(found, len(self._samples))

    def scalar(self) -> Made:
        from bsfa_calib import scalar
        from bsfa_calib.learned import check_points, serving_rungs
        from bsfa_calib.serving import path_of

        arguments, geometry = self._arguments, self._geometry
        targets = self._targets()
        if self._serving:
            check_points(targets, (), arguments.serve_length, geometry)
            targets = serving_rungs(targets, arguments.length, geometry)
        reporter = ProgressReporter()
        with reporter.interruptible():
            table = scalar.one_pass(
                self._model,
                self._samples,
                target_sparsities=targets,
                rule=arguments.rule,
                geometry=geometry,
                voters=arguments.voters,
                checkpoint=self._checkpoint,
                progress=reporter,
            )
        if self._serving:
            return self._serve(path_of(table), table.samples, table.aggregate)
        if not self._held_out:
            return table, _statistics
        found = scalar.measured(
            self._model, table, self._held_out, backend=arguments.backend, progress=note
        )
        return self._measured(found, table.samples)

    def topk(self) -> Made:
        from bsfa_calib import capture

        arguments, geometry = self._arguments, self._geometry
        settings = capture.Settings(
            k_values=arguments.k,
            rule=arguments.rule,
            geometry=geometry,
            voters=arguments.voters,
            aggregate=arguments.aggregate,
            keep_maxima=arguments.keep_maxima,
        )
        reporter = ProgressReporter()
        with reporter.interruptible():
            table = capture.calibrate(
                self._model,
                self._samples,
                settings,
                held_out=self._held_out,
                checkpoint=self._checkpoint,
                progress=reporter,
            )
        return table, _statistics

    def points(self) -> Made:
        from bsfa_calib import serving

        arguments = self._arguments
        assert self._start is not None
        reporter = ProgressReporter()
        with self._phase("found the points"), reporter.interruptible():
            found = serving.find_points(
                self._model,
                self._start,
                self._samples,
                target_sparsities=self._targets(min(map(len, self._samples))),
                max_losses=arguments.max_loss or (),
                backend=arguments.backend,
                checkpoint=self._checkpoint,
                reading=reporter,
                progress=reporter.note,
            )
        return self._measured(found, self._start.samples)

    def kept(self) -> str:
        """What an interrupted calibration leaves behind, for people."""
        samples = len(list(self._checkpoint.glob("sample-*.safetensors")))
        where = printable(str(self._checkpoint))
        if self._served.exists():
            done = "what was measured is"
        elif samples:
            done = f"{samples} samples are done and"
        elif self._learned in self._own and self._learned.exists():
            done = "what was learned is"
        else:
            return "nothing was done yet that could be kept."
        return f"{done} kept in {where}. The same command goes on from there."

    def clean_up(self) -> None:
        """Remove the checkpoint, unless it is to be kept."""
        if not self._arguments.keep_checkpoint:
            self._remove()

    def _remove(self) -> None:
        for old in (
            *self._checkpoint.glob("sample-*.safetensors"),
            *self._own,
        ):
            old.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._checkpoint.rmdir()

    def _targets(self, length: int | None = None) -> Sequence[float]:
        """The target sparsities: those given, or as prompts of a length leave room for."""
        arguments, geometry = self._arguments, self._geometry
        if arguments.target_sparsity or arguments.max_loss:
            return tuple(arguments.target_sparsity or ())
        length = length or arguments.serve_length or arguments.length
        return default_targets(length, geometry)

    def _serve(self, path: ThresholdPath, samples: int, aggregate: str) -> Made:
        """The points on a path at the serving length."""
        from bsfa_calib import serving

        arguments, geometry = self._arguments, self._geometry
        reporter = ProgressReporter()
        note(f"finding the points at {max(map(len, self._serving))} tokens")
        with self._phase("found the points"), reporter.interruptible():
            found = serving.serve(
                self._model,
                path,
                self._serving,
                made_at=max(map(len, self._samples)),
                target_sparsities=self._targets(),
                max_losses=arguments.max_loss or (),
                rule=arguments.rule,
                geometry=geometry,
                voters=arguments.voters,
                backend=arguments.backend,
                aggregate=aggregate,
                checkpoint=self._checkpoint,
                reading=reporter,
                progress=reporter.note,
            )
        return self._measured(found, samples)

    @contextlib.contextmanager
    def _phase(self, done: str) -> Iterator[None]:
        """Tell what is done in the end, its time, and the most GPU memory that it took."""
        import torch

        device = self._model.device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        begin = time.monotonic()
        yield
        told = f"{done} in {clock(time.monotonic() - begin)}"
        if on_gpu:
            told += f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB at most"
        note(told)

    def _measured(self, found: Calibrated, samples: int) -> Made:
        """The table of a calibration that was measured, and what is printed about it."""
        from bsfa_calib import expected

        def lines(_table: ThresholdTable) -> list[str]:
            apart = self._serving or self._held_out
            tested = apart or self._samples
            return [
                expected.report(found),
                f"measured on {len(tested)} samples of up to {max(map(len, tested))} tokens"
                + (" that nothing was made from" if apart else ""),
                *expected.verdict(found),
            ]

        return dataclasses.replace(found.table, samples=samples), lines


def default_targets(length: int, geometry: Geometry) -> tuple[float, ...]:
    """The sparsities that a table is for unless it is told, as far as a length leaves room.

    Raises:
        ValueError: it leaves room for none.
    """
    from bsfa_calib.learned import reachable

    rungs = reachable(length, geometry)
    targets = tuple(target for target in TARGETS if rungs and target <= rungs[-1])
    if not targets:
        raise ValueError(
            f"nothing to gain: of prompts of {length} tokens hardly a block can be skipped at all; "
            "calibrate for longer ones, or leave them dense"
        )
    return targets


def _statistics(table: ThresholdTable) -> list[str]:
    """What the statistics of a table say, in lines."""
    return [report.operating_points(table), *report.verdict(table)]
