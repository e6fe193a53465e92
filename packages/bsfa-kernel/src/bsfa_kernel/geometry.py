# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Sparsity blocks: their geometries, and the arithmetic of positions that every back end shares."""

from __future__ import annotations

import re
from typing import NamedTuple


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


def threshold_row(first_query: int, seqlen_q: int, seqlen_k: int, q_block: int, rows: int) -> int:
    """The row of the thresholds that serves a query block: its absolute position.

    A chunk of a prefill so reads the thresholds that the whole prefill would. Positions beyond the
    table read its last row.

    Args:
        first_query: index of the block's first query in its sequence.
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
