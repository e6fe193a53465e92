# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Models of each family, tiny but for their heads: patched, calibrated, evaluated and used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import bsfa_hf
import zoo
from bsfa_calib import ThresholdTable
from bsfa_calib.capture import calibrate
from bsfa_hf import Reason
from bsfa_hf.cli import main
from spied import exact, spied
from tiny import byte_tokenizer, largest_difference, tokens

VOCABULARY = 260
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_WINDOW: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 128,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


class Family(NamedTuple):
    """A type of models.

    Attributes:
        kind: transformers' name.
        head_dim: of its full layers.
        extra: what its configuration has beside the common.
        full: layers that can run block-sparse.
        reasons: calls of one prompt that run dense, by reason.
    """

    kind: str
    head_dim: int
    extra: dict[str, Any]
    full: tuple[int, ...] = (1,)
    reasons: dict[str, int] = {}  # noqa: RUF012 - not written to


_IN_WINDOWS = {str(Reason.SLIDING_WINDOW): 1}
FAMILIES = {
    "llama": Family("llama", 128, {"head_dim": 128}, (0, 1)),
    "phi": Family("phi", 80, {"hidden_size": 320, "num_key_value_heads": 4}, (0, 1)),
    "phi3": Family("phi3", 96, {"hidden_size": 384, "sliding_window": None}, (0, 1)),
    "gemma3": Family("gemma3_text", 256, {"head_dim": 256, **_WINDOW}, reasons=_IN_WINDOWS),
    "qwen3_next": Family("qwen3_next", 256, {"head_dim": 256, **_LINEAR, **_EXPERTS}),
    "qwen3_5": Family("qwen3_5_text", 256, {"head_dim": 256, **_LINEAR}),
    "gpt_oss": Family(
        "gpt_oss",
        64,
        {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2, **_WINDOW},
        reasons=_IN_WINDOWS,
    ),
}


KNOWN = [name for name, family in FAMILIES.items() if family.kind in zoo.KINDS]


@pytest.fixture(params=KNOWN, scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family: Family) -> Any:
    """Random weights whose attention is neither flat nor one-hot."""
    config = AutoConfig.for_model(family.kind, **{**_COMMON, **family.extra})
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in made.named_parameters():
        if parameter.ndim == 2 and any(part in name for part in ("q_proj", "k_proj", "qkv_proj")):
            parameter.data.normal_(0, 1.3 / math.sqrt(config.hidden_size))
        elif "sinks" in name:
            parameter.data.copy_(torch.tensor([-30.0, 0.5, 2.0, 6.0]))
    return made


