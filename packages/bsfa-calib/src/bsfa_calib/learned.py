# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""From a model and a text to a table of thresholds, and what it is expected to do.

Thresholds are learned (``learning``) at a few sparsities. Between these they are interpolated, so
that there is one path from dense to sparse; the points of the table lie on it where, on samples
that nothing was learned from, the sparsity or the loss is what was asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bsfa_calib.expected import Calibrated, Expected, Measure, with_expected
from bsfa_calib.language_model import fingerprint
from bsfa_calib.learning import (
    DenseOutputs,
    Float32Array,
    Learned,
    Settings,
    dense_outputs,
    learn,
)
from bsfa_calib.point import Point
from bsfa_calib.progress import clock
from bsfa_calib.thresholds import DEFAULT_VOTERS, ThresholdTable, write_atomically
from bsfa_calib.tuning import TuningError
from bsfa_kernel import DEFAULT_GEOMETRY, Geometry
from bsfa_kernel.geometry import forced_share

# Sparsities that thresholds are learned at, one after the other, as far as they are needed.
LADDER = (0.6, 0.75, 0.85, 0.92)

# Beyond the learned thresholds the path goes on by shifting all alike, by so much for each unit.
BEYOND = 4.0
# Places this far beyond the path are considered: a hundred units of scaled scores.
FAR = 25.0
# Most points lie near the path, where places are looked for first; one that lies farther takes more
# halvings. An end that is this near, and was not seen, is exchanged for the farthest place.
_BISECTIONS, _FAR_BISECTIONS, _NEAR_END = 9, 12, 0.5
# How far the share at a point may be from its target: what is farther is no such point.
_WRONG = 0.05
_CLOSE_SPARSITY, _CLOSE_LOSS = 0.002, 0.03


class ThresholdPath:
    """Thresholds from dense to sparse: learned ones, and what lies between and beyond them.

    What is −inf in a learned one, and so keeps everything, is −inf up to its neighbours.

    Attributes:
        points: the learned ones, float32 [points, layers, heads, rows].
    """

    def __init__(self, learned: Sequence[Learned]) -> None:
        """Go through thresholds learned at ascending sparsities.

        Raises:
            ValueError: there are none.
        """
        if not learned:
            raise ValueError("at least one learned point is needed")
        self.points: Float32Array = np.stack([one.thresholds for one in learned])

    @property
    def last(self) -> float:
        """Place of the last learned point; the first lies at 0."""
        return len(self.points) - 1.0

    def at(self, place: float) -> Float32Array:
        """Thresholds [layers, heads, rows] at a place."""
        if place <= 0:
            found = self.points[0] + BEYOND * place
        elif place >= self.last:
            found = self.points[-1] + BEYOND * (place - self.last)
        else:
            index = int(place)
            share = place - index
            low, high = self.points[index], self.points[index + 1]
            if share == 0:
                return np.array(low, np.float32)
            kept = np.isneginf(low) | np.isneginf(high)
            # What is infinite stays so, and is not subtracted from its like.
            found = np.where(kept, -np.inf, (1 - share) * low + share * np.where(kept, low, high))
        return np.asarray(found, np.float32)


