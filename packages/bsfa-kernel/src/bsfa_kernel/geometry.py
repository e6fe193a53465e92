# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Sparsity blocks: their geometries, and the arithmetic of positions that every back end shares."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

_Indices = TypeVar("_Indices", int, "npt.NDArray[np.int64]", "Tensor")
"""A query block's index, or an array or tensor of several: what is counted has its shape."""


class Geometry(NamedTuple):
    """Size of a sparsity block: ``q_block`` queries by ``k_block`` keys.

    It is part of a threshold's meaning, and has nothing to do with the tile that a kernel computes
    at a time.
    """

    q_block: int
    k_block: int

    def __str__(self) -> str:
        return f"{self.q_block}x{self.k_block}"

    @classmethod
    def parse(cls, text: str) -> Geometry:
        """Read what ``str()`` writes.

        Args:
            text: for example "128x64".

        Raises:
            ValueError: ``text`` is not two positive numbers with an "x" between them.
        """
        match = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", text)
        if match is None or 0 in (sizes := cls(int(match[1]), int(match[2]))):
            raise ValueError(
                "a geometry is written as queries x keys, for example "
                f"{DEFAULT_GEOMETRY}; got {text!r}"
            )
        return sizes


DEFAULT_GEOMETRY = Geometry(128, 64)
"""That of the paper's thresholds."""

GEOMETRIES = (DEFAULT_GEOMETRY, Geometry(64, 64))
"""All that thresholds can be made for."""


def block_count(length: int, block: int) -> int:
    """Number of blocks of ``block`` positions that cover ``length`` positions."""
    return (length + block - 1) // block


def query_lead(seqlen_q: int, seqlen_k: int, geometry: Geometry = DEFAULT_GEOMETRY) -> int:
    """Rows of a sequence's first query block that lie before its first query.

    Query i has the absolute position i + seqlen_k - seqlen_q, and query blocks start at absolute
    multiples of ``q_block``: block i holds those of the queries from i * q_block - lead on, less
    than (i + 1) * q_block - lead, that there are.
    """
    return (seqlen_k - seqlen_q) % geometry[0]


def query_block_count(seqlen_q: int, seqlen_k: int, geometry: Geometry = DEFAULT_GEOMETRY) -> int:
    """Number of query blocks that a sequence has; 0 without queries."""
    lead = query_lead(seqlen_q, seqlen_k, geometry)
    return block_count(seqlen_q + lead, geometry[0]) * min(seqlen_q, 1)


def first_query(
    query_block: _Indices, seqlen_q: int, seqlen_k: int, geometry: Geometry = DEFAULT_GEOMETRY
) -> _Indices:
    """Index of a query block's first query in its sequence.

    This and the other functions of counts take numbers that torch.compile traces as well.

    Args:
        query_block: index of a query block of the sequence, or an array or tensor of several.
        seqlen_q: queries in the sequence.
        seqlen_k: keys in the sequence.
        geometry: the sparsity block.
    """
    start = query_block * geometry[0] - query_lead(seqlen_q, seqlen_k, geometry)
    return _clip(start, 0, None)


def visible_keys(
    query_block: _Indices,
    seqlen_q: int,
    seqlen_k: int,
    geometry: Geometry = DEFAULT_GEOMETRY,
    *,
    causal: bool = True,
) -> _Indices:
    """Number of keys that some query of a block sees; they are the first ones.

    Args:
        query_block: index of a query block of the sequence, or an array or tensor of several.
        seqlen_q: queries in the sequence.
        seqlen_k: keys in the sequence.
        geometry: the sparsity block.
        causal: query i sees keys j <= i + seqlen_k - seqlen_q, else all keys.
    """
    if not causal:
        return query_block * 0 + seqlen_k
    end = (query_block + 1) * geometry[0] - query_lead(seqlen_q, seqlen_k, geometry)
    return _clip(_clip(end, None, seqlen_q) + (seqlen_k - seqlen_q), 0, None)


def visible_blocks(
    query_block: _Indices,
    seqlen_q: int,
    seqlen_k: int,
    geometry: Geometry = DEFAULT_GEOMETRY,
    *,
    causal: bool = True,
) -> _Indices:
    """Number of key blocks of which a query block sees some score: 0 to this number - 1.

    Args: as in ``visible_keys``.
    """
    keys = visible_keys(query_block, seqlen_q, seqlen_k, geometry, causal=causal)
    return (keys + geometry[1] - 1) // geometry[1]


def full_blocks(
    query_block: _Indices,
    seqlen_q: int,
    seqlen_k: int,
    geometry: Geometry = DEFAULT_GEOMETRY,
    *,
    causal: bool = True,
) -> _Indices:
    """Number of key blocks of which a query block sees every score: 0 to this number - 1.

    Those are the blocks that can be skipped; visible blocks from there on are forced.

    Args: as in ``visible_keys``.
    """
    if not causal:
        return query_block * 0 + seqlen_k // geometry[1]
    first = first_query(query_block, seqlen_q, seqlen_k, geometry)
    return _clip(first + (seqlen_k - seqlen_q + 1), 0, None) // geometry[1]


