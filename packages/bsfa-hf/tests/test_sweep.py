# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Every type of model of transformers: dense logits at thresholds of -inf, or a refusal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import bsfa_hf
import zoo
from bsfa_calib import ThresholdTable
from bsfa_hf.state import attention_shape, text_config, text_decoder

NO_INTERFACE = "does not take its attention function from transformers' AttentionInterface"
NO_ATTENTION = "has no attention heads"

# Types that are refused, and with which words. A type that comes to work must leave the list.
REFUSED = {
    "doge": "adds a bias to some scores",
    "falcon_mamba": NO_ATTENTION,
    "mamba": NO_ATTENTION,
    "mamba2": NO_ATTENTION,
    "rwkv": NO_ATTENTION,
    **dict.fromkeys(
        (
            "big_bird",
            "bloom",
            "cpmant",
            "falcon",
            "git",
            "gpt_neo",
            "gpt_neox_japanese",
            "megatron-bert",
            "mpt",
            "mvp",
            "openai-gpt",
            "rembert",
            "roformer",
            "trocr",
            "xglm",
            "xlm",
        ),
        NO_INTERFACE,
    ),
}
RELEASE = [int(number) for number in transformers.__version__.split(".")[:2]]
if RELEASE < [5, 24]:
    REFUSED |= dict.fromkeys(("codegen", "gptj"), NO_INTERFACE)

# Types of which no tiny model can be made and run, and why.
LEFT_OUT = {
    "blt": "it is made of four models",
    "dbrx": "its class and its configuration do not fit each other",
    "dory": "it does not run by itself with a window shorter than the prompt",
    "dots3_note": "its sizes are fixed for each layer",
    "dots3_note_text": "its sizes are fixed for each layer",
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "runs beside another model only",
    "gemma4_unified_assistant": "runs beside another model only",
    "musicgen": "its configuration is that of three models",
    "musicgen_melody": "its configuration is that of three models",
    "prophetnet": "its number of layers cannot be set",
    "qwen4_exp": "its usual configuration cannot be built",
    "qwen4_exp_text": "its usual configuration cannot be built",
    "reformer": "has no causal attention over all keys",
    "xlnet": "its number of positions cannot be set",
    "xlstm": "has no attention",
    "zamba": "its tied layers cannot be fewer",
    "zamba2": "its tied layers cannot be fewer",
}

if RELEASE < [5, 18]:
    LEFT_OUT["cohere_compass_text"] = "its usual configuration cannot be built"

# At least one of each kind of mask, argument, part or refusal.
FAST = (
    "bart",
    "deepseek_v32",
    "deepseek_v4",
    "doge",
    "falcon",
    "gemma2",
    "gemma3n_text",
    "gemma4_text",
    "glm_moe_dsa",
    "gpt2",
    "gpt_oss",
    "granite_swa",
    "inkling_text",
    "llama",
    "llama4_text",
    "mamba",
    "mimo_v2_flash",
    "minimax_m3_vl_text",
    "mistral",
    "modernbert-decoder",
    "qwen3_next",
)
REST = tuple(sorted(set(zoo.KINDS) - set(FAST) - set(LEFT_OUT)))
SEQLEN, PADDING = 300, 60


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def outputs(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits of whole prompts and of a padded batch, and the text that follows the latter."""
    padded = model(ids, attention_mask=mask).logits[mask.bool()]
    text = None
    if model.can_generate():
        options = {"max_new_tokens": 3, "do_sample": False}
        text = model.generate(ids, attention_mask=mask, **options)
    return model(ids).logits, padded, text


def largest(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the range of b; NaNs must lie in the same places."""
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a[~a.isnan()], b[~b.isnan()]
    return float((a - b).abs().max() / (b.max() - b.min())) if len(b) else 0.0


def dense_table(model: Any) -> ThresholdTable:
    layers, heads = attention_shape(text_config(model))
    thresholds = np.full((1, layers, heads, 1), -math.inf, np.float32)
    return ThresholdTable(thresholds=thresholds, points=(8,))


def check(kind: str, outcomes: dict[str, str]) -> None:
    model = zoo.tiny(kind)
    ids = torch.randint(3, zoo.VOCABULARY, (2, SEQLEN), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    if kind in REFUSED:
        dense = model(ids).logits
        computed: list[Any] = []
        decoder = text_decoder(model)
        hook = decoder.register_forward_hook(lambda *arguments: computed.append(arguments))

        def run() -> None:
            with bsfa_hf.enabled(model, dense_table(model)):
                model(ids)

        with pytest.raises(ValueError, match=REFUSED[kind]):
            run()
        assert not computed
        hook.remove()
        assert torch.equal(model(ids).logits, dense)
        outcomes[kind] = "refused"
        return
    dense = outputs(model, ids, mask)
    with bsfa_hf.enabled(model, dense_table(model)) as stats:
        patched = outputs(model, ids, mask)
    assert largest(patched[0], dense[0]) <= 1e-6
    assert largest(patched[1], dense[1]) <= 1e-6
    if dense[2] is not None:
        assert patched[2] is not None
        assert torch.equal(patched[2], dense[2])
    assert stats.calls > 0
    outcomes[kind] = "block-sparse" if stats.sparse_calls else "dense"
    assert torch.equal(model(ids).logits.nan_to_num(), dense[0].nan_to_num())


@pytest.mark.parametrize("kind", [kind for kind in FAST if kind in zoo.KINDS])
@pytest.mark.filterwarnings("ignore")
def test_a_type_of_each_kind_is_right_or_refused(kind: str, outcomes: dict[str, str]) -> None:
    check(kind, outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", REST)
@pytest.mark.filterwarnings("ignore")
def test_every_other_type_is_right_or_refused(kind: str, outcomes: dict[str, str]) -> None:
    check(kind, outcomes)


def test_what_is_left_out_is_known() -> None:
    assert not set(LEFT_OUT) & set(REFUSED)
    assert not set(LEFT_OUT) & set(FAST)
