# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The attention that a configuration names."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bsfa_calib.hook import BACKENDS, Attended, BlockSparse, Method, attention_shape, visible_count
from bsfa_calib.thresholds import ThresholdTable
from bsfa_hf.evaluation.configurations import Configuration, ConfigurationError, table_point
from bsfa_kernel import DEFAULT_GEOMETRY, Geometry

# Queries of a sliding window computed at a time, so that memory grows with the length alone.
_WINDOW_QUERIES = 512


def make_method(
    configuration: Configuration,
    model: Any,
    *,
    backend: str = "auto",
    threshold: float | None = None,
) -> Method | None:
    """The method of a configuration; None for dense.

    Args:
        configuration: what to compute.
        model: whose layers and heads thresholds must fit.
        backend: "auto" (CUDA tensors go to the native kernels) or "reference" (the reference in
            PyTorch on any device and dtype, slow).
        threshold: for a scalar that was asked for by its sparsity: the threshold that was found.

    Raises:
        ConfigurationError: the thresholds do not fit the model, or a package is missing.
    """
    if backend not in BACKENDS:
        raise ConfigurationError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if configuration.kind == "dense":
        return None
    if configuration.kind == "sliding_window":
        window, sink = int(configuration.option("window")), int(configuration.option("sink", "0"))
        return SlidingWindow(window, sink)
    if configuration.kind == "sparge_attn":
        return SpargeAttention({name: float(value) for name, value in configuration.options})
    layers, heads = attention_shape(model)
    device = next(model.parameters()).device
    if configuration.kind == "scalar":
        if threshold is None:
            threshold = float(configuration.option("threshold", "nan"))
        values = torch.full((layers, heads, 1), threshold, device=device)
        return BlockSparse(values, configuration.option("rule"), configuration.geometry, backend)
    table = ThresholdTable.load(configuration.option("file"))
    if (table.layers, table.heads) != (layers, heads):
        raise ConfigurationError(
            f"{configuration.option('file')} is for {table.layers} layers of {table.heads} heads, "
            f"and the model has {layers} of {heads}; calibrate thresholds for this model"
        )
    selected = table.select(**table_point(configuration))  # type: ignore[arg-type]
    values = torch.tensor(selected, device=device)
    return BlockSparse(values, table.rule, Geometry(table.q_block, table.k_block), backend)


@dataclass(frozen=True)
class SlidingWindow:
    """The last ``window`` keys of every query, and the first ``sink`` of the prompt."""

    window: int
    sink: int = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Attended:
        """See ``Method``."""
        seqlen_q, seqlen_k = q.shape[1], k.shape[1]
        offset = seqlen_k - seqlen_q
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.empty_like(q)
        for start in range(0, seqlen_q, _WINDOW_QUERIES):
            stop = min(start + _WINDOW_QUERIES, seqlen_q)
            first = max(start + offset - self.window + 1, 0)
            keys = torch.arange(first, stop + offset, device=q.device)
            if first > 0:
                sinks = torch.arange(min(self.sink, first), device=q.device)
                keys = torch.cat((sinks, keys))
            last_seen = torch.arange(start, stop, device=q.device)[:, None] + offset
            mask = (keys <= last_seen) & ((keys > last_seen - self.window) | (keys < self.sink))
            out[:, :, start:stop] = functional.scaled_dot_product_attention(
                *(q[:, :, start:stop], k[:, :, keys], v[:, :, keys]),
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
        skipped = q.new_full((q.shape[1],), self.skipped(seqlen_q, seqlen_k), dtype=torch.float32)
        return Attended(out.transpose(1, 2), skipped)

    def skipped(self, seqlen_q: int, seqlen_k: int) -> float:
        """Share of the visible 128x64 blocks in which the window holds no score."""
        q_block, k_block = DEFAULT_GEOMETRY
        offset = seqlen_k - seqlen_q
        kept = 0
        for start in range(0, seqlen_q, q_block):
            stop = min(start + q_block, seqlen_q)
            first = max(start + offset - self.window + 1, 0) // k_block
            last = (stop + offset - 1) // k_block
            sinks = min(-(-self.sink // k_block), first)
            kept += last - first + 1 + sinks
        return 1 - kept / visible_count(seqlen_q, seqlen_k, DEFAULT_GEOMETRY)


class SpargeAttention:
    """SpargeAttention of the package spas_sage_attn: CUDA only, whole prompts only."""

    def __init__(self, options: dict[str, float]) -> None:
        """Find the package's function.

        Raises:
            ConfigurationError: the package is not there.
        """
        name = "spas_sage2_attn_meansim_topk_cuda"
        if "cdfthreshd" in options:
            name = "spas_sage2_attn_meansim_cuda"
        try:
            self._attend = getattr(importlib.import_module("spas_sage_attn"), name)
        except (ImportError, AttributeError, OSError) as error:
            raise ConfigurationError(
                f"sparge_attn needs the package spas_sage_attn with {name} and a CUDA device; "
                f"importing it failed: {error}"
            ) from error
        self._options = options

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Attended:
        """See ``Method``."""
        if q.shape[1] != k.shape[1] or q.shape[1] < 128:
            raise ConfigurationError(
                "sparge_attn takes whole prompts of at least 128 tokens, got "
                f"{q.shape[1]} queries and {k.shape[1]} keys"
            )
        group = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out, sparsity = self._attend(
            q, k, v, is_causal=True, scale=scale, return_sparsity=True, **self._options
        )
        skipped = q.new_full((q.shape[1],), float(sparsity), dtype=torch.float32)
        return Attended(out.transpose(1, 2), skipped)
