# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The names of the paper's repository, so that scripts written for it run with another import.

Differences: any model that takes its attention function from transformers' interface is served, not
Llama alone; prefill in chunks, padding and static caches are right; `restore_original_attention`
restores; ``sliding_window`` holds in decode steps too and needs no further package.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from bsfa_calib.statistics import Statistics
from bsfa_hf import attention, baselines
from bsfa_hf.integration import disable, switch
from bsfa_hf.state import State, attention_shape, layer_devices, local_heads, text_config
from bsfa_hf.tables import load_table, make_state

MODES = ("sdpa", "block_sparse", "sparge_attn", "sliding_window")

_CONFIG = "_bsfa_attention_config"


@dataclass
class AttentionConfig:
    """What attention a model is to have.

    Attributes:
        mode: one of ``MODES``.
        threshold_file: the table, for block_sparse: a file of this project or the paper's ``.pt``.
        block_sparse_topk: the operating point k, for block_sparse.
        sparge_attn_params: parameters of SpargeAttn, for sparge_attn; by default the paper's.
        sliding_window_size: keys that a query sees, for sliding_window.

    Raises:
        ValueError: the mode is unknown, or lacks what it needs.
    """

    mode: str = "sdpa"
    threshold_file: str | None = None
    block_sparse_topk: int | None = None
    sparge_attn_params: dict[str, Any] | None = None
    sliding_window_size: int | None = None

    def __post_init__(self) -> None:
        """Check that the mode has what it needs."""
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.mode == "block_sparse":
            _needs(self, "threshold_file")
            _needs(self, "block_sparse_topk")
        if self.mode == "sparge_attn" and self.sparge_attn_params is None:
            self.sparge_attn_params = dict(baselines.SPARGE_DEFAULTS)
        if self.mode == "sliding_window":
            _needs(self, "sliding_window_size")
            size = self.sliding_window_size
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(
                    f"sliding_window_size must be an integer of at least 1, got {size!r}"
                )


def _needs(config: AttentionConfig, name: str) -> None:
    if getattr(config, name) is None:
        raise ValueError(f"{name} must be given for mode {config.mode!r}")


def create_attention_config_from_env(
    environment: Mapping[str, str] = os.environ,
) -> AttentionConfig | None:
    """The configuration that environment variables describe.

    ``CUSTOM_ATTENTION_MODE`` names the mode; ``CUSTOM_THRESHOLD_FILE`` and
    ``CUSTOM_BLOCK_SPARSE_TOPK`` are for block_sparse, ``CUSTOM_SPARGE_SIMTHRESHD1``,
    ``CUSTOM_SPARGE_TOPK`` and ``CUSTOM_SPARGE_PVTHRESHD`` for sparge_attn,
    ``CUSTOM_SLIDING_WINDOW_SIZE`` for sliding_window.

    Returns:
        The configuration; None if ``CUSTOM_ATTENTION_MODE`` is not set.

    Raises:
        ValueError: a variable is missing or not a number.
    """
    mode = environment.get("CUSTOM_ATTENTION_MODE")
    if not mode:
        return None
    if mode == "block_sparse":
        return AttentionConfig(
            mode=mode,
            threshold_file=environment.get("CUSTOM_THRESHOLD_FILE"),
            block_sparse_topk=_number(environment, "CUSTOM_BLOCK_SPARSE_TOPK", int),
        )
    if mode == "sparge_attn":
        params = dict(baselines.SPARGE_DEFAULTS)
        for name, kind in (("simthreshd1", float), ("topk", float), ("pvthreshd", int)):
            value = _number(environment, f"CUSTOM_SPARGE_{name.upper()}", kind)
            if value is not None:
                params[name] = value
        return AttentionConfig(mode=mode, sparge_attn_params=params)
    if mode == "sliding_window":
        size = _number(environment, "CUSTOM_SLIDING_WINDOW_SIZE", int)
        return AttentionConfig(mode=mode, sliding_window_size=size)
    return AttentionConfig(mode=mode)


def _number(environment: Mapping[str, str], name: str, kind: type) -> Any:
    text = environment.get(name)
    if not text:
        return None
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {wanted}, got {text!r}") from None


