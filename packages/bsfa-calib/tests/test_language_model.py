# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What a model's predictions are compared by, on small random models."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers import LlamaForCausalLM

from bsfa_calib.hook import BlockSparse, applied
from bsfa_calib.language_model import LanguageModel, band_edges, fingerprint
from tiny_calib import HEADS, LAYERS, small_llama

LENGTH = 512


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return small_llama()


def test_kl_and_nll_are_those_of_the_whole_logits(model: LlamaForCausalLM, ids: list[int]) -> None:
    language_model = LanguageModel(model)
    method = BlockSparse(torch.full((LAYERS, HEADS, 1), torch.inf), "absolute")
    dense = language_model.predict(ids)
    with applied(model, method):
        found = language_model.predict(ids)
        with torch.no_grad():
            sparse = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    with torch.no_grad():
        full = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    (band,) = language_model.compare(found, dense, ids)
    following = torch.tensor(ids)[1:, None]
    assert band.positions == LENGTH - 1
    assert band.kl == pytest.approx(float((full.exp() * (full - sparse)).sum(-1).mean()), rel=1e-4)
    assert band.nll == pytest.approx(float(-sparse.gather(1, following).mean()), rel=1e-4)
    (own,) = language_model.compare(dense, dense, ids)
    assert (own.kl, own.agreement) == (0, 1)


def test_tokens_of_another_tokenizer_are_refused(model: LlamaForCausalLM, ids: list[int]) -> None:
    for wrong in (256, 5000, -1):
        with pytest.raises(ValueError, match=f"below 256, the model's vocabulary, got {wrong}"):
            LanguageModel(model).predict([*ids[:7], wrong])


def test_a_fingerprint_is_of_all_that_a_model_computes_with() -> None:
    found = [fingerprint(small_llama())]
    assert fingerprint(small_llama()) == found[0]
    renamed = small_llama()
    renamed.config._name_or_path = "elsewhere/another-name"
    renamed.config.use_cache = False
    renamed.set_attn_implementation("eager")
    assert fingerprint(renamed) == found[0]

    changed = small_llama()
    changed.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    found.append(fingerprint(changed))
    for name, row, column in (
        ("embed_tokens", 200, 1),
        ("embed_tokens", 201, 1),
        ("norm", 3, None),
    ):
        changed = small_llama()
        with torch.no_grad():
            weight = getattr(changed.model, name).weight
            weight[row if column is None else (row, column)] += 0.5
        found.append(fingerprint(changed))
    changed = small_llama()
    with torch.no_grad():
        changed.model.embed_tokens.weight[[3, 4]] = changed.model.embed_tokens.weight[[4, 3]]
    found.append(fingerprint(changed))
    changed = small_llama()
    changed.model.rotary_emb.inv_freq[-1] *= 2
    found.append(fingerprint(changed))
    found.append(fingerprint(small_llama().to(torch.bfloat16)))
    for scale in (1.0, 2.0):
        changed = small_llama()
        weight = changed.model.layers[0].mlp.down_proj.weight
        packed = TwoTensor(weight.detach(), weight.detach() * scale)
        changed.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(packed)
        found.append(fingerprint(changed))
    assert len(set(found)) == len(found)


def test_a_model_whose_logits_are_scaled_is_compared_on_its_logits(ids: list[int]) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        logit_scale=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    language_model = LanguageModel(CohereForCausalLM(config).eval())
    found = language_model.predict(ids[:64])
    assert found.hidden.shape == (64, 256)


def test_an_answer_is_a_hit_iff_greedy_decoding_gives_it(
    model: LlamaForCausalLM, ids: list[int]
) -> None:
    language_model = LanguageModel(model)
    prompt = torch.tensor([ids[:300]])
    greedy = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False
    )[0, 300:].tolist()
    with applied(model, None):
        hit, likelihood, _ = language_model.answer(ids[:300], greedy)
        miss, worse, _ = language_model.answer(ids[:300], [*greedy[:3], (greedy[3] + 1) % 256])
    assert (hit, miss) == (True, False)
    assert worse < likelihood < 0
    with torch.no_grad():
        logits = model(torch.tensor([ids[:300] + greedy[:-1]])).logits[0, 299:].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(greedy)[:, None]).sum()
    assert likelihood == pytest.approx(float(expected), abs=1e-3)


def test_bands_double_and_cover_every_position() -> None:
    assert band_edges(100) == [(0, 100)]
    assert band_edges(2047) == [(0, 512), (512, 1024), (1024, 2047)]
