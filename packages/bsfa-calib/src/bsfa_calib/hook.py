# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""A model of transformers under another attention, and what it kept meanwhile.

While a method is applied, the model runs with the attention function ``bsfa_hook``. It
reads one prompt at a time, without padding; steps of fewer queries than a block, as in decoding,
are dense.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from bsfa_kernel import DEFAULT_GEOMETRY, Geometry, block_sparse_attention, reference

ATTENTION_NAME = "bsfa_hook"
BACKENDS = ("auto", "reference")


class HookError(ValueError):
    """The model's attention cannot be replaced; the message says why."""


class Attended(NamedTuple):
    """What a method gives for one layer.

    Attributes:
        out: [1, seqlen_q, heads, head_dim].
        skipped: float32 [heads] on the model's device: share of the visible blocks left out.
    """

    out: Tensor
    skipped: Tensor


class Method(Protocol):
    """Computes causal attention for one layer of one prompt."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Attended:
        """Attention of q [1, seqlen_q, heads, head_dim] to k, v [1, seqlen_k, kv_heads, ...]."""
        ...


@dataclass
class Meter:
    """What the layers left out since the configuration was applied, or since ``take``.

    Attributes:
        dense: calls that ran dense, by reason.
    """

    dense: dict[str, int] = field(default_factory=dict)
    _skipped: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, layer: int, skipped: Tensor) -> None:
        """Note a layer's skipped shares."""
        self._skipped.setdefault(layer, []).append(skipped)

    def count_dense(self, reason: str) -> None:
        """Note a call that ran dense."""
        self.dense[reason] = self.dense.get(reason, 0) + 1

    def take(self) -> list[list[float]]:
        """Mean skipped share of the prompts since the last call, [layers][heads]; forgets them."""
        means = [torch.stack(self._skipped[layer]).mean(0) for layer in sorted(self._skipped)]
        self._skipped = {}
        return [[round(share, 4) for share in mean.tolist()] for mean in means]


@dataclass(frozen=True)
class _Applied:
    method: Method | None
    meter: Meter
    q_block: int


_applied: ContextVar[_Applied | None] = ContextVar("bsfa_calib_hook", default=None)


@contextlib.contextmanager
def applied(model: Any, method: Method | None, *, q_block: int = 128) -> Iterator[Meter]:
    """Run a model under a method, or dense with None, and give it back as it was.

    Args:
        model: a decoder of transformers.
        method: what computes attention where there is more than one block of queries.
        q_block: fewer queries than this, after others, run dense.

    Raises:
        HookError: the model does not take its attention from transformers' interface.
    """
    _register()
    configs = {
        id(module.config): module.config
        for module in model.modules()
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation")
    }
    before = [(config, config._attn_implementation) for config in configs.values()]
    meter = Meter()
    token = _applied.set(_Applied(method, meter, q_block))
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        if model.config._attn_implementation != ATTENTION_NAME:
            raise HookError(
                f"{type(model).__name__} does not take its attention function from transformers' "
                "AttentionInterface, so it cannot be evaluated"
            )
        yield meter
    finally:
        _applied.reset(token)
        for config, implementation in before:
            config._attn_implementation = implementation


def attention_shape(model: Any) -> tuple[int, int]:
    """Layers and query heads of a model."""
    config = model.config.get_text_config(decoder=True)
    return int(config.num_hidden_layers), int(config.num_attention_heads)


@dataclass(frozen=True)
class BlockSparse:
    """Block-sparse attention with a table of thresholds.

    Attributes:
        thresholds: float32 [layers, heads, rows] on the model's device.
        rule: one of ``bsfa_kernel.RULES``.
        geometry: the sparsity block.
        backend: one of ``BACKENDS``.
    """

    thresholds: Tensor
    rule: str
    geometry: Geometry = DEFAULT_GEOMETRY
    backend: str = "auto"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Attended:
        """See ``Method``."""
        thresholds = self.thresholds[layer]
        if self.backend == "reference":
            result = reference.attention(
                q, k, v, thresholds, scale=scale, rule=self.rule, geometry=self.geometry
            )
            out, kept = result.out, result.kept
        else:
            out, kept = block_sparse_attention(
                *(q, k, v, thresholds),
                scale=scale,
                rule=self.rule,
                geometry=self.geometry,
                return_kept=True,
            )
        visible = visible_count(q.shape[1], k.shape[1], self.geometry)
        return Attended(out, 1 - kept[0].sum(-1).float() / visible)


def visible_count(seqlen_q: int, seqlen_k: int, geometry: Geometry) -> int:
    """Blocks of which some score is visible to a causal prompt."""
    starts = torch.arange(0, seqlen_q, geometry.q_block)
    ends = (starts + geometry.q_block).clamp(max=seqlen_q) + seqlen_k - seqlen_q
    return int(((ends + geometry.k_block - 1) // geometry.k_block).sum())


def forced_share(seqlen: int, geometry: Geometry) -> float:
    """Share of the visible blocks of a prompt that are always kept."""
    starts = torch.arange(0, seqlen, geometry.q_block)
    free = int(((starts + 1) // geometry.k_block).sum())
    return 1 - free / visible_count(seqlen, seqlen, geometry)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """SDPA of q [1, heads, seqlen_q, head_dim], causal and aligned to the bottom right."""
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    plain = seqlen_q == seqlen_k and (window is None or window >= seqlen_k)
    mask = None
    if not plain:
        last_seen = torch.arange(seqlen_q, device=q.device)[:, None] + seqlen_k - seqlen_q
        keys = torch.arange(seqlen_k, device=q.device)
        mask = keys <= last_seen
        if window is not None:
            mask &= keys > last_seen - window
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=True
    )


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls."""
    current = _applied.get()
    if current is None:
        raise RuntimeError(f"{ATTENTION_NAME} is for evaluation only; set another implementation")
    if attention_mask is not None or query.shape[0] != 1:
        raise HookError("evaluation takes one prompt at a time, without padding")
    if softcap is not None or s_aux is not None:
        raise HookError("attention with softcap or sinks cannot be evaluated yet")
    scale = float(query.shape[-1]) ** -0.5 if scaling is None else float(scaling)
    layer = int(getattr(module, "layer_idx", 0))
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    reason = None
    if sliding_window is not None and sliding_window < seqlen_k:
        reason = "layer with a sliding window of its own"
    elif seqlen_q < seqlen_k and seqlen_q < current.q_block:
        reason = "decode step"
    if current.method is None or reason is not None:
        if current.method is not None and reason is not None:
            current.meter.count_dense(reason)
        out = dense_attention(query, key, value, scale, sliding_window)
        return out.transpose(1, 2), None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    attended = current.method(q, k, v, layer, scale)
    current.meter.add(layer, attended.skipped)
    return attended.out, None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, flash_attention_mask)
