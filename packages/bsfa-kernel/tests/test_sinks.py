# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Attention sinks, in every function and on every back end that the machine has."""

from __future__ import annotations

import math

import pytest
import torch

import cases
import guarded
import oracle
import paging
from bsfa_kernel import (
    GEOMETRIES,
    PRECISIONS,
    Geometry,
    attend_blocks,
    block_maxima,
    block_sparse_attention,
    pack_blocks,
    reference,
    select_blocks,
    unpack_blocks,
)
from bsfa_kernel.geometry import query_block_count
from compare import assert_close, assert_lse_close, assert_matches, by_query, error_budget

INF = math.inf
TINY = Geometry(2, 2)

# Of what holds for all numbers; those that are none have tests of their own.
NUMBERS = ("usual", "far", "above all", "none")


def column(*values):
    """[1, length, 1, 1], for scores that are products of two numbers."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def attend(q, k, v, thresholds, **options):
    return block_sparse_attention(q, k, v, thresholds, return_lse=True, return_kept=True, **options)


def named(name, **shape):
    shape = {"seqlen_q": 300, "seqlen_k": 300, "heads": 4, "kv_heads": 2, **shape}
    return cases.Case(name, "", **shape)


# ------------------------------------------------------------------------------- worked by hand


def test_a_sink_is_in_the_denominator_and_has_no_value():
    q, k, v = column(1, 0), column(2, 1), column(10, 20)
    sinks = torch.tensor([0.5], dtype=torch.float64)
    options = {"causal": False, "scale": 1.0, "geometry": TINY, "sinks": sinks}
    result = reference.attention(q, k, v, torch.full((1, 1), -INF), **options)
    weights = [[math.exp(2), math.exp(1)], [1.0, 1.0]]
    totals = [sum(row) + math.exp(0.5) for row in weights]
    expected = [(10 * w[0] + 20 * w[1]) / t for w, t in zip(weights, totals, strict=True)]
    assert result.out.flatten().tolist() == pytest.approx(expected, rel=1e-14)
    assert result.lse.flatten().tolist() == pytest.approx(list(map(math.log, totals)), rel=1e-14)


def test_a_row_that_keeps_nothing_has_output_0_and_the_sink_as_its_lse():
    q, k = column(1, 1, 1), column(2)
    sinks = torch.tensor([-0.25])
    result = reference.attention(q, k, k, torch.full((1, 1), -INF), geometry=TINY, sinks=sinks)
    assert result.out.flatten().tolist()[:2] == [0, 0]
    assert result.lse.flatten().tolist()[:2] == [-0.25, -0.25]


@pytest.mark.parametrize("rule", ["running_max", "peak_lse"])
def test_references_begin_with_the_sink(rule):
    # Without a sink the last block would be kept at any threshold.
    q, k = column(1), column(1, 2, 5, 4)
    sinks = torch.tensor([6.0], dtype=torch.float64)
    options = {"causal": False, "scale": 1.0, "geometry": TINY, "rule": rule, "sinks": sinks}
    together = 6.0 if rule == "running_max" else math.log(math.exp(5) + math.exp(6))
    excess = [2 - together, 5 - 6.0]
    assert reference.block_maxima(q, k, **options).flatten().tolist() == pytest.approx(excess)
    for level, mask in ((-0.9, [False, False]), (-1.1, [False, True]), (-9.0, [True, True])):
        result = reference.attention(q, k, k, torch.full((1, 1), level), **options)
        assert result.mask.flatten().tolist() == mask


# -------------------------------------------------------------------------------- every back end


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("keep", [1.0, 0.3])
@pytest.mark.parametrize("head_dim", cases.KERNEL_HEAD_DIMS)
def test_outputs_match_float64(target, dtype, rule, geometry, kind, keep, head_dim):
    target.require("forward", dtype, head_dim)
    case = named("sinks", seqlen_q=333, seqlen_k=517, head_dim=head_dim)
    q, k, v = case.inputs(dtype, target.device)
    sinks = cases.sinks_of(kind, 4, target.device)
    options = {"rule": rule, "geometry": geometry, **sinks}
    thresholds = torch.full((4, 1), -INF, device=target.device)
    clear = None
    if keep < 1:
        thresholds, clear = cases.separating_thresholds(case, q, k, keep=keep, **options)
    expected = reference.attention(q, k, v, thresholds, compute_dtype=torch.float64, **options)
    if clear is None:
        clear = torch.ones_like(expected.kept, dtype=torch.bool)
    found = attend(q, k, v, thresholds, **options)
    budget = error_budget(q, k, v, expected, causal=True, scale=None, geometry=geometry, **sinks)
    assert_matches(found, expected, clear, budget, geometry, k.shape[1])


@pytest.mark.parametrize("kind", [*NUMBERS, "special"])
def test_queries_that_see_nothing_have_the_sink_as_their_lse(target, dtype, kind):
    """Some queries before the first key, then none at all, then no key."""
    for kernel in ("forward", "attend_blocks"):
        target.require(kernel, dtype, 64)
    sinks = cases.sinks_of(kind, 4, target.device)
    wanted = sinks["sinks"].masked_fill(sinks["sinks"] == INF, math.nan)
    thresholds = torch.zeros((4, 1), device=target.device)
    for seqlen_k, blind in ((170, 130), (0, 300)):
        case = named("blind", seqlen_k=max(seqlen_k, 1))
        q, k, v = case.inputs(dtype, target.device)
        k, v = k[:, :seqlen_k], v[:, :seqlen_k]
        q_blocks, words = query_block_count(300, seqlen_k), min(seqlen_k, 1)
        mask = torch.full((1, 4, q_blocks, words), -1, device=target.device)
        for out, lse in (
            attend(q, k, v, thresholds, **sinks)[:2],
            attend_blocks(q, k, v, mask, return_lse=True, **sinks),
        ):
            expected = wanted[None, :, None].expand(1, 4, blind)
            assert torch.equal(lse[:, :, :blind].nan_to_num(77), expected.nan_to_num(77))
            zeros = torch.zeros_like(out[:, :blind])
            zeros[:, :, wanted.isnan()] = 77
            assert torch.equal(out[:, :blind].nan_to_num(77), zeros)


def test_minus_infinity_is_no_sink(target, dtype, rule, geometry):
    case = named("no sink")
    target.require("forward", dtype, 64)
    q, k, v = case.inputs(dtype, target.device)
    thresholds = cases.rough_thresholds(case, q, k, rule=rule, geometry=geometry, keep=0.5)
    options = {"rule": rule, "geometry": geometry}
    expected = attend(q, k, v, thresholds, **options)
    found = attend(q, k, v, thresholds, **options, **cases.sinks_of("none", 4, target.device))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_under_the_absolute_rule_verdicts_do_not_change(target, dtype, geometry):
    case = named("absolute")
    for kernel in ("forward", "select_blocks"):
        target.require(kernel, dtype, 64)
    q, k, v = case.inputs(dtype, target.device)
    thresholds = cases.rough_thresholds(case, q, k, rule="absolute", geometry=geometry, keep=0.5)
    for kind in cases.SINKS:
        sinks = cases.sinks_of(kind, 4, target.device)
        kept = [attend(q, k, v, thresholds, geometry=geometry, **s)[2] for s in ({}, sinks)]
        assert torch.equal(*kept)
        for precision in PRECISIONS:
            options = {"geometry": geometry, "precision": precision}
            masks = [select_blocks(q, k, thresholds, **options, **s) for s in ({}, sinks)]
            assert torch.equal(*masks)


@pytest.mark.parametrize("selection", ["exact", "int8"])
@pytest.mark.parametrize("head_dim", cases.KERNEL_HEAD_DIMS)
def test_sinks_that_are_no_numbers_make_their_heads_nan(
    target, rule, geometry, selection, head_dim
):
    kernels = ("forward",) if selection == "exact" else ("select_blocks", "attend_blocks")
    for kernel in kernels:
        target.require(kernel, torch.bfloat16, head_dim)
    case = named("special", seqlen_q=400, seqlen_k=500, head_dim=head_dim)
    q, k, v = case.inputs(torch.bfloat16, target.device)
    thresholds = torch.full((4, 1), cases.MIXED_LEVELS[rule], device=target.device)
    options = {"rule": rule, "geometry": geometry, "selection": selection}
    sinks = cases.sinks_of("special", 4, target.device)["sinks"]
    out, lse, kept = attend(q, k, v, thresholds, **options, sinks=sinks)
    sound = torch.where(sinks < INF, sinks, 0.0)
    expected = attend(q, k, v, thresholds, **options, sinks=sound)
    for head in (0, 2):
        assert out[:, :, head].isnan().all()
        assert lse[:, head].isnan().all()
        if rule == "absolute":
            assert torch.equal(kept[:, head], expected[2][:, head])
        else:  # a reference of NaN keeps everything
            visible = reference.visible_blocks(400, 500, geometry=geometry).sum(-1)
            assert kept[0, head].tolist() == visible.tolist()
    # The reference's products may be of other shapes, and their sums in another order.
    tolerance = {"rtol": 0, "atol": 0} if target.arch else {}
    for head in (1, 3):
        torch.testing.assert_close(out[:, :, head], expected[0][:, :, head], **tolerance)
        torch.testing.assert_close(lse[:, head], expected[1][:, head], **tolerance)
        assert torch.equal(kept[:, head], expected[2][:, head])


@pytest.mark.parametrize("kind", cases.SINKS)
def test_block_maxima_match_float64(target, dtype, rule, geometry, kind):
    case = named("maxima", seqlen_q=333, seqlen_k=400)
    target.require("block_maxima", dtype, 64)
    q, k, _ = case.inputs(dtype, target.device)
    options = {"rule": rule, "geometry": geometry, **cases.sinks_of(kind, 4, target.device)}
    expected = reference.block_maxima(q, k, compute_dtype=torch.float64, **options)
    found = block_maxima(q, k, **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("voters", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("head_dim", cases.KERNEL_HEAD_DIMS)
def test_selections_match_the_oracle(target, rule, geometry, kind, voters, precision, head_dim):
    case = named("selected", seqlen_q=200, seqlen_k=400, heads=2, kv_heads=1, head_dim=head_dim)
    target.require("select_blocks", torch.bfloat16, head_dim)
    q, k, _ = case.inputs(torch.bfloat16, target.device)
    k = k + 0.5  # so that the offset of rounded keys is worth something
    options = {"rule": rule, "voters": voters, "precision": precision}
    sinks = cases.sinks_of(kind, 2, target.device)
    maxima = reference.block_maxima(q, k, rule=rule, geometry=geometry, **sinks)
    finite = maxima[maxima.isfinite()]
    thresholds = torch.stack([finite.quantile(x) for x in (0.3, 0.5, 0.7, 0.9)]).expand(2, 4)
    expected, margin = oracle.select(
        *(x.double().cpu().numpy() for x in (q, k, thresholds)),
        causal=True,
        scale=head_dim**-0.5,
        q_block=geometry.q_block,
        sinks=sinks["sinks"].double().cpu().numpy(),
        **options,
    )
    found = select_blocks(q, k, thresholds, geometry=geometry, **options, **sinks)
    found = unpack_blocks(found, expected.shape[-1]).cpu()
    # A value that is rounded to the next whole number is worth this much of a score.
    error = 1e-3 if precision == "exact" else 2 * head_dim**-0.5 * 8 * 8 / 127
    clear = torch.from_numpy(margin) > error
    assert torch.equal(found[clear], torch.from_numpy(expected)[clear])
    if precision == "exact":
        assert clear.float().mean() > 0.8


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("head_dim", cases.KERNEL_HEAD_DIMS)
def test_attention_of_a_mask_matches_float64(target, dtype, geometry, kind, density, head_dim):
    case = named("masked", seqlen_q=333, seqlen_k=517, head_dim=head_dim)
    target.require("attend_blocks", dtype, head_dim)
    q, k, v = case.inputs(dtype, target.device)
    sinks = cases.sinks_of(kind, 4, target.device)
    shape = (1, 4, query_block_count(333, 517, geometry), 9)
    generator = torch.Generator().manual_seed(5)
    mask = pack_blocks(torch.rand(shape, generator=generator) < density).to(target.device)
    options = {"causal": True, "geometry": geometry, **sinks}
    expected = reference.attend_blocks(q, k, v, mask, compute_dtype=torch.float64, **options)
    found = attend_blocks(q, k, v, mask, return_lse=True, return_kept=True, **options)
    budget = error_budget(q, k, v, expected, scale=None, **options)
    all_clear = torch.ones_like(expected.kept).bool()
    assert_matches(found, expected, all_clear, budget, geometry, 517)


def test_int8_is_attention_of_what_is_selected(target, rule, geometry):
    for kernel in ("select_blocks", "attend_blocks"):
        target.require(kernel, torch.bfloat16, 64)
    case = named("two steps", seqlen_q=500, seqlen_k=500)
    q, k, v = case.inputs(torch.bfloat16, target.device)
    sinks = cases.sinks_of("usual", 4, target.device)
    thresholds = torch.full((4, 1), cases.MIXED_LEVELS[rule], device=target.device)
    options = {"rule": rule, "geometry": geometry, **sinks}
    mask = select_blocks(q, k, thresholds, **options)
    expected = attend_blocks(
        q, k, v, mask, geometry=geometry, return_lse=True, return_kept=True, **sinks
    )
    found = attend(q, k, v, thresholds, selection="int8", **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------- packed and paged sequences and chunks


@pytest.mark.parametrize("selection", ["exact", "int8"])
@pytest.mark.parametrize("page_size", [None, 48])
def test_packed_and_paged_sequences_are_computed_like_single_ones(
    target, rule, geometry, selection, page_size
):
    for kernel in ("forward", "select_blocks", "attend_blocks"):
        target.require(kernel, torch.bfloat16, 64)
    lengths = ((130, 333), (5, 0), (0, 40), (200, 120), (77, 77))
    packed = cases.PackedCase("sinks", "", lengths)
    q, k, v = packed.inputs(torch.bfloat16, target.device)
    starts_q, starts_k = packed.cu_seqlens(target.device)
    sinks = cases.sinks_of("usual", 4, target.device)
    level = {"absolute": 2.0, "running_max": -0.5, "peak_lse": -1.5}[rule]
    thresholds = torch.full((4, 1), level, device=target.device)
    options = {"rule": rule, "geometry": geometry, "selection": selection, **sinks}
    where = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
    keys, values = ([*x.split([n for _, n in lengths])] for x in (k, v))
    paged = k, v
    if page_size:
        cache = paging.paged(keys, values, page_size, seed=3)
        paged, where = (cache.k, cache.v), {"cu_seqlens_q": starts_q, **cache.options}
    out, lse, kept = attend(q, *paged, thresholds, **options, **where)
    for index, (seqlen_q, seqlen_k) in enumerate(lengths):
        queries = slice(int(starts_q[index]), int(starts_q[index + 1]))
        alone = q[None, queries], keys[index][None], values[index][None]
        expected = attend(*alone, thresholds, **options)
        first = queries.start // geometry.q_block + 2 * index
        columns = slice(first, first + query_block_count(seqlen_q, seqlen_k, geometry))
        found = out[None, queries], lse[None, :, queries], kept[None, :, columns]
        if target.arch:
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        else:
            assert torch.equal(found[2], expected[2])
            torch.testing.assert_close(found[:2], expected[:2])


def test_chunks_of_whole_query_blocks_give_what_the_whole_gives(target, rule, geometry):
    case = named("chunks", seqlen_q=640, seqlen_k=640)
    target.require("forward", torch.float16, 64)
    q, k, v = case.inputs(torch.float16, target.device)
    sinks = cases.sinks_of("usual", 4, target.device)
    thresholds, clear = cases.separating_thresholds(
        case, q, k, rule=rule, geometry=geometry, **sinks
    )
    options = {"rule": rule, "geometry": geometry, **sinks}
    whole_out, whole_lse, whole_kept = attend(q, k, v, thresholds, **options)
    for start in range(0, 640, 256):
        stop = min(start + 256, 640)
        chunk = q[:, start:stop], k[:, :stop], v[:, :stop]
        out, lse, kept = attend(*chunk, thresholds, **options)
        blocks = slice(start // geometry.q_block, stop // geometry.q_block)
        certain = clear[..., blocks]
        assert torch.equal(kept[certain], whole_kept[..., blocks][certain])
        rows = by_query(certain, stop - start, stop, geometry)
        hidden = ~rows.transpose(1, 2)[..., None]
        torch.testing.assert_close(
            out.masked_fill(hidden, 0),
            whole_out[:, start:stop].masked_fill(hidden, 0),
            rtol=2e-3,
            atol=2e-3,
        )
        assert_lse_close(
            lse.masked_fill(~rows, 0), whole_lse[..., start:stop].masked_fill(~rows, 0)
        )


# ------------------------------------------------------------------------------ how they are given


def test_sinks_may_be_strided(target):
    case = named("strided")
    target.require("forward", torch.float16, 64)
    q, k, v = case.inputs(torch.float16, target.device)
    thresholds = torch.zeros((4, 1), device=target.device)
    sinks = cases.sinks_of("usual", 4, target.device)["sinks"]
    strided = sinks.repeat_interleave(3)[::3]
    assert not strided.is_contiguous()
    expected = attend(q, k, v, thresholds, sinks=sinks)
    found = attend(q, k, v, thresholds, sinks=strided)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_nothing_is_written_outside_the_outputs(target, rule, geometry):
    case = named("guarded", seqlen_q=200, seqlen_k=260)
    target.require("forward", torch.float16, 64)
    q, k, v = case.inputs(torch.float16, target.device)
    thresholds = torch.zeros((4, 1), device=target.device)
    options = {"rule": rule, "geometry": geometry, **cases.sinks_of("far", 4, target.device)}
    outputs = guarded.forward(q, k, v, thresholds, causal=True, **options)
    expected = attend(q, k, v, thresholds, **options)
    for name, output, wanted in zip(("out", "lse", "kept"), outputs, expected, strict=True):
        assert torch.equal(output.view, wanted)
        output.assert_written_exactly(name)


@pytest.mark.gpu
def test_a_graph_reads_the_sinks_of_the_time_when_it_is_replayed(arch, rule):
    case = named("graph")
    arch.require("forward", torch.float16, 64)
    q, k, v = case.inputs(torch.float16, "cuda")
    thresholds = torch.zeros((4, 1), device="cuda")
    sinks = torch.zeros(4, device="cuda")
    attend(q, k, v, thresholds, rule=rule, sinks=sinks)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend(q, k, v, thresholds, rule=rule, sinks=sinks)
    for kind in ("usual", "far"):
        sinks.copy_(cases.sinks_of(kind, 4, "cuda")["sinks"])
        graph.replay()
        expected = attend(q, k, v, thresholds, rule=rule, sinks=sinks.clone())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_sink_far_above_leaves_exact_outputs(target, dtype, geometry):
    """What 16 bits hold of an output must not be lost on the way to it: a sink of 8 over scores of
    about 0 makes each probability less than 2^-11."""
    case = named("exact", seqlen_q=256, seqlen_k=256)
    target.require("forward", dtype, 64)
    q, k, v = case.inputs(dtype, target.device)
    sinks = {"sinks": torch.full((4,), 8.0, device=target.device)}
    thresholds = torch.full((4, 1), -INF, device=target.device)
    expected = reference.attention(
        q, k, v, thresholds, geometry=geometry, compute_dtype=torch.float64, **sinks
    )
    out = block_sparse_attention(q, k, v, thresholds, geometry=geometry, **sinks)
    budget = error_budget(q, k, v, expected, causal=True, scale=None, geometry=geometry, **sinks)
    assert_close(out, expected.out, budget)
