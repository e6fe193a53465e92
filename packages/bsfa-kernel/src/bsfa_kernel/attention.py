# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The public functions on tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from bsfa_kernel import _torch_op as _torch_op  # registers the operators
from bsfa_kernel._calls import BlockMaximaCall, ForwardCall
from bsfa_kernel._checks import check_geometry, check_types, passes_fast_check
from bsfa_kernel.geometry import DEFAULT_GEOMETRY, Geometry


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    rule: str = ...,
    geometry: Geometry = ...,
    voters: int = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    return_kept: Literal[False] = ...,
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    rule: str = ...,
    geometry: Geometry = ...,
    voters: int = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[True],
    return_kept: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    rule: str = ...,
    geometry: Geometry = ...,
    voters: int = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    return_kept: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    rule: str = ...,
    geometry: Geometry = ...,
    voters: int = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[True],
    return_kept: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    rule: str = "absolute",
    geometry: Geometry = DEFAULT_GEOMETRY,
    voters: int = 1,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    return_kept: bool = False,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Attention that leaves out the key blocks whose scores stay below a threshold.

    Block-Sparse FlashAttention (arXiv 2512.07011): every score is computed exactly, and what a
    block of them would add is left out where the rule says that it is below the threshold.
    docs/semantics.md has the whole meaning. CPU tensors are computed by ``bsfa_kernel.reference``,
    CUDA tensors by the native library. There is no backward pass.

    Args:
        q: [batch, seqlen_q, heads, head_dim]; float16 or bfloat16, on a CPU also float32 or
            float64; any strides, whose last is 1 on a GPU. With ``cu_seqlens_*``:
            [total_q, heads, head_dim].
        k: [batch, seqlen_k, kv_heads, head_dim], or [total_k, kv_heads, head_dim]; heads is a
            multiple of kv_heads, and query head h reads kv head h // (heads / kv_heads).
        v: as k.
        thresholds: float32 [heads, rows], in units of scaled scores. Row i serves the query block
            at absolute position i; the last row serves every later one. -inf keeps everything,
            +inf only the forced blocks.
        causal: query i sees keys j <= i + seqlen_k - seqlen_q; else all keys.
        scale: factor of the scores, positive; head_dim ** -0.5 by default.
        rule: one of ``RULES``: what a block's scores are compared with.
        geometry: the sparsity block that the thresholds were made for, one of ``GEOMETRIES``.
        voters: one query row in so many decides which blocks are kept, one of ``VOTERS``; the
            number that the thresholds were made for.
        cu_seqlens_q: int32 [batch + 1], from 0 to total_q: where packed sequences begin and end.
        cu_seqlens_k: int32 [batch + 1], from 0 to total_k.
        return_lse: also return the log-sum-exp of the scores kept.
        return_kept: also return how many key blocks each query block kept.

    Returns:
        The output, as q; then, where asked for, lse: float32 [batch, heads, seqlen_q] (varlen
        [heads, total_q]; float64 from float64 inputs), and kept: int32 [batch, heads, q_blocks]
        (varlen [heads, total_q // q_block + batch]). A query that keeps nothing has output 0 and
        lse -inf.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument that breaks a rule; the message names rule and value.
        NotImplementedError: CUDA tensors without a native library, or a valid call that the library
            or the GPU does not support; in the backward pass.
        RuntimeError: a CUDA call failed.
    """
    check_geometry(geometry)
    call = ForwardCall(
        q,
        k,
        v,
        thresholds,
        cu_seqlens_q,
        cu_seqlens_k,
        bool(causal),
        scale,
        rule,
        geometry[0],
        geometry[1],
        voters,
        bool(return_lse),
        bool(return_kept),
    )
    outputs: Any
    if can_bypass_dispatcher(call) and passes_fast_check(call):
        outputs = _torch_op.launch_forward(call)
    else:
        outputs = _dispatch(_forward, call)
    out, lse, kept = outputs
    if return_lse:
        return (out, lse, kept) if return_kept else (out, lse)
    if return_kept:
        return out, kept
    return out  # type: ignore[no-any-return]


def block_maxima(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    rule: str = "absolute",
    geometry: Geometry = DEFAULT_GEOMETRY,
) -> Tensor:
    """The quantity that is compared with the thresholds, for every block.

    The maximum over the visible scores of a block of score - reference, the references of the
    relative rules being those of a run that keeps every block. Calibration is made of it.

    Args: as of padded tensors in ``block_sparse_attention``, and so are the errors.

    Returns:
        float32 [batch, heads, q_blocks, k_blocks]; -inf where no score is visible, +inf where a
        relative rule meets a row that has seen nothing yet, NaN where a score or a row's reference
        is NaN.
    """
    check_geometry(geometry)
    call = BlockMaximaCall(q, k, bool(causal), scale, rule, geometry[0], geometry[1])
    maxima: Tensor = _dispatch(_block_maxima, call)
    return maxima


_forward: Callable[..., Any] = torch.ops.bsfa.forward.default
_block_maxima: Callable[..., Any] = torch.ops.bsfa.block_maxima.default


def can_bypass_dispatcher(call: ForwardCall) -> bool:
    """Whether plain CUDA tensors may go to the kernel at once, past dispatcher and checks.

    Those take as long as a launch. False if a tracer, mode, transform, profiler or autograd must
    see this call.
    """
    if torch.compiler.is_compiling():
        return False
    q, k, v, thresholds = call[:4]
    return not (
        type(q) not in _PLAIN
        or type(k) not in _PLAIN
        or type(v) not in _PLAIN
        or type(thresholds) not in _PLAIN
        or not q.is_cuda
        or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _dispatch(operator: Callable[..., Any], call: ForwardCall | BlockMaximaCall) -> Any:
    """Call an operator, below autograd where that has nothing to do.

    Autograd's step is in Python, and would be a good part of what a call costs on the host.
    """
    check_types(call)
    inputs = call[:3] if isinstance(call, ForwardCall) else call[:2]
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    ):
        return operator(*call)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*call)
