# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Outputs against float64, on every back end that the machine has."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import cases
from bsfa_kernel import (
    DEFAULT_GEOMETRY,
    GEOMETRIES,
    block_maxima,
    block_sparse_attention,
    reference,
)
from compare import (
    LSE_TOLERANCE,
    assert_close,
    assert_lse_close,
    assert_matches,
    budget_of,
    error_budget,
)

INF = math.inf


def check(case, q, k, v, thresholds, clear, *, rule, geometry, voters=1):
    """Compare one call with the reference in float64."""
    options = {
        "causal": case.causal,
        "scale": case.scale,
        "rule": rule,
        "geometry": geometry,
        "voters": voters,
    }
    expected = reference.attention(q, k, v, thresholds, compute_dtype=torch.float64, **options)
    found = block_sparse_attention(
        q, k, v, thresholds, return_lse=True, return_kept=True, **options
    )
    assert found[0].dtype == q.dtype
    if clear is None:
        clear = torch.ones_like(expected.kept, dtype=torch.bool)
    budget = error_budget(
        q, k, v, expected, causal=case.causal, scale=case.scale, geometry=geometry
    )
    assert_matches(found, expected, clear, budget, geometry, k.shape[1])


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_dense_output_is_as_exact_as_sixteen_bits_allow(target, case, dtype, rule):
    target.require("forward", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    thresholds = torch.full((case.heads, 1), -INF, device=target.device)
    check(case, q, k, v, thresholds, None, rule=rule, geometry=DEFAULT_GEOMETRY)


@pytest.mark.parametrize("keep", [0.2, 0.7])
@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_sparse_output_is_as_exact_as_sixteen_bits_allow(target, case, rule, geometry, keep):
    dtype = torch.bfloat16 if case.seed % 2 else torch.float16
    target.require("forward", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    voters = cases.voters_of(case, rule, geometry, keep)
    thresholds, clear = cases.separating_thresholds(
        case, q, k, rule=rule, geometry=geometry, keep=keep, voters=voters
    )
    check(case, q, k, v, thresholds, clear, rule=rule, geometry=geometry, voters=voters)


@pytest.mark.parametrize("case", cases.PACKED, ids=str)
def test_packed_sequences_are_computed_like_single_ones(target, case, dtype, rule, geometry):
    target.require("forward", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    starts_q, starts_k = case.cu_seqlens(target.device)
    generator = torch.Generator().manual_seed(1)
    level = {"absolute": 2.0, "running_max": -0.5, "peak_lse": -1.5}[rule]
    thresholds = level + torch.randn((case.heads, 4), generator=generator)
    thresholds = thresholds.to(target.device)
    options = {"causal": case.causal, "rule": rule, "geometry": geometry}
    out, lse, kept = block_sparse_attention(
        q,
        k,
        v,
        thresholds,
        cu_seqlens_q=starts_q,
        cu_seqlens_k=starts_k,
        return_lse=True,
        return_kept=True,
        **options,
    )
    unused = torch.ones_like(kept, dtype=torch.bool)
    for index in range(len(case.lengths)):
        queries = slice(int(starts_q[index]), int(starts_q[index + 1]))
        keys = slice(int(starts_k[index]), int(starts_k[index + 1]))
        alone = [x[None] for x in (q[queries], k[keys], v[keys])]
        expected = reference.attention(*alone, thresholds, compute_dtype=torch.float64, **options)
        first = queries.start // geometry.q_block + 2 * index
        columns = slice(first, first + expected.kept.shape[2])
        unused[:, columns] = False
        budget = error_budget(*alone, expected, causal=case.causal, scale=None, geometry=geometry)
        found = out[None, queries], lse[None, :, queries], kept[None, :, columns]
        clear = expected.margin > cases.VERDICT_MARGIN
        assert_matches(found, expected, clear, budget, geometry, alone[1].shape[1])
    assert (kept[unused] == 0).all()


@pytest.mark.parametrize(
    "layout", ["heads first", "head_dim padded", "one allocation", "every other token"]
)
def test_any_strides_give_the_same_bits(target, dtype, layout):
    case = cases.Case("layouts", "", batch=2, seqlen_q=300, seqlen_k=300, heads=4, kv_heads=4)
    target.require("forward", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    if layout == "heads first":
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    elif layout == "head_dim padded":
        strided = [torch.nn.functional.pad(x, (0, 8))[..., :64] for x in (q, k, v)]
    elif layout == "one allocation":
        strided = list(torch.stack((q, k, v), 2).unbind(2))
    else:
        strided = [x.repeat_interleave(2, 1)[:, ::2] for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in strided)
    thresholds = torch.full((4, 1), 2.5, device=target.device)
    options = {"return_lse": True, "return_kept": True}
    for found, expected in zip(
        block_sparse_attention(*strided, thresholds, **options),
        block_sparse_attention(q, k, v, thresholds, **options),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_one_sequence_of_a_batch_may_be_shared(target):
    case = cases.Case("shared keys", "", seqlen_q=200, seqlen_k=200)
    target.require("forward", torch.float16, case.head_dim)
    q, k, v = case.inputs(torch.float16, target.device)
    thresholds = torch.full((2, 1), 2.0, device=target.device)
    expected = block_sparse_attention(q, k, v, thresholds)
    keys, values = k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)
    out = block_sparse_attention(q.repeat(3, 1, 1, 1), keys, values, thresholds)
    assert torch.equal(out, expected.expand(3, -1, -1, -1))


@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_small_and_large_scores_are_as_exact_as_others(target, dtype, rule, factor):
    case = cases.Case("magnitudes", "", seqlen_q=300, seqlen_k=300)
    target.require("forward", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    q = q * factor
    thresholds = torch.full((2, 1), -INF, device=target.device)
    check(case, q, k, v, thresholds, None, rule=rule, geometry=DEFAULT_GEOMETRY)


def test_scores_that_are_all_negative_are_no_zeros(target, dtype, rule):
    # Padding of a tile with zeros would be the largest score here.
    case = cases.Case("negative", "", seqlen_q=130, seqlen_k=130, causal=False)
    target.require("forward", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    q, k = q.abs() + 1, -k.abs() - 1
    thresholds = torch.full((2, 1), -INF, device=target.device)
    check(case, q, k, v, thresholds, None, rule=rule, geometry=DEFAULT_GEOMETRY)


def test_weights_sum_to_one(target, dtype, rule):
    case = cases.Case("ones", "", seqlen_q=333, seqlen_k=517, heads=4, kv_heads=2)
    target.require("forward", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    level = {"absolute": 2.5, "running_max": -0.5, "peak_lse": -1.5}[rule]
    thresholds = torch.full((4, 1), level, device=target.device)
    out = block_sparse_attention(q, k, torch.ones_like(v), thresholds, rule=rule)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=2 * eps)


def test_values_of_skipped_blocks_are_not_read(target, rule, geometry):
    case = cases.Case("poison", "", seqlen_q=128, seqlen_k=1024, heads=1, kv_heads=1)
    target.require("forward", torch.bfloat16, case.head_dim)
    q, k, v = case.inputs(torch.bfloat16, target.device)
    k[:, ::2] = 0
    k[:, 256:640] = 0
    level = {"absolute": 0.5, "running_max": -1.0, "peak_lse": -2.0}[rule]
    thresholds = torch.full((1, 1), level, device=target.device)
    options = {"rule": rule, "geometry": geometry}
    mask = reference.attention(q, k, v, thresholds, **options).mask[0, 0]
    skipped = ~mask.any(0)
    assert 4 <= skipped.sum() < 16
    expected = block_sparse_attention(q, k, v, thresholds, **options)
    v[0, skipped.repeat_interleave(64)] = math.nan
    out = block_sparse_attention(q, k, v, thresholds, **options)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_block_maxima_match_float64(target, case, rule, geometry):
    dtype = torch.float16 if case.seed % 2 else torch.bfloat16
    target.require("block_maxima", dtype, case.head_dim)
    q, k, _ = case.inputs(dtype, target.device)
    options = {"causal": case.causal, "scale": case.scale, "rule": rule, "geometry": geometry}
    expected = reference.block_maxima(q, k, compute_dtype=torch.float64, **options)
    found = block_maxima(q, k, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_call_gives_the_same_bits_each_time(target, dtype, rule):
    case = cases.Case("again", "", batch=2, seqlen_q=517, seqlen_k=517, heads=4, kv_heads=1)
    target.require("forward", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    thresholds, _ = cases.separating_thresholds(case, q, k, rule=rule, tries=1)
    options = {"rule": rule, "return_lse": True, "return_kept": True}
    first = block_sparse_attention(q, k, v, thresholds, **options)
    for _ in range(3):
        again = block_sparse_attention(q, k, v, thresholds, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---------------------------------------------------------------------------------- on a GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", cases.KERNEL_HEAD_DIMS)
def test_dense_error_is_at_most_twice_that_of_torch_flash_attention(arch, dtype, head_dim):
    arch.require("forward", dtype, head_dim)
    case = cases.Case(
        "flash", "", seqlen_q=2048, seqlen_k=2048, heads=8, kv_heads=2, head_dim=head_dim
    )
    q, k, v = case.inputs(dtype, "cuda")
    thresholds = torch.full((8, 1), -INF, device="cuda")
    expected = reference.attention(q, k, v, thresholds, compute_dtype=torch.float64)
    repeated = (x.repeat_interleave(4, 2) for x in (k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, *repeated)), is_causal=True
        ).transpose(1, 2)
    out, lse = block_sparse_attention(q, k, v, thresholds, return_lse=True)
    budget = budget_of(flash.double() - expected.out, expected.out, rounding=0.0)
    assert_close(out, expected.out, budget)
    assert_lse_close(lse, expected.lse, LSE_TOLERANCE / 4)


@pytest.mark.parametrize("head_dim", cases.KERNEL_HEAD_DIMS)
@pytest.mark.parametrize("value", [math.nan, INF, -INF], ids=str)
@pytest.mark.parametrize("name", ["q", "k"])
def test_scores_that_are_not_finite_are_never_hidden(target, rule, geometry, head_dim, name, value):
    """A key's NaN is in all rows that see it, a query's in one; what they miss is as without it."""
    target.require("forward", torch.bfloat16, head_dim)
    case = cases.Case(
        "not finite", "", seqlen_q=1000, seqlen_k=1000, heads=4, kv_heads=2, head_dim=head_dim
    )
    q, k, v = case.inputs(torch.bfloat16, target.device)
    options = {"rule": rule, "geometry": geometry}
    thresholds = torch.full((4, 1), cases.MIXED_LEVELS[rule], device=target.device)
    thresholds[1] = INF
    thresholds[2] += 0.5
    exact = {**options, "compute_dtype": torch.float64}
    sound = reference.attention(q, k, v, thresholds, **exact)
    budget = error_budget(q, k, v, sound, causal=True, scale=None, geometry=geometry)
    {"q": q, "k": k}[name][0, 300, 1, 5] = value
    expected = reference.attention(q, k, v, thresholds, **exact)
    assert expected.out.isnan().any()
    assert not expected.out.isnan().all()
    found = block_sparse_attention(
        q, k, v, thresholds, return_lse=True, return_kept=True, **options
    )
    clear = expected.margin > cases.VERDICT_MARGIN
    assert_matches(found, expected, clear, budget, geometry, k.shape[1])


@pytest.mark.parametrize("value", [math.nan, INF, -INF], ids=str)
@pytest.mark.parametrize("name", ["q", "k"])
def test_block_maxima_show_scores_that_are_not_finite(target, rule, geometry, name, value):
    target.require("block_maxima", torch.bfloat16, 64)
    case = cases.Case("not finite", "", seqlen_q=500, seqlen_k=500, heads=4, kv_heads=2)
    q, k, _ = case.inputs(torch.bfloat16, target.device)
    {"q": q, "k": k}[name][0, 200, 1, 5] = value
    options = {"rule": rule, "geometry": geometry}
    expected = reference.block_maxima(q, k, compute_dtype=torch.float64, **options)
    assert expected.isnan().any() or not math.isnan(value)
    found = block_maxima(q, k, **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", cases.KERNEL_HEAD_DIMS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_nan_thresholds_poison_their_query_blocks_and_no_others(arch, rule, geometry, head_dim):
    """Two tiles for each multiprocessor, so that poisoned, dense and sparse ones meet."""
    arch.require("forward", torch.bfloat16, head_dim)
    case = cases.Case(
        "nan", "", seqlen_q=1400, seqlen_k=1400, heads=24, kv_heads=8, head_dim=head_dim
    )
    q, k, v = case.inputs(torch.bfloat16, "cuda")
    rows = -(-1400 // geometry.q_block)
    generator = torch.Generator("cuda").manual_seed(case.seed)
    thresholds = torch.randn((24, rows), generator=generator, device="cuda") * 0.5
    thresholds += cases.MIXED_LEVELS[rule]
    draws = torch.rand((24, rows), generator=generator, device="cuda")
    thresholds[draws < 0.1] = -INF
    expected, kept = block_sparse_attention(
        q, k, v, thresholds, rule=rule, geometry=geometry, return_kept=True
    )
    visible = reference.visible_blocks(1400, 1400, geometry=geometry).sum() * 24
    assert 0.3 < int(kept.sum()) / int(visible) < 0.8
    thresholds[draws > 0.8] = math.nan
    out = block_sparse_attention(q, k, v, thresholds, rule=rule, geometry=geometry)
    poisoned = (draws > 0.8).repeat_interleave(geometry.q_block, 1)[:, :1400].T[None, :, :, None]
    poisoned = poisoned.expand_as(out)
    assert out[poisoned].isnan().all()
    # A tile of two query blocks, one poisoned and one that keeps everything, as the first one does
    # without a vote, goes through the dense pass, which rounds otherwise.
    dense = draws < 0.1
    dense[:, 0] = True
    dense &= torch.tensor(geometry.q_block == 64, device="cuda")
    dense = (
        dense.repeat_interleave(geometry.q_block, 1)[:, :1400].T[None, :, :, None].expand_as(out)
    )
    same, dense = ~poisoned & ~dense, ~poisoned & dense
    assert torch.equal(out[same], expected[same])
    torch.testing.assert_close(out[dense], expected[dense], rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["absolute", "peak_lse"])
def test_long_sequences_are_as_exact_as_short_ones(arch, rule):
    arch.require("forward", torch.bfloat16, 128)
    case = cases.Case(
        "very long", "", seqlen_q=256, seqlen_k=131072, heads=8, kv_heads=2, head_dim=128
    )
    q, k, v = case.inputs(torch.bfloat16, "cuda")
    thresholds, _ = cases.separating_thresholds(case, q, k, rule=rule, keep=0.2, tries=12)
    expected = reference.attention(q, k, v, thresholds, rule=rule, compute_dtype=torch.float64)
    found = block_sparse_attention(
        q, k, v, thresholds, rule=rule, return_lse=True, return_kept=True
    )
    budget = error_budget(q, k, v, expected, causal=True, scale=None, geometry=DEFAULT_GEOMETRY)
    clear = expected.margin > (1e-5 if rule == "absolute" else 1e-4)
    assert_matches(found, expected, clear, budget, DEFAULT_GEOMETRY, k.shape[1])
