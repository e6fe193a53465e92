# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""From the public functions to the operators, or past them where nothing must see the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bsfa_kernel._calls import AnyCall, ForwardCall, differentiable


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
                or thresholds.requires_grad
                or (sinks is not None and sinks.requires_grad)
            )
        )
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _in_forward_mode()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def dispatch(operator: Callable[..., Any], call: AnyCall) -> Any:
    """Call an operator, below autograd where that has nothing to do.

    Autograd's step is in Python, and would be a good part of what a call costs on the host.
    """
    if torch.compiler.is_compiling():
        if _in_forward_mode():  # a traced tensor does not say whether it has a derivative
            refuse_derivatives()
        return operator(*call)
    inputs = [x for x in differentiable(call) if x is not None]
    if torch._C._functorch.peek_interpreter_stack() is not None:
        inputs = [layer for x in inputs for layer in _layers(x)]
    if _in_forward_mode() and any(_tangent(x) is not None for x in inputs):
        refuse_derivatives()
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        if _in_transform_of_gradients():
            refuse_derivatives()
        return operator(*call)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*call)


def refuse_derivatives(*_: object) -> NoReturn:
    """Say that there are none.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "block-sparse attention has no backward pass, nor forward-mode derivatives: it is made for "
        "inference. Call it under torch.no_grad() or torch.inference_mode(), or train with dense "
        "attention"
    )


def _in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _layers(x: Tensor) -> Iterator[Tensor]:
    """A tensor and those that it wraps, but for vmap's, which know nothing of derivatives."""
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if not functorch.is_batchedtensor(x):
            yield x
        x = functorch.get_unwrapped(x)
    yield x


def _tangent(x: Tensor) -> Tensor | None:
    unpack: Any = forward_ad.unpack_dual
    return unpack(x).tangent  # type: ignore[no-any-return]


def _in_transform_of_gradients() -> bool:
    """Whether torch.func.grad, vjp or the like is at work, which will ask for a backward pass."""
    stack: Sequence[Any] = torch._C._functorch.get_interpreter_stack() or ()
    return any(each.key() == torch._C._functorch.TransformType.Grad for each in stack)
