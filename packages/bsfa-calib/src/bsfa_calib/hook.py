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

from bsfa_calib.dense import dense_reason, model_attention, sinks_of, unknown_arguments
from bsfa_calib.reasons import Reason
from bsfa_calib.switch import register, switched
from bsfa_kernel import DEFAULT_GEOMETRY, Geometry, block_sparse_attention, reference
from bsfa_kernel.geometry import count_visible

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

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, sinks: Tensor | None
    ) -> Attended | None:
        """Attention of q [1, seqlen_q, heads, head_dim] to k, v [1, seqlen_k, kv_heads, ...].

        ``sinks`` are the layer's, float32 [heads], or None (docs/semantics.md).
        None leaves the layer to the model's dense attention; so a method may look on only.
        """
        ...


@dataclass
class Meter:
    """What the layers left out since the method was applied, or since ``take``.

    Attributes:
        dense: calls that ran dense for another reason than that there was no method, by reason.
        dense_layers: layers that run dense whatever the prompt, and why.
        called: layers that have called the attention function.
    """

    dense: dict[str, int] = field(default_factory=dict)
    dense_layers: dict[int, str] = field(default_factory=dict)
    called: set[int] = field(default_factory=set)
    _skipped: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, layer: int, skipped: Tensor) -> None:
        """Note a layer's skipped shares, [heads]."""
        self._skipped.setdefault(layer, []).append(skipped)

    def count_dense(self, layer: int, reason: Reason) -> None:
        """Note a call that ran dense."""
        self.dense[str(reason)] = self.dense.get(str(reason), 0) + 1
        if reason is not Reason.DECODE:
            self.dense_layers[layer] = str(reason)

    def skip_nothing(self, layers: int) -> dict[int, str]:
        """The layers, of so many, that skip nothing whatever the prompt, and why."""
        others = set(range(layers)) - self.called
        why = dict.fromkeys(others, "it has no causal softmax attention of its own")
        return dict(sorted((why | self.dense_layers).items()))

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
        SwitchError: the model does not take its attention from transformers' interface.
    """
    from transformers.masking_utils import sdpa_mask

    register(ATTENTION_NAME, _attention, sdpa_mask)
    meter = Meter()
    token = _applied.set(_Applied(method, meter, q_block))
    try:
        with switched(model, ATTENTION_NAME):
            yield meter
    finally:
        _applied.reset(token)


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
        voters: one query row in 1, 2 or 4 votes.
        selection: from what scores blocks are chosen, one of ``bsfa_kernel.SELECTIONS``; the
            reference knows "exact" alone.
        expected_skipped: share of the blocks that the thresholds skip, by which "auto" decides.
    """

    thresholds: Tensor
    rule: str
    geometry: Geometry = DEFAULT_GEOMETRY
    backend: str = "auto"
    voters: int = 1
    selection: str = "exact"
    expected_skipped: float | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Attended:
        """See ``Method``."""
        thresholds = self.thresholds[layer]
        options: dict[str, Any] = {
            "scale": scale,
            "rule": self.rule,
            "geometry": self.geometry,
            "voters": self.voters,
            "sinks": sinks,
        }
        if self.backend == "reference":
            result = reference.attention(q, k, v, thresholds, **options)
            out, kept = result.out, result.kept
        else:
            options["selection"] = self.selection
            if self.selection == "auto":
                options["expected_skipped"] = self.expected_skipped
            out, kept = block_sparse_attention(q, k, v, thresholds, **options, return_kept=True)
        visible = count_visible(q.shape[1], k.shape[1], self.geometry)
        return Attended(out, 1 - kept[0].sum(-1).float() / visible)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    Args:
        module: the attention module.
        query: [batch, heads, seqlen_q, head_dim].
        key: [batch, kv_heads, seqlen_k, head_dim].
        value: [batch, kv_heads, seqlen_k, head_dim of values].
        attention_mask: None where the mask is plainly causal.
        scaling: factor of the scores; head_dim ** -0.5 by default.
        is_causal: whether the mask is causal, if the module does not know better.
        options: what else the model passes.

    Returns:
        [batch, seqlen_q, heads, head_dim of values], and None for the weights.
    """
    current = _applied.get()
    if current is None:
        raise RuntimeError(
            f"attention {ATTENTION_NAME!r} works within bsfa_calib.hook.applied() only; set "
            "another implementation"
        )
    unknown = unknown_arguments(options)
    if unknown:
        raise HookError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention function, which "
            "block-sparse attention does not know: this model cannot be calibrated"
        )
    if query.shape[0] != 1:
        raise HookError(f"one prompt is read at a time, got a batch of {query.shape[0]}")
    layer = getattr(module, "layer_idx", None)
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    reason = dense_reason(module, query, key, value, is_causal, options)
    if reason is None and seqlen_q < seqlen_k and seqlen_q < current.q_block:
        reason = Reason.DECODE
    elif reason is None and attention_mask is not None:
        reason = Reason.OWN_MASK
    attended = None
    if isinstance(layer, int):
        current.meter.called.add(layer)
    if isinstance(layer, int) and reason is not None:
        current.meter.count_dense(layer, reason)
    elif isinstance(layer, int) and current.method is not None:
        scale = float(query.shape[-1]) ** -0.5 if scaling is None else float(scaling)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        attended = current.method(q, k, v, layer, scale, sinks_of(options))
    if attended is not None:
        current.meter.add(layer, attended.skipped)  # type: ignore[arg-type]
        return attended.out, None
    out = model_attention(
        module,
        *(query, key, value, attention_mask),
        is_causal=is_causal,
        options={"scaling": scaling, **options},
    )
    return out, None
