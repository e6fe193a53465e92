# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The names of the paper's repository."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, StaticCache

import bsfa_hf
from bsfa_calib.language_model import cache_argument
from bsfa_hf import AttentionConfig
from bsfa_hf.methods import BlockSparse
from tiny import HEADS, LAYERS, largest_difference, table, tiny_model, tokens


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "table.safetensors"
    table(points=(4, 8)).save(path)
    return str(path)


def test_block_sparse_mode_runs_and_changes_k(model: Any, file: str) -> None:
    assert bsfa_hf.get_current_attention_config(model) is None
    bsfa_hf.inject_custom_attention(
        model, AttentionConfig(mode="block_sparse", threshold_file=file, block_sparse_topk=4)
    )
    four = model(tokens(400)).logits
    bsfa_hf.update_block_sparse_topk(model, 8)
    config = bsfa_hf.get_current_attention_config(model)
    assert config is not None
    assert (config.mode, config.block_sparse_topk) == ("block_sparse", 8)
    assert not torch.equal(model(tokens(400)).logits, four)
    with pytest.raises(ValueError, match="no k=5; its points are k = 4, 8"):
        bsfa_hf.update_block_sparse_topk(model, 5)
    assert bsfa_hf.get_current_attention_config(model) == config


def test_original_attention_is_really_restored(model: Any, file: str) -> None:
    dense = model(tokens(400)).logits
    for config in (
        AttentionConfig(mode="block_sparse", threshold_file=file, block_sparse_topk=8),
        AttentionConfig(mode="sliding_window", sliding_window_size=64),
        AttentionConfig(mode="sdpa"),
    ):
        bsfa_hf.inject_custom_attention(model, config)
        model(tokens(400))
    bsfa_hf.restore_original_attention(model)
    assert model.config._attn_implementation == "sdpa"
    assert bsfa_hf.get_current_attention_config(model) is None
    assert torch.equal(model(tokens(400)).logits, dense)


def test_change_needs_an_injected_model_and_the_right_mode(model: Any) -> None:
    with pytest.raises(ValueError, match="call inject_custom_attention first"):
        bsfa_hf.change_attention_config(model, AttentionConfig())
    bsfa_hf.inject_custom_attention(model, AttentionConfig(mode="sdpa"))
    with pytest.raises(ValueError, match="in mode 'sdpa', not 'block_sparse'"):
        bsfa_hf.update_block_sparse_topk(model, 8)
    with pytest.raises(ValueError, match="in mode 'sdpa', not 'sparge_attn'"):
        bsfa_hf.update_sparge_attn_params(model, topk=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "flash"}, "mode must be one of sdpa, block_sparse, sparge_attn, sliding_window"),
        ({"mode": "block_sparse"}, "threshold_file must be given"),
        ({"mode": "block_sparse", "threshold_file": "x"}, "block_sparse_topk must be given"),
        ({"mode": "sliding_window"}, "sliding_window_size must be given"),
        ({"mode": "sliding_window", "sliding_window_size": 0}, "at least 1, got 0"),
        ({"mode": "sliding_window", "sliding_window_size": 10**20}, "at most 2147483647, got 100"),
        (
            {"mode": "sliding_window", "sliding_window_size": 9, "sliding_window_sink": -1},
            "sink must be at least 0, got -1",
        ),
        (
            {"mode": "block_sparse", "threshold_file": "x", "point": "target_sparsity=2"},
            r"target_sparsity must be in \[0, 1\)",
        ),
        (
            {"mode": "block_sparse", "threshold_file": "x", "point": "k=4", "block_sparse_topk": 8},
            "name one operating point, got k=8 and k=4",
        ),
        (
            {"mode": "sparge_attn", "sparge_attn_params": {"topk": math.nan}},
            r"topk must be in \(0, 1\], got nan",
        ),
        ({"mode": "sparge_attn", "sparge_attn_params": {"top": 1}}, "sparge_attn takes topk, cdf"),
    ],
    ids=str,
)
def test_an_incomplete_configuration_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**options)


def test_a_missing_file_is_refused(model: Any) -> None:
    config = AttentionConfig(mode="block_sparse", threshold_file="no/such", block_sparse_topk=8)
    with pytest.raises(FileNotFoundError, match="no/such"):
        bsfa_hf.inject_custom_attention(model, config)


