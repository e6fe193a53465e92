# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What is compared with thresholds where only some of the query rows vote."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bsfa_kernel import Geometry
from bsfa_kernel.geometry import block_count
from bsfa_kernel.reference.rule import row_excesses
from bsfa_kernel.reference.scores import heads_first, in_blocks

_SCORES_AT_A_TIME_CPU = 1 << 22
_SCORES_AT_A_TIME_GPU = 1 << 28


def voting_maxima(
    q: Tensor, k: Tensor, *, scale: float, rule: str, geometry: Geometry, voters: int
) -> Tensor:
    """``bsfa_kernel.block_maxima`` of whole causal prompts, over the voting rows alone.

    The other rows are not computed, so that it takes that much less time than the reference's.

    Args:
        q: [batch, seqlen, heads, head_dim].
        k: [batch, seqlen, kv_heads, head_dim].
        scale: factor of the scores.
        rule: one of ``bsfa_kernel.RULES``.
        geometry: the sparsity block.
        voters: one row in 1, 2 or 4 votes; in the last query block every row.

    Returns:
        float32 [batch, heads, q_blocks, k_blocks].
    """
    batch, seqlen, heads, _ = q.shape
    q_block, k_block = geometry
    sizes = block_count(seqlen, q_block), block_count(seqlen, k_block)
    queries = heads_first(q, torch.float32).mul_(scale)
    queries = queries.view(batch * k.shape[2], -1, seqlen, queries.shape[-1])
    keys = heads_first(k, torch.float32, k_block)
    maxima = torch.full((batch * heads, *sizes), -torch.inf, device=q.device)
    for blocks, rows in _parts(seqlen, batch * heads, geometry, voters, q.device):
        columns = block_count(min(blocks.stop * q_block, seqlen), k_block)
        seen = keys[:, : columns * k_block]
        scores = torch.bmm(queries[:, :, rows].flatten(1, 2), seen.transpose(1, 2))
        scores = scores.view(batch * heads, blocks.stop - blocks.start, -1, columns * k_block)
        hidden = torch.arange(columns * k_block, device=q.device) > rows[:, None]
        scores.masked_fill_(hidden.view(scores.shape[1:]), -torch.inf)
        peaks = in_blocks(scores, k_block).amax(-1)
        excess = row_excesses(peaks, rule).masked_fill_(peaks == -torch.inf, -torch.inf)
        maxima[:, blocks, :columns] = excess.amax(2)
    return maxima.view(batch, heads, *sizes)


def _parts(
    seqlen: int, heads: int, geometry: Geometry, voters: int, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Query blocks that are computed together, and their voting rows."""
    budget = _SCORES_AT_A_TIME_CPU if device.type == "cpu" else _SCORES_AT_A_TIME_GPU
    q_block = geometry.q_block
    last = block_count(seqlen, q_block) - 1
    step = max(budget // (seqlen * heads * (q_block // voters)), 1)
    for start in range(0, last, step):
        stop = min(start + step, last)
        rows = torch.arange(start * q_block + voters - 1, stop * q_block, voters, device=device)
        yield slice(start, stop), rows
    yield slice(last, last + 1), torch.arange(last * q_block, seqlen, device=device)
