# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What a model's layers give the attention function and get from it, and what they should get."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

from bsfa_calib import ThresholdTable
from bsfa_hf.attention import bsfa_attention
from bsfa_kernel import Geometry, reference


class Call(NamedTuple):
    """A call of the attention function.

    Attributes:
        layer: index of the layer.
        query: [batch, heads, seqlen_q, head_dim].
        key: [batch, kv_heads, seqlen_k, head_dim].
        value: as key.
        mask: what stands for its mask.
        options: its named arguments.
        out: [batch, seqlen_q, heads, head_dim].
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]
    out: Tensor


@contextlib.contextmanager
def spied() -> Iterator[list[Call]]:
    """Note the calls of the attention function "bsfa"."""
    calls: list[Call] = []

    def spy(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Any:
        found = bsfa_attention(module, query, key, value, mask, **options)
        calls.append(Call(module.layer_idx, query, key, value, mask, options, found[0]))
        return found

    AttentionInterface.register("bsfa", spy)
    try:
        yield calls
    finally:
        AttentionInterface.register("bsfa", bsfa_attention)


class Exact(NamedTuple):
    """What a call of a whole prompt is to give.

    Attributes:
        out: float64 [batch, seqlen, heads, head_dim].
        kept: share of the visible blocks.
        margin: how far the closest verdict was from the other one.
    """

    out: Tensor
    kept: float
    margin: float


def exact(call: Call, table: ThresholdTable, point: int = 0) -> Exact:
    """Verdicts of the reference in float64, and a plain softmax over what they keep."""
    q, k, v = (x.detach().double().transpose(1, 2) for x in call[1:4])
    sinks = call.options.get("s_aux")
    sinks = None if sinks is None else sinks.detach().double()
    scale = call.options.get("scaling") or q.shape[-1] ** -0.5
    geometry = Geometry(table.q_block, table.k_block)
    found = reference.attention(
        *(q, k, v, torch.tensor(table.thresholds[point, call.layer])),
        scale=scale,
        rule=table.rule,
        geometry=geometry,
        voters=table.voters,
        sinks=sinks,
    )
    seqlen, heads = q.shape[1:3]
    keep = found.mask.repeat_interleave(geometry.q_block, 2)[:, :, :seqlen]
    keep = keep.repeat_interleave(geometry.k_block, 3)[..., :seqlen].tril()
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~keep, -math.inf)
    if sinks is not None:
        column = sinks[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    weights = scores.softmax(-1)[..., :seqlen]
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    torch.testing.assert_close(found.out, out, rtol=1e-9, atol=1e-9)
    visible = reference.visible_blocks(seqlen, seqlen, geometry=geometry)
    share = int(found.kept.sum()) / (len(q) * heads * int(visible.sum()))
    return Exact(out, share, float(found.margin.min()))
