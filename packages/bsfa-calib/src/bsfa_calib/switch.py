# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Give a transformers model another attention function, and give it back as it was.

Only attributes of the model's configurations are read and set; transformers itself is imported by
`register` alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

# What `implementations` remembers: each configuration and the name of its attention function.
Implementations: TypeAlias = "list[tuple[Any, Any]]"


class SwitchError(ValueError):
    """The model does not take its attention function from transformers' interface."""


def register(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make an attention function, and what makes its masks, known to transformers under a name.

    Without a mask function of the same name, transformers passes no mask at all.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def implementations(model: Any) -> Implementations:
    """Every configuration within a model that names an attention function, with that name.

    Args:
        model: a torch module; modules without a configuration are passed over.
    """
    found: dict[int, Any] = {}
    pending = [getattr(module, "config", None) for module in model.modules()]
    while pending:
        config = pending.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation"):
            continue
        found[id(config)] = config
        pending += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [(config, config._attn_implementation) for config in found.values()]


def set_implementations(saved: Implementations) -> None:
    """Give every configuration the name that `implementations` found."""
    for config, name in saved:
        # The internal name, because setting the public one sets that of sub-configurations too.
        config._attn_implementation_internal = name


def switch(model: Any, name: str) -> None:
    """Let a model take its attention from a function that `register` made known.

    Raises:
        SwitchError: the model does not take its attention function from transformers' interface;
            it is as it was.
    """
    saved = implementations(model)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(name)
    current = model.config.get_text_config()._attn_implementation
    if current != name:
        set_implementations(saved)
        raise SwitchError(
            f"{type(model).__name__} does not take its attention function from transformers' "
            f"AttentionInterface (it stays {current!r}): it cannot be switched"
        )


@contextlib.contextmanager
def switched(model: Any, name: str) -> Iterator[None]:
    """`switch` for the time of a ``with`` statement; then the model is as it was before."""
    saved = implementations(model)
    try:
        switch(model, name)
        yield
    finally:
        set_implementations(saved)
