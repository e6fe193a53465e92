# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Layers that run again in the backward pass of learning."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bsfa_calib import gated, learning
from bsfa_calib.hook import HookError
from bsfa_calib.learning import Settings, dense_outputs, learn
from bsfa_calib.recompute import recomputed_layers
from bsfa_kernel import Geometry
from tiny_calib import small_llama, tiny_model

GEOMETRY = Geometry(64, 64)
OPTIONS: dict[str, Any] = {"rule": "peak_lse", "geometry": GEOMETRY, "settings": Settings(steps=3)}
LENGTH = 512


@pytest.fixture(scope="module")
def samples() -> list[list[int]]:
    return np.random.default_rng(3).integers(0, 256, (2, LENGTH)).tolist()


def keep_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "recomputed_layers", lambda _: contextlib.nullcontext())


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """With more, the sums of experts' outputs come in any order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def held(model: Any, samples: list[list[int]]) -> int:
    """Numbers that a step holds for its backward pass, outside of layers that are recomputed."""
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += tensor.numel() if tensor.dim() > 1 and tensor.shape[-2] == LENGTH else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        learn(model, samples, [0.4], rule="peak_lse", geometry=GEOMETRY, settings=Settings(steps=1))
    return count


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "qwen3_moe", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_layers_learn_the_same(
    samples: list[list[int]], kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation = "eager" if kind == "gpt_oss" else "sdpa"
    model = small_llama() if kind == "llama" else tiny_model(kind, implementation=implementation)
    model = model.to(dtype)
    # Where blocks are skipped and gradients tell heads apart.
    options = {**OPTIONS, "start": np.zeros((2, 4))}
    with one_thread():
        (found,) = learn(model, samples, [0.4], **options)
        keep_everything(monkeypatch)
        (expected,) = learn(model, samples, [0.4], **options)
    assert np.array_equal(found.thresholds, expected.thresholds)
    assert (found.kl, found.sparsity) == (expected.kl, expected.sparsity)
    assert found.sparsity > 0
    assert found.thresholds.std() > 0.05


def test_of_a_layer_little_is_held(
    samples: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_llama()
    recomputed = held(model, samples)
    keep_everything(monkeypatch)
    whole = held(model, samples)
    config = model.config
    layer = LENGTH * (config.intermediate_size + config.hidden_size)
    assert whole - recomputed > config.num_hidden_layers * layer


def test_attention_is_computed_once_a_layer_and_step(
    samples: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_llama()
    calls: list[int] = []
    attend = gated._attend

    def counted(q: Tensor, *others: Any) -> tuple[Tensor, ...]:
        calls.append(len(q))
        return attend(q, *others)

    monkeypatch.setattr(gated, "_attend", counted)
    learn(model, samples, [0.4], **OPTIONS)
    assert len(calls) == OPTIONS["settings"].steps * model.config.num_hidden_layers


def test_a_backward_pass_in_a_thread_of_its_own_learns_the_same(
    samples: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a GPU, which knows no context variable of the thread that asks for it."""
    model = small_llama()
    (expected,) = learn(model, samples, [0.4], **OPTIONS)
    grad = torch.autograd.grad

    def elsewhere(*given: Any) -> Any:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(grad, *given).result()

    monkeypatch.setattr(torch.autograd, "grad", elsewhere)
    (found,) = learn(model, samples, [0.4], **OPTIONS)
    assert np.array_equal(found.thresholds, expected.thresholds)


def test_the_model_is_given_back_as_it_was(samples: list[list[int]]) -> None:
    model = small_llama()
    first, second = model.model.layers
    # As libraries that move weights put functions of their own in front.
    original = first.forward
    first.forward = types.MethodType(lambda self, *args, **named: original(*args, **named), first)
    own = first.forward
    with recomputed_layers(model):
        assert first.forward is not own
        assert "forward" in second.__dict__
    assert first.forward is own
    assert "forward" not in second.__dict__
    dense = dense_outputs(model, samples[:1])
    with pytest.raises(IndexError):
        learn(model, [[5000] * LENGTH], [0.4], dense=dense, **OPTIONS)
    assert first.forward is own
    assert "forward" not in second.__dict__
    assert not model.training


def test_a_layer_that_attends_twice_is_refused(samples: list[list[int]]) -> None:
    model = small_llama()
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(HookError, match="layer 0 computes attention more than once in a pass"):
        learn(model, samples, [0.4], **OPTIONS)
