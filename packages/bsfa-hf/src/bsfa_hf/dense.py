# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Dense attention, as the model would compute it without this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bsfa_calib.dense import SINKS, additive, causal_mask
from bsfa_hf.masks import DeferredMask
from bsfa_hf.originals import EAGER, SDPA, UnderOriginalName, is_flash, original_of, own_attention


def dense_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    is_causal: bool | None,
    options: dict[str, Any],
    first: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """What the model's original implementation computes with its own mask.

    Args:
        module: the attention module.
        query: [batch, heads, seqlen_q, head_dim].
        key: [batch, kv_heads, seqlen_k, head_dim].
        value: as key.
        mask: what the attention function got: None, a `DeferredMask`, what the original
            implementation takes, or [batch, heads or 1, seqlen_q, seqlen_k] of the model or user.
        is_causal: what the attention function got.
        options: the other arguments that it got.
        first: leave out the queries before this one; ``query`` holds those from it on.

    Returns:
        [batch, seqlen_q, heads, head_dim of value], and the attention weights, if the original
        implementation returns them.

    Raises:
        NotImplementedError: the model's own eager function cannot be found.
    """
    original = original_of(getattr(module, "config", None))
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    offset = seqlen_k - seqlen_q  # position of the first query, where there is no mask
    if isinstance(mask, DeferredMask):
        mask, offset = mask.own(first), 0  # as SDPA takes None
    elif mask is not None:
        mask = mask[:, :, first:] if first else mask
    elif original == SDPA and causal and 1 < seqlen_q < seqlen_k:
        # Without a mask the queries are the last of the keys; SDPA would take them for the first.
        mask = causal_mask(seqlen_q, seqlen_k, offset, query.device)
    if is_flash(original) and isinstance(mask, Tensor) and mask.ndim == 4:
        original = SDPA  # FlashAttention takes no 4-D masks
    if original == SDPA and any(options.get(name) is not None for name in SINKS):
        original = EAGER  # SDPA passes over sinks
        if mask is None and causal and seqlen_q > 1:
            mask = causal_mask(seqlen_q, seqlen_k, offset, query.device)
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            mask = additive(mask, query.dtype)
    if original not in (EAGER, SDPA):
        module = UnderOriginalName(module)  # type: ignore[assignment]
    if is_causal is not None:
        options = {**options, "is_causal": is_causal}
    out, weights = own_attention(module, original)(module, query, key, value, mask, **options)
    return out, weights


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
