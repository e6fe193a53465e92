# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What became of each call of the attention function, layer by layer."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from bsfa_calib.reasons import REASONS, Reason
from bsfa_kernel.geometry import Geometry, count_visible, query_block_count

# Columns of the counters that compiled code keeps.
_VISIBLE, _QUERY_BLOCKS, _SPARSE, _INT8 = range(4)
_DENSE = 4


class _Layer:
    """Counters of one layer. What is measured on the device stays there until it is read."""

    def __init__(self, heads: int, device: torch.device) -> None:
        self.kept = torch.zeros(heads, dtype=torch.int64, device=device)
        self.traced = torch.zeros(_DENSE + len(REASONS), dtype=torch.int64, device=device)
        for counter in (self.kept, self.traced):
            # Compiled code adds to them in place, which CUDA graphs take of fixed addresses only.
            torch._dynamo.mark_static_address(counter)
        self.visible = 0
        self.query_blocks = 0
        self.sparse = 0
        self.int8 = 0
        self.dense: Counter[Reason] = Counter()


class Statistics:
    """Counts of a patched model: a live view, read from the device when asked.

    A call is one call of the attention function, so that a forward pass makes one a layer.
    """

    def __init__(self, devices: Sequence[torch.device], heads: int) -> None:
        """Start at zero.

        Args:
            devices: where each layer computes.
            heads: query heads a layer (of this rank).
        """
        self._devices = list(devices)
        self._heads = heads
        self._lock = threading.Lock()
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Forget everything counted so far."""
        # Tensors made in inference mode could not be added to outside of it.
        with self._lock, torch.inference_mode(False):
            self._layers = [_Layer(self._heads, device) for device in self._devices]

    def count_dense(self, layer: int, reason: Reason) -> None:
        """Count a call that ran dense."""
        if torch.compiler.is_compiling():
            # Numbers in Python would be constants of the compiled code.
            self._layers[layer].traced[_DENSE + REASONS.index(reason)].add_(1)
            return
        with self._lock:
            self._layers[layer].dense[reason] += 1

    def count_sparse(
        self,
        layer: int,
        kept: Sequence[Tensor],
        lengths: Sequence[tuple[int, int]],
        geometry: Geometry,
        selection: str = "exact",
    ) -> None:
        """Count a call that ran block-sparse.

        Args:
            layer: index of the layer.
            kept: int32 [..., heads, q_blocks], of each kernel call.
            lengths: queries and keys of each sequence.
            geometry: the sparsity block.
            selection: "exact" or "int8": from what scores the blocks were chosen.
        """
        counters = self._layers[layer]
        totals = [part.sum(-1).reshape(-1, part.shape[-2]).sum(0) for part in kept]
        visible = sum(count_visible(*each, geometry) for each in lengths)
        query_blocks = sum(query_block_count(*each, geometry) for each in lengths)
        if torch.compiler.is_compiling():
            for total in totals:
                counters.kept.add_(total)
            counters.traced[_VISIBLE].add_(visible)
            counters.traced[_QUERY_BLOCKS].add_(query_blocks)
            counters.traced[_SPARSE].add_(1)
            counters.traced[_INT8].add_(int(selection == "int8"))
            return
        with self._lock:
            for total in totals:
                if counters.kept.device != total.device:
                    counters.kept = moved(counters.kept, total.device)
                counters.kept += total
            counters.visible += visible
            counters.query_blocks += query_blocks
            counters.sparse += 1
            counters.int8 += selection == "int8"

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def heads(self) -> int:
        """Number of query heads a layer."""
        return self._heads

    @property
    def calls(self) -> int:
        """Calls in all, sparse and dense."""
        return self.sparse_calls + sum(self.dense_calls.values())

    @property
    def sparse_calls(self) -> int:
        """Calls that ran block-sparse."""
        return sum(layer.sparse + int(layer.traced[_SPARSE]) for layer in self._layers)

    @property
    def sparse_calls_by_selection(self) -> dict[str, int]:
        """Calls that ran block-sparse, by the scores that blocks were chosen from."""
        int8 = sum(layer.int8 + int(layer.traced[_INT8]) for layer in self._layers)
        return {"exact": self.sparse_calls - int8, "int8": int8}

    @property
    def dense_calls(self) -> dict[str, int]:
        """Calls that ran dense, by reason, the most frequent first."""
        total: Counter[str] = Counter()
        for layer in range(self.layers):
            total.update(self.dense_calls_of(layer))
        return dict(total.most_common())

    def dense_calls_of(self, layer: int) -> dict[str, int]:
        """One layer's calls that ran dense, by reason."""
        counters = self._layers[layer]
        total: Counter[str] = Counter({str(r): n for r, n in counters.dense.items()})
        for reason, number in zip(REASONS, counters.traced[_DENSE:].tolist(), strict=True):
            if number:
                total[str(reason)] += number
        return dict(total.most_common())

    @property
    def kept_blocks(self) -> Tensor:
        """int64 [layers, heads]: key blocks that were kept, forced ones included."""
        return torch.stack([layer.kept.cpu() for layer in self._layers])

    @property
    def visible_blocks(self) -> list[int]:
        """For each layer, the key blocks that each of its heads could have kept."""
        return [layer.visible + int(layer.traced[_VISIBLE]) for layer in self._layers]

    @property
    def query_blocks(self) -> list[int]:
        """For each layer, the query blocks that each of its heads has computed block-sparse."""
        return [layer.query_blocks + int(layer.traced[_QUERY_BLOCKS]) for layer in self._layers]

    @property
    def kept_fraction_by_head(self) -> Tensor:
        """float64 [layers, heads]: share of the visible blocks kept; NaN where none were."""
        visible = torch.tensor(self.visible_blocks, dtype=torch.float64)[:, None]
        return self.kept_blocks.double() / visible

    @property
    def kept_fraction(self) -> list[float]:
        """For each layer, the share of the visible blocks that was kept; NaN where none were."""
        return self.kept_fraction_by_head.mean(-1).tolist()

    @property
    def mean_kept_fraction(self) -> float:
        """Share of the visible blocks that was kept, over all layers that ran block-sparse."""
        visible = sum(self.visible_blocks) * self.heads
        return int(self.kept_blocks.sum()) / visible if visible else math.nan

    @property
    def kept_per_query_block(self) -> list[float]:
        """For each layer, the key blocks that a query block kept on average, forced ones too."""
        numbers = self.kept_blocks.sum(-1).tolist()
        return [
            number / (blocks * self.heads) if blocks else math.nan
            for number, blocks in zip(numbers, self.query_blocks, strict=True)
        ]

    def summary(self) -> str:
        """A few lines for people."""
        sparse = self.sparse_calls
        lines = [f"{sparse} block-sparse calls"]
        if sparse:
            lines[0] += f", kept {self.mean_kept_fraction:.1%} of the visible blocks"
            int8 = self.sparse_calls_by_selection["int8"]
            if int8:
                lines[0] += f", which {int8} of them chose in 8 bits"
        lines += [f"{number} dense calls: {reason}" for reason, number in self.dense_calls.items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"<Statistics: {self.summary().replace(chr(10), '; ')}>"


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device; what comes from the host is not waited for."""
    # Tensors made in inference mode could not be changed outside of it.
    with torch.inference_mode(False):
        return tensor.to(device, non_blocking=tensor.device.type == "cpu")
