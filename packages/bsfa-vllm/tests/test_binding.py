# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""From a configuration of vLLM to thresholds: shape, names, ranks, and what is refused."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import standins
from bsfa_calib.reasons import Reason
from bsfa_kernel import BuildInfo, Geometry, Kernel
from bsfa_vllm.binding import (
    engine_of,
    engines,
    kernel_head_dims,
    layer_index,
    layer_reason,
    local_heads,
    model_names,
    refusals,
)
from standins import HEADS, LAYERS, Impl

CPU, WIDE = torch.device("cpu"), Geometry(128, 64)


def configured(path: Path, **changes: Any) -> Any:
    settings = {"thresholds": standins.table(path / "table.safetensors", 0.0)}
    return standins.config(**({"additional_config": {"bsfa": settings}} | changes))


def test_an_engine_is_made_once_and_goes_with_its_layers(tmp_path: Path) -> None:
    config = configured(tmp_path)
    engine = engine_of(config, 0, CPU, required=True)
    assert engine is not None
    assert engine_of(config, 0, CPU, required=True) is engine
    assert engine_of(configured(tmp_path), 0, CPU, required=True) is not engine
    state = engine.state
    del engine
    gc.collect()
    again = engine_of(config, 0, CPU, required=True)
    assert again is not None
    assert again.state is not state


def test_the_environment_names_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = standins.config()
    assert engine_of(config, 0, CPU, required=False) is None
    with pytest.raises(ValueError, match=r"--additional-config.*BSFA_THRESHOLDS and BSFA_POINT"):
        engine_of(config, 0, CPU, required=True)
    monkeypatch.setenv("BSFA_THRESHOLDS", standins.table(tmp_path / "t.safetensors", 0.0))
    assert engine_of(config, 0, CPU, required=True) is not None


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_has_the_thresholds_of_its_heads(tmp_path: Path, size: int) -> None:
    values = np.arange(LAYERS * HEADS, dtype=np.float32).reshape(1, LAYERS, HEADS, 1)
    path = standins.table(tmp_path / "ranks.safetensors", 0.0, thresholds=values)
    found = []
    for rank in range(size):
        config = configured(
            tmp_path,
            additional_config={"bsfa": {"thresholds": path}},
            tensor_parallel_size=size,
            rank=rank,
        )
        engine = engine_of(config, rank, CPU, required=True)
        assert engine is not None
        assert engine.counts_rows == (rank == 0)
        assert engine.state.statistics.heads == HEADS // size
        found.append(torch.stack(engine.state.thresholds).numpy())
    np.testing.assert_array_equal(np.concatenate(found, 1), values[0])