def count_visible(
    seqlen_q: int, seqlen_k: int, geometry: Geometry = DEFAULT_GEOMETRY, *, causal: bool = True
) -> int:
    """Sum of ``visible_blocks`` over the query blocks of a sequence, without a loop over them."""
    q_block, k_block = geometry
    q_blocks = query_block_count(seqlen_q, seqlen_k, geometry)
    if not causal:
        return q_blocks * block_count(seqlen_k, k_block)
    # All but the last block, which may be ragged, see the keys up to the block's absolute end.
    position = (seqlen_k - seqlen_q) // q_block
    first = min(max(-position, 0), max(q_blocks - 1, 0))
    sum_of_others = _sum_of_quotients(
        max(q_blocks - 1 - first, 0),
        q_block,
        (first + 1 + position) * q_block + k_block - 1,
        k_block,
    )
    return sum_of_others + block_count(seqlen_k, k_block) * min(seqlen_q, 1)


def count_full(
    seqlen_q: int, seqlen_k: int, geometry: Geometry = DEFAULT_GEOMETRY, *, causal: bool = True
) -> int:
    """Sum of ``full_blocks`` over the query blocks of a sequence, without a loop over them."""
    q_block, k_block = geometry
    q_blocks = query_block_count(seqlen_q, seqlen_k, geometry)
    if not causal:
        return q_blocks * (seqlen_k // k_block)
    # All but the first block, which may be cut, see the key at the block's absolute start.
    offset = seqlen_k - seqlen_q
    position = offset // q_block
    of_first = max(offset + 1, 0) // k_block * min(seqlen_q, 1)
    first = min(max(-position, 1), max(q_blocks, 1))
    sum_of_others = _sum_of_quotients(
        max(q_blocks - first, 0), q_block, (first + position) * q_block + 1, k_block
    )
    return of_first + sum_of_others


def forced_share(
    seqlen_q: int, seqlen_k: int, geometry: Geometry = DEFAULT_GEOMETRY, *, causal: bool = True
) -> float:
    """Share of the visible blocks of a sequence that are always kept; 1 where none is visible."""
    visible = count_visible(seqlen_q, seqlen_k, geometry, causal=causal)
    return 1 - count_full(seqlen_q, seqlen_k, geometry, causal=causal) / max(visible, 1)


def can_skip(
    seqlen_q: int, seqlen_k: int, geometry: Geometry = DEFAULT_GEOMETRY, *, causal: bool = True
) -> bool:
    """Whether a sequence has a block that is not forced: its last query block has, if any has."""
    last = query_block_count(seqlen_q, seqlen_k, geometry) - 1
    return last >= 0 and full_blocks(last, seqlen_q, seqlen_k, geometry, causal=causal) > 0


def _clip(x: _Indices, low: int | None, high: int | None) -> _Indices:
    """Clip numbers, arrays and tensors alike."""
    value: Any = x
    if hasattr(value, "clip"):
        value = value.clip(low, high)
    else:
        value = value if low is None else max(value, low)
        value = value if high is None else min(value, high)
    return value  # type: ignore[no-any-return]


def _sum_of_quotients(count: int, factor: int, first: int, divisor: int) -> int:
    """Sum of (first + factor * i) // divisor over 0 <= i < count.

    Every ``period`` of them grow by a whole number, so that they are that many arithmetic series.
    """
    period = divisor // math.gcd(factor, divisor)
    growth = factor * period // divisor
    total = 0
    for start in range(period):
        terms = (count - start + period - 1) // period
        quotient = (first + factor * start) // divisor
        total += terms * quotient + growth * (terms * (terms - 1) // 2)
    return total


def threshold_row(first_query: int, seqlen_q: int, seqlen_k: int, q_block: int, rows: int) -> int:
    """The row of the thresholds that serves a query block: its absolute position.

    A chunk of a prefill so reads the thresholds that the whole prefill would. Positions beyond the
    table read its last row.

    Args:
        first_query: index of the block's first query in its sequence, or of any other.
        seqlen_q: queries in the sequence.
        seqlen_k: keys in the sequence.
        q_block: queries in a block.
        rows: rows of the table, at least 1.

    Raises:
        ValueError: ``rows`` or ``q_block`` is less than 1.
    """
    if rows < 1:
        raise ValueError(f"thresholds must have at least one row, got {rows}")
    if q_block < 1:
        raise ValueError(f"q_block must be at least 1, got {q_block}")
    return min(max(first_query + seqlen_k - seqlen_q, 0) // q_block, rows - 1)
