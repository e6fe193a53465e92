# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Named shapes, each with the reason why it is one, and inputs for them."""

from __future__ import annotations

import math
import os
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bsfa_kernel
from bsfa_kernel import DEFAULT_GEOMETRY, VOTERS, Geometry, reference
from bsfa_kernel.geometry import first_query

INF = float("inf")

VERDICT_MARGIN = 1e-3
"""Scaled scores summed in float32, in any order, err by much less than this for inputs as here; a
verdict that is closer may fall either way."""


KERNEL_HEAD_DIMS = (64, 128, 256)
"""Those that there are kernels for, which serve those below, too."""

HEAD_DIMS = tuple(range(8, 257, 8))
"""Those that the kernels serve."""


def head_dims_of_run() -> tuple[int, ...]:
    """For tests that would take long with all of HEAD_DIMS, which they have at night.

    Else the ends of what each kernel serves, and two more that change from day to day.
    """
    if os.environ.get("BSFA_HYPOTHESIS_PROFILE") == "nightly":
        return HEAD_DIMS
    ends = {8, 56, 72, 120, 136, 248}
    others = [head_dim for head_dim in HEAD_DIMS if head_dim not in ends]
    today = random.Random(os.environ["BSFA_TEST_DAY"])
    return tuple(sorted({*ends, *today.sample(others, 2)}))


SINKS = {
    "usual": (0.3, -1.2, 2.5, 1.0),
    "far": (30.0, -30.0, -INF, 3.0),
    "above all": (200.0, 0.5, 1e4, -1e4),
    "none": (-INF,),
    "special": (math.nan, 1.0, INF, -INF),
}
"""Values of sinks, to be repeated over the heads."""


def sinks_of(kind: str | None, heads: int, device: str = "cpu") -> dict[str, Tensor]:
    """The argument `sinks` of a kind, of which None is the name of no argument."""
    if kind is None:
        return {}
    values = SINKS[kind]
    return {"sinks": torch.tensor([values[h % len(values)] for h in range(heads)], device=device)}


def random_sinks(choose: Callable[[list[float | None]], float | None], heads: int) -> Tensor | None:
    """Sinks [heads] of values that ``choose`` picks, float64; None where it picks that first."""
    if choose([None, 0.0]) is None:
        return None
    values = [0.0, 0.7, -1.3, 2.5, 30.0, -30.0, 1e3, -INF, INF, math.nan]
    return torch.tensor([choose(values) for _ in range(heads)], dtype=torch.float64)


MIXED_LEVELS = {"absolute": 3.9, "running_max": 1.2, "peak_lse": -0.5}
"""Thresholds of each rule that about half of the blocks pass, for some thousand standard normal
queries and keys."""


@dataclass(frozen=True)
class Case:
    """The shape of one call."""

    name: str
    reason: str
    batch: int = 1
    seqlen_q: int = 256
    seqlen_k: int = 256
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    causal: bool = True
    scale: float | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of standard normal values; the same on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (
            (self.batch, self.seqlen_q, self.heads, self.head_dim),
            (self.batch, self.seqlen_k, self.kv_heads, self.head_dim),
            (self.batch, self.seqlen_k, self.kv_heads, self.head_dim),
        )
        q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        return q, k, v


CORRECTNESS = (
    Case("one_block", "the smallest call that fills a tile", seqlen_q=128, seqlen_k=128),
    Case("two_query_blocks", "a diagonal and a block below it"),
    Case("long", "many verdicts a query block", seqlen_q=1024, seqlen_k=1024),
    Case("head_dim_128", "another head dimension", seqlen_q=512, seqlen_k=512, head_dim=128),
    Case("head_dim_256", "the largest one", seqlen_q=512, seqlen_k=512, head_dim=256),
    Case("full", "no causal mask", causal=False, seqlen_q=384, seqlen_k=640),
    Case(
        "grouped", "4 query heads read one kv head", heads=8, kv_heads=2, seqlen_q=384, seqlen_k=384
    ),
    Case("one_kv_head", "all query heads read one kv head", heads=5, kv_heads=1),
    Case("batch", "sequences side by side", batch=3, seqlen_q=320, seqlen_k=320, head_dim=128),
    Case("scaled", "a scale that is no power of two", scale=0.3, seqlen_q=384, seqlen_k=384),
)

