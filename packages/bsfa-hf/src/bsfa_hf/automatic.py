# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Thresholds for a model that was loaded with ``attn_implementation="bsfa"`` and never enabled."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import torch

from bsfa_hf.state import State
from bsfa_hf.tables import load_table, make_state

_HOW = (
    'attn_implementation="bsfa" needs a threshold table: call bsfa_hf.enable(model, table, k=...), '
    "or set config.bsfa_thresholds (and config.bsfa_k) or the environment variables "
    "BSFA_THRESHOLDS and BSFA_K before the first forward pass"
)

# By the identity of the configuration, which its model's modules share; it has no hash.
_states: dict[int, State] = {}
_lock = threading.Lock()


def state_for(module: torch.nn.Module) -> State:
    """The state of a module whose model was not enabled, made from configuration or environment.

    Raises:
        ValueError: no table is named, or it does not fit the model.
    """
    config: Any = getattr(module, "config", None)
    with _lock:
        state = _states.get(id(config))
        if state is None:
            path = getattr(config, "bsfa_thresholds", None) or os.environ.get("BSFA_THRESHOLDS")
            if config is None or not path:
                raise ValueError(_HOW)
            named = getattr(config, "bsfa_k", None) or os.environ.get("BSFA_K")
            try:
                k = None if named is None else int(named)
            except ValueError:
                raise ValueError(f"BSFA_K must be a whole number, got {named!r}") from None
            parameter = next(module.parameters(), torch.zeros(0))
            state = make_state(load_table(path), config, [parameter.device], k=k)
            _states[id(config)] = state
            weakref.finalize(config, _states.pop, id(config), None)
    object.__setattr__(module, "_bsfa_state", state)
    return state
