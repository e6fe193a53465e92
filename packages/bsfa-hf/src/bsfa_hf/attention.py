# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The attention function "bsfa" of transformers' AttentionInterface."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bsfa_calib.binding import State
from bsfa_calib.reasons import Reason
from bsfa_calib.switch import register as register_attention
from bsfa_hf import automatic
from bsfa_hf.dense import dense_attention, packed_mask
from bsfa_hf.masks import Plan, bsfa_mask, equal_spans, plan_of, window_bites
from bsfa_hf.state import state_of
from bsfa_kernel import Geometry, block_sparse_attention, build_info
from bsfa_kernel.geometry import can_skip

NAME = "bsfa"

_PACKED = "_bsfa_lengths"


def register() -> None:
    """Make ``attn_implementation="bsfa"`` known to transformers."""
    register_attention(NAME, bsfa_attention, bsfa_mask)


def bsfa_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Block-sparse attention where it applies, the model's dense attention elsewhere.

    Args:
        module: the attention module; its ``layer_idx`` finds the thresholds.
        query: [batch, heads, seqlen_q, head_dim].
        key: [batch, kv_heads, seqlen_k, head_dim].
        value: as key.
        attention_mask: what `bsfa_mask` made, or a user's own 4-D mask.
        dropout: probability of attention dropout; must be 0.
        scaling: factor of the scores; head_dim ** -0.5 by default.
        is_causal: whether attention is causal; the module's ``is_causal`` by default.
        kwargs: what else transformers passes: sliding_window, softcap, s_aux, position_bias,
            cu_seq_lens_q, cu_seq_lens_k, output_attentions and more.

    Returns:
        [batch, seqlen_q, heads, head_dim], and None for the attention weights. Padded positions
        are 0 where a call runs block-sparse.

    Raises:
        ValueError: something is asked for that cannot be honoured; the message says what.
    """
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    config = getattr(module, "config", None)
    causal = causal and getattr(config, "is_causal", True) is not False
    options = {"dropout": dropout, "scaling": scaling, **kwargs}
    layer = getattr(module, "layer_idx", None)
    state = state_of(module)
    if state is None and causal and layer is not None:
        state = automatic.state_for(module)
    if state is None:
        # Another part of a composite model, such as a vision tower.
        return dense_attention(
            module, query, key, value, attention_mask, None, causal=causal, options=options
        ), None

    check_supported(module, dropout, kwargs)
    assert isinstance(layer, int)
    check_layer(state, layer, query)
    if query.shape[0] == 0 or query.shape[2] == 0:
        return query.new_zeros(
            (*query.shape[:1], query.shape[2], query.shape[1], value.shape[-1])
        ), None

    reason = _reason_of_layer(module, query, key, value, causal, kwargs)
    if kwargs.get("cu_seq_lens_q") is not None and reason is not Reason.NOT_CAUSAL:
        return _packed(
            state, module, query, key, value, attention_mask, reason, options, layer
        ), None
    plan: Plan | None = None
    if reason is None:
        reason, plan = _reason_of_call(attention_mask, query, key, state.geometry)
    elif attention_mask is not None and attention_mask.ndim == 2:
        plan = plan_of(attention_mask, query.shape[2], key.shape[2])
    if reason is not None:
        state.statistics.count_dense(layer, reason)
        return dense_attention(
            module, query, key, value, attention_mask, plan, causal=causal, options=options
        ), None
    thresholds = state.layer_thresholds(layer, query.device)
    return _sparse(state, layer, query, key, value, thresholds, plan, scaling), None


def check_supported(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """Refuse what no kernel of this package can do.

    Raises:
        ValueError: attention weights or dropout are asked for.
    """
    config = getattr(module, "config", None)
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError(
            "output_attentions=True asks for attention weights, which block-sparse attention never "
            'forms; use attn_implementation="eager" for them'
        )
    if dropout > 0:
        raise ValueError(
            f"block-sparse attention has no dropout, got dropout={dropout}: call model.eval(), or "
            'train with attn_implementation="sdpa"'
        )


def check_layer(state: State, layer: int, query: Tensor) -> None:
    """Check that a layer is the one that thresholds were made for.

    Raises:
        ValueError: there are no thresholds for the layer, or for another number of heads.
    """
    if not 0 <= layer < len(state.thresholds):
        raise ValueError(
            f"the thresholds of {state.description} are for {len(state.thresholds)} layers, and "
            f"the model has a layer with index {layer}"
        )
    heads = state.thresholds[layer].shape[0]
    if query.shape[1] != heads:
        raise ValueError(
            f"the thresholds of {state.description} are for {heads} query heads, and layer {layer} "
            f"has {query.shape[1]}"
        )


def _reason_of_layer(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    kwargs: dict[str, Any],
) -> Reason | None:
    """Why a layer runs dense whatever the mask."""
    if not causal:
        return Reason.NOT_CAUSAL
    if kwargs.get("softcap") is not None:
        return Reason.SOFTCAP
    if kwargs.get("s_aux") is not None:
        return Reason.SINKS
    if kwargs.get("position_bias") is not None:
        return Reason.BIAS
    window = kwargs.get("sliding_window")
    if window is not None and window_bites(getattr(module, "config", None), window):
        return Reason.SLIDING_WINDOW
    if value.shape[-1] != key.shape[-1]:
        return Reason.HEAD_DIMS
    if query.is_cuda:
        # Without any kernel the call is left to bsfa-kernel, whose error tells why there is none.
        head_dims = kernel_head_dims()
        if head_dims and query.shape[-1] not in head_dims:
            return Reason.NO_KERNEL
    return None


@functools.cache
def kernel_head_dims() -> tuple[int, ...]:
    """Head dimensions that the native library has kernels for."""
    return build_info().head_dims


def _reason_of_call(
    mask: Tensor | None, query: Tensor, key: Tensor, geometry: Geometry
) -> tuple[Reason | None, Plan | None]:
    """Why a call runs dense, and the plan of its mask."""
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if mask is None:
        if seqlen_q == 1:
            return Reason.DECODE, None
        offset, spans = seqlen_k - seqlen_q, [(seqlen_q, seqlen_k)]
        plan = None
    elif torch.compiler.is_compiling():
        return Reason.DECODE if seqlen_q == 1 else Reason.TRACED_MASK, None
    else:
        if seqlen_q == 1 and mask.ndim == 4:
            return Reason.DECODE, None
        plan = plan_of(mask, seqlen_q, seqlen_k)
        if plan.reason is not None:
            return plan.reason, plan
        offset = plan.offset
        spans = [(span.seqlen_q, span.seqlen_k) for span in plan.spans or ()]
    # Chunks of a prefill begin with a block; what begins within one and is shorter is a decode
    # step of several tokens (a draft to be verified, the next line of a chat).
    prefill = plan is not None and plan.prefill
    if not prefill and offset % geometry.q_block and seqlen_q < geometry.q_block:
        return Reason.DECODE, plan
    if not any(can_skip(*span, geometry) for span in spans):
        return Reason.TOO_SHORT, plan
    return None, plan


def _sparse(
    state: State,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thresholds: Tensor,
    plan: Plan | None,
    scaling: float | None,
) -> Tensor:
    """Run the kernel on a batch, row by row where the rows are padded differently."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    kept: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, part = block_sparse_attention(
            q,
            k,
            v,
            thresholds,
            scale=scaling,
            rule=state.rule,
            geometry=state.geometry,
            return_kept=True,
        )
        kept.append(part)
        return out

    spans = plan.spans if plan is not None else None
    lengths: Sequence[tuple[int, int]]
    if spans is None:
        out = attend(q, k, v)
        lengths = [(q.shape[1], k.shape[1])] * q.shape[0]
    elif equal_spans(spans) and spans[0].seqlen_q == q.shape[1]:
        out = attend(q, k[:, spans[0].keys], v[:, spans[0].keys])
        lengths = [(span.seqlen_q, span.seqlen_k) for span in spans]
    else:
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        for row, span in enumerate(spans):
            if span.seqlen_q:
                out[row, span.queries] = attend(
                    q[row : row + 1, span.queries],
                    k[row : row + 1, span.keys],
                    v[row : row + 1, span.keys],
                )[0]
        lengths = [(span.seqlen_q, span.seqlen_k) for span in spans if span.seqlen_q]
    state.statistics.count_sparse(layer, kept, lengths, state.geometry)
    return out


