# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What a switched model was before, kept by its own modules.

Whatever wraps the model later, or is taken from it, finds the patch in the modules within. Models
that share a configuration share the name of its attention function: each has a patch, and the name
is restored with the last of them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from bsfa_calib.switch import Implementations, implementations, set_implementations

_ATTRIBUTE = "_bsfa_patch"

_patches: weakref.WeakSet[Patch] = weakref.WeakSet()


class Patch:
    """A model's attention implementations from before it was switched.

    Attributes:
        saved: each configuration within the model, with its implementation; empty once restored.
        about: what the model was switched with, for who asks later.
    """

    def __init__(self, saved: Implementations, about: Any = None) -> None:
        """Remember what was."""
        self.saved = saved
        self.about = about
        _patches.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _patches.add(self)

    def holds(self, config: Any) -> bool:
        """Whether a configuration is one that this patch has switched."""
        return any(config is held for held, _ in self.saved)

    def put(self, model: torch.nn.Module) -> None:
        """Let the modules of a model refer to this patch."""
        for module in model.modules():
            if self.holds(getattr(module, "config", None)):
                setattr(module, _ATTRIBUTE, self)

    def undo(self, model: torch.nn.Module) -> None:
        """Restore what was, and leave nothing behind."""
        saved, self.saved = self.saved, []
        _patches.discard(self)
        set_implementations([(config, name) for config, name in saved if not holders(config)])
        for module in model.modules():
            vars(module).pop(_ATTRIBUTE, None)


def patch_of(model: torch.nn.Module) -> Patch | None:
    """The patch of a model or of the model within a wrapper."""
    for module in model.modules():
        patch: Patch | None = vars(module).get(_ATTRIBUTE)
        if patch is not None and patch.saved:
            return patch
    return None


def holders(config: Any) -> list[Patch]:
    """The patches of all models that have switched a configuration."""
    return [patch for patch in list(_patches) if patch.holds(config)]


def originals(model: torch.nn.Module) -> Implementations:
    """Each configuration within a model, with its implementation before anything was switched."""
    return [
        next(
            (entry for patch in holders(config) for entry in patch.saved if entry[0] is config), now
        )
        for now in implementations(model)
        for config in now[:1]
    ]
