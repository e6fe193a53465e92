# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What a patched model carries with it, and what of a model a table must fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bsfa_calib.binding import ModelShape, State

_ATTRIBUTE = "_bsfa_state"


def state_of(module: torch.nn.Module) -> State | None:
    """The state of an attention module's model."""
    return getattr(module, _ATTRIBUTE, None)


def model_state(model: torch.nn.Module) -> State | None:
    """The state of a model."""
    for module in model.modules():
        state = state_of(module)
        if state is not None:
            return state
    return None


def set_state(model: torch.nn.Module, state: State | None) -> None:
    """Give all attention modules of a model a state, or take it from them."""
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            if state is not None:
                setattr(module, _ATTRIBUTE, state)
            elif state_of(module) is not None:
                delattr(module, _ATTRIBUTE)


def layer_devices(model: torch.nn.Module, layers: int) -> list[torch.device]:
    """Where each layer computes, as far as its parameters tell."""
    fallback = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    devices = [fallback or torch.device("cpu")] * layers
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and 0 <= index < layers:
            parameter = next(module.parameters(), None)
            if parameter is not None and parameter.device.type != "meta":
                devices[index] = parameter.device
    return devices


def text_config(model: torch.nn.Module) -> Any:
    """The configuration of a model's language part."""
    return model.config.get_text_config()  # type: ignore[operator,union-attr]


def model_shape(config: Any) -> ModelShape:
    """What a table for a model with a configuration, that of its language part, must fit."""
    return ModelShape(
        layers=int(config.num_hidden_layers),
        heads=int(config.num_attention_heads),
        names=tuple(model_names(config)),
        shown=str(getattr(config, "_name_or_path", "") or ""),
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


def local_heads(model: torch.nn.Module, heads: int) -> slice:
    """The query heads that this process has of a model: all, or a slice under tensor parallelism.

    Raises:
        ValueError: the heads cannot be told.
    """
    size = getattr(model, "_tp_size", None) or 1
    if size == 1:
        return slice(0, heads)
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or heads % size:
        raise ValueError(
            f"under tensor parallelism the {heads} query heads must be split evenly among the "
            f"ranks of the model's device mesh, got {size} ranks"
            + ("" if mesh is not None else " and no mesh")
        )
    names: Sequence[str] = mesh.mesh_dim_names or ()
    rank = int(mesh["tp"].get_local_rank() if "tp" in names else mesh.get_local_rank())
    each = heads // size
    return slice(rank * each, (rank + 1) * each)
