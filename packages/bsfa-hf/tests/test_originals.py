# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What runs dense is what the model would do: its parts, its names, its masks, its arguments."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.autograd import forward_ad
from transformers import StaticCache
from transformers.models.llama import modeling_llama

import bsfa_hf
import zoo
from bsfa_calib.language_model import cache_argument
from bsfa_hf import Reason
from bsfa_hf.masks import DeferredMask
from bsfa_hf.originals import Implementation, asks_for_name, original_of
from bsfa_hf.state import attention_shape, state_of, text_config
from bsfa_kernel import RULES
from tiny import LAYERS, largest_difference, table, tiny_model, tokens

TEXT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
ENCODER_DECODER = {
    "vocab_size": 97,
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
LEFT = 77


def table_of(model: Any, value: float = -math.inf) -> Any:
    layers, heads = attention_shape(text_config(model))
    return table(value, layers=layers, heads=heads)


def left_padded(length: int = 300) -> tuple[Tensor, Tensor]:
    ids = tokens(length, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :LEFT] = 0
    return ids, mask


# --------------------------------------------------------------------------------- parts of a model


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("seqlen", [40, 300])
@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_runs_dense_may_be_flex_attention(kind: str, seqlen: int) -> None:
    model = tiny_model(kind, implementation="flex_attention")
    ids = tokens(seqlen)
    mask = torch.ones_like(ids)
    mask[:, :7] = 0
    for more in ({}, {"attention_mask": mask}):
        with torch.compiler.set_stance("force_eager"):
            expected = model(ids, **more).logits
            with bsfa_hf.enabled(model, table(-math.inf)) as stats:
                logits = model(ids, **more).logits
        assert largest_difference(logits[:, 7:], expected[:, 7:]) < 1e-5
        assert bool(stats.dense_calls) == (kind == "mistral" or seqlen == 40)


@pytest.mark.parametrize(("heads", "layers"), [(2, 2), (4, 5)])
def test_a_vision_tower_of_another_shape_runs_as_without_the_package(
    heads: int, layers: int
) -> None:
    config = transformers.Gemma3Config(
        text_config={
            **TEXT,
            "sliding_window": 100,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": 32,
            "patch_size": 4,
        },
        mm_tokens_per_image=16,
        image_token_index=96,
        boi_token_index=95,
        eoi_token_index=94,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    ids = tokens(300).clamp(max=93)
    ids[0, 5:21] = 96
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.rand(1, 3, 32, 32),
        "token_type_ids": (ids == 96).long(),
    }
    dense = model(**inputs).logits
    with bsfa_hf.enabled(model, table_of(model)) as stats:
        assert largest_difference(model(**inputs).logits, dense) < 1e-6
        tower = model.model.vision_tower
        assert tower.config._attn_implementation == "sdpa"
        assert all(state_of(module) is None for module in tower.modules())
        # A prompt without an image has no mask of its own.
        model(tokens(300).clamp(max=93))
    assert stats.sparse_calls == 1


@pytest.mark.parametrize("kind", ["bart", "whisper", "t5"])
def test_an_encoder_of_another_depth_runs_as_without_the_package(kind: str) -> None:
    ids, dec = tokens(100), tokens(300)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": (ids > 20).long()}
    torch.manual_seed(0)
    model: Any
    if kind == "bart":
        model = transformers.BartForConditionalGeneration(
            transformers.BartConfig(**ENCODER_DECODER)
        )
    elif kind == "whisper":
        inputs = {"input_features": torch.ones(1, 8, 100)}
        model = transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(**ENCODER_DECODER, max_source_positions=50, num_mel_bins=8)
        )
    else:
        config = transformers.T5Config(
            vocab_size=97, d_model=64, d_kv=16, d_ff=64, num_layers=3, num_heads=4
        )
        config.num_decoder_layers = 2
        model = transformers.T5ForConditionalGeneration(config)
    model.eval()
    dense = model(**inputs, decoder_input_ids=dec).logits
    with bsfa_hf.enabled(model, table_of(model)) as stats:
        logits = model(**inputs, decoder_input_ids=dec).logits
    assert largest_difference(logits, dense) < 1e-6
    expected = {Reason.NOT_CAUSAL: LAYERS}
    if kind == "t5":
        expected[Reason.BIAS] = LAYERS
    assert stats.dense_calls == {str(reason): number for reason, number in expected.items()}
    assert stats.sparse_calls == (0 if kind == "t5" else LAYERS)