def learn_path(
    model: Any,
    samples: Sequence[Sequence[int]],
    *,
    target_sparsities: Sequence[float] = (),
    max_losses: Sequence[float] = (),
    rule: str = "peak_lse",
    geometry: Geometry = DEFAULT_GEOMETRY,
    voters: int = DEFAULT_VOTERS,
    settings: Settings | None = None,
    start: Float32Array | ThresholdTable | None = None,
    rungs: Sequence[float] | None = None,
    serve_length: int | None = None,
    dense: DenseOutputs | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Learned]:
    """Learn thresholds at the sparsities of ``LADDER`` that the points asked for lie between.

    Args:
        model: a decoder of transformers.
        samples: tokens of each, all of one length, a multiple of the sides of a block.
        target_sparsities: shares of blocks to be skipped.
        max_losses: or KL divergences to be kept within: the ladder is climbed until one rung is
            beyond all of them.
        rule: one of ``bsfa_kernel.RULES``.
        geometry: the sparsity block.
        voters: one query row in 1, 2 or 4 votes.
        settings: how to learn.
        start: thresholds [layers, heads] or [layers, heads, rows] to start from, or a table: then
            its point with the sparsity that is nearest to the first rung.
        rungs: sparsities to learn at, ascending, instead of those of the ladder.
        serve_length: tokens of the samples that the target sparsities refer to, if they are longer
            (see ``serving``).
        dense: ``dense_outputs`` of the model and the samples, if they are there already.
        checkpoint: file that keeps what is learned; what a run of the same model with the same
            arguments left there is used, as far as its rungs are those needed now.
        progress: told of the dense passes and of every tenth step.

    Raises:
        TuningError: the table to start from has another rule, a target cannot be reached at this
            length, so short that next to nothing can, neither or both kinds are given, the rungs
            cannot be climbed in their order, or the checkpoint is another kind of file.
    """
    settings = settings or Settings()
    length = len(samples[0])
    check_points(target_sparsities, max_losses, serve_length or length, geometry)
    most = 1 - forced_share(length, length, geometry)
    if rungs is None and serve_length is not None:
        ladder = serving_rungs(target_sparsities, length, geometry)
    elif rungs is None:
        ladder = _rungs(target_sparsities, reachable(length, geometry))
    else:
        ladder = tuple(rungs)
        climbs = bool(ladder) and list(ladder) == sorted(set(ladder))
        if not climbs or not all(0 < rung < most for rung in ladder):
            raise TuningError(
                f"rungs must be ascending, above 0 and below {most:.3f}, got {list(ladder)}"
            )
    if isinstance(start, ThresholdTable):
        if start.rule != rule:
            raise TuningError(
                f"thresholds to start from must be of the rule {rule}, got {start.rule}: others "
                "have other units"
            )
        start = nearest_thresholds(start, ladder[0])
    key = digest_of(model, samples, f"{rule} {geometry} {voters} {settings}", start)
    made = []
    for rung, learned in zip(ladder, _load(checkpoint, key), strict=False):
        if learned.target != rung:
            break  # each rung starts from the one below
        made.append(learned)
    for learned in made:
        progress(f"target {learned.target:g} was learned before")
    while len(made) < len(ladder):
        if made and max_losses and made[-1].kl > 1.2 * max(max_losses):
            break
        if dense is None:
            begun = time.perf_counter()
            dense = dense_outputs(model, samples)
            taken = clock(time.perf_counter() - begun)
            progress(f"dense outputs of {len(samples)} samples in {taken}")
        begin = made[-1].thresholds if made else start
        steps = settings.further_steps if made else settings.steps
        made += learn(
            model,
            samples,
            [ladder[len(made)]],
            rule=rule,
            geometry=geometry,
            voters=voters,
            settings=replace(settings, steps=steps),
            start=begin,
            dense=dense,
            progress=progress,
        )
        _save(checkpoint, key, made)
    return made


def nearest_thresholds(table: ThresholdTable, sparsity: float) -> Float32Array:
    """The thresholds [layers, heads, rows] of the point that skips most nearly a share of blocks.

    Where a table says of no point what it skips, those of its first point.
    """
    points = [Point(table.axis, value) for value in table.points]
    shares = [(table.expected_sparsity(point), point) for point in points]
    known = [(abs(share - sparsity), point) for share, point in shares if share is not None]
    point = min(known, key=lambda pair: pair[0])[1] if known else points[0]
    return table.select(point)


def calibrate(
    model: Any,
    path: ThresholdPath,
    samples: Sequence[Sequence[int]],
    *,
    target_sparsities: Sequence[float] = (),
    max_losses: Sequence[float] = (),
    rule: str = "peak_lse",
    geometry: Geometry = DEFAULT_GEOMETRY,
    voters: int = DEFAULT_VOTERS,
    backend: str = "auto",
    progress: Callable[[str], None] = lambda _: None,
) -> Calibrated:
    """Find the points asked for on a path of thresholds.

    Args:
        model: a decoder of transformers, in the dtype that it is to be used in.
        path: of thresholds.
        samples: tokens of each, better not those that were learned from.
        target_sparsities: shares of blocks to be skipped.
        max_losses: or bounds on the mean KL divergence from dense, in nats; each is kept on the
            samples.
        rule: that of the path.
        geometry: that of the path.
        voters: those of the path.
        backend: one of ``bsfa_calib.hook.BACKENDS``.
        progress: told of each point.

    Returns:
        A table that does not name the model yet, and what to expect of it.

    Raises:
        HookError: no layer of the model can skip a block.
        TuningError: a target cannot be reached or a bound on the loss not be kept on the path, or
            neither or both kinds are given.
        ValueError: there are no samples.
    """
    if bool(target_sparsities) == bool(max_losses):
        raise TuningError("give either target sparsities or bounds on the loss")
    measure = Measure(model, samples, rule=rule, geometry=geometry, voters=voters, backend=backend)
    known: dict[float, Expected] = {}

    def at(place: float) -> Expected:
        if place not in known:
            known[place] = measure(path.at(place))
        return known[place]

    axis = "target_sparsity" if target_sparsities else "max_loss"
    return table_of_points(
        path,
        axis,
        target_sparsities or max_losses,
        lambda point: find_place(at, axis, point, path.last),
        measure.dense_layers,
        progress,
        q_block=geometry.q_block,
        k_block=geometry.k_block,
        rule=rule,
        voters=voters,
        max_seqlen=len(samples[0]),
        aggregate="learned",
    )


