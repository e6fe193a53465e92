# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Calibration with the native kernel, against the reference."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from bsfa_calib import dense
from bsfa_calib.capture import calibrate
from bsfa_kernel import Geometry, reference
from tiny_calib import random_tokens, tiny_model

pytestmark = pytest.mark.gpu


def needs_gpu() -> None:
    if not torch.cuda.is_available():
        if os.environ.get("BSFA_REQUIRE_GPU") == "1":
            pytest.fail("BSFA_REQUIRE_GPU is set, and torch finds no CUDA device")
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The same weights on the CPU and on the GPU."""
    needs_gpu()
    extra = {"head_dim": 64, "hidden_size": 256}
    return tiny_model(**extra).to(torch.bfloat16), tiny_model(**extra).to("cuda", torch.bfloat16)


@pytest.mark.parametrize("rule", ["absolute", "running_max", "peak_lse"])
@pytest.mark.parametrize("block", [(128, 64), (64, 64)])
def test_the_kernel_gives_the_references_thresholds(
    models: tuple[Any, Any], rule: str, block: tuple[int, int]
) -> None:
    samples = [random_tokens(1024, 0), random_tokens(900, 1)]
    options: dict[str, Any] = {"rule": rule, "geometry": Geometry(*block)}
    expected, table = (calibrate(m, samples, k_values=[2, 4, 6], **options) for m in models)
    np.testing.assert_allclose(table.statistics["kept"], expected.statistics["kept"], rtol=0.01)
    finite = np.isfinite(expected.thresholds)
    np.testing.assert_array_equal(np.isfinite(table.thresholds), finite)
    # The second layer's queries and keys differ by what bfloat16 leaves of the first one's output.
    np.testing.assert_allclose(
        table.thresholds[:, 0][finite[:, 0]], expected.thresholds[:, 0][finite[:, 0]], atol=0.1
    )


def test_scalars_of_the_kernel_are_the_references(models: tuple[Any, Any]) -> None:
    samples = [random_tokens(1024, 0)]
    expected, table = (
        calibrate(m, samples, target_sparsities=[0.3, 0.5], rule="running_max") for m in models
    )
    np.testing.assert_allclose(table.thresholds, expected.thresholds, atol=0.15)


@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_flash_kernel_of_sdpa_is_corrected_for_sinks(head_dim: int, dtype: torch.dtype) -> None:
    needs_gpu()
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 700, head_dim, generator=generator).to("cuda", dtype)
    k, v = torch.randn(2, 1, 2, 700, head_dim, generator=generator).to("cuda", dtype)
    sinks = torch.tensor([-30.0, 1.0, 3.0, 30.0], device="cuda")
    found = dense.flash_with_sinks(q, k, v, sinks, 0.1)
    nothing = torch.full((4, 1), -torch.inf, device="cuda")
    arguments = (*(x.transpose(1, 2) for x in (q, k, v)), nothing)
    options: dict[str, Any] = {"scale": 0.1, "compute_dtype": torch.float64}
    expected = reference.attention(*arguments, sinks=sinks, **options)
    torch.testing.assert_close(found.double(), expected.out, rtol=0.02, atol=0.01)


def test_a_model_with_sinks_is_measured_as_on_a_cpu() -> None:
    needs_gpu()
    extra = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 200}
    tables = []
    for device in ("cpu", "cuda"):
        model = tiny_model("gpt_oss", implementation="eager", head_dim=64, **extra)
        for layer in model.model.layers:
            layer.self_attn.sinks.data = torch.tensor([-30.0, 1.0, 4.0, 8.0])
        model = model.to(device, torch.bfloat16)
        tables.append(calibrate(model, [random_tokens(1024, 0)], target_sparsities=[0.3, 0.5]))
    assert tables[1].provenance["dense_layers"] == "layers 0: sliding-window layer"
    full = [table.thresholds[:, 1] for table in tables]
    np.testing.assert_allclose(full[1], full[0], atol=0.15)
