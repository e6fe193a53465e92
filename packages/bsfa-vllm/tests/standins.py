# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Stand-ins for the parts of vLLM that the back end extends, as in 0.26 to 0.33."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsfa_calib import ThresholdTable
from bsfa_vllm.splitting import SparseBuilder, SparseImpl

LAYERS, HEADS, KV_HEADS, HEAD_DIM, PAGE = 2, 4, 2, 64, 64
# Of a cache.
SPEC = SimpleNamespace(head_size=HEAD_DIM, attention_chunk_size=None)


def config(**changes: Any) -> Any:
    """A configuration of a model with 2 layers of 4 heads, as far as the package reads it."""
    values: dict[str, Any] = {
        "model": "some/tiny-model",
        "additional_config": {},
        "tensor_parallel_size": 1,
        "rank": 0,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "cache_dtype": "auto",
        "use_mla": False,
        "speculative_config": None,
        "instance_id": "instance",
        "dtype": torch.bfloat16,
    } | changes
    parallel = SimpleNamespace(
        tensor_parallel_size=values["tensor_parallel_size"],
        rank=values["rank"],
        data_parallel_rank=0,
        decode_context_parallel_size=values["decode_context_parallel_size"],
        prefill_context_parallel_size=values["prefill_context_parallel_size"],
    )
    model = SimpleNamespace(
        model=values["model"],
        use_mla=values["use_mla"],
        dtype=values["dtype"],
        hf_text_config=SimpleNamespace(num_hidden_layers=LAYERS),
        get_num_attention_heads=lambda parallel: HEADS // parallel.tensor_parallel_size,
    )
    return SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        cache_config=SimpleNamespace(cache_dtype=values["cache_dtype"]),
        additional_config=values["additional_config"],
        speculative_config=values["speculative_config"],
        instance_id=values["instance_id"],
    )


def table(path: Any, value: float, **changes: Any) -> str:
    """A threshold table of one value in a file, for blocks of 64x64."""
    fields: dict[str, Any] = {
        "thresholds": np.full((1, LAYERS, HEADS, 1), value, np.float32),
        "points": (0.5,),
        "axis": "target_sparsity",
        "model": "tiny-model",
        "rule": "peak_lse",
        "q_block": 64,
        "k_block": 64,
    }
    ThresholdTable(**(fields | changes)).save(path)
    return str(path)


@dataclass
class Common:
    """What the engine tells a builder of a step: the fields of 0.26 and later that matter here."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: bool | Tensor = True
    is_prefilling: Tensor | None = None
    seq_lens_cpu_upper_bound: Tensor | None = None
    mm_req_doc_ranges: dict[int, Any] | None = None
    rswa_prefix_lens: Tensor | None = None
    _seq_lens_cpu: Tensor | None = None


@dataclass
class Metadata:
    """What a builder makes of it."""

    num_actual_tokens: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    max_num_splits: int = 32
    prefix: int = 0


class Builder:
    """vLLM's builder."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.built: list[tuple[int, bool]] = []

    def build(self, common_prefix_len: int, common: Common, fast_build: bool = False) -> Metadata:
        self.built.append((common.num_reqs, fast_build))
        assert common.query_start_loc_cpu[0] == 0 == common.query_start_loc[0]
        assert common.query_start_loc_cpu.tolist() == common.query_start_loc.tolist()
        assert len(common.seq_lens) == len(common.block_table_tensor) == common.num_reqs
        assert len(common.slot_mapping) == common.num_actual_tokens
        return Metadata(
            common.num_actual_tokens,
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.slot_mapping,
            prefix=common_prefix_len,
        )

    def build_for_cudagraph_capture(self, common: Common) -> Metadata:
        return self.build(0, common)

    def update_block_table(self, metadata: Metadata, table: Tensor, slots: Tensor) -> Metadata:
        changed = copy.copy(metadata)
        changed.block_table, changed.slot_mapping = table, slots
        return changed