def _packed(
    state: State,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    reason: Reason | None,
    options: dict[str, Any],
    layer: int,
) -> Tensor:
    """Several sequences in one batch row, told apart by cu_seq_lens_q and cu_seq_lens_k."""
    starts_q = options["cu_seq_lens_q"]
    starts_k = options.get("cu_seq_lens_k")
    starts_k = starts_q if starts_k is None else starts_k
    if query.shape[0] != 1 or (mask is not None and mask.ndim == 2):
        raise ValueError(
            "packed sequences (cu_seq_lens_q) must lie in one batch row without padding, got "
            f"{query.shape[0]} rows" + (" and a padding mask" if mask is not None else "")
        )
    lengths = _lengths(starts_q, starts_k, query.shape[2], key.shape[2])
    if reason is not None:
        if mask is None:
            mask = packed_mask(starts_q, starts_k, query.device)
        state.statistics.count_dense(layer, reason)
        return dense_attention(module, query, key, value, mask, None, causal=True, options=options)
    thresholds = state.layer_thresholds(layer, query.device)
    if all(seqlen_q <= 1 for seqlen_q, _ in lengths):
        reason, thresholds = Reason.DECODE, torch.full_like(thresholds, -math.inf)
    elif not any(can_skip(*each, state.geometry) for each in lengths):
        reason = Reason.TOO_SHORT
    out, kept = block_sparse_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        thresholds,
        scale=options["scaling"],
        rule=state.rule,
        geometry=state.geometry,
        cu_seqlens_q=starts_q.to(torch.int32),
        cu_seqlens_k=starts_k.to(torch.int32),
        return_kept=True,
    )
    if reason is None:
        state.statistics.count_sparse(layer, [kept], lengths, state.geometry)
    else:
        state.statistics.count_dense(layer, reason)
    return out[None]


def _lengths(
    starts_q: Tensor, starts_k: Tensor, total_q: int, total_k: int
) -> list[tuple[int, int]]:
    """Queries and keys of packed sequences, read from the device once a forward pass."""
    found = getattr(starts_q, _PACKED, None)
    if found is not None and found[0] == (total_q, total_k):
        return found[1]  # type: ignore[no-any-return]
    ends_q, ends_k = starts_q.tolist(), starts_k.tolist()
    if (ends_q[0], ends_k[0], ends_q[-1], ends_k[-1]) != (0, 0, total_q, total_k) or len(
        ends_q
    ) != len(ends_k):
        raise ValueError(
            f"cu_seq_lens_q must go from 0 to {total_q} and cu_seq_lens_k from 0 to {total_k}, "
            f"with as many entries, got {ends_q} and {ends_k}"
        )
    lengths = [
        (ends_q[i + 1] - ends_q[i], ends_k[i + 1] - ends_k[i]) for i in range(len(ends_q) - 1)
    ]
    setattr(starts_q, _PACKED, ((total_q, total_k), lengths))
    return lengths