def test_layers_that_run_dense_may_have_other_heads_than_the_table() -> None:
    model = tiny_model("gemma3_text")
    thresholds = table(heads=2)
    model.config.num_attention_heads = 2  # what the table is checked against
    ids = tokens(300)
    dense = model(ids).logits
    with bsfa_hf.enabled(model, thresholds) as stats:
        assert largest_difference(model(ids).logits, dense) < 1e-6
    assert stats.dense_calls == {str(Reason.SLIDING_WINDOW): LAYERS}


@pytest.mark.parametrize("value", [-math.inf, math.inf])
def test_a_decoder_that_is_not_causal_runs_dense(model: Any, value: float) -> None:
    model.config.is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    ids, mask = left_padded()
    dense = model(ids, attention_mask=mask).logits
    with bsfa_hf.enabled(model, table(value)) as stats:
        logits = model(ids, attention_mask=mask).logits
    assert largest_difference(logits, dense) < 1e-6
    assert stats.dense_calls == {str(Reason.NOT_CAUSAL): LAYERS}


# -------------------------------------------------------------------------------------------- names


def test_a_name_remembers_the_one_that_it_replaced(model: Any) -> None:
    with bsfa_hf.enabled(model, table()):
        name = model.config._attn_implementation
        assert name == "bsfa"
        assert original_of(copy.deepcopy(model.config)) == "sdpa"
        with bsfa_hf.enabled(model, table()):
            assert original_of(model.config) == "sdpa"
    assert type(model.config._attn_implementation) is str
    eager = tiny_model("gpt_oss", implementation="bsfa")
    assert original_of(eager.config) == "eager"  # transformers' choice for this model


def test_a_copy_of_a_model_that_chooses_its_keys_is_right_and_leaves_nothing_behind() -> None:
    model = zoo.tiny("deepseek_v32")
    ids = tokens(200)
    dense = model(ids).logits
    bsfa_hf.enable(model, table_of(model, math.inf))
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, loaded):
        assert torch.equal(other(ids).logits, dense)
        assert bsfa_hf.stats(other).dense_calls == {str(Reason.OWN_NAME): LAYERS}
        bsfa_hf.disable(other)
        kept = [name for module in other.modules() for name in vars(module) if "bsfa" in name]
        assert not kept
        configs = [module.config for module in other.modules() if hasattr(module, "config")]
        assert all(config is other.config for config in configs)
    assert bsfa_hf.stats(model).calls == 0


def test_contexts_nest_around_a_model_that_chooses_its_keys() -> None:
    model = zoo.tiny("deepseek_v32")
    ids = tokens(200)
    dense = model(ids).logits
    outer = bsfa_hf.enable(model, table_of(model, math.inf))
    with bsfa_hf.enabled(model, table_of(model)) as inner:
        model(ids)
    assert (outer.calls, inner.calls) == (0, LAYERS)
    assert model.config._attn_implementation == "bsfa"
    assert torch.equal(model(ids).logits, dense)
    assert outer.calls == LAYERS
    bsfa_hf.disable(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_compares_the_name_alike_is_switched() -> None:
    model = zoo.tiny("gpt2")
    kind: Any = type(model.transformer.h[0].attn)
    assert not asks_for_name(kind, "sdpa", "bsfa")
    assert asks_for_name(kind, "eager", "bsfa")


def test_flash_attention_gets_its_own_name_and_masks(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Any]] = []

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> Any:
        seen.append((module.config._attn_implementation, None if mask is None else mask.ndim))
        assert module.layer_idx in range(LAYERS)
        return query.new_zeros(query.shape).transpose(1, 2), None

    mapping = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(mapping, "flash_attention_2", flash)
    model.config._attn_implementation_internal = "flash_attention_2"
    ids, mask = left_padded(100)
    with bsfa_hf.enabled(model, table()) as stats:
        model(ids)
        model(ids, attention_mask=mask)
    assert seen == [("flash_attention_2", None)] * LAYERS + [("flash_attention_2", 2)] * LAYERS
    assert stats.dense_calls == {str(Reason.TOO_SHORT): 2 * LAYERS}


