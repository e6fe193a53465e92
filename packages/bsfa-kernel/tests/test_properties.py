# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Properties of random calls, on every back end that the machine has.

BSFA_HYPOTHESIS_PROFILE=nightly tries 10,000 calls of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import cases
import guarded
import paging
from bsfa_kernel import (
    GEOMETRIES,
    PRECISIONS,
    RULES,
    VOTERS,
    Geometry,
    attend_blocks,
    block_maxima,
    block_sparse_attention,
    pack_blocks,
    reference,
    select_blocks,
)
from bsfa_kernel.geometry import query_block_count
from compare import (
    assert_close,
    assert_matches,
    assert_same_verdicts,
    budget_of,
    by_query,
    error_budget,
)
from conftest import SM80, SM90, Target, gpu_target

INF = math.inf

# Of all but those that are no numbers, which have tests of their own.
kinds_of_sinks = st.sampled_from([None, "usual", "far", "above all", "none"])

any_target = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Call:
    """A random call."""

    case: cases.Case
    dtype: torch.dtype
    rule: str
    geometry: Geometry
    keep: float
    voters: int

    @property
    def options(self):
        return {**self.options_of_maxima, "voters": self.voters}

    @property
    def options_of_maxima(self):
        return {**self.shape_options, "rule": self.rule}

    @property
    def shape_options(self):
        return {"causal": self.case.causal, "geometry": self.geometry}

    def inputs(self, target: Target):
        return self.case.inputs(self.dtype, target.device)

    def sinks(self, kind: str | None, target: Target):
        """As an argument, or none."""
        return cases.sinks_of(kind, self.case.heads, target.device)

    def thresholds(self, target: Target, q, k, sinks=None):
        """Separating ones, with some infinite: thresholds and where the verdicts are clear."""
        thresholds, clear = cases.separating_thresholds(
            self.case,
            q,
            k,
            rule=self.rule,
            geometry=self.geometry,
            keep=self.keep,
            tries=3,
            voters=self.voters,
            sinks=sinks,
        )
        if self.case.seed % 3 == 0:
            thresholds[0, 0] = -INF if self.case.seed % 2 else INF
            expected = reference.attention(
                q, k, k, thresholds, compute_dtype=torch.float64, sinks=sinks, **self.options
            )
            clear = expected.margin > cases.VERDICT_MARGIN
        return thresholds, clear

    def rough_thresholds(self, target: Target, q, k):
        """Some that serve to compare a kernel with itself, with some infinite."""
        thresholds = cases.rough_thresholds(
            self.case, q, k, rule=self.rule, geometry=self.geometry, keep=self.keep
        )
        if self.case.seed % 3 == 0:
            thresholds[0, 0] = -INF if self.case.seed % 2 else INF
        return thresholds


@st.composite
def calls(draw, *, voters=VOTERS, **fixed):
    """Random calls; lengths near multiples of a block are the likeliest."""
    lengths = st.one_of(
        st.integers(1, 400),
        st.builds(
            lambda blocks, by: max(64 * blocks + by, 1), st.integers(0, 8), st.integers(-1, 1)
        ),
    )
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    seqlen_q = draw(lengths)
    shape = {
        "batch": draw(st.integers(1, 3)),
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_q if draw(st.booleans()) else draw(lengths),
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "head_dim": draw(
            st.one_of(st.sampled_from(cases.KERNEL_HEAD_DIMS), st.sampled_from(cases.HEAD_DIMS))
        ),
        "causal": draw(st.booleans()),
    }
    shape.update(fixed)
    name = f"random {draw(st.integers(0, 2**32 - 1))}"
    return Call(
        cases.Case(name, "", **shape),
        draw(st.sampled_from([torch.float16, torch.bfloat16])),
        draw(st.sampled_from(RULES)),
        draw(st.sampled_from(GEOMETRIES)),
        draw(st.sampled_from([0.1, 0.5, 0.9])),
        draw(st.sampled_from(voters)),
    )


def attend(q, k, v, thresholds, **options):
    return block_sparse_attention(q, k, v, thresholds, return_lse=True, return_kept=True, **options)


