# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Dense attention of a transformers model, and why a layer can have no other."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bsfa_calib.reasons import Reason
from bsfa_kernel import build_info

# Arguments of attention functions that change nothing of what is computed for one whole prompt.
_HARMLESS = frozenset(
    {
        *("cache_position", "deterministic", "logits_to_keep", "max_length_k", "max_length_q"),
        *("num_items_in_batch", "output_attentions", "output_hidden_states"),
        *("output_router_logits", "position_ids", "return_dict", "token_type_ids", "use_cache"),
    }
)
_UNDERSTOOD = frozenset(
    {"dropout", "position_bias", "s_aux", "scaling", "sliding_window", "softcap"}
)


def unknown_arguments(options: Mapping[str, Any]) -> list[str]:
    """Names of what a model passes to its attention function and nobody here understands.

    A model that passes, say, the indices of the keys to look at would be computed wrongly by
    whoever passes over them.
    """
    return sorted(
        name
        for name, value in options.items()
        if value is not None
        and value is not False
        and name not in _HARMLESS
        and name not in _UNDERSTOOD
    )


def dense_reason(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool | None,
    options: Mapping[str, Any],
) -> Reason | None:
    """Why a layer runs dense whatever its mask; None if nothing speaks against skipping.

    Args:
        module: the attention module.
        query: [batch, heads, seqlen_q, head_dim].
        key: [batch, kv_heads, seqlen_k, head_dim].
        value: [batch, kv_heads, seqlen_k, head_dim of values].
        is_causal: as the model passes it; the module's own ``is_causal`` where it does not.
        options: the further arguments of the attention function.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    config = getattr(module, "config", None)
    if not causal or getattr(config, "is_causal", True) is False:
        return Reason.NOT_CAUSAL
    if options.get("softcap") is not None:
        return Reason.SOFTCAP
    if options.get("s_aux") is not None:
        return Reason.SINKS
    if options.get("position_bias") is not None:
        return Reason.BIAS
    window = options.get("sliding_window")
    if window is not None and window < key.shape[2]:
        return Reason.SLIDING_WINDOW
    return head_dim_reason(query, key, value)


def head_dim_reason(query: Tensor, key: Tensor, value: Tensor) -> Reason | None:
    """Why a layer runs dense because of its head_dim, the last extent of each tensor."""
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


def model_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool | None,
    options: Mapping[str, Any],
) -> Tensor:
    """What SDPA computes, or the model's own eager function where SDPA cannot.

    Args:
        module: the attention module.
        query: [batch, heads, seqlen_q, head_dim].
        key: [batch, kv_heads, seqlen_k, head_dim].
        value: [batch, kv_heads, seqlen_k, head_dim of values].
        mask: None for the causal one, or bool or additive, [batch, heads or 1, seqlen_q, seqlen_k].
        is_causal: as the model passes it.
        options: the further arguments of the attention function.

    Returns:
        [batch, seqlen_q, heads, head_dim of values].

    Raises:
        NotImplementedError: scores are capped or there are sinks, and the model has no eager
            function.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    eager = options.get("softcap") is not None or options.get("s_aux") is not None
    if mask is None and causal and seqlen_q > 1 and (eager or seqlen_q != seqlen_k):
        last_seen = torch.arange(seqlen_q, device=query.device)[:, None] + seqlen_k - seqlen_q
        mask = (torch.arange(seqlen_k, device=query.device) <= last_seen)[None, None]
    if not eager:
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, is_causal=is_causal, **options
        )
        return out
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise NotImplementedError(
            f"{type(module).__name__} caps its scores or has attention sinks, which SDPA cannot "
            "compute, and its module has no eager_attention_forward to compute them with"
        )
    if mask is not None and mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        mask = torch.where(mask, 0.0, hidden).to(query.dtype)
    computed: Tensor = function(module, query, key, value, mask, **options)[0]
    return computed


def named(dense: Mapping[int, str]) -> str:
    """Layers by the reason why they run dense, as ``layers 0, 2: sliding-window layer``."""
    by_reason: dict[str, list[int]] = {}
    for layer, reason in sorted(dense.items()):
        by_reason.setdefault(reason, []).append(layer)
    return "; ".join(
        f"layers {', '.join(map(str, layers))}: {reason}" for reason, layers in by_reason.items()
    )