# ---------------------------------------------------------------------------------------- arguments


def test_an_argument_that_nobody_knows_is_refused_by_name(model: Any) -> None:
    with bsfa_hf.enabled(model, table()) as stats:
        model(tokens(300), indices=None)
        calls = stats.calls
        with pytest.raises(ValueError, match="LlamaAttention passes the argument 'indices'"):
            model(tokens(300), indices=torch.zeros(1))
        with pytest.raises(ValueError, match="the argument 'tilt'"):
            model(tokens(20), tilt=1.0)  # though it would run dense
    assert stats.calls == calls


def test_an_argument_of_the_models_own_function_is_honoured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = modeling_llama.eager_attention_forward

    def tilted(*arguments: Any, tilt: float | None = None, **options: Any) -> Any:
        out, weights = own(*arguments, **options)
        return out * (tilt or 1), weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", tilted)
    model = tiny_model("llama", implementation="eager")
    ids = tokens(300)
    dense = model(ids, tilt=3.0).logits
    with bsfa_hf.enabled(model, table(math.inf)) as stats:
        assert torch.equal(model(ids, tilt=3.0).logits, dense)
    assert stats.dense_calls == {str(Reason.OWN_ARGUMENT): LAYERS}


@pytest.mark.parametrize("length", [100, 300])
def test_forward_mode_derivatives_are_refused_where_they_would_be_zero(
    length: int,
) -> None:
    model = tiny_model("llama", implementation="eager")  # SDPA has none on a CPU
    embeddings = model.get_input_embeddings()(tokens(length))

    def logits(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, use_cache=False).logits  # type: ignore[no-any-return]

    tangent = torch.ones_like(embeddings)
    _, dense = torch.func.jvp(logits, (embeddings,), (tangent,))
    with bsfa_hf.enabled(model, table()):
        if length == 100:  # dense
            assert torch.equal(torch.func.jvp(logits, (embeddings,), (tangent,))[1], dense)
            return
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(logits, (embeddings,), (tangent,))
        with (
            forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match="no forward-mode derivative"),
        ):
            logits(forward_ad.make_dual(embeddings, tangent))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_for_sdpa(model: Any, dtype: torch.dtype) -> None:
    ids, mask = left_padded()
    seen: list[torch.dtype] = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].dtype)
    )
    with torch.autocast("cpu", dtype=dtype):
        dense = model(ids, attention_mask=mask).logits
        with bsfa_hf.enabled(model, table(-math.inf)) as stats:
            logits = model(ids, attention_mask=mask).logits
    hook.remove()
    assert seen == [dtype, dtype]
    assert stats.sparse_calls == LAYERS
    assert largest_difference(logits[mask.bool()].float(), dense[mask.bool()].float()) < 0.01


# -------------------------------------------------------------------------------------------- masks


