# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The operators torch.ops.bsfa.forward, select_blocks, attend_blocks and block_maxima.

Made with ``Library.define`` and ``impl``, because the wrapper of ``custom_op`` costs several times
as much a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bsfa_kernel import _native
from bsfa_kernel._auto import takes_two_steps
from bsfa_kernel._calls import (
    AnyCall,
    AttendCall,
    BlockMaximaCall,
    ForwardCall,
    SelectCall,
    attend_step,
    columns_shape,
    mask_words,
    most_keys,
    select_step,
)
from bsfa_kernel._checks import (
    check_attend,
    check_block_maxima,
    check_forward,
    check_kernel_tensors,
    check_select,
)
from bsfa_kernel._dispatch import refuse_derivatives
from bsfa_kernel.geometry import block_count
from bsfa_kernel.masks import pack_blocks
from bsfa_kernel.reference.forward import run, run_attend
from bsfa_kernel.reference.selection import run_block_maxima, run_select

_library: Any = torch.library.Library("bsfa", "DEF")  # type: ignore[no-untyped-call]
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_library.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor thresholds, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, bool causal, float? scale, str rule, int q_block, int k_block, "
    "int voters, bool return_lse, bool return_kept, str selection='exact', "
    "SymInt? max_seqlen_k=None, Tensor? block_table=None, Tensor? seqused_k=None, "
    "Tensor? sinks=None) -> (Tensor out, Tensor lse, Tensor kept)",
    tags=_tags,
)
_library.define(
    "select_blocks(Tensor q, Tensor k, Tensor thresholds, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, bool causal, float? scale, str rule, int q_block, int k_block, "
    "int voters, str precision, SymInt? max_seqlen_k, Tensor? block_table=None, "
    "Tensor? seqused_k=None, Tensor? sinks=None) -> Tensor",
    tags=_tags,
)
_library.define(
    "attend_blocks(Tensor q, Tensor k, Tensor v, Tensor block_mask, Tensor? thresholds, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, float? scale, int q_block, "
    "int k_block, bool return_lse, bool return_kept, Tensor? block_table=None, "
    "Tensor? seqused_k=None, Tensor? sinks=None) -> (Tensor out, Tensor lse, Tensor kept)",
    tags=_tags,
)
_library.define(
    "block_maxima(Tensor q, Tensor k, bool causal, float? scale, str rule, int q_block, "
    "int k_block, Tensor? block_table=None, Tensor? seqused_k=None, "
    "Tensor? sinks=None) -> Tensor",
    tags=_tags,
)

_Outputs = tuple[Tensor, Tensor | None, Tensor | None]
"""out, lse and kept; None where not asked for."""


def _allocate(call: ForwardCall | AttendCall, lse_dtype: torch.dtype) -> _Outputs:
    """The outputs, unwritten."""
    q = call.q
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = kept = None
    if call.return_lse:
        *batch, seqlen_q, heads, _ = q.shape
        lse = q.new_empty((*batch, heads, seqlen_q), dtype=lse_dtype)
    if call.return_kept:
        kept = q.new_empty(columns_shape(call), dtype=torch.int32)
    return out, lse, kept


