# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The back end on CUDA: vLLM's FlashAttention, with block-sparse prefill."""

from __future__ import annotations

from typing import Any

import torch
import vllm
from torch import Tensor

from bsfa_vllm.binding import engine_of, refusals
from bsfa_vllm.splitting import SparseBuilder, SparseImpl
from bsfa_vllm.versions import check_version

check_version(vllm.__version__)

from vllm.config import (  # noqa: E402
    get_current_vllm_config,
    get_current_vllm_config_or_none,
    get_layers_from_vllm_config,
)
from vllm.distributed import get_tensor_model_parallel_rank  # noqa: E402
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase  # noqa: E402
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport, MultipleOf  # noqa: E402
from vllm.v1.attention.backends.flash_attn import (  # noqa: E402
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

_PAGE = 64


class CUDABuilder(SparseBuilder, FlashAttentionMetadataBuilder):
    """Makes the metadata of a step."""

    # No call with a row that runs block-sparse is ever captured.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        """As vLLM's."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
        dtype, identity = vllm_config.model_config.dtype, str(vllm_config.instance_id)
        self.prepare(layers, kv_cache_spec, dtype, identity)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Full graphs for steps of decoding alone."""
        return AttentionCGSupport.UNIFORM_BATCH


class CUDAImpl(SparseImpl, FlashAttentionImpl):
    """Attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's."""
        super().__init__(*args, **kwargs)
        config, rank = get_current_vllm_config(), get_tensor_model_parallel_rank()
        device = torch.device("cuda", torch.cuda.current_device())
        self.attach(engine_of(config, rank, device, required=True))

    def pages(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [pages, page_size, kv_heads, head_dim], as views of the cache."""
        k, v = kv_cache.transpose(1, 2).chunk(2, dim=-1)
        return canonicalize_singleton_dim_strides(k), canonicalize_singleton_dim_strides(v)


class CUDABackend(FlashAttentionBackend):
    """vLLM's FlashAttention back end, with block-sparse prefill; registered as CUSTOM."""

    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]  # noqa: RUF012 - as vLLM's

    @staticmethod
    def get_name() -> str:
        """A name that this release's list of back ends has."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[CUDAImpl]:
        """The layers' implementation."""
        return CUDAImpl

    @staticmethod
    def get_builder_cls() -> type[CUDABuilder]:
        """What makes metadata."""
        return CUDABuilder

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        """Pages that the kernels load by TMA: multiples of a key block."""
        return [MultipleOf(_PAGE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The default, if it is a whole number of key blocks; else the next one that is."""
        return -(-default_block_size // _PAGE) * _PAGE

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        """Caches of 16 bits."""
        return kv_cache_dtype is None or kv_cache_dtype in cls.supported_kv_cache_dtypes

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """No: where a chunk ends within a block of queries, fewer of them decide."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: steps are split by the lengths that the host knows."""
        return False

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Why a model or a configuration cannot run, in words; empty if it can."""
        reasons: list[str] = super().validate_configuration(*args, **kwargs)
        config = get_current_vllm_config_or_none()
        if config is not None and getattr(config, "model_config", None) is not None:
            reasons += refusals(config)
        return reasons


class NamedCUDABackend(CUDABackend):
    """The same under its own name, where vLLM takes new ones."""

    @staticmethod
    def get_name() -> str:
        """The name that the plug-in registers."""
        return "BSFA"
