# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""From the public functions to the operators, or past them where nothing must see the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bsfa_kernel._calls import AnyCall, AttendCall, ForwardCall


def can_bypass_dispatcher(call: ForwardCall) -> bool:
    """Whether plain CUDA tensors may go to the kernel at once, past dispatcher and checks.

    Those take as long as a launch. False if a tracer, mode, transform, profiler or autograd must
    see this call.
    """
    if torch.compiler.is_compiling():
        return False
    q, k, v, thresholds = call[:4]
    sinks = call.sinks
    return not (
        type(q) not in _PLAIN
        or type(k) not in _PLAIN
        or type(v) not in _PLAIN
        or type(thresholds) not in _PLAIN
        or not q.is_cuda
        or (sinks is not None and type(sinks) not in _PLAIN)
        or (
            torch.is_grad_enabled()
            and (
                q.requires_grad
                or k.requires_grad
                or v.requires_grad
                or (sinks is not None and sinks.requires_grad)
            )
        )
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def dispatch(operator: Callable[..., Any], call: AnyCall) -> Any:
    """Call an operator, below autograd where that has nothing to do.

    Autograd's step is in Python, and would be a good part of what a call costs on the host.
    """
    inputs = call[:3] if isinstance(call, (ForwardCall, AttendCall)) else call[:2]
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in (*inputs, call.sinks) if x is not None)
    ):
        return operator(*call)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*call)
