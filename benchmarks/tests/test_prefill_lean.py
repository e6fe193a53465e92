# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import torch

import models
import prefill


def test_the_lean_parts_give_the_logits_of_transformers_own() -> None:
    model = models.build("tiny", dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(200)[None]
    with torch.inference_mode():
        own = model(input_ids=ids).logits
        with prefill.lean(True):
            lean = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    assert torch.allclose(lean, own, atol=1e-5)
    assert not torch.equal(lean, own)  # so that it was another path
    assert torch.equal(after, own)
