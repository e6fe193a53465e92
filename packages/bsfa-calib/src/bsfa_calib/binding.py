# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""From a threshold table to what a running model needs, with every check that the two fit.

Whoever runs a model (transformers, vLLM) describes it as a `ModelShape` and gets a `State`. Needs
torch and bsfa-kernel, no transformers: the extra ``runtime``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bsfa_calib.convert import Table, load_table
from bsfa_calib.point import Point, PointLike
from bsfa_calib.statistics import Statistics, moved
from bsfa_kernel import (
    DEFAULT_GEOMETRY,
    GEOMETRIES,
    RULES,
    SELECTIONS,
    VOTERS,
    Geometry,
    resolve_selection,
)


@dataclass(frozen=True)
class ModelShape:
    """What a table must fit.

    Attributes:
        layers: attention layers.
        heads: query heads of a layer, over all ranks.
        names: names that the model may go by; none if nothing is known.
        shown: what to call the model in messages.
    """

    layers: int
    heads: int
    names: tuple[str, ...] = ()
    shown: str = ""


@dataclass
class State:
    """Thresholds and counters of one running model, on the devices of its layers.

    Attributes:
        statistics: counters of the calls.
        thresholds: for each layer, float32 [heads, rows] on its device.
        rule: what scores are compared with.
        geometry: the sparsity block of the thresholds.
        description: the model and operating point that the thresholds are of.
        voters: one query row in 1, 2 or 4 votes.
        selection: from what scores blocks are chosen, one of ``bsfa_kernel.SELECTIONS``.
        expected_skipped: share of the blocks that the thresholds skip; None if it is not known.
    """

    statistics: Statistics
    thresholds: list[Tensor] = field(default_factory=list)
    rule: str = "absolute"
    geometry: Geometry = DEFAULT_GEOMETRY
    description: str = ""
    voters: int = 1
    selection: str = "auto"
    expected_skipped: float | None = None

    @property
    def kernel_options(self) -> dict[str, Any]:
        """What ``bsfa_kernel.block_sparse_attention`` is told of the thresholds."""
        return {
            "rule": self.rule,
            "geometry": self.geometry,
            "voters": self.voters,
            "selection": self.selection,
            "expected_skipped": self.expected_skipped if self.selection == "auto" else None,
        }

    def selection_for(self, q: Tensor, seqlen_k: int) -> str:
        """From what scores a call chooses its blocks: "exact" or "int8".

        Args:
            q: its queries.
            seqlen_k: its keys; of packed sequences, those of the longest.
        """
        how = {
            name: self.kernel_options[name] for name in ("geometry", "voters", "expected_skipped")
        }
        return resolve_selection(self.selection, q, seqlen_k, **how)

    def layer_thresholds(self, layer: int, device: torch.device) -> Tensor:
        """Thresholds of a layer, float32 [heads, rows], on a device."""
        thresholds = self.thresholds[layer]
        if thresholds.device != device:
            # The model has been moved since it was patched, or this is its first call.
            thresholds = self.thresholds[layer] = moved(thresholds, device)
        return thresholds


def bind(
    table: Table,
    shape: ModelShape,
    point: PointLike | None = None,
    *,
    devices: Sequence[torch.device],
    heads: slice | None = None,
    check_model: bool = True,
    voters: int | None = None,
    selection: str = "auto",
) -> State:
    """The state of a model that is to run with a table.

    Args:
        table: its thresholds, or the path of a file that holds them.
        shape: the model.
        point: the operating point, or its text; not needed if the table holds a single one.
        devices: the device of each layer, or one for all.
        heads: the query heads of this process, under tensor parallelism, from a first to an end;
            all by default.
        check_model: whether the table must be of a model with one of the shape's names.
        voters: refuse a table that is not for this number of voters; by default any is taken.
        selection: from what scores blocks are chosen, one of ``bsfa_kernel.SELECTIONS``.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the point is not one.
        ValueError: the table is of another model, shape, geometry or rule, or lacks the point or
            the heads.
    """
    table = load_table(table)
    name = table.model or "a model without a name"
    if (table.layers, table.heads) != (shape.layers, shape.heads):
        raise ValueError(
            f"the thresholds of {name} are for {table.layers} layers and {table.heads} query "
            f"heads, and this model has {shape.layers} layers and {shape.heads} query heads"
        )
    if check_model and not same_model(table.model, shape.names):
        raise ValueError(
            f"the thresholds are of {name}, and this model is {shape.shown or shape.names[0]}; if "
            "its weights are the same under another name, switch this check off: "
            'check_model=False, in a command --any-model, in vLLM "check_model": false'
        )
    if voters is not None and voters != table.voters:
        raise ValueError(
            f"the thresholds of {name} hold where one query row in {table.voters} votes, not one "
            f"in {voters}: calibrate others, with --voters {voters}"
        )
    if point is None and len(table.points) == 1:
        point = Point(table.axis, table.points[0])
    # Slices of numpy end silently at the last head; what is expected goes by all heads.
    own = table if heads is None else table.head_slice(heads.start, heads.stop)
    return make_state(
        own.select(point),
        rule=table.rule,
        geometry=Geometry(table.q_block, table.k_block),
        devices=devices,
        description=f"{name} at {point}",
        voters=table.voters,
        selection=selection,
        expected_skipped=table.expected_sparsity(point),
    )


def make_state(
    thresholds: npt.ArrayLike,
    *,
    rule: str,
    geometry: Geometry,
    devices: Sequence[torch.device],
    description: str,
    voters: int = 1,
    selection: str = "auto",
    expected_skipped: float | None = None,
) -> State:
    """The state of a model with thresholds of its shape.

    Args:
        thresholds: [layers, heads, rows].
        rule: what scores are compared with.
        geometry: the sparsity block of the thresholds.
        devices: the device of each layer, or one for all.
        description: what to call the thresholds in messages.
        voters: one query row in 1, 2 or 4 votes.
        selection: from what scores blocks are chosen, one of ``bsfa_kernel.SELECTIONS``.
        expected_skipped: share of the blocks that the thresholds skip, if it is known.

    Raises:
        ValueError: there is no such rule, selection or number of voters, or no kernel for the
            geometry.
    """
    if geometry not in GEOMETRIES:
        raise ValueError(
            f"the thresholds of {description} are for sparsity blocks of {geometry}, and the "
            f"kernels have {', '.join(map(str, GEOMETRIES))}"
        )
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if voters not in VOTERS:
        raise ValueError(f"voters must be one of {VOTERS}, got {voters!r}")
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    # A copy: the table's arrays cannot be written to, which torch warns of.
    values = np.array(thresholds, dtype=np.float32, order="C")
    devices = list(devices) * (len(values) if len(devices) == 1 else 1)
    # Tensors made in inference mode could not be used outside of it.
    with torch.inference_mode(False):
        tensors = [
            torch.from_numpy(layer).to(device)
            for layer, device in zip(values, devices, strict=True)
        ]
    return State(
        Statistics(devices, values.shape[1]),
        tensors,
        rule,
        geometry,
        description,
        voters,
        selection,
        expected_skipped,
    )


def same_model(name: str, names: Sequence[str]) -> bool:
    """Whether a table's model may be one of the names; nothing is known of an empty name."""
    wanted = _normal(name)
    if not wanted or not names:
        return True
    return any(_normal(other) == wanted for other in names)


def _normal(name: str) -> str:
    """A name without owner, quantisation and spelling."""
    base = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower().removesuffix(".gguf")
    base = re.sub(r"[-._](i?q\d(_\w+)?|f16|f32|bf16|fp16)$", "", base)
    return re.sub(r"[^a-z0-9]", "", base)
