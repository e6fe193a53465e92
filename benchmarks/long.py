# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
r"""Accuracy against time on a real model, at one length: thresholds of every kind, and rivals.

::

    python benchmarks/assets.py ASSETS
    python benchmarks/long.py --model MODEL.gguf --adapter ADAPTER --text ASSETS/text \
        --calibration-text ASSETS/calibration --tables TABLES --length 32K --lean --out long.jsonl

On held-out text: the KL divergence of the predictions from dense, and the negative log-likelihood,
by position too. On tasks like RULER's: the share of the answers that is given, at the sparsest
point of each candidate whose divergence is within each of ``--task-losses``. Of each point: the
time to first token and attention's part of it, in the same run as those of torch's attention and,
where it is installed, of FlashAttention-3.

Points are shares of the blocks to be skipped. Tables, wherever they were learned, are pointed at
this length (``bsfa_calib.serving``) on the calibration text; scalars and the paper's table are
made from it. Each point is a record that is written at once: the same command goes on where one
was stopped. With ``--prompts 0`` there are no tasks; such records of many lengths show how much
can be skipped as prompts get longer. On a CPU the reference computes everything: a self-test.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import bsfa_kernel
import models
from bsfa_calib.capture import CaptureError
from bsfa_calib.hook import ATTENTION_NAME, HookError, Method, applied, attention_shape
from bsfa_calib.language_model import Band, LanguageModel, Predictions
from bsfa_calib.switch import register, switched
from bsfa_calib.text import Window, read_windows
from bsfa_calib.thresholds import ThresholdTable
from bsfa_calib.tuning import TuningError
from extend import check
from harness import (
    Budget,
    Record,
    Results,
    clocks,
    environment,
    list_of,
    one_of,
    parse_fraction,
    parse_length,
    progress,
    read_records,
    run_program,
)
from inputs import Shape
from kernels import FlashAttention3
from prefill import AttentionClock, Fa3Layers, lean, torch_name
from study import ruler
from study.lengths import Candidate, Candidates
from study.rivals import Sparge
from study.rivals import Window as SlidingWindow

DENSE = "dense"
_FA3 = "bsfa_benchmark_long_fa3"
# Bytes of keys and values that prompts which are decoded together may have.
_CACHES = 24 << 30
# Of the time of a run, what may go into timing dense kernels again.
_DENSE_SHARE = 0.1


@dataclass
class Times:
    """Milliseconds of repeated prefills: until the first token, and in attention."""

    first_token: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)

    def medians(self) -> tuple[float, float]:
        """Until the first token, and in attention."""
        return statistics.median(self.first_token), statistics.median(self.attention)


@dataclass(frozen=True)
class Dense:
    """A window read dense.

    Attributes:
        window: its tokens.
        predictions: what others are compared with.
        bands: negative log-likelihood by position.
    """

    window: Window
    predictions: Predictions
    bands: list[Band]

    @property
    def nll(self) -> float:
        """Negative log-likelihood, in nats a token."""
        return over(self.bands, "nll")


class Study:
    """Measures candidates on one model at one length."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Load the model and the texts, and read the windows dense."""
        self.arguments = arguments
        self.length: int = arguments.length
        self.budget = Budget(arguments.seconds)
        self.device = torch.device(arguments.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.model, self.tokenizer, name = models.load(arguments)
        self.language_model = LanguageModel(self.model)
        self.clock = AttentionClock(self.device)
        self.texts = check.documents(arguments.text, self.tokenizer)
        calibration = read_windows(
            arguments.calibration_text,
            self.tokenizer,
            length=self.length,
            count=arguments.calibration_samples,
        )
        self.candidates = Candidates(
            self.model,
            [window.ids for window in calibration],
            arguments.selection,
            arguments.voters,
            [ThresholdTable.load(path) for path in table_files(arguments.tables)],
            arguments.shares,
            arguments.out.with_suffix(".thresholds"),
        )
        self.windows = held_out(self.texts, self.length, arguments.samples)
        with applied(self.model, None):
            read = [self.language_model.predict(window.ids) for window in self.windows]
        self.dense = [
            Dense(window, found, self.language_model.compare(found, found, window.ids))
            for window, found in zip(self.windows, read, strict=True)
        ]
        self.about: Record = {
            **environment(self.device),
            "model": name,
            "dtype": arguments.dtype,
            "lean": arguments.lean,
            "seqlen": self.length,
            "calibration_contexts": [window.name for window in calibration],
        }
        self.results = Results(arguments.out)
        self.known: dict[tuple[str, ...], Record] = {}
        if arguments.out.exists():
            for record in read_records(arguments.out):
                if record["kind"] in ("long_text", "long_tasks"):
                    self.known[key_of(record)] = record
        self.fa3 = Fa3Layers(torch.bfloat16)  # what it is built for
        self.baselines = self._baselines()
        self.times = {name: Times() for name in self.baselines}
        self.warm_ups = 1 if self.device.type == "cuda" else 0
        self.written = 0
        self._dense_seconds = 0.0
        self._longest: dict[str, float] = {}
        progress(
            f"{name}: {len(self.windows)} windows of {self.length} tokens, {len(calibration)} to "
            f"calibrate on, NLL {np.mean([one.nll for one in self.dense]):.4f}; "
            f"{self.budget.spent:.0f} s so far"
        )

    def run(self) -> int:
        """Measure what is not known yet, as the time allows; the number of new records."""
        only = self.arguments.only or ("",)
        wanted = [c for c in self.candidates.all() if any(part in c.name for part in only)]
        self._time_dense(self.arguments.repetitions, self.warm_ups)
        self._write(self._dense_text())
        for candidate in wanted:
            before = self.written
            with guarded(candidate.name):
                for point in candidate.points:
                    if self._lacks("long_text", candidate, point) and self._allows("text"):
                        # Making thresholds is no part of what the next point will take.
                        self.candidates.method(candidate, point)
                        begin = self.budget.spent
                        self._write(self._text(candidate, point))
                        self._took("text", begin)
            if self.written > before and self._dense_seconds < _DENSE_SHARE * self.budget.spent:
                self._time_dense(1)
        if self.arguments.prompts:
            self._tasks_of(wanted)
        return self.written

    def _text(self, candidate: Candidate, point: float) -> Record:
        """A candidate's record on text at a point."""
        method = self.candidates.method(candidate, point)
        sparsity, kl, change, bands = [], [], [], []
        for dense in self.dense:
            with applied(self.model, method) as meter:
                found = self.language_model.predict(dense.window.ids)
                sparsity.append(float(np.mean(meter.take())))
            bands.append(self.language_model.compare(found, dense.predictions, dense.window.ids))
            kl.append(over(bands[-1], "kl"))
            change.append(over(bands[-1], "nll") - dense.nll)
            if not np.isfinite(kl[-1]):
                raise RuntimeError(f"its predictions are not finite in {self.arguments.dtype}")
        before = clocks(self.device)
        times = Times()
        timed = replace(method, counts=False) if isinstance(method, Sparge) else method
        for count in range(-self.warm_ups, self.arguments.repetitions):
            with applied(self.model, timed), self.clock.watching(ATTENTION_NAME):
                self._prefill(times if count >= 0 else Times())
        record = {
            **self._named("long_text", candidate, point),
            "contexts": [window.name for window in self.windows],
            "sparsity": sparsity,
            "kl": kl,
            "nll_change": change,
            "by_position": self._by_position(bands),
            **self._compared(times),
            "clocks": {"before": before, "after": clocks(self.device)},
        }
        ratios = ", ".join(
            f"{ratio:.2f} and {record['attention_speedup'][name]:.2f}x {name}"
            for name, ratio in record["speedup"].items()
        )
        progress(
            f"  {candidate.name}, {candidate.axis} {point:g}: skipped {np.mean(sparsity):.4f}, KL "
            f"{np.mean(kl):.5f}, NLL {np.mean(change):+.5f}; {record['ms']:.0f} ms, attention "
            f"{record['attention_ms']:.0f} ms: {ratios}{self._fa3_said()}; "
            f"{self.budget.spent:.0f} s"
        )
        return record

    def _dense_text(self) -> Record:
        """The record of torch's attention on text."""
        nothing = [0.0] * len(self.windows)
        return {
            **self._named("long_text", None, 0.0),
            "contexts": [window.name for window in self.windows],
            "sparsity": nothing,
            "kl": nothing,
            "nll_change": nothing,
            "by_position": self._by_position([one.bands for one in self.dense]),
            **self._compared(self.times["sdpa"]),
        }

    def _tasks_of(self, wanted: Sequence[Candidate]) -> None:
        """Records on tasks: of dense, then of each candidate at the points that keep each loss."""
        usable = [text for text in self.texts if text[0] != "code" and len(text[1]) >= self.length]
        sources = sorted((self.arguments.text / "novels").glob("*.txt"))
        words = ruler.vocabulary([path.read_text(encoding="utf-8") for path in sources])
        maker = ruler.Maker(self.tokenizer, usable, words, self.arguments.seed)
        prompts = []
        for task in self.arguments.tasks:
            count = self.arguments.prompts
            count = max(count, self.arguments.depths) if task == "single" else count
            size = self.length - 2 * ruler.ANSWER
            prompts += [maker.make(task, size, index, count) for index in range(count)]
        chosen: list[tuple[Candidate | None, float]] = [(None, 0.0)]
        for loss in self.arguments.task_losses:
            for candidate in wanted:
                point = self._within(candidate, loss)
                if point is not None and (candidate, point) not in chosen:
                    chosen.append((candidate, point))
        for one, point in chosen:
            with guarded(f"tasks, {DENSE if one is None else one.name}"):
                lacks = self._lacks("long_tasks", one, point, prompts)
                if lacks and self._allows("tasks"):
                    begin = self.budget.spent
                    self._write(self._tasks(one, point, prompts))
                    self._took("tasks", begin)

    def _within(self, candidate: Candidate, loss: float) -> float | None:
        """The sparsest point measured within a loss, or the one that loses least."""
        measured = [
            self.known[key]
            for point in candidate.points
            if (key := self._key("long_text", candidate, point)) in self.known
        ]
        within = [record for record in measured if np.mean(record["kl"]) <= loss]
        if within:
            return float(max(within, key=lambda r: np.mean(r["sparsity"]))["asked"])
        least = min(measured, key=lambda record: np.mean(record["kl"]), default=None)
        return None if least is None else float(least["asked"])

    def _tasks(
        self, candidate: Candidate | None, point: float, prompts: Sequence[ruler.Prompt]
    ) -> Record:
        """A candidate's record on tasks at a point; None for dense."""
        method = None if candidate is None else self.candidates.method(candidate, point)
        shape, (layers, _) = self._shape(), attention_shape(self.model)
        token = 2 * layers * shape.kv_heads * shape.head_dim * self.model.dtype.itemsize
        answers = list(
            ruler.answer(
                self.model,
                self.tokenizer,
                prompts,
                lambda: self._reading(method),
                together=max(_CACHES // (token * self.length), 1),
                crop=method.crop if isinstance(method, SlidingWindow) else None,
            )
        )
        scores = [
            ruler.score(text, prompt.answers)
            for prompt, (text, _) in zip(prompts, answers, strict=True)
        ]
        by_task = {
            task: [s for prompt, s in zip(prompts, scores, strict=True) if prompt.task == task]
            for task in dict.fromkeys(prompt.task for prompt in prompts)
        }
        record = {
            **self._named("long_tasks", candidate, point),
            "contexts": [prompt.name for prompt in prompts],
            "sparsity": [share for _, share in answers],
            "scores": scores,
            "depths": [prompt.depth for prompt in prompts if prompt.task == "single"],
        }
        said = ", ".join(f"{task} {np.mean(values):.2f}" for task, values in by_task.items())
        mean = np.mean([np.mean(values) for values in by_task.values()])
        progress(
            f"  tasks, {record['candidate']}, {record['axis']} {point:g}: {mean:.3f} ({said}), "
            f"skipped {np.mean(record['sparsity']):.4f}; {self.budget.spent:.0f} s"
        )
        for prompt, (text, _) in zip(prompts, answers, strict=True):
            if self.arguments.verbose:
                progress(f"    {prompt.task}: {text[:80]!r}, wanted {' '.join(prompt.answers)}")
        return record

    @contextlib.contextmanager
    def _reading(self, method: Method | None) -> Iterator[Callable[[], float]]:
        """The attention that a prompt is read under; what it gives is the share skipped."""
        with applied(self.model, method) as meter:
            yield lambda: 0.0 if method is None else float(np.mean(meter.take()))

    def _baselines(self) -> dict[str, str]:
        """Names of dense kernels, and those of their attention functions in transformers."""
        found = {"sdpa": torch_name(self.model)}
        if reason := FlashAttention3().available(self._shape(), self.device):
            progress(f"FlashAttention-3 is left out: {reason}")
        else:
            register(_FA3, self.fa3, lambda *_, **__: None)
            found["fa3"] = _FA3
        return found

    def _shape(self) -> Shape:
        """Of a layer's attention."""
        config = self.model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Shape(self.length, heads, config.num_key_value_heads, width)

    def _time_dense(self, count: int, warm_ups: int = 0) -> None:
        """Time the dense kernels again, in turns."""
        begin = self.budget.spent
        for repetition in range(-warm_ups, count):
            for name in list(self.baselines):
                self._time_one(name, self.times[name] if repetition >= 0 else Times())
        self._dense_seconds += self.budget.spent - begin

    def _time_one(self, name: str, times: Times) -> None:
        """Time a dense kernel once; FlashAttention-3 is left out where it can do no layer."""
        function = self.baselines[name]
        try:
            with switched(self.model, function), self.clock.watching(function):
                self._prefill(times)
            if name == "fa3":
                self.fa3.check()
        except (RuntimeError, NotImplementedError) as failure:
            if name != "fa3":
                raise
            progress(f"FlashAttention-3 is left out: {' '.join(str(failure).split())[:300]}")
            del self.baselines[name], self.times[name]

    def _prefill(self, times: Times) -> None:
        """Read the first window's prompt up to its first token under the attention in force."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.clock.read()
        begin = time.perf_counter()
        models.prefill(self.model, list(self.windows[0].ids), use_cache=True)
        times.first_token.append(1000 * (time.perf_counter() - begin))
        times.attention.append(self.clock.read())

    def _compared(self, times: Times) -> Record:
        """The times of a record, and those of dense kernels over them, in this run so far."""
        ms, attention = times.medians()
        dense = {name: one.medians() for name, one in self.times.items()}
        return {
            "ms": ms,
            "attention_ms": attention,
            "repetitions": len(times.first_token),
            "dense_ms": {name: both[0] for name, both in dense.items()},
            **({"fa3_layers": self.fa3.layers()} if "fa3" in dense else {}),
            "speedup": {name: both[0] / ms for name, both in dense.items()},
            "attention_speedup": {name: both[1] / attention for name, both in dense.items()},
        }

    def _fa3_said(self) -> str:
        """Where FlashAttention-3 did not compute all layers, how many, and why."""
        layers = self.fa3.layers()
        if "fa3" not in self.baselines or "torch" not in layers:
            return ""
        return f" (layers by fa3: {layers['fa3']} of {sum(layers.values())}: {self.fa3.why()})"

    def _by_position(self, each: Sequence[list[Band]]) -> list[list[float]]:
        """By band: first position, the next band's, and means over windows of KL and NLL."""
        return [
            [
                float(bands[0].start),
                float(bands[0].stop),
                float(np.mean([band.kl for band in bands])),
                float(np.mean([band.nll for band in bands])),
            ]
            for bands in zip(*each, strict=True)
        ]

    def _named(self, kind: str, candidate: Candidate | None, point: float) -> Record:
        """What every record of a candidate at a point says."""
        origin = self.candidates.origin(candidate)
        found: Record = {**self.about, "kind": kind, "asked": point, "origin": origin}
        if candidate is None:
            return {**found, "candidate": DENSE, "axis": "share"}
        return {**found, "candidate": candidate.name, "axis": candidate.axis, **candidate.about}

    def _key(
        self,
        kind: str,
        candidate: Candidate | None,
        point: float,
        tasks: Sequence[ruler.Prompt] = (),
    ) -> tuple[str, ...]:
        contexts = [one.name for one in tasks or self.windows]
        return key_of({**self._named(kind, candidate, point), "contexts": contexts})

    def _lacks(
        self,
        kind: str,
        candidate: Candidate | None,
        point: float,
        tasks: Sequence[ruler.Prompt] = (),
    ) -> bool:
        return self._key(kind, candidate, point, tasks) not in self.known

    def _write(self, record: Record) -> None:
        key = key_of(record)
        if key not in self.known:
            self.results.append(record)
            self.known[key] = record
            self.written += 1

    def _allows(self, unit: str) -> bool:
        """Whether one more of what took so long before fits into the time."""
        return self.budget.allows(self._longest.get(unit, 0.0))

    def _took(self, unit: str, begin: float) -> None:
        self._longest[unit] = max(self._longest.get(unit, 0.0), self.budget.spent - begin)


@contextlib.contextmanager
def guarded(name: str) -> Iterator[None]:
    """Say what went wrong with a candidate, and go on."""
    try:
        yield
    except (CaptureError, HookError, TuningError, RuntimeError, NotImplementedError) as error:
        progress(f"{name} is left out: {' '.join(str(error).split())[:300]}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def key_of(record: Record) -> tuple[str, ...]:
    """What a record measures: the same command does not measure it twice.

    Records of before there was an ``origin`` are nobody's.
    """
    names = ("kind", "model", "dtype", "seqlen", "lean", "candidate", "axis", "asked", "contexts")
    return tuple(str(record.get(name)) for name in (*names, "gpu", "origin"))


def over(bands: Sequence[Band], name: str) -> float:
    """Mean of a figure over all positions."""
    positions = sum(band.positions for band in bands)
    return float(sum(getattr(band, name) * band.positions for band in bands) / positions)


def held_out(texts: Sequence[check.Document], length: int, count: int) -> list[Window]:
    """Windows of the held-out texts, in turn from each, evenly spread; few are of many kinds.

    Raises:
        ValueError: no text is long enough.
    """
    streams = [
        [
            Window(name, f"{name}@{start}", tuple(ids))
            for start, ids in check.windows(every, length, -(-count // len(texts)))
        ]
        for name, every in (*texts[::2], *texts[1::2])
    ]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*streams))
    found = [window for window in turns if window is not None][:count]
    if not found:
        raise ValueError(f"no held-out text has {length} tokens")
    return found


def table_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and of folders the tables in them."""
    return [
        file
        for path in paths
        for file in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Accuracy against time at a length.")
    models.add_model_options(result, "the prompts of tasks")
    add = result.add_argument
    add("--calibration-text", type=Path, help="a folder a kind, other text than --text")
    add("--length", type=parse_length, required=True, help="such as 32K, a multiple of 128")
    add("--samples", type=int, default=4, help="held-out windows (default %(default)s)")
    add("--calibration-samples", type=int, default=2, help="windows to calibrate on")
    add("--tables", type=Path, nargs="+", default=[], help="learned tables, or folders of them")
    add(
        "--shares",
        type=list_of(parse_fraction),
        default=(),
        help="to be skipped, instead of its own",
    )
    add("--voters", type=list_of(int), default=bsfa_kernel.VOTERS, help="for scalars")
    add("--selection", type=one_of(bsfa_kernel.SELECTIONS), default="auto")
    add("--only", nargs="+", help="candidates whose name holds one of these")
    add("--prompts", type=int, default=2, help="of each task; 0 for none (default %(default)s)")
    add("--depths", type=int, default=5, help="of a single needle (default %(default)s)")
    add("--tasks", type=list_of(one_of(ruler.TASKS)), default=ruler.TASKS)
    add("--task-losses", type=list_of(float), default=(0.01,), help="points to run tasks at")
    add("--repetitions", type=int, default=2, help="of each prefill timed")
    add("--lean", action="store_true", help="as in prefill.py: less memory outside of attention")
    add("--seconds", type=float, help="start nothing that would end later than this")
    add("--verbose", action="store_true", help="print the answers")
    add("--out", type=Path, default=Path("long.jsonl"), help="records; thresholds beside them")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser()
    arguments = options.parse_args(argv)
    if arguments.model is None or arguments.text is None or arguments.calibration_text is None:
        options.error("--model, --text and --calibration-text are needed")
    if arguments.length % 128:
        options.error(f"--length must be a multiple of 128, got {arguments.length}")
    with lean(arguments.lean):
        study = Study(arguments)
        written = study.run()
    print(f"{written} new records in {arguments.out}, {study.budget.spent:.0f} s")
    return 0 if written or study.known else 1


if __name__ == "__main__":
    run_program(main)