def test_heads_of_ranks() -> None:
    assert [local_heads(32, 4, rank) for rank in range(2)] == [slice(0, 8), slice(8, 16)]
    with pytest.raises(ValueError, match="6 query heads must be split evenly, got 4 ranks"):
        local_heads(6, 4, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_mla": True}, "latent ones"),
        ({"cache_dtype": "fp8"}, "caches of 16 bits, got --kv-cache-dtype fp8"),
        ({"cache_dtype": "fp8_e4m3"}, "caches of 16 bits"),
        ({"cache_dtype": "float16"}, "in the model's bfloat16, got --kv-cache-dtype float16"),
        ({"decode_context_parallel_size": 2}, r"decode context parallel size \(dcp\) of 2"),
        ({"prefill_context_parallel_size": 4}, r"prefill context parallel size \(pcp\) of 4"),
        ({"model": "some/other-model"}, "thresholds are of tiny-model, and this model is some/oth"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_of(configured(tmp_path, **changes), 0, CPU, required=True)


def test_a_table_of_another_shape_or_point_is_refused(tmp_path: Path) -> None:
    wide = np.zeros((1, LAYERS, HEADS + 1, 1), np.float32)
    path = standins.table(tmp_path / "wide.safetensors", 0.0, thresholds=wide)
    for settings, message in (
        ({"thresholds": path}, "2 layers and 5 query heads, and this model has 2 layers and 4"),
        ({"thresholds": str(tmp_path / "none")}, "there is no"),
        (
            {"thresholds": standins.table(tmp_path / "t.safetensors", 0.0), "point": "k=3"},
            "no k=3; its points are target_sparsity = 0.5",
        ),
    ):
        config = standins.config(additional_config={"bsfa": settings})
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            engine_of(config, 0, CPU, required=True)


def test_a_draft_model_runs_without_a_table(tmp_path: Path) -> None:
    config = configured(tmp_path)
    config.speculative_config = SimpleNamespace(draft_model_config=config.model_config)
    assert engine_of(config, 0, CPU, required=True) is None
    config.speculative_config = SimpleNamespace(draft_model_config=object())
    assert engine_of(config, 0, CPU, required=True) is not None


def test_a_part_of_a_draft_model_runs_without_a_table(tmp_path: Path) -> None:
    """The language model of a multimodal one has a copy of the configuration."""
    config = configured(tmp_path)
    config.speculative_config = SimpleNamespace(
        draft_model_config=SimpleNamespace(runner_type="draft"), target_model_config=object()
    )
    config.model_config.runner_type = "generate"
    assert engine_of(config, 0, CPU, required=True) is not None
    config.model_config.runner_type = "draft"
    assert engine_of(config, 0, CPU, required=True) is None


def test_drafts_without_a_model_leave_the_model_its_table(tmp_path: Path) -> None:
    """Where drafts are n-grams of the prompt, vLLM names the model itself as that of drafts."""
    config = configured(tmp_path)
    config.speculative_config = SimpleNamespace(
        draft_model_config=config.model_config, target_model_config=config.model_config
    )
    assert engine_of(config, 0, CPU, required=True) is not None
    config.speculative_config.target_model_config = object()
    assert engine_of(config, 0, CPU, required=True) is None


def test_a_plain_configuration_is_not_refused() -> None:
    assert refusals(standins.config()) == []
    assert refusals(standins.config(cache_dtype="bfloat16")) == []


def test_names_of_a_model(tmp_path: Path) -> None:
    assert model_names("meta-llama/Llama-3.1-8B") == ["Llama-3.1-8B"]
    assert model_names(f"org/{'x' * 5000}") == ["x" * 5000]
    snapshot = "/cache/models--meta-llama--Llama-3.1-8B/snapshots/0123abcd"
    assert model_names(snapshot) == ["0123abcd", "Llama-3.1-8B"]
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert model_names(f"{tmp_path}/link/") == ["link", "real"]


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.17.self_attn.attn", 17),
        ("language_model.model.layers.0.self_attn.attn", 0),
        ("model.encoder.layers.0.sub.1", None),
        ("attn", None),
    ],
)
def test_layer_indices(name: str, index: int | None) -> None:
    assert layer_index(name) == index


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({}, None),
        ({"sliding_window": -1}, None),
        ({"sliding_window": None}, None),
        ({"sliding_window": 4096}, Reason.SLIDING_WINDOW),
        ({"sliding_window": (4095, 0)}, Reason.SLIDING_WINDOW),
        ({"logits_soft_cap": 0}, None),
        ({"logits_soft_cap": 30.0}, Reason.SOFTCAP),
        ({"sinks": torch.zeros(4)}, None),
        ({"sinks": torch.zeros(4, dtype=torch.bfloat16)}, None),
        ({"sinks": torch.zeros(8)}, Reason.SINKS),
        ({"sinks": torch.zeros(1, 4)}, Reason.SINKS),
        ({"sinks": torch.zeros(4), "sliding_window": (127, 0)}, Reason.SLIDING_WINDOW),
        ({"alibi_slopes": torch.zeros(4)}, Reason.BIAS),
        ({"attn_type": "encoder_only"}, Reason.NOT_CAUSAL),
    ],
)
def test_reasons_of_layers(attributes: dict[str, Any], reason: Reason | None) -> None:
    assert layer_reason(Impl(**attributes)) is reason


