# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Models with attention sinks: their full layers run block-sparse, and what they give is right."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

import bsfa_hf
import zoo
from bsfa_calib.capture import calibrate
from bsfa_calib.language_model import cache_argument
from bsfa_hf import Reason
from bsfa_hf.attention import bsfa_attention
from bsfa_hf.dense import dense_attention
from bsfa_hf.originals import Implementation
from bsfa_kernel import RULES
from spied import Call, exact, spied
from test_attention import chunked, pad
from tiny import HEADS, LAYERS, largest_difference, table, tiny_model, tokens

# Types whose full layers have one sink a head; as zoo makes them, the first layer has a window.
KINDS = [
    kind
    for kind in ("flint", "gpt_oss", "granite_swa", "granitemoe_swa")
    if kind in zoo.KINDS  # this release of transformers has it
]
# One that takes nearly all weight, one that takes none, and two among the scores.
SINKS = (-30.0, 1.0, 3.0, 30.0)
WINDOWS = {str(Reason.SLIDING_WINDOW): 1}


def set_sinks(model: Any, values: Any = SINKS, layers: tuple[int, ...] = (0, 1)) -> Any:
    for layer in layers:
        sinks = model.model.layers[layer].self_attn.sinks
        sinks.data = torch.as_tensor(values, dtype=sinks.dtype).expand(HEADS).clone()
    return model


def full(calls: list[Call]) -> Call:
    """That of the layer without a window."""
    (call,) = [call for call in calls if call.options.get("sliding_window") is None]
    return call


