# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""How sure is a selection in 8 bits? On the queries and keys of a real model.

How far a peak is off, in nats (units of scaled scores); how many verdicts are other than those on
exact scores; and what both selections cost at equal thresholds, as the KL divergence of the model's
predictions from dense. Thresholds are one scalar at each share of blocks, found in one pass over
the first half of the texts; everything else is measured on the second::

    python benchmarks/selection_study.py --model MODEL --text DIR --length 4096 --contexts 6

On a CPU the reference computes everything: keep to a thousand tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bsfa_kernel
from bsfa_calib import models
from bsfa_calib.hook import BlockSparse, applied, attention_shape
from bsfa_calib.language_model import LanguageModel
from bsfa_calib.scalar import one_pass
from bsfa_calib.text import read_windows
from bsfa_kernel import Geometry
from bsfa_kernel.reference import excesses
from bsfa_kernel.reference.scores import in_blocks, score_chunks
from harness import (
    Record,
    Results,
    environment,
    list_of,
    one_of,
    out_of,
    parse_fraction,
    progress,
    run_program,
)
from study.emulation import refuse_sinks
from study.run import dense_predictions, run_point

SELECTIONS = ("exact", "int8")

# Errors are counted in bins of this width; the last one takes what is larger.
_BIN, _BINS = 1 / 1024, 8192


class Rounding:
    """A method (see ``bsfa_calib.hook.Method``) that looks on: what rounding does to verdicts.

    Attributes:
        flips: float64 [voters, thresholds], verdicts that differ.
        verdicts: how many there were of each.
    """

    def __init__(self, thresholds: Tensor, rule: str, geometry: Geometry) -> None:
        """Nothing seen yet.

        Args:
            thresholds: float32 [voters, thresholds], scalars for each of ``bsfa_kernel.VOTERS``.
            rule: one of ``bsfa_kernel.RULES``.
            geometry: the sparsity block.
        """
        self._thresholds, self._rule, self._geometry = thresholds, rule, geometry
        device = thresholds.device
        self.flips = torch.zeros(thresholds.shape, dtype=torch.float64, device=device)
        self.verdicts = 0
        self._counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self._squares = torch.zeros((), dtype=torch.float64, device=device)
        self._largest = torch.zeros((), device=device)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        scale: float,
        sinks: Tensor | None = None,
    ) -> None:
        """See ``Method``.

        Raises:
            ValueError: the layer has sinks.
        """
        refuse_sinks(sinks)
        options: dict[str, Any] = {
            "causal": True,
            "scale": scale,
            "geometry": self._geometry,
            "dtype": torch.float32,
        }
        exact = score_chunks(q, k, **options)
        # For the absolute rule, so that peaks can be compared; for the others they shift alike.
        rounded = score_chunks(q, k, **options, rounded_for="absolute")
        for (block, _, scores), (_, _, others) in zip(exact, rounded, strict=True):
            if not block.full_blocks:
                continue
            peaks, moved = (in_blocks(x, block.k_block).amax(-1) for x in (scores, others))
            free = slice(block.full_blocks)
            error = (moved - peaks)[..., free].abs()
            self._squares += error.double().square().sum()
            self._largest = torch.maximum(self._largest, error.max())
            bins = (error / _BIN).long().clamp_(max=_BINS - 1).flatten()
            self._counts += torch.bincount(bins, minlength=_BINS)
            for index, voters in enumerate(bsfa_kernel.VOTERS):
                voting = block.voting(voters)
                found, other = (
                    excesses(x[:, :, voting], rule=self._rule)[..., free, None]
                    >= self._thresholds[index]
                    for x in (peaks, moved)
                )
                self.flips[index] += (found != other).sum((0, 1, 2))
            self.verdicts += peaks.shape[0] * peaks.shape[1] * block.full_blocks

    def error(self) -> dict[str, float]:
        """Of a peak, in nats: root mean square, 999 of 1000, and the largest."""
        total = int(self._counts.sum())
        place = int(torch.searchsorted(self._counts.cumsum(0), int(0.999 * total)))
        largest = float(self._largest)
        return {
            "rms": float(self._squares / total) ** 0.5,
            "p999": min((place + 1) * _BIN, largest),
            "largest": largest,
        }