def expanded(x, over):
    """A view of x with strides of 0 over the batch (0), the sequence (1) or the heads (2)."""
    one = tuple(slice(0, 1) if axis in over else slice(None) for axis in range(3))
    return x[one].expand(x.shape)


def assert_same(found, expected, target):
    """Kernels give the same bits; the reference, by matrix products of other shapes, nearly."""
    for actual, wanted in zip(found, expected, strict=True):
        if target.arch or not wanted.is_floating_point():
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
        else:
            torch.testing.assert_close(actual, wanted)


@any_target
@given(call=calls(), kind=kinds_of_sinks)
def test_a_call_matches_the_reference(target, call, kind):
    target.require("forward", call.dtype, call.case.head_dim)
    q, k, v = call.inputs(target)
    sinks = call.sinks(kind, target)
    thresholds, clear = call.thresholds(target, q, k, **sinks)
    options = {**call.options, **sinks}
    expected = reference.attention(q, k, v, thresholds, compute_dtype=torch.float64, **options)
    found = attend(q, k, v, thresholds, **options)
    budget = error_budget(q, k, v, expected, scale=None, **call.shape_options, **sinks)
    if clear.float().mean() >= 0.9:
        assert_matches(found, expected, clear, budget, call.geometry, k.shape[1])


@any_target
@given(call=calls(), kind=kinds_of_sinks)
def test_exact_selection_and_attention_of_it_are_the_fused_kernel(target, call, kind):
    for kernel in ("forward", "select_blocks", "attend_blocks"):
        target.require(kernel, call.dtype, call.case.head_dim)
    q, k, v = call.inputs(target)
    sinks = call.sinks(kind, target)
    options, shape = {**call.options, **sinks}, {**call.shape_options, **sinks}
    thresholds, clear = call.thresholds(target, q, k, **sinks)
    mask = select_blocks(q, k, thresholds, precision="exact", **options)
    found = attend_blocks(q, k, v, mask, return_lse=True, return_kept=True, **shape)
    if not target.arch:
        assert_same(found, attend(q, k, v, thresholds, **options), target)
    elif clear.float().mean() >= 0.9:
        expected = reference.attention(q, k, v, thresholds, compute_dtype=torch.float64, **options)
        budget = error_budget(q, k, v, expected, scale=None, **shape)
        assert_matches(found, expected, clear, budget, call.geometry, k.shape[1])


