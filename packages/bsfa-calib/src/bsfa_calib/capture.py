# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Calibrate a transformers model: measure block maxima while it reads, and make a table of them.

The model is not changed: for the time of the measurement it runs with the attention function
``bsfa_capture``, registered with transformers, which records the block maxima of each layer's
queries and keys and then computes ordinary SDPA attention.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsfa_calib import estimate
from bsfa_calib.store import Measured, SampleStore
from bsfa_calib.thresholds import FloatArray, ThresholdTable

ATTENTION_NAME = "bsfa_capture"

# Maxima of all samples that thresholds are estimated from at a time.
_MAXIMA_AT_A_TIME = 1 << 25

# Maxima of a sample that are set aside, so that those of several layers are worked on together: of
# a short sample, launching the work of each layer would take longer than the work.
_MAXIMA_TOGETHER = 1 << 22

_logger = logging.getLogger(__name__)


class CaptureError(ValueError):
    """The model's attention cannot be measured; the message says why."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a calibration has come.

    Attributes:
        sample: samples done.
        samples: samples in all.
        seqlen: tokens of the sample in progress, or just done.
        layer: layers measured of the sample in progress; None where a sample has just been done.
        layers: layers of the model.
        resumed: whether the sample was found rather than measured.
    """

    sample: int
    samples: int
    seqlen: int
    layer: int | None
    layers: int
    resumed: bool = False


@dataclasses.dataclass
class Recorder:
    """Receives the block maxima of each layer.

    Attributes:
        rule: the rule whose maxima are recorded.
        q_block: queries in a sparsity block.
        k_block: keys in a sparsity block.
        sink: called with the layer's index and its maxima, float32 ``[heads, q_blocks, k_blocks]``,
            on the model's device.
        dense: reasons, by layer, why layers were not measured.
    """

    rule: str
    q_block: int
    k_block: int
    sink: Callable[[int, Tensor], None]
    dense: dict[int, str] = dataclasses.field(default_factory=dict)


_recorder: ContextVar[Recorder | None] = ContextVar("bsfa_calib_recorder", default=None)


@contextlib.contextmanager
def capturing(model: Any, recorder: Recorder) -> Iterator[None]:
    """Record the block maxima of what the model reads, and give it back as it was.

    Args:
        model: a transformers model; feed it one sample without padding or cache at a time.
        recorder: receives the maxima.

    Raises:
        CaptureError: the model does not take its attention function from transformers' interface.
    """
    _register()
    configs = {
        id(module.config): module.config
        for module in model.modules()
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation")
    }
    before = [(config, config._attn_implementation) for config in configs.values()]
    token = _recorder.set(recorder)
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        if model.config._attn_implementation != ATTENTION_NAME:
            raise CaptureError(
                f"{type(model).__name__} does not take its attention function from transformers' "
                "AttentionInterface, so its scores cannot be measured"
            )
        yield
    finally:
        _recorder.reset(token)
        for config, implementation in before:
            config._attn_implementation = implementation


