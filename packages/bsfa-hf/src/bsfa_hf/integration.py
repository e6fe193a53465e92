# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Switching a model to block-sparse attention and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from bsfa_calib.statistics import Statistics
from bsfa_hf import attention
from bsfa_hf.originals import rename, takes_interface
from bsfa_hf.state import (
    State,
    attention_modules,
    attention_shape,
    layer_devices,
    local_heads,
    model_state,
    set_state,
    text_config,
    text_decoder,
)
from bsfa_hf.tables import Table, load_table, make_state

_ORIGINAL = "_bsfa_original"


def enable(
    model: torch.nn.Module,
    table: Table,
    *,
    k: int | None = None,
    target_sparsity: float | None = None,
    max_loss: float | None = None,
    check_model: bool = True,
) -> Statistics:
    """Switch a transformers model to block-sparse attention.

    No weight and no forward function is changed: the model gets another attention function from
    transformers' ``AttentionInterface``. Calling it on an enabled model replaces the thresholds.

    Args:
        model: a decoder model of transformers that takes its attention function from there.
        table: thresholds of this model, or the path of a file that holds them.
        k: the operating point: key blocks kept a query block beside the forced ones. One of k,
            target_sparsity and max_loss is needed unless the table holds a single point.
        target_sparsity: the operating point, of a table with that axis.
        max_loss: the operating point, of a table with that axis.
        check_model: refuse a table that names another model than the configuration does.

    Returns:
        The model's statistics, a live view.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the table does not fit the model or lacks the operating point, or the model does
            not take its attention function from transformers' interface.
    """
    config = text_config(model)
    layers, heads = attention_shape(config)
    state = make_state(
        load_table(table),
        config,
        layer_devices(model, layers),
        k=k,
        target_sparsity=target_sparsity,
        max_loss=max_loss,
        heads=local_heads(model, heads),
        check_model=check_model,
    )
    switch(model, attention.NAME, state)
    return state.statistics


def disable(model: torch.nn.Module) -> None:
    """Give a model the attention that it had before `enable`; without one, do nothing."""
    original = getattr(model, _ORIGINAL, None)
    set_state(model, None)
    if original is not None:
        _set_implementations(model, original)
        delattr(model, _ORIGINAL)


@contextlib.contextmanager
def enabled(
    model: torch.nn.Module,
    table: Table,
    *,
    k: int | None = None,
    target_sparsity: float | None = None,
    max_loss: float | None = None,
    check_model: bool = True,
) -> Iterator[Statistics]:
    """`enable` for the time of a ``with`` statement; then the model is as it was before.

    Yields:
        The statistics of what is run within; they can be read afterwards too.
    """
    state, original = model_state(model), getattr(model, _ORIGINAL, None)
    current = _implementations(model)
    statistics = enable(
        model,
        table,
        k=k,
        target_sparsity=target_sparsity,
        max_loss=max_loss,
        check_model=check_model,
    )
    try:
        yield statistics
    finally:
        disable(model)
        if original is not None:
            setattr(model, _ORIGINAL, original)
        _set_implementations(model, current)
        set_state(model, state)


def stats(model: torch.nn.Module) -> Statistics:
    """The statistics of a model since it was enabled or `reset`.

    Raises:
        ValueError: the model has not been enabled.
    """
    state = model_state(model)
    if state is None:
        raise ValueError(
            "this model has not run with block-sparse attention: call bsfa_hf.enable first"
        )
    return state.statistics


def reset(model: torch.nn.Module) -> None:
    """Set a model's statistics to zero.

    Raises:
        ValueError: the model has not been enabled.
    """
    stats(model).reset()


def switch(model: torch.nn.Module, implementation: str, state: State | None) -> None:
    """Give a model another attention function, with its state, and remember the original one.

    Raises:
        ValueError: the model does not take its attention function from transformers' interface.
    """
    current = _implementations(model)
    settable: Any = model
    if hasattr(model, "set_attn_implementation"):
        settable.set_attn_implementation(implementation)
    config: Any = model.config
    kinds: set[Any] = {type(module) for module in attention_modules(model)}
    if text_config(model)._attn_implementation != implementation or not any(
        map(takes_interface, kinds)
    ):
        _set_implementations(model, current)
        raise ValueError(
            f"{type(model).__name__} does not take its attention function from transformers' "
            f"AttentionInterface (it stays {config._attn_implementation!r}): it cannot be switched"
        )
    rename(current, model, text_decoder(model), implementation)
    if not hasattr(model, _ORIGINAL):
        setattr(model, _ORIGINAL, current)
    set_state(model, state)


def _configs(model: torch.nn.Module) -> list[Any]:
    """Every configuration in a model that names an attention implementation."""
    found: dict[int, Any] = {}
    pending = [getattr(module, "config", None) for module in model.modules()]
    while pending:
        config = pending.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation"):
            continue
        found[id(config)] = config
        pending += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return list(found.values())


def _implementations(model: torch.nn.Module) -> list[tuple[Any, Any]]:
    return [(config, config._attn_implementation) for config in _configs(model)]


def _set_implementations(model: torch.nn.Module, implementations: list[tuple[Any, Any]]) -> None:
    for config, implementation in implementations:
        # The internal name, because setting the public one sets that of sub-configurations too.
        config._attn_implementation_internal = implementation