def test_a_head_dim_without_a_kernel() -> None:
    assert layer_reason(Impl(head_size=256), {64, 128}) is Reason.NO_KERNEL
    assert layer_reason(Impl(head_size=128), {64, 128}) is None


def library(*kernels: tuple[str, int, bool, tuple[int, ...]], reason: str = "") -> BuildInfo:
    """A library with kernels for bfloat16 and blocks of 128x64: name, arch, PTX and head_dims."""
    found = tuple(
        Kernel(name, arch, ptx, "bfloat16", max(dims), (WIDE,), dims)
        for name, arch, ptx, dims in kernels
    )
    return BuildInfo("1", 1, Path("lib.so"), not reason, reason, "1", "13.0", found)


def test_head_dims_that_can_be_served() -> None:
    info = library(
        ("forward", 80, True, (64,)),
        ("forward", 90, False, (64, 128)),
        ("select_blocks", 90, False, (128,)),
        ("attend_blocks", 90, False, (64, 128)),
    )
    hopper = (info, (9, 0), torch.bfloat16, WIDE)
    assert kernel_head_dims(*hopper, "auto") == kernel_head_dims(*hopper, "exact") == {64, 128}
    assert kernel_head_dims(*hopper, "int8") == {128}
    # Later architectures compile PTX; others run code of their own generation alone.
    assert kernel_head_dims(info, (12, 0), torch.bfloat16, WIDE, "auto") == {64}
    assert kernel_head_dims(info, (8, 6), torch.bfloat16, WIDE, "auto") == {64}
    for capability, dtype, geometry, selection, message in (
        ((7, 5), torch.bfloat16, WIDE, "auto", "forward for bfloat16.*compute capability 7.5"),
        ((9, 0), torch.float32, WIDE, "auto", "no kernel forward for float32"),
        ((9, 0), torch.bfloat16, Geometry(64, 64), "auto", "sparsity blocks of 64x64"),
        ((8, 0), torch.bfloat16, WIDE, "int8", "no kernel select_blocks and attend_blocks for"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel_head_dims(info, capability, dtype, geometry, selection)


def test_a_gpu_without_a_kernel_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    none = library(reason="there is no native library")
    monkeypatch.setattr("bsfa_vllm.binding.build_info", lambda: none)
    with pytest.raises(ValueError, match=r"cannot run on this GPU.*there is no native library"):
        engine_of(configured(tmp_path), 0, torch.device("cuda", 0), required=True)


def test_nothing_is_allocated_where_weights_are_put_to_sleep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM makes engines while it loads a model, in a pool whose memory sleep mode takes back."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels = library(("forward", 90, False, (64,)))
    monkeypatch.setattr("bsfa_vllm.binding.build_info", lambda: kernels)
    path = standins.table(tmp_path / "wide.safetensors", 0.5, q_block=128)
    config = standins.config(additional_config={"bsfa": {"thresholds": path}})
    engine = engine_of(config, 0, torch.device("cuda", 0), required=True)
    assert engine is not None
    assert engine.head_dims == {64}
    assert all(one.device == CPU for one in engine.state.thresholds)
    assert engine.state.statistics.kept_blocks.sum() == 0
    # The first step that needs them takes them to its device.
    engine.state.layer_thresholds(1, torch.device("meta"))
    assert [one.device.type for one in engine.state.thresholds] == ["cpu", "meta"]


def test_a_copy_of_the_configuration_has_the_same_engine(tmp_path: Path) -> None:
    config = configured(tmp_path)
    engine = engine_of(config, 0, CPU, required=True)
    copy = SimpleNamespace(**vars(config))
    assert engine_of(copy, 0, CPU, required=True) is engine
    assert engines() == [engine]
    copy.instance_id = "another"
    assert engine_of(copy, 0, CPU, required=True) is not engine
