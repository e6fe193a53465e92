# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The semantics of docs/semantics.md in PyTorch: the CPU back end, and the oracle of the tests.

Written to be read beside that page, and to be fast enough to run a small model: it works query
block by query block, and on so many heads at a time as keep the scores in cache, so that memory
grows with the length and not with its square.
"""

from bsfa_kernel.reference.forward import AttentionResult, attend_blocks, attention
from bsfa_kernel.reference.rule import (
    Verdicts,
    excesses,
    forced_blocks,
    verdicts,
    visible_blocks,
    voting_rows,
)
from bsfa_kernel.reference.selection import SelectionResult, block_maxima, select_blocks

__all__ = [
    "AttentionResult",
    "SelectionResult",
    "Verdicts",
    "attend_blocks",
    "attention",
    "block_maxima",
    "excesses",
    "forced_blocks",
    "select_blocks",
    "verdicts",
    "visible_blocks",
    "voting_rows",
]
