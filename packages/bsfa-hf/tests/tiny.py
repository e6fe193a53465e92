# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Tiny models with random weights, and tables of thresholds that make them skip about half."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from bsfa_calib import ThresholdTable

LAYERS, HEADS, KV_HEADS, VOCABULARY = 2, 4, 2, 97

# A threshold for each rule at which the tiny models keep some blocks and skip others.
HALF = {"absolute": 6.5, "running_max": 1.5, "peak_lse": 0.5}

EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {"sliding_window": 8192},  # longer than any prompt
    "mistral": {"sliding_window": 200},
    "gemma2": {"sliding_window": 200, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 200, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 200,
    },
}


def tiny_model(
    kind: str = "llama",
    *,
    seed: int = 0,
    implementation: str | None = None,
    vocabulary: int = VOCABULARY,
) -> Any:
    """A model with random weights whose attention is neither flat nor one-hot."""
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            **EXTRAS[kind],
        },
    )
    torch.manual_seed(seed)
    if implementation is None:
        implementation = "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    for name, parameter in model.named_parameters():
        if ("q_proj" in name or "k_proj" in name or "qkv_proj" in name) and parameter.ndim == 2:
            parameter.data.normal_(0, 0.16)
    return model


def small_llama() -> LlamaForCausalLM:
    """A Llama that reads bytes, and whose attention has something to choose between."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        attn_implementation="sdpa",
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).eval()


def byte_tokenizer() -> Any:
    """A tokenizer that takes a byte for a token, from 1 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index + 1 for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!")


def tokens(length: int, *, seed: int = 0, batch: int = 1) -> Tensor:
    """Random token ids, int64 [batch, length]; none is the padding token."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def table(
    value: float | None = None,
    *,
    rule: str = "absolute",
    rows: int = 6,
    layers: int = LAYERS,
    heads: int = HEADS,
    block: tuple[int, int] = (128, 64),
    points: tuple[int, ...] = (8,),
    model: str = "",
    voters: int = 1,
) -> ThresholdTable:
    """A table about one value, by default one that skips some blocks."""
    value = HALF[rule] if value is None else value
    thresholds = np.full((len(points), layers, heads, rows), value, np.float32)
    if np.isfinite(value):
        thresholds += 0.1 * np.arange(rows, dtype=np.float32) / max(rows, 1)
        thresholds += 0.1 * np.arange(heads, dtype=np.float32)[:, None]
        thresholds -= np.arange(len(points), dtype=np.float32)[:, None, None, None]
    return ThresholdTable(
        thresholds=thresholds,
        points=points,
        q_block=block[0],
        k_block=block[1],
        rule=rule,
        voters=voters,
        model=model,
    )


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Of logits, relative to their spread."""
    return float((a - b).abs().max() / (b.max() - b.min()))
