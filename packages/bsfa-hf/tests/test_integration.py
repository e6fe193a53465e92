# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Switching models on and off, and every way in which a table may not fit."""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)
from transformers.masking_utils import AttentionMaskInterface

import bsfa_hf
from bsfa_calib import Point, ThresholdFileError, ThresholdTable
from bsfa_calib.binding import same_model
from bsfa_hf.state import model_names
from tiny import HALF, HEADS, LAYERS, table, tiny_model, tokens


def test_a_composite_model_has_the_name_of_the_whole() -> None:
    config = Gemma3Config(
        text_config={
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 14,
            "patch_size": 14,
        },
    )
    config._name_or_path = "owner/Whole-Model"
    config.text_config._name_or_path = "owner/Text-Model"
    model = Gemma3ForConditionalGeneration(config).eval()
    named = dataclasses.replace(table(), model="Whole-Model")
    with bsfa_hf.enabled(model, named):
        pass
    with pytest.raises(ValueError, match="Whole-Model"):
        bsfa_hf.enable(model, dataclasses.replace(table(), model="Text-Model"))


def test_importing_registers_function_and_mask_under_one_name() -> None:
    for name in ("bsfa", "bsfa_sliding_window", "bsfa_sparge"):
        assert name in AttentionInterface()
        assert name in AttentionMaskInterface()
        assert "flash" not in name
        assert "/" not in name


def test_enable_and_disable_leave_the_model_as_it_was(model: Any) -> None:
    before = set(vars(model.model.layers[0].self_attn))
    dense = model(tokens(300)).logits
    stats = bsfa_hf.enable(model, table(math.inf))
    assert model.config._attn_implementation == "bsfa"
    assert not torch.equal(model(tokens(300)).logits, dense)
    assert stats.sparse_calls == LAYERS
    bsfa_hf.disable(model)
    assert model.config._attn_implementation == "sdpa"
    assert set(vars(model.model.layers[0].self_attn)) == before
    assert torch.equal(model(tokens(300)).logits, dense)
    bsfa_hf.disable(model)
    assert model.config._attn_implementation == "sdpa"


def test_eager_is_restored_too() -> None:
    model = tiny_model("llama", implementation="eager")
    with bsfa_hf.enabled(model, table()):
        pass
    assert model.config._attn_implementation == "eager"


def test_the_context_restores_after_an_error_and_keeps_its_statistics(model: Any) -> None:
    def fail() -> None:
        model(tokens(300))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), bsfa_hf.enabled(model, table()) as stats:
        fail()
    assert model.config._attn_implementation == "sdpa"
    assert stats.sparse_calls == LAYERS


def test_contexts_nest(model: Any) -> None:
    outer = bsfa_hf.enable(model, table(math.inf))
    with bsfa_hf.enabled(model, table(-math.inf)) as inner:
        model(tokens(300))
    assert (outer.calls, inner.calls) == (0, LAYERS)
    model(tokens(300))
    assert bsfa_hf.stats(model) is outer
    assert outer.calls == LAYERS
    assert inner.mean_kept_fraction == 1 > outer.mean_kept_fraction
    bsfa_hf.disable(model)
    assert model.config._attn_implementation == "sdpa"


def test_enable_again_replaces_the_thresholds(model: Any) -> None:
    bsfa_hf.enable(model, table(math.inf))
    stats = bsfa_hf.enable(model, table(-math.inf))
    model(tokens(300))
    assert stats.mean_kept_fraction == 1
    bsfa_hf.disable(model)
    assert model.config._attn_implementation == "sdpa"


def test_two_models_in_one_process_have_their_own_tables_and_counts() -> None:
    one, other = tiny_model("llama"), tiny_model("qwen3")
    with (
        bsfa_hf.enabled(one, table(math.inf)) as first,
        bsfa_hf.enabled(other, table(-math.inf, rule="peak_lse")) as second,
    ):
        one(tokens(300))
        other(tokens(200))
        one(tokens(300))
    assert first.calls == 2 * second.calls == 2 * LAYERS
    assert first.mean_kept_fraction < second.mean_kept_fraction == 1


