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

from bsfa_calib.point import PointLike, as_point
from bsfa_hf.automatic import named_point, named_selection, read_number
from bsfa_hf.baselines import SPARGE_DEFAULTS, SlidingWindow, SpargeAttention
from bsfa_hf.integration import disable, switch
from bsfa_hf.methods import BlockSparse, Method, Sdpa
from bsfa_hf.patch import patch_of

MODES = ("sdpa", "block_sparse", "sparge_attn", "sliding_window")


@dataclass
class AttentionConfig:
    """What attention a model is to have.

    Attributes:
        mode: one of ``MODES``.
        threshold_file: the table, for block_sparse: a file of this project or the paper's ``.pt``.
        block_sparse_topk: the operating point k, for block_sparse.
        sparge_attn_params: parameters of SpargeAttn, for sparge_attn; by default the paper's.
        sliding_window_size: keys that a query sees, for sliding_window.
        point: any operating point, for block_sparse, instead of block_sparse_topk.
        sliding_window_sink: the first keys, which every query sees too, for sliding_window.
        selection: from what scores blocks are chosen, for block_sparse: see `bsfa_hf.enable`.

    Raises:
        ValueError: the mode is unknown, lacks what it needs, or a value is out of its range.
    """

    mode: str = "sdpa"
    threshold_file: str | None = None
    block_sparse_topk: int | None = None
    sparge_attn_params: dict[str, Any] | None = None
    sliding_window_size: int | None = None
    point: PointLike | None = None
    sliding_window_sink: int = 0
    selection: str | None = None

    def __post_init__(self) -> None:
        """Check that the mode has what it needs."""
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.mode == "block_sparse":
            self._needs("threshold_file")
            if self.point is None:
                self._needs("block_sparse_topk", ", or another point")
        if self.mode == "sparge_attn" and self.sparge_attn_params is None:
            self.sparge_attn_params = dict(SPARGE_DEFAULTS)
        if self.mode == "sliding_window":
            self._needs("sliding_window_size")
        # What is out of range is refused here, before there is a model.
        if self.selection is not None:
            named_selection(self.selection)
        self.method()

    def method(self, *, check_model: bool = True) -> Method:
        """The attention that this describes.

        Args:
            check_model: refuse thresholds that name another model.

        Raises:
            ValueError: a value is out of its range.
        """
        if self.mode == "sdpa":
            return Sdpa()
        if self.mode == "block_sparse":
            point = as_point(self.point, k=self.block_sparse_topk)
            return BlockSparse(str(self.threshold_file), point, check_model, self.selection)
        if self.mode == "sliding_window":
            try:
                return SlidingWindow(self.sliding_window_size, self.sliding_window_sink)  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"sliding_window_size and its sink: {error}") from None
        return SpargeAttention(dict(self.sparge_attn_params or {}))

    def _needs(self, name: str, more: str = "") -> None:
        if getattr(self, name) is None:
            raise ValueError(f"{name} must be given for mode {self.mode!r}{more}")


def create_attention_config_from_env(
    environment: Mapping[str, str] = os.environ,
) -> AttentionConfig | None:
    """The configuration that environment variables describe.

    ``CUSTOM_ATTENTION_MODE`` names the mode. For block_sparse: ``CUSTOM_THRESHOLD_FILE``, and
    ``CUSTOM_BLOCK_SPARSE_TOPK`` or another point, as ``CUSTOM_POINT=target_sparsity=0.75`` or
    ``CUSTOM_TARGET_SPARSITY=0.75``, and ``CUSTOM_SELECTION``, or else ``BSFA_SELECTION``. For
    sparge_attn: ``CUSTOM_SPARGE_SIMTHRESHD1``, ``CUSTOM_SPARGE_TOPK`` and
    ``CUSTOM_SPARGE_PVTHRESHD``. For sliding_window: ``CUSTOM_SLIDING_WINDOW_SIZE`` and
    ``CUSTOM_SLIDING_WINDOW_SINK``.

    Returns:
        The configuration; None if ``CUSTOM_ATTENTION_MODE`` is not set.

    Raises:
        ValueError: a variable is missing, not a number, or out of its range.
    """

    def number(name: str, kind: type) -> Any:
        text = environment.get(f"CUSTOM_{name}")
        return read_number(f"CUSTOM_{name}", text, kind) if text else None

    mode = environment.get("CUSTOM_ATTENTION_MODE")
    if not mode:
        return None
    if mode == "block_sparse":
        return AttentionConfig(
            mode=mode,
            threshold_file=environment.get("CUSTOM_THRESHOLD_FILE"),
            block_sparse_topk=number("BLOCK_SPARSE_TOPK", int),
            point=named_point(environment.get, "CUSTOM_"),
            selection=named_selection(environment.get("CUSTOM_SELECTION"), environment),
        )
    if mode == "sparge_attn":
        params = dict(SPARGE_DEFAULTS)
        for name, kind in (("simthreshd1", float), ("topk", float), ("pvthreshd", int)):
            value = number(f"SPARGE_{name.upper()}", kind)
            if value is not None:
                params[name] = value
        return AttentionConfig(mode=mode, sparge_attn_params=params)
    if mode == "sliding_window":
        return AttentionConfig(
            mode=mode,
            sliding_window_size=number("SLIDING_WINDOW_SIZE", int),
            sliding_window_sink=number("SLIDING_WINDOW_SINK", int) or 0,
        )
    return AttentionConfig(mode=mode)


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
    switch(model, config.method(check_model=check_model), about=config)


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
    new = replace(config, block_sparse_topk=new_topk, point=None, threshold_file=file)
    change_attention_config(model, new)


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
    patch = patch_of(model)
    return patch.about if patch is not None else None


def restore_original_attention(model: torch.nn.Module) -> None:
    """Give a model the attention that it had before it was first injected."""
    disable(model)


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
