# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What a patched model carries with it: thresholds, rule, geometry and counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bsfa_calib.statistics import Statistics
from bsfa_kernel import DEFAULT_GEOMETRY, Geometry

_ATTRIBUTE = "_bsfa_state"


@dataclass
class State:
    """State of one patched model. Each of its attention modules refers to it.

    Attributes:
        statistics: counters of the calls.
        thresholds: for each layer, float32 [heads, rows] on its device; empty for the baselines.
        rule: what scores are compared with.
        geometry: the sparsity block of the thresholds.
        description: the model and operating point that the thresholds are of.
        window: size of the sliding window, for that baseline.
        sparge: parameters of SpargeAttn, for that baseline.
    """

    statistics: Statistics
    thresholds: list[Tensor] = field(default_factory=list)
    rule: str = "absolute"
    geometry: Geometry = DEFAULT_GEOMETRY
    description: str = ""
    window: int | None = None
    sparge: dict[str, Any] = field(default_factory=dict)

    def layer_thresholds(self, layer: int, device: torch.device) -> Tensor:
        """Thresholds of a layer, float32 [heads, rows], on a device."""
        thresholds = self.thresholds[layer]
        if thresholds.device != device:
            # The model has been moved since it was patched.
            thresholds = self.thresholds[layer] = thresholds.to(device)
        return thresholds


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


def attention_shape(config: Any) -> tuple[int, int]:
    """Layers and query heads of a configuration."""
    return int(config.num_hidden_layers), int(config.num_attention_heads)


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
