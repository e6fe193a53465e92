# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What the attention function must know of a mask, found once a forward pass and not once a layer.

transformers lets an attention implementation bring its own mask function. Ours returns

* ``None`` where the mask is the causal one and nothing is padded,
* the 2-D padding mask, with a `Plan` attached, where prompts are padded or the cache is static,
* what SDPA would get, for everything else, with a `Plan` that says why the layer runs dense.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from bsfa_calib.reasons import Reason

_PLAN = "_bsfa_plan"


@dataclass(frozen=True)
class Span:
    """The part of a batch row that belongs to its prompt.

    Attributes:
        queries: the rows of the call's queries: a slice, or indices where padding lies between.
        keys: the keys they may see, causal and aligned to their end; likewise.
        seqlen_q: number of queries.
        seqlen_k: number of keys.
    """

    queries: slice | Tensor
    keys: slice | Tensor
    seqlen_q: int
    seqlen_k: int


@dataclass(frozen=True)
class Plan:
    """How a call is to be computed.

    Attributes:
        reason: why the layers run dense on the mask that carries the plan; None if they need not.
        offset: position of the call's first query among the keys.
        spans: for each batch row what is not padding; None where nothing is padded and every key
            up to the last query's position is seen.
        prefill: whether the call is known to be part of a prefill, however few its queries.
    """

    reason: Reason | None = None
    offset: int = 0
    spans: tuple[Span, ...] | None = None
    prefill: bool = False
    _masks: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def explicit(
        self, padding: Tensor, seqlen_q: int, seqlen_k: int, device: torch.device
    ) -> Tensor:
        """The mask as SDPA takes it, bool [batch, 1, seqlen_q, seqlen_k], made once a device."""
        mask = self._masks.get(device)
        if mask is None:
            mask = causal_mask(seqlen_q, seqlen_k, self.offset, device)
            mask = mask & padding.to(device)[:, None, None, :]
            self._masks[device] = mask
        return mask


def causal_mask(seqlen_q: int, seqlen_k: int, offset: int, device: torch.device) -> Tensor:
    """Bool [1, 1, seqlen_q, seqlen_k]: key j is seen by query i iff j <= i + offset."""
    queries = torch.arange(seqlen_q, device=device) + offset
    return (torch.arange(seqlen_k, device=device) <= queries[:, None])[None, None]


def bsfa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    config: Any = None,
    **options: Any,
) -> Tensor | None:
    """The mask function that is registered with transformers beside the attention function.

    Args:
        batch_size: rows of the batch.
        q_length: queries of the call.
        kv_length: keys that the attention function will get (all of a static cache's).
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: transformers' rule of what sees what.
        attention_mask: 2-D padding mask, [batch, tokens seen], true where there is a token.
        local_size: size of the sliding window or attention chunk, of layers that have one.
        allow_is_causal_skip: whether the model is content with None for the causal mask.
        device: where the mask is needed.
        config: the model's configuration.
        options: further arguments of transformers' own mask functions.

    Returns:
        None, [batch, kv_length] with a plan, or [batch, 1, q_length, kv_length] as SDPA takes it.
    """
    compiling = torch.compiler.is_compiling()
    plain = mask_function is causal_mask_function
    if local_size is not None and not window_bites(config, local_size):
        local_size = None
        plain = allow_is_causal_skip and not options.get("use_vmap", False)
    reason = _reason_for_dense(q_length, kv_offset, mask_function, plain, local_size, config)
    if reason is None and not (allow_is_causal_skip or q_length == 1):
        reason = Reason.OWN_MASK
    static = isinstance(q_offset, Tensor) or q_offset + q_length != kv_length
    if reason is None and compiling and (static or attention_mask is not None):
        reason = Reason.TRACED_MASK
    if reason is not None:
        if reason is Reason.OWN_MASK and getattr(config, "sliding_window", None) is None:
            # No argument tells the attention function of the layer's chunks: the mask must.
            allow_is_causal_skip = allow_is_causal_skip and local_size is None
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            device=device,
            **options,
        )
        if mask is not None and not compiling:
            _attach(mask, Plan(reason))
        return mask

    offset = int(q_offset)
    tail = q_length == 1  # of a prefill: other single queries are decode steps, and dense
    seen = offset + q_length
    padding: Tensor | None = None
    if attention_mask is not None:
        padding = torch.nn.functional.pad(
            attention_mask[:, :kv_length].to(device=device, dtype=torch.bool),
            (0, max(kv_length - attention_mask.shape[-1], 0)),
        )
    if padding is not None:
        # Looking at the values waits for the device, once a forward pass.
        lengths = padding[:, :seen].sum(-1).tolist()
        if all(length == seen for length in lengths):
            padding = None
    if padding is None and not static and not tail:
        return None
    if padding is None:
        padding = torch.zeros((batch_size, kv_length), dtype=torch.bool, device=device)
        padding[:, :seen] = True
        spans: tuple[Span, ...] = (_whole(q_length, seen),) * batch_size
    else:
        padding[:, seen:] = False
        spans = spans_of(padding, offset, q_length)
    _attach(padding, Plan(offset=offset, spans=spans, prefill=tail))
    return padding