def test_files_of_the_papers_repository_are_read(model: Any, file: str, tmp_path: Path) -> None:
    path = tmp_path / "thresholds.pt"
    thresholds = torch.from_numpy(table(points=(4, 8)).thresholds.copy())
    torch.save({"thresholds": thresholds, "k_values": [4, 8]}, path)
    logits = []
    for name in (file, str(path)):
        bsfa_hf.inject_custom_attention(
            model, AttentionConfig(mode="block_sparse", threshold_file=name, block_sparse_topk=8)
        )
        logits.append(model(tokens(400)).logits)
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("mode", ["sdpa", "sparge_attn", "sliding_window"])
def test_a_selection_that_there_is_not_is_refused_in_every_mode(mode: str) -> None:
    with pytest.raises(ValueError, match="selection must be one of exact, int8, auto, got 'fp4'"):
        AttentionConfig(mode=mode, sliding_window_size=64, selection="fp4")


def test_the_selection_is_that_of_the_given_environment(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BSFA_SELECTION", "int8")
    given = {
        "CUSTOM_ATTENTION_MODE": "block_sparse",
        "CUSTOM_THRESHOLD_FILE": file,
        "CUSTOM_BLOCK_SPARSE_TOPK": "8",
    }
    found = []
    for more in ({}, {"BSFA_SELECTION": "exact"}, {"CUSTOM_SELECTION": "int8"}):
        config = bsfa_hf.create_attention_config_from_env(environment={**given, **more})
        assert config is not None
        method = config.method()
        assert isinstance(method, BlockSparse)
        found.append(method.selection)
    assert found == ["auto", "exact", "int8"]
    with pytest.raises(ValueError, match=r"BSFA_SELECTION must be one of .*, got 'fp4'"):
        bsfa_hf.create_attention_config_from_env({**given, "BSFA_SELECTION": "fp4"})


def test_environment_variables_are_read(
    model: Any, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="CUSTOM_ATTENTION_MODE"):
        bsfa_hf.inject_custom_attention(model)
    monkeypatch.setenv("CUSTOM_ATTENTION_MODE", "block_sparse")
    monkeypatch.setenv("CUSTOM_THRESHOLD_FILE", file)
    with pytest.raises(ValueError, match="block_sparse_topk must be given"):
        bsfa_hf.inject_custom_attention(model)
    monkeypatch.setenv("CUSTOM_BLOCK_SPARSE_TOPK", "many")
    with pytest.raises(ValueError, match="must be a whole number, got 'many'"):
        bsfa_hf.inject_custom_attention(model)
    monkeypatch.setenv("CUSTOM_BLOCK_SPARSE_TOPK", "8")
    bsfa_hf.inject_custom_attention(model)
    assert bsfa_hf.get_current_attention_config(model) == AttentionConfig(
        mode="block_sparse", threshold_file=file, block_sparse_topk=8, selection="auto"
    )
    monkeypatch.setenv("CUSTOM_SELECTION", "int8")
    bsfa_hf.inject_custom_attention(model)
    model(tokens(400))
    assert bsfa_hf.stats(model).sparse_calls_by_selection == {"exact": 0, "int8": LAYERS}
    monkeypatch.setenv("CUSTOM_SELECTION", "fp4")
    with pytest.raises(ValueError, match="selection must be one of exact, int8, auto, got 'fp4'"):
        bsfa_hf.create_attention_config_from_env()
    monkeypatch.setenv("CUSTOM_ATTENTION_MODE", "sliding_window")
    monkeypatch.setenv("CUSTOM_SLIDING_WINDOW_SIZE", "64")
    bsfa_hf.inject_custom_attention(model)
    config = bsfa_hf.get_current_attention_config(model)
    assert config is not None
    assert config.sliding_window_size == 64
    monkeypatch.setenv("CUSTOM_ATTENTION_MODE", "sparge_attn")
    monkeypatch.setenv("CUSTOM_SPARGE_TOPK", "0.5")
    assert bsfa_hf.create_attention_config_from_env() == AttentionConfig(
        mode="sparge_attn",
        sparge_attn_params={"simthreshd1": -0.1, "topk": 0.5, "pvthreshd": 15},
    )


@pytest.mark.parametrize(
    ("mode", "name", "value", "message"),
    [
        ("sliding_window", "SLIDING_WINDOW_SIZE", "1" + "0" * 20, "at most 2147483647"),
        ("sparge_attn", "SPARGE_TOPK", "nan", r"topk must be in \(0, 1\], got nan"),
        ("sparge_attn", "SPARGE_SIMTHRESHD1", "-7", r"simthreshd1 must be in \[-1, 1\], got -7"),
    ],
)
def test_variables_out_of_range_are_refused(
    mode: str, name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUSTOM_ATTENTION_MODE", mode)
    monkeypatch.setenv(f"CUSTOM_{name}", value)
    with pytest.raises(ValueError, match=message):
        bsfa_hf.create_attention_config_from_env()


@pytest.mark.parametrize(
    ("name", "value"), [("POINT", "target_sparsity=0.5"), ("TARGET_SPARSITY", "0.5")]
)
def test_learned_tables_are_named_by_the_environment(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    path = tmp_path / "learned.safetensors"
    made = dataclasses.replace(table(points=(4, 8)), points=(0.5, 0.7), axis="target_sparsity")
    made.save(path)
    monkeypatch.setenv("CUSTOM_ATTENTION_MODE", "block_sparse")
    monkeypatch.setenv("CUSTOM_THRESHOLD_FILE", str(path))
    monkeypatch.setenv(f"CUSTOM_{name}", value)
    bsfa_hf.inject_custom_attention(model)
    logits = model(tokens(400)).logits
    with bsfa_hf.enabled(model, made, target_sparsity=0.5):
        assert torch.equal(model(tokens(400)).logits, logits)
    config = bsfa_hf.get_current_attention_config(model)
    assert config is not None
    assert str(config.point) == "target_sparsity=0.5"


@pytest.mark.parametrize(("window", "sink"), [(1, 0), (100, 0), (100, 30), (300, 7), (350, 999)])
@pytest.mark.parametrize("padding", [0, 50])
def test_a_sliding_window_sees_its_last_keys_and_the_first_ones(
    model: Any, window: int, sink: int, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bsfa_hf.baselines._QUERIES_AT_A_TIME", 128)
    ids = tokens(400)
    padded = torch.cat((torch.zeros((1, padding), dtype=torch.long), ids), 1)
    mask = torch.ones_like(padded)
    mask[:, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    rows, columns = torch.arange(400)[:, None], torch.arange(400)
    seen = (columns <= rows) & ((columns > rows - window) | (columns < sink))
    expected = model(ids, attention_mask=seen[None, None]).logits
    config = AttentionConfig("sliding_window", sliding_window_size=window, sliding_window_sink=sink)
    bsfa_hf.inject_custom_attention(model, config)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, padding:]
    assert largest_difference(logits, expected) < 1e-5
    blocks = torch.zeros(512, 448, dtype=torch.bool)
    blocks[:400, :400] = seen
    kept = int(blocks.view(4, 128, 7, 64).any(3).any(1).sum())
    stats = bsfa_hf.stats(model)
    assert stats.kept_blocks.tolist() == [[kept] * HEADS] * LAYERS
    assert stats.visible_blocks == [2 + 4 + 6 + 7] * LAYERS


@pytest.mark.parametrize("window", [64, 200, 1000])
def test_sliding_window_mode_is_that_of_a_model_with_such_a_window(window: int) -> None:
    windowed = tiny_model("mistral")
    windowed.config.sliding_window = window
    plain = tiny_model("llama")
    plain.load_state_dict(windowed.state_dict())
    bsfa_hf.inject_custom_attention(
        plain, AttentionConfig(mode="sliding_window", sliding_window_size=window)
    )
    ids = tokens(400)
    assert largest_difference(plain(ids).logits, windowed(ids).logits) < 1e-5
    mask = torch.ones_like(ids)
    mask[:, :50] = 0
    expected = windowed(ids, attention_mask=mask).logits
    logits = plain(ids, attention_mask=mask).logits
    assert largest_difference(logits[:, 50:], expected[:, 50:]) < 1e-5
    generated = [
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        for model in (plain, windowed)
    ]
    assert torch.equal(*generated)


def test_sliding_window_mode_works_in_chunks(model: Any) -> None:
    bsfa_hf.inject_custom_attention(
        model, AttentionConfig(mode="sliding_window", sliding_window_size=100)
    )
    ids = tokens(300)
    whole = model.generate(ids, max_new_tokens=3, do_sample=False)
    parts = model.generate(ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=70)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("sink", [0, 4])
def test_a_sliding_window_ends_at_the_last_key_of_a_static_cache(model: Any, sink: int) -> None:
    ids = tokens(302)
    rows, columns = torch.arange(302)[:, None], torch.arange(302)
    seen = (columns <= rows) & ((columns > rows - 64) | (columns < sink))
    expected = model(ids, attention_mask=seen[None, None]).logits[:, 300:]
    config = AttentionConfig("sliding_window", sliding_window_size=64, sliding_window_sink=sink)
    bsfa_hf.inject_custom_attention(model, config)
    static = (StaticCache(config=model.config, max_cache_len=size) for size in (302, 364, 512))
    counted = []
    for cache in (DynamicCache(config=model.config), *static):
        bsfa_hf.reset(model)
        cached = {cache_argument(model): cache}
        model(ids[:, :300], **cached)
        steps = [model(ids[:, i : i + 1], **cached).logits for i in (300, 301)]
        assert largest_difference(torch.cat(steps, 1), expected) < 1e-5
        stats = bsfa_hf.stats(model)
        counted.append((stats.kept_blocks.tolist(), stats.visible_blocks))
    assert all(other == counted[0] for other in counted[1:])
    longer = {"max_new_tokens": 20, "do_sample": False}
    whole = model.generate(ids, **longer)
    assert torch.equal(model.generate(ids, cache_implementation="static", **longer), whole)


def test_each_of_packed_sequences_has_its_sinks(model: Any) -> None:
    config = AttentionConfig("sliding_window", sliding_window_size=40, sliding_window_sink=4)
    bsfa_hf.inject_custom_attention(model, config)
    prompts = [tokens(200), tokens(150)]
    positions = torch.cat([torch.arange(p.shape[1]) for p in prompts])[None]
    packed = model(torch.cat(prompts, 1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(prompt).logits for prompt in prompts], 1)
    assert largest_difference(packed, alone) < 1e-5


def test_sparge_attn_needs_its_package(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spas_sage_attn", None)
    with pytest.raises(ImportError, match="install SpargeAttn"):
        bsfa_hf.inject_custom_attention(model, AttentionConfig(mode="sparge_attn"))
    assert model.config._attn_implementation == "sdpa"


def test_sparge_attn_is_called_as_its_package_wants(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append({"shape": tuple(q.shape), "keys": tuple(k.shape), **options})
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=options["scale"])

    package = ModuleType("spas_sage_attn")
    package.spas_sage_attn_meansim_topk_cuda = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spas_sage_attn", package)
    ids = tokens(300)
    dense = model(ids).logits
    bsfa_hf.inject_custom_attention(model, AttentionConfig(mode="sparge_attn"))
    bsfa_hf.update_sparge_attn_params(model, topk=0.5)
    assert largest_difference(model(ids).logits, dense) < 1e-5
    assert calls[0] == {
        "shape": (1, 4, 300, 16),
        "keys": (1, 4, 300, 16),
        "is_causal": True,
        "scale": 0.25,
        "tensor_layout": "HND",
        "output_dtype": torch.float32,
        "return_sparsity": False,
        "simthreshd1": -0.1,
        "topk": 0.5,
        "pvthreshd": 15,
    }
    mask = torch.ones_like(ids)
    mask[:, :50] = 0
    padded = model(ids, attention_mask=mask).logits
    bsfa_hf.restore_original_attention(model)
    expected = model(ids, attention_mask=mask).logits
    assert largest_difference(padded[:, 50:], expected[:, 50:]) < 1e-5


def test_plus_infinity_thresholds_differ_from_dense(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    table(math.inf).save(path)
    dense = model(tokens(400)).logits
    bsfa_hf.inject_custom_attention(
        model, AttentionConfig(mode="block_sparse", threshold_file=str(path), block_sparse_topk=8)
    )
    assert not torch.equal(model(tokens(400)).logits, dense)
