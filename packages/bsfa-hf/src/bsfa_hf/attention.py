# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The attention function "bsfa" of transformers' AttentionInterface."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bsfa_calib.binding import State
from bsfa_calib.dense import additive, are_sinks, head_dim_reason, sinks_of
from bsfa_calib.reasons import Reason
from bsfa_calib.switch import register as register_attention
from bsfa_hf import automatic
from bsfa_hf.dense import dense_attention, packed_mask
from bsfa_hf.masks import (
    DeferredMask,
    Plan,
    bsfa_mask,
    equal_spans,
    known_plan,
    plan_of,
    window_bites,
)
from bsfa_hf.originals import (
    EAGER,
    explicit_arguments,
    is_flash,
    none_is_causal,
    original_of,
    own_attention,
)
from bsfa_hf.state import state_of
from bsfa_kernel import Geometry, block_sparse_attention
from bsfa_kernel.geometry import can_skip

NAME = "bsfa"

_PACKED = "_bsfa_lengths"

# Arguments that name a term of the scores or a choice of keys, and why a layer with one runs dense.
_TERMS = {
    "softcap": Reason.SOFTCAP,
    "sinks": Reason.SINKS,
    "position_bias": Reason.BIAS,
}
# Arguments that say nothing of the attention between queries and keys, or are read below.
_HARMLESS = frozenset(
    {
        "cache",
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_ids",
        "return_dict",
        "s_aux",
        "seq_idx",
        "sliding_window",
        "use_cache",
    }
)


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
) -> tuple[Tensor, Tensor | None]:
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
        [batch, seqlen_q, heads, head_dim], and None for the attention weights; of modules outside
        the text decoder, what their own function returns. Padded positions are 0 where a call runs
        block-sparse.

    Raises:
        ValueError: something is asked for that cannot be honoured; the message says what.
        NotImplementedError: a forward-mode derivative is asked for.
    """
    options = {"dropout": dropout, "scaling": scaling, **kwargs}
    layer = getattr(module, "layer_idx", None)
    state = state_of(module)
    causal = _is_causal(module, attention_mask, query.shape[2], is_causal)
    if state is None and causal and layer is not None:
        state = automatic.state_for(module)

    def dense(query: Tensor, mask: Any, first: int = 0) -> tuple[Tensor, Tensor | None]:
        return dense_attention(
            module, query, key, value, mask, is_causal=is_causal, options=options, first=first
        )

    if state is None:
        # Another part of a composite model, such as a vision tower.
        return dense(query, attention_mask)
    assert isinstance(layer, int)
    check_supported(module, dropout, kwargs)
    reason = _reason_of_arguments(module, kwargs)
    if query.shape[0] == 0 or query.shape[2] == 0:
        return query.new_zeros(
            (*query.shape[:1], query.shape[2], query.shape[1], value.shape[-1])
        ), None

    reason = Reason.NOT_CAUSAL if not causal else reason
    reason = reason or _reason_of_layer(module, query, key, value, kwargs)
    if kwargs.get("cu_seq_lens_q") is not None and reason is not Reason.NOT_CAUSAL:
        if reason is None:
            return _packed(state, query, key, value, attention_mask, options, layer), None
        _count_dense(state, layer, reason)
        return dense(query, _mask_of_packed(module, query, attention_mask, options))[0], None
    plan: Plan | None = None
    if reason is None:
        reason, plan = _reason_of_call(attention_mask, query, key, state.geometry)
    if reason is not None:
        _count_dense(state, layer, reason)
        return dense(query, attention_mask)[0], None
    check_layer(state, layer, query)
    query, key, value = _arguments_of_kernel(query, key, value)
    thresholds = state.layer_thresholds(layer, query.device)
    of_heads = thresholds, _sinks(kwargs)
    if plan is None or not plan.drafts:
        return _sparse(state, layer, query, key, value, *of_heads, plan, scaling), None
    first = query.shape[2] - plan.drafts
    seen = plan.offset + first
    prompt = query[:, :, :first], key[:, :, :seen], value[:, :, :seen]
    out = _sparse(state, layer, *prompt, *of_heads, plan, scaling)
    drafts, _ = dense(query[:, :, first:], attention_mask, first=first)
    return torch.cat([out, drafts], 1), None


def _is_causal(module: torch.nn.Module, mask: Any, seqlen_q: int, is_causal: bool | None) -> bool:
    """Whether a call is one of causal attention, if its mask does not say otherwise."""
    config = getattr(module, "config", None)
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    if not causal or getattr(config, "is_causal", True) is False:
        return False
    # An eager function without a mask hides nothing.
    return mask is not None or seqlen_q == 1 or none_is_causal(original_of(config))


def _count_dense(state: State, layer: int, reason: Reason) -> None:
    """Count a dense call, of layers that the table knows."""
    if layer < state.statistics.layers:
        state.statistics.count_dense(layer, reason)


def _arguments_of_kernel(*tensors: Tensor) -> list[Tensor]:
    """Query, key and value in the dtype that autocast would give SDPA.

    Raises:
        NotImplementedError: one of them carries a forward-mode derivative.
    """
    _refuse_tangents(*tensors)
    device = tensors[0].device.type
    # Some devices, "meta" among them, have no autocast, and torch raises where it is asked of them.
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _sinks(options: dict[str, Any]) -> Tensor | None:
    """The layer's sinks as the kernel takes them.

    Raises:
        NotImplementedError: they carry a forward-mode derivative.
    """
    sinks = sinks_of(options)
    if sinks is not None:
        _refuse_tangents(sinks)
    return sinks


def _refuse_tangents(*tensors: Tensor) -> None:
    if any(_tangent(x) is not None for x in tensors):
        raise NotImplementedError(
            "block-sparse attention has no forward-mode derivative (torch.func.jvp, dual tensors): "
            'use attn_implementation="sdpa" for it'
        )


def _tangent(x: Tensor) -> Tensor | None:
    unpack: Any = forward_ad.unpack_dual
    return unpack(x).tangent  # type: ignore[no-any-return]


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


def _reason_of_arguments(module: torch.nn.Module, kwargs: dict[str, Any]) -> Reason | None:
    """Why the arguments that a model passes let its layer run dense.

    Raises:
        ValueError: an argument is known neither here nor to the model's own attention function.
    """
    reason: Reason | None = None
    for name, value in kwargs.items():
        if value is None or name in _HARMLESS:
            continue
        if name not in _TERMS:
            original = original_of(module.config)
            if name not in explicit_arguments(own_attention(module, original)):
                raise ValueError(
                    f"{type(module).__name__} passes the argument {name!r} to its attention "
                    'function, and attn_implementation="bsfa" does not know what it means: leave '
                    "it away, or run this model without bsfa"
                )
        reason = reason or _TERMS.get(name, Reason.OWN_ARGUMENT)
    return reason


def check_layer(state: State, layer: int, query: Tensor) -> None:
    """Check that a layer with queries [batch, heads, ...] is one that thresholds were made for.

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
    kwargs: dict[str, Any],
) -> Reason | None:
    """Why a layer runs dense whatever the mask."""
    window = kwargs.get("sliding_window")
    if window is not None:
        seqlen_q, seqlen_k = query.shape[2], key.shape[2]
        config = getattr(module, "config", None)
        if window_bites(config, window, seqlen_k - seqlen_q, seqlen_q):
            return Reason.SLIDING_WINDOW
    if not are_sinks(kwargs.get("s_aux"), query.shape[1]):
        return Reason.SINKS
    return head_dim_reason(query, key, value)