def inject_custom_attention(
    model: torch.nn.Module,
    config: AttentionConfig | None = None,
    model_type: str | None = None,
    *,
    check_model: bool = True,
) -> None:
    """Give a model the attention that a configuration describes.

    Args:
        model: a model of transformers.
        config: the attention; taken from the environment by default.
        model_type: not needed; accepted for scripts that pass it.
        check_model: refuse thresholds that name another model.

    Raises:
        FileNotFoundError: there is no such threshold file.
        ImportError: sparge_attn without its package.
        ValueError: no configuration, or one that does not fit the model.
    """
    if config is None:
        config = create_attention_config_from_env()
    if config is None:
        raise ValueError(
            "no attention config: pass an AttentionConfig, or set the environment variable "
            "CUSTOM_ATTENTION_MODE"
        )
    if config.mode == "sdpa":
        switch(model, "sdpa", None)
    elif config.mode == "block_sparse":
        switch(model, attention.NAME, _block_sparse_state(model, config, check_model))
    elif config.mode == "sliding_window":
        state = _baseline_state(model)
        state.window = config.sliding_window_size
        switch(model, baselines.WINDOW_NAME, state)
    else:
        baselines.sparge_function()
        state = _baseline_state(model)
        state.sparge = dict(config.sparge_attn_params or {})
        switch(model, baselines.SPARGE_NAME, state)
    setattr(model, _CONFIG, config)


def _block_sparse_state(
    model: torch.nn.Module, config: AttentionConfig, check_model: bool
) -> State:
    assert config.threshold_file is not None
    shape = text_config(model)
    layers, heads = attention_shape(shape)
    return make_state(
        load_table(config.threshold_file),
        shape,
        layer_devices(model, layers),
        k=config.block_sparse_topk,
        heads=local_heads(model, heads),
        check_model=check_model,
    )


def _baseline_state(model: torch.nn.Module) -> State:
    layers, heads = attention_shape(text_config(model))
    return State(Statistics(layer_devices(model, layers), heads))


def change_attention_config(
    model: torch.nn.Module, new_config: AttentionConfig, model_type: str | None = None
) -> None:
    """Give a model that has been injected another attention.

    Raises:
        ValueError: the model has not been injected; or as `inject_custom_attention`.
    """
    _current(model)
    inject_custom_attention(model, new_config, model_type)


def update_block_sparse_topk(
    model: torch.nn.Module, new_topk: int, threshold_file: str | None = None
) -> None:
    """Change k of a model in mode block_sparse.

    Args:
        model: a model that has been injected.
        new_topk: the new k.
        threshold_file: another table; the present one by default.

    Raises:
        ValueError: the model is in another mode, or the table does not hold this k.
    """
    config = _current(model, "block_sparse")
    file = threshold_file or config.threshold_file
    change_attention_config(model, replace(config, block_sparse_topk=new_topk, threshold_file=file))


def update_sparge_attn_params(model: torch.nn.Module, **new_params: Any) -> None:
    """Change some parameters of a model in mode sparge_attn.

    Raises:
        ValueError: the model is in another mode.
    """
    config = _current(model, "sparge_attn")
    params = {**(config.sparge_attn_params or {}), **new_params}
    change_attention_config(model, replace(config, sparge_attn_params=params))


def get_current_attention_config(model: torch.nn.Module) -> AttentionConfig | None:
    """The configuration that a model was injected with; None if it was not."""
    return getattr(model, _CONFIG, None)


def restore_original_attention(model: torch.nn.Module) -> None:
    """Give a model the attention that it had before it was first injected."""
    disable(model)
    if get_current_attention_config(model) is not None:
        delattr(model, _CONFIG)


def _current(model: torch.nn.Module, mode: str | None = None) -> AttentionConfig:
    config = get_current_attention_config(model)
    if config is None:
        raise ValueError(
            "this model has no custom attention yet: call inject_custom_attention first"
        )
    if mode is not None and config.mode != mode:
        raise ValueError(
            f"this model is in mode {config.mode!r}, not {mode!r}: use change_attention_config"
        )
    return config
