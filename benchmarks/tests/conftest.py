# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest

# The programs are run as files, so their folder is where they import each other from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


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
