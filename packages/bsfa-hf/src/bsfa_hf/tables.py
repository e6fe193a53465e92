# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""From a threshold table to a model's state, with every check that the two belong together."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bsfa_calib import ThresholdTable
from bsfa_calib.statistics import Statistics
from bsfa_hf.state import State, attention_shape
from bsfa_kernel import GEOMETRIES, RULES, Geometry

Table = ThresholdTable | str | os.PathLike[str]


def load_table(table: Table) -> ThresholdTable:
    """A table, or the one in a file; a ``.pt`` file of the paper's repository is converted.

    Raises:
        FileNotFoundError: there is no such file.
        ThresholdFileError: the file is not a threshold table.
    """
    if isinstance(table, ThresholdTable):
        return table
    path = Path(table)
    if path.suffix == ".pt" and path.is_file():
        from bsfa_calib import convert

        return convert.load_pt(path)
    return ThresholdTable.load(path)


def select_point(
    table: ThresholdTable, k: int | None, target_sparsity: float | None, max_loss: float | None
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], str]:
    """Thresholds [layers, heads, rows] of an operating point, and its name.

    A table with a single point needs none to be named.

    Raises:
        ValueError: the table does not hold the point; the message lists those it does.
    """
    named: dict[str, Any] = {"k": k, "target_sparsity": target_sparsity, "max_loss": max_loss}
    if all(value is None for value in named.values()) and len(table.points) == 1:
        named[table.axis] = table.points[0]
    thresholds = table.select(**named)
    axis, value = next((axis, value) for axis, value in named.items() if value is not None)
    return thresholds, f"{axis}={value}"


def make_state(
    table: ThresholdTable,
    config: Any,
    devices: Sequence[torch.device],
    *,
    k: int | None = None,
    target_sparsity: float | None = None,
    max_loss: float | None = None,
    heads: slice | None = None,
    check_model: bool = True,
) -> State:
    """The state of a model with a configuration.

    Args:
        table: its thresholds.
        config: configuration of the language part.
        devices: the device of each layer, or one for all.
        k: operating point, as the two that follow.
        target_sparsity: operating point.
        max_loss: operating point.
        heads: the query heads of this process, under tensor parallelism.
        check_model: whether the table must name the model that the configuration names.

    Raises:
        ValueError: the table is of another model, shape, geometry or rule, or lacks the point.
    """
    layers, all_heads = attention_shape(config)
    name = table.model or "a model without a name"
    if (table.layers, table.heads) != (layers, all_heads):
        raise ValueError(
            f"the thresholds of {name} are for {table.layers} layers and {table.heads} query "
            f"heads, and this model has {layers} layers and {all_heads} query heads"
        )
    geometry = Geometry(table.q_block, table.k_block)
    if geometry not in GEOMETRIES:
        raise ValueError(
            f"the thresholds of {name} are for sparsity blocks of {geometry}, and the kernels have "
            f"{', '.join(map(str, GEOMETRIES))}"
        )
    if table.rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {table.rule!r}")
    if check_model and not same_model(table.model, model_names(config)):
        raise ValueError(
            f"the thresholds are of {name}, and this model is {config._name_or_path}; if its "
            "weights are the same under another name, pass check_model=False"
        )
    thresholds, point = select_point(table, k, target_sparsity, max_loss)
    if heads is not None:
        thresholds = thresholds[:, heads]
    devices = list(devices) * (layers if len(devices) == 1 else 1)
    with torch.inference_mode(False):
        # A copy: the table's arrays cannot be written to, which torch warns of.
        tensors = [
            torch.from_numpy(np.array(layer, dtype=np.float32, order="C")).to(device)
            for layer, device in zip(thresholds, devices, strict=True)
        ]
    return State(
        statistics=Statistics(devices, thresholds.shape[1]),
        thresholds=tensors,
        rule=table.rule,
        geometry=geometry,
        description=f"{name} at {point}",
    )


def model_names(config: Any) -> list[str]:
    """The names that a model may go by, as far as its configuration tells."""
    path = str(getattr(config, "_name_or_path", "") or "")
    if not path:
        return []
    names = [path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]]
    # A snapshot in the cache of the Hub lies in .../models--owner--name/snapshots/commit.
    names += [part.rsplit("--", 1)[-1] for part in Path(path).parts if part.startswith("models--")]
    if os.path.isdir(path):
        names.append(Path(path).resolve().name)
        names += [file.stem for file in Path(path).glob("*.gguf")]
    return names


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
