# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The attentions that a model can be switched to: the paper's API and the evaluation share them.

The baselines that block-sparse attention is compared with are in `bsfa_hf.baselines`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch

from bsfa_calib.binding import State, bind, make_state
from bsfa_calib.convert import Table
from bsfa_calib.point import PointLike
from bsfa_hf import attention
from bsfa_hf.automatic import named_selection
from bsfa_hf.state import layer_devices, local_heads, shape_of
from bsfa_kernel import Geometry


class Method(Protocol):
    """An attention that a model can be switched to.

    Attributes:
        implementation: name of the attention function in transformers' interface.
    """

    implementation: ClassVar[str]

    def state(self, model: torch.nn.Module) -> State | None:
        """What the model's attention modules are to refer to.

        Raises:
            ImportError: a package is missing.
            ValueError: the method does not fit the model.
        """
        ...


@dataclass(frozen=True)
class Sdpa:
    """torch's own dense attention."""

    implementation: ClassVar[str] = "sdpa"

    def state(self, model: torch.nn.Module) -> None:
        """See `Method`."""
        del model


@dataclass(frozen=True)
class BlockSparse:
    """Block-sparse attention with a table of thresholds.

    Attributes:
        table: thresholds of the model, or the path of a file that holds them.
        point: the operating point; not needed if the table holds a single one.
        check_model: refuse a table that names another model than the configuration does.
        selection: from what scores blocks are chosen, one of ``bsfa_kernel.SELECTIONS``; by
            default what the environment variable BSFA_SELECTION says, else "auto".
    """

    implementation: ClassVar[str] = attention.NAME

    table: Table
    point: PointLike | None = None
    check_model: bool = True
    selection: str | None = None

    def __post_init__(self) -> None:
        """Refuse a selection that there is not."""
        named_selection(self.selection)

    def state(self, model: torch.nn.Module) -> State:
        """See `Method`."""
        shape = shape_of(model)
        return bind(
            self.table,
            shape,
            self.point,
            devices=layer_devices(model, shape.layers),
            heads=local_heads(model, shape.heads),
            check_model=self.check_model,
            selection=named_selection(self.selection),
        )


@dataclass(frozen=True)
class OneThreshold:
    """Block-sparse attention with one threshold for the whole model.

    Attributes:
        threshold: that of every head and query block.
        rule: one of ``bsfa_kernel.RULES``.
        geometry: the sparsity block.
        voters: one query row in 1, 2 or 4 votes.
        selection: as that of `BlockSparse`.
        expected_skipped: share of the blocks that the threshold skips, if it is known.
    """

    implementation: ClassVar[str] = attention.NAME

    threshold: float
    rule: str
    geometry: Geometry
    voters: int = 1
    selection: str | None = None
    expected_skipped: float | None = None

    def state(self, model: torch.nn.Module) -> State:
        """See `Method`."""
        shape = shape_of(model)
        heads = local_heads(model, shape.heads)
        return make_state(
            np.full((shape.layers, heads.stop - heads.start, 1), self.threshold),
            rule=self.rule,
            geometry=self.geometry,
            devices=layer_devices(model, shape.layers),
            description=f"one threshold of {self.threshold:g}",
            voters=self.voters,
            selection=named_selection(self.selection),
            expected_skipped=self.expected_skipped,
        )
