# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What the paper compares with: a sliding window, and SpargeAttn."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bsfa_calib.binding import State
from bsfa_calib.dense import SINKS
from bsfa_calib.reasons import Reason
from bsfa_calib.statistics import Statistics
from bsfa_calib.switch import register as register_attention
from bsfa_hf.attention import check_supported
from bsfa_hf.dense import dense_attention
from bsfa_hf.masks import DeferredMask, Plan, bsfa_mask, plan_of
from bsfa_hf.state import layer_devices, local_heads, shape_of, state_of
from bsfa_kernel.geometry import (
    DEFAULT_GEOMETRY,
    block_count,
    count_visible,
    first_query,
    query_block_count,
    visible_blocks,
)

WINDOW_NAME = "bsfa_sliding_window"
SPARGE_NAME = "bsfa_sparge"

SPARGE_DEFAULTS: Mapping[str, float] = {"simthreshd1": -0.1, "topk": 0.35, "pvthreshd": 15}

_LARGEST = (1 << 31) - 1
# Shorter calls run dense under SpargeAttn, as in the paper's comparison.
_SPARGE_SHORTEST = 129
_QUERIES_AT_A_TIME = 1024


def register() -> None:
    """Make both known to transformers."""
    register_attention(WINDOW_NAME, _attention_function(_sliding_window), bsfa_mask)
    register_attention(SPARGE_NAME, _attention_function(_sparge), bsfa_mask)


