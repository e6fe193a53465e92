# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Operating points at the length that is served, on thresholds that were made at a shorter one.

Which heads give up more than others carries over from one length to another; how much a threshold
skips does not. So the points are looked for on the path of the thresholds (`learned.ThresholdPath`)
with samples of the longer length: forward passes alone, block-sparse by the kernels where there are
some. One dense pass counts the block maxima, from which the share skipped at every place of the
path follows. Layers whose inputs come from layers that skip have other maxima; the share is
therefore measured, and the place moved by what it is off.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bsfa_calib import capture
from bsfa_calib.capture import BlockCounts, Progress
from bsfa_calib.estimate import blocks_below
from bsfa_calib.expected import Calibrated, Expected, Measure
from bsfa_calib.learned import (
    BEYOND,
    FAR,
    ThresholdPath,
    check_points,
    digest_of,
    find_place,
    table_of_points,
)
from bsfa_calib.learning import Learned
from bsfa_calib.progress import clock
from bsfa_calib.thresholds import DEFAULT_VOTERS, ThresholdTable, write_atomically
from bsfa_calib.tuning import TuningError, check_shape
from bsfa_kernel import DEFAULT_GEOMETRY, Geometry

# How far a point's share may be from its target, and passes over the samples to come closer.
_CLOSE, _TRIES = 0.005, 5
_HALVINGS = 40