def _reason_for_dense(
    q_length: int,
    kv_offset: int,
    mask_function: Callable[..., Any],
    plain: bool,
    local_size: int | None,
    config: Any,
) -> Reason | None:
    if mask_function is bidirectional_mask_function:
        return Reason.NOT_CAUSAL
    if q_length == 1 and (torch.compiler.is_compiling() or not _in_prefill()):
        return Reason.DECODE
    if local_size is not None:
        chunk = getattr(config, "attention_chunk_size", None)
        return Reason.OWN_MASK if chunk == local_size else Reason.SLIDING_WINDOW
    return None if plain and kv_offset == 0 else Reason.OWN_MASK


def window_bites(config: Any, window: int) -> bool:
    """Whether a sliding window can hide a key: never, if the model takes no prompt that long."""
    longest = getattr(config, "max_position_embeddings", None)
    return longest is None or window < longest


def _in_prefill() -> bool:
    """Whether ``generate`` is reading the prompt.

    The last chunk of a chunked prefill may hold one token. It then looks like a decode step in
    everything but who called, and has to read the thresholds of its row, as in a whole prefill.
    """
    frame = sys._getframe(1)
    for _ in range(64):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_code.co_name == "_prefill":
            return True
    return False


def _whole(seqlen_q: int, seen: int) -> Span:
    return Span(slice(0, seqlen_q), slice(0, seen), seqlen_q, seen)


def spans_of(padding: Tensor, offset: int, seqlen_q: int) -> tuple[Span, ...]:
    """The spans of a padded batch.

    Args:
        padding: bool [batch, seqlen_k], true where there is a token of the prompt.
        offset: position of the first query.
        seqlen_q: queries of the call.
    """
    spans = []
    for row in padding.cpu():
        keys = row.nonzero().squeeze(1)
        queries = keys[(keys >= offset) & (keys < offset + seqlen_q)] - offset
        spans.append(
            Span(
                _as_slice(queries, padding.device),
                _as_slice(keys, padding.device),
                len(queries),
                len(keys),
            )
        )
    return tuple(spans)


def _as_slice(indices: Tensor, device: torch.device) -> slice | Tensor:
    if len(indices) == 0:
        return slice(0, 0)
    start, stop = int(indices[0]), int(indices[-1]) + 1
    return slice(start, stop) if stop - start == len(indices) else indices.to(device)


def plan_of(mask: Tensor, seqlen_q: int, seqlen_k: int) -> Plan:
    """The plan of a mask: the one attached to it, or, for a user's own mask, what it amounts to.

    Args:
        mask: bool [batch, seqlen_k]; or bool or additive, [batch or 1, heads or 1, seqlen_q,
            seqlen_k].
        seqlen_q: queries of the call.
        seqlen_k: keys of the call.

    Raises:
        ValueError: the mask is neither causal nor padding, nor both.
    """
    plan = _attached(mask)
    if plan is not None:
        return plan
    if mask.ndim == 2:
        offset = seqlen_k - seqlen_q
        plan = Plan(offset=offset, spans=spans_of(mask.bool(), offset, seqlen_q))
    elif mask.ndim == 4:
        plan = _plan_of_custom(mask, seqlen_q, seqlen_k)
    else:
        raise ValueError(
            "an attention mask must be [batch, keys] or [batch, heads, queries, keys], got "
            f"{list(mask.shape)}"
        )
    if not mask.is_inference():  # else a change in place would go unseen
        _attach(mask, plan)
    return plan


