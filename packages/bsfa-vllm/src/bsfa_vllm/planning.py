# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""How the rows of a step are split among block-sparse calls and vLLM's own attention.

A row is one request's part of a step: some queries after the keys that are in the cache already.
Everything here is arithmetic on lengths that the host knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bsfa_calib.reasons import Reason
from bsfa_kernel import Geometry
from bsfa_kernel.geometry import can_skip


class Row(NamedTuple):
    """One request's part of a step.

    Attributes:
        queries: its queries; 0 for rows that only pad the batch.
        keys: keys that they can see, their own included.
        prefilling: whether they are of the prompt; None where that is not known.
    """

    queries: int
    keys: int
    prefilling: bool | None = None

    @property
    def real(self) -> bool:
        """Whether it may be a request's: not padding, nor made up by vLLM for a dummy step.

        A request without a key in the cache has its prompt before it.
        """
        return self.queries > 0 and not (self.prefilling is False and self.queries == self.keys)


@dataclass
class Part:
    """Rows next to each other that go to one call.

    Attributes:
        rows: which of the step's rows; padding rows may lie between them.
        tokens: their queries in the step's tensor.
        lengths: queries and keys of each row that has queries.
        max_keys: keys of the row that has most, padding rows included.
        selection: how a block-sparse call chooses blocks, "exact" or "int8"; None for a part that
            is left to vLLM.
        starts: of a block-sparse part: int32 [rows + 1] on the device, where its rows begin.
        metadata: of a part that is left to vLLM: what its implementation is told.
    """

    rows: slice
    tokens: slice
    lengths: list[tuple[int, int]]
    max_keys: int
    selection: str | None = None
    starts: Any = None
    metadata: Any = None

    @property
    def max_queries(self) -> int:
        """Queries of the row that has most."""
        return max(queries for queries, _ in self.lengths)


@dataclass
class Plan:
    """How a step is split.

    Attributes:
        parts: calls, in the order of their rows.
        sparse: rows that run block-sparse.
        int8: how many of them choose their blocks from 8-bit scores.
        dense: rows of requests that do not, by reason.
        counted: whether statistics have the step; those of vLLM's warm-up are not.
    """

    parts: list[Part] = field(default_factory=list)
    sparse: int = 0
    int8: int = 0
    dense: Counter[Reason] = field(default_factory=Counter)
    counted: bool = True


def reason_of(row: Row, geometry: Geometry) -> Reason | None:
    """Why a row runs dense; None if a block of it can be skipped.

    Fewer queries than a query block after other keys are a decode step, drafts to be verified, or
    what is left of a prompt. They are one tile a head, and vLLM's own attention spreads the keys of
    so few tiles over the whole GPU, which the block-sparse kernels do not.
    """
    if row.queries < row.keys and row.queries < geometry.q_block:
        if row.prefilling is None:
            return Reason.DECODE if row.queries == 1 else Reason.PART_OF_BLOCK
        return Reason.PART_OF_BLOCK if row.prefilling else Reason.DECODE
    return None if can_skip(row.queries, row.keys, geometry) else Reason.TOO_SHORT


def split(rows: Sequence[Row], geometry: Geometry, selection: Callable[[int], str]) -> Plan:
    """Split the rows of a step.

    Rows next to each other share a call, but for those that choose their blocks from 8-bit scores:
    the room that this takes is padded to the longest row of a call, so each has its own.

    Args:
        rows: of the step, in the order of their queries in its tensors.
        geometry: the sparsity block.
        selection: how a row of so many keys chooses its blocks, "exact" or "int8".
    """
    plan = Plan()
    token = 0
    for index, row in enumerate(rows):
        chosen = None
        if row.real:
            reason = reason_of(row, geometry)
            chosen = selection(row.keys) if reason is None else None
            if reason is not None:
                plan.dense[reason] += 1
            plan.sparse += reason is None
            plan.int8 += chosen == "int8"
        _add(plan.parts, rows, index, token, chosen)
        token += row.queries
    return plan


def _add(
    parts: list[Part], rows: Sequence[Row], index: int, token: int, chosen: str | None
) -> None:
    """Add a row to the last part, or begin another with it."""
    row = rows[index]
    if not row.queries:
        return
    last = parts[-1] if parts else None
    if last is None or chosen != last.selection or chosen == "int8":
        last = Part(slice(index, index), slice(token, token), [], 0, chosen)
        parts.append(last)
    last.max_keys = max(last.max_keys, *(each.keys for each in rows[last.rows.stop : index + 1]))
    last.rows = slice(last.rows.start, index + 1)
    last.tokens = slice(last.tokens.start, token + row.queries)
    last.lengths.append((row.queries, row.keys))
