# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Calls of the C interface into outputs that lie between guards, and hold NaN before."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bsfa_kernel import Geometry, _native, pack_blocks, reference
from bsfa_kernel._calls import (
    AttendCall,
    BlockMaximaCall,
    ForwardCall,
    SelectCall,
    columns_shape,
    mask_words,
    most_keys,
)
from bsfa_kernel.geometry import block_count
from bsfa_kernel.reference.forward import run, run_attend
from bsfa_kernel.reference.selection import run_select

GUARD = 64
"""Elements before and after an output."""

_UNWRITTEN = -77


@dataclass
class Guarded:
    """A tensor inside a larger allocation, all of it unwritten."""

    whole: Tensor
    view: Tensor

    @classmethod
    def rows(cls, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Guarded:
        """[batch, seqlen, heads, head_dim] with gaps after each row and around the sequence."""
        batch, seqlen, heads, head_dim = shape
        size = (batch, seqlen + 2, heads + 1, head_dim + 8)
        whole = torch.full(size, math.nan, dtype=dtype, device=device)
        return cls(whole, whole[:, 1:-1, :heads, :head_dim])

    @classmethod
    def flat(cls, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Guarded:
        """Contiguous, with guards before and after."""
        empty = math.nan if dtype.is_floating_point else _UNWRITTEN
        size = math.prod(shape)
        whole = torch.full((size + 2 * GUARD,), empty, dtype=dtype, device=device)
        return cls(whole, whole[GUARD : GUARD + size].view(shape))

    def assert_written_exactly(self, name: str) -> None:
        """Fail if an element of the view was left out, or one outside it was written."""
        unwritten = self.view.isnan() if self.view.is_floating_point() else self.view == _UNWRITTEN
        assert not unwritten.any(), f"{name}: {int(unwritten.sum())} elements were not written"
        # The view's elements are set back, so that all is as it was unless a guard was hit.
        self.view.fill_(math.nan if self.view.is_floating_point() else _UNWRITTEN)
        whole = self.whole
        hit = ~(whole.isnan() if whole.is_floating_point() else whole == _UNWRITTEN)
        assert not hit.any(), f"{name}: {int(hit.sum())} elements outside were written"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    *,
    causal: bool,
    rule: str,
    geometry: Geometry,
    voters: int = 1,
    sinks: Tensor | None = None,
) -> tuple[Guarded, Guarded, Guarded]:
    """bsfa_forward on CUDA tensors; on CPU tensors the reference, copied, to try the guards."""
    batch, seqlen_q, heads, _ = q.shape
    device = str(q.device)
    call = ForwardCall(
        *(q, k, v, thresholds, None, None, causal, None, rule, *geometry, voters),
        return_lse=True,
        return_kept=True,
        sinks=sinks,
    )
    out = Guarded.rows(tuple(q.shape), q.dtype, device)
    lse = Guarded.flat((batch, heads, seqlen_q), torch.float32, device)
    kept = Guarded.flat(columns_shape(call), torch.int32, device)
    if not q.is_cuda:
        expected = run(call)
        for guarded, result in ((out, expected.out), (lse, expected.lse), (kept, expected.kept)):
            guarded.view.copy_(result)
        return out, lse, kept
    _native.forward(call, out.view, lse.view, kept.view)
    return out, lse, kept


def select_blocks(
    q: Tensor,
    k: Tensor,
    thresholds: Tensor,
    *,
    causal: bool,
    rule: str,
    geometry: Geometry,
    voters: int,
    precision: str,
) -> Guarded:
    """bsfa_select_blocks on CUDA tensors; on CPU tensors the reference, copied."""
    call = SelectCall(
        *(q, k, thresholds, None, None, causal, None, rule, *geometry, voters, precision, None)
    )
    shape = (*columns_shape(call), mask_words(call))
    mask = Guarded.flat(shape, torch.int64, str(q.device))
    if q.is_cuda:
        _native.select_blocks(call, mask.view)
    else:
        mask.view.copy_(pack_blocks(run_select(call).mask))
    return mask


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    *,
    causal: bool,
    geometry: Geometry,
    sinks: Tensor | None = None,
) -> tuple[Guarded, Guarded, Guarded]:
    """bsfa_attend_blocks on CUDA tensors; on CPU tensors the reference, copied."""
    batch, seqlen_q, heads, _ = q.shape
    device = str(q.device)
    out = Guarded.rows(tuple(q.shape), q.dtype, device)
    lse = Guarded.flat((batch, heads, seqlen_q), torch.float32, device)
    kept = Guarded.flat((batch, heads, block_mask.shape[2]), torch.int32, device)
    call = AttendCall(
        *(q, k, v, block_mask, None, None, None, causal, None, *geometry),
        return_lse=True,
        return_kept=True,
        sinks=sinks,
    )
    if q.is_cuda:
        _native.attend_blocks(call, out.view, lse.view, kept.view)
    else:
        expected = run_attend(call)
        for guarded, result in ((out, expected.out), (lse, expected.lse), (kept, expected.kept)):
            guarded.view.copy_(result)
    return out, lse, kept


def block_maxima(q: Tensor, k: Tensor, *, causal: bool, rule: str, geometry: Geometry) -> Guarded:
    """bsfa_block_maxima on CUDA tensors; on CPU tensors the reference, copied."""
    call = BlockMaximaCall(q, k, causal, None, rule, *geometry)
    shape = (*columns_shape(call), block_count(most_keys(call), geometry.k_block))
    maxima = Guarded.flat(shape, torch.float32, str(q.device))
    if not q.is_cuda:
        maxima.view.copy_(reference.block_maxima(q, k, causal=causal, rule=rule, geometry=geometry))
        return maxima
    _native.block_maxima(call, maxima.view)
    return maxima
