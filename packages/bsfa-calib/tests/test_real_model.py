# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Calibration of a real model on real text: the promises that the documentation makes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from bsfa_calib import ThresholdTable
from bsfa_calib.capture import calibrate
from bsfa_calib.models import identity, load
from bsfa_calib.report import model_means
from bsfa_calib.text import split_by_kind

pytestmark = pytest.mark.model


def test_blocks_kept_are_k_on_the_samples_and_near_it_on_held_out_text(
    real_model: Path, real_text: Path, tmp_path: Path
) -> None:
    model, tokenizer = load(real_model, dtype="float32", device="cpu")
    split = split_by_kind(real_text / "novels", tokenizer, length=1024, each=4, held_out=2)
    tokens = torch.tensor([split.held_out[0].ids[:256]])
    with torch.inference_mode():
        before = model(input_ids=tokens).logits
    name, revision = identity(real_model, model)
    table = calibrate(
        model,
        [sample.ids for sample in split.calibration],
        held_out=[sample.ids for sample in split.held_out],
        k_values=[4, 6, 8],
    )
    table = dataclasses.replace(table, model=name, revision=revision)
    with torch.inference_mode():
        assert torch.equal(before, model(input_ids=tokens).logits)

    table.save(tmp_path / "table.safetensors")
    table = ThresholdTable.load(tmp_path / "table.safetensors")
    assert (table.layers, table.heads, table.rows) == (30, 9, 8)
    assert table.revision.startswith("sha256:")
    np.testing.assert_allclose(model_means(table, "kept"), table.points, rtol=0.05)
    np.testing.assert_allclose(model_means(table, "held_out_kept"), table.points, rtol=0.25)
