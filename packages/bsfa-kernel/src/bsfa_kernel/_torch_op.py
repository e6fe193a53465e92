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

from bsfa_kernel import _native
from bsfa_kernel._calls import BlockMaximaCall, ForwardCall
from bsfa_kernel._checks import check_block_maxima, check_forward, check_kernel_tensor
from bsfa_kernel.geometry import block_count
from bsfa_kernel.reference.forward import run
from bsfa_kernel.reference.selection import run_block_maxima

_library: Any = torch.library.Library("bsfa", "DEF")  # type: ignore[no-untyped-call]
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_library.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor thresholds, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, bool causal, float? scale, str rule, int q_block, int k_block, "
    "int voters, bool return_lse, bool return_kept) -> (Tensor out, Tensor lse, Tensor kept)",
    tags=_tags,
)
_library.define(
    "block_maxima(Tensor q, Tensor k, bool causal, float? scale, str rule, int q_block, "
    "int k_block) -> Tensor",
    tags=_tags,
)

_Outputs = tuple[Tensor, Tensor | None, Tensor | None]
"""out, lse and kept; None where not asked for."""


def _allocate(call: ForwardCall, lse_dtype: torch.dtype) -> _Outputs:
    """The outputs, unwritten."""
    q = call.q
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = kept = None
    if call.cu_seqlens_q is None:
        batch, seqlen_q, heads, _ = q.shape
        if call.return_lse:
            lse = q.new_empty((batch, heads, seqlen_q), dtype=lse_dtype)
        if call.return_kept:
            q_blocks = block_count(seqlen_q, call.q_block)
            kept = q.new_empty((batch, heads, q_blocks), dtype=torch.int32)
    else:
        total_q, heads, _ = q.shape
        if call.return_lse:
            lse = q.new_empty((heads, total_q), dtype=lse_dtype)
        if call.return_kept:
            columns = total_q // call.q_block + call.cu_seqlens_q.shape[0] - 1
            kept = q.new_empty((heads, columns), dtype=torch.int32)
    return out, lse, kept


def _all_three(outputs: _Outputs, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs as the operator has them: empty where not asked for."""
    out, lse, kept = outputs
    return (
        out,
        thresholds.new_empty(0) if lse is None else lse,
        thresholds.new_empty(0) if kept is None else kept,
    )


@torch.library.impl(_library, "forward", "CPU")
def _forward_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = ForwardCall(*arguments)
    check_forward(call)
    result = run(call)
    lse = result.lse if call.return_lse else None
    kept = result.kept if call.return_kept else None
    return _all_three((result.out, lse, kept), call.thresholds)


@torch.library.impl(_library, "forward", "CUDA")
def _forward_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = ForwardCall(*arguments)
    check_forward(call)
    check_kernel_tensor(call.q, "q")
    check_kernel_tensor(call.k, "k")
    check_kernel_tensor(call.v, "v")
    return _all_three(launch_forward(call), call.thresholds)


def launch_forward(call: ForwardCall) -> _Outputs:
    """Run the kernel on arguments that have been checked.

    Raises:
        ValueError: the library refuses the arguments; its message names rule and value.
        NotImplementedError: no native library, or valid but unsupported by it or by the GPU.
        RuntimeError: a CUDA call failed.
    """
    out, lse, kept = _allocate(call, torch.float32)
    _native.forward(call, out, lse, kept)
    return out, lse, kept


@torch.library.register_fake("bsfa::forward", lib=_library)  # type: ignore[untyped-decorator]
def _forward_fake(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = ForwardCall(*arguments, **named)
    check_forward(call)
    lse_dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    return _all_three(_allocate(call, lse_dtype), call.thresholds)


@torch.library.impl(_library, "block_maxima", "CPU")
def _block_maxima_cpu(*arguments: Any) -> Tensor:
    call = BlockMaximaCall(*arguments)
    check_block_maxima(call)
    return run_block_maxima(call).float()


@torch.library.impl(_library, "block_maxima", "CUDA")
def _block_maxima_cuda(*arguments: Any) -> Tensor:
    call = BlockMaximaCall(*arguments)
    check_block_maxima(call)
    check_kernel_tensor(call.q, "q")
    check_kernel_tensor(call.k, "k")
    maxima = _empty_maxima(call)
    _native.block_maxima(call, maxima)
    return maxima


@torch.library.register_fake("bsfa::block_maxima", lib=_library)  # type: ignore[untyped-decorator]
def _block_maxima_fake(*arguments: Any, **named: Any) -> Tensor:
    call = BlockMaximaCall(*arguments, **named)
    check_block_maxima(call)
    return _empty_maxima(call)


def _empty_maxima(call: BlockMaximaCall) -> Tensor:
    batch, seqlen_q, heads, _ = call.q.shape
    q_blocks = block_count(seqlen_q, call.q_block)
    k_blocks = block_count(call.k.shape[1], call.k_block)
    return torch.empty(
        (batch, heads, q_blocks, k_blocks), dtype=torch.float32, device=call.q.device
    )


def _no_backward(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError(
        "block-sparse attention has no backward pass: it is made for inference. Call it under "
        "torch.no_grad() or torch.inference_mode(), or train with dense attention"
    )


torch.library.register_autograd("bsfa::forward", _no_backward, lib=_library)
torch.library.register_autograd("bsfa::block_maxima", _no_backward, lib=_library)
