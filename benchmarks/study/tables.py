# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The paper's table, and one like it for a budget of softmax mass instead of k blocks.

Both are of the paper's geometry, and of contexts that are a multiple of its query blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bsfa_calib.estimate import unforced_blocks
from bsfa_calib.hook import applied
from bsfa_calib.language_model import LanguageModel
from bsfa_kernel import Geometry, block_maxima, reference
from bsfa_kernel.geometry import count_visible
from study.emulation import refuse_sinks

COARSE = Geometry(128, 64)

Array = npt.NDArray[np.float64]


def block_masses(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax mass of each block, mean over its rows; float32 [heads, q_blocks, k_blocks].

    Args:
        q: [1, seqlen, heads, head_dim]; seqlen is a multiple of a query block.
        k: [1, seqlen, kv_heads, head_dim].
        scale: factor of the scores.
    """
    _, seqlen, heads, _ = q.shape
    q_blocks, k_blocks = seqlen // COARSE.q_block, seqlen // COARSE.k_block
    positions = torch.arange(seqlen, device=q.device)
    hidden = torch.where(positions > positions[:, None], -torch.inf, 0.0)
    masses = q.new_empty((heads, q_blocks, k_blocks), dtype=torch.float32)
    for head in range(heads):  # the scores of all heads together would fill gigabytes
        keys = k[0, :, head * k.shape[2] // heads].float()
        weights = torch.addmm(hidden, q[0, :, head].float() * scale, keys.T).softmax(-1)
        by_block = weights.view(q_blocks, COARSE.q_block, k_blocks, COARSE.k_block)
        masses[head] = by_block.sum(-1).mean(1)
    return masses


class Maxima:
    """A method that looks on: keeps the block maxima, the unforced ones in descending order.

    Attributes:
        layers: of each layer, float32 [heads, q_blocks, k_blocks]; -inf after the unforced ones.
        masses: if asked for: the masses of those blocks, in the same order; 0 after them.
    """

    def __init__(self, *, masses: bool = False) -> None:
        self.layers: dict[int, npt.NDArray[np.float32]] = {}
        self.masses: dict[int, npt.NDArray[np.float32]] = {}
        self._with_masses = masses

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """See ``bsfa_calib.hook.Method``.

        Raises:
            ValueError: the layer has sinks, and masses are asked for.
        """
        if self._with_masses:
            refuse_sinks(sinks)  # maxima are the same with them
        native = q.device.type == "cuda" and q.dtype != torch.float32
        measure = block_maxima if native else reference.block_maxima
        maxima = measure(q, k, scale=scale, geometry=COARSE)[0]
        free = torch.as_tensor(unforced_blocks(q.shape[1], COARSE), device=q.device)
        hidden = torch.arange(maxima.shape[-1], device=q.device) >= free[:, None]
        ordered, order = maxima.masked_fill(hidden, -torch.inf).sort(-1, descending=True)
        self.layers[layer] = ordered.cpu().numpy()
        if self._with_masses:
            masses = block_masses(q, k, scale).masked_fill(hidden, 0)
            self.masses[layer] = masses.gather(-1, order).cpu().numpy()


def _ordered(
    model: Any, contexts: Sequence[Sequence[int]], *, masses: bool = False
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """What ``Maxima`` keeps, each float32 [contexts, layers, heads, q_blocks, k_blocks]."""
    language_model = LanguageModel(model)
    kept: tuple[list[Any], list[Any]] = [], []
    for ids in contexts:
        recording = Maxima(masses=masses)
        with applied(model, recording):
            language_model.predict(ids)
        for into, of in zip(kept, (recording.layers, recording.masses), strict=True):
            into.append([of[layer] for layer in sorted(of)])
    return np.asarray(kept[0], np.float32), np.asarray(kept[1], np.float32)


def paper_thresholds(
    model: Any, contexts: Sequence[Sequence[int]]
) -> Callable[[float], npt.NDArray[np.float32]]:
    """The paper's rule: for each query block the threshold that keeps k blocks, mean over contexts.

    The k for a sparsity is the one that would keep that share on average.
    """
    length = len(contexts[0])
    free = unforced_blocks(length, COARSE)
    maxima = _ordered(model, contexts)[0].astype(np.float64)
    visible = count_visible(length, length, COARSE)

    def thresholds(target: float) -> npt.NDArray[np.float32]:
        shares = [
            (np.maximum(free - k, 0).sum() / visible) for k in range(1, length // COARSE.k_block)
        ]
        k = 1 + int(np.argmin(np.abs(np.asarray(shares) - target)))
        between = (maxima[..., k - 1] + maxima[..., k]) / 2
        return np.where(free > k, between.mean(0), -np.inf).astype(np.float32)

    return thresholds


def mass_thresholds(
    model: Any, contexts: Sequence[Sequence[int]]
) -> Callable[[float], npt.NDArray[np.float32]]:
    """The paper's rule with a budget of mass: ``budget_thresholds`` of each context, their mean.

    A query block that may drop nothing in some context keeps everything: one -inf makes the mean
    -inf. The budget for a sparsity is the one whose mean thresholds skip that share of all visible
    blocks of these contexts.
    """
    length = len(contexts[0])
    free = unforced_blocks(length, COARSE)
    maxima, masses = _ordered(model, contexts, masses=True)
    lost = lost_mass(maxima, masses)
    droppable = np.arange(maxima.shape[-1]) < free[:, None]
    visible = count_visible(length, length, COARSE)
    everything = maxima[..., 0, 0].size * visible

    def averaged(budget: float) -> npt.NDArray[np.float32]:
        mean = budget_thresholds(maxima, lost, free, budget).mean(0)
        return np.asarray(mean, np.float32)

    def thresholds(target: float) -> npt.NDArray[np.float32]:
        low, high = -40.0, 0.1  # logarithms of the budget
        for _ in range(30):
            middle = (low + high) / 2
            skipped = (maxima < averaged(float(np.exp(middle)))[..., None]) & droppable
            if skipped.sum() / everything < target:
                low = middle
            else:
                high = middle
        return averaged(float(np.exp(high)))

    return thresholds


def lost_mass(
    maxima: npt.NDArray[np.float32], masses: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Mass lost by dropping a block and all whose maxima are not larger; of ``_ordered``'s shape.

    Args:
        maxima: of blocks, in descending order along the last axis.
        masses: of the same blocks.
    """
    lost = np.flip(np.cumsum(np.flip(masses, -1), -1), -1)
    tied = np.zeros(maxima.shape, bool)
    tied[..., 1:] = maxima[..., 1:] == maxima[..., :-1]
    return np.minimum.accumulate(np.where(tied, np.float32(np.inf), lost), -1)


def budget_thresholds(
    maxima: npt.NDArray[np.float32],
    lost: npt.NDArray[np.float32],
    free: npt.NDArray[np.int64],
    budget: float,
) -> Array:
    """Thresholds under which as many blocks are dropped as lose no more mass than a budget.

    Blocks are dropped in ascending order of their maxima. The threshold lies half way between the
    last dropped and the first kept, is -inf if none is dropped, and just above the largest if all.

    Args:
        maxima: of the unforced blocks in descending order, [..., q_blocks, k_blocks], then -inf.
        lost: see ``lost_mass``.
        free: [q_blocks], number of unforced blocks.
        budget: softmax mass, mean over the rows of a query block.

    Returns:
        float64 [..., q_blocks].
    """
    kept = (lost > budget).sum(-1)
    last = maxima.shape[-1] - 1
    above, below = (
        np.take_along_axis(maxima, np.clip(index, 0, last)[..., None], -1)[..., 0]
        for index in (kept - 1, kept)
    )
    found = (above.astype(np.float64) + below) / 2
    found = np.where(kept == 0, np.nextafter(below, np.float32(np.inf)), found)
    return np.where(kept == free, -np.inf, found)
