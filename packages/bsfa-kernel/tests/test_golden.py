# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Results that were stored once and for all (tests/golden/make.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bsfa_kernel import block_sparse_attention, reference
from cases import VERDICT_MARGIN
from compare import assert_lse_close, assert_same_verdicts

GOLDEN = Path(__file__).parent / "golden"
EVERY = 11


@pytest.fixture(params=["chunk", "full"])
def stored(request):
    with safe_open(GOLDEN / f"{request.param}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()["causal"] == "1"


def results(tensors, rule, geometry):
    key = f"{rule}.{geometry}"
    return (tensors[f"{key}.{name}"] for name in ("thresholds", "out", "lse", "mask", "maxima"))


def test_the_reference_gives_what_was_stored(stored, rule, geometry):
    tensors, causal = stored
    q, k, v = (tensors[name].double() for name in "qkv")
    thresholds, out, lse, mask, maxima = results(tensors, rule, geometry)
    options = {"causal": causal, "scale": 0.125, "rule": rule, "geometry": geometry}
    found = reference.attention(q, k, v, thresholds, **options)
    assert torch.equal(found.mask, mask)
    assert torch.equal(found.kept, mask.sum(-1).int())
    torch.testing.assert_close(found.out[:, ::EVERY], out, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.lse, lse, rtol=0, atol=1e-12)
    found_maxima = reference.block_maxima(q, k, **options)
    torch.testing.assert_close(found_maxima, maxima, rtol=0, atol=1e-12)


def test_stored_verdicts_are_clear_and_of_both_kinds(stored, rule, geometry):
    tensors, causal = stored
    q, k, v = (tensors[name].double() for name in "qkv")
    thresholds, _, _, mask, _ = results(tensors, rule, geometry)
    found = reference.attention(
        q, k, v, thresholds, causal=causal, scale=0.125, rule=rule, geometry=geometry
    )
    assert (found.margin > VERDICT_MARGIN).all()
    visible = reference.visible_blocks(q.shape[1], k.shape[1], causal=causal, geometry=geometry)
    forced = reference.forced_blocks(q.shape[1], k.shape[1], causal=causal, geometry=geometry)
    free = (visible & ~forced).expand_as(mask)
    assert 0 < (mask & free).sum() < free.sum()


def test_kernels_give_what_was_stored(target, stored, rule, geometry):
    target.require("forward", torch.float16, 64)
    tensors, causal = stored
    q, k, v = (tensors[name].to(target.device) for name in "qkv")
    thresholds, out, lse, mask, _ = results(tensors, rule, geometry)
    found, found_lse, kept = block_sparse_attention(
        q,
        k,
        v,
        thresholds.to(target.device),
        causal=causal,
        scale=0.125,
        rule=rule,
        geometry=geometry,
        return_lse=True,
        return_kept=True,
    )
    assert_same_verdicts(kept.cpu(), mask.sum(-1).int(), torch.ones_like(kept.cpu()).bool())
    assert_lse_close(found_lse.cpu(), lse)
    torch.testing.assert_close(found[:, ::EVERY].cpu().double(), out, rtol=1e-3, atol=2e-3)
