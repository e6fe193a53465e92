# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Dense attention, as the model would compute it without this package."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bsfa_hf.masks import Plan, causal_mask, padding_of


def dense_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    plan: Plan | None,
    *,
    causal: bool,
    options: dict[str, Any],
) -> Tensor:
    """What SDPA computes, or the model's own eager function where SDPA cannot.

    Args:
        module: the attention module.
        query: [batch, heads, seqlen_q, head_dim].
        key: [batch, kv_heads, seqlen_k, head_dim].
        value: as key.
        mask: None, or [batch, seqlen_k] with a plan, or [batch, heads or 1, seqlen_q, seqlen_k].
        plan: the plan of the mask.
        causal: whether no mask means the causal one, aligned to the last key.
        options: the arguments that the attention function got beside these.

    Returns:
        [batch, seqlen_q, heads, head_dim of value].
    """
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    eager = options.get("softcap") is not None or options.get("s_aux") is not None
    if mask is not None and mask.ndim == 2:
        plan = plan or Plan(offset=seqlen_k - seqlen_q)
        padding = padding_of(mask, plan, seqlen_k)
        mask = plan.explicit(padding, seqlen_q, seqlen_k, query.device)
    elif mask is None and causal and seqlen_q > 1 and (eager or seqlen_q != seqlen_k):
        mask = causal_mask(seqlen_q, seqlen_k, seqlen_k - seqlen_q, query.device)
    if not eager:
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, is_causal=causal, **options
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
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(
            ~mask, hidden
        )
    out, _ = function(module, query, key, value, mask, **options)
    return out  # type: ignore[no-any-return]


def packed_mask(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, device: torch.device) -> Tensor:
    """The mask of packed sequences, bool [1, 1, total_q, total_k]; each is causal."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    mask = torch.zeros((1, 1, starts_q[-1], starts_k[-1]), dtype=torch.bool, device=device)
    for index in range(len(starts_q) - 1):
        queries = slice(starts_q[index], starts_q[index + 1])
        keys = slice(starts_k[index], starts_k[index + 1])
        seqlen_q, seqlen_k = queries.stop - queries.start, keys.stop - keys.start
        mask[:, :, queries, keys] = causal_mask(seqlen_q, seqlen_k, seqlen_k - seqlen_q, device)
    return mask
