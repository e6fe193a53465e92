# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""A model under another attention function, and given back as it was."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from bsfa_calib import dense, switch
from bsfa_calib.dense import named, unknown_arguments
from bsfa_calib.hook import ATTENTION_NAME, BlockSparse, HookError, applied
from bsfa_calib.language_model import cache_argument
from bsfa_calib.reasons import Reason
from bsfa_kernel.geometry import forced_share
from tiny_calib import HEADS, LAYERS, small_llama, tiny_model

LENGTH = 512


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return small_llama()


@pytest.mark.parametrize("method", ["dense", "exact", "onlooker"])
def test_what_leaves_nothing_out_gives_the_logits_of_sdpa(
    model: LlamaForCausalLM, ids: list[int], method: str
) -> None:
    tokens = torch.tensor([ids])
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        chosen = {
            "dense": None,
            "exact": BlockSparse(torch.full((LAYERS, HEADS, 1), -math.inf), "peak_lse"),
            "onlooker": lambda *_: None,
        }[method]
        with applied(model, chosen) as meter:
            found = model(tokens, use_cache=False).logits
    assert model.config._attn_implementation == "sdpa"
    assert torch.allclose(found, expected, atol=1e-4)
    assert meter.take() == ([[0.0] * HEADS] * LAYERS if method == "exact" else [])


def test_the_meter_counts_what_the_kernel_kept(model: LlamaForCausalLM, ids: list[int]) -> None:
    method = BlockSparse(torch.full((LAYERS, HEADS, 1), math.inf), "absolute")
    with torch.no_grad(), applied(model, method) as meter:
        model(torch.tensor([ids]), use_cache=False)
    expected = 1 - forced_share(LENGTH, LENGTH)
    assert np.allclose(meter.take(), expected, atol=1e-4)
    assert meter.take() == []


def test_padding_runs_dense_and_several_prompts_are_refused(model: LlamaForCausalLM) -> None:
    tokens = torch.arange(200)[None]
    mask = (torch.arange(200) >= 9).long()[None]
    method = BlockSparse(torch.full((LAYERS, HEADS, 1), math.inf), "absolute")
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits[:, 9:]
        with applied(model, method) as meter:
            found = model(tokens, attention_mask=mask).logits[:, 9:]
            with pytest.raises(HookError, match="one prompt is read at a time, got a batch of 2"):
                model(tokens.repeat(2, 1))
    assert torch.allclose(found, expected, atol=1e-4)
    assert meter.dense == {"the model's own mask": LAYERS}
    assert meter.take() == []


def test_steps_after_a_prompt_run_dense(model: LlamaForCausalLM, ids: list[int]) -> None:
    method = BlockSparse(torch.full((LAYERS, HEADS, 1), -math.inf), "absolute")
    tokens = torch.tensor([ids])
    with torch.no_grad():
        expected = model(tokens).logits[:, 500:]
        with applied(model, method) as meter:
            cache = model(tokens[:, :500], use_cache=True).past_key_values
            name = cache_argument(model)
            found = model(tokens[:, 500:], **{name: cache}).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert meter.dense == {"decode step": LAYERS}
    assert meter.dense_layers == {}


GPT_OSS = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 64}