def test_threads_that_share_a_model_lose_no_count(model: Any) -> None:
    ids = tokens(200)
    with bsfa_hf.enabled(model, table(math.inf)) as stats:
        threads = [
            threading.Thread(target=lambda: [model(ids) for _ in range(3)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert stats.sparse_calls == 12 * LAYERS


def test_a_copied_model_has_its_own_counts(model: Any) -> None:
    bsfa_hf.enable(model, table())
    twin = copy.deepcopy(model)
    expected = model(tokens(300)).logits
    assert torch.equal(twin(tokens(300)).logits, expected)
    twin(tokens(300))
    assert bsfa_hf.stats(model).calls * 2 == bsfa_hf.stats(twin).calls == 2 * LAYERS
    bsfa_hf.disable(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "bsfa"


def test_a_saved_model_carries_nothing_of_this(model: Any, tmp_path: Path) -> None:
    expected = model(tokens(300)).logits
    bsfa_hf.enable(model, table())
    model.save_pretrained(tmp_path)
    assert "bsfa" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert torch.equal(loaded(tokens(300)).logits, expected)


def test_statistics_count_and_reset(model: Any) -> None:
    with pytest.raises(ValueError, match=r"call bsfa_hf\.enable first"):
        bsfa_hf.stats(model)
    stats = bsfa_hf.enable(model, table())
    model.generate(tokens(300), max_new_tokens=3, do_sample=False)
    assert stats.layers == LAYERS
    assert stats.kept_fraction_by_head.shape == (LAYERS, HEADS)
    assert stats.calls == 3 * LAYERS
    assert stats.dense_calls_of(0) == {"decode step": 2}
    assert "block-sparse calls, kept" in str(stats)
    assert "4 dense calls: decode step" in str(stats)
    bsfa_hf.reset(model)
    assert bsfa_hf.stats(model).calls == 0


def test_a_table_can_be_given_as_a_path(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    table().save(path)
    with bsfa_hf.enabled(model, table()):
        expected = model(tokens(300)).logits
    for name in (path, str(path)):
        with bsfa_hf.enabled(model, name, k=8):
            assert torch.equal(model(tokens(300)).logits, expected)


def test_a_missing_or_foreign_file_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no threshold file"):
        bsfa_hf.enable(model, tmp_path / "none.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"nothing like it at all")
    with pytest.raises(ThresholdFileError):
        bsfa_hf.enable(model, foreign)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("wrong", "options", "message"),
    [
        ({"layers": 3}, {}, "3 layers and 4 query heads, and this model has 2 layers"),
        ({"heads": 8}, {}, "8 query heads, and this model has 2 layers and 4 query heads"),
        ({"block": (32, 32)}, {}, "sparsity blocks of 32x32, and the kernels have 128x64, 64x64"),
        ({"points": (4, 8, 16)}, {"k": 5}, "no k=5; its points are k = 4, 8, 16"),
        ({"points": (4, 8)}, {}, "name one operating point"),
        ({}, {"target_sparsity": 0.5}, "no target_sparsity=0.5"),
        ({}, {"k": 8, "max_loss": 0.1}, "name one operating point"),
    ],
    ids=str,
)
def test_a_table_that_does_not_fit_is_refused(
    model: Any, wrong: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bsfa_hf.enable(model, table(**wrong), **options)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="call bsfa_hf"):
        bsfa_hf.stats(model)


def test_a_table_of_another_model_is_refused(model: Any) -> None:
    model.config._name_or_path = "meta-llama/Llama-3.1-8B-Instruct"
    with pytest.raises(
        ValueError, match=r"of Qwen/Qwen3-8B, and this model is meta-llama.*check_model"
    ):
        bsfa_hf.enable(model, table(model="Qwen/Qwen3-8B"))
    bsfa_hf.enable(model, table(model="Qwen/Qwen3-8B"), check_model=False)
    bsfa_hf.enable(model, table(model="Llama-3.1-8B-Instruct"))


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("org/Model-1", ["Model-1"]),
        ("/cache/models--org--Model-1/snapshots/0123abcd", ["0123abcd", "Model-1"]),
        ("", []),
    ],
)
def test_a_configuration_gives_the_names_of_its_model(path: str, names: list[str]) -> None:
    assert model_names(SimpleNamespace(_name_or_path=path)) == names


def test_a_directory_with_a_gguf_file_goes_by_the_file_name(tmp_path: Path) -> None:
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    names = model_names(SimpleNamespace(_name_or_path=str(tmp_path)))
    assert same_model("HuggingFaceTB/SmolLM2-135M-Instruct", names)


def test_attn_implementation_alone_says_how_to_give_a_table() -> None:
    model = tiny_model("llama", implementation="bsfa")
    with pytest.raises(ValueError, match=r"call bsfa_hf\.enable.*bsfa_thresholds.*BSFA_THRESHOLDS"):
        model(tokens(300))


@pytest.fixture
def learned(tmp_path: Path) -> str:
    """A table of two target sparsities, for blocks of 64x64."""
    path = tmp_path / "learned.safetensors"
    values = np.full((2, LAYERS, HEADS, 1), HALF["peak_lse"], np.float32)
    values[0] -= 2
    ThresholdTable(
        thresholds=values,
        points=(0.5, 0.75),
        axis="target_sparsity",
        rule="peak_lse",
        q_block=64,
        k_block=64,
    ).save(path)
    return str(path)


@pytest.mark.parametrize("point", [Point("target_sparsity", 0.75), "target_sparsity=0.75"], ids=str)
def test_a_point_is_taken_as_value_text_or_keyword(model: Any, learned: str, point: Any) -> None:
    with bsfa_hf.enabled(model, learned, target_sparsity=0.75) as named:
        expected = model(tokens(300)).logits
    with bsfa_hf.enabled(model, learned, point) as stats:
        assert torch.equal(model(tokens(300)).logits, expected)
    assert torch.equal(stats.kept_blocks, named.kept_blocks)
    bsfa_hf.enable(model, learned, point)
    assert torch.equal(model(tokens(300)).logits, expected)
    bsfa_hf.disable(model)
    with pytest.raises(ValueError, match="name one operating point, got"):
        bsfa_hf.enable(model, learned, point, target_sparsity=0.5)
    with pytest.raises(TypeError, match="sparsity"):
        bsfa_hf.enable(model, learned, sparsity=0.5)


@pytest.mark.parametrize("way", ["config", "environment"])
@pytest.mark.parametrize(
    ("name", "value"), [("target_sparsity", "0.75"), ("point", "target_sparsity=0.75")]
)
def test_attn_implementation_takes_table_and_point_from_config_or_environment(
    way: str, name: str, value: str, model: Any, learned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bsfa_hf.enabled(model, learned, target_sparsity=0.75):
        expected = model(tokens(300)).logits
    other = tiny_model("llama", implementation="bsfa")
    if way == "config":
        other.config.bsfa_thresholds = learned
        setattr(other.config, f"bsfa_{name}", float(value) if name != "point" else value)
    else:
        monkeypatch.setenv("BSFA_THRESHOLDS", learned)
        monkeypatch.setenv(f"BSFA_{name.upper()}", value)
    assert torch.equal(other(tokens(300)).logits, expected)
    assert bsfa_hf.stats(other).sparse_calls == LAYERS


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "name one operating point of .*; this table has target_sparsity = 0.5, 0.75"),
        ({"BSFA_K": "four"}, "BSFA_K must be a whole number, got 'four'"),
        ({"BSFA_MAX_LOSS": "x"}, "BSFA_MAX_LOSS must be a number, got 'x'"),
        ({"BSFA_TARGET_SPARSITY": "1.5"}, r"BSFA_TARGET_SPARSITY: .*in \[0, 1\), got 1.5"),
        ({"BSFA_POINT": "0.75"}, "BSFA_POINT: .*AXIS=NUMBER"),
        ({"BSFA_K": "4", "BSFA_MAX_LOSS": "1"}, "name one operating point, got k=4 and max_loss=1"),
    ],
    ids=str,
)
def test_variables_that_name_no_point_are_refused(
    variables: dict[str, str], message: str, learned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BSFA_THRESHOLDS", learned)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        tiny_model("llama", implementation="bsfa")(tokens(300))


# peft asks transformers under a name that is deprecated.
peft_warns = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def everything(model: Any) -> list[set[str]]:
    """The names of what each module of a model carries."""
    return [set(vars(module)) for module in model.modules()]


@peft_warns
@pytest.mark.parametrize("undone", ["wrapper", "model", "unwrapped"])
def test_a_model_that_is_wrapped_after_it_was_enabled_is_restored(model: Any, undone: str) -> None:
    peft = pytest.importorskip("peft")
    dense = model(tokens(300)).logits
    bsfa_hf.enable(model, table(math.inf))
    sparse = model(tokens(300)).logits
    options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": True}
    wrapper = peft.get_peft_model(model, peft.LoraConfig(**options))
    assert torch.equal(wrapper(tokens(300)).logits, sparse)
    assert bsfa_hf.stats(wrapper).sparse_calls == 2 * LAYERS
    inner = {"wrapper": wrapper, "model": model}.get(undone) or wrapper.unload()
    bsfa_hf.disable(inner)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(inner(tokens(300)).logits, dense)
    assert not any("bsfa" in name for names in everything(wrapper) for name in names)


@peft_warns
def test_a_wrapper_is_enabled_and_its_model_restored(model: Any) -> None:
    peft = pytest.importorskip("peft")
    wrapper = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = everything(wrapper)
    with bsfa_hf.enabled(wrapper, table()) as stats:
        wrapper(tokens(300))
    assert stats.sparse_calls == LAYERS
    assert everything(wrapper) == before
    bsfa_hf.inject_custom_attention(
        wrapper, bsfa_hf.AttentionConfig(mode="sliding_window", sliding_window_size=64)
    )
    bsfa_hf.restore_original_attention(model)
    assert everything(wrapper) == before
    assert bsfa_hf.get_current_attention_config(wrapper) is None
    assert model.config._attn_implementation == "sdpa"


def test_models_of_one_configuration_are_switched_each_for_itself(model: Any) -> None:
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    before = everything(model)
    ids = tokens(300)
    dense = model(ids).logits
    first = bsfa_hf.enable(model, table(math.inf))
    sparse = model(ids).logits
    assert torch.equal(other(ids).logits, dense)
    second = bsfa_hf.enable(other, table(math.inf))
    with pytest.raises(ValueError, match="another model has the same configuration object"):
        bsfa_hf.inject_custom_attention(other, bsfa_hf.AttentionConfig())
    assert torch.equal(other(ids).logits, sparse)
    bsfa_hf.disable(model)
    assert torch.equal(model(ids).logits, dense)
    assert torch.equal(other(ids).logits, sparse)
    assert (first.sparse_calls, second.sparse_calls) == (LAYERS, 2 * LAYERS)
    bsfa_hf.disable(other)
    assert model.config._attn_implementation == "sdpa"
    assert everything(model) == everything(other) == before


def test_a_model_that_does_not_use_the_interface_is_refused() -> None:
    class Own(torch.nn.Module):
        config = SimpleNamespace(
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            _attn_implementation="sdpa",
            _attn_implementation_internal="sdpa",
        )

        def __init__(self) -> None:
            super().__init__()
            self.config.get_text_config = lambda: self.config

    with pytest.raises(ValueError, match="does not take its attention function"):
        bsfa_hf.enable(Own(), table())


def test_tensor_parallel_ranks_take_their_heads(model: Any) -> None:
    thresholds = table()
    model._tp_size = 2
    model._device_mesh = SimpleNamespace(mesh_dim_names=None, get_local_rank=lambda: 1)
    bsfa_hf.enable(model, thresholds)
    state = model.model.layers[0].self_attn._bsfa_state
    expected = torch.from_numpy(thresholds.select(k=8)[:, 2:4].copy())
    assert torch.equal(torch.stack(state.thresholds), expected)
    with pytest.raises(ValueError, match="for 2 query heads, and layer 0 has 4"):
        model(tokens(300))
    model._tp_size = 3
    with pytest.raises(ValueError, match="must be split evenly"):
        bsfa_hf.enable(model, thresholds)


def test_moving_a_model_moves_its_thresholds(model: Any) -> None:
    bsfa_hf.enable(model, table())
    state = model.model.layers[0].self_attn._bsfa_state
    assert state.layer_thresholds(0, torch.device("meta")).device.type == "meta"


def test_a_table_made_by_calibration_keeps_about_k_blocks() -> None:
    from bsfa_calib.capture import calibrate

    model = tiny_model("llama")
    samples = [tokens(640, seed=seed)[0].tolist() for seed in (5, 6)]
    made: ThresholdTable = calibrate(model, samples, k_values=[3])
    with bsfa_hf.enabled(model, made, k=3) as stats:
        for sample in samples:
            model(torch.tensor([sample]))
    # Rows with no more than 3 unforced blocks keep them all: 2 forced, and 0, 2, 3, 3 and 3 others.
    for kept in stats.kept_per_query_block:
        assert kept == pytest.approx(2 + 11 / 5, abs=0.15)
