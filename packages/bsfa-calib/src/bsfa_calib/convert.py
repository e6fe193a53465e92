# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Read the threshold files (``.pt``) of the paper's repository."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from bsfa_calib.thresholds import ThresholdFileError, ThresholdTable


def load_pt(path: str | os.PathLike[str], *, model: str = "", revision: str = "") -> ThresholdTable:
    """The table that a ``.pt`` file of the paper's repository holds. Needs torch.

    Such a file is a dict with the tensor ``thresholds`` ``[k_values, layers, heads, q_blocks]``,
    the list ``k_values``, and ``q_block_size`` and ``k_block_size`` (128 and 64 where missing).
    It is read with ``weights_only=True``, so that nothing in it can run.

    Args:
        path: the file.
        model: name of the model that it belongs to; the file does not say.
        revision: the model's revision.

    Raises:
        FileNotFoundError: there is no such file.
        ThresholdFileError: the file is not that.
    """
    import torch

    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)}")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        reason = " ".join(str(error).split())[:200]
        raise ThresholdFileError(
            f"{path}: not a threshold file of the paper's repository: it cannot be read as plain "
            f"tensors and numbers ({reason})"
        ) from None
    try:
        return _table(content, model, revision, os.path.basename(path))
    except ValueError as error:
        raise ThresholdFileError(
            f"{path}: not a threshold file of the paper's repository: {error}"
        ) from None


def _table(content: Any, model: str, revision: str, source: str) -> ThresholdTable:
    import torch

    if not isinstance(content, dict):
        raise ValueError(f"it must hold a dict, got {type(content).__name__}")
    for key in ("thresholds", "k_values"):
        if key not in content:
            raise ValueError(
                f"it has no {key!r}, only {', '.join(map(repr, content)) or 'nothing'}"
            )
    thresholds = content["thresholds"]
    if not isinstance(thresholds, torch.Tensor) or not thresholds.is_floating_point():
        raise ValueError("'thresholds' must be a tensor of floating-point numbers")
    if thresholds.layout != torch.strided or thresholds.dim() != 4:
        raise ValueError(
            "'thresholds' must be a dense tensor [k_values, layers, heads, q_blocks], got "
            f"{list(thresholds.shape)}"
        )
    k_values = content["k_values"]
    if isinstance(k_values, torch.Tensor):
        k_values = k_values.tolist()
    if not isinstance(k_values, list | tuple) or not all(type(k) is int for k in k_values):
        raise ValueError(f"'k_values' must be a list of integers, got {repr(k_values)[:80]}")
    if len(k_values) != thresholds.shape[0]:
        raise ValueError(
            f"'k_values' lists {len(k_values)} values, 'thresholds' holds {thresholds.shape[0]}"
        )
    for key, stated in (("num_layers", 1), ("num_heads", 2)):
        if key in content and content[key] != thresholds.shape[stated]:
            raise ValueError(
                f"{key!r} is {content[key]!r}, but 'thresholds' has shape {list(thresholds.shape)}"
            )
    q_block = content.get("q_block_size", 128)
    order = np.argsort(k_values)
    return ThresholdTable(
        thresholds=thresholds.float().numpy()[order],
        points=tuple(k_values[i] for i in order),
        axis="k",
        q_block=q_block,
        k_block=content.get("k_block_size", 64),
        rule="absolute",
        model=model,
        revision=revision,
        max_seqlen=int(thresholds.shape[3]) * q_block,
        aggregate=str(content.get("aggregation_method", "mean")),
        provenance={"converted_from": source},
    )