@pytest.fixture(scope="module")
def directory(model: Any, family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a tokenizer that takes a byte for a token."""
    path = tmp_path_factory.mktemp("models") / f"tiny-{family.kind}"
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text")
    draw = np.random.default_rng(0)
    words = ["the", "lake", "is", "calm", "and", "grey", "today", "they", "walk"]
    for index in range(2):
        sentences = (" ".join(draw.choice(words, 8)) + ". " for _ in range(400))
        (path / f"{index}.txt").write_text("".join(sentences))
    return path


def everything(**fields: Any) -> ThresholdTable:
    return ThresholdTable(np.full((1, 2, 4, 1), -np.inf, np.float32), (8,), **fields)


def test_minus_infinity_gives_what_the_model_gives(model: Any, family: Family) -> None:
    ids = tokens(450, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :123] = 0
    dense = model(ids, attention_mask=mask).logits[mask.bool()]
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "attention_mask": mask}
    generated = model.generate(ids, **options)
    with bsfa_hf.enabled(model, everything(rule="peak_lse")) as stats:
        found = model(ids, attention_mask=mask).logits[mask.bool()]
        assert stats.dense_calls == family.reasons
        assert stats.sparse_calls == len(family.full)
        assert torch.equal(model.generate(ids, **options), generated)
    assert largest_difference(found, dense) < 1e-5
    kept = stats.kept_fraction
    assert [layer for layer in range(2) if not math.isnan(kept[layer])] == list(family.full)
    assert torch.equal(model.generate(ids, **options), generated)


@pytest.mark.parametrize(
    ("rule", "voters"), [("absolute", 1), ("running_max", 1), ("peak_lse", 1), ("peak_lse", 4)]
)
def test_what_is_skipped_is_what_the_reference_skips(
    model: Any, family: Family, rule: str, voters: int
) -> None:
    ids = tokens(450)
    options: dict[str, Any] = {"rule": rule, "voters": voters}
    table = calibrate(model, [ids[0].tolist()], target_sparsities=[0.3], **options)
    with bsfa_hf.enabled(model, table) as stats, spied() as calls:
        model(ids)
    assert stats.dense_calls == family.reasons
    assert stats.sparse_calls == len(family.full)
    kept = []
    for call in calls:
        if call.layer not in family.full:
            continue
        assert call.query.shape[-1] == family.head_dim
        expected = exact(call, table)
        assert expected.margin > 1e-5
        torch.testing.assert_close(call.out.double(), expected.out, rtol=1e-4, atol=1e-5)
        assert stats.kept_fraction[call.layer] == pytest.approx(expected.kept)
        kept.append(expected.kept)
    # The first layer's input is that of calibration; later ones read what skipping left of it.
    assert np.mean(kept) == pytest.approx(0.7, abs=0.02 if len(kept) == 1 else 0.06)


@pytest.mark.parametrize("method", ["scalar", "topk", "learned"])
def test_it_is_calibrated_evaluated_and_used(
    directory: Path,
    text: Path,
    family: Family,
    method: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = tmp_path / "table.safetensors", tmp_path / "results.json"
    where = ["--model", str(directory), "--text", str(text)]
    points = ["--k", "2,4"] if method == "topk" else ["--target-sparsity", "0.3"]
    samples = ["--length", "512", "--samples", "2", "--holdout", "1"]
    if method == "learned":  # the first sparsity that it learns at is 0.6
        samples[1] = "1024"
        points += ["--steps", "2", "--further-steps", "1"]
    arguments = ["--method", method, *points, *samples, "--out", str(path)]
    assert main(["calibrate", *where, *arguments]) == 0, capsys.readouterr().err
    table = ThresholdTable.load(path)
    finite = np.isfinite(table.thresholds).any(axis=(0, 2, 3))
    assert np.flatnonzero(finite).tolist() == list(family.full)
    dense = table.provenance.get("dense_layers", "")
    assert ("sliding-window layer" in dense) == bool(family.reasons)
    assert ("no causal softmax attention of its own" in dense) == ("linear" in str(family.extra))
    if method != "topk":
        expected = float(table.provenance["expected_sparsity"])
        assert expected == pytest.approx(0.3, abs=0.1 if method == "learned" else 0.05)

    point = ["--k", "2"] if method == "topk" else ["--target-sparsity", "0.3"]
    chosen = ["--thresholds", str(path), *point]
    evaluated = ["--lengths", "512", "--samples", "2", "--tasks", "kl,perplexity,needle"]
    extra = ["--depths", "0.5", "--out", str(out)]
    assert main(["evaluate", *where, *chosen, *evaluated, *extra]) == 0, capsys.readouterr().err
    assert "table" in json.dumps(json.loads(out.read_text()))
    printed = capsys.readouterr().out
    assert "nan" not in printed
    prompt = ["--prompt-file", str(text / "0.txt"), "--max-new-tokens", "3", "--compare"]
    (text / "0.txt").write_text((text / "0.txt").read_text()[:900])
    assert main(["generate", "--model", str(directory), *chosen, *prompt]) == 0
    assert "kept" in capsys.readouterr().err


def test_the_demo_runs(
    directory: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = everything(model=directory.name)
    table.save(tmp_path / "table.safetensors")
    where = ["--model", str(directory), "--text", str(text / "1.txt"), "--tokens", "700"]
    options = ["--questions", "1", "--thresholds", str(tmp_path / "table.safetensors")]
    assert main(["demo", *where, *options]) == 0, capsys.readouterr().err
    assert "KL divergence from dense" in capsys.readouterr().out
