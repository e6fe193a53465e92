# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Dense attention of a transformers model, and why a layer can have no other."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
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
    {"dropout", "position_bias", "s_aux", "scaling", "sinks", "sliding_window", "softcap"}
)
SINKS = ("s_aux", "sinks")
"""Names under which models pass attention sinks: one for each head; one for each query."""

# Arguments that SDPA passes over or refuses.
_EAGER = ("softcap", *SINKS)
# Arguments that hold something for each query.
_BY_ROW = ("position_bias", "sinks")
# Queries whose keys are looked for together, and scores that an eager function computes at a time.
_ROWS, _SCORES_AT_A_TIME = 256, 1 << 27
_SEEN = "_bsfa_seen_keys"
# The most that SDPA's flash kernel takes.
_FLASH_HEAD_DIM = 256


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
    if options.get("sinks") is not None or not are_sinks(options.get("s_aux"), query.shape[1]):
        return Reason.SINKS
    if options.get("position_bias") is not None:
        return Reason.BIAS
    window = options.get("sliding_window")
    if window is not None and window < key.shape[2]:
        return Reason.SLIDING_WINDOW
    return head_dim_reason(query, key, value)


def are_sinks(sinks: Any, heads: int) -> bool:
    """Whether a layer's sinks are of the kind that bsfa-kernel knows: none, or one for each head.

    Args:
        sinks: the argument ``s_aux`` of its attention function. Other models pass another kind,
            a sink for each query, as ``sinks``.
        heads: query heads of the call, of this rank under tensor parallelism.
    """
    if not isinstance(sinks, Tensor):
        return sinks is None
    return sinks.shape == (heads,) and sinks.is_floating_point()


def sinks_of(options: Mapping[str, Any]) -> Tensor | None:
    """The sinks of a layer as bsfa-kernel takes them, float32 [heads]; None without.

    Args:
        options: the further arguments of the attention function; `are_sinks` holds of ``s_aux``.
    """
    sinks: Tensor | None = options.get("s_aux")
    return None if sinks is None else sinks.float()


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

    The eager function is given some queries and the keys that they see at a time, and computed
    again in a backward pass, so that scores take no memory that grows with the square of a
    prompt's length; masks of windowed layers do. On a GPU sinks in 16 bits are left to SDPA's
    kernel where it can take them.

    Args:
        module: the attention module.
        query: [batch, heads, seqlen_q, head_dim].
        key: [batch, kv_heads, seqlen_k, head_dim].
        value: [batch, kv_heads, seqlen_k, head_dim of values].
        mask: None for the causal one, or bool or additive, what can be expanded to [batch, heads,
            seqlen_q, seqlen_k].
        is_causal: as the model passes it.
        options: the further arguments of the attention function.

    Returns:
        [batch, seqlen_q, heads, head_dim of values].

    Raises:
        NotImplementedError: scores are capped or there are sinks, and the model has no eager
            function.
        ValueError: the mask has another shape.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if not any(options.get(name) is not None for name in _EAGER):
        if mask is None and causal and 1 < seqlen_q != seqlen_k:
            mask = causal_mask(seqlen_q, seqlen_k, seqlen_k - seqlen_q, query.device)
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, is_causal=is_causal, **options
        )
        return out
    if mask is None and causal and _takes_flash(query, key, value, options):
        return flash_with_sinks(query, key, value, options["s_aux"], options.get("scaling"))
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise NotImplementedError(
            f"{type(module).__name__} caps its scores or has attention sinks, which SDPA cannot "
            "compute, and its module has no eager_attention_forward to compute them with"
        )
    if mask is not None and mask.shape[2:] != (seqlen_q, seqlen_k):
        if mask.shape[2] not in (1, seqlen_q) or mask.shape[3] not in (1, seqlen_k):
            raise ValueError(
                f"an attention mask for {seqlen_q} queries and {seqlen_k} keys must have these "
                f"numbers, or 1, as its last dimensions; got {tuple(mask.shape)}"
            )
        mask = mask.expand(-1, -1, seqlen_q, seqlen_k)
    parts: list[Tensor] = []
    whole = any(options.get(name) is not None for name in _BY_ROW)
    for rows, keys in _stretches(query, key, None if whole else mask, causal, whole):
        part = None if mask is None else mask[:, :, rows, keys]
        if mask is None and causal and seqlen_q > 1:
            offset = seqlen_k - seqlen_q + rows.start - keys.start
            sizes = rows.stop - rows.start, keys.stop - keys.start
            part = causal_mask(*sizes, offset, query.device)
        if part is not None and part.dtype == torch.bool:
            part = additive(part, query.dtype)
        arguments = query[:, :, rows], key[:, :, keys], value[:, :, keys], part
        if torch.is_grad_enabled():
            again: Any = checkpoint
            computed = again(function, module, *arguments, use_reentrant=False, **options)
        else:
            computed = function(module, *arguments, **options)
        parts.append(computed[0])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def flash_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, scale: float | None
) -> Tensor:
    """Causal attention of whole prompts with sinks, by the flash kernel behind SDPA.

    That kernel knows no sinks. Beside its output it gives the log-sum-exp of each row's scores,
    from which the share of the row's weights follows that a sink leaves them.

    Args:
        query: [batch, heads, seqlen, head_dim].
        key: [batch, kv_heads, seqlen, head_dim].
        value: as key.
        sinks: [heads].
        scale: factor of the scores; head_dim ** -0.5 by default.

    Returns:
        [batch, seqlen, heads, head_dim].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    aten = torch.ops.aten
    flash = aten._scaled_dot_product_flash_attention
    if not query.is_cuda:
        flash = aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(query, key, value, 0.0, True, scale=scale)[:2]
    return with_sinks(out.transpose(1, 2), lse, sinks)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Let sinks join the softmax of rows without them.

    Args:
        out: [batch, seqlen, heads, head_dim].
        lse: float32 [batch, heads, seqlen], log-sum-exp of the scores of each row.
        sinks: [heads].
    """
    share = (lse - sinks.float()[:, None]).sigmoid()
    return (out * share.transpose(1, 2)[..., None]).to(out.dtype)