def _all_three(outputs: _Outputs) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs as the operator has them: empty where not asked for."""
    out, lse, kept = outputs
    return (
        out,
        out.new_empty(0, dtype=torch.float32) if lse is None else lse,
        out.new_empty(0, dtype=torch.float32) if kept is None else kept,
    )


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check_on_device(call: AnyCall) -> None:
    """Refuse while a graph is traced what the kernels would refuse when it runs."""
    if call.q.device.type == "cuda":
        check_kernel_tensors(call)


@torch.library.impl(_library, "forward", "CPU")
def _forward_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = ForwardCall(*arguments)
    check_forward(call)
    if _in_two_steps(call):
        block_mask = pack_blocks(run_select(select_step(call)).mask)
        result = run_attend(attend_step(call, block_mask))
    else:
        result = run(call)
    lse = result.lse if call.return_lse else None
    kept = result.kept if call.return_kept else None
    return _all_three((result.out, lse, kept))


@torch.library.impl(_library, "forward", "CUDA")
def _forward_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = ForwardCall(*arguments)
    check_forward(call)
    check_kernel_tensors(call)
    return _all_three(launch_forward(call))


def _in_two_steps(call: ForwardCall) -> bool:
    """Whether a call is computed so; the mask between them is in no graph, nor are its sizes."""
    return call.selection != "exact" and takes_two_steps(call.selection, most_keys(call))


def launch_forward(call: ForwardCall) -> _Outputs:
    """Run the kernel, or those of the two steps, on arguments that have been checked.

    Raises:
        ValueError: the library refuses the arguments; its message names rule and value.
        NotImplementedError: no native library, or valid but unsupported by it or by the GPU.
        RuntimeError: a CUDA call failed.
    """
    if _in_two_steps(call):
        block_mask = launch_select_blocks(select_step(call))
        return launch_attend_blocks(attend_step(call, block_mask))
    out, lse, kept = _allocate(call, torch.float32)
    _native.forward(call, out, lse, kept)
    return out, lse, kept


@torch.library.register_fake("bsfa::forward", lib=_library)  # type: ignore[untyped-decorator]
def _forward_fake(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = ForwardCall(*arguments, **named)
    check_forward(call)
    _check_on_device(call)
    return _all_three(_allocate(call, _lse_dtype(call.q)))


@torch.library.impl(_library, "select_blocks", "CPU")
def _select_blocks_cpu(*arguments: Any) -> Tensor:
    call = SelectCall(*arguments)
    check_select(call)
    return pack_blocks(run_select(call).mask)


@torch.library.impl(_library, "select_blocks", "CUDA")
def _select_blocks_cuda(*arguments: Any) -> Tensor:
    call = SelectCall(*arguments)
    check_select(call)
    check_kernel_tensors(call)
    return launch_select_blocks(call)


def launch_select_blocks(call: SelectCall) -> Tensor:
    """Run the kernels on arguments that have been checked; the errors are ``launch_forward``'s."""
    block_mask = _empty_mask(call)
    _native.select_blocks(call, block_mask)
    return block_mask


@torch.library.register_fake("bsfa::select_blocks", lib=_library)  # type: ignore[untyped-decorator]
def _select_blocks_fake(*arguments: Any, **named: Any) -> Tensor:
    call = SelectCall(*arguments, **named)
    check_select(call)
    _check_on_device(call)
    return _empty_mask(call)


def _empty_mask(call: SelectCall) -> Tensor:
    """The block mask, unwritten."""
    return call.q.new_empty((*columns_shape(call), mask_words(call)), dtype=torch.int64)


@torch.library.impl(_library, "attend_blocks", "CPU")
def _attend_blocks_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = AttendCall(*arguments)
    check_attend(call)
    result = run_attend(call)
    lse = result.lse if call.return_lse else None
    kept = result.kept if call.return_kept else None
    return _all_three((result.out, lse, kept))


@torch.library.impl(_library, "attend_blocks", "CUDA")
def _attend_blocks_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = AttendCall(*arguments)
    check_attend(call)
    check_kernel_tensors(call)
    return _all_three(launch_attend_blocks(call))


def launch_attend_blocks(call: AttendCall) -> _Outputs:
    """Run the kernels on arguments that have been checked; the errors are ``launch_forward``'s."""
    out, lse, kept = _allocate(call, torch.float32)
    _native.attend_blocks(call, out, lse, kept)
    return out, lse, kept


@torch.library.register_fake("bsfa::attend_blocks", lib=_library)  # type: ignore[untyped-decorator]
def _attend_blocks_fake(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = AttendCall(*arguments, **named)
    check_attend(call)
    _check_on_device(call)
    return _all_three(_allocate(call, _lse_dtype(call.q)))


@torch.library.impl(_library, "block_maxima", "CPU")
def _block_maxima_cpu(*arguments: Any) -> Tensor:
    call = BlockMaximaCall(*arguments)
    check_block_maxima(call)
    return run_block_maxima(call).float()


@torch.library.impl(_library, "block_maxima", "CUDA")
def _block_maxima_cuda(*arguments: Any) -> Tensor:
    call = BlockMaximaCall(*arguments)
    check_block_maxima(call)
    check_kernel_tensors(call)
    maxima = _empty_maxima(call)
    _native.block_maxima(call, maxima)
    return maxima


@torch.library.register_fake("bsfa::block_maxima", lib=_library)  # type: ignore[untyped-decorator]
def _block_maxima_fake(*arguments: Any, **named: Any) -> Tensor:
    call = BlockMaximaCall(*arguments, **named)
    check_block_maxima(call)
    _check_on_device(call)
    return _empty_maxima(call)


def _empty_maxima(call: BlockMaximaCall) -> Tensor:
    shape = (*columns_shape(call), block_count(most_keys(call), call.k_block))
    return call.q.new_empty(shape, dtype=torch.float32)


for _name in ("forward", "select_blocks", "attend_blocks", "block_maxima"):
    torch.library.register_autograd(f"bsfa::{_name}", refuse_derivatives, lib=_library)
