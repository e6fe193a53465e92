# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Decoder layers that run again in the backward pass, so that little of them is kept until then."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def recomputed_layers(model: Any) -> Iterator[None]:
    """Keep of each decoder layer its inputs alone for a backward pass within the context.

    Of other layers than those that transformers itself would recompute, everything is kept.

    Args:
        model: of transformers. Its parameters and modes are left alone: unlike its own gradient
            checkpointing this needs no training mode, which may switch dropout on.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    own = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = functools.partial(_checkpointed, layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            _put_back(layer, forward)


def _put_back(layer: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        layer.__dict__.pop("forward", None)
    else:
        layer.forward = forward


def _checkpointed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    # The backward pass of a GPU has a thread of its own, to which the attention that is switched
    # on here is unknown.
    context = contextvars.copy_context()
    return checkpoint(
        functools.partial(context.run, forward),
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        **named,
    )
