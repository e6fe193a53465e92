# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Record the block maxima of a model's queries and keys while it reads, and reduce them.

The model is not changed: it runs under the hook (`bsfa_calib.hook`), which shows each layer's
queries and keys to a `Recorder` and then computes the model's own dense attention.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bsfa_kernel
from bsfa_calib import estimate
from bsfa_calib.hook import Meter, applied
from bsfa_calib.language_model import check_tokens
from bsfa_calib.store import Measured
from bsfa_kernel import Geometry

# Maxima of a sample that are set aside, so that those of several layers are worked on together: of
# a short sample, launching the work of each layer would take longer than the work.
_MAXIMA_TOGETHER = 1 << 22


class CaptureError(ValueError):
    """The model's attention cannot be measured; the message says why."""


@dataclass
class Recorder:
    """A method (`bsfa_calib.hook.Method`) that looks on: it hands out each layer's block maxima.

    Attributes:
        rule: the rule whose maxima are recorded.
        q_block: queries in a sparsity block.
        k_block: keys in a sparsity block.
        sink: called with the layer's index and its maxima, float32 ``[heads, q_blocks, k_blocks]``,
            on the model's device.
        voters: one query row in 1, 2 or 4 votes; the others are left out of the maxima.
    """

    rule: str
    q_block: int
    k_block: int
    sink: Callable[[int, Tensor], None]
    voters: int = 1

    @property
    def geometry(self) -> Geometry:
        """The sparsity block."""
        return Geometry(self.q_block, self.k_block)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        scale: float,
        sinks: Tensor | None = None,
    ) -> None:
        """See ``Method``; prompts are whole, so that there is nothing to record of others."""
        if q.shape[1] != k.shape[1]:
            return
        options: dict[str, Any] = {
            "scale": scale,
            "rule": self.rule,
            "geometry": self.geometry,
            "sinks": sinks,
        }
        if self.voters == 1:
            maxima = bsfa_kernel.block_maxima(q, k, **options)
        else:
            options |= {"voters": self.voters, "compute_dtype": torch.float32}
            maxima = bsfa_kernel.reference.block_maxima(q, k, **options)
        self.sink(layer, maxima[0])


@contextlib.contextmanager
def capturing(model: Any, recorder: Recorder) -> Iterator[Meter]:
    """Record the block maxima of what the model reads, and give it back as it was.

    Args:
        model: a transformers model; feed it one sample without padding or cache at a time.
        recorder: receives the maxima.

    Yields:
        The meter, which says what layers cannot be measured, and why.

    Raises:
        SwitchError: the model does not take its attention function from transformers' interface.
    """
    with applied(model, recorder, q_block=recorder.q_block) as meter:
        yield meter


def top_maxima(maxima: Tensor, recorder: Recorder, seqlen: int, keep: int) -> Tensor:
    """The largest unforced block maxima of each query block.

    Args:
        maxima: float32 ``[..., q_blocks, k_blocks]``.
        recorder: names the geometry.
        seqlen: tokens of the sample.
        keep: maxima to keep.

    Returns:
        float32 ``[..., q_blocks, min(keep, k_blocks)]``, descending; −inf where there are no
        more.
    """
    hidden = maxima.masked_fill(_forced_mask(maxima, recorder, seqlen), float("-inf"))
    if keep >= maxima.shape[-1]:
        return hidden.sort(dim=-1, descending=True).values
    return hidden.topk(keep, dim=-1).values


def histogram(maxima: Tensor, recorder: Recorder, seqlen: int) -> Tensor:
    """Histogram of the unforced block maxima.

    Args:
        maxima: float32 ``[..., q_blocks, k_blocks]``.
        recorder: names the geometry.
        seqlen: tokens of the sample.

    Returns:
        int32 ``[..., HISTOGRAM_BINS]``, as `bsfa_calib.estimate.scalar_thresholds` takes it.
    """
    blocks = _unforced_indices(maxima.shape[-1], recorder, seqlen, maxima.device)
    values = maxima.flatten(-2).index_select(-1, blocks)
    # The first bin takes all that is below the reach; integers are cut towards 0.
    first = estimate.HISTOGRAM_REACH * estimate.BINS_PER_UNIT + 1
    bins = values.mul_(estimate.BINS_PER_UNIT).add_(first).long()
    bins.clamp_(0, estimate.HISTOGRAM_BINS - 1)
    shape = (*maxima.shape[:-2], estimate.HISTOGRAM_BINS)
    counts = torch.zeros(shape, dtype=torch.int32, device=maxima.device)
    return counts.scatter_(-1, bins, 1, reduce="add")


def _forced_mask(maxima: Tensor, recorder: Recorder, seqlen: int) -> Tensor:
    """The blocks that may not be skipped, bool ``[q_blocks, k_blocks]``."""
    return _forced(seqlen, recorder.geometry, maxima.shape[-1], str(maxima.device))