RAGGED = (
    Case("one_token", "the shortest prompt", seqlen_q=1, seqlen_k=1),
    Case(
        "decode", "one query at the end of many keys", seqlen_q=1, seqlen_k=700, heads=4, kv_heads=1
    ),
    Case("decode_at_block_end", "the last key fills its block", seqlen_q=1, seqlen_k=512),
    Case("below_a_block", "queries and keys end inside the first block", seqlen_q=37, seqlen_k=37),
    Case("one_past_a_block", "a block of one query", seqlen_q=129, seqlen_k=129),
    Case("one_short_of_a_block", "a tile that lacks one query", seqlen_q=255, seqlen_k=255),
    Case(
        "odd",
        "nothing is a multiple of anything",
        batch=2,
        seqlen_q=333,
        seqlen_k=333,
        head_dim=128,
    ),
    Case(
        "odd_256", "the same, at 256", seqlen_q=217, seqlen_k=217, heads=3, kv_heads=1, head_dim=256
    ),
    Case("odd_full", "ragged keys without a mask", causal=False, seqlen_q=200, seqlen_k=333),
    Case("full_one_key", "a single key without a mask", causal=False, seqlen_q=130, seqlen_k=1),
    Case("full_whole_blocks", "without forced blocks", causal=False, seqlen_q=130, seqlen_k=256),
)

OFFSET = (
    Case("chunk", "a later chunk of a prefill", seqlen_q=256, seqlen_k=1024, heads=4, kv_heads=2),
    Case("chunk_256", "the same, at 256", seqlen_q=256, seqlen_k=1024, head_dim=256),
    Case("chunk_odd", "the diagonal crosses blocks at odd places", seqlen_q=200, seqlen_k=777),
    Case("offset_63", "row 0 sees exactly one whole block", seqlen_q=128, seqlen_k=191),
    Case("offset_64", "the diagonal starts one key into a block", seqlen_q=128, seqlen_k=192),
    Case("more_queries", "the first queries see no key", seqlen_q=500, seqlen_k=300),
    Case("many_more_queries", "whole query blocks see no key", seqlen_q=700, seqlen_k=130, batch=2),
    Case(
        "more_queries_full",
        "more queries than keys, no mask",
        seqlen_q=500,
        seqlen_k=70,
        causal=False,
    ),
)

ALL = CORRECTNESS + RAGGED + OFFSET


def voters_of(case: Case, *more: object) -> int:
    """One of ``VOTERS``, by chance, so that they are tried without three times as many tests."""
    return VOTERS[zlib.crc32(repr((case.name, more)).encode()) % len(VOTERS)]


