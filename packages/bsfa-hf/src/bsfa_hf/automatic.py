# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Thresholds for a model that was loaded with ``attn_implementation="bsfa"`` and never enabled."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bsfa_calib.binding import State, bind
from bsfa_calib.point import AXES, Point, as_point
from bsfa_hf.patch import holders
from bsfa_hf.state import model_shape
from bsfa_kernel import SELECTIONS

_HOW = (
    'attn_implementation="bsfa" needs a threshold table: call bsfa_hf.enable(model, table, point), '
    "or set config.bsfa_thresholds and config.bsfa_point, or the environment variables "
    "BSFA_THRESHOLDS and BSFA_POINT (as target_sparsity=0.75), before the first forward pass"
)

# By the identity of the configuration, which its model's modules share; it has no hash.
_states: dict[int, State] = {}
_lock = threading.Lock()


def state_for(module: torch.nn.Module) -> State | None:
    """The state of a module whose model was not enabled, made from configuration or environment.

    Returns:
        The state; None if another model with the same configuration object was enabled, and this
        one is to run as it did before.

    Raises:
        ValueError: no table is named, or it does not fit the model.
    """
    config: Any = getattr(module, "config", None)
    with _lock:
        state = _states.get(id(config))
        if state is None:
            path = getattr(config, "bsfa_thresholds", None) or os.environ.get("BSFA_THRESHOLDS")
            if config is None or not path:
                if config is not None and holders(config):
                    return None
                raise ValueError(_HOW)
            point = named_point(lambda name: getattr(config, name, None), "bsfa_")
            point = point or named_point(os.environ.get, "BSFA_")
            parameter = next(module.parameters(), torch.zeros(0))
            selection = named_selection(getattr(config, "bsfa_selection", None))
            state = bind(
                *(path, model_shape(config), point),
                devices=[parameter.device],
                selection=selection,
            )
            _states[id(config)] = state
            weakref.finalize(config, _states.pop, id(config), None)
    object.__setattr__(module, "_bsfa_state", state)
    return state


def named_point(lookup: Callable[[str], Any], prefix: str) -> Point | None:
    """The operating point that attributes or variables name.

    Args:
        lookup: gives the value of a name, or None.
        prefix: what the names begin with, "point" or the name of an axis comes after it; they are
            in upper case if the prefix is.

    Raises:
        ValueError: a value is not a point or not a number, or several points are named.
    """
    given = []
    for name in ("point", *AXES):
        variable = prefix + (name.upper() if prefix.isupper() else name)
        value = lookup(variable)
        if value is None or value == "":
            continue
        try:
            if name == "point":
                given.append(as_point(value))
            else:
                number = read_number(variable, str(value), int if name == "k" else float)
                given.append(Point(name, number))
        except (TypeError, ValueError) as error:
            text = str(error)
            raise ValueError(text if variable in text else f"{variable}: {text}") from None
    if len(given) > 1:
        raise ValueError(f"name one operating point, got {' and '.join(map(str, given))}")
    return given[0] if given else None


def named_selection(given: str | None = None, environment: Mapping[str, str] = os.environ) -> str:
    """From what scores blocks are to be chosen: as given, or as BSFA_SELECTION says, or "auto".

    Args:
        given: a selection; None or "" leaves it to the environment.
        environment: where BSFA_SELECTION is looked up.

    Raises:
        ValueError: it is not one of ``bsfa_kernel.SELECTIONS``.
    """
    selection = given or environment.get("BSFA_SELECTION") or "auto"
    if selection not in SELECTIONS:
        name = "selection" if given else "BSFA_SELECTION"
        raise ValueError(f"{name} must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    return selection


def read_number(name: str, text: str, kind: type) -> Any:
    """A number that a variable holds as text.

    Raises:
        ValueError: it does not.
    """
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {wanted}, got {text!r}") from None
