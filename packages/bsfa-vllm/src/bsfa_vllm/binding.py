# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""From vLLM's configuration to the thresholds of this rank.

Only attributes of the configuration are read; vLLM itself is not imported.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
import weakref
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from bsfa_calib.binding import ModelShape, State, bind
from bsfa_calib.convert import load_table
from bsfa_calib.dense import are_sinks
from bsfa_calib.reasons import Reason
from bsfa_kernel import BuildInfo, Geometry, build_info
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
        able_layers: layers that can run block-sparse.
        identity: vLLM's name of the engine, the same for all ranks once builders know their layers.
        rank: name of this rank.
        counts_rows: whether this rank's calls count: the others of its tensor-parallel group run
            the same rows.
        started: seconds since the epoch.
        enabled: whether steps are split; a benchmark turns it off to time vLLM's own attention.
        served: whether a step of a user has been counted; graphs are captured before.
        head_dims: those that there are kernels for; None for all.
    """

    def __init__(
        self,
        state: State,
        config: Any,
        rank: int = 0,
        head_dims: Collection[int] | None = None,
    ) -> None:
        """Start with nothing counted.

        Args:
            state: thresholds of this rank.
            config: vLLM's, kept so that no other object gets its identity meanwhile.
            rank: of this process in its tensor-parallel group.
            head_dims: those that there are kernels for; None for all.
        """
        self.state, self._config, self.enabled = state, config, True
        self.head_dims, self.served = head_dims, False
        self.calls: Counter[str] = Counter()
        self.dense_layers: dict[int, Reason] = {}
        self.able_layers: set[int] = set()
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


# By vLLM's name and the identity of the model's configuration, which each engine keeps alive: a
# draft is loaded with a copy of the rest.
_engines: weakref.WeakValueDictionary[tuple[str, int], Engine] = weakref.WeakValueDictionary()


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
        ValueError: a setting is wrong or missing, the table does not fit the model, there is no
            kernel for the device, or the engine is configured in a way that the back end does not
            support.
    """
    # Parts of a model, of a draft as of another, have copies of its configuration.
    if getattr(config.model_config, "runner_type", None) == "draft":
        return None
    speculative = getattr(config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    # Without a model of their own, as n-grams of the prompt are, drafts have the model's.
    target = getattr(speculative, "target_model_config", None)
    if draft is not None and draft is config.model_config and draft is not target:
        return None
    with _lock:
        key = (str(config.instance_id), id(config.model_config))
        engine = _engines.get(key)
        if engine is None:
            settings = read_settings(getattr(config, "additional_config", None))
            if settings is None:
                if required:
                    raise ValueError(_HOW)
                return None
            refused = refusals(config)
            if refused:
                raise ValueError(refused[0])
            engine = _engines[key] = _make(config, settings, rank, device)
    return engine


def forget_engines() -> None:
    """Begin anew in a process that was forked: the engines are its parent's."""
    global _engines, _lock
    _engines, _lock = weakref.WeakValueDictionary(), threading.Lock()


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
    elif cache not in ("auto", dtype := str(model.dtype).removeprefix("torch.")):
        found.append(
            f"block-sparse attention reads caches in the model's {dtype}, got --kv-cache-dtype "
            f"{cache}: leave it at auto"
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
    with contextlib.suppress(OSError):  # such as of a name that is too long for a path
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
    table = load_table(settings.thresholds)
    head_dims = None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        geometry = Geometry(table.q_block, table.k_block)
        head_dims = kernel_head_dims(
            build_info(), capability, config.model_config.dtype, geometry, settings.selection
        )
    # The first step takes thresholds and counters to the device. They must not be in the memory of
    # a model that is loaded: in sleep mode vLLM unmaps it, and gives it back empty.
    state = bind(
        table,
        shape,
        settings.point,
        devices=[torch.device("cpu")],
        heads=local_heads(shape.heads, parallel.tensor_parallel_size, rank),
        check_model=settings.check_model,
        selection=settings.selection,
    )
    return Engine(state, config, rank, head_dims)


def kernel_head_dims(
    info: BuildInfo,
    capability: tuple[int, int],
    dtype: torch.dtype,
    geometry: Geometry,
    selection: str,
) -> frozenset[int]:
    """Head dimensions that can be served on a GPU.

    Args:
        info: of the native library.
        capability: of the GPU, major and minor.
        dtype: of queries, keys and values.
        geometry: the sparsity block.
        selection: from what scores blocks are chosen; "int8" needs kernels of its own.

    Raises:
        ValueError: there are none; the message tells why.
    """
    names = ["forward", *(["select_blocks", "attend_blocks"] if selection == "int8" else [])]
    wanted, major = str(dtype).removeprefix("torch."), capability[0]
    found = {
        name: {
            head_dim
            for kernel in info.kernels
            if (kernel.name, kernel.dtype) == (name, wanted)
            and geometry in kernel.geometries
            and (kernel.arch // 10 == major or (kernel.ptx and kernel.arch // 10 < major))
            for head_dim in kernel.head_dims
        }
        for name in names
    }
    common = frozenset.intersection(*map(frozenset, found.values()))
    if not common:
        lacking = [name for name in names if not found[name]] or names
        raise ValueError(
            f"bsfa-kernel cannot run on this GPU: no kernel {' and '.join(lacking)} for {wanted}, "
            f"sparsity blocks of {geometry} and compute capability "
            f"{'.'.join(map(str, capability))}; {info.reason or info}"
        )
    return common


def layer_index(name: str) -> int | None:
    """The index in a layer's name, as 17 of ``model.layers.17.self_attn.attn``.

    Returns:
        It; None where the name holds no number, or several.
    """
    found = [int(part) for part in name.split(".") if re.fullmatch(r"\d+", part)]
    return found[0] if len(found) == 1 else None


def layer_reason(impl: Any, head_dims: Collection[int] | None = None) -> Reason | None:
    """Why a layer runs dense whatever the step.

    Args:
        impl: vLLM's implementation, of which attributes are read.
        head_dims: those that there are kernels for; None for all.
    """
    if getattr(impl, "attn_type", "decoder") != "decoder":
        return Reason.NOT_CAUSAL
    window: Any = getattr(impl, "sliding_window", None)
    # The FlashAttention back end has two extents, of which -1 means none; the CPU's has one.
    extents = window if isinstance(window, tuple) else (window,)
    if any(extent is not None and extent >= 0 for extent in extents):
        return Reason.SLIDING_WINDOW
    if getattr(impl, "logits_soft_cap", 0):
        return Reason.SOFTCAP
    if not are_sinks(getattr(impl, "sinks", None), impl.num_heads):
        return Reason.SINKS
    if getattr(impl, "alibi_slopes", None) is not None:
        return Reason.BIAS
    if head_dims is not None and impl.head_size not in head_dims:
        return Reason.NO_KERNEL
    return None
