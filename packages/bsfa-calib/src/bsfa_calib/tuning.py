# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Find the scalar that skips a share of the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bsfa_calib.hook import BlockSparse, applied, attention_shape
from bsfa_calib.language_model import LanguageModel
from bsfa_calib.thresholds import ThresholdTable
from bsfa_kernel import DEFAULT_GEOMETRY, Geometry
from bsfa_kernel.geometry import forced_share

# Scalars are looked for up to this far from 0, in units of scaled scores.
_REACH = 64.0


class TuningError(ValueError):
    """No operating point satisfies what was asked for; the message says what can be had."""


class FoundScalar(NamedTuple):
    """A threshold and what it does.

    Attributes:
        threshold: in units of scaled scores.
        sparsity: share of blocks that it skipped on the samples.
    """

    threshold: float
    sparsity: float


def find_scalar(
    model: Any,
    samples: Sequence[Sequence[int]],
    *,
    rule: str,
    target_sparsity: float,
    geometry: Geometry = DEFAULT_GEOMETRY,
    voters: int = 1,
    selection: str = "exact",
    tolerance: float = 0.005,
    backend: str = "auto",
) -> FoundScalar:
    """One threshold for the whole model at which a share of the blocks is skipped.

    By bisection on the model itself, so that what is skipped is what the rule skips when earlier
    layers skip too.

    Args:
        model: a decoder of transformers.
        samples: tokens of each sample.
        rule: one of ``bsfa_kernel.RULES``.
        target_sparsity: share of all visible blocks, forced ones included.
        geometry: the sparsity block.
        voters: one query row in 1, 2 or 4 votes.
        selection: from what scores blocks are chosen, one of ``bsfa_kernel.SELECTIONS``; "auto"
            decides by the target.
        tolerance: how close is close enough.
        backend: one of ``bsfa_calib.hook.BACKENDS``.

    Raises:
        TuningError: so many blocks are forced that the target cannot be reached.
    """
    check_target(target_sparsity, [len(ids) for ids in samples], geometry)
    language_model = LanguageModel(model)
    layers, heads = attention_shape(model)

    def sparsity(threshold: float) -> float:
        values = torch.full((layers, heads, 1), threshold, device=language_model.device)
        method = BlockSparse(
            *(values, rule, geometry, backend, voters, selection), expected_skipped=target_sparsity
        )
        return float(np.mean([_skipped(language_model, method, ids) for ids in samples]))

    threshold, reached = _bisect(sparsity, -_REACH, _REACH, target_sparsity, tolerance)
    return FoundScalar(threshold, reached)


def check_target(target: float, lengths: Sequence[int], geometry: Geometry) -> None:
    """Check that prompts of these lengths have enough blocks that may be skipped.

    Raises:
        TuningError: they have not.
    """
    most = 1 - sum(forced_share(length, length, geometry) for length in lengths) / len(lengths)
    if target > most:
        tokens = f"{min(lengths)}" + (f" to {max(lengths)}" if len(set(lengths)) > 1 else "")
        raise TuningError(
            f"a sparsity of {target:g} cannot be reached: of prompts of {tokens} tokens, "
            f"{1 - most:.3f} of the blocks are forced; use longer ones, or at most {most:.3f}"
        )


def check_shape(table: ThresholdTable, model: Any) -> None:
    """Check that a table is for as many layers and heads as a model has.

    Raises:
        TuningError: it is not.
    """
    layers, heads = attention_shape(model)
    if (table.layers, table.heads) != (layers, heads):
        raise TuningError(
            f"the table is for {table.layers} layers of {table.heads} heads, and the model has "
            f"{layers} of {heads}; calibrate thresholds for this model"
        )


def _skipped(language_model: LanguageModel, method: BlockSparse, ids: Sequence[int]) -> float:
    """Share of the blocks that a method skips of a sample."""
    with applied(language_model.model, method) as meter:
        language_model.predict(ids)
        return float(np.mean(meter.take()))


def _bisect(
    rising: Callable[[float], float], low: float, high: float, target: float, tolerance: float
) -> tuple[float, float]:
    """Where a rising function comes closest to a target, to a tolerance or to 1/64 of a unit."""
    best = (low, -math.inf)
    while high - low > 1 / 64 and abs(best[1] - target) > tolerance:
        middle = (low + high) / 2
        value = rising(middle)
        if abs(value - target) < abs(best[1] - target):
            best = (middle, value)
        low, high = (middle, high) if value < target else (low, middle)
    return best
