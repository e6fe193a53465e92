# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Head dimensions between those that kernels are made for, on every back end."""

from __future__ import annotations

import math

import pytest
import torch

import cases
import guarded
import paging
from bsfa_kernel import (
    PRECISIONS,
    attend_blocks,
    block_maxima,
    block_sparse_attention,
    build_info,
    pack_blocks,
    reference,
    select_blocks,
    unpack_blocks,
)
from bsfa_kernel.geometry import query_block_count
from compare import assert_matches, error_budget

INF = math.inf


@pytest.fixture(params=cases.head_dims_of_run(), ids=str)
def head_dim(request):
    """Some of those that are no kernel's own."""
    return request.param


def among_nan(x):
    """The same values, with NaN behind each row's last column and before its first."""
    wide = torch.nn.functional.pad(x, (8, 8), value=math.nan)
    return wide[..., 8:-8]


def named(name, head_dim, **shape):
    shape = {"seqlen_q": 333, "seqlen_k": 517, "heads": 4, "kv_heads": 2, **shape}
    return cases.Case(name, "", head_dim=head_dim, **shape)


@pytest.mark.parametrize("keep", [1.0, 0.3])
@pytest.mark.parametrize("kind", [None, "usual"])
def test_outputs_match_float64(target, dtype, rule, geometry, head_dim, keep, kind):
    target.require("forward", dtype, head_dim)
    case = named("width", head_dim)
    q, k, v = case.inputs(dtype, target.device)
    sinks = cases.sinks_of(kind, 4, target.device)
    options = {"rule": rule, "geometry": geometry, **sinks}
    thresholds = torch.full((4, 1), -INF, device=target.device)
    if keep < 1:
        thresholds, _ = cases.separating_thresholds(case, q, k, keep=keep, **options)
    expected = reference.attention(q, k, v, thresholds, compute_dtype=torch.float64, **options)
    clear = expected.margin > cases.VERDICT_MARGIN
    found = block_sparse_attention(
        *map(among_nan, (q, k, v)), thresholds, return_lse=True, return_kept=True, **options
    )
    budget = error_budget(q, k, v, expected, causal=True, scale=None, geometry=geometry, **sinks)
    assert_matches(found, expected, clear, budget, geometry, 517)


