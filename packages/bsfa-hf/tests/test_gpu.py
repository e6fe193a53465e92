# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Models on a GPU, by the native kernel, against the same on the CPU, by the reference."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import bsfa_hf
from bsfa_calib.capture import calibrate
from tiny import HEADS, LAYERS, VOCABULARY, table, tokens

pytestmark = pytest.mark.gpu


def model_of_kernel_size(device: str) -> Any:
    """A model whose heads have a size that the kernels are made for."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=64,
        head_dim=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.mul_(12)
    return model.to(device, torch.bfloat16)


@pytest.fixture
def models() -> tuple[Any, Any]:
    """The same weights on the CPU and on the GPU."""
    if not torch.cuda.is_available():
        if os.environ.get("BSFA_REQUIRE_GPU") == "1":
            pytest.fail("BSFA_REQUIRE_GPU is set, and torch finds no CUDA device")
        pytest.skip("needs a CUDA device")
    return model_of_kernel_size("cpu"), model_of_kernel_size("cuda")


def test_a_model_that_skips_nothing_gives_the_logits_of_sdpa(models: tuple[Any, Any]) -> None:
    _, model = models
    prompt = tokens(700).to("cuda")
    expected = model(prompt).logits.float()
    with bsfa_hf.enabled(model, table(-math.inf)) as stats:
        found = model(prompt).logits.float()
    assert stats.sparse_calls == LAYERS
    # Both round to bfloat16, at other places.
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("rule", ["absolute", "running_max", "peak_lse"])
def test_a_sparse_model_keeps_the_blocks_that_the_reference_keeps(
    models: tuple[Any, Any], rule: str
) -> None:
    samples = [tokens(1000)[0].tolist()]
    thresholds = calibrate(models[0], samples, k_values=[4], rule=rule)
    kept = []
    for model in models:
        with bsfa_hf.enabled(model, thresholds, k=4) as stats:
            model(tokens(1000).to(model.device))
        kept.append(stats.mean_kept_fraction)
    assert 0.2 < kept[1] < 0.95
    assert kept[1] == pytest.approx(kept[0], abs=0.02)


def test_generation_after_a_sparse_prefill_goes_on_from_its_cache(models: tuple[Any, Any]) -> None:
    _, model = models
    prompt = tokens(600).to("cuda")
    with bsfa_hf.enabled(model, table(-math.inf)):
        found = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, model.generate(prompt, max_new_tokens=4, do_sample=False))
