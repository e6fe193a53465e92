# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Time of a calibration beside that of dense prefill passes over the same samples.

Both read all samples several times, in turns, and medians are compared::

    python benchmarks/calibration.py --model MODEL --text TEXT --seqlen 8K --samples 4
    python benchmarks/calibration.py --model-shape llama-3.1-8b --seqlen 128K --samples 1
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bsfa_kernel
import models
from attention import list_of, parse_length
from bsfa_calib.capture import Settings, calibrate
from bsfa_kernel import Geometry
from harness import ROOT, Record, Results, clocks, environment, progress

# As long as a short sample; of a long one, first allocations are a small part.
_WARM_UP_TOKENS = 8192


def measure(
    model: Any,
    samples: list[list[int]],
    rule: str,
    geometry: Geometry,
    points: dict[str, Any],
    repetitions: int,
) -> Record:
    """Time both in turns, after a warm-up on the beginning of the first sample.

    Args:
        model: a model of transformers.
        samples: token ids.
        rule: what to calibrate.
        geometry: of the blocks.
        points: ``k_values`` or ``target_sparsities`` of `bsfa_calib.capture.Settings`.
        repetitions: passes over all samples, of each.

    Returns:
        The part of a record that was measured.
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
    return {
        "seqlen": len(samples[0]),
        "samples": len(samples),
        "rule": rule,
        "geometry": str(geometry),
        "points": ", ".join(f"{name}={list(values)}" for name, values in points.items()),
        "dense_seconds": dense_seconds,
        "calibration_seconds": calibration_seconds,
        "ratio": calibration_seconds / dense_seconds,
        "repetitions": repetitions,
        "dense_seconds_each": dense,
        "calibration_seconds_each": calibration,
        "peak_gib": peak,
    }


def _seconds(work: Callable[[], object]) -> float:
    """How long it takes; its last step waits for the device."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Time of a calibration, in dense prefill passes.")
    models.add_model_options(result)
    add = result.add_argument
    add("--seqlen", type=parse_length, default=8192, help="tokens a sample (default %(default)s)")
    add("--samples", type=int, default=4, help="(default %(default)s)")
    add("--rules", type=list_of(str), default=bsfa_kernel.RULES[:1])
    add("--geometries", type=list_of(Geometry.parse), default=(bsfa_kernel.DEFAULT_GEOMETRY,))
    add("--k-values", type=list_of(int), help="calibrate these k; target sparsities without")
    add("--target-sparsities", type=list_of(float), default=(0.5, 0.75, 0.9))
    add("--repetitions", type=int, default=3, help="of both, in turns (default %(default)s)")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "calibration.jsonl")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    if arguments.repetitions < 1:
        raise SystemExit(f"--repetitions must be at least 1, got {arguments.repetitions}")
    device = torch.device(arguments.device)
    model, tokenizer, name = models.load(arguments)
    samples = models.tokens(arguments, model, tokenizer, arguments.seqlen, arguments.samples)
    results = Results(arguments.out)
    points = (
        {"k_values": arguments.k_values}
        if arguments.k_values
        else {"target_sparsities": arguments.target_sparsities}
    )
    common = environment(device)
    for rule in arguments.rules:
        for geometry in arguments.geometries:
            progress(f"{name}, {arguments.samples} x {arguments.seqlen} tokens, {rule}, {geometry}")
            measured = measure(model, samples, rule, geometry, points, arguments.repetitions)
            record = {**common, "kind": "calibration", "model": name, **measured}
            results.append({**record, "clocks": clocks(device)})
            print(
                f"{rule}, {geometry}: dense {measured['dense_seconds']:.2f} s, calibration "
                f"{measured['calibration_seconds']:.2f} s, ratio {measured['ratio']:.2f}, "
                f"peak {measured['peak_gib']:.1f} GiB"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