def padding_of(mask: Tensor, plan: Plan, seqlen_k: int) -> Tensor:
    """The 2-D padding mask, bool [batch, seqlen_k], of a mask with a plan that has spans."""
    if mask.ndim == 2:
        return mask.bool()
    padding = torch.zeros((len(plan.spans or ()), seqlen_k), dtype=torch.bool, device=mask.device)
    for row, span in zip(padding, plan.spans or (), strict=True):
        row[span.keys] = True
    return padding


def _plan_of_custom(mask: Tensor, seqlen_q: int, seqlen_k: int) -> Plan:
    refusal = (
        'attn_implementation="bsfa" computes causal attention with or without padding, and this '
        f"attention mask of shape {list(mask.shape)} asks for something else ({{}}); use "
        '"sdpa" or "eager" for it'
    )
    if tuple(mask.shape[2:]) != (seqlen_q, seqlen_k):
        raise ValueError(refusal.format(f"there are {seqlen_q} queries and {seqlen_k} keys"))
    if mask.dtype == torch.bool:
        allowed = mask
    else:
        allowed = mask == 0
        hidden = mask <= torch.finfo(torch.float16).min / 2
        if not bool((allowed | hidden).all()):
            raise ValueError(refusal.format("it adds a bias to some scores"))
    if not bool((allowed == allowed[:, :1]).all()):
        raise ValueError(refusal.format("it differs between heads"))
    allowed = allowed[:, 0]
    last = allowed[:, -1]
    offsets = [seqlen_k - seqlen_q]
    if len(last) and bool(last.any()):
        # A static cache has keys beyond the last query.
        offsets.append(int(last.any(0).nonzero()[-1]) + 1 - seqlen_q)
    for offset in offsets:
        if offset < 0:
            continue
        valid = last[:, offset : offset + seqlen_q]
        expected = causal_mask(seqlen_q, seqlen_k, offset, mask.device)[0] & last[:, None, :]
        if bool(((allowed == expected) | ~valid[:, :, None]).all()):
            return Plan(offset=offset, spans=spans_of(last, offset, seqlen_q))
    raise ValueError(refusal.format("a query sees keys after it, or not all keys before it"))


class _Made(threading.local):
    """The masks with a plan that are alive in this thread."""

    def __init__(self) -> None:
        self.masks: list[weakref.ref[Tensor]] = []


_made = _Made()


def _version(mask: Tensor) -> int:
    """Counts the changes of a mask in place, except in inference mode."""
    return 0 if mask.is_inference() else mask._version


def _attach(mask: Tensor, plan: Plan) -> None:
    setattr(mask, _PLAN, (plan, _version(mask)))
    _made.masks = [made for made in _made.masks if made() is not None]
    _made.masks.append(weakref.ref(mask))


def _attached(mask: Tensor) -> Plan | None:
    """The mask's plan; that of its original, where the mask is a copy on another device."""
    plan, version = getattr(mask, _PLAN, (None, 0))
    if plan is not None:
        return plan if _version(mask) == version else None
    for reference in _made.masks:
        made = reference()
        if (
            made is not None
            and made.device != mask.device
            and made.shape == mask.shape
            and torch.equal(made.to(mask.device), mask)
        ):
            plan = getattr(made, _PLAN)[0]
            setattr(mask, _PLAN, (plan, _version(mask)))
            return plan  # type: ignore[no-any-return]
    return None


def equal_spans(spans: Sequence[Span]) -> bool:
    """Whether all rows of a batch have the same slices, so that one call serves them."""
    first = spans[0]
    return isinstance(first.queries, slice) and all(
        isinstance(span.queries, slice)
        and isinstance(span.keys, slice)
        and (span.queries, span.keys) == (first.queries, first.keys)
        for span in spans
    )
