# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Switching a model to block-sparse attention and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from bsfa_calib import switch as switching
from bsfa_calib.binding import State
from bsfa_calib.convert import Table
from bsfa_calib.point import PointLike, PointOptions, as_point
from bsfa_calib.statistics import Statistics
from bsfa_hf.methods import BlockSparse, Method
from bsfa_hf.originals import rename, takes_interface
from bsfa_hf.patch import Patch, holders, originals, patch_of
from bsfa_hf.state import attention_modules, model_state, set_state, text_decoder

if TYPE_CHECKING:
    from typing_extensions import Unpack


def enable(
    model: torch.nn.Module,
    table: Table,
    point: PointLike | None = None,
    *,
    check_model: bool = True,
    selection: str | None = None,
    **named: Unpack[PointOptions],
) -> Statistics:
    """Switch a transformers model to block-sparse attention.

    No weight and no forward function is changed: the model gets another attention function from
    transformers' ``AttentionInterface``. Calling it on an enabled model replaces the thresholds.

    Args:
        model: a decoder model of transformers that takes its attention function from there, or
            what wraps one, as a PEFT model.
        table: thresholds of this model, or the path of a file that holds them.
        point: the operating point, a `Point` or its text, as ``"target_sparsity=0.75"``. One is
            needed unless the table holds a single point.
        check_model: refuse a table that names another model than the configuration does.
        selection: from what scores blocks are chosen: "exact", 16-bit ones; "int8", 8-bit ones,
            faster where much is skipped; "auto", by what the table is expected to skip. By default
            what the environment variable BSFA_SELECTION says, else "auto".
        named: or the point by the name of its axis: ``k``, ``target_sparsity`` or ``max_loss``.

    Returns:
        The model's statistics, a live view.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the point is not one.
        ValueError: the table does not fit the model or lacks the operating point, there is no such
            selection, or the model does not take its attention function from transformers'
            interface.
    """
    method = BlockSparse(table, as_point(point, **named), check_model, selection)
    return _statistics(switch(model, method))


@contextlib.contextmanager
def enabled(
    model: torch.nn.Module,
    table: Table,
    point: PointLike | None = None,
    *,
    check_model: bool = True,
    selection: str | None = None,
    **named: Unpack[PointOptions],
) -> Iterator[Statistics]:
    """`enable` for the time of a ``with`` statement; then the model is as it was before.

    Yields:
        The statistics of what is run within; they can be read afterwards too.
    """
    method = BlockSparse(table, as_point(point, **named), check_model, selection)
    with applied(model, method) as state:
        yield _statistics(state)


def disable(model: torch.nn.Module) -> None:
    """Give a model the attention that it had before `enable`; without one, do nothing."""
    set_state(model, None)
    patch = patch_of(model)
    if patch is not None:
        patch.undo(model)


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


def switch(model: torch.nn.Module, method: Method, about: Any = None) -> State | None:
    """Give a model another attention, and let its modules remember the original one.

    Args:
        model: a model of transformers, or what wraps one.
        method: the attention.
        about: what the patch is to remember beside that.

    Returns:
        The state of the method, if it has one.

    Raises:
        ImportError: the method needs a package that is not there.
        ValueError: the method does not fit the model, the model does not take its attention
            function from transformers' interface, or another model with the same configuration
            has another method.
    """
    model = _switchable(model)
    state = method.state(model)
    patch = patch_of(model)
    current = switching.implementations(model)
    for config, name in current:
        others = [other for other in holders(config) if other is not patch]
        if others and name != method.implementation:
            raise ValueError(
                "another model has the same configuration object and runs with the attention "
                f"{name!r}, so that this one cannot have {method.implementation!r}: give one of "
                "them a copy of the configuration"
            )
    kinds: set[Any] = {type(module) for module in attention_modules(model)}
    if not any(map(takes_interface, kinds)):
        raise switching.SwitchError(
            f"{type(model).__name__} does not take its attention function from transformers' "
            "AttentionInterface: it cannot be switched"
        )
    saved = originals(model)
    switching.switch(model, method.implementation)
    rename(saved, model, text_decoder(model), method.implementation)
    patch = patch or Patch(saved)
    patch.about = about
    patch.put(model)
    set_state(model, state)
    return state


@contextlib.contextmanager
def applied(model: torch.nn.Module, method: Method) -> Iterator[State | None]:
    """`switch` for the time of a ``with`` statement; then the model is as it was before."""
    model = _switchable(model)
    state, patch = model_state(model), patch_of(model)
    before = None if patch is None else (patch.saved, patch.about)
    current = switching.implementations(model)
    within = switch(model, method)
    try:
        yield within
    finally:
        disable(model)
        if before is not None:
            Patch(*before).put(model)
            switching.set_implementations(current)
        set_state(model, state)


def _switchable(model: torch.nn.Module) -> torch.nn.Module:
    """The model of transformers that a wrapper holds, which has the configurations."""
    return next((each for each in model.modules() if isinstance(each, PreTrainedModel)), model)


def _statistics(state: State | None) -> Statistics:
    assert state is not None
    return state.statistics