def check_points(
    target_sparsities: Sequence[float],
    max_losses: Sequence[float],
    length: int,
    geometry: Geometry,
) -> None:
    """Refuse points that prompts of a length cannot have.

    Raises:
        TuningError: a target cannot be reached, a bound is not above 0, or neither or both kinds
            are given.
    """
    if bool(target_sparsities) == bool(max_losses):
        raise TuningError("give either target sparsities or bounds on the loss")
    most = 1 - forced_share(length, length, geometry)
    for target in target_sparsities:
        if not 0 < target < most:
            raise TuningError(
                f"a sparsity must be above 0 and, for {length} tokens, of which the "
                f"forced blocks are {1 - most:.3f}, below {most:.3f}, got {target:g}"
            )
    if any(not 0 < loss < math.inf for loss in max_losses):
        raise TuningError(f"a bound on the loss must be above 0, got {min(max_losses):g}")


def table_of_points(
    path: ThresholdPath,
    axis: str,
    points: Sequence[float],
    find: Callable[[float], tuple[float, Expected]],
    dense: dict[int, str],
    progress: Callable[[str], None],
    **fields: Any,
) -> Calibrated:
    """The table of the places on a path that are found for its points.

    Args:
        path: what the thresholds are taken from.
        axis: what the points are: "target_sparsity" or "max_loss".
        points: in any order; each counts once.
        find: a point's place, and what is measured there.
        dense: the layers that run dense whatever the thresholds, and why.
        progress: told of each point.
        fields: the table's others, as ``ThresholdTable`` takes them.

    Raises:
        TuningError: what is found for a target sparsity skips another share.
    """
    points = tuple(sorted(set(points)))
    thresholds, expected = [], []
    for point in points:
        place, found = find(point)
        if axis == "target_sparsity" and abs(found.sparsity - point) > _WRONG:
            raise TuningError(
                f"a sparsity of {point:g} cannot be reached on these thresholds: the closest place "
                f"found skips {found.sparsity:.3f}, which must be within {_WRONG:g}; ask for "
                "another share, or start from other thresholds"
            )
        thresholds.append(path.at(place))
        expected.append(found)
        progress(
            f"{axis} {point:g}: skips {found.sparsity:.3f} at a KL divergence of {found.kl:.5f}"
        )
    table = ThresholdTable(np.stack(thresholds), points, axis=axis, **fields)
    return with_expected(table, expected, dense)


