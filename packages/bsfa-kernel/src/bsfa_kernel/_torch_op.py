# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The operators torch.ops.bsfa.forward and torch.ops.bsfa.block_maxima.

Made with ``Library.define`` and ``impl``, because the wrapper of ``custom_op`` costs several times
as much a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bsfa_kernel import _native, reference
from bsfa_kernel._checks import (
    check_block_maxima,
    check_forward,
    check_kernel_tensor,
)
from bsfa_kernel.geometry import Geometry, block_count
from bsfa_kernel.rules import RULE_CODES

_library: Any = torch.library.Library("bsfa", "DEF")  # type: ignore[no-untyped-call]
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_library.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor thresholds, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, bool causal, float? scale, str rule, int q_block, int k_block, "
    "bool return_lse, bool return_kept) -> (Tensor out, Tensor lse, Tensor kept)",
    tags=_tags,
)
_library.define(
    "block_maxima(Tensor q, Tensor k, bool causal, float? scale, str rule, int q_block, "
    "int k_block) -> Tensor",
    tags=_tags,
)

_DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1}


def _allocate(
    q: Tensor,
    thresholds: Tensor,
    cu_seqlens_q: Tensor | None,
    q_block: int,
    lse_dtype: torch.dtype,
    return_lse: bool,
    return_kept: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The outputs, unwritten; None where not asked for."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = kept = None
    if cu_seqlens_q is None:
        batch, seqlen_q, heads, _ = q.shape
        if return_lse:
            lse = q.new_empty((batch, heads, seqlen_q), dtype=lse_dtype)
        if return_kept:
            kept = q.new_empty((batch, heads, block_count(seqlen_q, q_block)), dtype=torch.int32)
    else:
        total_q, heads, _ = q.shape
        if return_lse:
            lse = q.new_empty((heads, total_q), dtype=lse_dtype)
        if return_kept:
            columns = total_q // q_block + cu_seqlens_q.shape[0] - 1
            # Zeros, as some columns belong to no query block.
            kept = q.new_zeros((heads, columns), dtype=torch.int32)
    return out, lse, kept


def _all_three(
    outputs: tuple[Tensor, Tensor | None, Tensor | None], thresholds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs as the operator has them: empty where not asked for."""
    out, lse, kept = outputs
    return (
        out,
        thresholds.new_empty(0) if lse is None else lse,
        thresholds.new_empty(0) if kept is None else kept,
    )


def _current_stream(device: int) -> int:
    """The caller's stream; the public function makes an object of it, at ten times the cost."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


@torch.library.impl(_library, "forward", "CPU")
def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float | None,
    rule: str,
    q_block: int,
    k_block: int,
    return_lse: bool,
    return_kept: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = Geometry(q_block, k_block)
    check_forward(q, k, v, thresholds, cu_seqlens_q, cu_seqlens_k, scale, rule, geometry)
    result = reference.attention(
        q,
        k,
        v,
        thresholds,
        causal=causal,
        scale=scale,
        rule=rule,
        geometry=geometry,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    lse = result.lse if return_lse else None
    kept = result.kept if return_kept else None
    return _all_three((result.out, lse, kept), thresholds)


@torch.library.impl(_library, "forward", "CUDA")
def _forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float | None,
    rule: str,
    q_block: int,
    k_block: int,
    return_lse: bool,
    return_kept: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = (q_block, k_block)
    check_forward(q, k, v, thresholds, cu_seqlens_q, cu_seqlens_k, scale, rule, geometry)
    check_kernel_tensor(q, "q")
    check_kernel_tensor(k, "k")
    check_kernel_tensor(v, "v")
    outputs = launch_forward(
        q,
        k,
        v,
        thresholds,
        cu_seqlens_q,
        cu_seqlens_k,
        causal,
        scale,
        rule,
        q_block,
        k_block,
        return_lse,
        return_kept,
    )
    return _all_three(outputs, thresholds)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float | None,
    rule: str,
    q_block: int,
    k_block: int,
    return_lse: bool,
    return_kept: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the kernel on arguments that have been checked; lse and kept are None if not asked for.

    Raises:
        ValueError: the library refuses the arguments; its message names rule and value.
        NotImplementedError: no native library, or valid but unsupported by it or by the GPU.
        RuntimeError: a CUDA call failed.
    """
    out, lse, kept = _allocate(
        q, thresholds, cu_seqlens_q, q_block, torch.float32, return_lse, return_kept
    )
    if out.numel() == 0 or k.numel() == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(-float("inf"))
        if kept is not None:
            kept.zero_()
        return out, lse, kept
    if not thresholds.is_contiguous():
        thresholds = thresholds.contiguous()
    if cu_seqlens_q is None or cu_seqlens_k is None:
        batch, seqlen_q, heads, head_dim = q.shape
        _, seqlen_k, kv_heads, _ = k.shape
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
        starts_q = starts_k = 0
    else:
        batch = cu_seqlens_q.shape[0] - 1
        seqlen_q, heads, head_dim = q.shape
        seqlen_k, kv_heads = k.shape[0], k.shape[1]
        strides = (
            *(0, *q.stride()[:2]),
            *(0, *k.stride()[:2]),
            *(0, *v.stride()[:2]),
            *(0, *out.stride()[:2]),
        )
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        starts_q, starts_k = cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr()
    device = q.get_device()
    _native.forward(
        device,
        _native.insisted_arch(),
        _current_stream(device),
        _DTYPE_CODES[q.dtype],
        RULE_CODES[rule],
        causal,
        q_block,
        k_block,
        head_dim**-0.5 if scale is None else scale,
        batch,
        heads,
        kv_heads,
        head_dim,
        seqlen_q,
        seqlen_k,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        *strides,
        thresholds.data_ptr(),
        thresholds.shape[1],
        starts_q,
        starts_k,
        0 if lse is None else lse.data_ptr(),
        0 if kept is None else kept.data_ptr(),
    )
    return out, lse, kept


@torch.library.register_fake("bsfa::forward", lib=_library)  # type: ignore[untyped-decorator]
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float | None,
    rule: str,
    q_block: int,
    k_block: int,
    return_lse: bool,
    return_kept: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_forward(q, k, v, thresholds, cu_seqlens_q, cu_seqlens_k, scale, rule, (q_block, k_block))
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    outputs = _allocate(q, thresholds, cu_seqlens_q, q_block, lse_dtype, return_lse, return_kept)
    return _all_three(outputs, thresholds)


@torch.library.impl(_library, "block_maxima", "CPU")
def _block_maxima_cpu(
    q: Tensor,
    k: Tensor,
    causal: bool,
    scale: float | None,
    rule: str,
    q_block: int,
    k_block: int,
) -> Tensor:
    geometry = Geometry(q_block, k_block)
    check_block_maxima(q, k, scale, rule, geometry)
    maxima = reference.block_maxima(q, k, causal=causal, scale=scale, rule=rule, geometry=geometry)
    return maxima.float()


@torch.library.impl(_library, "block_maxima", "CUDA")
def _block_maxima_cuda(
    q: Tensor,
    k: Tensor,
    causal: bool,
    scale: float | None,
    rule: str,
    q_block: int,
    k_block: int,
) -> Tensor:
    check_block_maxima(q, k, scale, rule, (q_block, k_block))
    check_kernel_tensor(q, "q")
    check_kernel_tensor(k, "k")
    maxima = _empty_maxima(q, k, q_block, k_block)
    if maxima.numel() == 0:
        return maxima
    batch, seqlen_q, heads, head_dim = q.shape
    device = q.get_device()
    _native.block_maxima(
        device,
        _native.insisted_arch(),
        _current_stream(device),
        _DTYPE_CODES[q.dtype],
        RULE_CODES[rule],
        causal,
        q_block,
        k_block,
        head_dim**-0.5 if scale is None else scale,
        batch,
        heads,
        k.shape[2],
        head_dim,
        seqlen_q,
        k.shape[1],
        q.data_ptr(),
        k.data_ptr(),
        *q.stride()[:3],
        *k.stride()[:3],
        maxima.data_ptr(),
    )
    return maxima


@torch.library.register_fake("bsfa::block_maxima", lib=_library)  # type: ignore[untyped-decorator]
def _block_maxima_fake(
    q: Tensor,
    k: Tensor,
    causal: bool,
    scale: float | None,
    rule: str,
    q_block: int,
    k_block: int,
) -> Tensor:
    check_block_maxima(q, k, scale, rule, (q_block, k_block))
    return _empty_maxima(q, k, q_block, k_block)


def _empty_maxima(q: Tensor, k: Tensor, q_block: int, k_block: int) -> Tensor:
    batch, seqlen_q, heads, _ = q.shape
    shape = (batch, heads, block_count(seqlen_q, q_block), block_count(k.shape[1], k_block))
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _no_backward(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError(
        "block-sparse attention has no backward pass: it is made for inference. Call it under "
        "torch.no_grad() or torch.inference_mode(), or train with dense attention"
    )


torch.library.register_autograd("bsfa::forward", _no_backward, lib=_library)
torch.library.register_autograd("bsfa::block_maxima", _no_backward, lib=_library)