# Samples are mostly of one length, and nothing should be copied to the device for each layer.
@functools.lru_cache(maxsize=2)
def _forced(seqlen: int, geometry: Geometry, k_blocks: int, device: str) -> Tensor:
    counts = estimate.unforced_blocks(seqlen, geometry)
    return torch.from_numpy(np.arange(k_blocks) >= counts[:, None]).to(device)


def _unforced_indices(
    k_blocks: int, recorder: Recorder, seqlen: int, device: torch.device
) -> Tensor:
    """Where the blocks that may be skipped lie in ``[q_blocks * k_blocks]``, int64."""
    return _unforced(seqlen, recorder.geometry, k_blocks, str(device))


@functools.lru_cache(maxsize=2)
def _unforced(seqlen: int, geometry: Geometry, k_blocks: int, device: str) -> Tensor:
    counts = estimate.unforced_blocks(seqlen, geometry)
    return torch.from_numpy(np.flatnonzero(np.arange(k_blocks) < counts[:, None])).to(device)


def measure(
    model: Any,
    tokens: Sequence[int],
    recorder: Recorder,
    *,
    layers: int,
    keep: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Measured, dict[int, Tensor]]:
    """Let the model read one sample. The host waits for the device once, at the end.

    Args:
        model: a causal language model of transformers.
        tokens: token ids of the sample.
        recorder: names rule and geometry; its sink is set here.
        layers: of the model.
        keep: maxima kept a query block; 0 for histograms instead.
        progress: told of the number of layers measured, after each.

    Returns:
        What became of the layers, and for each that was measured ``[heads, ...]``.

    Raises:
        CaptureError: a layer's scores are NaN.
        HookError: the model's attention is not understood.
        SwitchError: it does not come from transformers' interface.
        ValueError: a token is not in the model's vocabulary.
    """
    check_tokens(model, tokens)
    reduction = _Reduction(recorder, len(tokens), keep)
    pace = _Pace(model.device)

    def sink(layer: int, maxima: Tensor) -> None:
        reduction.add(layer, maxima)
        if progress is not None:
            pace.wait_for_the_layer_before()
            progress(reduction.seen)

    recorder.sink = sink
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    with torch.inference_mode(), capturing(model, recorder) as meter:
        model(input_ids=torch.tensor([list(tokens)], device=model.device), **options)
        measured = reduction.finish()
    dense = meter.skip_nothing(layers)
    kept = {layer: tensor for layer, tensor in measured.items() if layer not in dense}
    return Measured(len(tokens), dense), kept


class _Reduction:
    """Reduces the maxima of a sample's layers, those of several at a time where they are few."""

    def __init__(self, recorder: Recorder, seqlen: int, keep: int) -> None:
        self.seen = 0
        self._recorder, self._seqlen, self._keep = recorder, seqlen, keep
        self._waiting: dict[int, Tensor] = {}
        self._layers: dict[int, Tensor] = {}
        self._sound: dict[int, Tensor] = {}

    def add(self, layer: int, maxima: Tensor) -> None:
        """Take the maxima ``[heads, q_blocks, k_blocks]`` of a layer."""
        if self._waiting:
            first = next(iter(self._waiting.values()))
            together = maxima.numel() * (len(self._waiting) + 1)
            if first.shape != maxima.shape or together > _MAXIMA_TOGETHER:
                self._reduce()
        self.seen += layer not in self._waiting and layer not in self._layers
        self._waiting[layer] = maxima

    def finish(self) -> dict[int, Tensor]:
        """What is kept of each layer.

        Raises:
            CaptureError: a layer's scores are NaN.
        """
        self._reduce()
        if self._sound:
            found = torch.stack(list(self._sound.values())).tolist()
            for layer, sound in zip(self._sound, found, strict=True):
                if not sound:
                    raise CaptureError(f"layer {layer} gives NaN scores; try another dtype")
        return self._layers

    def _reduce(self) -> None:
        if not self._waiting:
            return
        numbers = list(self._waiting)
        several = list(self._waiting.values())
        self._waiting.clear()
        maxima = torch.stack(several) if len(several) > 1 else several[0][None]
        del several
        # Every query block sees some score. Over those that are NaN a kernel's maxima are −inf.
        sound = (maxima.amax(-1) > float("-inf")).flatten(1).all(1)
        self._sound.update(zip(numbers, sound.unbind(), strict=True))
        kept = (
            top_maxima(maxima, self._recorder, self._seqlen, self._keep)
            if self._keep
            else histogram(maxima, self._recorder, self._seqlen)
        )
        self._layers.update(zip(numbers, kept.unbind(), strict=True))


class _Pace:
    """Keeps the host at most one layer ahead of a GPU, so that what it reports is so."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._event: torch.cuda.Event | None = None

    def wait_for_the_layer_before(self) -> None:
        if self._cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            if self._event is not None:
                self._event.synchronize()
            self._event = event
