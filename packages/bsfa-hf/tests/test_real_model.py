# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The real model: exactness, restoring, padding and chunks on prompts of real text."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import bsfa_hf
from bsfa_calib import ThresholdTable, models
from bsfa_hf.cli.common import quiet
from bsfa_kernel import _native, block_sparse_attention

pytestmark = pytest.mark.model

# For each rule, a scalar at which this model skips a part of the blocks of such prompts.
SCALARS = {"absolute": 6.0, "running_max": -4.0, "peak_lse": -1.0}


@pytest.fixture(scope="module")
def loaded() -> Iterator[models.Loaded]:
    with quiet():
        yield models.load(os.environ["BSFA_TEST_MODEL"], dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def prompt(loaded: models.Loaded) -> Tensor:
    """1,111 tokens of real text."""
    root = Path(os.environ["BSFA_TEST_TEXT"])
    files = [root] if root.is_file() else sorted(root.rglob("*.txt"))
    text = "\n\n".join(file.read_text(encoding="utf-8")[:9000] for file in files[:4])
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"][:, :1111]
    assert ids.shape[1] == 1111
    return torch.as_tensor(ids)


@pytest.fixture(scope="module")
def real_inputs(loaded: models.Loaded, prompt: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v [1, seqlen, heads, head_dim] as four of the layers give them to attention."""
    layers = (0, 9, 19, 29)
    found = {}

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any):
        if module.layer_idx in layers:
            found[module.layer_idx] = tuple(x.transpose(1, 2) for x in (query, key, value))
        return sdpa_attention_forward(module, query, key, value, *rest, **more)

    AttentionInterface.register("bsfa_test_capture", attention)
    AttentionMaskInterface.register("bsfa_test_capture", sdpa_mask)
    before = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation("bsfa_test_capture")
    try:
        loaded.model(prompt, use_cache=False, logits_to_keep=1)
    finally:
        loaded.model.set_attn_implementation(before)
    return [found[layer] for layer in layers]


def scalar_table(model: Any, value: float, rule: str = "absolute") -> ThresholdTable:
    config = model.config
    shape = (1, config.num_hidden_layers, config.num_attention_heads, 1)
    return ThresholdTable(
        thresholds=np.full(shape, value, np.float32),
        points=(0.5,),
        axis="target_sparsity",
        rule=rule,
    )


def dense(*inputs: Tensor) -> Tensor:
    """torch's causal attention of q, k and v [batch, seqlen, heads, head_dim]."""
    q, k, v = (x.transpose(1, 2) for x in inputs)
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def relative(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / (expected.max() - expected.min()))


def test_minus_infinity_and_restoring_give_the_logits_of_sdpa(
    loaded: models.Loaded, prompt: Tensor
) -> None:
    model = loaded.model
    dense = model(prompt).logits
    with bsfa_hf.enabled(model, scalar_table(model, -math.inf)) as stats:
        sparse = model(prompt).logits
    assert stats.sparse_calls == model.config.num_hidden_layers
    assert not stats.dense_calls
    assert relative(sparse, dense) <= 1e-3
    assert torch.equal(model(prompt).logits, dense)
    assert model.config._attn_implementation == "sdpa"


def test_a_table_of_another_model_is_refused(loaded: models.Loaded) -> None:
    fitting = scalar_table(loaded.model, 0.0)
    with pytest.raises(ValueError, match="thresholds are of someone/another, and this model is"):
        bsfa_hf.enable(loaded.model, dataclasses.replace(fitting, model="someone/another"))
    name = models.identity(os.environ["BSFA_TEST_MODEL"], loaded.model)[0]
    bsfa_hf.enable(loaded.model, dataclasses.replace(fitting, model=f"owner/{name}"))
    bsfa_hf.disable(loaded.model)


@pytest.mark.parametrize("rule", sorted(SCALARS))
def test_chunks_and_padding_change_nothing(
    loaded: models.Loaded, prompt: Tensor, rule: str
) -> None:
    model = loaded.model
    short = prompt[:, 100:433]
    with bsfa_hf.enabled(model, scalar_table(model, SCALARS[rule], rule)) as stats:
        whole = model(prompt[:, :641], logits_to_keep=1).logits[:, -1]
        alone = model(short, logits_to_keep=1).logits[:, -1]
        assert 0.3 < stats.mean_kept_fraction < 0.95
        chunks = model.generate(
            prompt[:, :641],
            max_new_tokens=1,
            do_sample=False,
            prefill_chunk_size=256,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert relative(chunks.logits[0], whole) <= 1e-3
        ids = torch.zeros((2, 641), dtype=torch.long)
        mask = torch.zeros_like(ids)
        ids[0], mask[0] = prompt[0, :641], 1
        ids[1, -333:], mask[1, -333:] = short[0], 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        batch = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits[
            :, -1
        ]
        assert relative(batch[0], whole[0]) <= 1e-3
        assert relative(batch[1], alone[0]) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "arch", [0, *(pytest.param(arch, marks=pytest.mark.gpu) for arch in (80, 90))]
)
def test_real_inputs_give_no_more_than_twice_the_error_of_flash_attention(
    real_inputs: list[tuple[Tensor, Tensor, Tensor]], arch: int, dtype: torch.dtype
) -> None:
    """With the reference back end on the CPU (0) and with the kernels of each architecture."""
    device = "cuda" if arch else "cpu"
    if arch and not torch.cuda.is_available():
        if os.environ.get("BSFA_REQUIRE_GPU") == "1":
            pytest.fail("BSFA_REQUIRE_GPU is set, and torch finds no CUDA device")
        pytest.skip("needs a CUDA device")
    if arch == 90 and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("sm_90a code runs on compute capability 9.0 only")
    for layer in real_inputs:
        q, k, v = (x.to(device, dtype) for x in layer)
        expected = dense(q.double(), k.double(), v.double())
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            peer = dense(q, k, v).double() - expected
        nothing_skipped = torch.full((q.shape[2], 1), -math.inf, device=device)
        with _native.force_arch(arch):
            error = block_sparse_attention(q, k, v, nothing_skipped).double() - expected
        assert float(error.norm()) <= 2 * float(peer.norm())
        assert float(error.abs().max()) <= 2 * float(peer.abs().max())
        assert float(peer.norm()) > 0
