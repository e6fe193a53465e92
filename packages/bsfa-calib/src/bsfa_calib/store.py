# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What was measured on each sample, one file a sample, so that an interrupted run can go on.

A file's name is a digest of everything that its content depends on: settings, model and tokens. A
run that is started again finds the samples that it has done, whatever their order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bsfa_calib.thresholds import write_atomically


class Measured(NamedTuple):
    """What one sample gave, apart from its arrays.

    Attributes:
        seqlen: tokens of the sample.
        dense: reasons, by layer, why layers could not be measured.
    """

    seqlen: int
    dense: dict[int, str]


class SampleStore:
    """Arrays of each layer and sample, in a directory."""

    def __init__(self, directory: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        """Use a directory, which is made when the first sample is stored.

        Args:
            directory: where the files lie.
            settings: what the arrays depend on besides the tokens; must be JSON.
        """
        self.directory = Path(directory)
        self._settings = json.dumps(settings, sort_keys=True)

    def path(self, tokens: Sequence[int]) -> Path:
        """The file of a sample, whether it is there or not."""
        digest = hashlib.sha256(self._settings.encode())
        digest.update(np.asarray(tokens, "<i8").tobytes())
        return self.directory / f"sample-{digest.hexdigest()[:24]}.safetensors"

    def find(self, tokens: Sequence[int]) -> Measured | None:
        """What is stored of a sample; None if it is not there, or damaged."""
        from safetensors import SafetensorError, safe_open

        path = self.path(tokens)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                dense = {int(k): str(v) for k, v in json.loads(metadata["dense"]).items()}
                return Measured(int(metadata["seqlen"]), dense)
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError):
            return None

    def write(
        self, tokens: Sequence[int], measured: Measured, layers: Mapping[int, npt.NDArray[Any]]
    ) -> None:
        """Store what was measured on a sample."""
        from safetensors.numpy import save

        metadata = {"seqlen": str(measured.seqlen), "dense": json.dumps(measured.dense)}
        tensors = {str(layer): np.ascontiguousarray(array) for layer, array in layers.items()}
        write_atomically(self.path(tokens), save(tensors, metadata=metadata))

    def read(self, tokens: Sequence[int], layer: int) -> npt.NDArray[Any]:
        """The array of one layer of a sample."""
        from safetensors import safe_open

        with safe_open(self.path(tokens), framework="np") as file:
            return np.asarray(file.get_tensor(str(layer)))

    def remove(self, samples: Sequence[Sequence[int]]) -> None:
        """Delete the files of samples, and the directory if that leaves it empty."""
        for tokens in samples:
            self.path(tokens).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()
