# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What a model would do without this package: its own attention function and its own masks.

The name under which a switched model finds our functions carries the name that it replaced. Whoever
gets hold of the model's configuration can therefore do what the model did before.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

EAGER, SDPA = "eager", "sdpa"
_EAGER_FUNCTION = "eager_attention_forward"


class Implementation(str):
    """Name of an attention implementation, with the name that it replaced.

    Attributes:
        original: the name that the model's configuration had before.
    """

    original: str

    def __new__(cls, name: str, original: str = SDPA) -> Implementation:
        """Make a name that equals ``name`` and remembers ``original``."""
        made = super().__new__(cls, name)
        made.original = original
        return made


def original_of(config: Any) -> str:
    """The implementation that a switched configuration had before.

    A configuration that was never switched, but made with our name, has what transformers would
    have chosen for its model.
    """
    name = getattr(config, "_attn_implementation", None)
    original = getattr(name, "original", None)
    if original is not None:
        return original  # type: ignore[no-any-return]
    if torch.compiler.is_compiling():
        return SDPA
    return _default(config)


def _default(config: Any) -> str:
    from transformers import AutoModelForCausalLM

    try:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return SDPA
    return SDPA if getattr(model_class, "_supports_sdpa", False) else EAGER


def is_flash(original: str) -> bool:
    """Whether an implementation is one of FlashAttention, whose masks are 2-D."""
    return "flash" in original


def none_is_causal(original: str) -> bool:
    """Whether an implementation takes no mask for the causal one, in causal modules."""
    return original == SDPA or is_flash(original)


def own_mask(original: str) -> Callable[..., Any]:
    """The function that makes the masks of an implementation; one that makes none, without it."""
    function = ALL_MASK_ATTENTION_FUNCTIONS.get(original)
    return function if function is not None else _no_mask


def _no_mask(**_: Any) -> None:
    """What transformers does for an attention function without a mask function."""


def own_attention(module: torch.nn.Module, original: str) -> Callable[..., Any]:
    """The attention function of an implementation, as a module would call it.

    Raises:
        NotImplementedError: the module's own eager function cannot be found.
    """
    if original != EAGER:
        return ALL_ATTENTION_FUNCTIONS[original]  # type: ignore[no-any-return]
    for parent in type(module).__mro__:
        function = getattr(sys.modules[parent.__module__], _EAGER_FUNCTION, None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise NotImplementedError(
        f"{type(module).__name__} ran with eager attention before, and its module has no "
        f'{_EAGER_FUNCTION}: give the model attn_implementation="sdpa" first'
    )


def explicit_arguments(function: Callable[..., Any]) -> frozenset[str]:
    """The arguments that a function names in its signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(each.name for each in parameters if each.kind in named)


def with_original_name(config: Any) -> Any:
    """A view of a configuration that shares all of its attributes but shows the original name."""
    original = original_of(config)
    kind = type(
        type(config).__name__,
        (type(config),),
        {
            "__module__": type(config).__module__,
            "__deepcopy__": lambda view, memo: with_original_name(copy.deepcopy(config, memo)),
            "__reduce__": lambda view: (with_original_name, (config,)),
            "_attn_implementation": property(lambda view: original),
        },
    )
    view: Any = object.__new__(kind)
    view.__dict__ = config.__dict__
    return view


class UnderOriginalName:
    """A module as an attention function of transformers sees it that asks for the name."""

    def __init__(self, module: torch.nn.Module) -> None:
        """Show all of a module but its configuration."""
        self._module = module
        self.config = with_original_name(module.config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def rename(
    saved: Iterable[tuple[Any, Any]], model: torch.nn.Module, decoder: torch.nn.Module, name: str
) -> None:
    """Let the configurations of a model's text decoder, and those that hold them, carry a name.

    All others, such as a vision tower's, get back what they had.

    Args:
        saved: every configuration in the model with the implementation it had.
        model: the model.
        decoder: its text decoder.
        name: the new name of the implementation.
    """
    saved = list(saved)
    wanted = {id(model.config)}
    wanted |= {id(getattr(module, "config", None)) for module in decoder.modules()}
    for config, before in saved:
        original = getattr(before, "original", before)
        if original == name:
            # The model was made with our name and without a table.
            original = _default(config)
        held = (getattr(config, part, None) for part in getattr(config, "sub_configs", {}))
        if id(config) in wanted or any(id(part) in wanted for part in held):
            config._attn_implementation_internal = Implementation(name, original)
        else:
            config._attn_implementation_internal = original


@functools.cache
def takes_interface(module_class: Hashable) -> bool:
    """Whether a module takes its attention function from transformers' interface, or may do so."""
    assert isinstance(module_class, type)
    try:
        sources = [
            inspect.getsource(parent)
            for parent in module_class.__mro__
            if issubclass(parent, torch.nn.Module) and parent is not torch.nn.Module
        ]
    except (OSError, TypeError):
        return True
    words = ("ALL_ATTENTION_FUNCTIONS", "AttentionInterface", "attention_interface")
    return any(word in source for word in words for source in sources)


@functools.cache
def asks_for_name(module_class: Hashable, original: str, name: str) -> bool:
    """Whether a module does another thing under a name than under the original one.

    Some models choose keys by themselves under "eager" and "sdpa", and leave the choice to the
    attention function under every other name. Comparisons of the name with constants are looked
    for in the source of the class.
    """
    assert isinstance(module_class, type)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(module_class)))
    except (OSError, TypeError, SyntaxError):
        return False
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Compare)
            and len(node.ops) == 1
            and isinstance(node.left, ast.Attribute)
            and node.left.attr in ("_attn_implementation", "_attn_implementation_internal")
        ):
            try:
                names = ast.literal_eval(node.comparators[0])
            except ValueError:
                continue
            names = {names} if isinstance(names, str) else set(names)
            if (original in names) != (name in names):
                return True
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "is_flash_attention_requested"
            and is_flash(original)
        ):
            return True
    return False
