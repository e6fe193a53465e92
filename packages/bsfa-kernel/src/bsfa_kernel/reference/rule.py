# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Which blocks are visible, forced, and kept by the rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bsfa_kernel._checks import check_rule, check_voters
from bsfa_kernel.geometry import (
    DEFAULT_GEOMETRY,
    Geometry,
    block_count,
    full_blocks,
    query_block_count,
    query_lead,
    visible_keys,
)

_INF = float("inf")


class Verdicts(NamedTuple):
    """What ``verdicts`` decides."""

    keep: Tensor
    """[..., k_blocks], bool; True for forced blocks and all beyond them."""
    excess: Tensor
    """[..., k_blocks]: what was compared with the threshold, the maximum over the rows of row
    maximum - reference; inf where nothing was decided."""


def visible_blocks(
    seqlen_q: int, seqlen_k: int, *, causal: bool = True, geometry: Geometry = DEFAULT_GEOMETRY
) -> Tensor:
    """The blocks in which some query sees some key, bool [q_blocks, k_blocks]."""
    rows = torch.arange(query_block_count(seqlen_q, seqlen_k, geometry))[:, None]
    first_keys = torch.arange(block_count(seqlen_k, geometry.k_block)) * geometry.k_block
    return first_keys < visible_keys(rows, seqlen_q, seqlen_k, geometry, causal=causal)


def forced_blocks(
    seqlen_q: int, seqlen_k: int, *, causal: bool = True, geometry: Geometry = DEFAULT_GEOMETRY
) -> Tensor:
    """The blocks that are always kept, as ``visible_blocks``: visible ones with a masked score."""
    visible = visible_blocks(seqlen_q, seqlen_k, causal=causal, geometry=geometry)
    rows = torch.arange(visible.shape[0])[:, None]
    full = full_blocks(rows, seqlen_q, seqlen_k, geometry, causal=causal)
    return visible & (torch.arange(visible.shape[1]) >= full)


@torch.no_grad()
def excesses(
    row_maxima: Tensor,
    *,
    rule: str,
    reference: Tensor | None = None,
    voting: Tensor | None = None,
) -> Tensor:
    """What the rule of docs/semantics.md compares with the thresholds, for every block.

    Key blocks are visited from the last to the first. All values are scaled scores.

    Args:
        row_maxima: [..., rows, k_blocks], the peak of each row in each block; -inf where it has
            none.
        rule: one of ``RULES``.
        reference: [..., rows], what relative rules compare with at first, of later blocks than are
            given here; -inf by default.
        voting: bool, to be broadcast with [..., rows]: which rows vote, for instance
            ``voting_rows``; all by default. No row needs another, so that rows that do not vote may
            as well be left out of ``row_maxima``.

    Returns:
        [..., k_blocks], the maximum over the voting rows of peak - reference; NaN, which keeps a
        block, where a peak or reference is NaN, or both are infinite.

    Raises:
        ValueError: an unknown rule.
    """
    check_rule(rule)
    excess = row_excesses(row_maxima, rule, reference)
    if voting is not None:
        excess = excess.masked_fill(~voting[..., None], -_INF)
    if excess.shape[-2] == 0:
        return excess.new_full((*excess.shape[:-2], excess.shape[-1]), -_INF)
    return excess.amax(-2)


@torch.no_grad()
def verdicts(
    row_maxima: Tensor,
    thresholds: Tensor,
    *,
    rule: str,
    reference: Tensor | None = None,
    voting: Tensor | None = None,
    full: int | Tensor | None = None,
) -> Verdicts:
    """The rule of docs/semantics.md, for any number of query blocks and thresholds at once.

    Args:
        row_maxima: [..., rows, k_blocks], as in ``excesses``.
        thresholds: [...], which is broadcast with the leading dimensions of ``row_maxima``: several
            thresholds can be tried at once.
        rule: one of ``RULES``.
        reference: [..., rows], as in ``excesses``.
        voting: bool [..., rows], as in ``excesses``.
        full: how many of the blocks are to be decided, int [...] to be broadcast like the
            thresholds; those from there on are forced. All by default.

    Raises:
        ValueError: an unknown rule.
    """
    excess = excesses(row_maxima, rule=rule, reference=reference, voting=voting)
    thresholds = thresholds.to(excess.dtype)[..., None]
    # NaN keeps; +inf keeps no block, not even where a row has seen nothing yet.
    keep = ~(excess < thresholds) & (thresholds < _INF)
    excess = excess.expand(keep.shape)
    if full is not None:
        columns = torch.arange(row_maxima.shape[-1], device=row_maxima.device)
        forced = columns >= torch.as_tensor(full, device=row_maxima.device)[..., None]
        keep, excess = keep | forced, excess.masked_fill(forced, _INF)
    return Verdicts(keep, excess)


def voting_rows(seqlen_q: int, seqlen_k: int, geometry: Geometry, voters: int) -> Tensor:
    """Which rows of each query block of a sequence vote, bool [q_blocks, q_block].

    The last of each ``voters`` rows, and in the last query block all that there are. Rows before
    the first query and after the last do not exist, and do not vote.

    Raises:
        ValueError: ``voters`` is not one of ``VOTERS``, or does not divide ``q_block``.
    """
    check_voters(voters, geometry.q_block)
    rows = torch.arange(geometry.q_block)
    q_blocks = query_block_count(seqlen_q, seqlen_k, geometry)
    lead = query_lead(seqlen_q, seqlen_k, geometry)
    queries = torch.arange(q_blocks)[:, None] * geometry.q_block - lead + rows
    in_last = torch.arange(q_blocks)[:, None] == q_blocks - 1
    exist = (queries >= 0) & (queries < seqlen_q)
    return exist & ((rows % voters == voters - 1) | in_last)


def row_excesses(row_maxima: Tensor, rule: str, first: Tensor | None = None) -> Tensor:
    """Peak - reference of each row and block; arguments as of ``excesses``."""
    if rule == "absolute":
        return row_maxima
    # A reference is made of all later blocks, and is NaN from where one held NaN or +inf.
    if first is None:
        first = row_maxima.new_full(row_maxima.shape[:-1], -_INF)
    seen = torch.cat((row_maxima, first[..., None]), -1)[..., 1:]
    seen = seen.masked_fill_(seen == _INF, torch.nan).flip(-1)
    so_far = seen.cummax(-1).values if rule == "running_max" else seen.logcumsumexp(-1)
    return row_maxima - so_far.flip(-1)
