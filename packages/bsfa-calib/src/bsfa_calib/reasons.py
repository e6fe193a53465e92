# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Why a call of the attention function ran dense."""

from __future__ import annotations

import enum


class Reason(str, enum.Enum):
    """The reasons, in the words that statistics show."""

    DECODE = "decode step"
    TOO_SHORT = "too short to skip a block"
    CHUNK = "later chunk of a prompt"
    SLIDING_WINDOW = "sliding-window layer"
    SOFTCAP = "soft-capped scores"
    SINKS = "attention sinks"
    BIAS = "attention bias"
    NOT_CAUSAL = "not causal"
    OWN_MASK = "the model's own mask"
    TRACED_MASK = "mask that torch.compile cannot read"
    NO_KERNEL = "head_dim without a kernel"
    OWN_ARGUMENT = "an argument of the model's own attention"
    OWN_NAME = "the model chooses its keys itself"
    PART_OF_BLOCK = "prefill within a query block"
    HEAD_DIMS = "keys and values differ in head_dim"
    UNKNOWN_LENGTHS = "lengths that the host does not know"

    def __str__(self) -> str:
        return self.value


REASONS = tuple(Reason)