@any_target
@given(call=calls(), kind=kinds_of_sinks)
def test_int8_is_attention_of_what_is_selected(target, call, kind):
    for kernel in ("select_blocks", "attend_blocks"):
        target.require(kernel, call.dtype, call.case.head_dim)
    q, k, v = call.inputs(target)
    sinks = call.sinks(kind, target)
    options, shape = {**call.options, **sinks}, {**call.shape_options, **sinks}
    thresholds = call.rough_thresholds(target, q, k)
    mask = select_blocks(q, k, thresholds, precision="int8", **options)
    expected = attend_blocks(q, k, v, mask, return_lse=True, return_kept=True, **shape)
    found = attend(q, k, v, thresholds, selection="int8", **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@any_target
@given(call=calls(batch=2), precision=st.sampled_from(PRECISIONS))
def test_each_sequence_of_a_batch_is_selected_alone(target, call, precision):
    target.require("select_blocks", call.dtype, call.case.head_dim)
    q, k, _ = call.inputs(target)
    options = {"precision": precision, **call.options}
    thresholds, _ = call.thresholds(target, q, k)
    mask = select_blocks(q, k, thresholds, **options)
    for index in range(2):
        one = slice(index, index + 1)
        alone = select_blocks(q[one], k[one], thresholds, **options)
        if target.arch:
            assert torch.equal(alone, mask[one])
        else:
            near = reference.select_blocks(q[one], k[one], thresholds, **options).margin < 1e-3
            assert torch.equal(alone[~near], mask[one][~near])


@any_target
@given(call=calls(), kind=kinds_of_sinks, seed=st.integers(0, 2**32 - 1))
def test_attention_of_any_mask_matches_the_reference(target, call, kind, seed):
    target.require("attend_blocks", call.dtype, call.case.head_dim)
    q, k, v = call.inputs(target)
    blocks = (
        call.case.batch,
        call.case.heads,
        query_block_count(q.shape[1], k.shape[1], call.geometry),
        -(-k.shape[1] // call.geometry.k_block),
    )
    generator = torch.Generator().manual_seed(seed)
    mask = pack_blocks(torch.rand(blocks, generator=generator) < call.keep).to(q.device)
    options = {**call.shape_options, **call.sinks(kind, target)}
    expected = reference.attend_blocks(q, k, v, mask, compute_dtype=torch.float64, **options)
    outputs = guarded.attend_blocks(q, k, v, mask, **options)
    budget = error_budget(q, k, v, expected, scale=None, **options)
    found = tuple(output.view.clone() for output in outputs)
    all_clear = torch.ones_like(expected.kept, dtype=torch.bool)
    assert_matches(found, expected, all_clear, budget, call.geometry, k.shape[1])
    for name, output in zip(("out", "lse", "kept"), outputs, strict=True):
        output.assert_written_exactly(name)


@any_target
@given(call=calls(), kind=kinds_of_sinks)
def test_block_maxima_match_the_reference(target, call, kind):
    target.require("block_maxima", call.dtype, call.case.head_dim)
    q, k, _ = call.inputs(target)
    options = {**call.options_of_maxima, **call.sinks(kind, target)}
    expected = reference.block_maxima(q, k, compute_dtype=torch.float64, **options)
    found = block_maxima(q, k, **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@any_target
@given(call=calls())
def test_nothing_is_written_outside_the_outputs_and_all_inside(target, call):
    target.require("forward", call.dtype, call.case.head_dim)
    q, k, v = call.inputs(target)
    thresholds = call.rough_thresholds(target, q, k)
    expected = attend(q, k, v, thresholds, **call.options)
    outputs = guarded.forward(q, k, v, thresholds, **call.options)
    for name, output, wanted in zip(("out", "lse", "kept"), outputs, expected, strict=True):
        assert torch.equal(output.view, wanted), name
        output.assert_written_exactly(name)


@any_target
@given(call=calls())
def test_block_maxima_write_nothing_outside_and_all_inside(target, call):
    target.require("block_maxima", call.dtype, call.case.head_dim)
    q, k, _ = call.inputs(target)
    maxima = guarded.block_maxima(q, k, **call.options_of_maxima)
    assert torch.equal(maxima.view, block_maxima(q, k, **call.options_of_maxima))
    maxima.assert_written_exactly("maxima")


@any_target
@given(call=calls(batch=3), kind=kinds_of_sinks)
def test_order_of_batch_and_heads_does_not_matter(target, call, kind):
    target.require("forward", call.dtype, call.case.head_dim)
    q, k, v = call.inputs(target)
    thresholds = call.rough_thresholds(target, q, k)
    sinks = call.sinks(kind, target)
    out, lse, kept = attend(q, k, v, thresholds, **call.options, **sinks)
    turned = attend(
        *(x.flip(0).flip(2).contiguous() for x in (q, k, v)),
        thresholds.flip(0),
        **call.options,
        **{name: x.flip(0) for name, x in sinks.items()},
    )
    expected = out.flip(0).flip(2), lse.flip(0).flip(1), kept.flip(0).flip(1)
    assert_same(turned, expected, target)


@any_target
@given(call=calls())
def test_each_sequence_of_a_batch_is_computed_alone(target, call):
    target.require("forward", call.dtype, call.case.head_dim)
    q, k, v = call.inputs(target)
    thresholds = call.rough_thresholds(target, q, k)
    out, lse, kept = attend(q, k, v, thresholds, **call.options)
    for index in range(call.case.batch):
        one = slice(index, index + 1)
        alone = attend(q[one], k[one], v[one], thresholds, **call.options)
        assert_same(alone, (out[one], lse[one], kept[one]), target)


@any_target
@given(call=calls())
def test_grouped_heads_give_what_repeated_keys_give(target, call):
    target.require("forward", call.dtype, call.case.head_dim)
    q, k, v = call.inputs(target)
    thresholds = call.rough_thresholds(target, q, k)
    group = call.case.heads // call.case.kv_heads
    repeated = (x.repeat_interleave(group, 2) for x in (k, v))
    assert_same(
        attend(q, *repeated, thresholds, **call.options),
        attend(q, k, v, thresholds, **call.options),
        target,
    )


@any_target
@given(call=calls())
def test_strided_inputs_give_what_contiguous_ones_give(target, call):
    target.require("forward", call.dtype, call.case.head_dim)
    q, k, v = call.inputs(target)
    thresholds = call.rough_thresholds(target, q, k)
    expected = attend(q, k, v, thresholds, **call.options)
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    padded = torch.nn.functional.pad(k, (0, 24), value=math.nan)[..., : call.case.head_dim]
    sparse = torch.full_like(v, math.nan).repeat_interleave(2, 1)
    sparse[:, ::2] = v
    found = attend(heads_first, padded, sparse[:, ::2], thresholds, **call.options)
    assert_same(found, expected, target)


@any_target
@given(call=calls(), over=st.sets(st.sampled_from([0, 1, 2]), min_size=1))
def test_expanded_tensors_give_what_their_copies_give(target, call, over):
    target.require("forward", call.dtype, call.case.head_dim)
    q, k, v = call.inputs(target)
    thresholds = call.rough_thresholds(target, q, k)
    same_q, same_k, same_v = (expanded(x, over) for x in (q, k, v))
    for views in ((same_q, k, v), (q, same_k, v), (q, k, same_v), (same_q, same_k, same_v)):
        copies = [view.contiguous() for view in views]
        found = attend(*views, thresholds, **call.options)
        assert_same(found, attend(*copies, thresholds, **call.options), target)


@any_target
@given(call=calls(), over=st.sets(st.sampled_from([0, 1, 2]), min_size=1))
def test_block_maxima_of_expanded_tensors_are_those_of_their_copies(target, call, over):
    target.require("block_maxima", call.dtype, call.case.head_dim)
    q, k, _ = (expanded(x, over) for x in call.inputs(target))
    found = block_maxima(q, k, **call.options_of_maxima)
    assert torch.equal(
        found, block_maxima(q.contiguous(), k.contiguous(), **call.options_of_maxima)
    )


@any_target
@given(call=calls(), kind=kinds_of_sinks, data=st.data())
def test_packed_sequences_give_what_each_gives_alone(target, call, kind, data):
    target.require("forward", call.dtype, call.case.head_dim)
    q, k, v = (x[0] for x in call.inputs(target))
    thresholds = torch.linspace(-3, 3, 2 * call.case.heads, device=target.device).view(-1, 2)
    thresholds += {"absolute": 2.0, "running_max": 0.0, "peak_lse": -1.5}[call.rule]
    options = {**call.options, **call.sinks(kind, target)}
    count = data.draw(st.integers(1, 4))

    def split(total):
        inner = [data.draw(st.integers(0, total)) for _ in range(count - 1)]
        return [0, *sorted(inner), total]

    starts_q, starts_k = split(call.case.seqlen_q), split(call.case.seqlen_k)
    out, lse, kept = attend(
        q,
        k,
        v,
        thresholds,
        cu_seqlens_q=torch.tensor(starts_q, dtype=torch.int32, device=target.device),
        cu_seqlens_k=torch.tensor(starts_k, dtype=torch.int32, device=target.device),
        **options,
    )
    unused = torch.ones_like(kept, dtype=torch.bool)
    for index in range(count):
        queries = slice(starts_q[index], starts_q[index + 1])
        keys = slice(starts_k[index], starts_k[index + 1])
        alone = attend(q[None, queries], k[None, keys], v[None, keys], thresholds, **options)
        first = starts_q[index] // call.geometry.q_block + 2 * index
        columns = slice(first, first + alone[2].shape[2])
        unused[:, columns] = False
        found = out[None, queries], lse[None, :, queries], kept[None, :, columns]
        assert_same(found, alone, target)
    assert (kept[unused] == 0).all()


@any_target
@given(call=calls(), threshold=st.sampled_from([-INF, -1e4, 1e-6]))
def test_a_query_has_the_same_result_whatever_the_queries_beside_it(target, call, threshold):
    # Louder queries change no verdict: all is kept, or what has a positive score.
    assume(threshold < 0 or call.rule == "absolute")
    target.require("forward", call.dtype, call.case.head_dim)
    q, k, v = call.inputs(target)
    thresholds = torch.full((call.case.heads, 1), threshold, device=target.device)
    generator = torch.Generator().manual_seed(call.case.seed)
    loud = torch.rand(call.case.seqlen_q, generator=generator) < 0.5
    loud[::64] = False
    loud = loud.to(target.device)
    louder = torch.where(loud[:, None, None], 64 * q, q)
    found, expected = (attend(x, k, v, thresholds, **call.options) for x in (louder, q))
    assert_same(
        (found[0][:, ~loud], found[1][:, :, ~loud], found[2]),
        (expected[0][:, ~loud], expected[1][:, :, ~loud], expected[2]),
        target,
    )


def sequences_of(data, call, target, *, packed):
    """Queries, and keys and values of each sequence; where the packed ones' queries begin."""
    q, k, v = call.inputs(target)
    lengths_k = [data.draw(st.integers(0, k.shape[1])) for _ in range(len(k))]
    keys = [x[:length] for x, length in zip(k, lengths_k, strict=True)]
    values = [x[:length] for x, length in zip(v, lengths_k, strict=True)]
    if not packed:
        return list(q), keys, values
    lengths_q = [data.draw(st.integers(0, q.shape[1])) for _ in range(len(q))]
    return [x[:length] for x, length in zip(q, lengths_q, strict=True)], keys, values


def of_sequence(found, index, starts, columns, geometry, *, packed):
    """out, lse and kept of one sequence, as a batch of one, and where its columns are."""
    out, lse, kept = found
    if not packed:
        one = slice(index, index + 1)
        return (out[one], lse[one], kept[one, :, :columns]), (one, slice(0, columns))
    queries = slice(starts[index], starts[index + 1])
    first = starts[index] // geometry.q_block + 2 * index
    own = slice(first, first + columns)
    return (out[None, queries], lse[None, :, queries], kept[None, :, own]), (own,)


@any_target
@given(
    call=calls(),
    data=st.data(),
    page_size=st.sampled_from([16, 32, 48, 64, 256, None]),
    layout=st.sampled_from(paging.LAYOUTS),
    packed=st.booleans(),
    selection=st.sampled_from(["exact", "int8"]),
    kind=kinds_of_sinks,
)
def test_pages_and_unused_keys_give_what_each_sequence_gives_alone(
    target, call, data, page_size, layout, packed, selection, kind
):
    """Without a page size the keys are padded. NaN is wherever nothing may be read."""
    for kernel in ("forward", "select_blocks", "attend_blocks"):
        target.require(kernel, call.dtype, call.case.head_dim)
    thresholds = call.rough_thresholds(target, *call.inputs(target)[:2])
    queries, keys, values = sequences_of(data, call, target, packed=packed)
    sinks = call.sinks(kind, target)
    options = {**call.options, **sinks, "selection": selection}
    if page_size is None:
        lengths = torch.tensor([len(x) for x in keys], dtype=torch.int32, device=target.device)
        room = max(map(len, keys)) + data.draw(st.integers(0, 70))
        shape = (len(keys), room, *keys[0].shape[1:])
        k, v = (torch.full(shape, math.nan, dtype=call.dtype) for _ in range(2))
        k, v = k.to(target.device), v.to(target.device)
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
            k[index, : len(key)], v[index, : len(key)] = key, value
        given_keys = {"seqused_k": lengths}
    else:
        seed = data.draw(st.integers(0, 2**32 - 1))
        cache = paging.paged(keys, values, page_size, layout=layout, seed=seed)
        k, v, given_keys = cache.k, cache.v, cache.options
        if data.draw(st.booleans()):
            longest = max(map(len, keys))
            given_keys["max_seqlen_k"] = data.draw(
                st.integers(max(longest, 1), cache.block_table.shape[1] * page_size)
            )
    starts = [0]
    for query in queries:
        starts.append(starts[-1] + len(query))
    if packed:
        q = torch.cat(queries)
        given_keys["cu_seqlens_q"] = torch.tensor(starts, dtype=torch.int32, device=target.device)
    else:
        q = torch.stack(queries)
    found = attend(q, k, v, thresholds, **given_keys, **options)
    unused = torch.ones_like(found[2], dtype=torch.bool)
    if packed:
        assert unused.shape[1] == len(q) // call.geometry.q_block + 2 * len(queries)
    for index, tensors in enumerate(zip(queries, keys, values, strict=True)):
        alone = attend(*(x[None] for x in tensors), thresholds, **options)
        its_own, where = of_sequence(
            found, index, starts, alone[2].shape[2], call.geometry, packed=packed
        )
        if packed:
            unused[:, where[0]] = False
        else:
            unused[where[0], :, where[1]] = False
        assert_same(its_own, alone, target)
    assert (found[2][unused] == 0).all()
    mask = select_blocks(
        q, k, thresholds, precision=selection, **given_keys, **call.options, **sinks
    )
    assert mask.shape[:-1] == unused.shape
    assert (mask[unused] == 0).all()
    attended = attend_blocks(
        *(q, k, v, mask),
        **{name: x for name, x in given_keys.items() if name != "max_seqlen_k"},
        **call.shape_options,
        **sinks,
        return_lse=True,
        return_kept=True,
    )
    if selection == "int8" or not target.arch:
        assert_same(attended, found, target)


@any_target
@given(call=calls(), data=st.data(), page_size=st.sampled_from([16, 64, None]))
def test_block_maxima_of_pages_and_unused_keys_are_those_of_each_sequence(
    target, call, data, page_size
):
    target.require("block_maxima", call.dtype, call.case.head_dim)
    queries, keys, values = sequences_of(data, call, target, packed=False)
    if page_size is None:
        lengths = torch.tensor([len(x) for x in keys], dtype=torch.int32, device=target.device)
        k = torch.nn.utils.rnn.pad_sequence(keys, batch_first=True, padding_value=math.nan)
        given_keys = {"seqused_k": lengths}
    else:
        cache = paging.paged(keys, values, page_size, seed=call.case.seed)
        k, given_keys = cache.k, cache.options
    found = block_maxima(torch.stack(queries), k, **given_keys, **call.options_of_maxima)
    nothing = torch.ones_like(found, dtype=torch.bool)
    for index, (query, key) in enumerate(zip(queries, keys, strict=True)):
        alone = block_maxima(query[None], key[None], **call.options_of_maxima)
        own = (slice(index, index + 1), slice(None), *map(slice, alone.shape[2:]))
        assert_same((found[own],), (alone,), target)
        nothing[own] = False
    assert (found[nothing] == -INF).all()


@any_target
@given(call=calls(causal=True, voters=[1]), kind=kinds_of_sinks, data=st.data())
def test_a_cut_anywhere_changes_only_the_query_blocks_that_it_goes_through(
    target, call, kind, data
):
    # All rows vote, as they do in a chunk's last block.
    target.require("forward", call.dtype, call.case.head_dim)
    q, k, v = call.inputs(target)
    length = min(call.case.seqlen_q, call.case.seqlen_k)
    q, k, v = q[:, :length], k[:, :length], v[:, :length]
    options = {**call.options, **call.sinks(kind, target)}
    thresholds = call.rough_thresholds(target, q, k)
    dense = torch.full_like(thresholds, -INF)
    whole, whole_dense = (attend(q, k, v, x, **options) for x in (thresholds, dense))
    cuts = data.draw(st.lists(st.integers(1, length), max_size=4, unique=True).map(sorted))
    eps = torch.finfo(call.dtype).eps
    for start, stop in pairwise(sorted({0, *cuts, length})):
        tensors = q[:, start:stop], k[:, :stop], v[:, :stop]
        part = attend(*tensors, dense, **options)
        torch.testing.assert_close(
            part[0], whole_dense[0][:, start:stop], rtol=2 * eps, atol=2 * eps
        )
        part = attend(*tensors, thresholds, **options)
        blocks = torch.arange(start, stop, device=q.device) // call.geometry.q_block
        uncut = torch.ones_like(blocks, dtype=torch.bool)
        if start % call.geometry.q_block:
            uncut &= blocks != blocks[0]
        if stop % call.geometry.q_block and stop < length:
            uncut &= blocks != blocks[-1]
        columns = blocks[uncut].unique()
        found = part[0][:, uncut], part[1][:, :, uncut], part[2][:, :, columns - blocks[0]]
        expected = (
            whole[0][:, start:stop][:, uncut],
            whole[1][:, :, start:stop][:, :, uncut],
            whole[2][:, :, columns],
        )
        assert torch.equal(found[2], expected[2])
        torch.testing.assert_close(found[0], expected[0], rtol=2 * eps, atol=2 * eps)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


@any_target
@given(call=calls(causal=True, voters=[1]), blocks=st.integers(1, 3))
def test_chunks_of_whole_query_blocks_give_what_the_whole_gives(target, call, blocks):
    # All rows vote, as they do in a chunk's last block.
    target.require("forward", call.dtype, call.case.head_dim)
    q, k, v = call.inputs(target)
    length = min(call.case.seqlen_q, call.case.seqlen_k)
    q, k, v = q[:, :length], k[:, :length], v[:, :length]
    thresholds = call.rough_thresholds(target, q, k)
    out, lse, kept = attend(q, k, v, thresholds, **call.options)
    step = blocks * call.geometry.q_block
    for start in range(0, length, step):
        stop = min(start + step, length)
        part = attend(q[:, start:stop], k[:, :stop], v[:, :stop], thresholds, **call.options)
        first = start // call.geometry.q_block
        expected = (
            out[:, start:stop],
            lse[:, :, start:stop],
            kept[:, :, first : first + part[2].shape[2]],
        )
        assert torch.equal(part[2], expected[2])
        # A chunk may be computed by other tiles than the whole.
        eps = torch.finfo(call.dtype).eps
        torch.testing.assert_close(part[0], expected[0], rtol=2 * eps, atol=2 * eps)
        torch.testing.assert_close(part[1], expected[1], rtol=1e-5, atol=1e-5)


@any_target
@given(call=calls())
def test_a_higher_absolute_threshold_keeps_no_more(target, call):
    target.require("forward", call.dtype, call.case.head_dim)
    q, k, v = call.inputs(target)
    options = {"causal": call.case.causal, "geometry": call.geometry, "rule": "absolute"}
    previous = None
    for threshold in (-INF, -1.0, 0.0, 1.0, 2.0, 3.0, INF):
        thresholds = torch.full((call.case.heads, 1), threshold, device=target.device)
        kept = attend(q, k, v, thresholds, **options)[2]
        assert previous is None or (kept <= previous).all()
        previous = kept


@pytest.mark.gpu
@pytest.mark.sm80
@pytest.mark.sm90
@given(call=calls(), kind=kinds_of_sinks)
def test_the_kernels_of_both_architectures_agree(call, kind):
    results = []
    for target in (SM80, SM90):
        gpu_target(target)
        target.require("forward", call.dtype, call.case.head_dim)
        q, k, v = call.inputs(target)
        sinks = call.sinks(kind, target)
        thresholds, clear = call.thresholds(target, q, k, **sinks)
        with target.insist():
            results.append(attend(q, k, v, thresholds, **call.options, **sinks))
    (out80, lse80, kept80), (out90, lse90, kept90) = results
    if clear.float().mean() < 0.9:
        return
    assert_same_verdicts(kept90, kept80, clear)
    rows = by_query(clear, q.shape[1], k.shape[1], call.geometry)
    hidden = ~rows.transpose(1, 2)[..., None]
    rounding = 2 * torch.finfo(call.dtype).eps
    out80, out90 = out80.masked_fill(hidden, 0), out90.masked_fill(hidden, 0)
    assert_close(out90, out80, budget_of(torch.zeros_like(out80), out80, rounding))
    torch.testing.assert_close(
        lse90.masked_fill(~rows, 0), lse80.masked_fill(~rows, 0), rtol=2e-5, atol=2e-5
    )