def _takes_flash(query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether `flash_with_sinks` is what a call asks for, and has a kernel for it."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[2] == key.shape[2]
        and query.shape[-1] == value.shape[-1] <= _FLASH_HEAD_DIM
        and query.shape[-1] % 8 == 0
        and not torch.is_grad_enabled()
        and options.get("s_aux") is not None
        and all(options.get(name) is None for name in ("softcap", "sliding_window", *_BY_ROW))
    )


def _stretches(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, whole: bool
) -> Iterator[tuple[slice, slice]]:
    """Queries that are computed together, and the keys that they see.

    Args:
        query: [batch, heads, seqlen_q, head_dim].
        key: [batch, kv_heads, seqlen_k, head_dim].
        mask: that of the call, if any.
        causal: whether the call is, where it has no mask.
        whole: compute all at once.
    """
    batch, heads, seqlen_q = query.shape[:3]
    seqlen_k = key.shape[2]
    everything = slice(0, seqlen_k)
    if whole:
        yield slice(0, seqlen_q), everything
        return
    seen = None if mask is None else _seen_keys(mask)
    for index, first in enumerate(range(0, seqlen_q, _ROWS)):
        last = min(first + _ROWS, seqlen_q)
        keys = everything if seen is None else seen[index]
        if mask is None and causal and seqlen_q > 1:
            keys = slice(0, last + seqlen_k - seqlen_q)
        rows = max(_SCORES_AT_A_TIME // (batch * heads * (keys.stop - keys.start)), 1)
        for start in range(first, last, rows):
            yield slice(start, min(start + rows, last)), keys


def _seen_keys(mask: Tensor) -> list[slice] | None:
    """From the first to the last key that some of each ``_ROWS`` queries sees.

    They are read from the device once a mask. None if the mask differs between heads or prompts, or
    is additive; all keys where a query sees none, over which an eager function takes the mean.
    """
    if mask.dtype != torch.bool or mask.shape[:2] != (1, 1):
        return None
    version = None if mask.is_inference() else mask._version
    known: tuple[int | None, list[slice]] | None = getattr(mask, _SEEN, None)
    if known is not None and known[0] == version:
        return known[1]
    seqlen_k = mask.shape[-1]
    ends = []
    for start in range(0, mask.shape[2], _ROWS):
        rows = mask[0, 0, start : start + _ROWS]
        some, place = rows.any(0), torch.arange(seqlen_k, device=mask.device)
        all_see = rows.any(1).all()
        first = torch.where(some, place, seqlen_k).amin()
        last = torch.where(some, place, -1).amax()
        ends.append(torch.stack((first * all_see, torch.where(all_see, last, seqlen_k - 1))))
    found = [slice(first, last + 1) for first, last in torch.stack(ends).tolist()]
    setattr(mask, _SEEN, (version, found))
    return found


def causal_mask(seqlen_q: int, seqlen_k: int, offset: int, device: torch.device) -> Tensor:
    """Bool [1, 1, seqlen_q, seqlen_k]: key j is seen by query i iff j <= i + offset."""
    queries = torch.arange(seqlen_q, device=device) + offset
    return (torch.arange(seqlen_k, device=device) <= queries[:, None])[None, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask of any shape as numbers to add to scores: 0, or the lowest of a dtype."""
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)


def named(dense: Mapping[int, str]) -> str:
    """Layers by the reason why they run dense, as ``layers 0, 2: sliding-window layer``."""
    by_reason: dict[str, list[int]] = {}
    for layer, reason in sorted(dense.items()):
        by_reason.setdefault(reason, []).append(layer)
    return "; ".join(
        f"layers {', '.join(map(str, layers))}: {reason}" for reason, layers in by_reason.items()
    )
