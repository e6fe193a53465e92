# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Evaluate a model under several attention configurations, each paired with dense."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsfa_calib.data import Document, read_documents
from bsfa_calib.language_model import LanguageModel, Predictions, fingerprint
from bsfa_calib.statistics import Statistics
from bsfa_calib.text import Source, Window, check_part, read_windows
from bsfa_calib.tuning import check_target, find_scalar
from bsfa_hf.evaluation.configurations import Configuration, check_names, make_method
from bsfa_hf.evaluation.needle import NeedlePrompt, check_needles, make_prompt, noise
from bsfa_hf.evaluation.results import (
    SAME_THRESHOLD,
    NotFiniteError,
    Record,
    Results,
    check_finite,
    record_key,
)
from bsfa_hf.evaluation.ruler import OFFLINE_TASKS, RULER_TASKS, Harness, check_harness
from bsfa_hf.integration import applied
from bsfa_hf.methods import Method
from bsfa_hf.state import shape_of

TEXT_TASKS = ("kl", "perplexity")
TASKS = (*TEXT_TASKS, "needle", "ruler")

# Samples of a harness task between two writes; a call has some overhead of its own.
_HARNESS_SAMPLES = 8

Progress = Callable[[str], None]


class EvaluationError(ValueError):
    """What was asked for cannot be evaluated; the message gives the rule and the value."""


