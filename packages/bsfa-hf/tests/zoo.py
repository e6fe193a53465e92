# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Every type of AutoModelForCausalLM, built tiny and with a layer of each kind it has."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 97
WINDOW = 100
LARGEST = 15_000_000  # parameters

# What a configuration that has such an attribute is given.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # encoders and decoders
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "num_encoder_layers": 3,
    "num_decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 2,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ffn_dim": 64,
    "is_decoder": True,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 64,
    "first_k_dense_replace": 1,
    "zero_expert_num": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    # learned choices of keys
    "index_topk": 64,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_block_size": 16,
    "index_topk_blocks": 3,
    "index_local_blocks": 1,
    # recurrent layers
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "state_size": 8,
    "ssm_state_size": 8,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "attention_hidden_size": 64,
    "lru_width": 64,
    # per-layer inputs
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}

# What some types need beside that.
_WINDOW_AND_FULL = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXTRAS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": _WINDOW_AND_FULL,
        "rope_parameters": dict.fromkeys(_WINDOW_AND_FULL, _ROPE),
    },
    "cwm": {"layer_types": _WINDOW_AND_FULL},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"max_position_embeddings": 1024},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "shared_experts_intermediate_size": 32,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": _WINDOW_AND_FULL * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str, small: dict[str, Any] = SMALL) -> Any:
    """The configuration of a type, as small as its attributes let it be."""
    usual = AutoConfig.for_model(kind)
    return AutoConfig.for_model(kind, **(_shrunk(usual, small) | EXTRAS.get(kind, {})))


def _shrunk(usual: Any, small: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in small.items() if _settable(usual, name)}
    for old, new in usual.attribute_map.items():
        if new in given:
            given.pop(old, None)
    if "qk_rope_head_dim" in given and "head_dim" in given:
        given["head_dim"] = given["qk_rope_head_dim"]
    if _value(usual, "num_attention_heads") == _value(usual, "num_key_value_heads"):
        given["num_key_value_heads"] = small["num_attention_heads"]
    types = _value(usual, "layer_types")
    if types and _settable(usual, "layer_types") and isinstance(types, list):
        types = list(dict.fromkeys(types))
        given["layer_types"] = types * (2 // len(types) or 1)
        given["num_hidden_layers"] = len(given["layer_types"])
    for name in ("sliding_window", "attention_chunk_size"):
        if isinstance(_value(usual, name), int):
            given[name] = WINDOW
    for part in usual.sub_configs:
        if hasattr(_value(usual, part), "sub_configs"):
            given[part] = _shrunk(_value(usual, part), small)
    return given


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except (RuntimeError, ValueError):  # it differs between layers, or the type has none
        return None


def _settable(config: Any, name: str) -> bool:
    """Whether a configuration has a value under a name that it can be given."""
    kind = getattr(type(config), config.attribute_map.get(name, name), None)
    if isinstance(kind, property) and kind.fset is None:
        return False
    return _value(config, name) is not None


def tiny(kind: str) -> Any:
    """A model of a type, with random weights whose attention is neither flat nor one-hot.

    Raises:
        ValueError: it is not tiny.
    """
    config = tiny_config(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{kind} has {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and any(part in name for part in ("q_proj", "k_proj", "qkv")):
            parameter.data.normal_(0, 0.16)
    return model