@pytest.mark.parametrize("scores_at_a_time", [1 << 26, 1 << 16])
@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("gpt_oss", GPT_OSS),
        ("gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 16}),
        ("gemma3_text", {"sliding_window": 64, "query_pre_attn_scalar": 16}),
        ("mistral", {"sliding_window": 64}),
    ],
)
def test_layers_that_run_dense_run_as_the_model_would(
    kind: str, extra: dict[str, object], scores_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_SCORES_AT_A_TIME", scores_at_a_time)
    monkeypatch.setattr(dense, "_ROWS", 100)
    implementation = "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"
    model = tiny_model(kind, implementation=implementation, **extra)
    tokens = torch.arange(3, 253)[None].repeat(1, 2)
    with torch.no_grad():
        expected = model(tokens).logits
        with applied(model, None):
            found = model(tokens).logits
    assert torch.allclose(found, expected, atol=1e-4)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Causal attention with sinks in float64, of q [1, seqlen, heads, head_dim] and k, v alike."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x[0].double() for x in (q, k.repeat_interleave(group, 2), v))
    v = v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    scores.masked_fill_(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
    column = sinks.double()[:, None, None].expand(*scores.shape[:2], 1)
    weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    return torch.einsum("hqk,khd->qhd", weights, v)[None]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hook_hands_on_the_sinks_of_full_layers(dtype: torch.dtype, backend: str) -> None:
    model = tiny_model("gpt_oss", implementation="eager", **GPT_OSS)
    sinks = torch.tensor([-30.0, 0.0, 2.5, 30.0])
    model.model.layers[1].self_attn.sinks.data = sinks.to(dtype)
    method = BlockSparse(torch.full((2, 4, 1), -math.inf), "peak_lse", backend=backend)
    seen = []

    def looking(q, k, v, layer, scale, found):  # type: ignore[no-untyped-def]
        attended = method(q, k, v, layer, scale, found)
        seen.append((layer, found, naive(q, k, v, found), attended.out))
        return attended

    tokens = torch.arange(3, 253)[None].repeat(1, 2)
    with torch.no_grad():
        expected = model(tokens).logits
        with applied(model, looking) as meter:
            logits = model(tokens).logits
    ((layer, found, exact, out),) = seen
    assert layer == 1
    assert torch.equal(found, sinks)
    assert found.dtype == torch.float32
    assert torch.allclose(out.double(), exact, atol=2e-6)
    assert torch.allclose(logits, expected, atol=1e-4 if dtype == torch.float32 else 0.05)
    assert meter.dense_layers == {0: "sliding-window layer"}


@pytest.mark.parametrize("shape", [(1, 4), (3,), (1, 4, 500, 1), ()])
def test_sinks_of_another_kind_run_dense(shape: tuple[int, ...]) -> None:
    query = torch.zeros(1, 4, 500, 16)
    other = torch.zeros(shape)
    for options in ({"s_aux": other}, {"sinks": other}, {"s_aux": torch.zeros(4).int()}):
        reason = dense.dense_reason(None, query, query, query, True, options)
        assert reason is Reason.SINKS
        assert unknown_arguments(options) == []
    options = {"s_aux": torch.zeros(4)}
    assert dense.dense_reason(None, query, query, query, True, options) is None


@pytest.mark.parametrize("sinks", [(-30.0, 0.5, 3.0, 30.0), (-math.inf,) * 4], ids=str)
def test_sinks_beside_a_kernel_that_knows_none(sinks: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 300, 16, generator=generator)
    k, v = torch.randn(2, 1, 2, 300, 16, generator=generator)
    found = dense.flash_with_sinks(q, k, v, torch.tensor(sinks), None)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    assert torch.allclose(found.double(), naive(q, k, v, torch.tensor(sinks)), atol=2e-6)


def test_the_keys_that_some_queries_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_ROWS", 4)
    mask = torch.ones(10, 10).tril().triu(-2).bool()[None, None]
    assert dense._seen_keys(mask) == [slice(0, 4), slice(2, 8), slice(6, 10)]
    mask[0, 0, 5] = False  # sees nothing, and so the mean of all values
    assert dense._seen_keys(mask) == [slice(0, 4), slice(0, 10), slice(6, 10)]
    assert dense._seen_keys(mask.float()) is None
    assert dense._seen_keys(mask.repeat(1, 2, 1, 1)) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_layers_with_sinks_are_expanded_or_refused(dtype: torch.dtype) -> None:
    model = tiny_model("gpt_oss", implementation="eager", **GPT_OSS)
    attention = model.model.layers[1].self_attn
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 700, 16, generator=generator) for heads in (4, 2, 2))
    sees = torch.arange(700)[None, None, None] < 500
    row = sees if dtype == torch.bool else torch.where(sees, 0.0, torch.finfo(dtype).min)
    options = {"s_aux": torch.tensor([2.3, -1.0, 0.5, 5.0]), "scaling": 0.25}

    def run(mask: torch.Tensor) -> torch.Tensor:
        return dense.model_attention(attention, q, k, v, mask, is_causal=False, options=options)

    assert torch.allclose(run(row), run(row.expand(1, 1, 700, 700).clone()), atol=1e-6)
    with pytest.raises(ValueError, match=r"700 queries and 700 keys.*\(1, 1, 300, 700\)"):
        run(row.expand(1, 1, 300, 700))


def test_gradients_go_through_layers_that_run_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_SCORES_AT_A_TIME", 1 << 16)
    monkeypatch.setattr(dense, "_ROWS", 100)
    model = tiny_model("gpt_oss", implementation="eager", **GPT_OSS)
    tokens = torch.arange(3, 253)[None]
    embedded = model.get_input_embeddings()(tokens).detach()
    found = []
    for wrap in (False, True):
        own = embedded.clone().requires_grad_()
        with applied(model, None) if wrap else contextlib.nullcontext():
            logits = model(inputs_embeds=own, use_cache=False).logits
        found.append(torch.autograd.grad(logits.square().sum(), own)[0])
    assert torch.allclose(*found, rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))


def test_arguments_that_nobody_knows_are_named() -> None:
    options = {"block_indices": torch.zeros(1), "indices": None, "use_cache": True, "softcap": 5.0}
    assert unknown_arguments(options) == ["block_indices"]
    assert unknown_arguments({"output_attentions": False, "new": False}) == []
    assert named({2: "b", 0: "a", 1: "b"}) == "layers 0: a; layers 1, 2: b"


def fail_within(model: LlamaForCausalLM) -> None:
    with switch.switched(model, "eager"):
        assert model.config._attn_implementation == "eager"
        raise KeyError


def test_switches_may_be_nested_and_left_by_an_error(model: LlamaForCausalLM) -> None:
    with applied(model, None):
        with pytest.raises(KeyError):
            fail_within(model)
        assert model.config._attn_implementation == ATTENTION_NAME
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_cannot_be_switched_is_left_as_it_is(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda _: False)
    with (
        pytest.raises(switch.SwitchError, match="it stays 'sdpa'\\): it cannot be switched"),
        applied(model, None),
    ):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_composite_models_are_switched_and_restored_part_by_part() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        image_token_index=5,
        attn_implementation={"text_config": "sdpa", "vision_config": "eager"},
    )
    composite = LlavaForConditionalGeneration(config).eval()
    saved = switch.implementations(composite)
    assert {name for _, name in saved} >= {"sdpa", "eager"}
    with torch.no_grad(), applied(composite, None):
        composite(torch.arange(10, 40)[None])
    assert switch.implementations(composite) == saved
