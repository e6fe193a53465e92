# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Block masks and their selection, on every back end that the machine has."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import guarded
import oracle
from bsfa_kernel import (
    CROSSOVERS,
    GEOMETRIES,
    PRECISIONS,
    RULES,
    VOTERS,
    Kernel,
    _auto,
    _native,
    attend_blocks,
    block_sparse_attention,
    build_info,
    pack_blocks,
    reference,
    resolve_selection,
    select_blocks,
    unpack_blocks,
)
from bsfa_kernel.geometry import query_block_count
from compare import assert_lse_close, by_query

INF = math.inf

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


# --------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("k_blocks", [0, 1, 63, 64, 65, 128, 300])
def test_bit_j_of_word_i_is_block_64_i_plus_j(k_blocks):
    generator = torch.Generator().manual_seed(k_blocks)
    blocks = torch.rand((2, 3, k_blocks), generator=generator) < 0.5
    words = pack_blocks(blocks)
    assert (words.shape, words.dtype) == ((2, 3, -(-k_blocks // 64)), torch.int64)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        bits = [(w >> j) & 1 for w in words[tuple(index)].tolist() for j in range(64)]
        assert bits[:k_blocks] == blocks[tuple(index)].int().tolist()
        assert not any(bits[k_blocks:])
    assert torch.equal(unpack_blocks(words, k_blocks), blocks)
    strided = words.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(unpack_blocks(strided, k_blocks), blocks)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (pack_blocks, ([True],), TypeError, "blocks must be a torch.Tensor, got list"),
        (pack_blocks, (torch.zeros(3),), TypeError, "blocks must be bool, got float32"),
        (pack_blocks, (torch.tensor(True),), ValueError, "blocks must be .*k_blocks.*, got"),
        (unpack_blocks, (torch.zeros(1), 1), TypeError, "block_mask must be int64, got float32"),
        (unpack_blocks, (torch.tensor(1), 1), ValueError, "block_mask must be .*words"),
        (
            unpack_blocks,
            (torch.zeros(2, dtype=torch.int64), 129),
            ValueError,
            r"k_blocks must be between 0 and 128 \(2 words of 64 bits\), got 129",
        ),
        (unpack_blocks, (torch.zeros(2, dtype=torch.int64), -1), ValueError, "got -1"),
        *(
            (
                unpack_blocks,
                (torch.zeros(2, dtype=torch.int64), value),
                TypeError,
                f"k_blocks must be a whole number, got {type(value).__name__}",
            )
            for value in (2.0, "3", None, True)
        ),
    ],
)
def test_masks_that_are_none_are_refused(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


# ----------------------------------------------------------------------------- against the oracle


def spoil(how, q, k):
    """Queries and keys that 8 bits or a rule might take for something else."""
    if how == "constant":
        k[..., :2] += 50
    elif how == "loud":
        q[:, ::3] *= 1e4
        k[:, ::5] *= 1e3
    elif how == "quiet":
        q[:, ::2] *= 1e-4
        k *= 1e-5
    elif how == "zeros":
        q[:, ::2] = 0
        k[:, : k.shape[1] // 2] = 0
    elif how == "all zeros":
        k.zero_()
    elif how is not None:
        where, value = how.split()
        x = q if where == "query" else k
        x[0, x.shape[1] // 3, -1, 3] = float(value)


SPOILT = (
    *("constant", "loud", "quiet", "zeros", "all zeros"),
    *("query nan", "query inf", "query -inf", "key nan", "key inf", "key -inf"),
)


@st.composite
def selections(draw):
    """Arguments of a selection for the reference, in float64."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    near_blocks = st.builds(
        lambda blocks, by: max(64 * blocks + by, 1), st.integers(0, 4), st.integers(-1, 1)
    )
    lengths = st.one_of(st.integers(1, 300), near_blocks)
    seqlen_q, seqlen_k = draw(lengths), draw(lengths)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    q = torch.randn((1, seqlen_q, kv_heads * group, 16), generator=generator).double()
    k = torch.randn((1, seqlen_k, kv_heads, 16), generator=generator).double()
    spoil(draw(st.sampled_from([None, *SPOILT])), q, k)
    thresholds = torch.randn((kv_heads * group, draw(st.integers(1, 4))), generator=generator)
    rule = draw(st.sampled_from(RULES))
    thresholds += {"absolute": 2.0, "running_max": 0.0, "peak_lse": -1.0}[rule]
    special = draw(st.sampled_from([None, None, -INF, INF]))
    if special is not None:
        thresholds[0, 0] = special
    options = {
        "causal": draw(st.booleans()),
        "rule": rule,
        "geometry": draw(st.sampled_from(GEOMETRIES)),
        "voters": draw(st.sampled_from(VOTERS)),
        "precision": draw(st.sampled_from(PRECISIONS)),
        "sinks": cases.random_sinks(lambda x: draw(st.sampled_from(x)), kv_heads * group),
    }
    return q, k, thresholds, options


def expected_selection(q, k, thresholds, *, geometry, scale=None, **options):
    """The oracle's mask and margins."""
    mask, margin = oracle.select(
        *(x.double().cpu().numpy() for x in (q, k, thresholds)),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        q_block=geometry.q_block,
        **options,
    )
    return torch.from_numpy(mask), torch.from_numpy(margin)


@settings(max_examples=max(60, settings().max_examples))
@given(selections())
def test_reference_matches_the_oracle(call):
    q, k, thresholds, options = call
    mask, margin = expected_selection(q, k, thresholds, **options)
    found = reference.select_blocks(q, k, thresholds, **options)
    # Scores of loud queries and keys are in the millions.
    tolerance = 1e-12 * (1 + q.nan_to_num(0, 0, 0).abs().max() * k.nan_to_num(0, 0, 0).abs().max())
    clear = margin > tolerance
    assert torch.equal(found.mask[clear], mask[clear])
    torch.testing.assert_close(found.margin, margin, rtol=1e-12, atol=float(tolerance))
    forced = reference.forced_blocks(
        q.shape[1], k.shape[1], causal=options["causal"], geometry=options["geometry"]
    )
    assert found.mask[..., forced].all()


def select(q, k, thresholds, **options):
    """The public function's mask, as bools."""
    words = select_blocks(q, k, thresholds, **options)
    assert words.dtype == torch.int64
    blocks = unpack_blocks(words, -(-k.shape[1] // 64))
    assert torch.equal(pack_blocks(blocks), words), "bits of no block are set"
    return blocks


def may_err_by(q, k, precision, scale=None):
    """How much scores may differ between float32 and float64: rounded values may by a step."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (x.double().nan_to_num(0, 0, 0) for x in (q, k))
    largest_q = q.abs().amax().item() if q.numel() else 0.0
    spread = (k - k.mean(1, keepdim=True)).abs().amax().item() if k.numel() else 0.0
    largest_k = k.abs().amax().item() if k.numel() else 0.0
    summed = 1e-6 * scale * largest_q * largest_k * q.shape[-1]
    if precision == "exact":
        return 1e-4 + summed
    return 1e-4 + summed + 2 * scale * largest_q * spread / 127


def assert_selects(q, k, thresholds, *, scale=None, **options):
    """Fail unless the verdicts are those of the reference in float64, where that is certain."""
    found = select(q, k, thresholds, scale=scale, **options)
    expected = reference.select_blocks(
        q, k, thresholds, scale=scale, compute_dtype=torch.float64, **options
    )
    clear = expected.margin > may_err_by(q, k, options["precision"], scale)
    wrong = (found != expected.mask).any(-1) & clear
    assert not wrong.any(), f"{int(wrong.sum())} of {int(clear.sum())} clear query blocks differ"
    sizes = q.shape[1], k.shape[1]
    shape = {"causal": options["causal"], "geometry": options["geometry"]}
    visible, forced = (
        blocks(*sizes, **shape).to(found.device)
        for blocks in (reference.visible_blocks, reference.forced_blocks)
    )
    assert (found <= visible).all()
    assert (found >= forced).all()
    return clear


def mixed_thresholds(case, q, k, *, rule, geometry, seed=0):
    """Thresholds that many blocks pass and many do not, a few of them infinite."""
    thresholds = cases.rough_thresholds(case, q, k, rule=rule, geometry=geometry, keep=0.5)
    generator = torch.Generator().manual_seed(case.seed + seed)
    draws = torch.rand(thresholds.shape, generator=generator).to(thresholds.device)
    return thresholds.masked_fill(draws < 0.1, -INF).masked_fill(draws > 0.9, INF)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_selects_what_the_reference_selects(target, case, rule, geometry, precision):
    dtype = torch.bfloat16 if case.seed % 2 else torch.float16
    target.require("select_blocks", dtype, case.head_dim)
    q, k, _ = case.inputs(dtype, target.device)
    for voters in VOTERS:
        thresholds = mixed_thresholds(case, q, k, rule=rule, geometry=geometry, seed=voters)
        assert_selects(
            q,
            k,
            thresholds,
            causal=case.causal,
            scale=case.scale,
            rule=rule,
            geometry=geometry,
            voters=voters,
            precision=precision,
        )


@pytest.mark.parametrize("first", range(1, 301, 60))
def test_selects_at_every_length(target, dtype, geometry, first):
    target.require("select_blocks", dtype, 64)
    certain = []
    for length in range(first, first + 60):
        other = length * 7919 % 300 + 1
        seqlen_q, seqlen_k = (length, other) if length % 3 else (length, length)
        case = cases.Case(
            f"length {length}", "", seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads=2, kv_heads=1
        )
        q, k, _ = case.inputs(dtype, target.device)
        rule = RULES[length % 3]
        clear = assert_selects(
            q,
            k,
            mixed_thresholds(case, q, k, rule=rule, geometry=geometry),
            causal=length % 4 > 0,
            rule=rule,
            geometry=geometry,
            voters=VOTERS[length // 3 % 3],
            precision=PRECISIONS[length % 2],
        )
        certain.append(clear.float().mean())
    assert torch.stack(certain).mean() > 0.7


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_unusual_inputs_are_judged_as_they_should(target, how, rule, precision, head_dim):
    shape = {"batch": 2, "seqlen_q": 300, "seqlen_k": 450, "heads": 4, "kv_heads": 2}
    case = cases.Case(how, "", **shape, head_dim=head_dim)
    target.require("select_blocks", torch.bfloat16, case.head_dim)
    q, k, _ = case.inputs(torch.bfloat16, target.device)
    spoil(how, q, k)
    for geometry in GEOMETRIES:
        for voters in VOTERS:
            finite = reference.block_maxima(q, k, rule=rule, geometry=geometry)
            finite = finite[finite.isfinite()]
            # +inf is what a relative rule has for a row that has seen nothing yet.
            middle = finite.median().item() if finite.numel() else 0.0
            spread = finite.std(correction=0).item() if finite.numel() else 1.0
            for threshold in (middle + 0.3 * spread, middle + 1.5 * spread, -INF, INF):
                thresholds = torch.full((4, 1), threshold, device=target.device)
                assert_selects(
                    q,
                    k,
                    thresholds,
                    causal=True,
                    rule=rule,
                    geometry=geometry,
                    voters=voters,
                    precision=precision,
                )


def test_a_constant_of_the_keys_costs_no_precision(target, rule):
    case = cases.Case("offset", "", seqlen_q=512, seqlen_k=1024, heads=4, kv_heads=2)
    target.require("select_blocks", torch.bfloat16, case.head_dim)
    q, k, _ = case.inputs(torch.bfloat16, target.device)
    q[..., :2] = q[..., :2].sign()  # so that absolute scores are not all alike
    k[..., :2] = 50
    thresholds, _ = cases.separating_thresholds(case, q, k, rule=rule)
    exact = select(q, k, thresholds, rule=rule, precision="exact")
    rounded = select(q, k, thresholds, rule=rule, precision="int8")
    differ = (exact != rounded).float().mean().item()
    # Without the offset a step of a key would be 0.4, and every fifth verdict another one.
    assert differ < 0.05


def test_selection_in_eight_bits_is_close_to_exact_verdicts(target, rule, geometry):
    case = cases.Case("close", "", seqlen_q=512, seqlen_k=2048, heads=4, kv_heads=2, head_dim=128)
    target.require("select_blocks", torch.bfloat16, case.head_dim)
    q, k, _ = case.inputs(torch.bfloat16, target.device)
    thresholds, _ = cases.separating_thresholds(case, q, k, rule=rule, geometry=geometry)
    options = {"rule": rule, "geometry": geometry}
    exact = reference.select_blocks(
        q, k, thresholds, precision="exact", compute_dtype=torch.float64, **options
    )
    rounded = select(q, k, thresholds, precision="int8", **options)
    assert (exact.mask != rounded).float().mean() < 0.05
    assert 0.2 < exact.mask.float().mean() < 0.8


def test_later_keys_may_change_verdicts_in_eight_bits_but_not_what_is_kept(rule):
    case = cases.Case("later", "", seqlen_q=640, seqlen_k=640, heads=4, kv_heads=2)
    q, k, v = case.inputs(torch.float64)
    k[:, 512:, :, 0] += 20  # moves the offset, and so the rounding of earlier keys
    options = {"rule": rule, "geometry": GEOMETRIES[1]}
    maxima = reference.block_maxima(q[:, :512], k[:, :512], **options)
    threshold = maxima[maxima.isfinite()].median()
    thresholds = threshold.float().expand(4, 1)
    agree = {}
    for precision in PRECISIONS:
        masks, attended = [], []
        for stop in (640, 512):
            call = (q[:, :stop], k[:, :stop], thresholds)
            words = select_blocks(*call, precision=precision, **options)
            masks.append(unpack_blocks(words, 8)[:, :, :8])
            out = outputs(*call[:2], v[:, :stop], thresholds, selection=precision, **options)[0]
            attended.append(out[:, :512])
        same = (masks[0] == masks[1]).all(-1)
        agree[precision] = same.float().mean().item()
        rows = same.repeat_interleave(64, 2).transpose(1, 2)
        torch.testing.assert_close(attended[0][rows], attended[1][rows], rtol=0, atol=1e-12)
    assert agree["exact"] == 1
    assert 0.2 < agree["int8"] < 1


# ------------------------------------------------------------------------------ packed sequences


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", cases.PACKED, ids=str)
def test_packed_sequences_are_selected_like_single_ones(target, case, rule, geometry, precision):
    dtype = torch.float16
    target.require("select_blocks", dtype, case.head_dim)
    q, k, _ = case.inputs(dtype, target.device)
    starts_q, starts_k = case.cu_seqlens(target.device)
    generator = torch.Generator().manual_seed(1)
    level = {"absolute": 2.0, "running_max": -0.5, "peak_lse": -1.5}[rule]
    thresholds = level + torch.randn((case.heads, 4), generator=generator)
    thresholds = thresholds.to(target.device)
    options = {
        "causal": case.causal,
        "rule": rule,
        "geometry": geometry,
        "voters": VOTERS[len(case.lengths) % 3],
        "precision": precision,
    }
    for longest in (None, max(keys for _, keys in case.lengths), 9000):
        words = select_blocks(
            q,
            k,
            thresholds,
            cu_seqlens_q=starts_q,
            cu_seqlens_k=starts_k,
            max_seqlen_k=longest,
            **options,
        )
        count = -(-(len(k) if longest is None else longest) // 4096)
        columns = len(q) // geometry.q_block + 2 * len(case.lengths)
        assert words.shape == (case.heads, columns, count)
        unused = torch.ones(columns, dtype=torch.bool)
        for index, (length_q, length_k) in enumerate(case.lengths):
            queries = slice(starts_q[index], starts_q[index + 1])
            keys = slice(starts_k[index], starts_k[index + 1])
            first = int(starts_q[index]) // geometry.q_block + 2 * index
            blocks = slice(first, first + query_block_count(length_q, length_k, geometry))
            unused[blocks] = False
            found = unpack_blocks(words[:, blocks], 64 * count)
            k_blocks = -(-length_k // 64)
            assert not found[..., k_blocks:].any()
            alone = select_blocks(q[None, queries], k[None, keys], thresholds, **options)
            alone = unpack_blocks(alone[0], k_blocks)
            if target.arch == 0:
                near = reference.select_blocks(
                    q[None, queries], k[None, keys], thresholds, **options
                ).margin[0]
                assert torch.equal(found[..., :k_blocks][near > 1e-3], alone[near > 1e-3])
            else:
                assert torch.equal(found[..., :k_blocks], alone)
        assert not words[:, unused].any()


def test_a_longest_sequence_that_is_none_is_refused():
    case = cases.PACKED[2]
    q, k, _ = case.inputs()
    starts_q, starts_k = case.cu_seqlens()
    packed = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
    thresholds = torch.zeros(case.heads, 1)
    for longest, error, message in (
        (256, ValueError, "max_seqlen_k must be at least the keys of the longest sequence, 257"),
        (0, ValueError, "max_seqlen_k must be at least the keys of the longest sequence, 257"),
        (-1, ValueError, r"max_seqlen_k must be between 0 and 2\*\*63 - 1, got -1"),
        (2**63, ValueError, r"max_seqlen_k must be between 0 and 2\*\*63 - 1, got 92"),
        (2.5, TypeError, "max_seqlen_k must be a whole number or None, got float"),
    ):
        with pytest.raises(error, match=message):
            select_blocks(q, k, thresholds, max_seqlen_k=longest, **packed)
        for selection in ("int8", "auto"):  # on a CPU, "auto" has no use for it
            with pytest.raises(error, match=message):
                block_sparse_attention(
                    q, k, k, thresholds, max_seqlen_k=longest, selection=selection, **packed
                )
    with pytest.raises(
        ValueError, match=r"max_seqlen_k is for packed sequences and block .* got 256"
    ):
        select_blocks(q[None], k[None], thresholds, max_seqlen_k=256)


@pytest.mark.parametrize("precision", ["int8", "exact"])
def test_the_longest_sequence_may_have_no_key(precision):
    q = torch.randn(300, 2, 16)
    none = torch.zeros(2, dtype=torch.int32)
    starts = {"cu_seqlens_q": torch.tensor([0, 300], dtype=torch.int32)}
    how = {"precision": precision, "max_seqlen_k": 0, "causal": False}
    packed = select_blocks(q, q[:0], torch.zeros(2, 1), cu_seqlens_k=none, **starts, **how)
    assert packed.shape == (2, 300 // 128 + 2, 0)
    pages = {"block_table": torch.zeros(1, 0, dtype=torch.int32), "seqused_k": none[:1]}
    paged = select_blocks(q, q[None, :16], torch.zeros(2, 1), **pages, **starts, **how)
    assert paged.shape == packed.shape


# ------------------------------------------------------------------- two steps and the fused kernel


def outputs(q, k, v, thresholds, **options):
    return block_sparse_attention(q, k, v, thresholds, return_lse=True, return_kept=True, **options)


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_exact_selection_and_attention_of_it_are_the_fused_kernel(target, case, rule, geometry):
    dtype = torch.bfloat16 if case.seed % 2 else torch.float16
    for kernel in ("forward", "select_blocks", "attend_blocks"):
        target.require(kernel, dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    voters = cases.voters_of(case, rule, geometry)
    thresholds, clear = cases.separating_thresholds(
        case, q, k, rule=rule, geometry=geometry, voters=voters
    )
    shape = {"causal": case.causal, "scale": case.scale, "geometry": geometry}
    options = {**shape, "rule": rule, "voters": voters}
    fused = outputs(q, k, v, thresholds, **options)
    mask = select_blocks(q, k, thresholds, precision="exact", **options)
    out, lse, kept = attend_blocks(q, k, v, mask, return_lse=True, return_kept=True, **shape)
    if target.arch == 0:
        assert all(torch.equal(a, b) for a, b in zip((out, lse, kept), fused, strict=True))
        return
    assert torch.equal(kept[clear], fused[2][clear])
    rows = by_query(clear, case.seqlen_q, case.seqlen_k, geometry)
    assert_lse_close(lse.masked_fill(~rows, 0), fused[1].masked_fill(~rows, 0))
    hidden = ~rows.transpose(1, 2)[..., None]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        out.masked_fill(hidden, 0), fused[0].masked_fill(hidden, 0), rtol=2 * eps, atol=4 * eps
    )


@pytest.mark.parametrize("packed", [False, True])
def test_int8_is_attention_of_what_is_selected_bit_for_bit(target, dtype, rule, geometry, packed):
    case = cases.Case("steps", "", seqlen_q=400, seqlen_k=400, heads=4, kv_heads=2)
    for kernel in ("select_blocks", "attend_blocks"):
        target.require(kernel, dtype, case.head_dim)
    q, k, v = case.inputs(dtype, target.device)
    voters = cases.voters_of(case, rule, geometry)
    thresholds = mixed_thresholds(case, q, k, rule=rule, geometry=geometry)
    shape: dict = {"geometry": geometry}
    longest = {}
    if packed:
        q, k, v = q[0], k[0], v[0]
        starts = torch.tensor([0, 150, 400], dtype=torch.int32, device=target.device)
        shape |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
        longest = {"max_seqlen_k": 300}
    options = {**shape, **longest, "rule": rule, "voters": voters}
    mask = select_blocks(q, k, thresholds, **options)
    expected = attend_blocks(q, k, v, mask, return_lse=True, return_kept=True, **shape)
    found = outputs(q, k, v, thresholds, selection="int8", **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(
        block_sparse_attention(q, k, v, thresholds, selection="int8", **options), expected[0]
    )


def test_auto_takes_the_exact_kernel_on_a_cpu_and_where_nothing_is_known(monkeypatch):
    case = cases.Case("auto", "", seqlen_q=300, seqlen_k=300)
    q, k, v = case.inputs()
    thresholds = torch.full((2, 1), 2.0)
    expected = block_sparse_attention(q, k, v, thresholds)
    for expected_skipped in (None, 0.0, 1.0):
        found = block_sparse_attention(
            q, k, v, thresholds, selection="auto", expected_skipped=expected_skipped
        )
        assert torch.equal(found, expected)


class OnGpu:
    """Stands for a tensor of a GPU."""

    is_cuda, dtype, shape = True, torch.bfloat16, (1, 10, 4, 128)

    def get_device(self):
        return 0


def test_auto_takes_two_steps_from_the_crossover_on_where_there_are_kernels(monkeypatch):
    head_dims: tuple[int, ...] = (64, 128)
    monkeypatch.setattr(_auto, "_head_dims_with_both_steps", lambda *_: head_dims)
    monkeypatch.setattr(_auto, "check_tensor", lambda *_: None)
    long, q = _auto.MIN_SEQLEN_K, OnGpu()
    assert set(CROSSOVERS) == set(GEOMETRIES)
    for geometry, voters in itertools.product(GEOMETRIES, VOTERS):
        crossover = CROSSOVERS[geometry][voters]
        for share, seqlen_k, expected in (
            (crossover, long, "int8"),
            (crossover, long - 1, "exact"),
            (crossover - 0.01, long, "exact"),
            (1.0, 2**20, "int8"),
            (None, long, "exact"),
        ):
            options = {"geometry": geometry, "voters": voters, "expected_skipped": share}
            assert resolve_selection("auto", q, seqlen_k, **options) == expected
        for selection in PRECISIONS:
            assert resolve_selection(selection, q, 5, voters=voters) == selection
    on_cpu = torch.zeros(2, 128)
    assert resolve_selection("auto", on_cpu, long, expected_skipped=1.0) == "exact"
    head_dims = (64,)
    assert resolve_selection("auto", q, long, expected_skipped=1.0) == "exact"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"selection": "fp8"}, ValueError, "selection must be one of exact, int8, auto; got 'fp8'"),
        ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
        ({"voters": 3}, ValueError, "voters must be one of 1, 2, 4; got 3"),
        ({"geometry": (32, 64)}, ValueError, "geometry must be one of"),
        ({"voters": 2.0}, ValueError, "voters must be one of 1, 2, 4; got 2.0"),
        ({"expected_skipped": 2}, ValueError, "expected_skipped must be between 0 and 1, got 2"),
        (
            {"selection": "int8", "expected_skipped": 0.5},
            ValueError,
            "expected_skipped is for selection='auto'; got 0.5 with selection='int8'",
        ),
    ],
)
def test_what_cannot_be_resolved_is_refused(changes, error, message):
    arguments = {"selection": "auto", "q": torch.zeros(2, 64), "seqlen_k": 100, **changes}
    with pytest.raises(error, match=message):
        resolve_selection(**arguments)


def test_auto_looks_at_the_length_when_it_is_run():
    case = cases.Case("length", "", seqlen_q=256, seqlen_k=8192, heads=2, kv_heads=1)
    q, k, v = case.inputs()
    thresholds = mixed_thresholds(case, q, k, rule="absolute", geometry=GEOMETRIES[0])
    shape = (True, None, "absolute", 128, 64, 1, True, True)
    starts = (
        torch.tensor([0, 256], dtype=torch.int32),
        torch.tensor([0, 8192], dtype=torch.int32),
    )
    exact, int8, auto = (
        torch.ops.bsfa.forward(q, k, v, thresholds, None, None, *shape, selection)
        for selection in ("exact", "int8", "auto")
    )
    assert all(torch.equal(a, b) for a, b in zip(auto, int8, strict=True))
    assert not torch.equal(exact[2], int8[2])
    shorter = (q, k[:, 1:], v[:, 1:], thresholds, None, None, *shape)
    exact, auto = (torch.ops.bsfa.forward(*shorter, selection) for selection in ("exact", "auto"))
    assert all(torch.equal(a, b) for a, b in zip(auto, exact, strict=True))
    packed = (q[0], k[0], v[0], thresholds, *starts, *shape)
    for longest in (None, 8192):
        found = torch.ops.bsfa.forward(*packed, "auto", longest)
        assert torch.equal(found[2][:, : int8[2].shape[2]], int8[2][0])


BOTH = ("select_blocks", "attend_blocks")


@pytest.mark.parametrize(
    ("names", "capability", "dtype", "arch", "expected"),
    [
        (BOTH, (9, 0), torch.bfloat16, 0, (96, 128)),
        (BOTH, (9, 0), torch.bfloat16, 90, (96, 128)),
        (BOTH, (9, 0), torch.bfloat16, 80, ()),
        (BOTH, (9, 0), torch.float16, 0, ()),
        (BOTH, (8, 0), torch.bfloat16, 0, ()),
        (BOTH[:1], (9, 0), torch.bfloat16, 0, ()),
    ],
)
def test_auto_knows_which_gpus_have_kernels(monkeypatch, names, capability, dtype, arch, expected):
    kernels = tuple(
        Kernel(name, 90, False, "bfloat16", 128, GEOMETRIES, (96, 128)) for name in names
    )
    info = dataclasses.replace(build_info(), kernels=kernels)
    monkeypatch.setattr(_auto, "build_info", lambda: info)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    _auto._find_head_dims.cache_clear()

    def find(q):
        return _auto._head_dims_with_both_steps(q.get_device(), q.dtype, _native.insisted_arch())

    q = torch.zeros(2, dtype=dtype)
    with _native.force_arch(arch):
        assert find(q) == expected
        for dynamic in (False, True):
            torch._dynamo.reset()
            compiled = torch.compile(find, fullgraph=True, dynamic=dynamic, backend="eager")
            assert compiled(q) == expected
    _auto._find_head_dims.cache_clear()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"selection": "fp8"}, ValueError, "selection must be one of exact, int8, auto; got 'fp8'"),
        (
            {"expected_skipped": 0.5},
            ValueError,
            "expected_skipped is for selection='auto'; got 0.5 with selection='exact'",
        ),
        ({"selection": "int8", "expected_skipped": 0.5}, ValueError, "selection='int8'"),
        (
            {"selection": "auto", "expected_skipped": 1.5},
            ValueError,
            "expected_skipped must be between 0 and 1, got 1.5",
        ),
        (
            {"selection": "auto", "expected_skipped": math.nan},
            ValueError,
            "expected_skipped must be between 0 and 1, got nan",
        ),
        (
            {"selection": "auto", "expected_skipped": "0.5"},
            TypeError,
            "expected_skipped must be a number or None, got str",
        ),
        ({"selection": "int8", "max_seqlen_k": 5}, ValueError, "max_seqlen_k is for packed"),
        ({"selection": "int8", "voters": 3}, ValueError, "voters must be one of 1, 2, 4; got 3"),
        ({"selection": "int8", "q": None}, TypeError, "q must be a torch.Tensor, got NoneType"),
    ],
)
def test_what_does_not_go_with_a_selection_is_refused(changes, error, message):
    q, k, v = cases.Case("refused", "", seqlen_q=10, seqlen_k=10).inputs()
    arguments = {"q": q, "k": k, "v": v, "thresholds": torch.zeros(2, 1), **changes}
    with pytest.raises(error, match=message):
        block_sparse_attention(**arguments)


def test_a_longest_sequence_is_refused_where_it_is_not_looked_at():
    case = cases.PACKED[0]
    q, k, v = case.inputs()
    starts_q, starts_k = case.cu_seqlens()
    packed = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "max_seqlen_k": 300}
    thresholds = torch.zeros(case.heads, 1)
    with pytest.raises(
        ValueError,
        match="max_seqlen_k is for selection='int8' and 'auto', or a block table; got 30",
    ):
        block_sparse_attention(q, k, v, thresholds, **packed)
    block_sparse_attention(q, k, v, thresholds, selection="auto", **packed)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"precision": "fp8"}, ValueError, "precision must be one of exact, int8; got 'fp8'"),
        ({"precision": None}, ValueError, "precision must be one of exact, int8; got None"),
        ({"rule": "largest"}, ValueError, "rule must be one of"),
        ({"geometry": (64, 64, 1)}, ValueError, "geometry must be one of"),
        ({"voters": 0}, ValueError, "voters must be one of 1, 2, 4; got 0"),
        ({"scale": -1.0}, ValueError, r"scale must be between 2\*\*-126 and 2\*\*127, got -1.0"),
        ({"thresholds": torch.zeros(3, 1)}, ValueError, "thresholds must have one row list per"),
        ({"thresholds": None}, TypeError, "thresholds must be a torch.Tensor, got NoneType"),
        ({"thresholds": torch.full((2, 1), math.nan)}, ValueError, "thresholds must not be NaN"),
        ({"k": torch.zeros(1, 10, 2, 32)}, ValueError, "q and k must have the same head_dim"),
        (
            {"cu_seqlens_q": torch.zeros(2, dtype=torch.int32)},
            ValueError,
            "cu_seqlens_q must be given together with cu_seqlens_k, or with seqused_k",
        ),
    ],
)
def test_selections_that_break_a_rule_are_refused(changes, error, message):
    q, k, _ = cases.Case("refused", "", seqlen_q=10, seqlen_k=10).inputs()
    arguments = {"q": q, "k": k, "thresholds": torch.zeros(2, 1), **changes}
    with pytest.raises(error, match=message):
        select_blocks(**arguments)


# -------------------------------------------------------------------------------- the GPU's ways


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", cases.RAGGED, ids=str)
def test_all_of_the_mask_is_written_and_nothing_else(target, case, geometry, precision):
    target.require("select_blocks", torch.bfloat16, case.head_dim)
    q, k, _ = case.inputs(torch.bfloat16, target.device)
    thresholds = mixed_thresholds(case, q, k, rule="peak_lse", geometry=geometry)
    options = {
        "causal": case.causal,
        "rule": "peak_lse",
        "geometry": geometry,
        "voters": 2,
        "precision": precision,
    }
    mask = guarded.select_blocks(q, k, thresholds, **options)
    assert torch.equal(mask.view, select_blocks(q, k, thresholds, **options))
    mask.assert_written_exactly("block_mask")


def test_strides_do_not_matter(target, rule):
    case = cases.Case("strided", "", batch=2, seqlen_q=200, seqlen_k=260, heads=4, kv_heads=2)
    target.require("select_blocks", torch.float16, case.head_dim)
    q, k, _ = case.inputs(torch.float16, target.device)
    thresholds = mixed_thresholds(case, q, k, rule=rule, geometry=GEOMETRIES[1])
    options = {"rule": rule, "geometry": GEOMETRIES[1]}
    padded = torch.nn.functional.pad(k, (0, 24), value=math.nan)[..., : case.head_dim]
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = thresholds.repeat_interleave(2, 1)[:, ::2]
    for precision in PRECISIONS:
        expected = select_blocks(q, k, thresholds, precision=precision, **options)
        found = select_blocks(heads_first, padded, wide, precision=precision, **options)
        assert torch.equal(found, expected)


def test_nothing_to_select_gives_an_empty_mask(target, geometry):
    target.require("select_blocks", torch.float16, 64)
    some = torch.zeros((2, 100, 2, 64), dtype=torch.float16, device=target.device)
    none, thresholds = some[:, :0], torch.zeros((2, 1), device=target.device)
    for precision in PRECISIONS:
        options = {"geometry": geometry, "precision": precision}
        q_blocks = query_block_count(100, 0, geometry)
        assert select_blocks(none, some, thresholds, **options).shape == (2, 2, 0, 1)
        assert select_blocks(some, none, thresholds, **options).shape == (2, 2, q_blocks, 0)
        starts = torch.zeros(3, dtype=torch.int32, device=target.device)
        full = torch.tensor([0, 40, 100], dtype=torch.int32, device=target.device)
        for q, k, starts_q, starts_k in (
            (some[0], none[0], full, starts),
            (none[0], some[0], starts, full),
        ):
            found = select_blocks(
                q, k, thresholds, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, **options
            )
            assert found.shape[:2] == (2, len(q) // geometry.q_block + 2 * 2)
            assert not found.any()


@pytest.mark.gpu
def test_nan_thresholds_select_everything_and_make_outputs_nan(arch, geometry):
    case = cases.Case("nan", "", seqlen_q=300, seqlen_k=300, heads=4, kv_heads=2)
    for kernel in ("select_blocks", "attend_blocks"):
        arch.require(kernel, torch.bfloat16, case.head_dim)
    q, k, v = case.inputs(torch.bfloat16, "cuda")
    thresholds = torch.full((4, 1), 1.0, device="cuda")
    thresholds[2] = math.nan
    visible = reference.visible_blocks(300, 300, geometry=geometry).cuda()
    for precision in PRECISIONS:
        found = select(q, k, thresholds, geometry=geometry, precision=precision)
        assert torch.equal(found[0, 2], visible)
    out, lse, _ = outputs(q, k, v, thresholds, geometry=geometry, selection="int8")
    assert out[:, :, 2].isnan().all()
    assert lse[:, 2].isnan().all()
    assert not out[:, :, [0, 1, 3]].isnan().any()
    assert not lse[:, [0, 1, 3]].isnan().any()


@pytest.mark.gpu
def test_auto_gives_on_a_gpu_what_the_faster_way_gives(arch):
    case = cases.Case("auto gpu", "", seqlen_q=300, seqlen_k=8192)
    for kernel in ("forward", "select_blocks", "attend_blocks"):
        arch.require(kernel, torch.bfloat16, case.head_dim)
    q, k, v = case.inputs(torch.bfloat16, "cuda")
    thresholds = torch.full((2, 1), 2.0, device="cuda")
    options = {"rule": "running_max"}
    assert _native.insisted_arch() == arch.arch
    for share, first, selection in ((0.1, 0, "exact"), (0.9, 0, "int8"), (0.9, 1, "exact")):
        call = (q, k[:, first:], v[:, first:], thresholds)
        assert selection == resolve_selection("auto", q, call[1].shape[1], expected_skipped=share)
        expected = outputs(*call, selection=selection, **options)
        found = outputs(*call, selection="auto", expected_skipped=share, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
