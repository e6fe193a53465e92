# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The public functions on tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from bsfa_kernel import _torch_op
from bsfa_kernel._auto import check_expected_skipped, resolve_but_for_length
from bsfa_kernel._calls import BlockMaximaCall, ForwardCall
from bsfa_kernel._checks import as_flag, as_geometry, check_types, passes_fast_check
from bsfa_kernel._dispatch import can_bypass_dispatcher, dispatch
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
    selection: str = ...,
    expected_skipped: float | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    sinks: Tensor | None = ...,
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
    selection: str = ...,
    expected_skipped: float | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    sinks: Tensor | None = ...,
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
    selection: str = ...,
    expected_skipped: float | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    sinks: Tensor | None = ...,
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
    selection: str = ...,
    expected_skipped: float | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    sinks: Tensor | None = ...,
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
    selection: str = "exact",
    expected_skipped: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    return_kept: bool = False,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Attention that leaves out the key blocks whose scores stay below a threshold.

    Block-Sparse FlashAttention (arXiv 2512.07011): what a block of scores would add is left out
    where the rule says that it is below the threshold. The verdict is on the exact scores, or with
    ``selection="int8"`` on scores of rounded queries and keys; what is kept is always computed
    exactly. docs/semantics.md has the whole meaning. CPU tensors are computed by
    ``bsfa_kernel.reference``, CUDA tensors by the native library. There is no backward pass.

    Args:
        q: [batch, seqlen_q, heads, head_dim]; float16 or bfloat16, on a CPU also float32 or
            float64; any strides, whose last is 1 on a GPU. With ``cu_seqlens_q``:
            [total_q, heads, head_dim].
        k: [batch, seqlen_k, kv_heads, head_dim], with ``cu_seqlens_k`` [total_k, kv_heads,
            head_dim], with ``block_table`` [pages, page_size, kv_heads, head_dim], page_size a
            multiple of 16; heads is a multiple of kv_heads, and query head h reads kv head
            h // (heads / kv_heads).
        v: as k, with strides of its own.
        thresholds: float32 [heads, rows], in units of scaled scores. Query blocks start at absolute
            positions that are multiples of q_block; row i serves the one from i * q_block on, and
            the last row every later one. -inf keeps everything, +inf only the forced blocks.
        causal: query i, whose absolute position is i + seqlen_k - seqlen_q, sees the keys up to
            that position; else all keys.
        scale: factor of the scores, 2**-126 to 2**127; head_dim ** -0.5 by default.
        rule: one of ``RULES``: what a block's scores are compared with.
        geometry: the sparsity block that the thresholds were made for, one of ``GEOMETRIES``.
        voters: one query row in so many decides which blocks are kept, one of ``VOTERS``; the
            number that the thresholds were made for.
        selection: "exact" decides by exact scores, in one kernel with attention. "int8" is
            ``select_blocks``, then ``attend_blocks``: faster where most blocks are skipped. "auto"
            is what ``resolve_selection`` says: "exact", but on a GPU with kernels for both steps
            "int8" in long calls of which ``expected_skipped`` is enough.
        expected_skipped: for "auto": the share of blocks that these thresholds are expected to
            skip, between 0 and 1; "exact" where it is not known.
        cu_seqlens_q: int32 [batch + 1], from 0 to total_q: where packed sequences begin and end.
        cu_seqlens_k: int32 [batch + 1], from 0 to total_k.
        block_table: int32 [batch, max_pages], last stride 1: which pages hold a sequence's keys.
            Key j of sequence b is ``k[block_table[b, j // page_size], j % page_size]``; entries
            past the sequence's last page are not read. Needs ``seqused_k``.
        seqused_k: int32 [batch]: how many keys each sequence has, where k is padded or paged;
            others are never read. With it, packed queries have ``cu_seqlens_q`` alone. At most as
            many as there is room for: on a GPU, where it cannot be checked, a sequence with more
            gets NaN.
        max_seqlen_k: keys of the longest sequence, or more: of packed keys, total_k by default and
            not for "exact"; of paged keys, max_pages * page_size by default and at most. With
            "int8" and "auto" it sets the size of the block mask, and is what "auto" takes for the
            call's length. On a GPU, where it cannot be checked, a longer sequence that does not fit
            gets NaN.
        sinks: float32 [heads], in units of scaled scores: a score of each head that takes part in
            the softmax of its rows and has no value, -inf for none. Under the relative rules it
            counts as a peak that each row has seen at first.
        return_lse: also return the log-sum-exp of the scores kept, and of the sink.
        return_kept: also return how many key blocks each query block kept. Graphs that are exported
            with a dynamic seqlen_q then need two query blocks, as torch makes a case of its own of
            a dimension of 1; without it they take any lengths.

    Returns:
        The output, as q; then, where asked for, lse: float32 [batch, heads, seqlen_q] (packed
        [heads, total_q]; float64 from float64 inputs), and kept: int32 [batch, heads, q_blocks]
        (packed [heads, total_q // q_block + 2 * batch]), whose columns that belong to no query
        block hold 0. A query that keeps nothing has output 0, and
        as its lse the sink of its head or -inf.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument that breaks a rule; the message names rule and value.
        NotImplementedError: CUDA tensors without a native library, or a valid call that the library
            or the GPU does not support; in the backward pass.
        RuntimeError: a CUDA call failed.
    """
    geometry = as_geometry(geometry)
    call = ForwardCall(
        q,
        k,
        v,
        thresholds,
        cu_seqlens_q,
        cu_seqlens_k,
        as_flag(causal, "causal"),
        scale,
        rule,
        geometry[0],
        geometry[1],
        voters,
        as_flag(return_lse, "return_lse"),
        as_flag(return_kept, "return_kept"),
        selection,
        max_seqlen_k,
        block_table,
        seqused_k,
        sinks,
    )
    direct = can_bypass_dispatcher(call) and passes_fast_check(call)
    if not direct:
        check_types(call)
    check_expected_skipped(expected_skipped, selection)
    if selection == "exact" and max_seqlen_k is not None and block_table is None:
        raise ValueError(
            "max_seqlen_k is for selection='int8' and 'auto', or a block table; got "
            f"{max_seqlen_k} with 'exact' and none"
        )
    if selection == "auto":
        resolved = resolve_but_for_length(expected_skipped, geometry, voters, q)
        call = ForwardCall(*call[:14], resolved, *call[15:])
    outputs: Any = _torch_op.launch_forward(call) if direct else dispatch(_forward, call)
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
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The quantity that is compared with the thresholds, for every block.

    The maximum over the visible scores of a block of score - reference, the references of the
    relative rules being those of a run that keeps every block. Calibration is made of it.

    Args: as of padded queries in ``block_sparse_attention``, and so are the errors.

    Returns:
        float32 [batch, heads, q_blocks, k_blocks], k_blocks those of seqlen_k or of
        max_pages * page_size keys; -inf where no score is visible, +inf where a relative rule meets
        a row that has seen nothing yet, NaN where a score or a row's reference is NaN.
    """
    geometry = as_geometry(geometry)
    call = BlockMaximaCall(
        *(q, k, as_flag(causal, "causal"), scale, rule, geometry[0], geometry[1]),
        *(block_table, seqused_k, sinks),
    )
    check_types(call)
    maxima: Tensor = dispatch(_block_maxima, call)
    return maxima


_forward: Callable[..., Any] = torch.ops.bsfa.forward.default
_block_maxima: Callable[..., Any] = torch.ops.bsfa.block_maxima.default
