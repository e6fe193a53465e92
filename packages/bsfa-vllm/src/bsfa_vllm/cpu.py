# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The back end on a CPU: vLLM's own, with block-sparse prefill by the reference.

For tests and small models: the reference is exact, not fast.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm
from torch import Tensor

from bsfa_vllm.binding import engine_of
from bsfa_vllm.splitting import SparseBuilder, SparseImpl
from bsfa_vllm.versions import check_version

check_version(vllm.__version__)

from vllm.config import get_current_vllm_config, get_layers_from_vllm_config  # noqa: E402
from vllm.distributed import get_tensor_model_parallel_rank  # noqa: E402
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase  # noqa: E402
from vllm.v1.attention.backends.cpu_attn import (  # noqa: E402
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

# Instruction sets whose cache is a plain one, keys being transposed.
_PLAIN = ("vec", "vec16")


class CPUBuilder(SparseBuilder, CPUAttentionMetadataBuilder):
    """Makes the metadata of a step."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        """As vLLM's.

        Raises:
            ValueError: keys lie in the cache in an order of this machine's instruction set.
        """
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
        dtype, identity = vllm_config.model_config.dtype, str(vllm_config.instance_id)
        self.prepare(layers, kv_cache_spec, dtype, identity)
        if self._engine is not None and self.isa not in _PLAIN:
            raise ValueError(
                "on a CPU block-sparse attention reads a cache in the order of vLLM's "
                f"{' or '.join(_PLAIN)} kernels, and this model uses those for {self.isa}: serve "
                "it with --dtype float32"
            )


class CPUImpl(SparseImpl, CPUAttentionBackendImpl):
    """Attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's."""
        super().__init__(*args, **kwargs)
        config, rank = get_current_vllm_config(), get_tensor_model_parallel_rank()
        self.attach(engine_of(config, rank, torch.device("cpu"), required=False))

    def pages(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [pages, page_size, kv_heads, head_dim], as views of the cache.

        A page of a head holds its keys as [head_dim, page_size], then its values as
        [page_size, head_dim].
        """
        pages, heads, size, _ = kv_cache.shape
        k, v = kv_cache.view(pages, heads, 2, -1).unbind(2)
        k = k.view(pages, heads, self.head_size, size).permute(0, 3, 1, 2)
        return k, v.view(pages, heads, size, self.head_size).transpose(1, 2)


class CPUBackend(CPUAttentionBackend):
    """vLLM's back end for CPUs, with block-sparse prefill."""

    @staticmethod
    def get_impl_cls() -> type[CPUImpl]:
        """The layers' implementation."""
        return CPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUBuilder]:
        """What makes metadata."""
        return CPUBuilder
