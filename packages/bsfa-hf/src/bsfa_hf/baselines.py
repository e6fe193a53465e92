# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The attention functions that the paper compares with: a sliding window, and SpargeAttn."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from bsfa_hf.attention import check_supported
from bsfa_hf.dense import dense_attention
from bsfa_hf.masks import DeferredMask, Plan, bsfa_mask, plan_of
from bsfa_hf.state import state_of

WINDOW_NAME = "bsfa_sliding_window"
SPARGE_NAME = "bsfa_sparge"

SPARGE_DEFAULTS = {"simthreshd1": -0.1, "topk": 0.35, "pvthreshd": 15}

# Shorter calls run dense under SpargeAttn, as in the paper's comparison.
_SPARGE_SHORTEST = 129
_QUERIES_AT_A_TIME = 1024


def register() -> None:
    """Make both known to transformers."""
    AttentionInterface.register(WINDOW_NAME, sliding_window_attention)
    AttentionMaskInterface.register(WINDOW_NAME, bsfa_mask)
    AttentionInterface.register(SPARGE_NAME, sparge_attention)
    AttentionMaskInterface.register(SPARGE_NAME, bsfa_mask)


def sparge_function() -> Callable[..., Tensor]:
    """SpargeAttn's kernel.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        module = importlib.import_module("spas_sage_attn")
    except ImportError as error:
        raise ImportError(
            'mode "sparge_attn" needs the package spas_sage_attn, which is not part of bsfa-hf: '
            "install SpargeAttn from https://github.com/thu-ml/SpargeAttn"
        ) from error
    return module.spas_sage_attn_meansim_topk_cuda  # type: ignore[no-any-return]


def sliding_window_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention in which each query sees itself and the window - 1 keys before it.

    Arguments and result as for `bsfa_hf.attention.bsfa_attention`. Decode steps see the window too.
    """
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    state = state_of(module)
    options = {"dropout": dropout, "scaling": scaling, **kwargs}
    if state is None or state.window is None or not causal:
        return dense_attention(
            module, query, key, value, attention_mask, is_causal=is_causal, options=options
        )
    check_supported(module, dropout, kwargs)
    _refuse_extras(kwargs)
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    plan = Plan(offset=seqlen_k - seqlen_q)
    visible: Tensor | None = None
    if attention_mask is not None:
        if seqlen_q > 1 and not torch.compiler.is_compiling():
            plan = plan_of(attention_mask, seqlen_q, seqlen_k)
            if plan.reason is not None:
                plan = Plan(offset=seqlen_k - seqlen_q)
        visible = attention_mask
        if isinstance(visible, DeferredMask):
            visible = visible.explicit()
        if visible.ndim == 2:
            visible = visible.bool()[:, None, None, :]
        elif visible.dtype != torch.bool:
            visible = visible == 0
    out = torch.empty_like(query)
    for start in range(0, seqlen_q, _QUERIES_AT_A_TIME):
        stop = min(start + _QUERIES_AT_A_TIME, seqlen_q)
        first = max(start + plan.offset - state.window + 1, 0)
        last = min(stop + plan.offset, seqlen_k)
        queries = torch.arange(start, stop, device=query.device)[:, None] + plan.offset
        keys = torch.arange(first, last, device=query.device)
        seen = ((keys <= queries) & (keys > queries - state.window))[None, None]
        if visible is not None:
            rows = slice(None) if visible.shape[2] == 1 else slice(start, stop)
            seen = seen & visible[:, :, rows, first:last]
        out[:, :, start:stop] = scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, first:last],
            value[:, :, first:last],
            attn_mask=seen,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return out.transpose(1, 2).contiguous(), None


def sparge_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """SpargeAttn for whole prompts, dense attention for the rest.

    Arguments and result as for `bsfa_hf.attention.bsfa_attention`.
    """
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    state = state_of(module)
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    plan: Plan | None = None
    if isinstance(attention_mask, DeferredMask):
        plan = attention_mask.plan
    dense = (
        state is None
        or not causal
        or seqlen_q < _SPARGE_SHORTEST
        or (attention_mask is not None and (plan is None or plan.reason is not None))
        or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
        or (seqlen_q != seqlen_k if plan is None else plan.offset != 0 or plan.drafts > 0)
    )
    if dense or state is None:
        options = {"dropout": dropout, "scaling": scaling, **kwargs}
        return dense_attention(
            module, query, key, value, attention_mask, is_causal=is_causal, options=options
        )
    check_supported(module, dropout, kwargs)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    function = sparge_function()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(
            q=q,
            k=k,
            v=v,
            is_causal=True,
            scale=scaling,
            tensor_layout="HND",
            output_dtype=q.dtype,
            return_sparsity=False,
            **state.sparge,
        )

    if plan is None or plan.spans is None:
        return attend(query, key, value).transpose(1, 2).contiguous(), None
    out = torch.zeros_like(query)
    for row, span in enumerate(plan.spans):
        if span.seqlen_q:
            rows = slice(row, row + 1)
            out[row, :, span.queries] = attend(
                query[rows, :, span.queries], key[rows, :, span.keys], value[rows, :, span.keys]
            )[0]
    return out.transpose(1, 2).contiguous(), None


def _refuse_extras(kwargs: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux", "position_bias", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f'mode "sliding_window" cannot honour {name}, which this model asks for'
            )