def find_place(
    measure: Callable[[float], Expected], axis: str, point: float, last: float
) -> tuple[float, Expected]:
    """The place of a point: the closest sparsity, or the sparsest place within a loss.

    Args:
        measure: what thresholds do at a place.
        axis: "target_sparsity" or "max_loss".
        point: the target: a share of the blocks, or a mean KL divergence in nats.
        last: the place of the last learned thresholds.

    Raises:
        TuningError: no place is within the loss.
    """
    low, high = -2.0, last + 1.5
    # Of the ends, those that were measured, or are the farthest.
    seen: set[float] = set()
    best: tuple[float, Expected] | None = None
    left, place = _BISECTIONS, (low + high) / 2
    while left:
        left -= 1
        found = measure(place)
        if axis == "target_sparsity":
            rising, close = found.sparsity, abs(found.sparsity - point) <= _CLOSE_SPARSITY
            better = best is None or abs(rising - point) < abs(best[1].sparsity - point)
        else:
            rising = found.kl
            better = rising <= point and (best is None or found.sparsity > best[1].sparsity)
            close = better and rising >= (1 - _CLOSE_LOSS) * point
        if better:
            best = (place, found)
        if close:
            break
        if place == (last + FAR if rising < point else -FAR):
            break  # nothing lies beyond
        low, high = (place, high) if rising < point else (low, place)
        seen.add(place)
        place = (low + high) / 2
        if high - low < _NEAR_END and not {low, high} <= seen:
            place = -FAR if high in seen else last + FAR
            low, high = (place, high) if high in seen else (low, place)
            left = _FAR_BISECTIONS
    if best is None:
        raise TuningError(
            f"a KL divergence of {point:g} is exceeded however low the thresholds; in 16-bit types "
            "rounding alone may do that: allow more"
        )
    return best


def reachable(length: int, geometry: Geometry) -> tuple[float, ...]:
    """The rungs of the ladder that prompts of a length leave room for; the forced blocks do not."""
    most = 0.97 * (1 - forced_share(length, length, geometry))
    return tuple(rung for rung in LADDER if rung < most)


def serving_rungs(
    target_sparsities: Sequence[float], length: int, geometry: Geometry
) -> tuple[float, ...]:
    """The rungs to go through at a length for sparsities at a longer one.

    The same thresholds skip more of longer prompts: what skips a target there lies at it or below.

    Raises:
        TuningError: the length leaves room for no rung.
    """
    ladder = _rungs((), reachable(length, geometry))
    above = [rung for rung in ladder if rung >= max(target_sparsities, default=1.0)]
    return tuple(rung for rung in ladder if not above or rung <= above[0])


def _rungs(target_sparsities: Sequence[float], ladder: tuple[float, ...]) -> tuple[float, ...]:
    """The part of the ladder that some sparsities need; without any, the whole."""
    if not ladder:
        raise TuningError(
            f"prompts are too short: not even {LADDER[0]:g} of the blocks can be skipped; "
            "calibrate for longer ones, or leave them dense"
        )
    if not target_sparsities:
        return ladder
    below = [rung for rung in ladder if rung <= min(target_sparsities)]
    above = [rung for rung in ladder if rung >= max(target_sparsities)]
    first = below[-1] if below else ladder[0]
    last = above[0] if above else ladder[-1]
    return tuple(rung for rung in ladder if first <= rung <= last)


def digest_of(
    model: Any,
    samples: Sequence[Sequence[int]],
    settings: str,
    start: Float32Array | None,
) -> str:
    """What tells the work on a model and samples, under settings and from a start, from other."""
    digest = hashlib.sha256(json.dumps([list(ids) for ids in samples]).encode())
    digest.update(f"{fingerprint(model)} {settings}".encode())
    if start is not None:
        digest.update(np.ascontiguousarray(start).tobytes())
    return digest.hexdigest()


def _load(checkpoint: Path | None, key: str) -> list[Learned]:
    if checkpoint is None or not checkpoint.exists():
        return []
    try:
        data = io.BytesIO(checkpoint.read_bytes())
        with np.load(data) as file:
            # numpy meets the archive's CRC-32 only at the end of a part, and a damaged shape may
            # end before.
            if (damaged := file.zip.testzip()) is not None:
                raise ValueError(f"{damaged} has another CRC-32 than the file states")
            if str(file["key"]) != key:
                return []
            fields = (file["target"], file["thresholds"], file["sparsity"], file["kl"])
    except Exception as error:  # whatever a damaged archive makes its readers raise
        raise TuningError(
            f"{checkpoint} holds no learned thresholds: remove it, or name another file"
        ) from error
    return [Learned(float(t), x, float(s), float(kl)) for t, x, s, kl in zip(*fields, strict=True)]


def _save(checkpoint: Path | None, key: str, made: Sequence[Learned]) -> None:
    if checkpoint is None:
        return
    names = ("target", "thresholds", "sparsity", "kl")
    arrays: dict[str, Any] = {name: np.stack([getattr(x, name) for x in made]) for name in names}
    buffer = io.BytesIO()
    np.savez(buffer, key=np.asarray(key), **arrays)
    write_atomically(checkpoint, buffer.getvalue())
