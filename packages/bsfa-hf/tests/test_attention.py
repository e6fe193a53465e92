# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The attention function in tiny models: exactness, padding, chunks, caches, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import bsfa_hf
from bsfa_calib import ThresholdTable, binding, hook
from bsfa_calib.language_model import cache_argument
from bsfa_hf import Reason, attention
from bsfa_hf.attention import bsfa_attention
from bsfa_kernel import RULES, Geometry, block_sparse_attention
from tiny import HALF, HEADS, LAYERS, largest_difference, table, tiny_model, tokens

KINDS = ["llama", "qwen2", "qwen3", "phi3", "mistral", "gemma2", "gemma3_text", "gpt_oss"]


def chunked(model: Any, ids: Tensor, size: int, cache: Any, mask: Tensor | None = None) -> Tensor:
    logits = []
    for start in range(0, ids.shape[1], size):
        stop = min(start + size, ids.shape[1])
        options: dict[str, Any] = {cache_argument(model): cache}
        if mask is not None:
            options["attention_mask"] = mask[:, :stop]
        logits.append(model(ids[:, start:stop], use_cache=True, **options).logits)
    return torch.cat(logits, 1)


def pad(prompts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    longest = max(prompt.shape[1] for prompt in prompts)
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        length = prompt.shape[1]
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        ids[row, place] = prompt[0]
        mask[row, place] = 1
    return ids, mask


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_of_minus_infinity_give_the_dense_logits(kind: str) -> None:
    model = tiny_model(kind)
    ids = tokens(403)
    dense = model(ids).logits
    with bsfa_hf.enabled(model, table(-math.inf)):
        sparse = model(ids).logits
    assert largest_difference(sparse, dense) < 1e-5
    assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize("rule", RULES)
def test_thresholds_of_plus_infinity_keep_the_forced_blocks_only(model: Any, rule: str) -> None:
    with bsfa_hf.enabled(model, table(math.inf, rule=rule)) as stats:
        model(tokens(512))
    assert stats.kept_per_query_block == [2.0] * LAYERS
    assert stats.visible_blocks == [2 + 4 + 6 + 8] * LAYERS
    assert stats.kept_fraction == [8 / 20] * LAYERS


@pytest.mark.parametrize("rule", RULES)
def test_finite_thresholds_skip_some_blocks(model: Any, rule: str) -> None:
    ids = tokens(700)
    dense = model(ids).logits
    with bsfa_hf.enabled(model, table(rule=rule)) as stats:
        sparse = model(ids).logits
    assert 0.35 < stats.mean_kept_fraction < 0.95
    assert 1e-4 < largest_difference(sparse, dense) < 1


@pytest.mark.parametrize("block", [(128, 64), (64, 64)], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_each_prompt_gives_alone(
    model: Any, side: str, rule: str, block: tuple[int, int]
) -> None:
    prompts = [tokens(n, seed=1) for n in (517, 300, 40, 1)]
    ids, mask = pad(prompts, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with bsfa_hf.enabled(model, table(rule=rule, block=block)) as stats:
        batch = model(ids, attention_mask=mask, position_ids=positions).logits
        fractions = stats.kept_fraction
        stats.reset()
        for row, prompt in enumerate(prompts):
            alone = model(prompt).logits
            assert largest_difference(batch[row, mask[row].bool()], alone[0]) < 1e-5
    assert max(fractions) < 0.97


def test_padded_positions_are_zero_in_the_attention_output(model: Any) -> None:
    ids, mask = pad([tokens(400), tokens(250)], "left")
    seen: list[Tensor] = []
    module = model.model.layers[0].self_attn.o_proj
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with bsfa_hf.enabled(model, table()):
        model(ids, attention_mask=mask)
    hook.remove()
    assert bool((seen[0][1, :150] == 0).all())
    assert not bool((seen[0][1, 150:] == 0).all(-1).any())


def test_padding_between_tokens_is_left_out(model: Any) -> None:
    ids = tokens(500)
    mask = torch.ones_like(ids)
    mask[:, 200:260] = 0
    positions = torch.arange(500)[None]
    dense = model(ids, attention_mask=mask, position_ids=positions).logits
    with bsfa_hf.enabled(model, table(-math.inf)) as stats:
        sparse = model(ids, attention_mask=mask, position_ids=positions).logits
    assert stats.sparse_calls == LAYERS
    assert largest_difference(sparse[mask.bool()], dense[mask.bool()]) < 1e-5


@pytest.mark.parametrize("size", [128, 384])
@pytest.mark.parametrize("rule", RULES)
def test_chunked_prefill_gives_the_logits_of_one_prefill(model: Any, rule: str, size: int) -> None:
    ids = tokens(699)
    with bsfa_hf.enabled(model, table(rule=rule)) as stats:
        whole = model(ids).logits
        kept = stats.kept_blocks
        stats.reset()
        parts = chunked(model, ids, size, DynamicCache())
        assert largest_difference(parts, whole) < 1e-5
        assert (
            int(kept.sum()) > int(stats.kept_blocks.sum()) - 40
        )  # a dense first chunk is not counted


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("rule", RULES)
def test_generate_with_a_chunked_prefill_gives_what_it_gives_without(
    model: Any, rule: str, cache: str
) -> None:
    # The last chunk holds one token and looks like a decode step.
    ids = tokens(641 if cache == "dynamic" else 385)
    options: dict[str, Any] = {
        "max_new_tokens": 3,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    if cache == "static":
        options["cache_implementation"] = "static"
        options["disable_compile"] = True
    with bsfa_hf.enabled(model, table(rule=rule)) as stats:
        plain = model.generate(ids, **options)
        assert largest_difference(plain.logits[0], model(ids).logits[:, -1]) < 1e-5
        parts = model.generate(ids, prefill_chunk_size=128, **options)
    assert torch.equal(plain.sequences, parts.sequences)
    for one, other in zip(plain.logits, parts.logits, strict=True):
        assert largest_difference(other, one) < 1e-5
    assert stats.dense_calls[Reason.DECODE] == 2 * 2 * LAYERS


def first_attention(model: Any, run: Callable[[], object]) -> Tensor:
    """What the first layer's attention gives, [batch, queries of all calls, heads * head_dim]."""
    seen: list[Tensor] = []
    module = model.model.layers[0].self_attn.o_proj
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run()
    hook.remove()
    return torch.cat(seen, 1)


@pytest.mark.parametrize("size", [1, 70, 100, 129, 200, 511])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prefill_in_chunks_of_any_size_is_dense_at_minus_infinity(
    model: Any, cache: str, size: int
) -> None:
    ids, mask = pad([tokens(300 if size == 1 else 611), tokens(250, seed=1)], "left")
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 2, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    dense = model.generate(ids, **options)
    with bsfa_hf.enabled(model, table(-math.inf)) as stats:
        parts = model.generate(ids, prefill_chunk_size=size, **options)
    for one, other in zip(dense.logits, parts.logits, strict=True):
        assert largest_difference(other, one) < 1e-5
    assert stats.sparse_calls > 0
    assert stats.kept_fraction == [1.0] * LAYERS


@pytest.mark.parametrize("size", [70, 100, 129, 200, 511])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block", [(128, 64), (64, 64)])
def test_a_prefill_in_chunks_of_any_size_changes_only_the_query_blocks_that_are_cut(
    model: Any, rule: str, size: int, block: tuple[int, int]
) -> None:
    length, q_block = 699, block[0]
    ids = tokens(length)
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False}
    with bsfa_hf.enabled(model, table(rule=rule, block=block)) as stats:
        whole = first_attention(model, lambda: model.generate(ids, **options))
        assert stats.mean_kept_fraction < 0.95
        stats.reset()
        parts = first_attention(
            model, lambda: model.generate(ids, prefill_chunk_size=size, **options)
        )
        assert stats.mean_kept_fraction < 1
    cut = torch.zeros(length, dtype=torch.bool)
    for start in range(size, length, size):
        if start % q_block:
            first = start // q_block * q_block
            cut[first : first + q_block] = True
    assert cut.any()
    assert parts.shape == whole.shape
    torch.testing.assert_close(parts[:, ~cut], whole[:, ~cut], rtol=0, atol=1e-5)


def test_a_static_cache_gives_what_a_dynamic_one_gives(model: Any) -> None:
    ids = tokens(400)
    name = cache_argument(model)
    with bsfa_hf.enabled(model, table()) as stats:
        whole = model(ids).logits
        static = StaticCache(config=model.config, max_cache_len=600)
        assert largest_difference(model(ids, **{name: static}).logits, whole) < 1e-5
        static = StaticCache(config=model.config, max_cache_len=600)
        assert largest_difference(chunked(model, ids, 256, static), whole) < 1e-5
        ids, mask = pad([ids, tokens(300)], "left")
        static = StaticCache(config=model.config, max_cache_len=600)
        padded = model(ids, attention_mask=mask, **{name: static}).logits
        assert largest_difference(padded[0], whole[0]) < 1e-5
    assert not stats.dense_calls


def test_decode_steps_after_a_prefill_are_dense_and_counted(model: Any) -> None:
    ids = tokens(300)
    dense = model.generate(ids, max_new_tokens=5, do_sample=False)
    with bsfa_hf.enabled(model, table(-math.inf)) as stats:
        sparse = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(sparse, dense)
    assert stats.sparse_calls == LAYERS
    assert stats.dense_calls == {"decode step": 4 * LAYERS}


def test_decode_steps_of_a_padded_batch_are_those_of_the_dense_model(model: Any) -> None:
    ids, mask = pad([tokens(300), tokens(150)], "left")
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    dense = model.generate(ids, **options)
    with bsfa_hf.enabled(model, table(-math.inf)):
        assert torch.equal(model.generate(ids, **options), dense)


def test_a_few_tokens_on_top_of_a_cache_are_a_decode_step(model: Any) -> None:
    ids = tokens(320)
    dense = model(ids).logits
    with bsfa_hf.enabled(model, table(-math.inf)) as stats:
        cache = DynamicCache()
        model(ids[:, :313], use_cache=True, **{cache_argument(model): cache})
        last = model(ids[:, 313:], use_cache=True, **{cache_argument(model): cache}).logits
    assert largest_difference(last, dense[:, 313:]) < 1e-5
    assert stats.dense_calls == {"decode step": LAYERS}


@pytest.mark.parametrize("length", [1, 2, 63, 64, 128])
def test_prompts_too_short_to_skip_a_block_are_dense(model: Any, length: int) -> None:
    ids = tokens(length)
    dense = model(ids).logits
    with bsfa_hf.enabled(model, table(math.inf)) as stats:
        assert largest_difference(model(ids).logits, dense) < 1e-6
    assert stats.sparse_calls == 0
    reason = Reason.DECODE if length == 1 else Reason.TOO_SHORT
    assert stats.dense_calls == {str(reason): LAYERS}
    assert math.isnan(stats.mean_kept_fraction)


@pytest.mark.parametrize("length", [129, 191, 200, 511])
def test_odd_lengths_are_served(model: Any, length: int) -> None:
    ids = tokens(length)
    dense = model(ids).logits
    with bsfa_hf.enabled(model, table(-math.inf)) as stats:
        assert largest_difference(model(ids).logits, dense) < 1e-5
    assert stats.sparse_calls == LAYERS


@pytest.mark.parametrize(
    ("kind", "reasons"),
    [
        ("mistral", {Reason.SLIDING_WINDOW: 2}),
        ("gemma2", {Reason.SOFTCAP: 2}),
        ("gemma3_text", {Reason.SLIDING_WINDOW: 2}),
        ("phi3", {}),
    ],
)
def test_layers_that_the_kernel_cannot_compute_run_as_the_model_would(
    kind: str, reasons: dict[Reason, int]
) -> None:
    model = tiny_model(kind)
    ids, mask = pad([tokens(450), tokens(333)], "left")
    dense = model(ids, attention_mask=mask).logits
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    with bsfa_hf.enabled(model, table(math.inf if reasons else -math.inf)) as stats:
        logits = model(ids, attention_mask=mask).logits
        dense_calls = stats.dense_calls
        assert torch.equal(
            model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False), generated
        )
    assert largest_difference(logits[mask.bool()], dense[mask.bool()]) < 1e-5
    assert dense_calls == {str(reason): number for reason, number in reasons.items()}


def test_full_layers_of_a_model_with_windows_run_sparse() -> None:
    model = tiny_model("gemma3_text")
    model.config.layer_types = ["sliding_attention", "full_attention"]
    model = type(model)(model.config).eval()
    with bsfa_hf.enabled(model, table(math.inf)) as stats:
        model(tokens(450))
    assert stats.dense_calls == {"sliding-window layer": 1}
    assert stats.sparse_calls == 1
    assert math.isnan(stats.kept_fraction[0])
    assert stats.kept_fraction[1] < 1


@pytest.mark.parametrize("selection", ["exact", "int8"])
def test_cu_seq_lens_that_change_in_place_are_read_again(model: Any, selection: str) -> None:
    def run(starts: Tensor) -> Tensor:
        lengths = (starts[1:] - starts[:-1]).tolist()
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "position_ids": positions}
        found: Tensor = model(tokens(512), **packed, use_cache=False).logits
        return found

    starts = torch.tensor([0, 256, 512], dtype=torch.int32)
    for inference in (False, True):
        with (
            bsfa_hf.enabled(model, table(), selection=selection) as stats,
            torch.inference_mode(inference),
        ):
            starts.copy_(torch.tensor([0, 256, 512]))
            run(starts)
            starts.copy_(torch.tensor([0, 64, 512]))
            bsfa_hf.reset(model)
            again = run(starts)
            fractions = stats.kept_fraction
            bsfa_hf.reset(model)
            assert torch.equal(again, run(starts.clone()))
            assert stats.kept_fraction == fractions


def test_a_function_of_the_user_may_have_any_name(model: Any) -> None:
    ids = tokens(300)
    found = []
    for name in ("_prefill", "_assisted_decoding", "generate", "any_other"):
        scope: dict[str, Any] = {"model": model, "ids": ids, "argument": cache_argument(model)}
        source = f"""
def {name}(cache):
    model(ids[:, :299], **{{argument: cache}})
    return model(ids[:, 299:], **{{argument: cache}}).logits
"""
        exec(source, scope)
        with bsfa_hf.enabled(model, table(math.inf)) as stats:
            logits = scope[name](DynamicCache(config=model.config))
        assert stats.dense_calls == {Reason.DECODE: LAYERS}
        found.append(logits)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_packed_sequences_told_by_cu_seq_lens_give_what_each_gives_alone(model: Any) -> None:
    prompts = [tokens(n) for n in (300, 450)]
    ids = torch.cat(prompts, 1)
    positions = torch.cat([torch.arange(p.shape[1]) for p in prompts])[None]
    starts = torch.tensor([0, 300, 750], dtype=torch.int32)
    with bsfa_hf.enabled(model, table()) as stats:
        packed = model(
            ids,
            position_ids=positions,
            cu_seq_lens_q=starts,
            cu_seq_lens_k=starts,
            max_length_q=450,
            max_length_k=450,
            use_cache=False,
        ).logits
        fractions = stats.kept_fraction
        alone = torch.cat([model(prompt).logits for prompt in prompts], 1)
        assert largest_difference(packed, alone) < 1e-5
        assert fractions == pytest.approx(stats.kept_fraction)


def test_packed_sequences_told_by_positions_alone_run_dense(model: Any) -> None:
    ids = tokens(600)
    positions = torch.cat([torch.arange(350), torch.arange(250)])[None]
    dense = model(ids, position_ids=positions, use_cache=False).logits
    with bsfa_hf.enabled(model, table(math.inf)) as stats:
        assert (
            largest_difference(model(ids, position_ids=positions, use_cache=False).logits, dense)
            < 1e-6
        )
    assert stats.dense_calls == {"the model's own mask": LAYERS}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_a_custom_mask_that_is_causal_with_padding_is_honoured(
    model: Any, dtype: torch.dtype
) -> None:
    ids, padding = pad([tokens(400), tokens(300)], "left")
    mask = torch.ones(400, 400).tril().bool() & padding.bool()[:, None, None, :]
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    with bsfa_hf.enabled(model, table()) as stats:
        expected = model(ids, attention_mask=padding).logits
        logits = model(ids, attention_mask=mask).logits
    assert largest_difference(logits[padding.bool()], expected[padding.bool()]) < 1e-6
    assert stats.sparse_calls == 2 * LAYERS


@pytest.mark.parametrize("value", [-math.inf, math.inf])
@pytest.mark.parametrize("padded", ["hidden", "all", "causal", "itself"])
def test_rows_of_padding_in_a_custom_mask_may_see_what_models_let_them(
    model: Any, padded: str, value: float
) -> None:
    side = "right" if padded == "causal" else "left"
    ids, padding = pad([tokens(400), tokens(300)], side)
    valid = padding.bool()
    mask = torch.ones(400, 400).tril().bool() & valid[:, None, None, :]
    if padded == "all":
        mask = mask | ~valid[:, None, :, None]
    elif padded == "itself":  # or sequences of one token: dense
        mask = mask | (torch.eye(400).bool() & ~valid[:, None, :, None])
    dense = model(ids, attention_mask=mask).logits[valid]
    with bsfa_hf.enabled(model, table(value)) as stats:
        logits = model(ids, attention_mask=mask).logits[valid]
    if value == -math.inf or padded == "itself":
        assert largest_difference(logits, dense) < 1e-6
    assert stats.sparse_calls == (0 if padded == "itself" else LAYERS)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 1, 300, 300, dtype=torch.bool), "neither|sees keys after it"),
        (torch.ones(300, 300).tril().triu(-50).bool()[None, None], "not all keys before it"),
        (torch.block_diag(*[torch.ones(150, 150).tril()] * 2).bool()[None, None], "packed"),
        (torch.randn(1, 1, 300, 300), "adds a bias"),
        (
            torch.stack([torch.ones(300, 300).tril(), torch.ones(300, 300)] * 2).bool()[None],
            "differs between heads",
        ),
        (torch.ones(1, 1, 300, 200, dtype=torch.bool), "300 queries and 300 keys"),
    ],
    ids=["full", "window", "packed", "bias", "heads", "shape"],
)
def test_any_other_custom_mask_is_refused(model: Any, mask: Tensor, message: str) -> None:
    with (
        bsfa_hf.enabled(model, table()),
        pytest.raises(ValueError, match=f"attention mask of shape .*({message})"),
    ):
        model(tokens(300), attention_mask=mask)