def serve(
    model: Any,
    path: ThresholdPath,
    samples: Sequence[Sequence[int]],
    *,
    made_at: int,
    target_sparsities: Sequence[float] = (),
    max_losses: Sequence[float] = (),
    rule: str = "peak_lse",
    geometry: Geometry = DEFAULT_GEOMETRY,
    voters: int = DEFAULT_VOTERS,
    backend: str = "auto",
    aggregate: str = "learned",
    checkpoint: Path | None = None,
    reading: Callable[[Progress], None] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Calibrated:
    """Find the points asked for, as they are at the length of some samples.

    Memory: that of a forward pass, the final hidden states of each sample, and one layer's block
    maxima, 4 · heads · (tokens / q_block) · (tokens / k_block) bytes.

    Args:
        model: a decoder of transformers, in the dtype that it is to be used in.
        path: of thresholds.
        samples: tokens of each, of the length to be served; better not those of the path.
        made_at: tokens in the longest sample that the path was made from.
        target_sparsities: shares of blocks to be skipped of the samples.
        max_losses: or bounds on the mean KL divergence from dense, in nats, on the samples.
        rule: that of the path.
        geometry: that of the path.
        voters: those of the path.
        backend: one of ``bsfa_calib.hook.BACKENDS``.
        aggregate: how the path was made, for the table.
        checkpoint: directory for what was measured; a later call with the same arguments finds it
            there.
        reading: told of every layer and sample of the dense pass.
        progress: told of each measurement.

    Returns:
        A table that does not name the model, and what to expect of it at this length.

    Raises:
        CaptureError: no layer of the model can skip a block, or its scores are NaN.
        HookError: as `Measure`.
        TuningError: a target cannot be reached at this length or on the path, a bound on the loss
            cannot be kept, neither or both kinds are given, or the checkpoint holds another kind of
            file.
        ValueError: there are no samples, or they are shorter than those of the path.
    """
    _check_any(samples)
    if (shortest := min(map(len, samples))) < made_at:
        raise ValueError(
            f"samples to serve must be at least as long as those that thresholds were made from, "
            f"{made_at} tokens, got {shortest}"
        )
    return _points_of(
        model,
        path,
        samples,
        made_at=made_at,
        target_sparsities=target_sparsities,
        max_losses=max_losses,
        rule=rule,
        geometry=geometry,
        voters=voters,
        backend=backend,
        aggregate=aggregate,
        checkpoint=checkpoint,
        reading=reading,
        progress=progress,
    )


def _check_any(samples: Sequence[Sequence[int]]) -> None:
    if not samples:
        raise ValueError("at least one sample is needed to find points on")


def _points_of(
    model: Any,
    path: ThresholdPath,
    samples: Sequence[Sequence[int]],
    *,
    made_at: int,
    target_sparsities: Sequence[float],
    max_losses: Sequence[float],
    rule: str,
    geometry: Geometry,
    voters: int,
    backend: str,
    aggregate: str,
    checkpoint: Path | None,
    reading: Callable[[Progress], None] | None,
    progress: Callable[[str], None],
) -> Calibrated:
    """As `serve`, of samples of any length; of shorter ones the table says that they made it."""
    length = max(map(len, samples))
    longer = length >= made_at
    check_points(target_sparsities, max_losses, min(map(len, samples)), geometry)
    options: dict[str, Any] = {"rule": rule, "geometry": geometry, "voters": voters}
    key = digest_of(model, samples, f"{options} {backend}", path.points)
    known = _Known(None if checkpoint is None else checkpoint / "served.json", key)

    @functools.cache
    def measure() -> Measure:
        return Measure(model, samples, backend=backend, **options)

    def at(place: float) -> Expected:
        found, taken = known.get(place), " before"
        if found is None:
            first, begin = measure.cache_info().currsize == 0, time.perf_counter()
            run = measure()
            read = time.perf_counter()
            found = run(path.at(place))
            known.add(place, found)
            taken = f" in {clock(time.perf_counter() - read)}"
            if first:
                taken += f" after a dense pass of {clock(read - begin)}"
        progress(
            f"at {length} tokens, place {place:+.3f}: skips {found.sparsity:.4f} at a KL "
            f"divergence of {found.kl:.5f}, measured{taken}"
        )
        return found

    axis = "target_sparsity" if target_sparsities else "max_loss"
    if target_sparsities and longer:
        counted = capture.block_counts(
            model,
            samples,
            capture.Settings(target_sparsities=target_sparsities, **options),
            checkpoint=checkpoint,
            progress=reading,
        )
        dense, find = counted.dense, _ByShare(path, counted).find
    else:
        dense = measure().dense_layers
        find = functools.partial(find_place, axis=axis, last=path.last)
    return table_of_points(
        path,
        axis,
        target_sparsities or max_losses,
        lambda point: find(at, point=point),
        dense,
        progress,
        q_block=geometry.q_block,
        k_block=geometry.k_block,
        rule=rule,
        voters=voters,
        max_seqlen=made_at if longer else length,
        serve_seqlen=length if longer else 0,
        aggregate=aggregate,
        provenance={"served_samples": str(len(samples))},
    )


def find_points(
    model: Any,
    table: ThresholdTable,
    samples: Sequence[Sequence[int]],
    *,
    target_sparsities: Sequence[float] = (),
    max_losses: Sequence[float] = (),
    backend: str = "auto",
    checkpoint: Path | None = None,
    reading: Callable[[Progress], None] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Calibrated:
    """Find other points of a table, or the same ones at another length; nothing is learned.

    Args:
        model: that of the table, in the dtype that it is to be used in.
        table: whose thresholds the path of points goes through.
        samples: tokens of each; better not those that the table was made from.
        target_sparsities: shares of blocks to be skipped of the samples.
        max_losses: or bounds on the mean KL divergence from dense, in nats, on the samples.
        backend: one of ``bsfa_calib.hook.BACKENDS``.
        checkpoint: as `serve`.
        reading: as `serve`.
        progress: told of each measurement.

    Returns:
        As `serve`. Of samples that are all shorter than the table's, ``max_seqlen`` is the longest
        one's length.

    Raises:
        CaptureError: as `serve`.
        HookError: as `serve`.
        TuningError: as `serve`, or the table is of a model of another shape or keeps everything.
        ValueError: there are no samples.
    """
    check_shape(table, model)
    _check_any(samples)
    if np.isneginf(table.thresholds).all():
        raise TuningError(
            "some threshold must be above −inf to find points on, and all of this table keep "
            "everything; start from another"
        )
    return _points_of(
        model,
        path_of(table),
        samples,
        made_at=table.max_seqlen,
        target_sparsities=target_sparsities,
        max_losses=max_losses,
        rule=table.rule,
        geometry=Geometry(table.q_block, table.k_block),
        voters=table.voters,
        backend=backend,
        aggregate=table.aggregate,
        checkpoint=checkpoint,
        reading=reading,
        progress=progress,
    )


def path_of(table: ThresholdTable) -> ThresholdPath:
    """The path through the points of a table.

    What is −inf at all of them, as in layers that run dense, stays so. What is −inf at the denser
    ones alone, as where a query block has no more than k blocks, lies as far below the next sparser
    one as the path's own continuation would.
    """
    # Who keeps more blocks skips fewer.
    values = (table.thresholds[::-1] if table.axis == "k" else table.thresholds).copy()
    points = table.points[::-1] if table.axis == "k" else table.points
    for denser, sparser in reversed(list(itertools.pairwise(values))):
        below = np.isneginf(denser) & np.isfinite(sparser)
        denser[below] = sparser[below] - np.float32(BEYOND)
    return ThresholdPath(
        [
            Learned(float(point), one, np.nan, np.nan)
            for point, one in zip(points, values, strict=True)
        ]
    )


class _ByShare:
    """Finds places by the share that is skipped, foretold from block maxima and then measured."""

    def __init__(self, path: ThresholdPath, counted: BlockCounts) -> None:
        self._path, self._layers = path, counted.layers
        self._totals = counted.counts.cumsum(-1)
        heads = self._totals.shape[0] * self._totals.shape[1]
        self._visible = counted.visible * heads
        self._low, self._high = -FAR, path.last + FAR
        # By how much more is skipped than foretold; points near each other are alike in that.
        self._off = 0.0

    def find(self, measure: Callable[[float], Expected], point: float) -> tuple[float, Expected]:
        """The place where the share measured is closest to a target."""
        low, high = self._low, self._high
        best: tuple[float, Expected] | None = None
        for _ in range(_TRIES):
            place = self._place_of(point - self._off)
            if not low < place < high:
                place = (low + high) / 2
            found = measure(place)
            self._off = found.sparsity - self._share(place)
            off = abs(found.sparsity - point)
            if best is None or off < abs(best[1].sparsity - point):
                best = (place, found)
            if off <= _CLOSE:
                break
            low, high = (place, high) if found.sparsity < point else (low, place)
        assert best is not None
        return best

    def _share(self, place: float) -> float:
        """Share skipped of the queries and keys of the dense pass.

        Of thresholds that follow the position it takes the last, which serves most of a prompt that
        is much longer than those of the path.
        """
        thresholds = self._path.at(place)[self._layers, :, -1:].astype(np.float64)
        return float(blocks_below(self._totals, thresholds).sum()) / self._visible

    def _place_of(self, share: float) -> float:
        low, high = self._low, self._high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._share(middle) < share else (low, middle)
        return (low + high) / 2


@dataclass
class _Known:
    """What was measured at places of a path, in a file too.

    Attributes:
        file: where it lies; None for nowhere.
        key: what it was measured on.
    """

    file: Path | None
    key: str
    _found: dict[float, Expected] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the file, if it is of this key and has a checksum, which older ones have not.

        Raises:
            TuningError: it holds something else, or is damaged.
        """
        if self.file is None or not self.file.exists():
            return
        try:
            content = json.loads(self.file.read_text())
            key, checksum = content["key"], content.get("checksum")
            # First of all, since a damaged key looks like that of other work.
            if checksum is not None and checksum != _checksum(key, content["measured"]):
                raise ValueError("its checksum is that of another content")
            if key != self.key:
                return
            measured = {float(place): Expected(**found) for place, found in content["measured"]}
            if checksum is not None:
                self._found = measured
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise TuningError(
                f"{self.file} holds no measurements of points: remove it, or name another folder"
            ) from error

    def get(self, place: float) -> Expected | None:
        """What was measured at a place, if it was."""
        return self._found.get(place)

    def add(self, place: float, found: Expected) -> None:
        """Note what was measured at a place."""
        self._found[place] = found
        if self.file is not None:
            measured = [[where, asdict(one)] for where, one in self._found.items()]
            content = {"key": self.key, "measured": measured}
            content["checksum"] = _checksum(self.key, measured)
            write_atomically(self.file, json.dumps(content).encode())


def _checksum(key: str, measured: object) -> str:
    """SHA-256 of what was measured, as JSON, which gives every number its shortest digits."""
    return hashlib.sha256(json.dumps([key, measured]).encode()).hexdigest()