@pytest.fixture
def sharing() -> Any:
    """A Gemma 4 whose last layers share keys and values, and slice their masks."""
    config = transformers.AutoConfig.for_model(
        "gemma4_text",
        **{**TEXT, "num_hidden_layers": 4},
        sliding_window=100,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("selection", ["exact", "int8"])
def test_a_device_without_autocast_is_served(selection: str) -> None:
    """Shapes on the meta device are those of the dense model, in which torch has no autocast."""
    model = tiny_model().to("meta")
    inputs = tokens(300).to("meta")
    dense = model(inputs).logits
    with bsfa_hf.enabled(model, table(), selection=selection) as stats:
        sparse = model(inputs).logits
    assert (sparse.shape, sparse.dtype, sparse.device) == (dense.shape, dense.dtype, dense.device)
    assert stats.sparse_calls == model.config.num_hidden_layers


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_masks_survive_what_models_do_to_them(sharing: Any, options: dict[str, Any]) -> None:
    ids, mask = left_padded()
    options = {**options, "disable_compile": True, "max_new_tokens": 3, "do_sample": False}
    dense = sharing.generate(ids, attention_mask=mask, **options)
    with bsfa_hf.enabled(sharing, table_of(sharing)) as stats:
        assert torch.equal(sharing.generate(ids, attention_mask=mask, **options), dense)
    assert stats.sparse_calls > 0


def deferred(model: Any, ids: Tensor, mask: Tensor) -> DeferredMask:
    """The mask that a model's attention gets."""
    seen: list[Any] = []
    module = model.model.layers[0].self_attn
    hook = module.register_forward_pre_hook(
        lambda _, inputs, options: seen.append(options["attention_mask"]), with_kwargs=True
    )
    model(ids, attention_mask=mask)
    hook.remove()
    assert isinstance(seen[0], DeferredMask)
    return seen[0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_deferred_mask_is_the_original_implementations(implementation: str) -> None:
    model = tiny_model("llama", implementation=implementation)
    ids, mask = left_padded(200)
    seen: list[Any] = []
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, inputs, options: seen.append(options["attention_mask"]), with_kwargs=True
    )
    model(ids, attention_mask=mask)
    hook.remove()
    with bsfa_hf.enabled(model, table()):
        made = deferred(model, ids, mask)
    own: Tensor = seen[0]
    assert (made.shape, made.dtype) == (own.shape, own.dtype)
    assert torch.equal(made[:, :, 30:40, :150], own[:, :, 30:40, :150])
    assert torch.equal(made.own(), own)
    assert torch.equal(made.own(50), own[:, :, 50:])
    whole = made[:, :, :, :200]
    assert isinstance(whole, DeferredMask)
    assert isinstance(made.to("meta"), DeferredMask)
    unchanged = made.plan.reason
    assert unchanged is None
    made[:, :, 3, 100] = own[0, 0, 0, 0]
    assert made.plan.reason is Reason.OWN_MASK
    assert whole.plan.reason is Reason.OWN_MASK
    own[:, :, 3, 100] = own[0, 0, 0, 0]
    assert torch.equal(whole.own(), own)
    made.zero_()
    assert torch.equal(whole.own(), own.zero_())


def test_a_mask_that_the_model_changes_runs_dense(model: Any) -> None:
    ids, mask = left_padded()

    def halve(_: Any, inputs: Any, options: dict[str, Any]) -> Any:
        return inputs, {**options, "attention_mask": options["attention_mask"].logical_and(odd)}

    odd = torch.arange(300) % 2 == 1
    hooks = [
        layer.self_attn.register_forward_pre_hook(halve, with_kwargs=True)
        for layer in model.model.layers
    ]
    dense = model(ids, attention_mask=mask).logits
    with bsfa_hf.enabled(model, table(math.inf)) as stats:
        logits = model(ids, attention_mask=mask).logits
    for hook in hooks:
        hook.remove()
    assert largest_difference(logits, dense) < 1e-6
    assert stats.dense_calls == {str(Reason.OWN_MASK): LAYERS}


def test_one_mask_for_a_whole_batch_serves_each_row(model: Any) -> None:
    ids = tokens(300, batch=3)
    mask = torch.ones(300, 300).tril().bool()[None, None]
    mask = mask & (torch.arange(300) >= LEFT)
    dense = model(ids, attention_mask=mask).logits
    with bsfa_hf.enabled(model, table(-math.inf)) as stats:
        logits = model(ids, attention_mask=mask).logits
    assert stats.sparse_calls == LAYERS
    assert largest_difference(logits[:, LEFT:], dense[:, LEFT:]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_compiled_layers_take_the_mask(kind: str) -> None:
    model = tiny_model(kind)
    ids, mask = left_padded()
    dense = model(ids, attention_mask=mask).logits[mask.bool()]
    with bsfa_hf.enabled(model, table(math.inf)) as stats:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
        for _ in range(2):
            logits = model(ids, attention_mask=mask).logits[mask.bool()]
            assert largest_difference(logits, dense) < 1e-6
    windows = 0 if kind == "llama" else 1
    expected = {Reason.TRACED_MASK: 2 * (LAYERS - windows), Reason.SLIDING_WINDOW: 2 * windows}
    assert stats.dense_calls == {str(why): number for why, number in expected.items() if number}
    torch.compiler.reset()


# ------------------------------------------------------------------------- windows, drafts, chunks


@pytest.mark.parametrize("kind", ["mistral", "phi3"])
@pytest.mark.parametrize("length", [256, 257, 403])
def test_a_window_is_compared_with_the_keys_there_are(kind: str, length: int) -> None:
    config = tiny_model(kind).config
    config.sliding_window = config.max_position_embeddings = 256
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = tokens(length)
    dense = model(ids).logits
    with bsfa_hf.enabled(model, table(-math.inf)) as stats:
        assert largest_difference(model(ids).logits, dense) < 1e-6
    hidden = {str(Reason.SLIDING_WINDOW): LAYERS} if length > 256 else {}
    assert stats.dense_calls == hidden


def test_a_model_that_drafts_reads_the_prompt_once_and_then_decodes() -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    ids = tokens(400)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    with bsfa_hf.enabled(other, table(math.inf)) as alone:
        other.generate(ids, **options)
    expected = model.generate(ids, **options)
    with bsfa_hf.enabled(model, table(-math.inf)), bsfa_hf.enabled(other, table(math.inf)) as stats:
        assert torch.equal(model.generate(ids, assistant_model=other, **options), expected)
    assert stats.sparse_calls == alone.sparse_calls
    assert set(stats.dense_calls) == {Reason.DECODE}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [127, 129, 256, 383, 384, 512])
def test_drafts_change_no_token(implementation: str, rule: str, length: int) -> None:
    model = tiny_model("llama", implementation=implementation)
    other = tiny_model("llama", seed=3)
    ids = tokens(length // 2).repeat(1, 3)[:, :length]  # so that there is something to look up
    mask = torch.ones_like(ids)
    mask[:, :13] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    with bsfa_hf.enabled(model, table(rule=rule)) as stats:
        plain = model.generate(ids, **options)
        calls = stats.sparse_calls
        drafts: tuple[dict[str, Any], ...] = (
            {"assistant_model": other},
            {"prompt_lookup_num_tokens": 6},
        )
        for draft in drafts:
            stats.reset()
            assert torch.equal(model.generate(ids, **options, **draft), plain)
            assert stats.sparse_calls == calls


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_chunks_of_a_prefill_that_begin_within_a_block_run_sparse(model: Any, cache: str) -> None:
    ids = tokens(300)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    dense = model.generate(ids, **options)
    with bsfa_hf.enabled(model, table(-math.inf)) as stats:
        assert torch.equal(model.generate(ids, **options, prefill_chunk_size=100), dense)
    assert stats.sparse_calls == 2 * LAYERS
    assert stats.dense_calls == {
        str(Reason.DECODE): 2 * LAYERS,
        str(Reason.TOO_SHORT): LAYERS,
    }


def test_turns_of_a_chat_in_one_static_cache_are_those_of_the_dense_model(model: Any) -> None:
    ids = tokens(300)

    def turns() -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=400)
        name = cache_argument(model)
        parts = ids.split([133, 8, 1, 158], 1)
        return torch.cat([model(part, use_cache=True, **{name: cache}).logits for part in parts], 1)

    dense = turns()
    with bsfa_hf.enabled(model, table(-math.inf)) as stats:
        assert largest_difference(turns(), dense) < 1e-6
    assert stats.sparse_calls == 2 * LAYERS
    assert stats.dense_calls == {str(Reason.DECODE): 2 * LAYERS}


def test_an_implementation_is_a_name() -> None:
    name = Implementation("bsfa", "eager")
    assert name == "bsfa"
    assert copy.deepcopy(name).original == "eager"