def calibrate(
    model: Any,
    samples: Sequence[Sequence[int]],
    *,
    k_values: Sequence[int] | None = None,
    target_sparsities: Sequence[float] | None = None,
    held_out: Sequence[Sequence[int]] = (),
    rule: str = "absolute",
    q_block: int = 128,
    k_block: int = 64,
    aggregate: str = "pooled",
    keep_maxima: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    model_name: str = "",
    revision: str = "",
    provenance: Mapping[str, str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> ThresholdTable:
    """Calibrate thresholds on samples of text.

    With ``k_values``, there is a threshold for every layer, head and query-block position, at which
    k unforced blocks are kept. With ``target_sparsities`` there is one scalar for the whole model,
    at which that share of all visible blocks is skipped.

    Memory: a sample's measurements are held while the model reads it, on its device, and
    then until all are there, or in a file if those of all samples exceed 1 GiB. They take
    4 · layers · heads · (tokens / q_block) · keep_maxima bytes with ``k_values`` (1.1 GB for 128K
    tokens and 1024 heads in all, at the default of 256 for k = 64), and 32 KiB a head with
    ``target_sparsities``. All samples' measurements of one layer are in memory at a time.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        samples: token ids of the samples to calibrate on. They may differ in length.
        k_values: blocks to keep a query block.
        target_sparsities: shares of blocks to skip; instead of k_values.
        held_out: token ids of samples that the result is tested on.
        rule: ``absolute``, ``running_max`` or ``running_lse``.
        q_block: queries in a sparsity block.
        k_block: keys in a sparsity block.
        aggregate: how samples are combined (`bsfa_calib.estimate.estimate_thresholds`).
        keep_maxima: block maxima kept a query block, 4 · max(k_values) by default. ``pooled`` is
            exact as long as they suffice, which is checked and logged.
        checkpoint: directory for what was measured on each sample; a later call finds it there.
        model_name: name of the model, for the table.
        revision: its revision, for the table.
        provenance: further facts, for the table.
        progress: told of every layer and sample.

    Returns:
        The table, with the statistics of docs/threshold-format.md.

    Raises:
        CaptureError: the model's attention cannot be measured, or gives NaN.
        ValueError: an argument breaks a rule, or the samples are too short for it.
    """
    if (k_values is None) == (target_sparsities is None):
        raise ValueError("give either k_values or target_sparsities")
    if not samples:
        raise ValueError("at least one sample is needed")
    if not all(held_out):
        raise ValueError("a held-out sample is empty: every sample must have at least one token")
    estimate.parse_aggregate(aggregate)
    points: tuple[float | int, ...]
    if k_values is not None:
        points = tuple(sorted(set(k_values)))
        if not points or points[0] < 1:
            raise ValueError(f"k_values must be integers of at least 1, got {list(k_values)}")
        keep = keep_maxima or 4 * int(points[-1])
        if keep <= points[-1]:
            raise ValueError(f"keep_maxima must be greater than k={points[-1]}, got {keep}")
        _check_lengths(samples, int(points[0]), q_block, k_block)
    else:
        assert target_sparsities is not None
        points = tuple(sorted(set(target_sparsities)))
        keep = 0
        _check_lengths(samples, 0, q_block, k_block)
    settings = {
        "model": "" if checkpoint is None else fingerprint(model),
        "rule": rule,
        "block": [q_block, k_block],
        "keep": keep,
    }
    shape = _Shape(model)
    every = [*samples, *held_out]
    dense: dict[int, str] = {}
    with SampleStore(checkpoint, settings) as store:
        keys = [store.key(tokens) for tokens in every]
        recorder = Recorder(rule, q_block, k_block, lambda layer, maxima: None)
        with capturing(model, recorder):
            for index, (key, tokens) in enumerate(zip(keys, every, strict=True)):
                state = Progress(index, len(every), len(tokens), 0, shape.layers)
                measured = store.find(key)
                found = measured is not None
                if measured is None:
                    measured, layers = _measure(model, tokens, recorder, keep, state, progress)
                    store.write(key, measured, layers)
                dense.update(measured.dense)
                if progress is not None:
                    state = dataclasses.replace(state, sample=index + 1, layer=None, resumed=found)
                    progress(state)
        captured = [layer for layer in range(shape.layers) if layer not in dense]
        if not captured:
            raise CaptureError(f"no layer of this model can be measured: {_reasons(dense)}")
        if dense:
            _logger.warning("layers left dense: %s", _reasons(dense))

        lengths = [(key, len(tokens)) for key, tokens in zip(keys, every, strict=True)]
        groups = {"": lengths[: len(samples)]}
        if held_out:
            groups["held_out_"] = lengths[len(samples) :]
        assemble = _Assembly(store, groups, captured, shape, q_block, k_block)
        if keep:
            thresholds, statistics = assemble.per_position([int(p) for p in points], aggregate)
        else:
            thresholds, statistics = assemble.scalars(points)
            aggregate = "pooled"
    facts = dict(provenance or {})
    if dense:
        facts["dense_layers"] = _reasons(dense)
    return ThresholdTable(
        thresholds=thresholds,
        points=points,
        axis="k" if keep else "target_sparsity",
        q_block=q_block,
        k_block=k_block,
        rule=rule,
        model=model_name,
        revision=revision,
        max_seqlen=max(map(len, samples)),
        samples=len(samples),
        aggregate=aggregate,
        provenance=facts,
        statistics=statistics,
    )


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
    return _forced(seqlen, recorder.q_block, recorder.k_block, maxima.shape[-1], str(maxima.device))


# Samples are mostly of one length, and nothing should be copied to the device for each layer.
@functools.lru_cache(maxsize=2)
def _forced(seqlen: int, q_block: int, k_block: int, k_blocks: int, device: str) -> Tensor:
    counts = estimate.unforced_blocks(seqlen, q_block=q_block, k_block=k_block)
    return torch.from_numpy(np.arange(k_blocks) >= counts[:, None]).to(device)


def _unforced_indices(
    k_blocks: int, recorder: Recorder, seqlen: int, device: torch.device
) -> Tensor:
    """Where the blocks that may be skipped lie in ``[q_blocks * k_blocks]``, int64."""
    return _unforced(seqlen, recorder.q_block, recorder.k_block, k_blocks, str(device))


@functools.lru_cache(maxsize=2)
def _unforced(seqlen: int, q_block: int, k_block: int, k_blocks: int, device: str) -> Tensor:
    counts = estimate.unforced_blocks(seqlen, q_block=q_block, k_block=k_block)
    return torch.from_numpy(np.flatnonzero(np.arange(k_blocks) < counts[:, None])).to(device)


def _measure(
    model: Any,
    tokens: Sequence[int],
    recorder: Recorder,
    keep: int,
    state: Progress,
    progress: Callable[[Progress], None] | None,
) -> tuple[Measured, dict[int, Tensor]]:
    """Let the model read one sample. The host waits for the device once, at the end."""
    reduction = _Reduction(recorder, len(tokens), keep)
    pace = _Pace(model.device)

    def sink(layer: int, maxima: Tensor) -> None:
        reduction.add(layer, maxima)
        if progress is not None:
            pace.wait_for_the_layer_before()
            progress(dataclasses.replace(state, layer=reduction.seen))

    recorder.sink = sink
    recorder.dense = {}
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    with torch.inference_mode():
        model(input_ids=torch.tensor([list(tokens)], device=model.device), **options)
        layers = reduction.finish()
    dense = dict(recorder.dense)
    for layer in range(state.layers):
        if layer not in layers and layer not in dense:
            dense[layer] = "it has no causal softmax attention of its own"
    kept = {layer: tensor for layer, tensor in layers.items() if layer not in dense}
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


class _Shape:
    """Layers and query heads of a model."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.layers = int(config.num_hidden_layers)
        self.heads = int(config.num_attention_heads)


@dataclasses.dataclass
class _Assembly:
    """Makes a table's arrays out of what was measured."""

    store: SampleStore
    groups: dict[str, list[tuple[str, int]]]  # prefix of the statistics -> samples: key, tokens
    captured: list[int]
    shape: _Shape
    q_block: int
    k_block: int

    def per_position(
        self, ks: list[int], aggregate: str
    ) -> tuple[FloatArray, dict[str, FloatArray]]:
        """Thresholds ``[points, layers, heads, rows]`` and statistics."""
        samples = self.groups[""]
        rows = -(-max(length for _, length in samples) // self.q_block)
        leading = (len(ks), self.shape.layers, self.shape.heads)
        thresholds = np.full((*leading, rows), -np.inf, np.float32)
        statistics = self._empty_statistics(leading)
        geometry = {"q_block": self.q_block, "k_block": self.k_block}
        inexact = 0
        for layers in self._layers_at_a_time():
            tops = {
                key: self._read(key, layers) for group in self.groups.values() for key, _ in group
            }
            result = estimate.estimate_thresholds(
                [tops[key] for key, _ in samples], ks, aggregate=aggregate, **geometry
            )
            inexact += result.inexact
            thresholds[:, layers] = result.thresholds
            found = torch.from_numpy(result.thresholds).to(tops[samples[0][0]].device)
            for prefix, group in self.groups.items():
                count = estimate.KeptCount(ks)
                for key, length in group:
                    count.add(tops[key], found, seqlen=length, **geometry)
                statistics[f"{prefix}kept"][:, layers] = count.mean_kept()
                statistics[f"{prefix}sparsity"][:, layers] = count.sparsity()
        if inexact:
            _logger.warning(
                "%d of %d thresholds may be too low: more block maxima a query block should be "
                "kept (keep_maxima)",
                inexact,
                thresholds.size,
            )
        return thresholds, statistics

    def scalars(self, targets: Sequence[float]) -> tuple[FloatArray, dict[str, FloatArray]]:
        """Thresholds ``[points, layers, heads, 1]``, alike for all heads, and statistics."""
        leading = (len(targets), self.shape.layers, self.shape.heads)
        statistics = self._empty_statistics(leading)
        thresholds = np.full((*leading, 1), -np.inf, np.float32)
        values = None
        for prefix, group in self.groups.items():
            total: Tensor | int = 0
            visible, query_blocks = 0, 0
            for key, length in group:
                total = total + self._read(key, self.captured).long()
                blocks = estimate.visible_blocks(length, q_block=self.q_block, k_block=self.k_block)
                visible += int(blocks.sum())
                query_blocks += len(blocks)
            assert isinstance(total, Tensor)
            if values is None:
                everywhere = total.sum((0, 1)).cpu().numpy()
                heads = total.shape[0] * total.shape[1]
                values = estimate.scalar_thresholds(everywhere, visible * heads, targets)
                thresholds[:, self.captured] = values.astype(np.float32)[:, None, None, None]
            skipped = estimate.skipped_share(total, visible, values)
            unforced = total.sum(-1).cpu().numpy()
            statistics[f"{prefix}sparsity"][:, self.captured] = skipped
            statistics[f"{prefix}kept"][:, self.captured] = (
                unforced - skipped * visible
            ) / query_blocks
        return thresholds, statistics

    def _layers_at_a_time(self) -> Iterator[list[int]]:
        """The layers, in groups of which all samples' maxima take little memory."""
        some = self.store.read(self.groups[""][0][0], self.captured[0])
        samples = sum(len(group) for group in self.groups.values())
        step = max(1, _MAXIMA_AT_A_TIME // (samples * some.numel()))
        for start in range(0, len(self.captured), step):
            yield self.captured[start : start + step]

    def _empty_statistics(self, shape: tuple[int, ...]) -> dict[str, FloatArray]:
        return {
            prefix + name: np.full(shape, np.nan, np.float32)
            for prefix in self.groups
            for name in ("kept", "sparsity")
        }

    def _read(self, key: str, layers: Sequence[int]) -> Tensor:
        """The measurements of some layers of a sample, ``[layers, heads, ...]``."""
        tensors = [self.store.read(key, layer) for layer in layers]
        for layer, tensor in zip(layers, tensors, strict=True):
            if len(tensor) != self.shape.heads:
                raise CaptureError(
                    f"layer {layer} has {len(tensor)} heads, but the model {self.shape.heads}; "
                    "tables need as many in every layer"
                )
        return torch.stack(tensors)


def fingerprint(model: Any) -> str:
    """Digest by which a model's measurements are told from those of another."""
    digest = hashlib.sha256()
    starts = []
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        starts.append(parameter.detach().flatten()[:64].float())
    by_device: dict[torch.device, list[Tensor]] = {}
    for start in starts:
        by_device.setdefault(start.device, []).append(start)
    for group in by_device.values():
        digest.update(torch.cat(group).cpu().numpy().tobytes())
    return digest.hexdigest()


def _check_lengths(
    samples: Sequence[Sequence[int]], least_k: int, q_block: int, k_block: int
) -> None:
    if not all(samples):
        raise ValueError("a sample is empty: every sample must have at least one token")
    longest = max(map(len, samples))
    most = int(estimate.unforced_blocks(longest, q_block=q_block, k_block=k_block)[-1])
    if most <= least_k:
        raise ValueError(
            f"the longest sample has {longest} tokens, so that no query block has more than {most} "
            f"blocks to choose from, and k={least_k} would keep them all; use longer samples"
            if least_k
            else f"the longest sample has {longest} tokens, of which no block may be skipped; use "
            "longer samples"
        )


def _reasons(dense: Mapping[int, str]) -> str:
    by_reason: dict[str, list[int]] = {}
    for layer, reason in sorted(dense.items()):
        by_reason.setdefault(reason, []).append(layer)
    return "; ".join(
        f"layers {', '.join(map(str, layers))}: {reason}" for reason, layers in by_reason.items()
    )


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA attention that shows its queries and keys to the recorder (transformers' signature).

    Args:
        module: the attention module.
        query: ``[batch, heads, seqlen, head_dim]``.
        key: ``[batch, kv_heads, seqlen, head_dim]``.
        value: as key.
        attention_mask: None where the mask is plainly causal.
        dropout: passed on.
        scaling: factor of the scores.
        is_causal: whether the mask is causal, if the module does not know better.
        sliding_window: shows in attention_mask where it matters.
        softcap: not supported.
        s_aux: not supported.
        options: passed on.

    Returns:
        ``[batch, seqlen, heads, head_dim]``, and None for the weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from bsfa_kernel import Geometry, block_maxima

    recorder = _recorder.get()
    if recorder is None:
        raise RuntimeError(f"attention {ATTENTION_NAME!r} works within bsfa_calib.capturing() only")
    if softcap is not None or s_aux is not None:
        what = "caps its scores (softcap)" if softcap is not None else "has attention sinks (s_aux)"
        raise CaptureError(
            f"this model's attention {what}, which block-sparse attention does not do"
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    layer = getattr(module, "layer_idx", None)
    if layer is not None and causal and query.shape[2] == key.shape[2]:
        if attention_mask is not None:
            recorder.dense[layer] = "its mask is not plainly causal (sliding window, chunks)"
        elif options.get("position_bias") is not None:
            recorder.dense[layer] = "it adds a bias to its scores"
        else:
            maxima = block_maxima(
                query.transpose(1, 2),
                key.transpose(1, 2),
                scale=scaling,
                rule=recorder.rule,
                geometry=Geometry(recorder.q_block, recorder.k_block),
            )
            recorder.sink(layer, maxima[0])
    output, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **options,
    )
    return output, None