def test_attention_weights_are_refused(model: Any) -> None:
    with (
        bsfa_hf.enabled(model, table()),
        pytest.raises(ValueError, match="output_attentions=True asks for attention weights"),
    ):
        model(tokens(300), output_attentions=True)


def test_dropout_in_training_is_refused(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with bsfa_hf.enabled(model, table()):
        model(tokens(300))
        model.train()
        with pytest.raises(ValueError, match=r"no dropout, got dropout=0\.1"):
            model(tokens(300))
        model.eval()


def test_a_backward_pass_is_refused(model: Any) -> None:
    with torch.enable_grad(), bsfa_hf.enabled(model, table()):
        loss = model(tokens(300)).logits.sum()
        with pytest.raises(NotImplementedError, match="backward"):
            loss.backward()


@pytest.mark.parametrize(("batch", "length"), [(0, 300), (0, 1), (2, 0)])
def test_an_empty_batch_gives_an_empty_result(model: Any, batch: int, length: int) -> None:
    # transformers' Llama cannot reshape an empty batch, so the attention function is called itself.
    q, k = torch.zeros(batch, 4, length, 16), torch.zeros(batch, 2, length, 16)
    mask = torch.ones(batch, length, dtype=torch.bool)
    with bsfa_hf.enabled(model, table()) as stats:
        for argument in (None, mask):
            out, weights = bsfa_attention(model.model.layers[0].self_attn, q, k, k, argument)
            assert out.shape == (batch, length, 4, 16)
            assert weights is None
    assert stats.calls == 0


@pytest.mark.parametrize("rule", RULES)
def test_grouped_queries_give_what_repeated_keys_give(rule: str) -> None:
    grouped = tiny_model("llama")
    repeated = tiny_model("llama")
    repeated.load_state_dict(grouped.state_dict())
    for layer in repeated.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = 1
        for name in ("k_proj", "v_proj"):
            projection = getattr(attention, name)
            weight = projection.weight.data.view(2, 16, 64).repeat_interleave(2, 0)
            projection.weight.data = weight.reshape(64, 64)
    ids = tokens(450)
    with bsfa_hf.enabled(grouped, table(rule=rule)):
        expected = grouped(ids).logits
    with bsfa_hf.enabled(repeated, table(rule=rule)):
        assert largest_difference(repeated(ids).logits, expected) < 1e-6


def test_no_tensor_is_copied_on_the_way_to_the_kernel(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bsfa_hf import attention

    seen: list[Tensor] = []
    kernel = attention.block_sparse_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(k)
        return kernel(q, k, v, *args, **kwargs)

    monkeypatch.setattr(attention, "block_sparse_attention", watched)
    cache = DynamicCache()
    ids, mask = pad([tokens(400), tokens(300)], "left")
    with bsfa_hf.enabled(model, table()):
        model(ids, attention_mask=mask, use_cache=True, **{cache_argument(model): cache})
    storage = cache.layers[0].keys.untyped_storage().data_ptr()
    assert [k.untyped_storage().data_ptr() == storage for k in seen[:2]] == [True, True]
    assert seen[1].shape[1] == 300


def test_inference_mode_works(model: Any) -> None:
    ids, mask = pad([tokens(400), tokens(300)], "right")
    with torch.inference_mode(), bsfa_hf.enabled(model, table()) as stats:
        inside = model(ids, attention_mask=mask).logits
    assert stats.sparse_calls == LAYERS
    with bsfa_hf.enabled(model, table()):
        assert torch.equal(model(ids, attention_mask=mask).logits, inside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_models_run(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    ids, mask = pad([tokens(300), tokens(200)], "left")
    with bsfa_hf.enabled(model, table()) as stats:
        logits = model(ids, attention_mask=mask).logits
    assert logits.dtype == dtype
    assert bool(logits.isfinite().all())
    assert stats.sparse_calls == LAYERS


@pytest.mark.slow
def test_a_patched_model_compiles_without_graph_breaks(model: Any) -> None:
    ids = tokens(400)
    name = cache_argument(model)
    with bsfa_hf.enabled(model, table()) as stats:
        expected = model(ids, use_cache=False).logits
        fractions = stats.kept_fraction
        stats.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        logits = compiled(ids, **{name: DynamicCache(config=model.config)}).logits
        assert largest_difference(logits, expected) < 1e-5
        assert stats.sparse_calls == LAYERS
        assert stats.kept_fraction == pytest.approx(fractions)
        # What a mask holds cannot be read while compiling.
        compiled(ids, attention_mask=torch.ones_like(ids), use_cache=False)
        assert stats.dense_calls == {str(Reason.TRACED_MASK): LAYERS}
    torch.compiler.reset()


# ------------------------------------------------------------------------- voters and selection


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each call of the kernel."""
    calls: list[dict[str, Any]] = []

    def attend(*tensors: Tensor, **options: Any) -> Any:
        calls.append(options)
        return block_sparse_attention(*tensors, **options)

    monkeypatch.setattr(attention, "block_sparse_attention", attend)
    return calls


@pytest.mark.parametrize("voters", [1, 2, 4])
@pytest.mark.parametrize("block", [(128, 64), (64, 64)])
def test_voters_are_those_of_the_table(
    voters: int, block: tuple[int, int], told: list[dict[str, Any]]
) -> None:
    model = tiny_model()
    one = table(rule="peak_lse", block=block, voters=voters)
    with bsfa_hf.enabled(model, one) as stats:
        model(tokens(700))
    assert [call["voters"] for call in told] == [voters] * LAYERS
    values = torch.tensor(one.thresholds[0])
    method = hook.BlockSparse(values, "peak_lse", Geometry(*block), voters=voters)
    with hook.applied(model, method) as meter:
        model(tokens(700))
    skipped = 1 - stats.kept_fraction_by_head
    assert torch.allclose(skipped, torch.tensor(meter.take(), dtype=torch.float64), atol=1e-4)
    assert 0.05 < skipped.mean() < 0.95


@pytest.mark.parametrize("way", ["argument", "environment", "none"])
def test_the_selection_is_passed_on_and_counted(
    way: str, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    given = "int8" if way == "argument" else None
    if way != "none":
        # An argument counts before the environment.
        monkeypatch.setenv("BSFA_SELECTION", "int8" if way == "environment" else "exact")
    with bsfa_hf.enabled(model, table(), selection=given) as stats:
        model(tokens(300))
    expected = "auto" if way == "none" else "int8"
    assert [call["selection"] for call in told] == [expected] * LAYERS
    # On a CPU "auto" is exact.
    ran = {"exact": LAYERS, "int8": 0} if way == "none" else {"exact": 0, "int8": LAYERS}
    assert stats.sparse_calls_by_selection == ran
    assert ("chose in 8 bits" in str(stats)) == (way != "none")


def test_auto_is_told_what_the_point_is_expected_to_skip(told: list[dict[str, Any]]) -> None:
    model = tiny_model()
    values = np.full((2, LAYERS, HEADS, 1), HALF["peak_lse"], np.float32)
    learned = ThresholdTable(
        *(values, (0.5, 0.75)),
        axis="target_sparsity",
        rule="peak_lse",
        provenance={"expected_sparsity": "0.51, 0.76"},
    )
    with bsfa_hf.enabled(model, learned, target_sparsity=0.75):
        model(tokens(300))
    with bsfa_hf.enabled(model, learned, target_sparsity=0.75, selection="exact"):
        model(tokens(300))
    assert [call["expected_skipped"] for call in told] == [0.76] * LAYERS + [None] * LAYERS


def test_packed_sequences_are_selected_in_8_bits(told: list[dict[str, Any]]) -> None:
    model = tiny_model()
    ids = torch.cat([tokens(300), tokens(200, seed=1)], 1)
    starts = torch.tensor([0, 300, 500], dtype=torch.int32)
    positions = torch.cat([torch.arange(300), torch.arange(200)])[None]
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "position_ids": positions}
    with bsfa_hf.enabled(model, table(-math.inf), selection="int8") as stats:
        found = model(ids, **packed).logits[:, 300:]
    assert [call["max_seqlen_k"] for call in told] == [300] * LAYERS
    assert stats.sparse_calls_by_selection == {"exact": 0, "int8": LAYERS}
    assert largest_difference(found, model(tokens(200, seed=1)).logits) < 1e-4


def test_what_is_counted_goes_by_the_keys_of_each_kernel_call(
    told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def resolve(selection: str, q: Tensor, seqlen_k: int, **options: Any) -> str:
        asked.append(seqlen_k)
        return "int8" if seqlen_k >= 300 else "exact"

    monkeypatch.setattr(binding, "resolve_selection", resolve)
    model = tiny_model()
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[1, :90] = 0
    with bsfa_hf.enabled(model, table()) as stats:
        model(tokens(290))
        assert asked == [290] * LAYERS
        assert stats.sparse_calls_by_selection == {"exact": LAYERS, "int8": 0}
        model(tokens(300).expand(2, -1), attention_mask=mask)
        assert asked[LAYERS:] == [300, 210] * LAYERS
        assert stats.sparse_calls_by_selection == {"exact": LAYERS, "int8": LAYERS}
        starts = torch.tensor([0, 310, 500], dtype=torch.int32)
        positions = torch.cat([torch.arange(310), torch.arange(190)])[None]
        packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "position_ids": positions}
        model(tokens(500), **packed)
        assert asked[3 * LAYERS :] == [310] * LAYERS
        assert [call["max_seqlen_k"] for call in told[-LAYERS:]] == [310] * LAYERS


def test_packed_sequences_that_are_too_short_are_not_selected(told: list[dict[str, Any]]) -> None:
    model = tiny_model()
    ids = torch.cat([tokens(60), tokens(50, seed=1)], 1)
    starts = torch.tensor([0, 60, 110], dtype=torch.int32)
    positions = torch.cat([torch.arange(60), torch.arange(50)])[None]
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "position_ids": positions}
    with bsfa_hf.enabled(model, table(math.inf), selection="int8") as stats:
        found = model(ids, **packed).logits[:, 60:]
    assert [call["selection"] for call in told] == ["exact"] * LAYERS
    assert stats.dense_calls == {str(Reason.TOO_SHORT): LAYERS}
    assert largest_difference(found, model(tokens(50, seed=1)).logits) < 1e-4


def test_a_selection_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="selection must be one of exact, int8, auto, got 'fp4'"):
        bsfa_hf.enable(model, table(), selection="fp4")
    monkeypatch.setenv("BSFA_SELECTION", "none")
    with pytest.raises(ValueError, match=r"BSFA_SELECTION must be one of .*, got 'none'"):
        bsfa_hf.enable(model, table())
