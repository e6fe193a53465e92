# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The sequences of a call: where their queries, keys and columns lie, as padded tensors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from bsfa_kernel._calls import (
    AnyCall,
    ForwardCall,
    SelectCall,
    first_column,
    geometry_of,
    key_capacity,
    sequence_count,
    starts_of_keys,
    starts_of_queries,
)
from bsfa_kernel._checks import (
    check_cu_seqlens_values,
    check_longest,
    check_pages,
    check_seqused_values,
)
from bsfa_kernel.geometry import block_count, query_block_count

_ALL = slice(None)


@dataclass(frozen=True)
class Part:
    """One sequence of a call, or all of them where their lengths are the same."""

    seqlen_k: int
    sequences: slice
    queries: slice  # of packed ones
    columns: slice  # its query blocks in what has a column for each
    keys: slice
    packed_queries: bool
    packed_keys: bool
    pages: Tensor | None

    def of_queries(self, q: Tensor) -> Tensor:
        """[sequences, seqlen_q, heads, head_dim] of the queries or the outputs of a call."""
        return q[None, self.queries] if self.packed_queries else q[self.sequences]

    def of_keys(self, x: Tensor) -> Tensor:
        """[sequences, seqlen_k, kv_heads, head_dim] of keys or values; a copy of paged ones."""
        if self.pages is not None:
            return x[self.pages].flatten(0, 1)[None, self.keys]
        return x[None, self.keys] if self.packed_keys else x[self.sequences, self.keys]

    def of_lse(self, lse: Tensor) -> Tensor:
        """[sequences, heads, seqlen_q] of the log-sum-exp of a call."""
        return lse[None, :, self.queries] if self.packed_queries else lse[self.sequences]

    def of_columns(self, x: Tensor) -> Tensor:
        """[sequences, heads, q_blocks, ...] of what has a column for each query block."""
        return (
            x[None, :, self.columns] if self.packed_queries else x[self.sequences, :, self.columns]
        )


def parts_of(call: AnyCall) -> list[Part]:
    """The parts of a call that has been checked.

    Raises:
        ValueError: lengths or pages in device memory break a rule; the message states rule and
            value.
    """
    q, k, seqused_k = call.q, call.k, call.seqused_k
    starts_q, starts_k = starts_of_queries(call), starts_of_keys(call)
    if starts_q is None and seqused_k is None:
        seqlen_k = k.shape[1]
        return [Part(seqlen_k, _ALL, _ALL, _ALL, _ALL, False, False, None)]

    if starts_q is None:
        queries = [(0, q.shape[1])] * len(q)
    else:
        check_cu_seqlens_values(starts_q, "cu_seqlens_q", "total_q", q.shape[0])
        queries = list(pairwise(starts_q.tolist()))
    if seqused_k is not None:
        lengths = seqused_k.tolist()
        check_seqused_values(lengths, key_capacity(call))
        keys = [(0, length) for length in lengths]
    else:
        assert starts_k is not None
        check_cu_seqlens_values(starts_k, "cu_seqlens_k", "total_k", k.shape[0])
        keys = list(pairwise(starts_k.tolist()))
    if isinstance(call, (ForwardCall, SelectCall)) and call.max_seqlen_k is not None:
        check_longest(call.max_seqlen_k, max((stop - start for start, stop in keys), default=0))

    parts = []
    for index in range(sequence_count(call)):
        start, stop = queries[index]
        seqlen_k = keys[index][1] - keys[index][0]
        columns = query_block_count(stop - start, seqlen_k, geometry_of(call))
        first = 0 if starts_q is None else first_column(start, index, call.q_block)
        parts.append(
            Part(
                seqlen_k,
                slice(index, index + 1),
                slice(start, stop),
                slice(first, first + columns),
                slice(*keys[index]),
                starts_q is not None,
                starts_k is not None,
                _pages(call, index, seqlen_k),
            )
        )
    return parts


def _pages(call: AnyCall, index: int, seqlen_k: int) -> Tensor | None:
    """The pages of a sequence's keys, int64."""
    if call.block_table is None:
        return None
    pages = call.block_table[index, : block_count(seqlen_k, call.k.shape[1])]
    check_pages(pages.tolist(), index, call.k.shape[0])
    return pages.long()
