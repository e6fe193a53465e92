# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The rules by which a block's scores are compared with its threshold."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

Rule: TypeAlias = Literal["absolute", "running_max", "peak_lse"]

RULES: tuple[Rule, ...] = ("absolute", "running_max", "peak_lse")
"""``absolute`` (the paper's) compares scores themselves; the others subtract what the query row has
seen so far, from the last key block to the first: its largest peak, or the log-sum-exp of its peaks
(the largest score of each block)."""

RULE_CODES: Mapping[str, int] = MappingProxyType({rule: code for code, rule in enumerate(RULES)})
"""The values of the C enum ``bsfa_rule``."""

VOTERS = (1, 2, 4)
"""Of how many query rows one votes."""

Selection: TypeAlias = Literal["exact", "int8", "auto"]

SELECTIONS: tuple[Selection, ...] = ("exact", "int8", "auto")
"""``exact`` decides by the scores that attention uses, in one kernel with it; ``int8`` selects by
scores in 8 bits, then attends to what is selected; ``auto`` is one of both, by the conditions of
``resolve_selection``."""

Precision: TypeAlias = Literal["exact", "int8"]

PRECISIONS: tuple[Precision, ...] = ("exact", "int8")
"""Of the scores that are compared with thresholds: those that attention uses, or ones of queries
and keys rounded to 8 bits."""

PRECISION_CODES: Mapping[str, int] = MappingProxyType(
    {precision: code for code, precision in enumerate(PRECISIONS)}
)
"""The values of the C enum ``bsfa_precision``."""