@dataclass(frozen=True)
class Plan:
    """What to evaluate.

    Attributes:
        configurations: beside dense, which is always evaluated.
        tasks: of ``TASKS``, names of RULER's tasks, or "harness:NAME" for any task of the harness.
        lengths: tokens in a sample.
        samples: samples for a length (and task, and needle depth).
        text: as `read_windows` takes it; needed for kl and perplexity, and for needles in text.
        text_name: what tables call the text.
        part: stretch of each file that is evaluated on; scalars are found on what is before it.
        depths: of needles, 0 to 1.
        needle_keys: needles in a haystack, of which one is asked for.
        check_model: refuse a table that names another model.
        seed: for needles.
    """

    configurations: tuple[Configuration, ...]
    tasks: tuple[str, ...] = ("kl", "perplexity")
    lengths: tuple[int, ...] = (4096,)
    samples: int = 8
    text: Source | None = None
    part: tuple[float, float] = (0.5, 1.0)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needle_keys: int = 1
    check_model: bool = True
    seed: int = 0
    text_name: str = ""

    def __post_init__(self) -> None:
        """Check everything that can be checked without the model.

        Raises:
            ConfigurationError: two configurations have one name.
            EvaluationError: what was asked for cannot be evaluated.
            HarnessError: a task needs lm-eval, which is not installed.
            TuningError: a sparsity cannot be reached at a length.
            ValueError: the part, a depth or the number of keys is out of range.
        """
        check_names(self.configurations)
        check_part(self.part)
        for task in self.tasks:
            if task not in TASKS and task not in RULER_TASKS and not task.startswith("harness:"):
                raise EvaluationError(
                    f"a task is one of {', '.join((*TASKS, *RULER_TASKS))}, or harness:NAME, "
                    f"got {task!r}"
                )
        if not self.tasks or not self.lengths:
            raise EvaluationError("at least one task and one length are needed")
        if self.samples < 1 or min(self.lengths) < 2:
            raise EvaluationError(
                f"samples must be at least 1 and lengths at least 2, got {self.samples} and "
                f"{', '.join(map(str, self.lengths))}"
            )
        if set(self.tasks) & set(TEXT_TASKS) and self.text is None:
            raise EvaluationError("kl and perplexity need text: give a folder with --text")
        if not self.depths:
            raise EvaluationError("at least one depth is needed")
        for depth in self.depths:
            check_needles(depth, self.needle_keys)
        if self.harness_tasks:
            check_harness()
        for configuration in self.configurations:
            if configuration.option("sparsity"):
                self._check_search(configuration)

    def _check_search(self, configuration: Configuration) -> None:
        if self.text is None or self.part[0] <= 0:
            raise EvaluationError(
                f"{configuration.name}: to find the threshold for a sparsity, text is needed that "
                "is not evaluated on: give --text, and a --text-part that starts above 0"
            )
        for length in self.lengths:
            check_target(float(configuration.option("sparsity")), [length], configuration.geometry)

    @property
    def harness_tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the harness runs."""
        names: list[str] = []
        for task in self.tasks:
            if task == "ruler":
                names += OFFLINE_TASKS
            elif task in RULER_TASKS:
                names.append(task)
            elif task.startswith("harness:"):
                names.append(task.removeprefix("harness:"))
        return tuple(dict.fromkeys(names))


class Evaluation:
    """One process's share of an evaluation.

    Attributes:
        left_out: records that are missing from the results because a figure, of the configuration
            or of dense on the same sample, was not finite.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: Plan,
        out: Path,
        *,
        model_name: str = "",
        progress: Progress = lambda _: None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Check the plan against the model, and find what is done already.

        Args:
            model: a decoder of transformers, in evaluation mode.
            tokenizer: its tokenizer.
            plan: what to evaluate.
            out: file of results; processes other than the first write beside it.
            model_name: what to call the model.
            progress: told what is being done, a line at a time.
            rank: which of the processes this is; sample i is for process i modulo ``world``.
            world: number of processes.

        Raises:
            EvaluationError: a length is beyond the model's positions, or a kind of text is too
                short to find a threshold on.
            ImportError: a configuration needs a package that is not there.
            ResultsError: the file of results is of something else.
            ValueError: a configuration does not fit the model, the text is too short for the
                samples, or a length for the needles.
        """
        self.model, self.tokenizer, self.plan = model, tokenizer, plan
        self.language_model = LanguageModel(model)
        self.rank, self.world = rank, world
        self._progress = progress
        self.left_out = 0
        self._done = 0
        self._began = time.monotonic()
        positions = getattr(
            model.config.get_text_config(decoder=True), "max_position_embeddings", None
        )
        if positions is not None and max(plan.lengths) > positions:
            raise EvaluationError(
                f"the model has {positions} positions, and {max(plan.lengths)} tokens were asked "
                f"for"
            )
        dense = Configuration("dense", "dense", digest="dense")
        others = tuple(c for c in plan.configurations if c.kind != "dense")
        self.configurations = (dense, *others)
        self._methods: dict[tuple[str, int], Method | None] = {}
        # What is wrong with one is to be known before hours have passed.
        for configuration in others:
            if not configuration.option("sparsity"):
                method = make_method(configuration, check_model=plan.check_model)
                assert method is not None
                method.state(model)
        texts = self._read_text()
        self._read_windows()
        shape = shape_of(model)
        header = {
            "model": {"name": model_name, "digest": fingerprint(model)},
            "layers": shape.layers,
            "heads": shape.heads,
            "configurations": {
                c.digest: {
                    "name": c.name,
                    "kind": c.kind,
                    "options": dict(c.options),
                    "geometry": str(c.geometry),
                    "rule": c.rule,
                    "voters": c.voters,
                }
                for c in self.configurations
            },
            "texts": texts,
            "environment": environment(model),
        }
        path = out if rank == 0 else rank_path(out, rank)
        self.results = Results(path, header)
        if rank > 0 and out.exists():
            self.results.merge(out)

    def run(self) -> None:
        """Evaluate what is not done; what is done stays if it is interrupted.

        A record with a figure that is not finite is told, counted and left out: it is not done.

        Raises:
            EvaluationError: a configuration leaves the model dense, or its threshold is another
                than that of the results.
            HarnessError: a task of the harness cannot be loaded.
            OSError: the results cannot be written.
        """
        self.results.write()  # that it cannot be is to be known at once
        harness, tasks = self._load_harness()
        try:
            for length in self.plan.lengths:
                if set(self.plan.tasks) & set(TEXT_TASKS):
                    self._text(length)
                if "needle" in self.plan.tasks:
                    self._needles(length)
                for task in self.plan.harness_tasks:
                    if harness is not None and (task, length) in tasks:
                        self._harness(harness, tasks[task, length], task, length)
        finally:
            self.results.write()

    def _read_text(self) -> dict[str, str]:
        """Read the text once, and say by what its samples are known, and what to call it."""
        plan = self.plan
        self._documents: Mapping[str, Sequence[Document]] = {}
        self._text_id, name = "noise", "noise"
        if plan.text is not None:
            source = plan.text
            self._documents = source if isinstance(source, Mapping) else read_documents(source)
            digest = documents_digest(self._documents)
            part = f"{plan.part[0]:g}:{plan.part[1]:g}"
            self._text_id = f"{digest} {part}"
            name = f"part {part} of {plan.text_name or digest}"
        return {self._text_id: name}

    def _read_windows(self) -> None:
        """Cut the text for all lengths: that there is too little of it is to be known at once."""
        plan = self.plan
        self._windows: dict[int, list[Window]] = {}
        self._search_windows: dict[int, list[tuple[int, ...]]] = {}
        searching = [c.name for c in self.configurations if c.option("sparsity")]
        on_text = bool({*TEXT_TASKS, "needle"} & set(plan.tasks)) and plan.text is not None
        for length in plan.lengths:
            if on_text:
                self._windows[length] = read_windows(
                    self._documents,
                    self.tokenizer,
                    length=length,
                    count=plan.samples,
                    part=plan.part,
                )
            if searching:
                self._search_windows[length] = self._before_part(length, searching[0])
        if "needle" in plan.tasks:
            for index, (_, haystack) in enumerate(self._haystacks(min(plan.lengths))):
                self._needle_prompt(haystack, min(plan.lengths), plan.depths[0], index)

    def _before_part(self, length: int, name: str) -> list[tuple[int, ...]]:
        """A window of every kind of text from before the part that is evaluated on."""
        found = {}
        for kind, documents in self._documents.items():
            with contextlib.suppress(ValueError):  # a kind with too little text
                (window,) = read_windows(
                    {kind: documents},
                    self.tokenizer,
                    length=length,
                    count=1,
                    part=(0.0, self.plan.part[0]),
                )
                found[kind] = window.ids
        lacking = {window.kind for window in self._windows.get(length, [])} - found.keys()
        if lacking or not found:
            raise EvaluationError(
                f"{name}: to find the threshold for a sparsity, {length} tokens of every kind of "
                f"text are needed before --text-part, which starts at {self.plan.part[0]:g}; "
                f"there are fewer of {', '.join(sorted(lacking or self._documents))}"
            )
        return list(found.values())

    def _haystacks(self, length: int) -> list[tuple[str, Sequence[int]]]:
        if self.plan.text is None:
            return [("noise", noise(self.tokenizer, length))] * self.plan.samples
        return [(window.kind, window.body) for window in self._windows[length]]

    def _needle_prompt(
        self, haystack: Sequence[int], length: int, depth: float, index: int
    ) -> NeedlePrompt:
        return make_prompt(
            haystack,
            self.tokenizer,
            length=length,
            depth=depth,
            keys=self.plan.needle_keys,
            seed=self.plan.seed + index,
        )

    def _text(self, length: int) -> None:
        for window in self._mine(self._windows[length]):
            base: Record = {
                "task": "text",
                "length": length,
                "text": self._text_id,
                "sample": sample_name(window),
                "kind": window.kind,
            }
            dense: Predictions | None = None
            for configuration in self._to_run(base):
                with self._under(configuration, length) as statistics:
                    found = self.language_model.predict(window.ids)
                dense = dense or found
                bands = self.language_model.compare(found, dense, window.ids)
                taken_up = self._add(
                    base,
                    configuration,
                    statistics,
                    seconds=found.seconds,
                    dense_seconds=dense.seconds,
                    bands=[dataclasses.asdict(band) for band in bands],
                )
                if configuration.kind == "dense" and not taken_up:
                    break

    def _needles(self, length: int) -> None:
        plan = self.plan
        haystacks = self._haystacks(length)
        cells = [(i, depth) for i in range(plan.samples) for depth in plan.depths]
        for index, depth in self._mine(cells):
            kind, haystack = haystacks[index]
            base: Record = {
                "task": "needle",
                "length": length,
                "text": self._text_id,
                "sample": f"{plan.needle_keys} keys, depth {depth:g}, seed {plan.seed + index}, "
                + content_digest(haystack),
                "kind": kind,
                "depth": depth,
                "keys": plan.needle_keys,
            }
            to_run = self._to_run(base)
            if not to_run:
                continue
            prompt = self._needle_prompt(haystack, length, depth, index)
            dense_seconds = None
            for configuration in to_run:
                with self._under(configuration, length) as statistics:
                    hit, likelihood, seconds = self.language_model.answer(
                        prompt.prompt, prompt.answer
                    )
                dense_seconds = dense_seconds or seconds
                taken_up = self._add(
                    base,
                    configuration,
                    statistics,
                    seconds=seconds,
                    dense_seconds=dense_seconds,
                    tokens=len(prompt.prompt),
                    hit=hit,
                    log_probability=likelihood,
                )
                if configuration.kind == "dense" and not taken_up:
                    break

    def _load_harness(self) -> tuple[Harness | None, dict[tuple[str, int], Any]]:
        """The harness and its tasks that are not done; a task that it lacks is told at once."""
        harness, loaded = None, {}
        for length in self.plan.lengths:
            for task in self.plan.harness_tasks:
                if any(self._to_run(base) for base in self._harness_samples(task, length)):
                    harness = harness or Harness(self.model, self.tokenizer)
                    of_length = length if task in RULER_TASKS else None
                    loaded[task, length] = harness.load(task, of_length, self.plan.seed)
        return harness, loaded

    def _harness_samples(self, task: str, length: int) -> list[Record]:
        is_ruler = task in RULER_TASKS
        bases: list[Record] = [
            {
                "task": task,
                "length": length if is_ruler else 0,
                # RULER's samples are drawn by the seed.
                "sample": f"{index} of seed {self.plan.seed}" if is_ruler else str(index),
                "kind": task,
            }
            for index in range(self.plan.samples)
        ]
        return list(self._mine(bases))

    def _harness(self, harness: Harness, loaded: Any, task: str, length: int) -> None:
        todo = [(base, self._to_run(base)) for base in self._harness_samples(task, length)]
        dense_seconds: dict[int, float] = {}
        for configuration in self.configurations:
            mine = [base for base, to_run in todo if configuration in to_run]
            if configuration.kind != "dense":
                mine = [base for base in mine if self._has(base, self.configurations[0])]
            # A few samples at a time: a call of the harness has no stop between two.
            for start in range(0, len(mine), _HARNESS_SAMPLES):
                some = mine[start : start + _HARNESS_SAMPLES]
                numbers = [int(base["sample"].partition(" ")[0]) for base in some]
                with self._under(configuration, length) as statistics:
                    begin = time.perf_counter()
                    scores = harness.scores(loaded, numbers)
                    seconds = (time.perf_counter() - begin) / len(some)
                for base, number in zip(some, numbers, strict=True):
                    self._add(
                        base,
                        configuration,
                        statistics,
                        seconds=seconds,
                        dense_seconds=dense_seconds.setdefault(number, seconds),
                        score=scores.get(number),
                    )

    @contextlib.contextmanager
    def _under(self, configuration: Configuration, length: int) -> Iterator[Statistics | None]:
        """Run what is within under a configuration; yields what it counts, None for dense.

        Raises:
            EvaluationError: nothing within ran under it: all calls were dense.
        """
        method = self._method(configuration, length)
        if method is None:
            yield None
            return
        with applied(self.model, method) as state:
            assert state is not None
            yield state.statistics
        if not state.statistics.sparse_calls:
            reasons = state.statistics.dense_calls
            raise EvaluationError(
                f"{configuration.name} leaves the model dense, so that there is nothing to "
                f"evaluate; calls by reason: "
                + (", ".join(f"{reason} {n}" for reason, n in reasons.items()) or "there were none")
            )

    def _method(self, configuration: Configuration, length: int) -> Method | None:
        """The method of a configuration; for a sparsity asked for, its threshold is found first."""
        key = (configuration.digest, length)
        if key not in self._methods:
            threshold = None
            if configuration.option("sparsity"):
                threshold = self._find_scalar(configuration, length)
            self._methods[key] = make_method(
                configuration, check_model=self.plan.check_model, threshold=threshold
            )
        return self._methods[key]

    def _find_scalar(self, configuration: Configuration, length: int) -> float:
        target = float(configuration.option("sparsity"))
        self._progress(f"{configuration.name}: finding the threshold for a sparsity of {target:g}")
        found = find_scalar(
            self.model,
            self._search_windows[length],
            rule=configuration.option("rule"),
            geometry=configuration.geometry,
            voters=configuration.voters,
            selection=configuration.option("selection"),
            target_sparsity=target,
        )
        self._progress(
            f"{configuration.name}: a threshold of {found.threshold:.3f} skips {found.sparsity:.3f}"
        )
        about = self.results.header["configurations"][configuration.digest]
        before: float = about.setdefault("thresholds", {}).setdefault(str(length), found.threshold)
        if abs(before - found.threshold) > SAME_THRESHOLD:
            raise EvaluationError(
                f"{self.results.path} has results of {configuration.name} with a threshold of "
                f"{before:g}, and this text gives {found.threshold:g}; name another file with --out"
            )
        return before

    def _mine(self, samples: Sequence[Any]) -> Iterator[Any]:
        return (sample for i, sample in enumerate(samples) if i % self.world == self.rank)

    def _to_run(self, base: Record) -> list[Configuration]:
        """The configurations that a sample lacks, after dense: a speed-up is of one run's times."""
        dense, *others = self.configurations
        missing = [each for each in others if not self._has(base, each)]
        return [dense, *missing] if missing or not self._has(base, dense) else []

    def _has(self, base: Record, configuration: Configuration) -> bool:
        return record_key({**base, "configuration": configuration.digest}) in self.results

    def _add(
        self,
        base: Record,
        configuration: Configuration,
        statistics: Statistics | None,
        **measured: Any,
    ) -> bool:
        """Take up a record; False, and told, if one of its figures is not finite."""
        sparsity, skipped = 0.0, []
        selected: dict[str, int] = {}
        if statistics is not None:
            if configuration.option("selection"):
                selected = statistics.sparse_calls_by_selection
            sparsity = 1 - statistics.mean_kept_fraction
            # Layers that always run dense have no kept fraction: they skip nothing.
            shares = (1 - statistics.kept_fraction_by_head).nan_to_num(0.0)
            skipped = [[round(share, 4) for share in layer] for layer in shares.tolist()]
        record = {
            **base,
            "configuration": configuration.digest,
            "sparsity": round(sparsity, 6),
            "skipped": skipped,
            "sparse_calls_by_selection": selected,
            **measured,
        }
        try:
            check_finite(record)
        except NotFiniteError as error:
            told = f"left out: {configuration.name} on {base['task']} {base['length']}, "
            told += f"{base['sample']}: {error}"
            lost = [configuration]
            if configuration.kind == "dense":  # there is nothing to compare the others with
                lost = [each for each in self.configurations if not self._has(base, each)]
                told += "; the sample is left out for all configurations"
            self.left_out += len(lost)
            self._progress(told)
            return False
        if self._has(base, configuration):  # dense, which was run again for its time
            return True
        self.results.add(record)
        self._done += 1
        what = f"{record['task']} {record['length']} {configuration.name}"
        told = f"sparsity {record['sparsity']:.3f}"
        if "bands" in record:
            positions = sum(band["positions"] for band in record["bands"])
            kl = sum(band["kl"] * band["positions"] for band in record["bands"]) / positions
            told += f", KL {kl:.4f}"
        elif "hit" in record:
            told += f", {'hit' if record['hit'] else 'miss'}"
        elif record.get("score") is not None:
            told += f", score {record['score']:.2f}"
        elapsed = time.monotonic() - self._began
        self._progress(f"[{self._done} in {elapsed:.0f} s] {what}, {record['kind']}: {told}")
        return True


