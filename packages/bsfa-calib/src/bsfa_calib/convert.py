# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Read threshold files, those (``.pt``) of the paper's repository as tables."""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bsfa_calib.thresholds import ThresholdFileError, ThresholdTable

if TYPE_CHECKING:
    import torch

_SHOWN = 80  # characters of a file's content in a message
_LARGEST = 1 << 20


Table = ThresholdTable | str | os.PathLike[str]


def load_table(table: Table) -> ThresholdTable:
    """A table, or the one in a file; a file of the paper's repository is converted.

    Raises:
        FileNotFoundError: there is no such file.
        ThresholdFileError: the file is not a threshold table.
    """
    if isinstance(table, ThresholdTable):
        return table
    return load_pt(table) if is_of_paper(table) else ThresholdTable.load(table)


def is_of_paper(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of the paper's repository: torch's archive, or named like one."""
    with contextlib.suppress(OSError), Path(path).open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return True
    return Path(path).suffix in (".pt", ".pth")


def load_pt(path: str | os.PathLike[str], *, model: str = "", revision: str = "") -> ThresholdTable:
    """The table that a ``.pt`` file of the paper's repository holds. Needs torch.

    Such a file is a dict with the tensor ``thresholds`` ``[k_values, layers, heads, q_blocks]``,
    the list ``k_values``, and ``q_block_size`` and ``k_block_size`` (128 and 64 where missing).
    It is read with ``weights_only=True``, so that nothing in it can run, and takes no more memory
    than it has bytes, whatever sizes it states.

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
        _check_archive(path)
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
                f"it has no {key!r}, only {', '.join(map(repr, content))[:_SHOWN] or 'nothing'}"
            )
    thresholds = _checked(content["thresholds"], "thresholds", 4)
    if not thresholds.is_floating_point():
        raise ValueError("'thresholds' must be a tensor of floating-point numbers")
    k_values = content["k_values"]
    if isinstance(k_values, torch.Tensor):
        k_values = _checked(k_values, "k_values", 1).tolist()
    if not isinstance(k_values, list | tuple) or not all(type(k) is int for k in k_values):
        raise ValueError(f"'k_values' must be a list of integers, got {repr(k_values)[:_SHOWN]}")
    if len(k_values) != thresholds.shape[0]:
        raise ValueError(
            f"'k_values' lists {len(k_values)} values, 'thresholds' holds {thresholds.shape[0]}"
        )
    for key, axis in (("num_layers", 1), ("num_heads", 2)):
        there = thresholds.shape[axis]
        if _integer(content, key, there) != there:
            raise ValueError(
                f"{key!r} is {content[key]!r}, but 'thresholds' has shape {list(thresholds.shape)}"
            )
    q_block = _integer(content, "q_block_size", 128)
    order = np.argsort(k_values)
    return ThresholdTable(
        thresholds=thresholds.detach().float().resolve_neg().numpy()[order],
        points=tuple(k_values[i] for i in order),
        axis="k",
        q_block=q_block,
        k_block=_integer(content, "k_block_size", 64),
        rule="absolute",
        model=model,
        revision=revision,
        max_seqlen=int(thresholds.shape[3]) * q_block,
        aggregate=str(content.get("aggregation_method", "mean"))[:_SHOWN],
        provenance={"converted_from": source},
    )


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Refuse a file that is damaged, or larger in memory than it is: torch compresses nothing.

    Raises:
        ValueError: it is.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > os.path.getsize(path):
            raise ValueError(f"it unpacks to {unpacked} bytes, more than it has")
        damaged = archive.testzip()  # PyTorch does not look at the sums that it writes
    if damaged is not None:
        raise ValueError(f"it is damaged: its part {damaged!r} has another CRC-32 than it states")


def _checked(tensor: Any, name: str, dimensions: int) -> torch.Tensor:
    """A dense tensor on the CPU each of whose elements is stored."""
    import torch

    if (
        not isinstance(tensor, torch.Tensor)
        or tensor.layout != torch.strided
        or tensor.device.type != "cpu"
        or tensor.dim() != dimensions
    ):
        shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        wanted = "[k_values, layers, heads, q_blocks]" if dimensions == 4 else "[k_values]"
        raise ValueError(f"{name!r} must be a dense tensor {wanted}, got {str(shape)[:_SHOWN]}")
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:
        raise ValueError(
            f"{name!r} has shape {list(tensor.shape)}, for which it stores {stored} bytes only"
        )
    return tensor


def _integer(content: dict[Any, Any], key: str, default: int) -> int:
    value = content.get(key, default)
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ValueError(
            f"{key!r} must be an integer from 1 to {_LARGEST}, got {repr(value)[:_SHOWN]}"
        )
    return value
