# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""From what was measured on samples to the arrays of a table."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bsfa_calib import estimate
from bsfa_calib.recording import CaptureError
from bsfa_calib.store import SampleStore
from bsfa_calib.thresholds import FloatArray
from bsfa_kernel import Geometry
from bsfa_kernel.geometry import block_count, count_visible

# Maxima of all samples that thresholds are estimated from at a time.
_MAXIMA_AT_A_TIME = 1 << 25

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assembly:
    """Makes a table's arrays out of what was measured. Layers that were not are left dense.

    Attributes:
        store: what was measured.
        groups: by prefix of the statistics, the samples: key in the store, and tokens.
        captured: layers that were measured.
        layers: of the model.
        heads: of a layer.
        geometry: the sparsity block.
    """

    store: SampleStore
    groups: dict[str, list[tuple[str, int]]]
    captured: list[int]
    layers: int
    heads: int
    geometry: Geometry

    def per_position(
        self, ks: list[int], aggregate: str
    ) -> tuple[FloatArray, dict[str, FloatArray]]:
        """Thresholds ``[points, layers, heads, rows]`` and statistics."""
        samples = self.groups[""]
        rows = block_count(max(length for _, length in samples), self.geometry.q_block)
        leading = (len(ks), self.layers, self.heads)
        thresholds = np.full((*leading, rows), -np.inf, np.float32)
        statistics = self._empty_statistics(leading)
        inexact = 0
        for layers in self._layers_at_a_time():
            tops = {
                key: self._read(key, layers) for group in self.groups.values() for key, _ in group
            }
            result = estimate.estimate_thresholds(
                [tops[key] for key, _ in samples], ks, self.geometry, aggregate=aggregate
            )
            inexact += result.inexact
            thresholds[:, layers] = result.thresholds
            found = torch.from_numpy(result.thresholds).to(tops[samples[0][0]].device)
            for prefix, group in self.groups.items():
                count = estimate.KeptCount(ks)
                for key, length in group:
                    count.add(tops[key], found, length, self.geometry)
                statistics[f"{prefix}kept"][:, layers] = count.mean_kept()
                statistics[f"{prefix}sparsity"][:, layers] = count.sparsity()
        if inexact:
            _logger.warning(
                "%d of %d thresholds may be too low: more block maxima a query block should be "
                "kept (keep_maxima)",
                inexact,
                thresholds.size,
            )
        return thresholds, statistics

    def scalars(self, targets: Sequence[float]) -> tuple[FloatArray, dict[str, FloatArray]]:
        """Thresholds ``[points, layers, heads, 1]``, alike for all heads, and statistics."""
        leading = (len(targets), self.layers, self.heads)
        statistics = self._empty_statistics(leading)
        thresholds = np.full((*leading, 1), -np.inf, np.float32)
        values = None
        for prefix, group in self.groups.items():
            total = self.counts(prefix)
            visible, query_blocks = 0, 0
            for _, length in group:
                visible += count_visible(length, length, self.geometry)
                query_blocks += block_count(length, self.geometry.q_block)
            if values is None:
                everywhere = total.sum((0, 1)).cpu().numpy()
                heads = total.shape[0] * total.shape[1]
                values = estimate.scalar_thresholds(everywhere, visible * heads, targets)
                thresholds[:, self.captured] = values.astype(np.float32)[:, None, None, None]
            skipped = estimate.skipped_share(total, visible, values)
            unforced = total.sum(-1).cpu().numpy()
            statistics[f"{prefix}sparsity"][:, self.captured] = skipped
            statistics[f"{prefix}kept"][:, self.captured] = (
                unforced - skipped * visible
            ) / query_blocks
        return thresholds, statistics

    def counts(self, prefix: str) -> Tensor:
        """Histograms of a group of samples together, int64 ``[captured, heads, bins]``."""
        (first, _), *others = self.groups[prefix]
        total = self._read(first, self.captured).long()
        for key, _ in others:
            total += self._read(key, self.captured)
        return total

    def _layers_at_a_time(self) -> Iterator[list[int]]:
        """The layers, in groups of which all samples' maxima take little memory."""
        some = self.store.read(self.groups[""][0][0], self.captured[0])
        samples = sum(len(group) for group in self.groups.values())
        step = max(1, _MAXIMA_AT_A_TIME // (samples * some.numel()))
        for start in range(0, len(self.captured), step):
            yield self.captured[start : start + step]

    def _empty_statistics(self, shape: tuple[int, ...]) -> dict[str, FloatArray]:
        """Of layers that run dense: nothing is skipped, and there is no number of blocks kept."""
        return {
            prefix + name: np.full(shape, fill, np.float32)
            for prefix in self.groups
            for name, fill in (("kept", np.nan), ("sparsity", 0.0))
        }

    def _read(self, key: str, layers: Sequence[int]) -> Tensor:
        """The measurements of some layers of a sample, ``[layers, heads, ...]``."""
        tensors = [self.store.read(key, layer) for layer in layers]
        for layer, tensor in zip(layers, tensors, strict=True):
            if len(tensor) != self.heads:
                raise CaptureError(
                    f"layer {layer} has {len(tensor)} heads, but the model {self.heads}; "
                    "tables need as many in every layer"
                )
        return torch.stack(tensors)
