# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The models that whole-model benchmarks run: a real one, or a known shape with random weights."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# With random weights a model's answers mean nothing, and its time is that of the real one. Where
# one GPU of 80 GB has no room for a model, ``cut`` says what was left of it, and its name does.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 5e5,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rope_theta": 1e5,
    },
    # Attention sinks; a window in every other layer. Nothing is cut: 42 GB in 16 bits.
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
    },
    # Full attention of head_dim 256 in every fourth layer. Each token still runs through 10 experts
    # and the shared one in all 48 layers: of 160 GB in 16 bits 25 are left, and of the time all.
    "qwen3-next-80b": {
        "model_type": "qwen3_next",
        "cut": "64 of 512 experts",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
        },
    },
    # For tests of the programs.
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "rope_theta": 1e4,
    },
}
_POSITIONS = 1 << 20


def add_model_options(
    parser: argparse.ArgumentParser, drawn: str | None = "random weights and tokens"
) -> None:
    """The options that choose a model and its input; ``drawn``: by --seed, if there is one."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="GGUF file, model directory or hub id")
    which.add_argument("--model-shape", choices=SHAPES, help="this shape, with random weights")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter for --model to merge in")
    parser.add_argument("--text", type=Path, help="text to read; random tokens without")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a self-test")
    if drawn is None:
        parser.set_defaults(seed=0)
    else:
        parser.add_argument("--seed", type=int, default=0, help=f"of {drawn}")


def build(shape: str, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """A model of a known shape, a Llama if it names no type, with random weights on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"max_position_embeddings": _POSITIONS, **SHAPES[shape]}
    settings.pop("cut", None)
    kind = settings.pop("model_type", "llama")
    if theta := settings.pop("rope_theta", None):
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    models: Any = AutoModelForCausalLM
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(seed)
    with device:
        return models.from_config(config, dtype=dtype).eval()


def shape_name(shape: str) -> str:
    """What a model of a known shape is called in records."""
    cut = SHAPES[shape].get("cut")
    return f"{shape}{f' with {cut}' if cut else ''}, random weights"


def load(arguments: argparse.Namespace) -> tuple[Any, Any, str]:
    """The model that the options name, its tokenizer or None, and its name for a record."""
    device = torch.device(arguments.device)
    adapter: Path | None = getattr(arguments, "adapter", None)
    if arguments.model_shape:
        if adapter is not None:
            raise ValueError("--adapter needs --model: random weights have nothing to adapt")
        dtype = getattr(torch, arguments.dtype)
        model = build(arguments.model_shape, dtype=dtype, device=device, seed=arguments.seed)
        return model, None, shape_name(arguments.model_shape)
    from bsfa_calib import models

    if adapter is not None:
        check_base(adapter, Path(arguments.model).name)
    model, tokenizer = models.load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    name = Path(arguments.model).name.removesuffix(".gguf")
    if adapter is not None:
        merge_adapter(model, adapter)
        name = f"{name} + {adapter.resolve().name}"
    return model, tokenizer, name


def check_base(adapter: Path, name: str) -> None:
    """Refuse a model that the adapter was not trained on, such as one with another merged in.

    Raises:
        FileNotFoundError: the adapter has no ``extension.json``.
        ValueError: it is damaged, or for a model of another name.
    """
    base = adapter_extension(adapter).get("base_model", name)
    if base != name:
        raise ValueError(f"{adapter} is for the model {base}, got {name}")


def set_rotary(model: Any, theta: float, positions: int) -> None:
    """Give a model another rotary base, and let it be used up to another position.

    Args:
        model: a decoder of transformers with plain rotary embeddings, as Llama's.
        theta: the base.
        positions: the longest sequence, in tokens.

    Raises:
        ValueError: its embeddings are not rotary, or are scaled in some other way.
    """
    decoder, config = model.get_decoder(), model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None)
    if not hasattr(decoder, "rotary_emb") or not parameters:
        raise ValueError(f"{type(model).__name__} has no rotary embeddings that can be changed")
    if parameters.get("rope_type", "default") != "default":
        raise ValueError(
            f"rotary embeddings must be of type default, got {parameters['rope_type']}"
        )
    config.rope_parameters = {"rope_type": "default", "rope_theta": float(theta)}
    config.max_position_embeddings = int(positions)
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(model.device)


