# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Calibration with the native kernel, against the reference."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from bsfa_calib.capture import calibrate
from bsfa_kernel import Geometry
from tiny_calib import random_tokens, tiny_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The same weights on the CPU and on the GPU."""
    if not torch.cuda.is_available():
        if os.environ.get("BSFA_REQUIRE_GPU") == "1":
            pytest.fail("BSFA_REQUIRE_GPU is set, and torch finds no CUDA device")
        pytest.skip("needs a CUDA device")
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
