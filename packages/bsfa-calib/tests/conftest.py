# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""A tiny model, in memory and on disk, text for it, and the real model and text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_calib import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def ids() -> list[int]:
    """512 random bytes, for `tiny_calib.small_llama`."""
    return np.random.default_rng(1).integers(0, 256, 512).tolist()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, with files longer and shorter than a sample of 1024 tokens."""
    root = tmp_path_factory.mktemp("text")
    for task, count in (("prose", 3), ("verse", 5)):
        (root / task).mkdir()
        for number in range(count):
            words = [f"{task}{(number * 37 + i * i) % 9973}" for i in range(120 * (number + 1))]
            (root / task / f"{number}.txt").write_text(" ".join(words))
    return root


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The .gguf file that BSFA_TEST_MODEL names; the nox sessions set it."""
    return Path(os.environ["BSFA_TEST_MODEL"])


@pytest.fixture(scope="session")
def real_text() -> Path:
    """The directory of texts that BSFA_TEST_TEXT names; the nox sessions set it."""
    return Path(os.environ["BSFA_TEST_TEXT"])
