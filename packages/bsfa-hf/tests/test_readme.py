# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The example of the repository's README, run as it stands there on the real model and table."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from bsfa_calib import models
from bsfa_hf.cli.common import quiet

ROOT = Path(__file__).parents[3]
_PROMPT_CHARACTERS = 6000

pytestmark = [
    pytest.mark.model,
    # An example may leave closing its file to Python.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.skipif(not (ROOT / "thresholds").is_dir(), reason="outside the repository"),
]


def example(path: Path) -> str:
    """The first Python block that patches a model."""
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    return next(block for block in blocks if "bsfa_hf.enabled" in block)


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with quiet():
        loaded = models.load(os.environ["BSFA_TEST_MODEL"], dtype="float32", device="cpu")
    asked_for = []

    def from_pretrained(part: Any) -> Any:
        def give(name: str, **_: Any) -> Any:
            asked_for.append(name)
            return part

        return give

    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained(loaded.model)
    )
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", from_pretrained(loaded.tokenizer)
    )
    essay = min(Path(os.environ["BSFA_TEST_TEXT"]).rglob("*.txt"))
    text = essay.read_text(encoding="utf-8")[:_PROMPT_CHARACTERS]
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    (tmp_path / "thresholds").symlink_to(ROOT / "thresholds")
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(compile(example(ROOT / "README.md"), "README.md", "exec"), variables)
    assert set(asked_for) == {"HuggingFaceTB/SmolLM2-135M-Instruct"}
    stats = variables["stats"]
    assert stats.sparse_calls == loaded.model.config.num_hidden_layers
    assert 0.2 < stats.mean_kept_fraction < 0.9
    assert set(stats.dense_calls) == {"decode step"}
    printed = capsys.readouterr().out
    assert "30 block-sparse calls, kept" in printed
    assert printed.split("30 block-sparse")[0].strip()
    assert loaded.model.config._attn_implementation == "sdpa"
