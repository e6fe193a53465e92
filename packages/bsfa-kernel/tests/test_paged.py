# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Keys in pages, used keys and query blocks at absolute positions, on every back end.

Each sequence must give what its keys give side by side. Wherever nothing may be read there is NaN,
or infinities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import cases
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
    unpack_blocks,
)
from bsfa_kernel.geometry import query_block_count
from compare import assert_close, assert_lse_close, by_query, error_budget

INF = math.inf

# gcd(page_size, 64), the rows that are loaded at once: 16, 16, 64, 32, 64.
PAGE_SIZES = (16, 48, 64, 96, 256)

# Queries and keys: no keys, one key, ends inside a page and at its end, cut query blocks.
LENGTHS = (
    (130, 333),
    (5, 0),
    (1, 1),
    (200, 1),
    (0, 300),
    (64, 256),
    (77, 461),
    (300, 300),
)
PADDED_QUERIES = 150
PADDED_ROOM = 500  # for keys
HEADS, KV_HEADS = 4, 2


@dataclass(frozen=True)
class Batch:
    """Sequences, and the one call that is on all of them."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    k: Tensor
    v: Tensor
    where: dict[str, Tensor]  # seqused_k and, if they are in pages, block_table
    packed: bool

    @property
    def q(self) -> Tensor:
        return torch.cat(self.queries) if self.packed else torch.stack(self.queries)

    @property
    def options(self) -> dict[str, Tensor]:
        """What says where the keys and, if they are packed, the queries are."""
        if not self.packed:
            return self.where
        starts = torch.tensor([0, *map(len, self.queries)]).cumsum(0)
        return {**self.where, "cu_seqlens_q": starts.to(self.q.device, torch.int32)}

    def alone(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a sequence as a batch of one."""
        return self.queries[index][None], self.keys[index][None], self.values[index][None]

    def columns(self, index: int, geometry: Geometry) -> slice:
        """Where the query blocks of a sequence are."""
        first = 0
        if self.packed:
            start = sum(map(len, self.queries[:index]))
            first = start // geometry.q_block + 2 * index
        lengths = len(self.queries[index]), len(self.keys[index])
        return slice(first, first + query_block_count(*lengths, geometry))

    def columns_shape(self, geometry: Geometry) -> tuple[int, ...]:
        """Of what has a column for each query block."""
        if self.packed:
            return HEADS, len(self.q) // geometry.q_block + 2 * len(self.queries)
        columns = -(-(PADDED_QUERIES + geometry.q_block - 1) // geometry.q_block)
        return len(self.queries), HEADS, columns

    def of(self, x: Tensor, index: int, dim: int, where: slice) -> Tensor:
        """The part of a sequence, with a batch dimension; ``dim`` counts without one."""
        x = x[None] if self.packed else x[index : index + 1]
        return x.narrow(dim + 1, where.start, where.stop - where.start)

    def results_of(self, found, index: int, geometry: Geometry):
        """out, lse and kept of a sequence, with a batch dimension."""
        start = sum(map(len, self.queries[:index])) if self.packed else 0
        rows = slice(start, start + len(self.queries[index]))
        columns = self.columns(index, geometry)
        out, lse, kept = found
        return (
            self.of(out, index, 0, rows),
            self.of(lse, index, 1, rows),
            self.of(kept, index, 1, columns),
        )

    def assert_nothing_else(self, x: Tensor, geometry: Geometry) -> None:
        """Fail unless columns that belong to no query block hold 0."""
        rest = x.clone()
        for index in range(len(self.queries)):
            self.of(rest, index, 1, self.columns(index, geometry)).zero_()
        assert not rest.any()


def make_batch(
    target, dtype, head_dim, page_size, *, packed, layout="packed", garbage=math.nan
) -> Batch:
    """A batch of LENGTHS, in pages or (page_size None) padded; padded queries are of one length."""
    lengths = LENGTHS if packed else tuple((PADDED_QUERIES, keys) for _, keys in LENGTHS)
    generator = torch.Generator().manual_seed(page_size or 1)

    def draw(length, heads):
        x = torch.randn((length, heads, head_dim), generator=generator)
        return x.to(target.device, dtype)

    queries = [draw(length, HEADS) for length, _ in lengths]
    keys, values = ([draw(length, KV_HEADS) for _, length in lengths] for _ in range(2))
    if page_size is None:
        shape = (len(lengths), PADDED_ROOM, KV_HEADS, head_dim)
        k, v = (torch.full(shape, garbage, dtype=dtype, device=target.device) for _ in range(2))
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
            k[index, : len(key)], v[index, : len(key)] = key, value
        used = torch.tensor([len(x) for x in keys], dtype=torch.int32, device=target.device)
        return Batch(queries, keys, values, k, v, {"seqused_k": used}, packed)
    cache = paging.paged(keys, values, page_size, layout=layout, seed=page_size)
    for x in (cache.k, cache.v):
        x.copy_(x.masked_fill(x.isnan(), garbage))
    return Batch(queries, keys, values, cache.k, cache.v, cache.options, packed)


def mixed_thresholds(batch: Batch, rule: str, *, rows: int = 5) -> Tensor:
    """Thresholds that about half of the blocks pass."""
    generator = torch.Generator().manual_seed(rows)
    values = cases.MIXED_LEVELS[rule] + 0.3 * torch.randn((HEADS, rows), generator=generator)
    return values.to(batch.k.device)


def call(function, batch: Batch, *arguments, **options):
    return function(batch.q, batch.k, *arguments, **batch.options, **options)


def attend(batch: Batch, thresholds: Tensor, **options):
    return call(
        block_sparse_attention,
        batch,
        batch.v,
        thresholds,
        return_lse=True,
        return_kept=True,
        **options,
    )


# ------------------------------------------------------------------------------- against float64


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("page_size", [*PAGE_SIZES, None])
@pytest.mark.parametrize("head_dim", cases.KERNEL_HEAD_DIMS)
def test_attention_is_that_of_each_sequence(target, dtype, geometry, head_dim, page_size, packed):
    target.require("forward", dtype, head_dim)
    layout = paging.LAYOUTS[(page_size or 0) // 16 % 3]
    garbage = math.nan if packed else INF
    batch = make_batch(
        target, dtype, head_dim, page_size, packed=packed, layout=layout, garbage=garbage
    )
    certain = []
    for rule in RULES:
        voters = VOTERS[(RULES.index(rule) + head_dim // 64) % 3]
        for causal in (True, False):
            thresholds = mixed_thresholds(batch, rule)
            options = {"causal": causal, "rule": rule, "geometry": geometry, "voters": voters}
            found = attend(batch, thresholds, **options)
            batch.assert_nothing_else(found[2], geometry)
            for index, (_, key) in enumerate(zip(batch.queries, batch.keys, strict=True)):
                tensors = batch.alone(index)
                expected = reference.attention(
                    *tensors, thresholds, compute_dtype=torch.float64, **options
                )
                budget = error_budget(
                    *tensors, expected, causal=causal, scale=None, geometry=geometry
                )
                clear = expected.margin > cases.VERDICT_MARGIN
                certain.append(clear.flatten())
                out, lse, kept = batch.results_of(found, index, geometry)
                assert torch.equal(kept[clear], expected.kept[clear])
                rows = by_query(clear, lse.shape[2], len(key), geometry)
                hidden = ~rows.transpose(1, 2)[..., None]
                assert_close(
                    out.masked_fill(hidden, 0), expected.out.masked_fill(hidden, 0), budget
                )
                assert_lse_close(lse.masked_fill(~rows, 0), expected.lse.masked_fill(~rows, 0))
    assert torch.cat(certain).float().mean() > 0.9


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("page_size", [*PAGE_SIZES, None])
@pytest.mark.parametrize("head_dim", cases.KERNEL_HEAD_DIMS)
def test_a_mask_is_attended_in_each_sequence(target, dtype, geometry, head_dim, page_size, packed):
    target.require("attend_blocks", dtype, head_dim)
    batch = make_batch(target, dtype, head_dim, page_size, packed=packed, layout="heads first")
    room = batch.k.shape[1] if page_size is None else 461
    k_blocks = -(-room // 64)
    for density in (0.3, 1.0):
        generator = torch.Generator().manual_seed(int(10 * density))
        shape = (*batch.columns_shape(geometry), k_blocks)
        blocks = torch.rand(shape, generator=generator) < density
        blocks = blocks.to(target.device)
        for causal in (True, False):
            options = {"causal": causal, "geometry": geometry}
            found = call(
                attend_blocks,
                batch,
                batch.v,
                pack_blocks(blocks),
                return_lse=True,
                return_kept=True,
                **options,
            )
            batch.assert_nothing_else(found[2], geometry)
            for index, key in enumerate(batch.keys):
                tensors = batch.alone(index)
                own = batch.of(blocks, index, 1, batch.columns(index, geometry))
                mask = pack_blocks(own[..., : -(-len(key) // 64)])
                expected = reference.attend_blocks(
                    *tensors, mask, compute_dtype=torch.float64, **options
                )
                budget = error_budget(*tensors, expected, scale=None, **options)
                out, lse, kept = batch.results_of(found, index, geometry)
                assert torch.equal(kept, expected.kept)
                assert_close(out, expected.out, budget)
                assert_lse_close(lse, expected.lse)


# ------------------------------------------------------------ against the same keys side by side


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("page_size", [*PAGE_SIZES, None])
@pytest.mark.parametrize("head_dim", cases.KERNEL_HEAD_DIMS)
def test_blocks_are_selected_as_in_each_sequence(
    target, dtype, geometry, head_dim, page_size, precision, packed
):
    target.require("select_blocks", dtype, head_dim)
    layout = paging.LAYOUTS[(page_size or 0) // 16 % 3]
    batch = make_batch(target, dtype, head_dim, page_size, packed=packed, layout=layout)
    for rule in RULES:
        for voters in VOTERS:
            thresholds = mixed_thresholds(batch, rule)
            options = {
                "causal": voters != 2,
                "rule": rule,
                "geometry": geometry,
                "voters": voters,
                "precision": precision,
            }
            longest = {} if page_size is None else {"max_seqlen_k": 461}
            mask = call(select_blocks, batch, thresholds, **options, **longest)
            batch.assert_nothing_else(mask, geometry)
            for index, key in enumerate(batch.keys):
                alone = select_blocks(*batch.alone(index)[:2], thresholds, **options)
                blocks = -(-len(key) // 64)
                own = batch.of(mask, index, 1, batch.columns(index, geometry))
                own = unpack_blocks(own, 64 * own.shape[-1])
                assert torch.equal(own[..., :blocks], unpack_blocks(alone, blocks))
                assert not own[..., blocks:].any()


@pytest.mark.parametrize("page_size", [*PAGE_SIZES, None])
@pytest.mark.parametrize("head_dim", cases.KERNEL_HEAD_DIMS)
def test_block_maxima_are_those_of_each_sequence(
    target, dtype, geometry, rule, head_dim, page_size
):
    target.require("block_maxima", dtype, head_dim)
    batch = make_batch(target, dtype, head_dim, page_size, packed=False, layout="separate")
    for causal in (True, False):
        options = {"causal": causal, "rule": rule, "geometry": geometry}
        found = call(block_maxima, batch, **options)
        for index, key in enumerate(batch.keys):
            q, k, _ = batch.alone(index)
            alone = block_maxima(q, k, **options)
            own = found[index : index + 1]
            blocks = -(-len(key) // 64)
            columns = alone.shape[2]
            torch.testing.assert_close(
                own[:, :, :columns, :blocks], alone, rtol=1e-5, atol=1e-5, equal_nan=True
            )
            assert (own[:, :, columns:] == -INF).all()
            assert (own[..., blocks:] == -INF).all()


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", cases.KERNEL_HEAD_DIMS)
def test_long_sequences_give_what_they_give_side_by_side(
    target, dtype, geometry, head_dim, page_size
):
    """Some tiles a multiprocessor, and some batches of boxes a tile, whole and cut."""
    target.require("forward", dtype, head_dim)
    target.require("attend_blocks", dtype, head_dim)
    generator = torch.Generator().manual_seed(page_size)
    # With one of no key between; 2048 keys are 32 blocks.
    lengths = [(70, 0), (1500, 2240), (1, 3000)]
    heads, kv_heads = 2, 1
    if target.arch:
        lengths += [(400, 4168), (2048, 2048)]
        heads, kv_heads = 16, 4

    def draw(length, heads):
        x = torch.randn((length, heads, head_dim), generator=generator)
        return x.to(target.device, dtype)

    starts = torch.tensor([[0, 0], *lengths]).cumsum(0).to(target.device, torch.int32)
    q = draw(sum(length for length, _ in lengths), heads)
    keys, values = ([draw(length, kv_heads) for _, length in lengths] for _ in range(2))
    cache = paging.paged(keys, values, page_size, seed=page_size)
    in_pages = {**cache.options, "cu_seqlens_q": starts[:, 0].contiguous()}
    side_by_side = {
        "cu_seqlens_q": in_pages["cu_seqlens_q"],
        "cu_seqlens_k": starts[:, 1].contiguous(),
    }
    k, v = torch.cat(keys), torch.cat(values)
    # Dense heads among others: some tiles have nothing to vote on.
    thresholds = cases.MIXED_LEVELS["peak_lse"] + torch.linspace(-1, 1, heads)[:, None]
    thresholds[::3] = -INF
    options = {
        "rule": "peak_lse",
        "geometry": geometry,
        "return_lse": True,
        "return_kept": True,
    }
    thresholds = thresholds.to(target.device)
    expected = block_sparse_attention(q, k, v, thresholds, **side_by_side, **options)
    found = block_sparse_attention(q, cache.k, cache.v, thresholds, **in_pages, **options)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)
    assert not found[0].isnan().any()
    del options["rule"]
    columns = expected[2].shape[1]
    blocks = torch.rand((heads, columns, -(-4168 // 64)), generator=generator) < 0.6
    mask = pack_blocks(blocks.to(target.device))
    expected = attend_blocks(q, k, v, mask, **side_by_side, **options)
    found = attend_blocks(q, cache.k, cache.v, mask, **in_pages, **options)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)
    assert not found[0].isnan().any()


# ---------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_prompts_that_share_pages_read_them_as_their_own(target, dtype, geometry, page_size):
    """The first two pages of both hold what they begin with, as in a cache of prefixes."""
    target.require("forward", dtype, 64)
    generator = torch.Generator().manual_seed(page_size)
    lengths = (2 * page_size + 130, 2 * page_size + 67)
    q = torch.randn((sum(lengths), HEADS, 64), generator=generator).to(target.device, dtype)
    keys, values = (
        [
            torch.randn((length, KV_HEADS, 64), generator=generator).to(target.device, dtype)
            for length in lengths
        ]
        for _ in range(2)
    )
    for each in (keys, values):
        each[1][: 2 * page_size] = each[0][: 2 * page_size]
    cache = paging.paged(keys, values, page_size, seed=page_size)
    starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=target.device)
    thresholds = torch.full((HEADS, 1), cases.MIXED_LEVELS["peak_lse"], device=target.device)

    def found() -> list[Tensor]:
        options = {"cu_seqlens_q": starts, "geometry": geometry, "rule": "peak_lse"}
        options |= cache.options
        out = block_sparse_attention(
            q, cache.k, cache.v, thresholds, return_lse=True, return_kept=True, **options
        )
        masks = [
            select_blocks(q, cache.k, thresholds, precision=precision, **options)
            for precision in PRECISIONS
        ]
        return [*out, *masks]

    apart = found()
    own = cache.block_table[1, :2].long()
    cache.k[own], cache.v[own] = math.nan, math.nan
    cache.block_table[1, :2] = cache.block_table[0, :2]
    for shared, expected in zip(found(), apart, strict=True):
        assert torch.equal(shared, expected)


def random_cuts(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(1, length, (6,), generator=generator).tolist()
    return sorted({0, *cuts, length})


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("head_dim", cases.KERNEL_HEAD_DIMS)
def test_chunks_cut_at_random_give_the_prefill(target, dtype, geometry, head_dim, page_size):
    """Two prompts that grow in one cache, in chunks of any length, against one call on each."""
    target.require("forward", dtype, head_dim)
    generator = torch.Generator().manual_seed(page_size + head_dim)
    lengths = (1000, 611)
    prompts = [
        [
            torch.randn((length, heads, head_dim), generator=generator).to(target.device, dtype)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]
        for length in lengths
    ]
    cache = paging.paged(
        [k for _, k, _ in prompts], [v for *_, v in prompts], page_size, seed=page_size
    )
    eps = torch.finfo(dtype).eps
    for rule in RULES:
        options = {"rule": rule, "geometry": geometry, "return_lse": True, "return_kept": True}
        level = torch.full((HEADS, 1), cases.MIXED_LEVELS[rule], device=target.device)
        level = level + 0.1 * torch.arange(8, device=target.device)
        for thresholds in (level, torch.full_like(level, -INF)):
            is_dense = bool((thresholds == -INF).all())
            whole = [
                block_sparse_attention(*(x[None] for x in prompt), thresholds, **options)
                for prompt in prompts
            ]
            cuts = [random_cuts(length, page_size + i) for i, length in enumerate(lengths)]
            steps = max(map(len, cuts)) - 1
            for step in range(steps):
                # A prompt that is done has no more queries.
                chunks = [
                    (x[step], x[step + 1]) if step + 1 < len(x) else (x[-1], x[-1]) for x in cuts
                ]
                q = torch.cat(
                    [p[0][start:stop] for p, (start, stop) in zip(prompts, chunks, strict=True)]
                )
                starts = torch.tensor([0, *(stop - start for start, stop in chunks)]).cumsum(0)
                used = torch.tensor([stop for _, stop in chunks])
                out, lse, kept = block_sparse_attention(
                    q,
                    cache.k,
                    cache.v,
                    thresholds,
                    cu_seqlens_q=starts.to(target.device, torch.int32),
                    seqused_k=used.to(target.device, torch.int32),
                    block_table=cache.block_table,
                    **options,
                )
                for index, (start, stop) in enumerate(chunks):
                    if start == stop:
                        continue
                    first = int(starts[index])
                    rows = slice(first, first + stop - start)
                    place = torch.arange(start, stop, device=target.device) // geometry.q_block
                    uncut = torch.ones_like(place, dtype=torch.bool)
                    if not is_dense and start % geometry.q_block:
                        uncut &= place != place[0]
                    if not is_dense and stop % geometry.q_block and stop < lengths[index]:
                        uncut &= place != place[-1]
                    expected = whole[index]
                    close = {"rtol": 2 * eps, "atol": 2 * eps}
                    torch.testing.assert_close(
                        out[rows][uncut], expected[0][0, start:stop][uncut], **close
                    )
                    torch.testing.assert_close(
                        lse[:, rows][:, uncut],
                        expected[1][0, :, start:stop][:, uncut],
                        rtol=1e-5,
                        atol=1e-5,
                    )
                    if not is_dense:
                        columns = place[uncut].unique()
                        own = first // geometry.q_block + 2 * index + columns - place[0]
                        assert torch.equal(kept[:, own], expected[2][0, :, columns])


def test_chunks_of_all_lengths_read_the_rows_of_the_prefill(target, geometry):
    """A threshold of +inf in one row, and of -inf in the others, shows which block read it."""
    target.require("forward", torch.float16, 64)
    case = cases.Case("rows", "", seqlen_q=700, seqlen_k=700, heads=1, kv_heads=1)
    q, k, v = case.inputs(torch.float16, target.device)
    rows = -(-700 // geometry.q_block)
    for row in (1, 3):
        thresholds = torch.full((1, rows), -INF, device=target.device)
        thresholds[0, row] = INF
        for start, stop in ((0, 700), (1, 700), (130, 650), (63, 577), (65, 321), (127, 129)):
            kept = block_sparse_attention(
                q[:, start:stop],
                k[:, :stop],
                v[:, :stop],
                thresholds,
                geometry=geometry,
                return_kept=True,
            )[1]
            first = start // geometry.q_block
            assert kept.shape[2] == (stop - 1) // geometry.q_block + 1 - first
            for column, count in enumerate(kept[0, 0].tolist()):
                block = first + column
                last = min((block + 1) * geometry.q_block, stop)
                visible = -(-last // 64)
                full = (max(block * geometry.q_block, start) + 1) // 64
                assert count == (visible - full if block == row else visible), (start, stop, block)


# ------------------------------------------------------------------- what only a device can know


@pytest.mark.parametrize("page_size", [48, 64, None])
def test_kernels_write_nan_where_there_are_more_keys_than_room(arch, geometry, page_size):
    for kernel in ("forward", "attend_blocks", "select_blocks", "block_maxima"):
        arch.require(kernel, torch.bfloat16, 64)
    for packed in (True, False):
        batch = make_batch(arch, torch.bfloat16, 64, page_size, packed=packed)
        used = batch.where["seqused_k"]
        good = attend(batch, mixed_thresholds(batch, "peak_lse"), rule="peak_lse")
        room = PADDED_ROOM if page_size is None else batch.where["block_table"].shape[1] * page_size
        whole = used.clone()
        for too_many in (room + 1, room + 1000, 2**31 - 1):
            used.copy_(whole)
            used[3] = too_many
            options = {"rule": "peak_lse", "geometry": geometry}
            thresholds = mixed_thresholds(batch, "peak_lse")
            for selection in ("exact", "int8"):
                out, lse, kept = attend(batch, thresholds, selection=selection, **options)
                del kept
                for index, query in enumerate(batch.queries):
                    start = sum(map(len, batch.queries[:index])) if packed else 0
                    rows = slice(start, start + len(query))
                    own = batch.of(out, index, 0, rows), batch.of(lse, index, 1, rows)
                    assert all(x.isnan().all() == (index == 3) for x in own if x.numel())
            lead = (too_many - len(batch.queries[3])) % geometry.q_block
            columns = -(-(len(batch.queries[3]) + lead) // geometry.q_block)
            mask = call(select_blocks, batch, thresholds, **options)
            first = batch.columns(3, geometry).start
            assert (batch.of(mask, 3, 1, slice(first, first + columns)) == -1).all()
            if not packed:
                maxima = call(block_maxima, batch, **options)
                assert maxima[3, :, :columns].isnan().all()
                assert not maxima[[i for i in range(len(used)) if i != 3]].isnan().any()
        used.copy_(whole)
        again = attend(batch, mixed_thresholds(batch, "peak_lse"), rule="peak_lse")
        assert all(map(torch.equal, good, again))


def test_kernels_take_negative_lengths_for_none(arch, geometry):
    arch.require("forward", torch.float16, 128)
    batch = make_batch(arch, torch.float16, 128, 64, packed=True)
    batch.where["seqused_k"][0] = -5
    out, lse, _ = attend(batch, mixed_thresholds(batch, "absolute"), geometry=geometry)
    rows = slice(0, 130)
    assert (out[rows] == 0).all()
    assert (lse[:, rows] == -INF).all()


@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_kernels_take_pages_that_do_not_exist_for_zeros(arch, page_size):
    for kernel in ("forward", "select_blocks", "attend_blocks", "block_maxima"):
        arch.require(kernel, torch.float16, 64)
    batch = make_batch(arch, torch.float16, 64, page_size, packed=False)
    keys, values = ([x.clone() for x in xs] for xs in (batch.keys, batch.values))
    for index, page in ((0, 2**30), (6, -1), (7, len(batch.k))):
        batch.where["block_table"][index, 1] = page
        for x in (keys[index], values[index]):
            x[page_size : 2 * page_size] = 0
    whole = paging.paged(keys, values, 64, seed=1)
    zeros = Batch(batch.queries, keys, values, whole.k, whole.v, whole.options, packed=False)
    thresholds = mixed_thresholds(batch, "peak_lse")
    for selection in ("exact", "int8"):
        found, expected = (
            attend(x, thresholds, rule="peak_lse", selection=selection) for x in (batch, zeros)
        )
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    found, expected = (call(block_maxima, x, rule="peak_lse")[..., :5] for x in (batch, zeros))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_long_prompt_in_pages_gives_what_it_gives_side_by_side(arch, geometry):
    """Enough tiles that each CTA takes several, and rings of stages go round many times."""
    for kernel in ("forward", "select_blocks", "attend_blocks"):
        arch.require(kernel, torch.bfloat16, 128)
    generator = torch.Generator().manual_seed(3)
    lengths = ((4000, 9001), (129, 8191), (3001, 3001))
    tensors = [
        [
            torch.randn((length, heads, 128), generator=generator).to(arch.device, torch.bfloat16)
            for length, heads in ((queries, 8), (keys, 2), (keys, 2))
        ]
        for queries, keys in lengths
    ]
    queries, keys, values = zip(*tensors, strict=True)
    thresholds = torch.full((8, 1), cases.MIXED_LEVELS["peak_lse"] + 1.5, device=arch.device)
    for page_size in PAGE_SIZES:
        cache = paging.paged(list(keys), list(values), page_size, seed=page_size)
        batch = Batch(
            list(queries), list(keys), list(values), cache.k, cache.v, cache.options, packed=True
        )
        for selection in ("exact", "int8"):
            options = {"rule": "peak_lse", "geometry": geometry, "selection": selection}
            found = attend(batch, thresholds, **options)
            for index in range(len(lengths)):
                alone = block_sparse_attention(
                    *batch.alone(index), thresholds, return_lse=True, return_kept=True, **options
                )
                own = batch.results_of(found, index, geometry)
                assert torch.equal(own[2], alone[2])
                torch.testing.assert_close(own[0], alone[0], rtol=0, atol=0)
                torch.testing.assert_close(own[1], alone[1], rtol=0, atol=0)