def adapter_extension(folder: Path) -> dict[str, Any]:
    """What ``extension.json`` of an adapter says: rotary base, positions, and where it is from.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or does not state the first two.
    """
    file = folder / "extension.json"
    extension = _object(file)
    for key in ("rope_theta", "max_position_embeddings"):
        value = extension.get(key)
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{file} must state {key} above 0, got {value!r}")
    return extension


def _object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def adapter_config(folder: Path) -> dict[str, Any]:
    """The PEFT configuration of an adapter, which must be plain LoRA.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is damaged, of another kind, or layers have ranks or alphas of their own.
    """
    config = _object(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise ValueError(f"{folder} must hold a plain LoRA adapter, got {config.get('peft_type')}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError(f"{folder} must have one rank and one alpha for all layers")
    return config


def adapter_factors(folder: Path) -> dict[str, Tensor]:
    """The factors of an adapter, by the names that PEFT gives them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: their file is damaged, or has not the SHA-256 that ``extension.json`` may state.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    stated = adapter_extension(folder).get("sha256")
    found = hashlib.sha256(content).hexdigest()
    if stated not in (None, found):
        raise ValueError(f"{file} is damaged: its SHA-256 must be {stated}, got {found}")
    try:
        return load(content)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def merge_adapter(model: Any, folder: Path) -> None:
    """Add a LoRA adapter to the weights of a model, and set its rotary base and positions.

    The product of the adapter's factors is taken in float32, and the sum is rounded once.

    Args:
        model: the model that the adapter was trained on, in any dtype.
        folder: what ``extend/train.py`` wrote: ``adapter_config.json`` and
            ``adapter_model.safetensors`` in PEFT's format, and ``extension.json`` with
            ``rope_theta``, ``max_position_embeddings`` and the factors' ``sha256``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the adapter is not one for this model, of a kind other than plain LoRA, or
            damaged.
    """
    config = adapter_config(folder)
    extension = adapter_extension(folder)
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1.0)
    factors = adapter_factors(folder)
    modules = dict(model.named_modules())
    merged = 0
    with torch.no_grad():
        for key, down in factors.items():
            name, found, _ = key.removeprefix("base_model.model.").partition(".lora_A")
            if not found:
                continue
            up = factors[key.replace(".lora_A", ".lora_B")]
            weight = getattr(modules.get(name), "weight", None)
            if weight is None or weight.shape != (up.shape[0], down.shape[1]):
                raise ValueError(f"{folder} is not for this model: {name} does not fit")
            if not weight.is_floating_point():
                raise ValueError(f"weights must not be packed to add an adapter, {name} is")
            change = scale * (up.to(weight.device).float() @ down.to(weight.device).float())
            weight.copy_(weight.float() + change)
            merged += 2
    if merged != len(factors) or not merged:
        raise ValueError(f"{folder} must hold pairs of LoRA factors and nothing else")
    set_rotary(model, extension["rope_theta"], extension["max_position_embeddings"])


def tokens(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, seqlen: int, samples: int
) -> list[list[int]]:
    """Samples of ``seqlen`` token ids: consecutive pieces of the text, or random ones.

    Raises:
        ValueError: the text is too short, or the model has no tokenizer.
    """
    if arguments.text is None:
        generator = torch.Generator().manual_seed(arguments.seed)
        size = (samples, seqlen)
        vocabulary = model.config.get_text_config().vocab_size
        ids: Tensor = torch.randint(vocabulary, size, generator=generator)
        return [list(map(int, row)) for row in ids]
    if tokenizer is None:
        raise ValueError("--text needs --model: a model with random weights has no tokenizer")
    every: list[int] = tokenizer(arguments.text.read_text(encoding="utf-8")).input_ids
    if len(every) < samples * seqlen:
        raise ValueError(
            f"{samples} samples of {seqlen} tokens need {samples * seqlen} tokens, "
            f"{arguments.text} has {len(every)}"
        )
    return [every[start : start + seqlen] for start in range(0, samples * seqlen, seqlen)]


def prefill(model: Any, ids: list[int], *, use_cache: bool) -> int:
    """Read a prompt and return the first token; the device is done when it returns."""
    input_ids = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=input_ids, use_cache=use_cache, logits_to_keep=1).logits
    return int(logits[0, -1].argmax())
