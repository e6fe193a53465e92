# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""From block maxima to thresholds, in numpy and without knowledge of any model.

All functions speak of causal prefill from an empty cache: the unforced blocks of query block i are
the key blocks ``0 .. unforced_blocks()[i] - 1``. Arrays may have any leading dimensions, written
``...`` below and usually the heads of one layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bsfa_calib.thresholds import FloatArray

IntArray = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

AGGREGATES = ("pooled", "mean", "median", "quantile:Q")

# Histograms of block maxima span ±HISTOGRAM_REACH in bins of 1/BINS_PER_UNIT, with one more bin
# at either end for what lies beyond.
HISTOGRAM_REACH = 128
BINS_PER_UNIT = 32
HISTOGRAM_BINS = 2 * HISTOGRAM_REACH * BINS_PER_UNIT + 2

# Elements of the pooled maxima that are sorted at a time.
_POOL_ELEMENTS = 1 << 25


def unforced_blocks(seqlen: int, *, q_block: int, k_block: int) -> IntArray:
    """Number of key blocks that each query block may skip, int64 ``[q_blocks]``."""
    first_query = np.arange(0, seqlen, q_block, dtype=np.int64)
    return (first_query + 1) // k_block


def visible_blocks(seqlen: int, *, q_block: int, k_block: int) -> IntArray:
    """Number of key blocks that each query block sees some score of, int64 ``[q_blocks]``."""
    past_last_query = np.minimum(np.arange(0, seqlen, q_block, dtype=np.int64) + q_block, seqlen)
    return -(-past_last_query // k_block)


@dataclass(frozen=True)
class Estimate:
    """Thresholds, and how far the maxima that were kept suffice for them.

    Attributes:
        thresholds: float32 ``[points, ..., rows]``.
        inexact: number of pooled thresholds that maxima which were not kept could have changed.
    """

    thresholds: FloatArray
    inexact: int


def estimate_thresholds(
    samples: Sequence[FloatArray],
    k_values: Sequence[int],
    *,
    q_block: int,
    k_block: int,
    aggregate: str = "pooled",
) -> Estimate:
    """Thresholds at which a query block keeps k of its unforced blocks, for every k at once.

    Of one sample, the threshold is the midpoint of the k-th and the (k+1)-th largest unforced block
    maximum (the paper's rule), and −inf where there are no more than k. How samples are combined:

    * ``pooled``: the midpoint of the (n·k)-th and (n·k+1)-th largest maximum of the n samples
      together, so that k blocks are kept on average over the samples;
    * ``mean`` of the samples' thresholds (the paper's), ``median``, or ``quantile:Q``, 0 ≤ Q ≤ 1.

    Args:
        samples: for each sample float32 ``[..., q_blocks, kept]`` as
            `bsfa_calib.capture.top_maxima` gives them. Samples may differ in q_blocks and kept; a
            position is estimated from the samples that reach it.
        k_values: blocks to keep a query block, each at least 1.
        q_block: queries in a sparsity block.
        k_block: keys in a sparsity block.
        aggregate: how samples are combined.

    Returns:
        The estimate, with as many rows as the longest sample has query blocks.

    Raises:
        ValueError: no samples, an unknown aggregate, or fewer maxima kept than a k needs.
    """
    if not samples:
        raise ValueError("at least one sample is needed")
    combine = parse_aggregate(aggregate)
    rows = max(sample.shape[-2] for sample in samples)
    unforced = unforced_blocks(rows * q_block, q_block=q_block, k_block=k_block)
    ks = np.asarray(k_values, dtype=np.int64)
    needed = min(int(ks.max()) + 1, int(unforced.max()))
    for sample in samples:
        kept, there = sample.shape[-1], int(unforced[sample.shape[-2] - 1])
        if kept < min(needed, there):
            raise ValueError(f"k={ks.max()} needs {needed} maxima a query block, got {kept}")
    if combine is None:
        return _pooled(samples, ks, unforced)

    padded = np.full(
        (len(samples), len(ks), *samples[0].shape[:-2], rows), np.nan, dtype=np.float32
    )
    for index, sample in enumerate(samples):
        padded[index, ..., : sample.shape[-2]] = _sample_thresholds(sample, ks)
    more_than_k = unforced > _against_rows(ks, padded.ndim - 1)
    reached = np.where(more_than_k, padded, np.float32(0))
    thresholds = np.where(more_than_k, combine(reached), np.float32(-np.inf))
    return Estimate(thresholds.astype(np.float32), 0)


def parse_aggregate(
    aggregate: str,
) -> Callable[[FloatArray], npt.NDArray[np.floating[Any]]] | None:
    """The function that combines samples along axis 0 and passes over NaN; None for ``pooled``.

    Raises:
        ValueError: there is no such aggregate.
    """
    if aggregate == "pooled":
        return None
    if aggregate == "mean":
        return lambda values: np.nanmean(values, axis=0, dtype=np.float64)
    if aggregate == "median":
        return lambda values: np.asarray(np.nanmedian(values, axis=0))
    match = re.fullmatch(r"quantile:(0?\.\d+|0|1|1\.0*|0\.)", aggregate)
    if match:
        share = float(match.group(1))
        return lambda values: np.asarray(np.nanquantile(values, share, axis=0))
    raise ValueError(f"aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}")


def kept_blocks(sample: FloatArray, thresholds: FloatArray) -> IntArray:
    """Unforced blocks that each query block of a sample keeps under the thresholds.

    Args:
        sample: float32 ``[..., q_blocks, kept]`` as `bsfa_calib.capture.top_maxima` gives them.
        thresholds: float32 ``[..., rows]`` of one point; the last row serves later blocks.

    Returns:
        int64 ``[..., q_blocks]``; no more than the number of maxima kept.
    """
    q_blocks = sample.shape[-2]
    row = np.minimum(np.arange(q_blocks), thresholds.shape[-1] - 1)
    # A maximum of −inf stands for no block, and a threshold of −inf must not count it.
    bound = np.maximum(thresholds[..., row], np.finfo(np.float32).min)
    return np.asarray(np.count_nonzero(sample >= bound[..., None], axis=-1), dtype=np.int64)


@dataclass
class KeptCount:
    """Sums over samples from which the mean blocks kept and the sparsity of each k follow.

    Attributes:
        k_values: the points, int64 ``[points]``.
        kept: unforced blocks kept where there are more than k, ``[points, ...]``.
        blocks: number of query blocks that these come from, ``[points]``.
        skipped: blocks skipped anywhere, ``[points, ...]``.
        visible: blocks visible.
    """

    k_values: IntArray
    kept: IntArray
    blocks: IntArray
    skipped: IntArray
    visible: int = 0

    @classmethod
    def zeros(cls, k_values: Sequence[int], leading: tuple[int, ...]) -> KeptCount:
        """Nothing counted yet, for arrays with the given leading dimensions."""
        ks = np.asarray(k_values, dtype=np.int64)
        shape = (len(ks), *leading)
        return cls(
            ks,
            np.zeros(shape, np.int64),
            np.zeros(len(ks), np.int64),
            np.zeros(shape, np.int64),
        )

    def add(
        self, sample: FloatArray, thresholds: FloatArray, *, seqlen: int, q_block: int, k_block: int
    ) -> None:
        """Count one sample ``[..., q_blocks, kept]`` under thresholds ``[points, ..., rows]``."""
        unforced = unforced_blocks(seqlen, q_block=q_block, k_block=k_block)
        self.visible += int(visible_blocks(seqlen, q_block=q_block, k_block=k_block).sum())
        for point, k in enumerate(self.k_values):
            kept = kept_blocks(sample, thresholds[point])
            chosen = unforced > k
            self.kept[point] += kept[..., chosen].sum(axis=-1)
            self.blocks[point] += int(np.count_nonzero(chosen))
            self.skipped[point] += (unforced[chosen] - kept[..., chosen]).sum(axis=-1)

    def mean_kept(self) -> FloatArray:
        """Mean unforced blocks kept where there are more than k, ``[points, ...]``, or NaN."""
        blocks = self.blocks.reshape(-1, *[1] * (self.kept.ndim - 1))
        with np.errstate(invalid="ignore"):
            return (self.kept / np.where(blocks, blocks, np.nan)).astype(np.float32)

    def sparsity(self) -> FloatArray:
        """Share of the visible blocks that is skipped, ``[points, ...]``."""
        return (self.skipped / max(self.visible, 1)).astype(np.float32)


def scalar_thresholds(
    counts: IntArray, visible: int, target_sparsities: Sequence[float]
) -> Float64Array:
    """One threshold for all heads and layers at which a share of all visible blocks is skipped.

    For the relative rules, block maxima are measured in a run that keeps every block, so that the
    sparsity is exact for ``running_max`` with thresholds of at most 0, and an estimate otherwise.

    Args:
        counts: int64 ``[..., HISTOGRAM_BINS]``, the samples' histograms added up.
        visible: visible blocks, forced ones included, of all heads together.
        target_sparsities: shares, each in [0, 1).

    Returns:
        float64 ``[targets]``, exact to the width of a bin (1/32) and nearly always far better.

    Raises:
        ValueError: a target asks for more blocks than may be skipped.
    """
    total = counts.reshape(-1, HISTOGRAM_BINS).sum(axis=0)
    if total[0] == total.sum():
        raise ValueError("no block may be skipped: the samples are too short")
    most = total.sum() / visible
    for target in target_sparsities:
        if target > most:
            raise ValueError(
                f"a sparsity of {target} cannot be reached on these samples: {1 - most:.3f} of "
                f"their blocks are forced; use longer samples, or at most {most:.3f}"
            )
    # Between the edges of the bins the share is taken to be linear. What lies beyond the reach of
    # the histogram is treated as a bin like the others.
    edges = np.arange(HISTOGRAM_BINS + 1) / BINS_PER_UNIT - HISTOGRAM_REACH - 1 / BINS_PER_UNIT
    below = np.concatenate([[0], np.cumsum(total)])
    wanted = np.asarray(target_sparsities, np.float64) * visible
    return np.asarray(np.interp(wanted, below, edges))


def skipped_share(
    counts: IntArray, visible: npt.ArrayLike, thresholds: Float64Array
) -> Float64Array:
    """Share of the visible blocks that lies below each of some scalar thresholds.

    Args:
        counts: int64 ``[..., HISTOGRAM_BINS]``.
        visible: visible blocks of each head, forced ones included; broadcasts against ``...``.
        thresholds: float64 ``[targets]``.

    Returns:
        float64 ``[targets, ...]``.
    """
    below = np.concatenate([np.zeros_like(counts[..., :1]), np.cumsum(counts, axis=-1)], axis=-1)
    position = (np.asarray(thresholds) + HISTOGRAM_REACH) * BINS_PER_UNIT + 1
    position = np.clip(position, 0, HISTOGRAM_BINS)
    left = np.minimum(position.astype(np.int64), HISTOGRAM_BINS - 1)
    part = position - left
    skipped = below[..., left] * (1 - part) + below[..., left + 1] * part
    return np.asarray(np.moveaxis(skipped, -1, 0) / np.asarray(visible), dtype=np.float64)


def _against_rows(ks: IntArray, ndim: int) -> IntArray:
    return ks.reshape(-1, *[1] * (ndim - 1))


def _midpoint(upper: FloatArray, lower: FloatArray) -> FloatArray:
    """Midpoint of two maxima; never the lower one, which would keep its block."""
    with np.errstate(invalid="ignore"):
        middle = lower + (upper - lower) / 2
    return np.where(middle > lower, middle, upper)


def _sample_thresholds(sample: FloatArray, ks: IntArray) -> FloatArray:
    """float32 ``[points, ..., q_blocks]``; unused where there are no more than k blocks."""
    last = sample.shape[-1] - 1
    upper = sample[..., np.minimum(ks - 1, last)]
    lower = sample[..., np.minimum(ks, last)]
    return np.moveaxis(_midpoint(upper, lower), -1, 0)


def _pooled(samples: Sequence[FloatArray], ks: IntArray, unforced: IntArray) -> Estimate:
    rows = len(unforced)
    leading = samples[0].shape[:-2]
    lengths = np.array([sample.shape[-2] for sample in samples])
    reaching = (lengths[:, None] > np.arange(rows)).sum(axis=0)
    flat = [sample.reshape(-1, *sample.shape[-2:]) for sample in samples]
    heads = flat[0].shape[0]
    width = sum(sample.shape[-1] for sample in flat)
    thresholds = np.empty((len(ks), heads, rows), np.float32)
    inexact = 0
    step = max(1, _POOL_ELEMENTS // max(1, heads * width))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        size = part.stop - part.start
        pool = np.full((heads, size, width), -np.inf, np.float32)
        # What a sample may have left out is no larger than the smallest that it kept.
        left_out = np.full((heads, size), -np.inf, np.float32)
        column = 0
        for sample in flat:
            there = sample[:, part]
            kept = sample.shape[-1]
            pool[:, : there.shape[1], column : column + kept] = there
            cut = unforced[part][: there.shape[1]] > kept
            bound = np.where(cut, there[..., -1], np.float32(-np.inf))
            left_out[:, : there.shape[1]] = np.maximum(left_out[:, : there.shape[1]], bound)
            column += kept
        pool = -np.sort(-pool, axis=-1)
        rank = np.minimum(reaching[part] * ks[:, None], width - 1)
        index = np.broadcast_to(rank.T, (heads, size, len(ks)))
        upper = np.take_along_axis(pool, np.maximum(index - 1, 0), axis=-1)
        lower = np.take_along_axis(pool, index, axis=-1)
        more_than_k = unforced[part][:, None] > ks
        inexact += int(np.count_nonzero((lower < left_out[..., None]) & more_than_k))
        middle = np.where(more_than_k, _midpoint(upper, lower), np.float32(-np.inf))
        thresholds[:, :, part] = np.moveaxis(middle, -1, 0)
    return Estimate(thresholds.reshape(len(ks), *leading, rows), inexact)
