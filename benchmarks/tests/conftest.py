# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
import lzma
import math
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

# The programs are run as files, so their folder is where they import each other from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernels

NOVELS = Path(__file__).resolve().parents[1] / "data" / "austen"


def attention_record(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "attention",
        "self_test": False,
        "date": "2026-01-02T03:04:05+00:00",
        "command": "python benchmarks/attention.py --preset quick",
        "gpu": "A GPU",
        "driver": "1.2",
        "torch": "2.11.0",
        "cuda": "13.0",
        "commit": None,
        "sources": "0123456789abcdef",
        "kernel": "bsfa_sm90",
        "dtype": "bfloat16",
        "head_dim": 128,
        "heads": 32,
        "kv_heads": 8,
        "batch": 1,
        "seqlen": 65536,
        "causal": True,
        "inputs": "planted",
        "source": "",
        "asked": "0.5",
        "sparsity": 0.5,
        "rule": "absolute",
        "geometry": "128x64",
        "ms": 40.0,
        "tflops": 900.0,
        "repetitions": 6,
        "speedup": {"fa3": 1.25, "fa2": 2.5},
        **changes,
    }


@pytest.fixture
def records() -> list[dict[str, Any]]:
    dense = {"rule": None, "geometry": None, "asked": "dense", "sparsity": 0.0}
    speeds = {"dense": 0.98, "0.5": 1.25, "0.9": 1.72}
    ours = [
        attention_record(
            asked=asked,
            sparsity=0.0 if asked == "dense" else float(asked),
            ms=50 / speed,
            speedup={"fa3": speed, "fa2": 2 * speed},
        )
        for asked, speed in speeds.items()
    ]
    return [
        attention_record(kernel="fa3", ms=50.0, tflops=700.0, speedup={"fa2": 2.0}, **dense),
        attention_record(kernel="fa2", ms=100.0, tflops=350.0, speedup={"fa3": 0.5}, **dense),
        *ours,
    ]


def fake_fa3(
    monkeypatch: pytest.MonkeyPatch, *, lacks: Sequence[str] = (), factor: float = 1.0
) -> list[dict[str, Any]]:
    """FlashAttention-3's function in float64, times a factor, and what each call asked for.

    It refuses what it lacks, "local attention" or a dtype, as builds of the package do.
    """
    told: list[dict[str, Any]] = []

    def flash_attn_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        return_attn_probs: bool = False,
    ) -> Any:
        asked = {"FP32"} if q.dtype == torch.float32 else set()
        asked |= {"local attention"} if window_size != (-1, -1) else set()
        if missing := asked & set(lacks):
            raise RuntimeError(f"This flash attention build does not support {min(missing)}.")
        told.append(
            {
                "tokens": q.shape[1],
                "dtype": q.dtype,
                "window_size": window_size,
                "return_attn_probs": return_attn_probs,
            }
        )
        assert causal
        seqlen, group, dtype = q.shape[1], q.shape[2] // k.shape[2], q.dtype
        q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * (softmax_scale or q.shape[-1] ** -0.5)
        seen = torch.ones(seqlen, seqlen, dtype=torch.bool).tril()
        if window_size[0] >= 0:
            assert window_size[1] == 0
            seen = seen.triu(-window_size[0])
        scores = scores.masked_fill(~seen, -math.inf)
        out = (factor * scores.softmax(-1) @ v).transpose(1, 2).to(dtype)
        return (out, scores.logsumexp(-1).float()) if return_attn_probs else out

    package = types.ModuleType("fa3_fwd_interface")
    monkeypatch.setattr(package, "flash_attn_func", flash_attn_func, raising=False)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", package)
    monkeypatch.setattr(kernels.FlashAttention3, "available", lambda *_: None)
    return told


@pytest.fixture(scope="session")
def novel() -> str:
    return lzma.decompress((NOVELS / "persuasion.txt.xz").read_bytes()).decode()


@pytest.fixture(scope="session")
def tokenizer(novel: str) -> Any:
    """A byte-level tokenizer of 2048 tokens, made here."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(token_models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [novel[:200_000]], trainers.BpeTrainer(vocab_size=2048, initial_alphabet=alphabet)
    )
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=made)
