# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""From block maxima to thresholds, without knowledge of any model.

What has a value for each query block is computed by torch, where the maxima are, and what has few
values by numpy. All functions speak of causal prefill from an empty cache: the unforced blocks of
query block i are the key blocks ``0 .. unforced_blocks()[i] - 1``. Arrays may have any leading
dimensions, written ``...`` below and usually the heads of some layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from bsfa_calib.thresholds import FloatArray

if TYPE_CHECKING:
    from torch import Tensor

    from bsfa_kernel import Geometry

    Maxima: TypeAlias = "FloatArray | Tensor"

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


def unforced_blocks(seqlen: int, geometry: Geometry) -> IntArray:
    """Number of key blocks that each query block of a prompt may skip, int64 ``[q_blocks]``."""
    from bsfa_kernel.geometry import block_count, full_blocks

    query_blocks = np.arange(block_count(seqlen, geometry.q_block), dtype=np.int64)
    return full_blocks(query_blocks, seqlen, seqlen, geometry)


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
    samples: Sequence[Maxima],
    k_values: Sequence[int],
    geometry: Geometry,
    *,
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
            `bsfa_calib.recording.top_maxima` gives them, tensors of one device or arrays. Samples
            may differ in q_blocks and kept; a position is estimated from the samples that reach it.
        k_values: blocks to keep a query block, each at least 1.
        geometry: the sparsity block.
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
    unforced = unforced_blocks(rows * geometry.q_block, geometry)
    ks = np.asarray(k_values, dtype=np.int64)
    needed = min(int(ks.max()) + 1, int(unforced.max()))
    for sample in samples:
        kept, there = sample.shape[-1], int(unforced[sample.shape[-2] - 1])
        if kept < min(needed, there):
            raise ValueError(f"k={ks.max()} needs {needed} maxima a query block, got {kept}")
    tensors = [_as_tensor(sample) for sample in samples]
    if combine is None:
        return _pooled(tensors, ks, unforced)

    padded = np.full(
        (len(samples), len(ks), *samples[0].shape[:-2], rows), np.nan, dtype=np.float32
    )
    for index, sample in enumerate(tensors):
        padded[index, ..., : sample.shape[-2]] = _sample_thresholds(sample, ks).cpu().numpy()
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


def kept_blocks(sample: Maxima, thresholds: Maxima) -> Tensor:
    """Unforced blocks that each query block of a sample keeps under the thresholds.

    Args:
        sample: float32 ``[..., q_blocks, kept]`` as `bsfa_calib.recording.top_maxima` gives them.
        thresholds: float32 ``[points, ..., rows]``; the last row serves later blocks.

    Returns:
        int64 ``[..., q_blocks, points]``; no more than the number of maxima kept.
    """
    import torch

    sample = _as_tensor(sample)
    thresholds = _as_tensor(thresholds).to(sample.device)
    row = torch.arange(sample.shape[-2], device=sample.device).clamp(max=thresholds.shape[-1] - 1)
    # A maximum of −inf stands for no block, and a threshold of −inf must not count it.
    bounds = thresholds[..., row].movedim(0, -1).clamp(min=torch.finfo(torch.float32).min)
    ascending = sample.flip(-1).contiguous()
    return sample.shape[-1] - torch.searchsorted(ascending, bounds.contiguous())


class KeptCount:
    """Sums over samples from which the mean blocks kept and the sparsity of each k follow."""

    def __init__(self, k_values: Sequence[int]) -> None:
        """Nothing counted yet.

        Args:
            k_values: the points of the thresholds.
        """
        self._ks = np.asarray(k_values, dtype=np.int64)
        self._blocks = np.zeros(len(self._ks), np.int64)  # query blocks with more than k
        self._unforced = np.zeros(len(self._ks), np.int64)  # unforced blocks of these
        self._visible = 0
        self._kept: Any = 0  # unforced blocks that these keep, int64 tensor [..., points]

    def add(self, sample: Maxima, thresholds: Maxima, seqlen: int, geometry: Geometry) -> None:
        """Count one sample ``[..., q_blocks, kept]`` under thresholds ``[points, ..., rows]``."""
        from bsfa_kernel.geometry import count_visible

        unforced = unforced_blocks(seqlen, geometry)
        chosen = unforced[:, None] > self._ks
        kept = kept_blocks(sample, thresholds)
        self._kept = self._kept + (kept * _as_tensor(chosen).to(kept.device)).sum(-2)
        self._blocks += chosen.sum(axis=0)
        self._unforced += (unforced[:, None] * chosen).sum(axis=0)
        self._visible += count_visible(seqlen, seqlen, geometry)

    def mean_kept(self) -> FloatArray:
        """Mean unforced blocks kept where there are more than k, ``[points, ...]``, or NaN."""
        with np.errstate(invalid="ignore"):
            mean = self._sums() / np.where(self._blocks, self._blocks, np.nan)
        return np.moveaxis(mean, -1, 0).astype(np.float32)

    def sparsity(self) -> FloatArray:
        """Share of the visible blocks that is skipped, ``[points, ...]``."""
        skipped = self._unforced - self._sums()
        return np.moveaxis(skipped / max(self._visible, 1), -1, 0).astype(np.float32)

    def _sums(self) -> IntArray:
        return np.asarray(self._kept.cpu().numpy())


