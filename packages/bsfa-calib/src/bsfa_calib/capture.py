# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Calibrate a transformers model in one pass: a table from the block maxima of what it reads."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from bsfa_calib.assemble import Assembly
from bsfa_calib.dense import named
from bsfa_calib.estimate import parse_aggregate, unforced_blocks
from bsfa_calib.hook import attention_shape
from bsfa_calib.language_model import fingerprint
from bsfa_calib.recording import CaptureError, Recorder, capturing, measure
from bsfa_calib.store import SampleStore
from bsfa_calib.thresholds import ThresholdTable
from bsfa_kernel import DEFAULT_GEOMETRY, RULES, VOTERS, Geometry

__all__ = ["CaptureError", "Progress", "Recorder", "Settings", "calibrate", "capturing"]

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to calibrate: one of ``k_values`` and ``target_sparsities``.

    With ``k_values``, there is a threshold for every layer, head and query-block position, at which
    k unforced blocks are kept. With ``target_sparsities`` there is one scalar for the whole model,
    at which that share of all visible blocks is skipped.

    Attributes:
        k_values: blocks to keep a query block; ascending once it is made.
        target_sparsities: shares of blocks to skip; ascending once it is made.
        rule: one of ``bsfa_kernel.RULES``.
        geometry: the sparsity block.
        voters: one query row in 1, 2 or 4 votes.
        aggregate: how samples are combined (`bsfa_calib.estimate.estimate_thresholds`).
        keep_maxima: block maxima kept a query block, 4 · max(k_values) by default. ``pooled`` is
            exact as long as they suffice, which is checked and logged.

    Raises:
        ValueError: a field breaks a rule.
    """

    k_values: Sequence[int] | None = None
    target_sparsities: Sequence[float] | None = None
    rule: str = "absolute"
    geometry: Geometry = DEFAULT_GEOMETRY
    voters: int = 1
    aggregate: str = "pooled"
    keep_maxima: int | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        if (self.k_values is None) == (self.target_sparsities is None):
            raise ValueError("give either k_values or target_sparsities")
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if self.voters not in VOTERS:
            raise ValueError(f"voters must be one of {VOTERS}, got {self.voters!r}")
        parse_aggregate(self.aggregate)
        name = "target_sparsities" if self.k_values is None else "k_values"
        points = tuple(sorted(set(getattr(self, name))))
        if not points or (self.k_values is not None and points[0] < 1):
            least = "shares" if self.k_values is None else "integers of at least 1"
            raise ValueError(f"{name} must be {least}, got {list(getattr(self, name))}")
        object.__setattr__(self, name, points)
        if self.k_values is not None and self.keep <= points[-1]:
            raise ValueError(f"keep_maxima must be greater than k={points[-1]}, got {self.keep}")

    @property
    def points(self) -> tuple[float | int, ...]:
        """The operating points."""
        return tuple(self.k_values or self.target_sparsities or ())

    @property
    def keep(self) -> int:
        """Block maxima that are kept a query block; 0 where histograms of them suffice."""
        return 0 if self.k_values is None else self.keep_maxima or 4 * int(self.points[-1])


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a calibration has come.

    Attributes:
        sample: samples done.
        samples: samples in all.
        seqlen: tokens of the sample in progress, or just done.
        layer: layers measured of the sample in progress; None where a sample has just been done.
        layers: layers of the model.
        resumed: whether the sample was found rather than measured.
    """

    sample: int
    samples: int
    seqlen: int
    layer: int | None
    layers: int
    resumed: bool = False