def _reason_of_call(
    mask: Any, query: Tensor, key: Tensor, geometry: Geometry
) -> tuple[Reason | None, Plan | None]:
    """Why a call runs dense, and the plan of its mask."""
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    plan: Plan | None = None
    if mask is None:
        if seqlen_q == 1:
            return Reason.DECODE, None
        offset, spans = seqlen_k - seqlen_q, [(seqlen_q, seqlen_k)]
    elif torch.compiler.is_compiling():
        return Reason.DECODE if seqlen_q == 1 else Reason.TRACED_MASK, None
    elif not isinstance(mask, Tensor):
        return Reason.OWN_MASK, None
    else:
        if seqlen_q == 1 and mask.ndim == 4 and known_plan(mask) is None:
            return Reason.DECODE, None
        plan = plan_of(mask, seqlen_q, seqlen_k)
        if plan.reason is not None:
            return plan.reason, plan
        offset, seqlen_q = plan.offset, seqlen_q - plan.drafts
        spans = [(seqlen_q, offset + seqlen_q)]
        if plan.spans is not None:
            spans = [(span.seqlen_q, span.seqlen_k) for span in plan.spans]
    # What begins within a block and is shorter is dense unless it is known to be part of a prefill:
    # it may be a decode step of several tokens (a draft to be verified, the next line of a chat).
    prefill = plan is not None and plan.prefill
    if offset % geometry.q_block and seqlen_q < geometry.q_block and not prefill:
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
    sinks: Tensor | None,
    plan: Plan | None,
    scaling: float | None,
) -> Tensor:
    """Run the kernel on a batch, row by row where the rows are padded differently."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    kept: list[Tensor] = []
    selections: list[str] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor
        out, part = block_sparse_attention(
            *(q, k, v, thresholds),
            scale=scaling,
            sinks=sinks,
            return_kept=True,
            **state.kernel_options,
        )
        kept.append(part)
        selections.append(state.selection_for(q, k.shape[1]))
        return out

    spans = plan.spans if plan is not None else None
    if spans is not None and len(spans) < q.shape[0]:
        spans = spans * q.shape[0]  # one row of a mask for the whole batch
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
    selection = "int8" if "int8" in selections else "exact"
    state.statistics.count_sparse(layer, kept, lengths, state.geometry, selection)
    return out


def _mask_of_packed(
    module: torch.nn.Module, query: Tensor, mask: Any, options: dict[str, Any]
) -> Any:
    """The mask with which packed sequences run dense."""
    original = original_of(getattr(module, "config", None))
    if mask is not None or is_flash(original):
        return mask
    starts_q, starts_k = _starts(options)
    mask = packed_mask(starts_q, starts_k, query.device)
    return additive(mask, query.dtype) if original == EAGER else mask


def _starts(options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    starts_q: Tensor = options["cu_seq_lens_q"]
    starts_k: Tensor | None = options.get("cu_seq_lens_k")
    return starts_q, starts_q if starts_k is None else starts_k


def _packed(
    state: State,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    options: dict[str, Any],
    layer: int,
) -> Tensor:
    """Several sequences in one batch row, told apart by cu_seq_lens_q and cu_seq_lens_k."""
    starts_q, starts_k = _starts(options)
    padded = isinstance(mask, Tensor) and (
        mask.ndim == 2 or (isinstance(mask, DeferredMask) and mask.plan.spans is not None)
    )
    if query.shape[0] != 1 or padded:
        raise ValueError(
            "packed sequences (cu_seq_lens_q) must lie in one batch row without padding, got "
            f"{query.shape[0]} rows" + (" and a padding mask" if padded else "")
        )
    lengths = _lengths(starts_q, starts_k, query.shape[2], key.shape[2])
    check_layer(state, layer, query)
    query, key, value = _arguments_of_kernel(query, key, value)
    reason: Reason | None = None
    thresholds = state.layer_thresholds(layer, query.device)
    how = state.kernel_options
    if all(seqlen_q <= 1 for seqlen_q, _ in lengths):
        reason, thresholds = Reason.DECODE, torch.full_like(thresholds, -math.inf)
    elif not any(can_skip(*each, state.geometry) for each in lengths):
        reason = Reason.TOO_SHORT
    if reason is not None:  # every block is kept: there is nothing to select
        how |= {"selection": "exact", "expected_skipped": None}
    if how["selection"] != "exact":
        how["max_seqlen_k"] = max(seqlen_k for _, seqlen_k in lengths)
    out: Tensor
    out, kept = block_sparse_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        thresholds,
        scale=options["scaling"],
        sinks=_sinks(options),
        cu_seqlens_q=starts_q.to(torch.int32),
        cu_seqlens_k=starts_k.to(torch.int32),
        return_kept=True,
        **how,
    )
    if reason is None:
        selection = state.selection_for(query, max(seqlen_k for _, seqlen_k in lengths))
        state.statistics.count_sparse(layer, [kept], lengths, state.geometry, selection)
    else:
        state.statistics.count_dense(layer, reason)
    return out[None]


def _lengths(
    starts_q: Tensor, starts_k: Tensor, total_q: int, total_k: int
) -> list[tuple[int, int]]:
    """Queries and keys of packed sequences, read from the device once a forward pass.

    Those that were made in inference mode once a layer: they do not count their changes.
    """
    changes = None
    if not (starts_q.is_inference() or starts_k.is_inference()):
        changes = (starts_q._version, starts_k._version)
        known = getattr(starts_q, _PACKED, None)
        if known and known[0] == (total_q, total_k, *changes) and known[1]() is starts_k:
            return known[2]  # type: ignore[no-any-return]
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
    if changes is not None:
        found = ((total_q, total_k, *changes), weakref.ref(starts_k), lengths)
        setattr(starts_q, _PACKED, found)
    return lengths