def sample_name(window: Window) -> str:
    """Where a window is from, and what it holds."""
    return f"{window.name} {content_digest(window.ids)}"


def documents_digest(documents: Mapping[str, Sequence[Document]]) -> str:
    """Short digest of texts by kind, and of their names."""
    content = [(kind, one.source, one.text) for kind, of in documents.items() for one in of]
    return hashlib.sha256(json.dumps(sorted(content)).encode()).hexdigest()[:12]


def content_digest(ids: Sequence[int]) -> str:
    """Short digest of tokens."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:12]


def environment(model: Any) -> dict[str, str]:
    """What a time or a last digit may depend on."""
    import importlib.metadata as metadata

    import torch

    parameter = next(model.parameters())
    device = parameter.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    packages = ("bsfa-hf", "bsfa-kernel", "torch", "transformers")
    names = (str(found.metadata["Name"]) for found in metadata.distributions())
    installed = {name.lower().replace("_", "-") for name in names}
    versions = {p: metadata.version(p) if p in installed else "not installed" for p in packages}
    return {
        "device": name,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "backend": "reference" if device.type == "cpu" else "native",
        **versions,
    }


def rank_path(out: Path, rank: int) -> Path:
    """Where a process other than the first writes."""
    return out.with_name(f"{out.stem}.rank{rank}{out.suffix or '.json'}")


def distributed() -> tuple[int, int]:
    """Rank and number of the processes that ``accelerate launch`` or torchrun started."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
