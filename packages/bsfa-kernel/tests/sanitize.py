# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Small calls of every kind, for a run under compute-sanitizer: python sanitize.py ARCH."""

from __future__ import annotations

import math
import sys

import torch

import cases
from bsfa_kernel import (
    GEOMETRIES,
    RULES,
    _native,
    block_maxima,
    block_sparse_attention,
    build_info,
)


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
                    x.repeat(1, 1, 1, 2)[..., : kernel.head_dim].contiguous() for x in (q, k, v)
                )
            rule, geometry = RULES[calls % 3], GEOMETRIES[calls // 3 % 2]
            options = {"causal": case.causal, "rule": rule, "geometry": geometry}
            with _native.force_arch(arch):
                if kernel.name == "block_maxima":
                    block_maxima(q, k, **options)
                else:
                    for level in (-math.inf, 0.0 if rule != "absolute" else 2.0, math.inf):
                        thresholds = torch.full((case.heads, 2), level, device="cuda")
                        block_sparse_attention(
                            q, k, v, thresholds, return_lse=True, return_kept=True, **options
                        )
            calls += 1
        if kernel.name == "forward":
            packed = next(case for case in cases.PACKED if case.name == "with_empty")
            q, k, v = packed.inputs(dtype, "cuda")
            q, k, v = (x.repeat(1, 1, 2)[..., : kernel.head_dim].contiguous() for x in (q, k, v))
            starts_q, starts_k = packed.cu_seqlens("cuda")
            with _native.force_arch(arch):
                block_sparse_attention(
                    q,
                    k,
                    v,
                    torch.zeros((packed.heads, 1), device="cuda"),
                    cu_seqlens_q=starts_q,
                    cu_seqlens_k=starts_k,
                    return_lse=True,
                    return_kept=True,
                )
    torch.cuda.synchronize()
    if calls == 0:
        raise SystemExit(f"the library has no kernels for sm_{arch}")
    print(f"{calls} kinds of call done")


if __name__ == "__main__":
    main(int(sys.argv[1]))