def scalar_thresholds(
    counts: IntArray, visible: int, target_sparsities: Sequence[float]
) -> Float64Array:
    """One threshold for all heads and layers at which a share of all visible blocks is skipped.

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
    counts: IntArray | Tensor, visible: npt.ArrayLike, thresholds: Float64Array
) -> Float64Array:
    """Share of the visible blocks that lies below each of some scalar thresholds.

    Args:
        counts: int64 ``[..., HISTOGRAM_BINS]``, a tensor or an array.
        visible: visible blocks of each head, forced ones included; broadcasts against ``...``.
        thresholds: float64 ``[targets]``.

    Returns:
        float64 ``[targets, ...]``.
    """
    position = (np.asarray(thresholds) + HISTOGRAM_REACH) * BINS_PER_UNIT + 1
    position = np.clip(position, 0, HISTOGRAM_BINS)
    left = np.minimum(position.astype(np.int64), HISTOGRAM_BINS - 1)
    part = position - left
    # Of the running sums, few are wanted; the one before the first bin is 0.
    totals = _as_tensor(counts).cumsum(-1)
    edges = _as_tensor(np.stack([left, left + 1])).to(totals.device)
    below = (totals[..., (edges - 1).clamp(min=0)] * (edges > 0)).cpu().numpy()
    skipped = below[..., 0, :] * (1 - part) + below[..., 1, :] * part
    return np.asarray(np.moveaxis(skipped, -1, 0) / np.asarray(visible), dtype=np.float64)


def _as_tensor(array: Any) -> Tensor:
    import torch

    return (
        array if isinstance(array, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(array))
    )


def _against_rows(ks: IntArray, ndim: int) -> IntArray:
    return ks.reshape(-1, *[1] * (ndim - 1))


def _midpoint(upper: Tensor, lower: Tensor) -> Tensor:
    """Midpoint of two maxima; never the lower one, which would keep its block."""
    import torch

    middle = lower + (upper - lower) / 2
    return torch.where(middle > lower, middle, upper)


def _sample_thresholds(sample: Tensor, ks: IntArray) -> Tensor:
    """float32 ``[points, ..., q_blocks]``; unused where there are no more than k blocks."""
    last = sample.shape[-1] - 1
    upper = sample[..., _as_tensor(np.minimum(ks - 1, last)).to(sample.device)]
    lower = sample[..., _as_tensor(np.minimum(ks, last)).to(sample.device)]
    return _midpoint(upper, lower).movedim(-1, 0)


def _pooled(samples: Sequence[Tensor], ks: IntArray, unforced: IntArray) -> Estimate:
    import torch

    rows = len(unforced)
    leading = samples[0].shape[:-2]
    device = samples[0].device
    lengths = np.array([sample.shape[-2] for sample in samples])
    reaching = (lengths[:, None] > np.arange(rows)).sum(axis=0)
    flat = [sample.reshape(-1, *sample.shape[-2:]) for sample in samples]
    heads = flat[0].shape[0]
    width = sum(sample.shape[-1] for sample in flat)
    rank = np.minimum(reaching[:, None] * ks, width - 1)
    ranks, more_than_k = (_as_tensor(array).to(device) for array in (rank, unforced[:, None] > ks))
    thresholds = torch.empty((len(ks), heads, rows), device=device)
    inexact = torch.zeros((), dtype=torch.int64, device=device)
    step = max(1, _POOL_ELEMENTS // max(1, heads * width))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        pool = torch.full((heads, part.stop - start, width), -torch.inf, device=device)
        # What a sample may have left out is no larger than the smallest that it kept.
        left_out = torch.full(pool.shape[:2], -torch.inf, device=device)
        column = 0
        for sample in flat:
            there = sample[:, part]
            kept, length = sample.shape[-1], there.shape[1]
            pool[:, :length, column : column + kept] = there
            cut = _as_tensor(unforced[part][:length] > kept).to(device)
            bound = there[..., -1].masked_fill(~cut, -torch.inf)
            torch.maximum(left_out[:, :length], bound, out=left_out[:, :length])
            column += kept
        pool = pool.sort(dim=-1, descending=True).values
        index = ranks[part].expand(heads, -1, -1)
        upper = pool.gather(-1, (index - 1).clamp(min=0))
        lower = pool.gather(-1, index)
        inexact += ((lower < left_out[..., None]) & more_than_k[part]).sum()
        middle = _midpoint(upper, lower).masked_fill(~more_than_k[part], -torch.inf)
        thresholds[:, :, part] = middle.movedim(-1, 0)
    return Estimate(thresholds.reshape(len(ks), *leading, rows).cpu().numpy(), int(inexact))
