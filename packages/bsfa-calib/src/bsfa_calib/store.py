# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What was measured on each sample: in memory as long as it is little, and in files.

A file's name is a digest of everything that its content depends on: settings, model and tokens. A
run that is started again finds the samples that it has done, whatever their order.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bsfa_calib.thresholds import checksum, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

# Bytes that are held in memory, on the device that they were measured on.
_IN_MEMORY = 1 << 30


class Measured(NamedTuple):
    """What one sample gave, apart from its tensors.

    Attributes:
        seqlen: tokens of the sample.
        dense: reasons, by layer, why layers could not be measured.
    """

    seqlen: int
    dense: dict[int, str]


class SampleStore:
    """Tensors of each layer and sample; a context manager, at whose end temporary files go."""

    def __init__(
        self, directory: str | os.PathLike[str] | None, settings: Mapping[str, Any]
    ) -> None:
        """Use a directory, which is made when the first sample is stored.

        Args:
            directory: where the files lie; without one there are none, or temporary ones as soon as
                the measurements are many.
            settings: what the tensors depend on besides the tokens; must be JSON.
        """
        self._directory = None if directory is None else Path(directory)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._keeps_files = directory is not None
        self._settings = json.dumps(settings, sort_keys=True)
        self._held: dict[str, dict[int, Tensor]] = {}
        self._held_bytes = 0

    def __enter__(self) -> SampleStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.clear()
        if self._temporary is not None:
            self._temporary.cleanup()

    def key(self, tokens: Sequence[int]) -> str:
        """The name under which a sample is stored."""
        digest = hashlib.sha256(self._settings.encode())
        digest.update(np.asarray(tokens, "<i8").tobytes())
        return f"sample-{digest.hexdigest()[:24]}"

    def find(self, key: str) -> Measured | None:
        """What the files hold of a sample; None if it is not there, or damaged.

        The file is read once, a layer at a time, for its checksum.
        """
        from safetensors import SafetensorError, safe_open

        if self._directory is None or not self._path(key).exists():
            return None
        try:
            with safe_open(self._path(key), framework="np") as file:
                metadata = file.metadata() or {}
                layers = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
                if metadata["checksum"] != checksum(metadata, layers):
                    return None
                dense = {int(k): str(v) for k, v in json.loads(metadata["dense"]).items()}
                return Measured(int(metadata["seqlen"]), dense)
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError):
            return None

    def write(self, key: str, measured: Measured, layers: Mapping[int, Tensor]) -> None:
        """Store what was measured on a sample."""
        size = sum(tensor.nbytes for tensor in layers.values())
        held = self._held_bytes + size <= _IN_MEMORY
        if held:
            self._held[key] = dict(layers)
            self._held_bytes += size
        if self._keeps_files or not held:
            from safetensors.torch import save

            metadata = {"seqlen": str(measured.seqlen), "dense": json.dumps(measured.dense)}
            tensors = {str(layer): tensor.cpu() for layer, tensor in layers.items()}
            arrays = ((name, tensor.numpy()) for name, tensor in sorted(tensors.items()))
            metadata["checksum"] = checksum(metadata, arrays)
            write_atomically(self._path(key), save(tensors, metadata=metadata))

    def read(self, key: str, layer: int) -> Tensor:
        """The tensor of one layer of a sample, on the device that it was measured on or the CPU."""
        if key in self._held:
            return self._held[key][layer]
        from safetensors import safe_open

        with safe_open(self._path(key), framework="pt") as file:
            tensor: Tensor = file.get_tensor(str(layer))
            return tensor

    def _path(self, key: str) -> Path:
        if self._directory is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="bsfa-calib-")
            self._directory = Path(self._temporary.name)
        return self._directory / f"{key}.safetensors"