def study(arguments: argparse.Namespace) -> Iterator[Record]:
    """Measure, and give each record when it is known: one a number of voters and share."""
    loaded = models.load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    language_model = LanguageModel(loaded.model)
    device = language_model.device
    calibration, windows = (
        read_windows(
            arguments.text, loaded.tokenizer, length=arguments.length, count=count, part=part
        )
        for count, part in (
            (arguments.calibration_contexts, (0.0, 0.5)),
            (arguments.contexts, (0.5, 1.0)),
        )
    )
    how: dict[str, Any] = {"rule": arguments.rule, "geometry": arguments.geometry}
    scalars = []
    for voters in bsfa_kernel.VOTERS:
        table = one_pass(
            loaded.model,
            [window.ids for window in calibration],
            target_sparsities=arguments.sparsities,
            voters=voters,
            **how,
        )
        finite = np.where(np.isneginf(table.thresholds), np.nan, table.thresholds)
        scalars.append(np.nanmax(finite, axis=(1, 2, 3)))
        progress(f"one row in {voters} votes: scalars {np.round(scalars[-1], 3).tolist()}")
    thresholds = torch.tensor(np.stack(scalars), dtype=torch.float32, device=device)
    looking = Rounding(thresholds, **how)
    with torch.inference_mode(), applied(loaded.model, looking):
        for window in windows:
            language_model.predict(window.ids)
    error = looking.error()
    progress(f"error of a peak: {error}")
    flips = (looking.flips / looking.verdicts).cpu()
    dense = dense_predictions(language_model, windows)
    about = {
        "kind": "selection_study",
        **environment(device),
        "model": models.identity(arguments.model, loaded.model)[0],
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "seqlen": arguments.length,
        "contexts": [window.name for window in windows],
        "calibration_contexts": [window.name for window in calibration],
        "rule": arguments.rule,
        "geometry": str(arguments.geometry),
        "peak_error": error,
    }
    for index, voters in enumerate(bsfa_kernel.VOTERS):
        for point, asked in enumerate(arguments.sparsities):
            values = thresholds[index, point].expand(*attention_shape(loaded.model), 1)
            values = values.contiguous()
            points = {}
            for selection in SELECTIONS:
                method = BlockSparse(values, **how, voters=voters, selection=selection)
                points[selection] = run_point(language_model, method, windows, dense, asked)
            record = {
                **about,
                "voters": voters,
                "asked": asked,
                "flips": float(flips[index, point]),
                "sparsity": {name: one.sparsity.tolist() for name, one in points.items()},
                "kl": {name: one.kl.tolist() for name, one in points.items()},
            }
            yield record
            progress(
                f"1 in {voters}, {asked:g}: {record['flips']:.4%} of the verdicts differ; skipped "
                + ", KL ".join(
                    f"{np.mean(one.sparsity):.4f} {name} {np.mean(one.kl):.5f}"
                    for name, one in points.items()
                )
            )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="What a selection in 8 bits changes.")
    add = result.add_argument
    add("--model", required=True)
    add("--text", type=Path, required=True, help="a folder a kind")
    add("--length", type=int, default=4096)
    add("--contexts", type=int, default=6)
    add("--calibration-contexts", type=int, default=3)
    add("--sparsities", type=list_of(parse_fraction), default=(0.5, 0.75, 0.9), help="as 0.5,0.75")
    add("--rule", type=one_of(bsfa_kernel.RULES), default="peak_lse")
    add("--geometry", type=Geometry.parse, default=bsfa_kernel.DEFAULT_GEOMETRY)
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--device", default="auto")
    add("--out", type=Path, help="records (default benchmarks/results/selection_study.jsonl)")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    arguments.out = out_of(parser(), arguments, "selection_study")
    results = Results(arguments.out)
    written = 0
    for record in study(arguments):
        results.append(record)
        written += 1
    print(f"{written} records in {arguments.out}")
    return 0


if __name__ == "__main__":
    run_program(main)
