# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""One threshold for the whole model at each sparsity: found in one pass, measured on other text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from bsfa_calib import capture
from bsfa_calib.capture import Progress, Settings
from bsfa_calib.expected import Calibrated, Measure, with_expected
from bsfa_calib.thresholds import DEFAULT_VOTERS, ThresholdTable
from bsfa_kernel import DEFAULT_GEOMETRY, Geometry


def calibrate(
    model: Any,
    samples: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    *,
    target_sparsities: Sequence[float],
    rule: str = "peak_lse",
    geometry: Geometry = DEFAULT_GEOMETRY,
    voters: int = DEFAULT_VOTERS,
    progress: Callable[[Progress], None] | None = None,
) -> Calibrated:
    """`one_pass` over some samples, `measured` on others."""
    table = one_pass(
        model,
        samples,
        target_sparsities=target_sparsities,
        rule=rule,
        geometry=geometry,
        voters=voters,
        progress=progress,
    )
    return measured(model, table, held_out)


def one_pass(
    model: Any,
    samples: Sequence[Sequence[int]],
    *,
    target_sparsities: Sequence[float],
    rule: str = "peak_lse",
    geometry: Geometry = DEFAULT_GEOMETRY,
    voters: int = DEFAULT_VOTERS,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> ThresholdTable:
    """A scalar for each sparsity from one dense pass over the samples, without gradients.

    What the rule compares with depends on no verdict, so that each layer skips what was asked for
    of these samples, as long as those before it change its inputs little.

    Args:
        model: a decoder of transformers, in the dtype that it is to be used in.
        samples: token ids to calibrate on.
        target_sparsities: shares of the visible blocks to skip, of the layers that can skip any.
        rule: one of ``bsfa_kernel.RULES``.
        geometry: the sparsity block.
        voters: one query row in 1, 2 or 4 votes.
        checkpoint: directory for what was found on each sample; a later call finds it there.
        progress: told of every layer and sample.

    Returns:
        A table that does not name the model.

    Raises:
        ValueError: as `bsfa_calib.capture.calibrate`.
    """
    settings = Settings(
        target_sparsities=target_sparsities, rule=rule, geometry=geometry, voters=voters
    )
    return capture.calibrate(model, samples, settings, checkpoint=checkpoint, progress=progress)


def measured(
    model: Any,
    table: ThresholdTable,
    held_out: Sequence[Sequence[int]],
    *,
    backend: str = "auto",
    progress: Callable[[str], None] = lambda _: None,
) -> Calibrated:
    """What each point of a table does on samples that it was not made from.

    Args:
        model: a decoder of transformers, in the dtype that it is to be used in.
        table: of this model.
        held_out: token ids to measure on.
        backend: one of ``bsfa_calib.hook.BACKENDS``.
        progress: told of each point.

    Raises:
        ValueError: there are no held-out samples.
    """
    geometry = Geometry(table.q_block, table.k_block)
    measure = Measure(
        *(model, held_out),
        rule=table.rule,
        geometry=geometry,
        voters=table.voters,
        backend=backend,
    )
    expected = []
    for point, thresholds in zip(table.points, table.thresholds, strict=True):
        found = measure(thresholds)
        expected.append(found)
        progress(
            f"{table.axis} {point:g}: skips {found.sparsity:.3f} at a KL divergence of "
            f"{found.kl:.5f}"
        )
    return with_expected(table, expected, measure.dense_layers)
