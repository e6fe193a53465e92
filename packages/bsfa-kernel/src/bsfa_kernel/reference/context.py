# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What the caller's context may not change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from bsfa_kernel._calls import AnyCall

_Call = TypeVar("_Call", bound=AnyCall)
_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context in which products are computed in the dtype of their factors.

    Some devices, "meta" among them, have no autocast, and torch raises where it is asked of them.
    """
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def in_own_dtypes(
    run: Callable[Concatenate[_Call, _Rest], _Result],
) -> Callable[Concatenate[_Call, _Rest], _Result]:
    """Run a call without gradients and without autocast, which would multiply in 16 bits."""

    def wrapped(call: _Call, /, *rest: _Rest.args, **named: _Rest.kwargs) -> _Result:
        # What is no tensor is refused by the checks of the call.
        device_type = call.q.device.type if isinstance(call.q, torch.Tensor) else "cpu"
        with torch.no_grad(), without_autocast(device_type):
            return run(call, *rest, **named)

    functools.update_wrapper(wrapped, run)
    return wrapped
