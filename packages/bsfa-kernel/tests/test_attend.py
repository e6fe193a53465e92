# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Attention over the blocks of a mask, whoever made it, on every back end that the machine has."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import guarded
import oracle
import paging
from bsfa_kernel import (
    DEFAULT_GEOMETRY,
    GEOMETRIES,
    attend_blocks,
    block_sparse_attention,
    pack_blocks,
    reference,
)
from bsfa_kernel.geometry import query_block_count
from compare import assert_close, assert_lse_close, assert_matches, error_budget

INF = math.inf


def random_blocks(case, geometry, density, *, device="cpu", seed=0):
    """Blocks of a mask, bool [batch, heads, q_blocks, k_blocks]; invisible ones among them."""
    generator = torch.Generator().manual_seed(case.seed + seed)
    shape = (
        case.batch,
        case.heads,
        query_block_count(case.seqlen_q, case.seqlen_k, geometry),
        -(-case.seqlen_k // geometry.k_block),
    )
    return (torch.rand(shape, generator=generator) < density).to(device)


def outputs(q, k, v, blocks, **options):
    return attend_blocks(q, k, v, pack_blocks(blocks), return_lse=True, return_kept=True, **options)


def check(case, q, k, v, blocks, geometry):
    """Compare one call with the reference in float64."""
    options = {"causal": case.causal, "scale": case.scale, "geometry": geometry}
    expected = reference.attend_blocks(
        q, k, v, pack_blocks(blocks), compute_dtype=torch.float64, **options
    )
    found = outputs(q, k, v, blocks, **options)
    assert found[0].dtype == q.dtype
    assert found[1].dtype == torch.float32
    budget = error_budget(q, k, v, expected, **options)
    all_clear = torch.ones_like(expected.kept).bool()
    assert_matches(found, expected, all_clear, budget, geometry, case.seqlen_k)
    return found


# ----------------------------------------------------------------------------- against the oracle


@settings(max_examples=max(40, settings().max_examples))
@given(data=st.data())
def test_reference_matches_the_oracle(data):
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    geometry = data.draw(st.sampled_from(GEOMETRIES))
    case = cases.Case(
        f"oracle {data.draw(st.integers(0, 2**32))}",
        "",
        seqlen_q=data.draw(st.integers(1, 200)),
        seqlen_k=data.draw(st.integers(1, 200)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=8,
        causal=data.draw(st.booleans()),
    )
    q, k, v = case.inputs(torch.float64)
    blocks = random_blocks(case, geometry, data.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])))
    # What no query attends to is not looked at.
    unused = ~blocks.any(2).any(1).any(0).repeat_interleave(64)[: case.seqlen_k]
    for x in (k, v):
        x[:, unused] = math.nan
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, case.seqlen_k - 1))
        k[0, place, 0, 0] = data.draw(st.sampled_from([math.nan, INF, -INF]))
    sinks = cases.random_sinks(lambda x: data.draw(st.sampled_from(x)), case.heads)
    out, lse, kept = oracle.attend_mask(
        *(x.numpy() for x in (q, k, v, blocks)),
        causal=case.causal,
        scale=8**-0.5,
        q_block=geometry.q_block,
        sinks=sinks,
    )
    result = reference.attend_blocks(
        q, k, v, pack_blocks(blocks), causal=case.causal, geometry=geometry, sinks=sinks
    )
    exactly = {"rtol": 0, "atol": 1e-12, "equal_nan": True}
    torch.testing.assert_close(result.lse, torch.from_numpy(lse), **exactly)
    assert torch.equal(result.kept, torch.from_numpy(kept))
    # The oracle's softmax of a row with NaN or +inf has no meaning.
    rows = torch.from_numpy(lse).isnan().transpose(1, 2)[..., None].expand(out.shape)
    assert result.out[rows].isnan().all()
    expected = torch.from_numpy(out)
    torch.testing.assert_close(result.out[~rows], expected[~rows], **exactly)