@pytest.fixture
def model() -> Any:
    """A gpt-oss of a layer with a window and one without."""
    return set_sinks(tiny_model("gpt_oss"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_full_layers_run_sparse_and_give_what_the_reference_does(kind: str, rule: str) -> None:
    model = set_sinks(zoo.tiny(kind))
    ids = tokens(450)
    thresholds = calibrate(model, [ids[0].tolist()], target_sparsities=[0.3], rule=rule)
    dense = model(ids).logits
    with bsfa_hf.enabled(model, thresholds) as stats, spied() as calls:
        logits = model(ids).logits
    assert stats.dense_calls == WINDOWS
    assert stats.sparse_calls == 1
    call = full(calls)
    expected = exact(call, thresholds)
    assert expected.margin > 1e-5
    torch.testing.assert_close(call.out.double(), expected.out, rtol=1e-4, atol=1e-5)
    assert stats.kept_fraction[call.layer] == pytest.approx(expected.kept)
    assert expected.kept == pytest.approx(0.7, abs=0.02)
    assert largest_difference(logits, dense) > 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sinks", [SINKS, -math.inf, 300.0, -300.0], ids=str)
def test_minus_infinity_gives_what_the_model_gives(kind: str, sinks: Any) -> None:
    model = set_sinks(zoo.tiny(kind), sinks)
    ids, mask = pad([tokens(450), tokens(333)], "left")
    dense = model(ids, attention_mask=mask).logits[mask.bool()]
    with bsfa_hf.enabled(model, table(-math.inf, rule="peak_lse")) as stats:
        found = model(ids, attention_mask=mask).logits[mask.bool()]
    assert stats.sparse_calls == 1
    assert stats.dense_calls == WINDOWS
    assert largest_difference(found, dense) < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_a_sink_of_minus_infinity_is_none(model: Any, rule: str) -> None:
    outs = []
    for sinks in (-math.inf, None):
        if sinks is not None:
            set_sinks(model, sinks)
        with bsfa_hf.enabled(model, table(rule=rule)), spied() as calls:
            model(tokens(450))
        call = calls[1]
        options = call.options | ({} if sinks is not None else {"s_aux": None})
        expected = exact(call._replace(options=options), table(rule=rule))
        torch.testing.assert_close(call.out.double(), expected.out, rtol=1e-4, atol=1e-5)
        outs.append(call.out)
    assert torch.equal(*outs)


@pytest.mark.parametrize("sink", [math.nan, math.inf])
@pytest.mark.parametrize("rule", RULES)
def test_a_sink_that_is_no_number_is_not_hidden(model: Any, rule: str, sink: float) -> None:
    set_sinks(model, (0.0, sink, 0.0, 0.0), layers=(1,))
    high = table(math.inf if rule == "absolute" else 9.0, rule=rule)
    with bsfa_hf.enabled(model, high) as stats, spied() as calls:
        model(tokens(450))
    out = calls[1].out
    assert out[:, :, 1].isnan().all()
    assert out[:, :, [0, 2, 3]].isfinite().all()
    kept = stats.kept_fraction_by_head[1]
    assert (float(kept[1]) == 1) == (rule != "absolute")


@pytest.mark.parametrize(
    ("kind", "dtype"), [("gpt_oss", torch.bfloat16), ("granite_swa", torch.float64)]
)
def test_sinks_of_any_dtype_are_taken_as_they_are(kind: str, dtype: torch.dtype) -> None:
    model = set_sinks(zoo.tiny(kind).to(dtype), (0.1, 1.2, 2.3, 3.4))
    assert model.model.layers[1].self_attn.sinks.dtype == dtype
    thresholds = table(rule="peak_lse")
    with bsfa_hf.enabled(model, thresholds), spied() as calls:
        model(tokens(450))
    call = full(calls)
    expected = exact(call, thresholds)
    tolerance = 1e-6 if dtype == torch.float64 else 0.02
    torch.testing.assert_close(call.out.double(), expected.out, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", RULES)
def test_a_padded_batch_gives_what_each_prompt_gives_alone(
    model: Any, rule: str, side: str
) -> None:
    prompts = [tokens(450), tokens(333), tokens(140)]
    ids, mask = pad(prompts, side)
    with bsfa_hf.enabled(model, table(rule=rule)) as stats:
        batch = model(ids, attention_mask=mask).logits
        fractions = stats.kept_fraction[1]
        stats.reset()
        alone = [model(prompt).logits[0] for prompt in prompts]
        assert stats.kept_fraction[1] == pytest.approx(fractions)
    assert largest_difference(batch[mask.bool()], torch.cat(alone)) < 1e-5


def test_packed_sequences_give_what_each_gives_alone() -> None:
    """gpt-oss itself does not tell sequences apart in layers with a window."""
    windowed = tiny_model("gpt_oss").config
    windowed.layer_types = ["full_attention"] * 2
    model = set_sinks(AutoModelForCausalLM.from_config(windowed).eval())
    prompts = [tokens(n) for n in (300, 1, 450)]
    ids = torch.cat(prompts, 1)
    positions = torch.cat([torch.arange(p.shape[1]) for p in prompts])[None]
    starts = torch.tensor([0, 300, 301, 751], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    longest = {"max_length_q": 450, "max_length_k": 450}
    options: dict[str, Any] = {"position_ids": positions, "use_cache": False, **lengths, **longest}
    dense = torch.cat([model(prompt).logits for prompt in prompts], 1)
    for value, same in ((-math.inf, True), (math.inf, False)):
        with bsfa_hf.enabled(model, table(value)) as stats:
            packed = model(ids, **options).logits
            assert stats.sparse_calls == LAYERS
            alone = torch.cat([model(prompt).logits for prompt in prompts], 1)
        assert largest_difference(packed, alone) < 1e-5
        assert (largest_difference(packed, dense) < 1e-5) == same


def test_decode_steps_and_drafts_are_the_models_own(model: Any) -> None:
    ids, mask = pad([tokens(450), tokens(333)], "left")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    dense = model.generate(ids, attention_mask=mask, **options)
    with bsfa_hf.enabled(model, table(-math.inf)) as stats:
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), dense)
        assert stats.dense_calls == {"decode step": 3, "sliding-window layer": 4}
        single = model.generate(ids[:1], **options)
        stats.reset()
        drafted = model.generate(ids[:1], **options, prompt_lookup_num_tokens=6)
        assert torch.equal(drafted, single)
        assert stats.sparse_calls == 1
    assert torch.equal(single, dense[:1])


@pytest.mark.parametrize("size", [128, 201])
def test_a_prefill_in_chunks_is_dense_at_minus_infinity(model: Any, size: int) -> None:
    from transformers import DynamicCache

    ids = tokens(450)
    dense = model(ids).logits
    with bsfa_hf.enabled(model, table(-math.inf)) as stats:
        logits = chunked(model, ids, size, DynamicCache(config=model.config))
    assert largest_difference(logits, dense) < 1e-5
    assert stats.sparse_calls > 0


def test_chunks_of_whole_blocks_give_what_one_prefill_gives(model: Any) -> None:
    from transformers import DynamicCache

    ids = tokens(450)
    with bsfa_hf.enabled(model, table(rule="peak_lse")) as stats:
        whole = model(ids).logits
        assert stats.kept_fraction[1] < 0.95
        logits = chunked(model, ids, 128, DynamicCache(config=model.config))
    assert largest_difference(logits, whole) < 1e-5


def again(model: Any, call: Call, **changes: Any) -> Tensor:
    """What the attention function gives for a call with other options, outside of a model."""
    module = model.model.layers[call.layer].self_attn
    arguments = call.query, call.key, call.value, call.mask
    return bsfa_attention(module, *arguments, **(call.options | changes))[0]


@pytest.mark.parametrize("heads", [slice(0, 2), slice(2, 4)], ids=str)
def test_heads_may_be_sliced(model: Any, heads: slice) -> None:
    """As under tensor parallelism, where a rank has some heads, their sinks and thresholds."""
    whole = table()
    with bsfa_hf.enabled(model, whole), spied() as calls:
        model(tokens(450))
    call = calls[1]
    half = copy.deepcopy(model)
    half.config.num_attention_heads = HEADS // 2
    thresholds = whole.thresholds[:, :, heads].copy()
    with bsfa_hf.enabled(half, dataclasses.replace(whole, thresholds=thresholds)) as stats:
        kv = slice(heads.start // 2, heads.stop // 2)
        some = call._replace(
            query=call.query[:, heads], key=call.key[:, kv], value=call.value[:, kv]
        )
        out = again(half, some, s_aux=call.options["s_aux"][heads])
        torch.testing.assert_close(out, call.out[:, :, heads])
        assert stats.dense_calls == {}
        # Sinks of all heads beside queries of some are another kind, and the model's to refuse.
        with pytest.raises(RuntimeError, match="must match"):
            again(half, some)
        assert stats.dense_calls == {"attention sinks": 1}


@pytest.mark.parametrize(
    "odd",
    [
        {"s_aux": torch.zeros(1, HEADS)},
        {"s_aux": torch.zeros(2 * HEADS)},
        {"s_aux": torch.zeros(HEADS, dtype=torch.int32)},
        {"s_aux": torch.zeros(())},
        {"s_aux": None, "sinks": torch.zeros(1, HEADS, 450, 1)},
        {"s_aux": None, "sinks": torch.zeros(HEADS)},
    ],
    ids=lambda odd: str([tuple(x.shape) for x in odd.values() if x is not None]),
)
def test_sinks_of_another_kind_run_dense_and_are_counted(
    odd: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inkling 2 has one for each query, and passes it as ``sinks``."""
    from transformers.models.gpt_oss import modeling_gpt_oss

    own: Any = modeling_gpt_oss.eager_attention_forward
    given: list[dict[str, Any]] = []

    def watched(*arguments: Any, sinks: Any = None, **options: Any) -> Any:
        given.append({**options, "sinks": sinks})
        return own(*arguments, **options)

    monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", watched)
    model = set_sinks(tiny_model("gpt_oss"))
    with bsfa_hf.enabled(model, table(-math.inf)) as stats, spied() as calls:
        model(tokens(450))
        stats.reset()
        given.clear()
        out = again(model, calls[1], **odd)
    assert stats.dense_calls == {"attention sinks": 1}
    assert all(given[0][name] is value for name, value in odd.items())
    torch.testing.assert_close(out, calls[1].out)  # its own function reads the module's sinks


def test_a_backward_pass_is_refused_if_only_sinks_are_trained(model: Any) -> None:
    model.requires_grad_(False)
    model.model.layers[1].self_attn.sinks.requires_grad_(True)
    with torch.enable_grad(), bsfa_hf.enabled(model, table()):
        loss = model(tokens(300)).logits.sum()
        with pytest.raises(NotImplementedError, match="backward"):
            loss.backward()


def test_forward_mode_derivatives_of_sinks_are_refused(model: Any) -> None:
    from torch.autograd import forward_ad

    sinks = model.model.layers[1].self_attn.sinks.detach()
    with bsfa_hf.enabled(model, table()), spied() as calls:
        model(tokens(300))
        call = calls[1]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(sinks, torch.ones_like(sinks))
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                again(model, call, s_aux=dual)


@pytest.mark.parametrize("mask", ["none", "bool"])
def test_sdpa_is_never_asked_for_sinks(model: Any, mask: str) -> None:
    """As where a mask is no FlashAttention's, or a compiled model's original is not known."""
    with bsfa_hf.enabled(model, table(-math.inf)), spied() as calls:
        model(tokens(450))
    call = calls[1]
    module = model.model.layers[1].self_attn
    module.config = copy.copy(model.config)
    module.config._attn_implementation_internal = Implementation("bsfa", "sdpa")
    seen = torch.ones(1, 1, 450, 450).tril().bool()
    out, _ = dense_attention(
        module,
        *(call.query, call.key, call.value, seen if mask == "bool" else None),
        is_causal=None,
        options={"dropout": 0.0, **call.options},
    )
    torch.testing.assert_close(out, call.out)


@pytest.mark.parametrize("window", [100, 4096])
def test_keys_that_are_compressed_run_as_the_model_would(window: int) -> None:
    """DeepSeek V4's layers have sinks of the usual kind, and more keys than positions."""
    kind = "deepseek_v4"
    config = zoo.tiny_config(kind, zoo.SMALL)
    config.sliding_window = window
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    ids = tokens(450)
    dense = model(ids).logits
    with bsfa_hf.enabled(model, table(-math.inf, layers=config.num_hidden_layers)) as stats:
        assert largest_difference(model(ids).logits, dense) < 1e-5
    if window < 450:
        assert stats.sparse_calls == 0


@pytest.mark.slow
def test_a_compiled_model_that_was_made_with_our_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    table(-math.inf).save(tmp_path / "table.safetensors")
    monkeypatch.setenv("BSFA_THRESHOLDS", str(tmp_path / "table.safetensors"))
    original = set_sinks(tiny_model("gpt_oss"))
    config = copy.deepcopy(original.config)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="bsfa").eval()
    model.load_state_dict(original.state_dict())
    ids = tokens(450)
    name = cache_argument(model)
    cache, other = (original(ids[:, :449], use_cache=True) for _ in range(2))
    dense = original(ids[:, 449:], **{name: cache.past_key_values}).logits
    model(ids)  # finds the table
    compiled = torch.compile(model, backend="aot_eager")
    assert largest_difference(compiled(ids).logits, original(ids).logits) < 1e-5
    found = compiled(ids[:, 449:], **{name: other.past_key_values}).logits
    assert largest_difference(found, dense) < 1e-5
    for length in (300, 100):  # the shorter one has nothing to skip
        static = StaticCache(config=original.config, max_cache_len=600)
        found = compiled(ids[:, :length], **{name: static}).logits
        assert largest_difference(found, original(ids[:, :length]).logits) < 1e-5
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_a_compiled_prefill_into_a_static_cache(kind: str) -> None:
    """The cache is longer than the prompt: no mask does not mean that its end is the prompt's."""
    model, ids = tiny_model(kind), tokens(300)
    name, dense = cache_argument(model), model(ids).logits
    with bsfa_hf.enabled(model, table(-math.inf)):
        compiled: Any = torch.compile(model, backend="eager")
        static = StaticCache(config=model.config, max_cache_len=600)
        assert largest_difference(compiled(ids, **{name: static}).logits, dense) < 1e-5
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.skipif("inkling2_text" not in zoo.KINDS, reason="a newer transformers has it")
def test_a_compiled_model_with_a_sink_for_each_query(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Inkling 2 passes them as ``sinks``, which SDPA passes over, too."""
    table(-math.inf).save(tmp_path / "table.safetensors")
    monkeypatch.setenv("BSFA_THRESHOLDS", str(tmp_path / "table.safetensors"))
    original = zoo.tiny("inkling2_text")
    for module in original.modules():
        if hasattr(module, "sink_proj"):
            module.sink_proj.weight.data *= 30
    config = copy.deepcopy(original.config)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="bsfa").eval()
    model.load_state_dict(original.state_dict())
    ids = tokens(200)
    model(ids)  # finds the table
    compiled = torch.compile(model, backend="eager")
    assert largest_difference(compiled(ids).logits, original(ids).logits) < 1e-5
    torch.compiler.reset()
