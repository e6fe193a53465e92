# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The two steps of block-sparse attention: selecting blocks, and attending to those of a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from bsfa_kernel import _torch_op as _torch_op  # registers the operators
from bsfa_kernel._calls import AttendCall, SelectCall
from bsfa_kernel._checks import as_flag, as_geometry, check_types
from bsfa_kernel._dispatch import dispatch
from bsfa_kernel.geometry import DEFAULT_GEOMETRY, Geometry

select_operator: Callable[..., Any] = torch.ops.bsfa.select_blocks.default
attend_operator: Callable[..., Any] = torch.ops.bsfa.attend_blocks.default


def select_blocks(
    q: Tensor,
    k: Tensor,
    thresholds: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    rule: str = "absolute",
    geometry: Geometry = DEFAULT_GEOMETRY,
    voters: int = 1,
    precision: str = "int8",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The blocks that ``block_sparse_attention`` would keep, as a block mask.

    Args: as there, but for

        precision: "int8" goes by scores of queries and keys rounded to 8 bits, which take half the
            time, "exact" by those that attention uses.
        max_seqlen_k: keys of the longest sequence, or more: of packed keys, total_k by default, of
            paged keys, max_pages * page_size by default and at most. It sets the number of words.
            On a GPU a longer sequence gets all bits.

    Returns:
        int64 [batch, heads, q_blocks, words], of packed queries [heads, total_q // q_block +
        2 * batch, words], with words = ceil(k_blocks / 64), of packed and paged keys
        ceil(max_seqlen_k / 4096). Bit j of word i stands for key block 64 * i + j;
        ``unpack_blocks`` makes bools of them. Forced blocks are set; invisible ones, and columns
        that belong to no query block, are not. In graphs that are exported with dynamic lengths the
        mask needs two query blocks and two words, as torch makes a case of its own of a dimension
        of 1; ``block_sparse_attention`` has no mask in its graph, and takes any.

    Raises: as ``block_sparse_attention``.
    """
    geometry = as_geometry(geometry)
    call = SelectCall(
        q,
        k,
        thresholds,
        cu_seqlens_q,
        cu_seqlens_k,
        as_flag(causal, "causal"),
        scale,
        rule,
        geometry[0],
        geometry[1],
        voters,
        precision,
        max_seqlen_k,
        block_table,
        seqused_k,
        sinks,
    )
    check_types(call)
    block_mask: Tensor = dispatch(select_operator, call)
    return block_mask


@overload
def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    geometry: Geometry = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    return_kept: Literal[False] = ...,
) -> Tensor: ...


@overload
def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    geometry: Geometry = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
    return_kept: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    geometry: Geometry = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    return_kept: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    geometry: Geometry = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
    return_kept: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    geometry: Geometry = DEFAULT_GEOMETRY,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    return_kept: bool = False,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Attention over the blocks of a mask, whoever made it.

    Within a block a query sees the keys that it sees anyway: all, or with ``causal`` those up to
    its own. A visible block takes part if and only if its bit is set, be it forced or not; bits of
    other blocks are ignored. CPU tensors are computed by ``bsfa_kernel.reference``, CUDA tensors by
    the native library. There is no backward pass.

    Args:
        q: as in ``block_sparse_attention``, and so are ``k``, ``v``, ``causal``, ``scale``,
            ``cu_seqlens_*``, ``block_table``, ``seqused_k`` and ``sinks``.
        k: as there.
        v: as there.
        block_mask: int64 [batch, heads, q_blocks, words], of packed queries [heads, total_q //
            q_block + 2 * batch, words], as ``select_blocks`` and ``pack_blocks`` make it; of padded
            keys words = ceil(k_blocks / 64). A sequence of packed or paged keys with more key
            blocks than bits gets NaN.
        causal: query i sees keys j <= i + seqlen_k - seqlen_q; else all keys.
        scale: factor of the scores, positive; head_dim ** -0.5 by default.
        geometry: queries and keys of a block, one of ``GEOMETRIES``.
        cu_seqlens_q: int32 [batch + 1], from 0 to total_q.
        cu_seqlens_k: int32 [batch + 1], from 0 to total_k.
        block_table: int32 [batch, max_pages], with ``seqused_k``.
        seqused_k: int32 [batch].
        sinks: float32 [heads].
        return_lse: also return the log-sum-exp of the scores attended to, and of the sink.
        return_kept: also return how many visible blocks each query block attended to.

    Returns:
        As ``block_sparse_attention``. A query without a key in its blocks has output 0, and
        as its lse the sink of its head or -inf.

    Raises: as ``block_sparse_attention``.
    """
    geometry = as_geometry(geometry)
    call = AttendCall(
        q,
        k,
        v,
        block_mask,
        None,
        cu_seqlens_q,
        cu_seqlens_k,
        as_flag(causal, "causal"),
        scale,
        geometry[0],
        geometry[1],
        as_flag(return_lse, "return_lse"),
        as_flag(return_kept, "return_kept"),
        block_table,
        seqused_k,
        sinks,
    )
    check_types(call)
    out, lse, kept = dispatch(attend_operator, call)
    if return_lse:
        return (out, lse, kept) if return_kept else (out, lse)
    if return_kept:
        return out, kept
    return out  # type: ignore[no-any-return]