def test_block_maxima_match_float64(target, dtype, rule, geometry, head_dim):
    target.require("block_maxima", dtype, head_dim)
    q, k, _ = named("width", head_dim).inputs(dtype, target.device)
    options = {"rule": rule, "geometry": geometry}
    expected = reference.block_maxima(q, k, compute_dtype=torch.float64, **options)
    found = block_maxima(among_nan(q), among_nan(k), **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_selections_match_float64(target, dtype, rule, geometry, head_dim, precision):
    target.require("select_blocks", dtype, head_dim)
    case = named("width", head_dim, seqlen_q=500, seqlen_k=700)
    q, k, _ = case.inputs(dtype, target.device)
    thresholds = cases.rough_thresholds(case, q, k, rule=rule, geometry=geometry, keep=0.5)
    options = {"rule": rule, "geometry": geometry, "precision": precision}
    expected = reference.select_blocks(q, k, thresholds, compute_dtype=torch.float64, **options)
    found = select_blocks(among_nan(q), among_nan(k), thresholds, **options)
    found = unpack_blocks(found, expected.mask.shape[-1])
    # One rounded value may be another by one step between float32 and float64.
    error = 1e-3 if precision == "exact" else 2 * head_dim**-0.5 * 6 * 6 / 127
    clear = expected.margin > error
    assert torch.equal(found[clear], expected.mask[clear])
    share = (found ^ expected.mask).float().mean()
    assert share < 0.02


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_attention_of_a_mask_matches_float64(target, dtype, geometry, head_dim, density):
    target.require("attend_blocks", dtype, head_dim)
    q, k, v = named("width", head_dim).inputs(dtype, target.device)
    shape = (1, 4, query_block_count(333, 517, geometry), 9)
    generator = torch.Generator().manual_seed(head_dim)
    mask = pack_blocks(torch.rand(shape, generator=generator) < density).to(target.device)
    options = {"causal": True, "geometry": geometry}
    expected = reference.attend_blocks(q, k, v, mask, compute_dtype=torch.float64, **options)
    found = attend_blocks(
        *map(among_nan, (q, k, v)), mask, return_lse=True, return_kept=True, **options
    )
    budget = error_budget(q, k, v, expected, scale=None, **options)
    all_clear = torch.ones_like(expected.kept).bool()
    assert_matches(found, expected, all_clear, budget, geometry, 517)


def test_pages_give_what_keys_side_by_side_give(target, rule, geometry, head_dim):
    """In one cache, where the values, NaN among them, are behind the keys of each row."""
    for kernel in ("forward", "block_maxima", "select_blocks", "attend_blocks"):
        target.require(kernel, torch.bfloat16, head_dim)
    case = named("pages", head_dim, seqlen_q=150)
    q, k, v = case.inputs(torch.bfloat16, target.device)
    v[0, ::7] = math.nan
    cache = paging.paged([k[0]], [v[0]], 48, seed=head_dim)
    thresholds = torch.full((4, 1), -0.5, device=target.device)
    options = {"rule": rule, "geometry": geometry}
    outputs = {"return_lse": True, "return_kept": True}
    for selection in ("exact", "int8"):
        expected = block_sparse_attention(
            q, k, v, thresholds, selection=selection, **options, **outputs
        )
        found = block_sparse_attention(
            q,
            cache.k,
            cache.v,
            thresholds,
            selection=selection,
            **cache.options,
            **options,
            **outputs,
        )
        columns = expected[2].shape[-1]
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
        assert torch.equal(found[2][..., :columns], expected[2])
    maxima = block_maxima(q, k, **options)
    found = block_maxima(q, cache.k, **cache.options, **options)
    assert torch.equal(found[..., : maxima.shape[2], : maxima.shape[3]], maxima)


def test_nothing_is_written_outside_the_outputs(target, dtype, geometry, head_dim):
    """The columns behind a row's last are not the output's."""
    for kernel in ("forward", "attend_blocks"):
        target.require(kernel, dtype, head_dim)
    q, k, v = named("guarded", head_dim, seqlen_q=200).inputs(dtype, target.device)
    thresholds = torch.full((4, 1), 2.0, device=target.device)
    outputs = guarded.forward(q, k, v, thresholds, causal=True, rule="absolute", geometry=geometry)
    mask = torch.full((1, 4, query_block_count(200, 517, geometry), 1), -1, device=target.device)
    masked = guarded.attend_blocks(q, k, v, mask, causal=True, geometry=geometry)
    for output in (*outputs, *masked):
        output.assert_written_exactly("an output")


def test_values_of_another_width_are_refused(target):
    q = torch.zeros(1, 10, 2, 64, dtype=torch.float16, device=target.device)
    with pytest.raises(
        ValueError, match=r"v must have the head_dim of k: .* not supported, got 32 and 64"
    ):
        block_sparse_attention(q, q, q[..., :32], torch.zeros((2, 1), device=target.device))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [60, 252, 264])
def test_widths_that_no_kernel_can_serve_are_refused(arch, head_dim):
    q = torch.zeros(1, 10, 2, 264, dtype=torch.float16, device="cuda")[..., :head_dim]
    thresholds = torch.zeros((2, 1), device="cuda")
    rule = f"head_dim must be a multiple of 8 up to 256, got {head_dim}"
    with pytest.raises(ValueError, match=rule):
        block_sparse_attention(q, q, q, thresholds)


def test_a_library_with_all_kernels_serves_every_multiple_of_8_up_to_256():
    info = build_info()
    widths = {(kernel.name, kernel.arch, kernel.dtype, kernel.head_dim) for kernel in info.kernels}
    for name, arch, dtype in {kernel[:3] for kernel in widths}:
        if {(name, arch, dtype, width) for width in cases.KERNEL_HEAD_DIMS} <= widths:
            served = [
                head_dim
                for kernel in info.kernels
                if (kernel.name, kernel.arch, kernel.dtype) == (name, arch, dtype)
                for head_dim in kernel.head_dims
            ]
            assert sorted(served) == list(cases.HEAD_DIMS)