@dataclass(frozen=True)
class SlidingWindow:
    """A method: each query sees itself and the window - 1 keys before it, in decode steps too.

    Attributes:
        window: keys that a query sees, itself among them.
        sink: the first keys of each sequence, which every query sees too.

    Raises:
        ValueError: one of them is no number of keys.
    """

    implementation: ClassVar[str] = WINDOW_NAME

    window: int
    sink: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in (("window", 1), ("sink", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
            if value > _LARGEST:
                raise ValueError(f"{name} must be at most {_LARGEST}, got {value}")

    def state(self, model: torch.nn.Module) -> State:
        """See `bsfa_hf.methods.Method`."""
        return _Running(_statistics(model), method=self)

    def kept(self, seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
        """Blocks of 128x64 in which a query sees a key, int64 [query blocks]."""
        k_block = DEFAULT_GEOMETRY.k_block
        index = torch.arange(query_block_count(seqlen_q, seqlen_k), device=device)
        first_seen = first_query(index, seqlen_q, seqlen_k) + seqlen_k - seqlen_q - self.window + 1
        first = first_seen.clamp(min=0) // k_block
        sinks = first.clamp(max=block_count(self.sink, k_block))
        blocks: Tensor = visible_blocks(index, seqlen_q, seqlen_k, DEFAULT_GEOMETRY)
        return (blocks - first).clamp(min=0) + torch.minimum(sinks, blocks)


@dataclass(frozen=True)
class SpargeAttention:
    """A method: SpargeAttn (arXiv 2502.18137) for whole prompts, dense attention for the rest.

    Attributes:
        params: arguments of its kernel: ``topk`` or ``cdfthreshd``, ``simthreshd1``, ``pvthreshd``.
        measure: whether the kernel is asked for the share of blocks that it skips.

    Raises:
        ValueError: a parameter is unknown or out of its range.
    """

    implementation: ClassVar[str] = SPARGE_NAME

    params: Mapping[str, float] = field(default_factory=lambda: SPARGE_DEFAULTS)
    measure: bool = False

    def __post_init__(self) -> None:
        """Check the parameters."""
        limits = {"topk": (0, 1), "cdfthreshd": (0, 1), "simthreshd1": (-1, 1)}
        limits["pvthreshd"] = (0, _LARGEST)
        for name, value in self.params.items():
            if name not in limits:
                raise ValueError(f"sparge_attn takes {', '.join(limits)}, got {name}={value!r}")
            low, high = limits[name]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
            # topk and cdfthreshd of 0 would keep nothing. A NaN fails every comparison.
            if not low <= value <= high or (value == 0 and name in ("topk", "cdfthreshd")):
                bracket = "(" if name in ("topk", "cdfthreshd") else "["
                raise ValueError(f"{name} must be in {bracket}{low}, {high}], got {value}")
        if "topk" in self.params and "cdfthreshd" in self.params:
            raise ValueError("sparge_attn takes topk or cdfthreshd, not both")

    def state(self, model: torch.nn.Module) -> State:
        """See `bsfa_hf.methods.Method`."""
        return _Running(_statistics(model), method=self, kernel=self._kernel())

    def _kernel(self) -> Callable[..., Any]:
        by = "meansim" if "cdfthreshd" in self.params else "meansim_topk"
        name = f"spas_sage_attn_{by}_cuda"
        try:
            return getattr(importlib.import_module("spas_sage_attn"), name)  # type: ignore[no-any-return]
        except (ImportError, AttributeError, OSError) as error:
            raise ImportError(
                f'"sparge_attn" needs {name} of the package spas_sage_attn, which is not part of '
                "bsfa-hf: install SpargeAttn from https://github.com/thu-ml/SpargeAttn "
                f"({error})"
            ) from error


@dataclass
class _Running(State):
    """State of a model with a baseline."""

    method: Any = None
    kernel: Callable[..., Any] | None = None


def _statistics(model: torch.nn.Module) -> Statistics:
    shape = shape_of(model)
    heads = local_heads(model, shape.heads)
    return Statistics(layer_devices(model, shape.layers), heads.stop - heads.start)


@dataclass(frozen=True)
class _Call:
    """A call of the attention function; see `bsfa_hf.attention.bsfa_attention`."""

    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    options: dict[str, Any]

    def check(self) -> None:
        """Refuse what no kernel of this package can do."""
        check_supported(self.module, self.options.get("dropout", 0.0), self.options)

    @property
    def scale(self) -> float | None:
        """Factor of the scores, None where it is the usual one."""
        return self.options.get("scaling")

    def count(self, state: _Running, kept: list[Tensor], lengths: list[tuple[int, int]]) -> None:
        """Count a call that left out blocks of 128x64."""
        state.statistics.count_sparse(self.module.layer_idx, kept, lengths, DEFAULT_GEOMETRY)


def _attention_function(
    attend: Callable[[_Running, _Call], Tensor | Reason],
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A baseline as an attention function, to be called as `bsfa_hf.attention.bsfa_attention`.

    Args:
        attend: counts the call and gives [batch, heads, seqlen_q, head_dim], or says why the call
            is to run dense.
    """

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        is_causal: bool | None = options.pop("is_causal", None)
        state = state_of(module)
        if isinstance(state, _Running):
            causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
            found = attend(state, _Call(module, query, key, value, mask, bool(causal), options))
            if isinstance(found, Tensor):
                return found.transpose(1, 2).contiguous(), None
            state.statistics.count_dense(module.layer_idx, found)
        return dense_attention(
            module, query, key, value, mask, is_causal=is_causal, options=options
        )

    return attention


def _sliding_window(state: _Running, call: _Call) -> Tensor | Reason:
    """Causal attention in which each query sees a window of the last keys, and the first ones."""
    if not call.causal:
        return Reason.NOT_CAUSAL
    call.check()
    _refuse_extras(call.options)
    query, key, value, attention_mask = call.query, call.key, call.value, call.mask
    method: SlidingWindow = state.method
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    plan: Plan | None = Plan(offset=seqlen_k - seqlen_q)
    visible: Tensor | None = None
    if attention_mask is not None:
        # Where a static cache ends says nothing of where its last key is.
        plan = None
        if seqlen_q > 1 and not torch.compiler.is_compiling():
            plan = plan_of(attention_mask, seqlen_q, seqlen_k)
            plan = plan if plan.reason is None else None
        visible = attention_mask
        if isinstance(visible, DeferredMask):
            visible = visible.explicit()
        if visible.ndim == 2:
            visible = visible.bool()[:, None, None, :]
            plan = plan or Plan(offset=seqlen_k - seqlen_q)
        elif visible.dtype != torch.bool:
            visible = visible == 0
    out = torch.empty_like(query)
    for start in range(0, seqlen_q, _QUERIES_AT_A_TIME):
        stop = min(start + _QUERIES_AT_A_TIME, seqlen_q)
        rows = visible
        if visible is not None and visible.shape[2] > 1:
            rows = visible[:, :, start:stop]
        if plan is not None:
            last = min(stop + plan.offset, seqlen_k)
            first = min(max(start + plan.offset - method.window + 1, 0), last)
            queries = torch.arange(start, stop, device=query.device)[:, None] + plan.offset
        else:  # a query is at the last key that it sees
            assert rows is not None
            first, last = 0, seqlen_k
            queries = seqlen_k - 1 - rows.flip(-1).byte().argmax(-1, keepdim=True)
        keys = torch.arange(first, last, device=query.device)
        if method.sink:
            sinks = first if rows is not None else min(method.sink, first)
            keys = torch.cat((torch.arange(sinks, device=query.device), keys))
        near = keys > queries - method.window
        if rows is None:
            near = near | (keys < method.sink)
        elif method.sink:  # the first keys that a query sees: after padding, of its sequence
            near = near | (rows & (rows.cumsum(-1) <= method.sink))[..., keys]
        seen = (keys <= queries) & near
        if rows is not None:
            seen = seen & rows[..., keys]
        out[:, :, start:stop] = scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, keys],
            value[:, :, keys],
            attn_mask=seen if seen.ndim == 4 else seen[None, None],
            scale=call.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    lengths = [(seqlen_q, seqlen_k)] * query.shape[0]
    if plan is not None and plan.spans:
        lengths = [(span.seqlen_q, span.seqlen_k) for span in plan.spans]
    elif plan is None and seqlen_q == 1 and not torch.compiler.is_compiling():
        assert visible is not None
        lengths = [(min(n, 1), n) for n in visible[:, 0, -1].sum(-1).tolist()]
    kept = [
        method.kept(*each, query.device).expand(query.shape[1], -1) for each in lengths if each[0]
    ]
    call.count(state, kept, lengths)
    return out


def _sparge(state: _Running, call: _Call) -> Tensor | Reason:
    """SpargeAttn for whole prompts, dense attention for the rest."""
    plan: Plan | None = call.mask.plan if isinstance(call.mask, DeferredMask) else None
    reason = _sparge_reason(call, plan)
    if reason is not None:
        return reason
    call.check()
    assert state.kernel is not None
    kernel, method = state.kernel, state.method
    query, key, value = call.query, call.key, call.value
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    kept: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = kernel(
            q=q,
            k=k,
            v=v,
            is_causal=True,
            scale=call.scale,
            tensor_layout="HND",
            output_dtype=q.dtype,
            return_sparsity=method.measure,
            **method.params,
        )
        out, sparsity = found if method.measure else (found, 0.0)
        # The kernel gives one share for all heads.
        blocks = count_visible(q.shape[2], k.shape[2], DEFAULT_GEOMETRY)
        number = round((1 - float(sparsity)) * blocks)
        kept.append(torch.full((q.shape[0], q.shape[1], 1), number, device=q.device))
        return out  # type: ignore[no-any-return]

    lengths = [(seqlen_q, seqlen_k)] * query.shape[0]
    if plan is None or plan.spans is None:
        out = attend(query, key, value)
    else:
        lengths = [(span.seqlen_q, span.seqlen_k) for span in plan.spans]
        out = torch.zeros_like(query)
        for row, span in enumerate(plan.spans):
            if span.seqlen_q:
                rows = slice(row, row + 1)
                out[row, :, span.queries] = attend(
                    query[rows, :, span.queries], key[rows, :, span.keys], value[rows, :, span.keys]
                )[0]
    call.count(state, kept, lengths)
    return out


def _sparge_reason(call: _Call, plan: Plan | None) -> Reason | None:
    """Why a call runs dense under SpargeAttn."""
    names = {"softcap": Reason.SOFTCAP, "position_bias": Reason.BIAS}
    for name, reason in {**names, **dict.fromkeys(SINKS, Reason.SINKS)}.items():
        if call.options.get(name) is not None:
            return reason
    if not call.causal:
        return Reason.NOT_CAUSAL
    if call.mask is not None and (plan is None or plan.reason is not None):
        return plan.reason if plan is not None else Reason.OWN_MASK
    seqlen_q, seqlen_k = call.query.shape[2], call.key.shape[2]
    if seqlen_q < _SPARGE_SHORTEST:
        return Reason.DECODE if seqlen_q == 1 else Reason.TOO_SHORT
    if plan is not None and plan.drafts > 0:
        return Reason.DECODE
    if plan.offset if plan is not None else seqlen_k - seqlen_q:
        return Reason.CHUNK
    return None


def _refuse_extras(options: dict[str, Any]) -> None:
    for name in ("softcap", *SINKS, "position_bias", "cu_seq_lens_q"):
        if options.get(name) is not None:
            raise ValueError(
                f'mode "sliding_window" cannot honour {name}, which this model asks for'
            )
