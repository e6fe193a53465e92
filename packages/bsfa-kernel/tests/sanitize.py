# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Small calls of every kind, for a run under compute-sanitizer: python sanitize.py ARCH."""

from __future__ import annotations

import itertools
import math
import sys

import torch

import cases
import paging
from bsfa_kernel import (
    GEOMETRIES,
    PRECISIONS,
    RULES,
    VOTERS,
    Geometry,
    _native,
    attend_blocks,
    block_maxima,
    block_sparse_attention,
    build_info,
    select_blocks,
)
from bsfa_kernel.geometry import query_block_count


def masks(case: cases.Case, geometry: Geometry) -> list[torch.Tensor]:
    """No block, every other one and all, invisible ones among them."""
    q_blocks = query_block_count(case.seqlen_q, case.seqlen_k, geometry)
    words = -(-case.seqlen_k // 4096)
    shape = (case.batch, case.heads, q_blocks, words)
    return [torch.full(shape, bits, device="cuda") for bits in (0, 0x5555555555555555, -1)]


def call_on_pages(
    kernel: str, dtype: torch.dtype, head_dim: int, arch: int, kind: str | None = None
) -> None:
    """Call a kernel on keys in pages: none, one, a cut page, a missing page, too many keys."""
    generator = torch.Generator().manual_seed(1)
    lengths = (100, 0, 1, 333, 150)

    def draw(length: int, heads: int) -> torch.Tensor:
        return torch.randn((length, heads, head_dim), generator=generator).to("cuda", dtype)

    keys, values = ([draw(length, 2) for length in lengths] for _ in range(2))
    q = torch.stack([draw(140, 4) for _ in lengths])
    thresholds = torch.zeros((4, 1), device="cuda")
    for page_size in (16, 96, 64):
        cache = paging.paged(keys, values, page_size, seed=page_size)
        cache.seqused_k[4] = 2**31 - 1
        cache.block_table[3, 1] = 2**30
        sinks = cases.sinks_of(kind, 4, "cuda")
        options = {**cache.options, "rule": "peak_lse", **sinks}
        with _native.force_arch(arch):
            if kernel == "block_maxima":
                block_maxima(q, cache.k, **options)
            elif kernel == "select_blocks":
                for precision in PRECISIONS:
                    select_blocks(q, cache.k, thresholds, precision=precision, **options)
            elif kernel == "attend_blocks":
                mask = torch.full((len(q), 4, 3, 1), -1, device="cuda")
                attend_blocks(q, cache.k, cache.v, mask, return_kept=True, **cache.options, **sinks)
            else:
                for level in (-math.inf, 0.0):
                    block_sparse_attention(
                        q, cache.k, cache.v, thresholds + level, return_kept=True, **options
                    )


def call_with_sinks(kernel: str, dtype: torch.dtype, head_dim: int, arch: int) -> None:
    """Call a kernel with sinks, on a head dimension that does not fill its tiles.

    Four key blocks: with more, a consumer of sm_90a may release a stage of V unread for the second
    time, which synccheck takes for a missing wait (docs/kernel-sm90.md, Votes).
    """
    case = cases.Case(
        "sinks", "", seqlen_q=200, seqlen_k=250, heads=4, kv_heads=2, head_dim=head_dim
    )
    q, k, v = case.inputs(dtype, "cuda")
    thresholds = torch.zeros((4, 1), device="cuda")
    for kind, rule, geometry in itertools.product(("far", "special"), RULES, GEOMETRIES):
        options = {"geometry": geometry, **cases.sinks_of(kind, 4, "cuda")}
        with _native.force_arch(arch):
            if kernel == "block_maxima":
                block_maxima(q, k, rule=rule, **options)
            elif kernel == "select_blocks":
                for precision in PRECISIONS:
                    select_blocks(q, k, thresholds, rule=rule, precision=precision, **options)
            elif kernel == "attend_blocks":
                for mask in masks(case, geometry):
                    attend_blocks(q, k, v, mask, return_lse=True, **options)
            else:
                block_sparse_attention(q, k, v, thresholds, rule=rule, return_lse=True, **options)


def main(arch: int) -> None:
    """Call each kernel of an architecture on few shapes that between them reach every edge."""
    wanted = ("one_past_a_block", "odd", "odd_full", "offset_63", "more_queries", "grouped")
    chosen = [case for case in cases.ALL if case.name in wanted]
    calls = 0
    for kernel in build_info().kernels:
        if kernel.arch != arch:
            continue
        dtype = getattr(torch, kernel.dtype)
        for case in chosen:
            q, k, v = case.inputs(dtype, "cuda")
            if case.head_dim != kernel.head_dim:
                q, k, v = (
                    x.repeat(1, 1, 1, 4)[..., : kernel.head_dim].contiguous() for x in (q, k, v)
                )
            rule, geometry = RULES[calls % 3], GEOMETRIES[calls // 3 % 2]
            options = {"causal": case.causal, "rule": rule, "geometry": geometry}
            with _native.force_arch(arch):
                if kernel.name == "block_maxima":
                    block_maxima(q, k, **options)
                elif kernel.name == "select_blocks":
                    thresholds = torch.full((case.heads, 2), 0.5, device="cuda")
                    for precision, voters in itertools.product(PRECISIONS, VOTERS):
                        select_blocks(
                            q, k, thresholds, precision=precision, voters=voters, **options
                        )
                elif kernel.name == "attend_blocks":
                    del options["rule"]
                    for mask in masks(case, geometry):
                        attend_blocks(q, k, v, mask, return_lse=True, return_kept=True, **options)
                else:
                    for level in (-math.inf, 0.0 if rule != "absolute" else 2.0, math.inf):
                        thresholds = torch.full((case.heads, 2), level, device="cuda")
                        block_sparse_attention(
                            q, k, v, thresholds, return_lse=True, return_kept=True, **options
                        )
            calls += 1
        if kernel.name != "block_maxima":
            packed = next(case for case in cases.PACKED if case.name == "with_empty")
            q, k, v = packed.inputs(dtype, "cuda")
            q, k, v = (x.repeat(1, 1, 4)[..., : kernel.head_dim].contiguous() for x in (q, k, v))
            starts_q, starts_k = packed.cu_seqlens("cuda")
            starts = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
            outputs = {"return_lse": True, "return_kept": True}
            thresholds = torch.zeros((packed.heads, 1), device="cuda")
            with _native.force_arch(arch):
                if kernel.name == "forward":
                    block_sparse_attention(q, k, v, thresholds, **starts, **outputs)
                elif kernel.name == "select_blocks":
                    for precision in PRECISIONS:
                        select_blocks(q, k, thresholds, precision=precision, **starts)
                else:
                    columns = len(q) // GEOMETRIES[0].q_block + 2 * len(packed.lengths)
                    mask = torch.full((packed.heads, columns, 1), 5, device="cuda")
                    attend_blocks(q, k, v, mask, **starts, **outputs)
        call_on_pages(kernel.name, dtype, kernel.head_dim, arch)
        for head_dim in (kernel.head_dims[0], kernel.head_dims[-2]):
            call_on_pages(kernel.name, dtype, head_dim, arch, "usual")
            call_with_sinks(kernel.name, dtype, head_dim, arch)
    torch.cuda.synchronize()
    if calls == 0:
        raise SystemExit(f"the library has no kernels for sm_{arch}")
    print(f"{calls} kinds of call done")


if __name__ == "__main__":
    main(int(sys.argv[1]))