def calibrate(
    model: Any,
    samples: Sequence[Sequence[int]],
    settings: Settings | None = None,
    *,
    held_out: Sequence[Sequence[int]] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> ThresholdTable:
    """Calibrate thresholds on samples of text.

    Memory: a sample's measurements are held while the model reads it, on its device, and
    then until all are there, or in a file if those of all samples exceed 1 GiB. They take
    4 · layers · heads · (tokens / q_block) · keep_maxima bytes with ``k_values`` (1.1 GB for 128K
    tokens and 1024 heads in all, at the default of 256 for k = 64), and 32 KiB a head with
    ``target_sparsities``. All samples' measurements of one layer are in memory at a time.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        samples: token ids of the samples to calibrate on. They may differ in length.
        settings: what to calibrate.
        held_out: token ids of samples that the result is tested on.
        checkpoint: directory for what was measured on each sample; a later call finds it there.
        progress: told of every layer and sample.
        options: fields of the settings by name, in place of ``settings``.

    Returns:
        The table, with the statistics of docs/threshold-format.md; it does not name the model.

    Raises:
        CaptureError: the model's attention cannot be measured, or gives NaN.
        HookError: it passes its attention function what block-sparse attention does not know.
        SwitchError: its attention does not come from transformers' interface.
        TypeError: settings and options are both given, or there is no such option.
        ValueError: an argument breaks a rule, or the samples are too short for it.
    """
    if settings is not None and options:
        raise TypeError(f"give settings or their fields by name, got both: {sorted(options)}")
    settings = settings or Settings(**options)
    if not samples:
        raise ValueError("at least one sample is needed")
    if not all(held_out):
        raise ValueError("a held-out sample is empty: every sample must have at least one token")
    geometry, points, keep = settings.geometry, settings.points, settings.keep
    _check_lengths(samples, int(points[0]) if keep else 0, geometry)
    described = {
        "model": "" if checkpoint is None else fingerprint(model),
        "rule": settings.rule,
        "block": list(geometry),
        "voters": settings.voters,
        "keep": keep,
    }
    layers, heads = attention_shape(model)
    every = [*samples, *held_out]
    dense: dict[int, str] = {}
    with SampleStore(checkpoint, described) as store:
        keys = [store.key(tokens) for tokens in every]
        recorder = Recorder(settings.rule, *geometry, lambda layer, maxima: None, settings.voters)
        for index, (key, tokens) in enumerate(zip(keys, every, strict=True)):
            state = Progress(index, len(every), len(tokens), 0, layers)
            measured = store.find(key)
            found = measured is not None
            if measured is None:
                measured, maxima = measure(
                    model,
                    tokens,
                    recorder,
                    layers=layers,
                    keep=keep,
                    progress=_layers_of(state, progress),
                )
                store.write(key, measured, maxima)
            dense.update(measured.dense)
            if progress is not None:
                progress(dataclasses.replace(state, sample=index + 1, layer=None, resumed=found))
        captured = [layer for layer in range(layers) if layer not in dense]
        if not captured:
            raise CaptureError(
                f"no layer of this model can be calibrated, all run dense: {named(dense)}"
            )
        if dense:
            _logger.warning("these run dense and are counted so: %s", named(dense))

        lengths = [(key, len(tokens)) for key, tokens in zip(keys, every, strict=True)]
        groups = {"": lengths[: len(samples)]}
        if held_out:
            groups["held_out_"] = lengths[len(samples) :]
        assembly = Assembly(store, groups, captured, layers, heads, geometry)
        if keep:
            ks = [int(point) for point in points]
            thresholds, statistics = assembly.per_position(ks, settings.aggregate)
        else:
            thresholds, statistics = assembly.scalars(points)
    return ThresholdTable(
        thresholds=thresholds,
        points=points,
        axis="k" if keep else "target_sparsity",
        q_block=geometry.q_block,
        k_block=geometry.k_block,
        rule=settings.rule,
        voters=settings.voters,
        max_seqlen=max(map(len, samples)),
        samples=len(samples),
        aggregate=settings.aggregate if keep else "pooled",
        provenance={"dense_layers": named(dense)} if dense else {},
        statistics=statistics,
    )


def _layers_of(
    state: Progress, progress: Callable[[Progress], None] | None
) -> Callable[[int], None] | None:
    """Progress within a sample."""
    if progress is None:
        return None
    return lambda layer: progress(dataclasses.replace(state, layer=layer))


def _check_lengths(samples: Sequence[Sequence[int]], least_k: int, geometry: Geometry) -> None:
    if not all(samples):
        raise ValueError("a sample is empty: every sample must have at least one token")
    longest = max(map(len, samples))
    most = int(unforced_blocks(longest, geometry)[-1])
    if most <= least_k:
        raise ValueError(
            f"the longest sample has {longest} tokens, so that no query block has more than {most} "
            f"blocks to choose from, and k={least_k} would keep them all; use longer samples"
            if least_k
            else f"the longest sample has {longest} tokens, of which no block may be skipped; use "
            "longer samples"
        )
