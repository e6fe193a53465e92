# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Time of a calibration beside that of dense prefill passes over the same samples.

Both read all samples several times, in turns, and medians are compared. Each repetition leaves a
record, of which the last one counts::

    python benchmarks/calibration.py --model MODEL --text TEXT --seqlen 8K --samples 4
    python benchmarks/calibration.py --model-shape llama-3.1-8b --seqlen 128K --samples 1

With ``--method learned``, time and memory of each phase of what
``bsfa calibrate --length 4096 --serve-length 131072`` does; whatever is not said is as there::

    python benchmarks/calibration.py --model-shape llama-3.1-8b --method learned --serve-length 128K

Each phase leaves a record when it is done. Where fewer steps, samples or points are asked for than
the command takes, the record says so, and the time of all of them is computed, not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import bsfa_kernel
import models
from bsfa_calib import learned, learning, serving
from bsfa_calib.capture import Settings, block_counts, calibrate
from bsfa_calib.cli.flags import add_flags, complete
from bsfa_calib.cli.jobs import default_targets
from bsfa_calib.expected import Calibrated
from bsfa_kernel import Geometry
from harness import (
    Record,
    Results,
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

_T = TypeVar("_T")

# As long as a short sample; of a long one, first allocations are a small part.
_WARM_UP_TOKENS = 8192


def measure(
    model: Any,
    samples: list[list[int]],
    rule: str,
    geometry: Geometry,
    points: dict[str, Any],
    repetitions: int,
) -> Iterator[Record]:
    """Time both in turns, after a warm-up on the beginning of the first sample.

    Args:
        model: a model of transformers.
        samples: token ids.
        rule: what to calibrate.
        geometry: of the blocks.
        points: ``k_values`` or ``target_sparsities`` of `bsfa_calib.capture.Settings`.
        repetitions: passes over all samples, of each.

    Yields:
        After each repetition, the part of a record that was measured so far.
    """
    settings = Settings(rule=rule, geometry=geometry, **points)
    cuda = model.device.type == "cuda"
    warm_up = samples[0][:_WARM_UP_TOKENS]

    def dense_passes() -> None:
        for ids in samples:
            models.prefill(model, ids, use_cache=False)

    models.prefill(model, warm_up, use_cache=False)
    calibrate(model, [warm_up], settings)
    dense, calibration, peak = [], [], 0.0
    for _ in range(repetitions):
        dense.append(_seconds(dense_passes))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        calibration.append(_seconds(lambda: calibrate(model, samples, settings)))
        if cuda:
            peak = max(peak, torch.cuda.max_memory_allocated() / 2**30)
        dense_seconds, calibration_seconds = map(statistics.median, (dense, calibration))
        yield {
            "seqlen": len(samples[0]),
            "samples": len(samples),
            "rule": rule,
            "geometry": str(geometry),
            "points": ", ".join(f"{name}={list(values)}" for name, values in points.items()),
            "dense_seconds": dense_seconds,
            "calibration_seconds": calibration_seconds,
            "ratio": calibration_seconds / dense_seconds,
            "repetitions": len(dense),
            "dense_seconds_each": list(dense),
            "calibration_seconds_each": list(calibration),
            "peak_gib": peak,
        }


def _seconds(work: Callable[[], object]) -> float:
    """How long it takes; its last step waits for the device."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def command(arguments: argparse.Namespace) -> argparse.Namespace:
    """The flags of ``bsfa calibrate`` at these lengths, as it completes them.

    Raises:
        ValueError: the lengths do not go together.
    """
    flags = argparse.ArgumentParser()
    add_flags(flags)
    given = ["--model", "-", "--text", "-", "--serve-length", str(arguments.serve_length)]
    if arguments.length is not None:
        given += ["--length", str(arguments.length)]
    found = flags.parse_args(given)
    complete(found)
    found.geometry = Geometry.parse(found.geometry)
    return found


@dataclass(frozen=True)
class Work:
    """How much there is to do: in this run, or by the command.

    Attributes:
        samples: to learn from.
        steps: of the first sparsity.
        further_steps: of each other sparsity.
        serve_samples: to find points on.
        targets: the points.
    """

    samples: int
    steps: int
    further_steps: int
    serve_samples: int
    targets: tuple[float, ...]

    def steps_of(self, rungs: int) -> int:
        """Steps for so many sparsities."""
        return self.steps + (rungs - 1) * self.further_steps


class Phases:
    """The phases of a learned calibration, one after the other, with a record of each."""

    def __init__(
        self, arguments: argparse.Namespace, results: Results, device: torch.device
    ) -> None:
        """Load the model, in the dtype that the command learns in.

        Raises:
            ValueError: the lengths do not go together, or leave no room for a point.
        """
        asked = command(arguments)
        self._options = {
            "rule": asked.rule,
            "geometry": asked.geometry,
            "voters": asked.voters,
        }
        self._command = Work(
            asked.samples,
            asked.steps,
            asked.further_steps,
            asked.serve_samples,
            default_targets(asked.serve_length, asked.geometry),
        )
        self._here = Work(
            *(
                getattr(self._command, name) if value is None else value
                for name, value in (
                    ("samples", arguments.samples),
                    ("steps", arguments.steps),
                    ("further_steps", arguments.further_steps),
                    ("serve_samples", arguments.serve_samples),
                    ("targets", arguments.target_sparsities),
                )
            )
        )
        self._length, self._serve_length = asked.length, asked.serve_length
        learned.check_points(self._here.targets, (), self._serve_length, asked.geometry)
        self._seed, self._knots, self._ceiling = asked.seed, asked.knots, asked.ceiling
        self._rungs = learned.serving_rungs(
            self._command.targets, self._length, self._options["geometry"]
        )
        self.model, tokenizer, self.name = models.load(arguments)
        # Random tokens are others than those to learn from; text is read from its beginning, which
        # matters to the loss and not to the time.
        others = argparse.Namespace(**{**vars(arguments), "seed": arguments.seed + 1})
        self._samples = models.tokens(
            arguments, self.model, tokenizer, self._length, self._here.samples
        )
        self._serving = models.tokens(
            others, self.model, tokenizer, self._serve_length, self._here.serve_samples
        )
        self._results, self._device = results, device
        self._common = environment(device)

    def run(self, folder: Path) -> None:
        """Run every phase.

        Args:
            folder: for what the command keeps of finished work.

        Raises:
            RuntimeError: a phase did nothing: nothing was learned, or a point skips no block.
        """
        here, whole = self._here, self._command
        made = self._made(folder)
        counted = Settings(target_sparsities=whole.targets, **self._options)
        self._phase(
            *("block maxima", "sample", here.serve_samples, whole.serve_samples),
            lambda: block_counts(
                self.model, self._serving, counted, checkpoint=folder, progress=self._reading
            ),
        )
        self._phase(
            "points",
            "point of a sample",
            # A point that is named twice is found once.
            here.serve_samples * len(set(here.targets)),
            whole.serve_samples * len(whole.targets),
            lambda: self._points(made, folder),
            lambda found: {
                **_what_was_found(found),
                "passes": len(json.loads((folder / "served.json").read_text())["measured"]),
            },
        )

    def _made(self, folder: Path) -> list[learning.Learned]:
        """The phases at the short length, after a pass and a step that warm up."""
        learning.learn(
            self.model,
            self._samples[:1],
            self._rungs[:1],
            settings=learning.Settings(steps=1),
            **self._options,
        )
        here, whole, rungs = self._here, self._command, len(self._rungs)
        dense = self._phase(
            *("dense outputs", "sample", here.samples, whole.samples),
            lambda: learning.dense_outputs(self.model, self._samples),
        )
        return self._phase(
            *("learning", "step", here.steps_of(rungs), whole.steps_of(rungs)),
            lambda: self._learn(dense, folder),
            _what_was_learned,
        )

    def _learn(self, dense: learning.DenseOutputs, folder: Path) -> list[learning.Learned]:
        here = self._here
        return learned.learn_path(
            self.model,
            self._samples,
            target_sparsities=self._command.targets,
            settings=learning.Settings(
                steps=here.steps,
                further_steps=here.further_steps,
                knots=self._knots,
                ceiling=self._ceiling,
                seed=self._seed,
            ),
            serve_length=self._serve_length,
            dense=dense,
            checkpoint=folder / "learned.npz",
            progress=_told,
            **self._options,
        )

    def _points(self, made: Sequence[learning.Learned], folder: Path) -> Calibrated:
        return serving.serve(
            self.model,
            learned.ThresholdPath(made),
            self._serving,
            made_at=self._length,
            target_sparsities=self._here.targets,
            checkpoint=folder,
            progress=_told,
            **self._options,
        )

    def _reading(self, state: Any) -> None:
        if state.layer is None:
            _told(f"sample {state.sample} of {state.samples} is counted")

    def _phase(
        self,
        name: str,
        unit: str,
        done: int,
        whole: int,
        work: Callable[[], _T],
        result: Callable[[_T], Record] = lambda _: {},
    ) -> _T:
        """Run a phase and write its record.

        Args:
            name: of the phase.
            unit: what it goes through.
            done: how many of these in this run.
            whole: how many the command goes through.
            work: the phase.
            result: what else the record says of what came of it.
        """
        cuda = self._device.type == "cuda"
        progress(f"{name}: {done} of {whole}, by the {unit}")
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        begin = time.perf_counter()
        found = work()
        if cuda:
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - begin
        record = {
            **self._common,
            "kind": "calibration_phase",
            "model": self.name,
            "method": "learned",
            "seqlen": self._length,
            "serve_seqlen": self._serve_length,
            **self._options,
            "geometry": str(self._options["geometry"]),
            "work": asdict(self._here),
            "phase": name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "unit": unit,
            "done": done,
            "whole": whole,
            "seconds": seconds,
            "seconds_each": seconds / done,
            "whole_seconds_estimated": seconds / done * whole,
            "peak_gib": torch.cuda.max_memory_allocated(self._device) / 2**30 if cuda else 0.0,
            **result(found),
            "clocks": clocks(self._device),
        }
        self._results.append(record)
        print(
            f"{name}: {done} of {whole} ({unit}) in {seconds:.2f} s, {record['seconds_each']:.3f} "
            f"s each; all would take {record['whole_seconds_estimated']:.0f} s; "
            f"peak {record['peak_gib']:.1f} GiB",
            flush=True,
        )
        return found


def _what_was_learned(made: Sequence[learning.Learned]) -> Record:
    """Sparsity and divergence at each sparsity that was learned.

    Raises:
        RuntimeError: no threshold moved away from the others, no block was skipped, or a divergence
            is not finite.
    """
    for one in made:
        if not (math.isfinite(one.kl) and one.sparsity > 0 and np.ptp(one.thresholds) > 0):
            raise RuntimeError(
                f"nothing was learned for {one.target:g}: sparsity {one.sparsity:g}, KL divergence "
                f"{one.kl:g}, thresholds from {one.thresholds.min():g} to {one.thresholds.max():g}"
            )
    return {
        "asked": [one.target for one in made],
        "sparsity": [one.sparsity for one in made],
        "kl": [one.kl for one in made],
    }


def _what_was_found(found: Calibrated) -> Record:
    """Sparsity and divergence at each point.

    Raises:
        RuntimeError: no block is skipped, or a divergence is not finite.
    """
    for point, one in zip(found.table.points, found.expected, strict=True):
        if not (math.isfinite(one.kl) and one.sparsity > 0):
            raise RuntimeError(
                f"nothing is skipped at {point:g}: sparsity {one.sparsity:g}, KL divergence "
                f"{one.kl:g}"
            )
    return {
        "asked": list(found.table.points),
        "sparsity": [one.sparsity for one in found.expected],
        "kl": [one.kl for one in found.expected],
    }


def _told(message: str) -> None:
    progress(f"  {message}")


# Flags of one method alone.
_OWN = {
    "capture": ("seqlen", "rules", "geometries", "k_values", "repetitions"),
    "learned": ("length", "serve_length", "serve_samples", "steps", "further_steps"),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Time of a calibration, in dense prefill passes.")
    models.add_model_options(result)
    add = result.add_argument
    add("--method", default="capture", choices=("capture", "learned"))
    add("--samples", type=_positive, help="(default: 4; learned: the command's)")
    add(
        "--target-sparsities",
        type=list_of(parse_fraction),
        help="(default: 0.5,0.75,0.9; learned: all)",
    )
    add("--out", type=Path, help="records (default benchmarks/results/calibration.jsonl)")
    add = result.add_argument_group("capture").add_argument
    add("--seqlen", type=parse_length, default=8192, help="tokens a sample (default %(default)s)")
    add("--rules", type=list_of(one_of(bsfa_kernel.RULES)), default=bsfa_kernel.RULES[:1])
    add("--geometries", type=list_of(Geometry.parse), default=(bsfa_kernel.DEFAULT_GEOMETRY,))
    add("--k-values", type=list_of(int), help="calibrate these k; target sparsities without")
    add("--repetitions", type=int, default=3, help="of both, in turns (default %(default)s)")
    add = result.add_argument_group("learned; by default as bsfa calibrate").add_argument
    add("--length", type=parse_length, help="tokens of a sample to learn from")
    add("--serve-length", type=parse_length, default=131072, help="(default %(default)s)")
    add("--serve-samples", type=_positive, help="samples to find points on")
    add("--steps", type=_positive, help="for the first sparsity")
    add("--further-steps", type=_positive, help="for each other sparsity")
    return result


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    commands = parser()
    arguments = commands.parse_args(argv)
    for method, names in _OWN.items():
        for name in names:
            if method != arguments.method and vars(arguments)[name] != commands.get_default(name):
                flag = f"--{name.replace('_', '-')}"
                raise SystemExit(f"{flag} is for --method {method}, not {arguments.method}")
    if arguments.k_values and arguments.target_sparsities:
        raise SystemExit("--k-values and --target-sparsities exclude each other, got both")
    if arguments.repetitions < 1:
        raise SystemExit(f"--repetitions must be at least 1, got {arguments.repetitions}")
    device = torch.device(arguments.device)
    results = Results(out_of(commands, arguments, "calibration"))
    if arguments.method == "learned":
        with tempfile.TemporaryDirectory() as folder:
            Phases(arguments, results, device).run(Path(folder))
        return 0
    count = arguments.samples or 4
    model, tokenizer, name = models.load(arguments)
    samples = models.tokens(arguments, model, tokenizer, arguments.seqlen, count)
    points = (
        {"k_values": arguments.k_values}
        if arguments.k_values
        else {"target_sparsities": arguments.target_sparsities or (0.5, 0.75, 0.9)}
    )
    common, dtype = environment(device), str(model.dtype).removeprefix("torch.")
    for rule in arguments.rules:
        for geometry in arguments.geometries:
            progress(f"{name}, {count} x {arguments.seqlen} tokens, {rule}, {geometry}")
            asked = (model, samples, rule, geometry, points, arguments.repetitions)
            measured: Record = {}
            for measured in measure(*asked):
                record = {
                    **common,
                    "kind": "calibration",
                    "model": name,
                    "dtype": dtype,
                    **measured,
                }
                results.append({**record, "clocks": clocks(device)})
            print(
                f"{rule}, {geometry}: dense {measured['dense_seconds']:.2f} s, calibration "
                f"{measured['calibration_seconds']:.2f} s, ratio {measured['ratio']:.2f}, "
                f"peak {measured['peak_gib']:.1f} GiB"
            )
    return 0


if __name__ == "__main__":
    run_program(main)