class Impl:
    """vLLM's implementation: dense attention over pages, one query head after the other."""

    def __init__(self, **attributes: Any) -> None:
        self.head_size, self.scale, self.attn_type = HEAD_DIM, HEAD_DIM**-0.5, "decoder"
        self.num_heads = HEADS
        self.sinks: Any = None
        self.sliding_window: Any = (-1, -1)
        self.tokens = 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization")
        if metadata is None:
            return output.fill_(0)
        self.tokens += metadata.num_actual_tokens
        starts = metadata.query_start_loc.tolist()
        for row, seqlen_k in enumerate(metadata.seq_lens.tolist()):
            q = query[starts[row] : starts[row + 1]]
            pages = kv_cache[metadata.block_table[row][: -(-seqlen_k // PAGE)].long()]
            k, v = pages.transpose(1, 2).flatten(0, 1)[:seqlen_k].split(HEAD_DIM, -1)
            output[starts[row] : starts[row + 1]] = dense(q, k, v, self.sinks)
        return output


def dense(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Causal attention of q [queries, heads, d] to k, v [keys, kv_heads, d]; sinks are [heads]."""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * HEAD_DIM**-0.5
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(k) - len(q))
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:2], 1)
        scores = torch.cat((scores, column), -1)
    weights = scores.softmax(-1)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))


class OurBuilder(SparseBuilder, Builder):
    """The back end's builder."""


class OurImpl(SparseImpl, Impl):
    """The back end's implementation."""

    def pages(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        k, v = kv_cache.transpose(1, 2).split(HEAD_DIM, -1)
        return k, v


@dataclass
class Step:
    """A step of random rows over a cache with garbage behind the ends."""

    rows: list[tuple[int, int]]
    padding: int = 0
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        queries = [q for q, _ in self.rows] + [0] * self.padding
        keys = [k for _, k in self.rows] + [0] * self.padding
        counts = [-(-k // PAGE) for k in keys]
        tokens, pages = sum(queries), sum(counts)
        self.cache = torch.randn((pages + 1, KV_HEADS, PAGE, 2 * HEAD_DIM), generator=generator)
        order = torch.randperm(pages, generator=generator).to(torch.int32)
        block_table = torch.full((len(keys), max(counts) + 2), 1 << 20, dtype=torch.int32)
        taken = 0
        for row, count in enumerate(counts):
            block_table[row, :count] = order[taken : taken + count]
            taken += count
            if keys[row] % PAGE:
                self.cache[block_table[row, count - 1], :, keys[row] % PAGE :] = torch.nan
        self.query = torch.randn((tokens, HEADS, HEAD_DIM), generator=generator)
        starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
        lengths = torch.tensor(keys, dtype=torch.int32)
        self.common = Common(
            query_start_loc=starts,
            query_start_loc_cpu=starts.clone(),
            seq_lens=lengths,
            num_reqs=len(keys),
            num_actual_tokens=tokens,
            max_query_len=max(queries),
            max_seq_len=max(keys),
            block_table_tensor=block_table,
            slot_mapping=torch.zeros(tokens, dtype=torch.int64),
            seq_lens_cpu_upper_bound=lengths.clone(),
            **self.changes,
        )

    def expected(self, sinks: Tensor | None = None) -> Tensor:
        """What dense attention gives."""
        parts = []
        starts = self.common.query_start_loc.tolist()
        for row in range(len(self.rows)):
            k, v = self.keys_and_values(row)
            parts.append(dense(self.query[starts[row] : starts[row + 1]], k, v, sinks))
        return torch.cat(parts)

    def keys_and_values(self, row: int) -> tuple[Tensor, Tensor]:
        """Those of a row, each [keys, kv_heads, head_dim]."""
        seqlen_k = self.rows[row][1]
        table = self.common.block_table_tensor[row][: -(-seqlen_k // PAGE)].long()
        k, v = self.cache[table].transpose(1, 2).flatten(0, 1)[:seqlen_k].split(HEAD_DIM, -1)
        return k, v
