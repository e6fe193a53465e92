# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Caches in pages: keys and values scattered over them, and NaN wherever nothing may be read."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("separate", "packed", "heads first")


class Paged(NamedTuple):
    """Keys and values of some sequences in pages."""

    k: Tensor
    """[pages, page_size, kv_heads, head_dim]."""
    v: Tensor
    block_table: Tensor
    seqused_k: Tensor

    @property
    def options(self) -> dict[str, Any]:
        """The arguments beside k and v."""
        return {"block_table": self.block_table, "seqused_k": self.seqused_k}


def paged(
    keys: list[Tensor], values: list[Tensor], page_size: int, *, layout: str = "packed", seed: int
) -> Paged:
    """Put sequences into pages at random.

    Rows that belong to no sequence hold NaN, entries of the table past a sequence's last page no
    page at all, and neither the table's rows nor the cache's are contiguous.

    Args:
        keys: of each sequence [seqlen_k, kv_heads, head_dim].
        values: as ``keys``.
        page_size: keys of a page.
        layout: one of ``LAYOUTS``: tensors of their own, one whose rows hold a key and its value,
            or the latter with heads before tokens.
        seed: of the order of the pages.
    """
    _, kv_heads, head_dim = keys[0].shape
    device = keys[0].device
    counts = [-(-len(x) // page_size) for x in keys]
    pages = sum(counts) + 3
    if layout == "separate":
        shape = (pages, page_size, kv_heads, head_dim)
        k, v = (torch.full(shape, math.nan, dtype=keys[0].dtype, device=device) for _ in range(2))
    elif layout == "packed":
        shape = (pages, page_size, kv_heads, 2 * head_dim)
        cache = torch.full(shape, math.nan, dtype=keys[0].dtype, device=device)
        k, v = cache.split(head_dim, -1)
    else:
        shape = (pages, kv_heads, page_size, 2 * head_dim)
        cache = torch.full(shape, math.nan, dtype=keys[0].dtype, device=device)
        k, v = cache.transpose(1, 2).split(head_dim, -1)
    order = iter(torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).tolist())
    most = max(counts) + 2
    table = torch.full((len(keys), most + 5), -(2**31), dtype=torch.int32)
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        for number in range(counts[index]):
            page = next(order)
            table[index, number] = page
            part = slice(number * page_size, (number + 1) * page_size)
            rows = len(key[part])
            k[page, :rows], v[page, :rows] = key[part], value[part]
    lengths = torch.tensor([len(x) for x in keys], dtype=torch.int32, device=device)
    return Paged(k, v, table.to(device)[:, :most], lengths)
