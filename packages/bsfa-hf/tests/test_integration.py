# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Switching models on and off, and every way in which a table may not fit."""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

import bsfa_hf
from bsfa_calib import ThresholdFileError, ThresholdTable
from bsfa_hf.tables import model_names, same_model
from tiny import HEADS, LAYERS, table, tiny_model, tokens


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
        bsfa_hf.enabled(other, table(-math.inf, rule="running_lse")) as second,
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
    ("name", "path", "same"),
    [
        ("org/Model-1", "Model-1", True),
        ("SmolLM2-135M-Instruct.Q4_1", "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("org/Model-1", "/cache/models--org--Model-1/snapshots/0123abcd", True),
        ("org/Model-1", "org/Model-2", False),
        ("org/Model-1", "org/Model-10", False),
        ("", "org/Model-1", True),
        ("org/Model-1", "", True),
    ],
)
def test_names_of_one_model_are_recognised(name: str, path: str, same: bool) -> None:
    assert same_model(name, model_names(SimpleNamespace(_name_or_path=path))) is same


def test_a_directory_with_a_gguf_file_goes_by_the_file_name(tmp_path: Path) -> None:
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    names = model_names(SimpleNamespace(_name_or_path=str(tmp_path)))
    assert same_model("HuggingFaceTB/SmolLM2-135M-Instruct", names)


def test_attn_implementation_alone_says_how_to_give_a_table() -> None:
    model = tiny_model("llama", implementation="bsfa")
    with pytest.raises(ValueError, match=r"call bsfa_hf\.enable.*bsfa_thresholds.*BSFA_THRESHOLDS"):
        model(tokens(300))


@pytest.mark.parametrize("way", ["config", "environment"])
def test_attn_implementation_takes_the_table_from_config_or_environment(
    way: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.safetensors"
    table(points=(4, 8)).save(path)
    with bsfa_hf.enabled(model, path, k=4):
        expected = model(tokens(300)).logits
    other = tiny_model("llama", implementation="bsfa")
    if way == "config":
        other.config.bsfa_thresholds, other.config.bsfa_k = str(path), 4
    else:
        monkeypatch.setenv("BSFA_THRESHOLDS", str(path))
        monkeypatch.setenv("BSFA_K", "four")
        with pytest.raises(ValueError, match="BSFA_K must be a whole number, got 'four'"):
            other(tokens(300))
        monkeypatch.setenv("BSFA_K", "4")
    assert torch.equal(other(tokens(300)).logits, expected)
    assert bsfa_hf.stats(other).sparse_calls == LAYERS


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
