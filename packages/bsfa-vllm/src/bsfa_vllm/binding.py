# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""From vLLM's configuration to thresholds on the device of this rank.

Only attributes of the configuration are read; vLLM itself is not imported.
"""

from __future__ import annotations

import re
import threading
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bsfa_calib.binding import ModelShape, State, bind
from bsfa_calib.dense import kernel_head_dims
from bsfa_calib.reasons import Reason
from bsfa_kernel import Geometry
from bsfa_vllm.settings import KEY, Settings, read_settings

_HOW = (
    "the attention back end of bsfa-vllm needs a threshold table: pass --additional-config "
    f'\'{{"{KEY}": {{"thresholds": "TABLE.safetensors", "point": "target_sparsity=0.9"}}}}\', or '
    "set the environment variables BSFA_THRESHOLDS and BSFA_POINT"
)
_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")
_lock = threading.Lock()


class Engine:
    """What the layers of one engine share on one rank.

    Attributes:
        state: thresholds and counters of kept blocks.
        calls: rows of steps times the layers that ran them, by what became of them: a `Reason`, or
            "exact" or "int8" for block-sparse ones.
        dense_layers: layers that run dense whatever the step, and why.
        identity: the same for all ranks of an engine.
        rank: name of this rank.
        counts_rows: whether this rank's calls count: the others of its tensor-parallel group run
            the same rows.
        started: seconds since the epoch.
        enabled: whether steps are split; a benchmark turns it off to time vLLM's own attention.
    """

    def __init__(self, state: State, config: Any, rank: int = 0) -> None:
        """Start with nothing counted.

        Args:
            state: thresholds of this rank.
            config: vLLM's, kept so that no other object gets its identity meanwhile.
            rank: of this process in its tensor-parallel group.
        """
        self.state, self._config, self.enabled = state, config, True
        self.calls: Counter[str] = Counter()
        self.dense_layers: dict[int, Reason] = {}
        self.identity, self.started = str(config.instance_id), time.time()
        parallel = config.parallel_config
        ranks = (getattr(parallel, "data_parallel_rank", 0), getattr(parallel, "rank", rank))
        self.rank = ".".join(map(str, ranks))
        self.counts_rows = rank == 0

    @property
    def geometry(self) -> Geometry:
        """The sparsity block."""
        return self.state.geometry

    @property
    def layers(self) -> int:
        """Layers that there are thresholds for."""
        return len(self.state.thresholds)

    def options(self, selection: str) -> dict[str, Any]:
        """What ``block_sparse_attention`` is told, with blocks chosen as the plan says."""
        return {
            **self.state.kernel_options,
            "selection": selection,
            "expected_skipped": None,
        }


# By the identity of the configuration, which each engine keeps alive.
_engines: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()


def engine_of(config: Any, rank: int, device: torch.device, *, required: bool) -> Engine | None:
    """The engine that a configuration of vLLM describes, made at the first call.

    Args:
        config: its ``VllmConfig``.
        rank: of this process, under tensor parallelism.
        device: where the layers of this rank compute.
        required: whether a table must be named.

    Returns:
        The engine; None for a draft model, and where no table is named.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: a setting is wrong or missing, the table does not fit the model, or the engine
            is configured in a way that the back end does not support.
    """
    speculative = getattr(config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None and draft is config.model_config:
        return None
    with _lock:
        engine = _engines.get(id(config))
        if engine is None:
            settings = read_settings(getattr(config, "additional_config", None))
            if settings is None:
                if required:
                    raise ValueError(_HOW)
                return None
            refused = refusals(config)
            if refused:
                raise ValueError(refused[0])
            engine = _engines[id(config)] = _make(config, settings, rank, device)
    return engine


def engines() -> list[Engine]:
    """The engines of this process."""
    return list(_engines.values())


def refusals(config: Any) -> list[str]:
    """A sentence for everything in a configuration that the back end does not support."""
    found = []
    model, parallel = config.model_config, config.parallel_config
    if getattr(model, "use_mla", False):
        found.append(
            "block-sparse attention reads keys and values of each head, and this model's cache "
            "holds latent ones (MLA): choose another attention back end"
        )
    cache = str(getattr(config.cache_config, "cache_dtype", "auto"))
    if cache not in _CACHE_DTYPES:
        found.append(
            f"block-sparse attention reads caches of 16 bits, got --kv-cache-dtype {cache}: leave "
            "it at auto"
        )
    for name, flag in (("decode", "dcp"), ("prefill", "pcp")):
        size = getattr(parallel, f"{name}_context_parallel_size", 1)
        if size > 1:
            found.append(
                f"block-sparse attention needs the whole cache of a request on each rank, got a "
                f"{name} context parallel size ({flag}) of {size}: use tensor or pipeline "
                "parallelism"
            )
    return found


def model_shape(config: Any) -> ModelShape:
    """What a table must fit to serve a model, over all ranks."""
    model, parallel = config.model_config, config.parallel_config
    heads = model.get_num_attention_heads(parallel) * parallel.tensor_parallel_size
    return ModelShape(
        layers=int(model.hf_text_config.num_hidden_layers),
        heads=int(heads),
        names=tuple(model_names(str(model.model))),
        shown=str(model.model),
    )


def model_names(name: str) -> list[str]:
    """The names that a model may go by: what its path or id ends with.

    A snapshot in the cache of the Hub lies in .../models--owner--name/snapshots/commit, and a
    folder may be reached by a link.
    """
    path = Path(name)
    names = [name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]]
    names += [part.rsplit("--", 1)[-1] for part in path.parts if part.startswith("models--")]
    if path.exists():
        names.append(path.resolve().name)
    return names


def local_heads(heads: int, size: int, rank: int) -> slice:
    """The query heads of a rank: vLLM gives each a run of them, whether kv heads are shared or not.

    Raises:
        ValueError: the heads cannot be split evenly.
    """
    if heads % size:
        raise ValueError(
            f"under tensor parallelism the {heads} query heads must be split evenly, got {size} "
            "ranks"
        )
    each = heads // size
    return slice(rank * each, (rank + 1) * each)


def _make(config: Any, settings: Settings, rank: int, device: torch.device) -> Engine:
    parallel = config.parallel_config
    shape = model_shape(config)
    state = bind(
        settings.thresholds,
        shape,
        settings.point,
        devices=[device],
        heads=local_heads(shape.heads, parallel.tensor_parallel_size, rank),
        check_model=settings.check_model,
        selection=settings.selection,
    )
    return Engine(state, config, rank)


def layer_index(name: str) -> int | None:
    """The index in a layer's name, as 17 of ``model.layers.17.self_attn.attn``.

    Returns:
        It; None where the name holds no number, or several.
    """
    found = [int(part) for part in name.split(".") if re.fullmatch(r"\d+", part)]
    return found[0] if len(found) == 1 else None


def layer_reason(impl: Any, device: torch.device) -> Reason | None:
    """Why a layer runs dense whatever the step, from the attributes of vLLM's implementation."""
    if getattr(impl, "attn_type", "decoder") != "decoder":
        return Reason.NOT_CAUSAL
    window: Any = getattr(impl, "sliding_window", None)
    # The FlashAttention back end has two extents, of which -1 means none; the CPU's has one.
    extents = window if isinstance(window, tuple) else (window,)
    if any(extent is not None and extent >= 0 for extent in extents):
        return Reason.SLIDING_WINDOW
    if getattr(impl, "logits_soft_cap", 0):
        return Reason.SOFTCAP
    if getattr(impl, "sinks", None) is not None:
        return Reason.SINKS
    if getattr(impl, "alibi_slopes", None) is not None:
        return Reason.BIAS
    if device.type == "cuda":
        # Without any kernel the call is left to bsfa-kernel, whose error tells why there is none.
        head_dims = kernel_head_dims()
        if head_dims and impl.head_size not in head_dims:
            return Reason.NO_KERNEL
    return None
