# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Run a study: every candidate at every sparsity, on contexts that it was not made from."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bsfa_calib import models
from bsfa_calib.hook import BlockSparse, Method, applied
from bsfa_calib.language_model import LanguageModel, Predictions
from bsfa_calib.learned import LADDER
from bsfa_calib.text import Window, read_windows
from bsfa_calib.thresholds import ThresholdTable
from bsfa_kernel import build_info
from bsfa_kernel.geometry import forced_share
from harness import Budget, Results, environment, out_of, progress
from study.candidates import (
    LEARNED,
    PAPER_SAMPLES,
    PAPER_SPARSITIES,
    SPARSITIES,
    TABLES,
    Candidate,
    Thresholds,
    chosen_candidates,
)
from study.compare import Point, compared
from study.emulation import EmulatedSparse
from study.report import earlier, plain, plot, report, table
from study.tables import COARSE

_DESCRIPTION = "Which thresholds lose least at equal sparsity, on a real model and held-out text."


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = _arguments()
    if not arguments.report:
        return compare(arguments)
    for path in arguments.report:
        print(report(path))
        if arguments.plot is not None:
            plot(path, arguments.plot / f"{path.stem}.png")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Compare the candidates that the arguments name; returns the exit status."""
    budget = Budget(arguments.seconds)
    torch.set_flush_denormal(True)  # a CPU is slow at weights that are almost 0
    # Heads are profiled in float32, whatever the candidates are compared in: gradients are small.
    loaded = models.load(arguments.model, dtype="float32", device=arguments.device)
    language_model = LanguageModel(loaded.model)
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
    contexts = [window.ids for window in calibration]
    source = Thresholds(arguments, loaded.model, contexts, budget, native)
    source.reduced(dtype)
    dense = dense_predictions(language_model, windows)
    progress(f"dense done; {budget.spent:.0f} s")
    about = {
        "schema": 1,
        "kind": "thresholds_study",
        **environment(device),
        "model": models.identity(arguments.model, loaded.model)[0],
        "dtype": dtype,
        "backend": "native" if native else "emulation",
        "seqlen": arguments.length,
        "calibration_contexts": [window.name for window in calibration],
        "contexts": [window.name for window in windows],
        "paper_samples": arguments.paper_samples,
        "draws": arguments.draws,
        "steps": [arguments.steps, arguments.further_steps],
    }
    results, written = earlier(arguments.out, about), Results(arguments.out)
    longest = 0.0
    for candidate in arguments.chosen:
        if not budget.allows(longest):
            progress(f"time is up: {candidate.name} and what follows are left out")
            break
        begin = time.monotonic()
        known = {point.asked for point in results.get(candidate.name, [])}
        targets = _targets(candidate, arguments, known)
        for asked, method in _methods(source, candidate, targets, known, native):
            point = run_point(language_model, method, windows, dense, asked)
            results.setdefault(candidate.name, []).append(point)
            written.append(_record(about, candidate, point))
        longest = max(longest, time.monotonic() - begin)
        progress(f"{candidate.name}; {budget.spent:.0f} s")
    summary = compared(results, len(windows))
    written.append({**about, "kind": "thresholds_study_summary", "compared": plain(summary)})
    print(table(results, summary, [window.kind for window in windows]))
    return 0


def dense_predictions(
    language_model: LanguageModel, windows: Sequence[Window]
) -> list[tuple[Predictions, float]]:
    """Dense predictions of each context, and their negative log-likelihood."""
    dense = []
    with applied(language_model.model, None):
        for window in windows:
            expected = language_model.predict(window.ids)
            bands = language_model.compare(expected, expected, window.ids)
            nll = sum(b.nll * b.positions for b in bands) / (len(window.ids) - 1)
            dense.append((expected, nll))
    return dense


def _targets(candidate: Candidate, arguments: argparse.Namespace, known: set[float]) -> list[float]:
    """Sparsities that a candidate is still to be run at, of those that can be reached."""
    wanted: Sequence[float] = arguments.sparsities
    if candidate.variant in TABLES:
        wanted = PAPER_SPARSITIES
    elif candidate.variant == "table":
        wanted = ThresholdTable.load(candidate.name).points
    most = 0.98 * (1 - forced_share(arguments.length, arguments.length, COARSE))
    targets = [share for share in wanted if share < most and share not in known]
    if candidate.variant not in LEARNED and not targets and not known:
        progress(f"{candidate.name}: none of {wanted} can be skipped of so few tokens")
    return targets


def _methods(
    source: Thresholds,
    candidate: Candidate,
    targets: Sequence[float],
    known: set[float],
    native: bool,
) -> Iterator[tuple[float, Method]]:
    """What runs a candidate at each sparsity that is not known yet."""
    for asked, values in source.of(candidate, targets):
        if asked in known:
            continue
        if native and candidate.order == "last_first":
            how = (candidate.rule, candidate.geometry)
            yield asked, BlockSparse(values, *how, voters=candidate.voters)
        else:
            emulated = (candidate.rule, candidate.geometry, candidate.order, candidate.voters)
            yield asked, EmulatedSparse(values, *emulated)


def _record(about: dict[str, Any], candidate: Candidate, point: Point) -> dict[str, Any]:
    return {
        **about,
        "candidate": candidate.name,
        "rule": candidate.rule,
        "geometry": str(candidate.geometry),
        "voters": candidate.voters,
        "order": candidate.order,
        "asked": point.asked,
        "sparsity": point.sparsity.tolist(),
        "kl": point.kl.tolist(),
        "nll_change": point.nll.tolist(),
    }


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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
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
        "--out", type=Path, help="records (default benchmarks/results/thresholds_study.jsonl)"
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
        arguments.out = out_of(parser, arguments, "thresholds_study")
    return arguments