@dataclass(frozen=True)
class PackedCase:
    """The shape of one call on packed sequences."""

    name: str
    reason: str
    lengths: tuple[tuple[int, int], ...]  # queries and keys of each sequence
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    causal: bool = True

    def __str__(self) -> str:
        return self.name

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        total_q, total_k = (sum(lengths) for lengths in zip(*self.lengths, strict=True))
        unpacked = Case(
            self.name,
            self.reason,
            seqlen_q=total_q,
            seqlen_k=total_k,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
        )
        q, k, v = unpacked.inputs(dtype, device)
        return q[0], k[0], v[0]

    def cu_seqlens(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        starts_q, starts_k = [0], [0]
        for length_q, length_k in self.lengths:
            starts_q.append(starts_q[-1] + length_q)
            starts_k.append(starts_k[-1] + length_k)
        return (
            torch.tensor(starts_q, dtype=torch.int32, device=device),
            torch.tensor(starts_k, dtype=torch.int32, device=device),
        )


PACKED = (
    PackedCase("one_sequence", "as without packing", ((300, 300),)),
    PackedCase("equal", "whole blocks", ((256, 256), (256, 256))),
    PackedCase(
        "ragged", "sequences begin inside tiles", ((1, 1), (130, 130), (63, 63), (257, 257))
    ),
    PackedCase(
        "with_empty",
        "sequences without queries, keys, or both",
        ((100, 100), (0, 0), (0, 70), (90, 0), (150, 150)),
    ),
    PackedCase(
        "chunks",
        "each sequence has its own offset",
        ((128, 500), (40, 300), (200, 200)),
        head_dim=128,
    ),
    PackedCase(
        "more_queries", "some queries see no key", ((200, 60), (300, 310)), heads=3, kv_heads=1
    ),
    PackedCase(
        "chunks_256",
        "the same, at 256",
        ((128, 500), (40, 300), (200, 200)),
        head_dim=256,
    ),
    PackedCase("full", "no causal mask", ((100, 260), (260, 100)), causal=False),
)


def rows_of(case: Case, geometry: Geometry) -> int:
    """Rows of a table that has one for every query block of the case."""
    return max(-(-max(case.seqlen_q, case.seqlen_k) // geometry.q_block), 1)


def rough_thresholds(
    case: Case, q: Tensor, k: Tensor, *, rule: str, geometry: Geometry, keep: float
) -> Tensor:
    """Thresholds that keep about a share of the blocks, float32 [heads, rows].

    They may be near to a block's value: for comparisons of a kernel with itself.
    """
    maxima = reference.block_maxima(
        q, k, causal=case.causal, scale=case.scale, rule=rule, geometry=geometry
    )
    middle, spread = _level(maxima, keep)
    generator = torch.Generator().manual_seed(case.seed)
    values = torch.randn((case.heads, rows_of(case, geometry)), generator=generator)
    return (middle + spread * values).to(q.device)


def _level(maxima: Tensor, keep: float) -> tuple[float, float]:
    """About where thresholds that keep a share of the blocks lie, and how far they may spread."""
    finite = maxima[maxima.isfinite()]
    if finite.numel() == 0:
        finite = maxima.new_zeros(1)
    middle = finite.quantile(1 - keep) if finite.numel() < 2**24 else finite.median()
    return middle.item(), 0.2 * finite.std(correction=0).item() + 0.01


def separating_thresholds(
    case: Case,
    q: Tensor,
    k: Tensor,
    *,
    rule: str,
    geometry: Geometry = DEFAULT_GEOMETRY,
    keep: float = 0.5,
    rows: int | None = None,
    tries: int = 6,
    voters: int = 1,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Thresholds that keep about a share of the blocks, and are far from every block's own value.

    Returns:
        thresholds, float32 [heads, rows], and for each query block whether its verdicts are clear,
        bool [batch, heads, q_blocks]: the same in any arithmetic as good as float32.
    """
    rows = rows or rows_of(case, geometry)
    options: dict[str, Any] = {"causal": case.causal, "scale": case.scale, "rule": rule}
    options |= {"geometry": geometry, "sinks": sinks}
    generator = torch.Generator().manual_seed(case.seed)
    maxima = reference.block_maxima(q, k, compute_dtype=torch.float64, **options)
    middle, spread = _level(maxima, keep)
    positions = torch.tensor(
        [
            bsfa_kernel.threshold_row(
                first_query(index, case.seqlen_q, case.seqlen_k, geometry),
                case.seqlen_q,
                case.seqlen_k,
                geometry.q_block,
                rows,
            )
            for index in range(maxima.shape[2])
        ],
        device=q.device,
        dtype=torch.int64,
    )
    best = torch.full((case.heads, rows), -1.0, dtype=torch.float64, device=q.device)
    thresholds = torch.zeros((case.heads, rows), device=q.device)
    clear = torch.ones(maxima.shape[:3], dtype=torch.bool, device=q.device)
    values = torch.zeros((*k.shape[:3], 1), dtype=k.dtype, device=k.device).expand(k.shape)
    for _ in range(tries):
        candidate = middle + spread * torch.randn((case.heads, rows), generator=generator)
        candidate = candidate.to(q.device)
        margin = reference.attention(
            q, k, values, candidate, compute_dtype=torch.float64, voters=voters, **options
        ).margin
        by_row = torch.full_like(best, INF)
        nearest = margin.amin(0) if margin.shape[0] else margin.new_full(margin.shape[1:], INF)
        by_row.scatter_reduce_(1, positions.expand(case.heads, -1), nearest, "amin")
        better = by_row > best
        best = torch.where(better, by_row, best)
        thresholds = torch.where(better, candidate, thresholds)
        if (best > VERDICT_MARGIN).all():
            break
    clear &= (best > VERDICT_MARGIN)[:, positions]
    return thresholds, clear
