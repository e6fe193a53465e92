# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Other ways to leave out blocks, as methods of ``bsfa_calib.hook``, for whole prompts.

A sliding window with sinks and XAttention's antidiagonal sums become block masks of this project's
``attend_blocks``, so that what is compared is the choice of blocks and what it costs.
SpargeAttention is its own package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bsfa_calib.hook import Attended
from bsfa_kernel import Geometry, attend_blocks, pack_blocks
from bsfa_kernel.geometry import count_visible
from study.emulation import refuse_sinks

_FINE, _COARSE = Geometry(64, 64), Geometry(128, 64)
# Elements of a head's antidiagonal sums held at a time.
_SUMS_AT_A_TIME = 1 << 24


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    geometry: Geometry,
    scale: float,
    sinks: Tensor | None,
) -> Attended:
    """Attention over the blocks of a packed mask, and the shares that it left out."""
    out, kept = attend_blocks(
        q, k, v, mask, scale=scale, geometry=geometry, sinks=sinks, return_kept=True
    )
    visible = count_visible(q.shape[1], k.shape[1], geometry)
    return Attended(out, 1 - kept[0].sum(-1).float() / visible)


@dataclass(frozen=True)
class Window:
    """Each query block sees the key blocks of a window before it, and the first ones.

    Attributes:
        window: keys before the first query of a block that it sees; rounded up to whole blocks.
        sink: first keys, likewise.
    """

    window: int
    sink: int = 64

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Attended:
        """See ``bsfa_calib.hook.Method``."""
        mask = _window_mask(q.shape[1], q.shape[2], self.window, self.sink, str(q.device))
        return _attend(q, k, v, mask, _FINE, scale, sinks)

    def crop(self, cached: Tensor) -> Tensor:
        """What a decode step sees of cached keys or values [batch, kv_heads, seqlen, head_dim]."""
        if cached.shape[2] <= self.window + self.sink:
            return cached
        return torch.cat((cached[:, :, : self.sink], cached[:, :, -self.window :]), 2)


@functools.lru_cache(maxsize=2)
def _window_mask(seqlen: int, heads: int, window: int, sink: int, device: str) -> Tensor:
    side = _FINE.k_block
    blocks = -(-seqlen // side)
    place = torch.arange(blocks, device=device)
    near = place > place[:, None] - 1 - -(-window // side)
    mask = pack_blocks(near | (place < -(-sink // side)))
    return mask.expand(1, heads, -1, -1).contiguous()


@dataclass(frozen=True)
class Antidiagonal:
    """XAttention (arXiv 2503.16428): blocks by the sums along the antidiagonals of their scores.

    Queries and keys are taken in groups of ``stride``. The sum of the scores of a group of queries,
    in reverse order, with a group of keys is one product of vectors that are ``stride`` times as
    long. A softmax over each group of queries, summed over a block, is what the block is expected
    to weigh; of each query block the heaviest blocks are kept until they weigh a share together.
    The first block and the diagonal one are kept besides. In PyTorch, where the paper has a kernel.

    Attributes:
        share: of the expected weight that is kept, in (0, 1].
        stride: queries and keys of a group.
        block: queries and keys of a block; a prompt has a whole number of them.
    """

    share: float
    stride: int = 16
    block: int = 128

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Attended:
        """See ``bsfa_calib.hook.Method``.

        Raises:
            ValueError: the prompt is not a whole number of blocks.
        """
        kept = self.choose(q, k, scale).repeat_interleave(self.block // _COARSE.k_block, -1)
        return _attend(q, k, v, pack_blocks(kept), _COARSE, scale, sinks)

    def choose(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The blocks to keep, bool [1, heads, blocks, blocks]; later ones do not count.

        Args:
            q: [1, seqlen, heads, head_dim].
            k: [1, seqlen, kv_heads, head_dim].
            scale: factor of the scores.

        Raises:
            ValueError: the prompt is not a whole number of blocks.
        """
        _, seqlen, heads, _ = q.shape
        if seqlen % self.block:
            raise ValueError(f"a prompt must be a multiple of {self.block} tokens, got {seqlen}")
        weights = torch.stack(
            [
                self._weights(q[0, :, head], k[0, :, head * k.shape[2] // heads], scale)
                for head in range(heads)
            ]
        )
        place = torch.arange(weights.shape[-1], device=q.device)
        ranked, order = weights.sort(-1, descending=True)
        # A block is kept while those before it weigh less than the share.
        wanted = ranked.cumsum(-1) - ranked < self.share
        kept = torch.zeros_like(wanted).scatter_(-1, order, wanted)
        kept |= (place == place[:, None]) | (place == 0)
        return kept[None]

    def _weights(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Expected weights of the blocks of a head, float32 [blocks, blocks]; rows sum to 1."""
        seqlen, width = q.shape
        stride, side = self.stride, self.block // self.stride
        groups, blocks = seqlen // stride, seqlen // self.block
        queries = (q * (scale / stride)).view(groups, stride, width).flip(1).reshape(groups, -1)
        keys = k.reshape(groups, -1)
        rows = max(_SUMS_AT_A_TIME // groups // side, 1) * side
        found = q.new_zeros((blocks, blocks), dtype=torch.float32)
        place = torch.arange(groups, device=q.device)
        for start in range(0, groups, rows):
            stop = min(start + rows, groups)
            sums = (queries[start:stop] @ keys[:stop].T).float()
            sums.masked_fill_(place[:stop] > place[start:stop, None], -torch.inf)
            shares = sums.softmax(-1).view((stop - start) // side, side, stop // side, side)
            found[start // side : stop // side, : stop // side] = shares.sum((1, 3)) / side
        return found


@dataclass(frozen=True)
class Sparge:
    """SpargeAttention (arXiv 2502.18137), by the kernel of its package.

    It is the one that keeps values in 16 bits: the package's functions with values in 8 bits, which
    have a kernel for Hopper, do not hand ``is_causal`` on to it.

    Attributes:
        kernel: as ``bsfa_hf.baselines.SpargeAttention`` finds it.
        topk: share of the blocks that it is to keep.
        counts: whether it tells what it left out, for which the host waits; else that is NaN.
    """

    kernel: Callable[..., Any]
    topk: float
    counts: bool = True

    @classmethod
    def find(cls, model: Any, topk: float) -> Sparge:
        """With the kernel of the package.

        Raises:
            ImportError: it is not installed.
        """
        from bsfa_hf.baselines import SPARGE_DEFAULTS, SpargeAttention

        state: Any = SpargeAttention({**SPARGE_DEFAULTS, "topk": topk}).state(model)
        return cls(state.kernel, topk)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Attended:
        """See ``bsfa_calib.hook.Method``.

        Raises:
            ValueError: the layer has sinks.
        """
        from bsfa_hf.baselines import SPARGE_DEFAULTS

        refuse_sinks(sinks)
        groups = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        found = self.kernel(
            q=q,
            k=k,
            v=v,
            is_causal=True,
            scale=scale,
            tensor_layout="HND",
            output_dtype=q.dtype,
            return_sparsity=self.counts,
            **{**SPARGE_DEFAULTS, "topk": self.topk},
        )
        out, skipped = found if self.counts else (found, torch.nan)
        return Attended(out.transpose(1, 2), q.new_full((q.shape[1],), float(skipped)).float())
