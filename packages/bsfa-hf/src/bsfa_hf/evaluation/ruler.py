# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""RULER's synthetic tasks, and any other task of lm-evaluation-harness, under each configuration.

The harness is used through its Python API with its own task definitions. RULER's tasks that need no
download are ``OFFLINE_TASKS``; the others, and LongBench, run where their data can be had.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

OFFLINE_TASKS = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
)
RULER_TASKS = (
    *OFFLINE_TASKS,
    *("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"),
    *("ruler_qa_squad", "ruler_qa_hotpot"),
)


_MISSING = (
    "RULER and harness:NAME need lm-evaluation-harness, which the extra bsfa-hf[harness] brings "
    "({})"
)


class HarnessError(RuntimeError):
    """The harness or a task's data is not there; the message says what to install."""


def check_harness() -> None:
    """Refuse to go on without the harness.

    Raises:
        HarnessError: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError(_MISSING.format("no package lm_eval"))


class Harness:
    """lm-evaluation-harness around a model that is loaded already."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Wrap the model.

        Raises:
            HarnessError: lm-eval is not installed.
        """
        try:
            self._evaluator = importlib.import_module("lm_eval.evaluator")
            self._tasks = importlib.import_module("lm_eval.tasks")
            huggingface = importlib.import_module("lm_eval.models.huggingface")
        except ImportError as error:
            raise HarnessError(_MISSING.format(error)) from error
        self._tokenizer = tokenizer
        self._model = huggingface.HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=1,
            max_length=int(model.config.get_text_config(decoder=True).max_position_embeddings),
        )

    def load(self, task: str, length: int | None, seed: int = 0) -> Any:
        """A task, with its samples made once so that every configuration sees the same ones.

        Args:
            task: its name in the harness.
            length: for RULER's tasks, the tokens of a prompt.
            seed: what RULER's samples are drawn with.

        Raises:
            HarnessError: there is no such task, or its data is not there.
        """
        import random

        import numpy as np

        # Some of RULER's generators draw from the global generators.
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        with self._saved_tokenizer() as name:
            metadata: dict[str, Any] = {"tokenizer": name, "pretrained": name}
            if length is not None:
                metadata["max_seq_lengths"] = [length]
            options: dict[str, Any] = {}
            if task in RULER_TASKS:  # the index of all tasks takes most of a minute to read
                folder = Path(str(self._tasks.__file__)).parent / "ruler"
                options = {"include_path": str(folder), "include_defaults": False}
            try:
                manager = self._tasks.TaskManager(metadata=metadata, **options)
                return self._tasks.get_task_dict([task], manager)
            except Exception as error:  # tasks are code of others and raise what they like
                reason = " ".join(str(error).split()) or type(error).__name__
                raise HarnessError(
                    f"the task {task} cannot be loaded: {reason:.300}. Offline, RULER's tasks "
                    f"{', '.join(OFFLINE_TASKS)} work with wonderwords and nltk installed"
                ) from error

    def scores(self, task: Any, samples: Sequence[int]) -> dict[int, float]:
        """Score the samples of a task under the attention in force.

        Args:
            task: as ``load`` gave it.
            samples: their indices.

        Returns:
            A score by index: the task's first metric that applies, mostly between 0 and 1.
        """
        ((name, _),) = task.items()
        found = self._evaluator.simple_evaluate(
            model=self._model,
            tasks=list(task.values()),
            samples={name: list(samples)},
            log_samples=True,
            bootstrap_iters=0,
            batch_size=1,
        )
        scores = {}
        for sample in found["samples"][name]:
            values = [
                float(sample[metric])
                for metric in sample.get("metrics", ())
                if isinstance(sample.get(metric), int | float) and sample[metric] != -1
            ]
            if values:
                scores[int(sample["doc_id"])] = values[0]
        return scores

    @contextlib.contextmanager
    def _saved_tokenizer(self) -> Iterator[str]:
        # RULER's tasks load a tokenizer by name, and a GGUF file's has none.
        with tempfile.TemporaryDirectory(prefix="bsfa-tokenizer-") as directory:
            self._tokenizer.save_pretrained(directory)
            yield directory
