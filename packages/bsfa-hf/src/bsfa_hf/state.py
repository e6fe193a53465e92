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
from bsfa_calib.reasons import Reason
from bsfa_hf.originals import Implementation, asks_for_name, with_original_name

_ATTRIBUTE = "_bsfa_state"
_OWN_CONFIG = "_bsfa_own_config"
_HOOK = "_bsfa_hook"


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
    """Give the attention modules of a model's text decoder a state, or take it from all modules."""
    for module in model.modules():
        vars(module).pop(_ATTRIBUTE, None)
        if _OWN_CONFIG in vars(module):
            module.config = vars(module).pop(_OWN_CONFIG)
            vars(module).pop(_HOOK).remove()
    if state is None:
        return
    for module in attention_modules(model):
        setattr(module, _ATTRIBUTE, state)
        config = getattr(module, "config", None)
        name = getattr(config, "_attn_implementation", "")
        kind: Any = type(module)
        if isinstance(name, Implementation) and asks_for_name(kind, name.original, name):
            # It does what it did before, our function is never called, and it is counted here.
            setattr(module, _OWN_CONFIG, config)
            module.config = with_original_name(config)
            setattr(module, _HOOK, module.register_forward_pre_hook(_count_own_name))


def _count_own_name(module: torch.nn.Module, _: Any) -> None:
    state, layer = state_of(module), getattr(module, "layer_idx", None)
    if state is not None and isinstance(layer, int) and layer < state.statistics.layers:
        state.statistics.count_dense(layer, Reason.OWN_NAME)


def text_decoder(model: torch.nn.Module) -> torch.nn.Module:
    """The part of a model that writes text; the whole, if it does not say which."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if find is not None else None
    # Some models name their output layer so.
    if isinstance(decoder, torch.nn.Module) and any(map(_has_index, decoder.modules())):
        return decoder
    return model


def attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of the text decoder that know which layer they belong to."""
    return list(filter(_has_index, text_decoder(model).modules()))


def _has_index(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int)


def layer_devices(model: torch.nn.Module, layers: int) -> list[torch.device]:
    """Where each layer computes, as far as its parameters tell."""
    fallback = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    devices = [fallback or torch.device("cpu")] * layers
    for module in attention_modules(model):
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and 0 <= index < layers:
            parameter = next(module.parameters(), None)
            if parameter is not None and parameter.device.type != "meta":
                devices[index] = parameter.device
    return devices


def text_config(model: torch.nn.Module) -> Any:
    """The configuration of a model's text decoder."""
    config = getattr(text_decoder(model), "config", model.config)
    return config.get_text_config()  # type: ignore[operator,union-attr]


def shape_of(model: torch.nn.Module) -> ModelShape:
    """What a table for a model must fit: its text decoder's shape, and the name of the whole.

    Raises:
        ValueError: there is no one number of heads.
    """
    return model_shape(text_config(model), model.config)


def model_shape(config: Any, named: Any = None) -> ModelShape:
    """What a table for a model with a configuration, that of its text decoder, must fit.

    Args:
        config: of the text decoder.
        named: that which has the model's name, where it is another.

    Raises:
        ValueError: there is no one number of heads.
    """
    layers, heads = attention_shape(config)
    named = config if named is None else named
    return ModelShape(
        layers=layers,
        heads=heads,
        names=tuple(model_names(named)),
        shown=str(getattr(named, "_name_or_path", "") or ""),
    )


def attention_shape(config: Any) -> tuple[int, int]:
    """Layers and query heads of the text decoder that a configuration describes.

    Where layers differ in their number of heads, those with full attention count.

    Raises:
        ValueError: there is no one number of heads.
    """
    layers = getattr(config, "decoder_layers", None) or config.num_hidden_layers
    try:
        heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    except AttributeError:
        raise ValueError(f"a model of type {config.model_type} has no attention heads") from None
    except RuntimeError:  # transformers' word for what differs between layers
        kinds = zip(config.layer_types, config.per_layer_config, strict=True)
        found = {each.num_attention_heads for kind, each in kinds if kind == "full_attention"}
        if len(found) != 1:
            raise ValueError(
                "the layers with full attention must have one number of query heads, and this "
                f"model's have {sorted(found)}"
            ) from None
        (heads,) = found
    return int(layers), int(heads)


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