# --------------------------------------------------------------------------------- every back end


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_output_is_as_exact_as_sixteen_bits_allow(target, case, dtype, geometry, density):
    target.require("attend_blocks", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    blocks = random_blocks(case, geometry, density, device=target.device)
    check(case, q, k, v, blocks, geometry)


@pytest.mark.parametrize("first", range(1, 301, 60))
def test_attends_at_every_length(target, dtype, geometry, first):
    target.require("attend_blocks", dtype, 64)
    for length in range(first, first + 60):
        other = length * 7919 % 300 + 1
        seqlen_q, seqlen_k = (length, other) if length % 3 else (length, length)
        case = cases.Case(
            f"length {length}",
            "",
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            heads=2,
            kv_heads=1,
            causal=length % 4 > 0,
        )
        q, k, v = case.inputs(dtype, target.device)
        blocks = random_blocks(case, geometry, 0.5, device=target.device)
        check(case, q, k, v, blocks, geometry)


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_an_empty_mask_gives_zeros_and_minus_infinity(target, case, geometry):
    dtype = torch.bfloat16 if case.seed % 2 else torch.float16
    target.require("attend_blocks", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    for x in (k, v):
        x.fill_(math.nan)
    blocks = random_blocks(case, geometry, 0.0, device=target.device)
    out, lse, kept = outputs(q, k, v, blocks, causal=case.causal, geometry=geometry)
    assert (out == 0).all()
    assert (lse == -INF).all()
    assert (kept == 0).all()


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_bits_of_invisible_blocks_are_ignored(target, case, geometry):
    dtype = torch.bfloat16 if case.seed % 2 else torch.float16
    target.require("attend_blocks", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    blocks = random_blocks(case, geometry, 0.5, device=target.device)
    visible = reference.visible_blocks(
        case.seqlen_q, case.seqlen_k, causal=case.causal, geometry=geometry
    ).to(target.device)
    options = {"causal": case.causal, "geometry": geometry, "return_lse": True}
    words = pack_blocks(blocks & visible)
    expected = attend_blocks(q, k, v, words, return_kept=True, **options)
    past = pack_blocks(torch.ones_like(blocks))
    everything = torch.full_like(words, -1)
    for extra in (pack_blocks(~visible.expand_as(blocks)), everything & ~past):
        found = attend_blocks(q, k, v, words | extra, return_kept=True, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(expected[2], (blocks & visible).sum(-1).int())


def test_all_blocks_are_dense_attention(target, dtype, geometry):
    case = cases.Case("dense", "", batch=2, seqlen_q=300, seqlen_k=500, heads=4, kv_heads=2)
    target.require("attend_blocks", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    out, _, kept = check(
        case, q, k, v, random_blocks(case, geometry, 1.1, device=target.device), geometry
    )
    mask = torch.ones(300, 500, dtype=torch.bool, device=q.device).tril(200)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2).double() for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), dense, rtol=2 * eps, atol=2 * eps)
    visible = reference.visible_blocks(300, 500, geometry=geometry).sum(-1).int()
    assert torch.equal(kept.cpu(), visible.expand(2, 4, -1))


def test_forced_blocks_count_only_where_the_mask_says_so(target, dtype, geometry):
    # A sliding window that leaves out the diagonal, and the block of the first keys alone.
    case = cases.Case("window", "", seqlen_q=517, seqlen_k=517, heads=4, kv_heads=2, head_dim=128)
    target.require("attend_blocks", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    blocks = random_blocks(case, geometry, 0.0, device=target.device)
    diagonal = torch.arange(blocks.shape[2]) * geometry.q_block // 64
    distance = diagonal[:, None] - torch.arange(blocks.shape[3])
    blocks[:, :2] = ((distance >= 2) & (distance < 4)).to(target.device)
    blocks[:, 2:, :, 0] = True
    expected = check(case, q, k, v, blocks, geometry)
    # What is not attended to is not looked at.
    unused = ~blocks[0, 2:].any(0).any(0).repeat_interleave(64)[:517]
    k[:, unused, 1] = math.nan
    v[:, unused, 1] = math.nan
    found = outputs(q, k, v, blocks, geometry=geometry)
    for actual, wanted in zip(found, expected, strict=True):
        if target.arch:
            assert torch.equal(actual, wanted)
        else:
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_what_is_not_a_number_shows_where_it_is_attended_to(target, value):
    case = cases.Case("not finite", "", seqlen_q=256, seqlen_k=512, heads=2, kv_heads=1)
    target.require("attend_blocks", torch.bfloat16, case.head_dim)
    q, k, v = case.inputs(torch.bfloat16, target.device)
    q = q.abs() + 0.1  # so that the score is the key's sign times infinity
    k[0, 70, 0, 5] = value
    blocks = random_blocks(case, DEFAULT_GEOMETRY, 0.0, device=target.device)
    blocks[0, 0, :, 1] = True
    blocks[0, :, :, 2] = True
    out, lse, _ = outputs(q, k, v, blocks)
    assert out[0, :, 0].isnan().all() == (value != -INF)
    assert lse[0, 0].isnan().all() == (value != -INF)
    assert not out[0, :, 1].isnan().any()
    assert not lse[0, 1].isnan().any()
    k[0, 70, 0, 5] = 1.0
    v[0, 70, 0, 3] = value
    out, lse, _ = outputs(q, k, v, blocks)
    assert not out[0, :, 0, 3].isfinite().any()
    assert out[0, :, 1].isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("case", cases.PACKED, ids=str)
def test_packed_sequences_are_attended_to_like_single_ones(target, case, dtype, geometry):
    target.require("attend_blocks", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    starts_q, starts_k = case.cu_seqlens(target.device)
    columns = len(q) // geometry.q_block + 2 * len(case.lengths)
    generator = torch.Generator().manual_seed(1)
    blocks = torch.rand((case.heads, columns, 128), generator=generator) < 0.5
    blocks = blocks.to(target.device)
    options = {"causal": case.causal, "geometry": geometry}
    packed = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
    out, lse, kept = outputs(q, k, v, blocks, **options, **packed)
    unused = torch.ones(columns, dtype=torch.bool)
    for index, (length_q, length_k) in enumerate(case.lengths):
        queries = slice(starts_q[index], starts_q[index + 1])
        keys = slice(starts_k[index], starts_k[index + 1])
        first = int(starts_q[index]) // geometry.q_block + 2 * index
        own = slice(first, first + query_block_count(length_q, length_k, geometry))
        unused[own] = False
        tensors = q[None, queries], k[None, keys], v[None, keys]
        its_blocks = blocks[None, :, own, : -(-length_k // 64)]
        alone = outputs(*tensors, its_blocks, **options)
        found = out[None, queries], lse[None, :, queries], kept[None, :, own]
        if target.arch:
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
        else:
            for actual, wanted in zip(found, alone, strict=True):
                torch.testing.assert_close(actual, wanted)
    assert (kept[:, unused] == 0).all()


def test_a_sequence_with_more_blocks_than_bits_gets_nan(target, geometry):
    target.require("attend_blocks", torch.float16, 64)
    lengths = [(100, 4097), (70, 4096), (0, 0), (30, 5000), (200, 64)]
    case = cases.PackedCase("long keys", "", tuple(lengths), heads=2, kv_heads=1)
    q, k, v = case.inputs(torch.float16, target.device)
    starts_q, starts_k = case.cu_seqlens(target.device)
    columns = len(q) // geometry.q_block + 2 * len(lengths)
    blocks = torch.ones((2, columns, 64), dtype=torch.bool, device=target.device)
    packed = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "geometry": geometry}
    out, lse, _ = outputs(q, k, v, blocks, **packed)
    two_words = torch.ones((2, columns, 128), dtype=torch.bool, device=target.device)
    expected, expected_lse, _ = outputs(q, k, v, two_words, **packed)
    for index, (_, length_k) in enumerate(lengths):
        queries = slice(starts_q[index], starts_q[index + 1])
        if length_k > 4096:
            assert out[queries].isnan().all()
            assert lse[:, queries].isnan().all()
        else:
            assert torch.equal(out[queries], expected[queries])
            assert torch.equal(lse[:, queries], expected_lse[:, queries])
    assert not expected.isnan().any()


@pytest.mark.parametrize("page_size", [48, 64])
def test_a_paged_sequence_with_more_blocks_than_bits_gets_nan(target, geometry, page_size):
    target.require("attend_blocks", torch.float16, 64)
    case = cases.Case("long pages", "", batch=3, seqlen_q=70, seqlen_k=4200, heads=2, kv_heads=1)
    q, k, v = case.inputs(torch.float16, target.device)
    lengths = (4097, 4096, 0)
    keys, values = ([x[:n] for x, n in zip(y, lengths, strict=True)] for y in (k, v))
    cache = paging.paged(keys, values, page_size, seed=case.seed)
    columns = -(-(70 + geometry.q_block - 1) // geometry.q_block)
    options = {**cache.options, "geometry": geometry}
    blocks = torch.ones((3, 2, columns, 64), dtype=torch.bool, device=target.device)
    out, lse, _ = outputs(q, cache.k, cache.v, blocks, **options)
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    two_words = torch.ones((3, 2, columns, 128), dtype=torch.bool, device=target.device)
    expected, expected_lse, _ = outputs(q, cache.k, cache.v, two_words, **options)
    assert not expected.isnan().any()
    assert torch.equal(out[1:], expected[1:])
    assert torch.equal(lse[1:], expected_lse[1:])


def test_nothing_to_attend_to_is_zero(target, geometry):
    target.require("attend_blocks", torch.float16, 64)
    some = torch.ones((2, 100, 2, 64), dtype=torch.float16, device=target.device)
    none = some[:, :0]
    q_blocks = query_block_count(100, 0, geometry)

    def mask(*shape):
        return torch.full(shape, -1, dtype=torch.int64, device=target.device)

    options = {"geometry": geometry, "return_lse": True, "return_kept": True}
    out, lse, kept = attend_blocks(some, none, none, mask(2, 2, q_blocks, 0), **options)
    assert not out.any()
    assert (lse == -INF).all()
    assert not kept.any()
    out, lse, kept = attend_blocks(none, some, some, mask(2, 2, 0, 1), **options)
    assert (out.shape, lse.shape, kept.shape) == ((2, 0, 2, 64), (2, 2, 0), (2, 2, 0))
    empty = torch.zeros(3, dtype=torch.int32, device=target.device)
    full = torch.tensor([0, 40, 100], dtype=torch.int32, device=target.device)
    for q, k, starts_q, starts_k in (
        (some[0], none[0], full, empty),
        (none[0], some[0], empty, full),
    ):
        columns = len(q) // geometry.q_block + 2 * 2
        out, lse, kept = attend_blocks(
            *(q, k, k, mask(2, columns, 1)),
            cu_seqlens_q=starts_q,
            cu_seqlens_k=starts_k,
            **options,
        )
        assert not out.any()
        assert (lse == -INF).all()
        assert kept.shape == (2, columns)
        assert not kept.any()


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_nothing_is_written_outside_the_outputs_and_all_inside(target, case, geometry):
    dtype = torch.float16 if case.seed % 2 else torch.bfloat16
    target.require("attend_blocks", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    mask = pack_blocks(random_blocks(case, geometry, 0.4, device=target.device))
    options = {"causal": case.causal, "geometry": geometry}
    expected = attend_blocks(q, k, v, mask, return_lse=True, return_kept=True, **options)
    found = guarded.attend_blocks(q, k, v, mask, **options)
    for name, output, wanted in zip(("out", "lse", "kept"), found, expected, strict=True):
        assert torch.equal(output.view, wanted), name
        output.assert_written_exactly(name)


def test_strides_do_not_matter(target, dtype):
    case = cases.Case("strided", "", batch=2, seqlen_q=200, seqlen_k=260, heads=4, kv_heads=2)
    target.require("attend_blocks", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    blocks = random_blocks(case, DEFAULT_GEOMETRY, 0.6, device=target.device)
    mask = pack_blocks(blocks)
    expected = attend_blocks(q, k, v, mask, return_lse=True, return_kept=True)
    padded = torch.nn.functional.pad(k, (0, 24), value=math.nan)[..., : case.head_dim]
    sparse = torch.full_like(v, math.nan).repeat_interleave(2, 1)
    sparse[:, ::2] = v
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = mask.repeat_interleave(2, 2)[:, :, ::2]
    found = attend_blocks(
        heads_first, padded, sparse[:, ::2], wide, return_lse=True, return_kept=True
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_tiles_of_very_different_lengths_are_all_done(target, dtype):
    # One dense head among sparse ones, and query blocks without any block.
    case = cases.Case("skewed", "", seqlen_q=2048, seqlen_k=2048, heads=8, kv_heads=2)
    target.require("attend_blocks", dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    blocks = random_blocks(case, DEFAULT_GEOMETRY, 0.03, device=target.device)
    blocks[:, 3] = True
    blocks[:, 5, ::2] = False
    blocks[:, 6] = False
    check(case, q, k, v, blocks, DEFAULT_GEOMETRY)


def test_outputs_come_as_asked_for(target):
    case = cases.Case("asked", "", seqlen_q=100, seqlen_k=100)
    target.require("attend_blocks", torch.float16, case.head_dim)
    q, k, v = case.inputs(torch.float16, target.device)
    mask = pack_blocks(random_blocks(case, DEFAULT_GEOMETRY, 0.9, device=target.device))
    out, lse, kept = attend_blocks(q, k, v, mask, return_lse=True, return_kept=True)
    assert torch.equal(attend_blocks(q, k, v, mask), out)
    for wanted, options in ((lse, {"return_lse": True}), (kept, {"return_kept": True})):
        found = attend_blocks(q, k, v, mask, **options)
        assert torch.equal(found[0], out)
        assert torch.equal(found[1], wanted)


def test_a_mask_of_the_rule_gives_what_the_rule_gives():
    case = cases.Case("rule", "", seqlen_q=400, seqlen_k=400, heads=4, kv_heads=2)
    q, k, v = case.inputs()
    thresholds = torch.linspace(1, 3, 4)[:, None]
    result = reference.attention(q, k, v, thresholds)
    out, lse, kept = outputs(q, k, v, result.mask)
    expected = block_sparse_attention(q, k, v, thresholds)
    assert torch.equal(out, expected)
    assert torch.equal(kept, result.kept)
    assert_lse_close(lse, result.lse)
    assert_close(
        out,
        result.out,
        error_budget(
            q.half(), k.half(), v.half(), result, causal=True, scale=None, geometry=DEFAULT_GEOMETRY
        ),
    )


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block_mask": None}, TypeError, "block_mask must be a torch.Tensor, got NoneType"),
        (
            {"block_mask": torch.zeros(1, 2, 1, 1)},
            TypeError,
            "block_mask must be int64, got float32",
        ),
        (
            {"block_mask": torch.zeros(1, 2, 1, 10, dtype=torch.bool)},
            TypeError,
            "block_mask must be int64, got bool",
        ),
        (
            {"block_mask": torch.zeros(1, 2, 1, 2, dtype=torch.int64)},
            ValueError,
            r"block_mask must be \[batch, heads, q_blocks, words\] with ceil\(k_blocks / 64\) "
            r"words, here \[1, 2, 1, 1\]; got the shape \[1, 2, 1, 2\]",
        ),
        (
            {"block_mask": torch.zeros(1, 1, 1, 1, dtype=torch.int64)},
            ValueError,
            r"got the shape \[1, 1, 1, 1\]",
        ),
        (
            {"block_mask": torch.zeros(2, 1, 1, dtype=torch.int64)},
            ValueError,
            r"got the shape \[2, 1, 1\]",
        ),
        (
            {"block_mask": torch.zeros(1, 2, 1, 1, dtype=torch.int64, device="meta")},
            ValueError,
            r"block_mask must be on the device of q \(cpu\), got meta",
        ),
        ({"v": torch.zeros(1, 10, 1, 64)}, ValueError, "v must have the shape of k"),
        ({"geometry": None}, ValueError, "geometry must be one of the Geometry values"),
        ({"scale": 0.0}, ValueError, r"scale must be between 2\*\*-126 and 2\*\*127, got 0.0"),
        (
            {"cu_seqlens_q": torch.zeros(2, dtype=torch.int32)},
            ValueError,
            "cu_seqlens_q must be given together with cu_seqlens_k, or with seqused_k",
        ),
    ],
)
def test_arguments_that_break_a_rule_are_refused(changes, error, message):
    q, k, v = cases.Case("refused", "", seqlen_q=10, seqlen_k=10).inputs()
    mask = torch.zeros(1, 2, 1, 1, dtype=torch.int64)
    arguments = {"q": q, "k": k, "v": v, "block_mask": mask, **changes}
    with pytest.raises(error, match=message):
        attend_blocks(**arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (4, 3, 1),
            r"\[heads, total_q // q_block \+ 2 \* batch, words\], here \[4, 5, words\]; got",
        ),
        ((3, 5, 1), r"got the shape \[3, 5, 1\]"),
        ((1, 4, 5, 1), r"got the shape \[1, 4, 5, 1\]"),
        ((4, 5, 0), "block_mask must have at least one word, got 0"),
    ],
)
def test_masks_of_packed_sequences_are_checked(shape, message):
    case = cases.PackedCase("refused", "", ((100, 100), (80, 80)))
    q, k, v = case.inputs()
    starts_q, starts_k = case.cu_seqlens()
    mask = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        attend_blocks(q, k, v, mask, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
