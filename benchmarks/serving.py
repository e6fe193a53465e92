# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Serving with vLLM: time to first token, and throughput under load, dense and block-sparse.

``ttft`` gives one engine a prompt at a time. With the back end of bsfa-vllm, vLLM's own attention
and block-sparse attention take turns in the same engine; ``--default`` also times an engine with
vLLM's default back end and pages before. Random weights have no calibrated table, so one threshold
is moved, during the runs that warm up, until the share asked for is skipped::

    python benchmarks/serving.py ttft --model-shape llama-3.1-8b --seqlens 32K,128K

Each configuration is timed once when it is warm, then all take turns; every time leaves a record at
once, of which the last of a run counts.

``load`` starts a server for each configuration in turn, and vLLM's own benchmark client against it,
with requests that arrive by a Poisson process::

    python benchmarks/serving.py load --model MODEL --table TABLE --sparsities 0.75,0.9 --rate 0.5
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bsfa_kernel
import models
from attention import DENSE, parse_sparsity
from bsfa_calib import ThresholdTable
from bsfa_kernel import Geometry
from harness import (
    Budget,
    Record,
    Results,
    environment,
    list_of,
    out_of,
    parse_length,
    progress,
    run_program,
)
from kernels import EXACT, Mode
from turns import Run, Turns

# How close a share must come, in how many runs. The logarithm of the odds of being skipped grows
# about so much with the threshold, which moves by no more than a step at a time.
_CLOSE, _TRIES, _SLOPE, _STEP = 0.015, 4, 2.0, 3.0
_PORT = 8765
# No network, and the engine in this process, where its thresholds can be moved.
_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass
class Served:
    """What an engine loads.

    Attributes:
        path: the model's folder or id.
        name: the model, for a record.
        layers: of the model.
        heads: query heads of a layer.
        random: whether its weights are random.
    """

    path: str
    name: str
    layers: int
    heads: int
    vocabulary: int
    random: bool


def served(arguments: argparse.Namespace, folder: Path) -> Served:
    """The model that the options name; of a shape, a folder with a configuration is made."""
    from transformers import AutoConfig, LlamaConfig

    if arguments.model is None:
        settings = dict(models.SHAPES[arguments.model_shape])
        theta = settings.pop("rope_theta")
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        config: Any = LlamaConfig(
            **settings, max_position_embeddings=1 << 20, architectures=["LlamaForCausalLM"]
        )
        path = folder / str(arguments.model_shape)
        config.save_pretrained(path)
        name = f"{arguments.model_shape}, random weights"
    else:
        path, name = Path(arguments.model), Path(arguments.model).name
        config = AutoConfig.from_pretrained(path).get_text_config()
    return Served(
        str(path),
        name,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.vocab_size,
        arguments.model is None,
    )


@dataclass(frozen=True)
class Thresholds:
    """What thresholds hold for, and the modes to run with them."""

    rule: str
    geometry: Geometry
    modes: tuple[Mode, ...]


def thresholds_of(arguments: argparse.Namespace) -> Thresholds:
    """Rule, sparsity block and voters of the table, or those that the options name.

    Raises:
        SystemExit: an option disagrees with the table.
    """
    if arguments.table is None:
        return Thresholds(
            arguments.rule or "peak_lse",
            arguments.geometry or bsfa_kernel.DEFAULT_GEOMETRY,
            arguments.modes or (EXACT,),
        )
    table = ThresholdTable.load(arguments.table)
    geometry = Geometry(table.q_block, table.k_block)
    modes: tuple[Mode, ...] = arguments.modes or (Mode("exact", table.voters),)
    for option, given, held in (
        ("--rule", arguments.rule, table.rule),
        ("--geometry", arguments.geometry, geometry),
        *(("--modes with voters of", mode.voters, table.voters) for mode in modes),
    ):
        if given is not None and given != held:
            raise SystemExit(f"{option} {given}: the thresholds of {arguments.table} are of {held}")
    return Thresholds(table.rule, geometry, modes)


@dataclass(eq=False, kw_only=True)
class EngineRun(Run):
    """One way to compute the attention in an engine, with the threshold that it skips by."""

    threshold: float = math.nan


class Measurement:
    """Of one model, whose files are in a folder."""

    def __init__(self, arguments: argparse.Namespace, results: Results, folder: Path) -> None:
        """Describe the model, and how it is served."""
        self.arguments, self.results, self.folder = arguments, results, folder
        self.device = torch.device(arguments.device)
        self.served = served(arguments, folder)
        self.environment = environment(self.device)
        self.thresholds = thresholds_of(arguments)


class FirstToken(Measurement):
    """Measures the time to first token of one model."""

    def __init__(self, arguments: argparse.Namespace, results: Results, folder: Path) -> None:
        """Describe the model, and write a table of the engine's shape."""
        super().__init__(arguments, results, folder)
        self.table = str(arguments.table or folder / "scalar.safetensors")
        if arguments.table is None:
            ThresholdTable(
                thresholds=np.zeros((1, self.served.layers, self.served.heads, 1), np.float32),
                points=(0.0,),
                axis="target_sparsity",
                rule=self.thresholds.rule,
                q_block=self.thresholds.geometry.q_block,
                k_block=self.thresholds.geometry.k_block,
            ).save(self.table)
        self._runs_timed: list[Run] = []
        # The threshold that came closest, by share asked for and voters, with its length.
        self._found: dict[tuple[str, int], tuple[float, int]] = {}

    @property
    def records(self) -> list[Record]:
        """The last record of each measurement."""
        return [run.record for run in self._runs_timed]

    def run(self, budget: Budget) -> None:
        """Measure every length."""
        if self.arguments.times is not None:
            self._time_default(self.arguments.times)
            return
        own = self._default() if self.arguments.default else {}
        with self._engine({"thresholds": self.table, **self._point()}) as llm:
            for seqlen in self.arguments.seqlens:
                if budget.allows():
                    self._measure(llm, seqlen, own.get(seqlen), budget)
                else:
                    print(f"left out for the budget: {seqlen} tokens")

    def _default(self) -> dict[int, Run]:
        """By length, an engine with vLLM's default back end, in a process of its own.

        Each of its times is in a record as soon as it is known.

        Raises:
            RuntimeError: it failed.
        """
        given, path = self.arguments, self.folder / "times.jsonl"
        command = [sys.executable, str(Path(__file__).resolve()), "ttft", "--times", str(path)]
        command += ["--model", given.model] if given.model else ["--model-shape", given.model_shape]
        command += ["--device", given.device, "--dtype", given.dtype, "--seed", str(given.seed)]
        command += ["--seqlens", ",".join(map(str, given.seqlens))]
        command += ["--repetitions", str(given.repetitions), *(["--eager"] if given.eager else [])]
        found: dict[int, Run] = {}
        path.touch()
        child = subprocess.Popen(command)
        try:
            with path.open() as lines:
                ended = False
                while not ended:
                    ended = child.poll() is not None
                    for line in lines:
                        seqlen, ms = json.loads(line)
                        if seqlen not in found:
                            found[seqlen] = Run("vllm")
                            self._runs_timed.append(found[seqlen])
                        self._known(found[seqlen], seqlen, ms)
                    if not ended:
                        time.sleep(0.2)
        finally:
            child.terminate()
        if child.returncode or not found:
            raise RuntimeError("vLLM's default engine could not be timed: its messages are above")
        return found

    def _known(self, run: Run, seqlen: int, ms: float) -> None:
        """Write the record of a time that another process took."""
        self._turns(seqlen).time(run, lambda _: ms)

    def _time_default(self, path: Path) -> None:
        """Write a line for each time of an engine with vLLM's default back end: tokens, ms."""
        with self._engine(None) as llm:
            for seqlen in self.arguments.seqlens:
                ids = self._prompt(seqlen)
                for repetition in range(self.arguments.repetitions + 1):
                    ms = self._once(llm, ids)
                    if not repetition:  # it warms up
                        continue
                    progress(f"  vllm  {seqlen:7} {ms:10.1f} ms")
                    with path.open("ab", buffering=0) as file:
                        file.write(f"{json.dumps([seqlen, ms])}\n".encode())

    def _point(self) -> dict[str, Any]:
        return {"check_model": False, "target_sparsity": self._points()[0]}

    def _points(self) -> list[float]:
        if self.arguments.table is None:
            return [0.0]
        return [float(asked) for asked in self.arguments.sparsities]

    @contextlib.contextmanager
    def _engine(self, settings: dict[str, Any] | None) -> Iterator[Any]:
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        longest = max(self.arguments.seqlens)
        options: dict[str, Any] = {"max_model_len": longest + 64, "enable_prefix_caching": False}
        if self.served.random:
            options |= {"load_format": "dummy", "skip_tokenizer_init": True}
        if self.arguments.eager:
            options["enforce_eager"] = True
        if settings is not None:
            options["additional_config"] = {"bsfa": settings}
            if self.device.type == "cuda":
                options["attention_backend"] = "CUSTOM"
        start = time.perf_counter()
        llm: Any = LLM(self.served.path, dtype=self.arguments.dtype, seed=0, **options)
        if self.served.random:
            llm.apply_model(_randomise)
        progress(f"{self.served.name} is up after {time.perf_counter() - start:.0f} s")
        try:
            yield llm
        finally:
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()

    def _prompt(self, seqlen: int) -> list[int]:
        draws = random.Random(self.arguments.seed)
        return [draws.randrange(self.served.vocabulary) for _ in range(seqlen)]

    def _once(self, llm: Any, ids: list[int]) -> float:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        return 1000 * (time.perf_counter() - start)

    def _runs(self) -> list[EngineRun]:
        """What is measured beside dense attention: every mode at every share."""
        modes, shares = self.thresholds.modes, self.arguments.sparsities
        rule, geometry = self.thresholds.rule, self.thresholds.geometry
        return [
            EngineRun("bsfa", asked, rule, geometry, mode) for mode in modes for asked in shares
        ]

    def _measure(self, llm: Any, seqlen: int, own: Run | None, budget: Budget) -> None:
        """Measure a length: each configuration once when it is warm, then all in turns.

        Args:
            llm: the engine.
            seqlen: tokens of the prompt.
            own: vLLM's default engine, timed before.
            budget: what does not fit is left out.
        """
        ids = self._prompt(seqlen)
        turns = self._turns(seqlen, () if own is None else (own,))
        runs: list[EngineRun] = []

        def once(run: EngineRun) -> float:
            self._switch(run)
            return self._once(llm, ids)

        for run in (EngineRun("fa3" if self.device.type == "cuda" else "vllm_cpu"), *self._runs()):
            tries = _TRIES if run.mode and self.arguments.table is None else 1
            longest = max((r.times[-1] for r in runs), default=0.0) / 1000
            if not budget.allows((tries + 1) * longest):
                print(f"left out for the budget: {seqlen} tokens, {run}")
                continue
            self._warm_up(llm, run, ids)
            turns.time(run, once)
            runs.append(run)
            self._runs_timed.append(run)
        if rest := turns.repeat(runs, self.arguments.repetitions, budget, once):
            print(rest)
        for each in turns.runs:
            ratios = ", ".join(f"{v:.3f}x {k}" for k, v in each.record["speedup"].items())
            progress(
                f"  {each.implementation:5} {each.asked:5} {seqlen:7} {each.record['ms']:10.1f} "
                f"ms, s={each.sparsity:.3f} {ratios} {each.mode or ''}"
            )

    def _turns(self, seqlen: int, runs: Iterable[Run] = ()) -> Turns:
        about = {
            **self.environment,
            "kind": "serving",
            "model": self.served.name,
            "seqlen": seqlen,
            "dtype": self.arguments.dtype,
            "eager": self.arguments.eager,
            "vllm": _version(),
        }
        return Turns(self.results, about, self.device, runs)

    def _warm_up(self, llm: Any, run: EngineRun, ids: list[int]) -> None:
        """Run a configuration until its share is close to what was asked for."""
        if run.mode is None or self.arguments.table is not None:
            self._switch(run)
            self._once(llm, ids)
            run.sparsity = self._sparsity() if run.mode else 0.0
            return
        key = (run.asked, run.mode.voters)
        place, seen = self._found.get(key, (-1.0, len(ids)))
        # The reference of peak_lse grows with the logarithm of the keys.
        place -= math.log(len(ids) / seen)
        wanted, best = float(run.asked), math.inf
        points: list[tuple[float, float]] = []
        for _ in range(_TRIES):
            run.threshold = place
            self._switch(run)
            self._once(llm, ids)
            share = self._sparsity()
            if abs(share - wanted) < best:
                best, run.sparsity = abs(share - wanted), share
                self._found[key] = (place, len(ids))
            if best <= _CLOSE:
                break
            points = [*points[-1:], (place, _odds(share))]
            (x, first), (y, last) = points[0], points[-1]
            slope = (last - first) / (y - x) if len(points) == 2 and x != y else _SLOPE
            place += max(min((_odds(wanted) - last) / max(slope, 0.2), _STEP), -_STEP)
        run.threshold = self._found[key][0]

    def _switch(self, run: EngineRun) -> None:
        """Let the engine run a configuration from here on."""
        from bsfa_vllm.binding import engines

        (engine,) = engines()
        engine.enabled = run.mode is not None
        if run.mode is None:
            return
        state = engine.state
        state.statistics.reset()
        state.selection, state.voters = run.mode.selection, run.mode.voters
        if self.arguments.table is None:
            for thresholds in state.thresholds:
                thresholds.fill_(run.threshold)
            return
        table = ThresholdTable.load(self.table)
        for thresholds, values in zip(
            state.thresholds, table.select(f"target_sparsity={run.asked}"), strict=True
        ):
            thresholds.copy_(torch.tensor(values))

    def _sparsity(self) -> float:
        """Share of the blocks that the calls since the last switch have skipped.

        Raises:
            RuntimeError: no call was block-sparse.
        """
        from bsfa_vllm.binding import engines

        (engine,) = engines()
        if not engine.state.statistics.sparse_calls:
            raise RuntimeError(f"no layer ran block-sparse: {dict(engine.calls)}")
        return 1 - engine.state.statistics.mean_kept_fraction


def _odds(share: float) -> float:
    """Logarithm of the odds."""
    share = min(max(share, 1e-3), 1 - 1e-3)
    return math.log(share / (1 - share))


def _randomise(model: torch.nn.Module) -> None:
    """Weights as before a training; vLLM's own dummies give scores that are all but equal."""
    generator = None
    for parameter in model.parameters():
        if generator is None:
            generator = torch.Generator(parameter.device).manual_seed(0)
        if parameter.ndim == 1:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, 0.02, generator=generator)


def _version() -> str:
    import vllm

    return str(vllm.__version__)


class Load(Measurement):
    """Measures servers under load."""

    def __init__(self, arguments: argparse.Namespace, results: Results, folder: Path) -> None:
        """Describe the model, which is served in one way."""
        super().__init__(arguments, results, folder)
        self.records: list[Record] = []
        if len(self.thresholds.modes) > 1:
            modes = ", ".join(map(str, self.thresholds.modes))
            raise SystemExit(f"a server runs one of --modes, got {modes}")
        (self.mode,) = self.thresholds.modes

    def run(self, budget: Budget) -> None:
        """Measure every configuration, each with its record: vLLM's default, then each share."""
        longest = 0.0
        for asked in ("dense", *self.arguments.sparsities):
            if not budget.allows(longest):
                print(f"left out for the budget: {asked}")
                continue
            begin = budget.spent
            with self._server(asked):
                found = self._client()
            longest = max(longest, budget.spent - begin)
            record = self._record(asked, found)
            self.results.append(record)
            self.records.append(record)
            progress(
                f"  {asked:5} {record['tokens_per_second']:9.0f} tokens/s, first token after "
                f"{record['ttft_ms']:.0f} ms (median), {record['ttft_p99_ms']:.0f} ms (p99)"
            )

    def _table(self, asked: str) -> tuple[str, float]:
        """A table and a point of it.

        For random weights: of that share of all heads' query blocks only the forced blocks are
        kept, of the others all, so that the share holds at every length and for all weights.
        """
        if self.arguments.table is not None:
            return str(self.arguments.table), float(asked)
        path = self.folder / f"rows-{asked}.safetensors"
        shape = (1, self.served.layers, self.served.heads, 4096)
        skipped = np.random.default_rng(0).random(shape) < float(asked)
        ThresholdTable(
            thresholds=np.where(skipped, np.inf, -np.inf).astype(np.float32),
            points=(float(asked),),
            axis="target_sparsity",
            rule=self.thresholds.rule,
            q_block=self.thresholds.geometry.q_block,
            k_block=self.thresholds.geometry.k_block,
            voters=self.mode.voters,
        ).save(path)
        return str(path), float(asked)

    @contextlib.contextmanager
    def _server(self, asked: str) -> Iterator[None]:
        """A server of one configuration.

        Raises:
            RuntimeError: it did not start, or what was asked of it failed; with the end of its log.
        """
        longest = max(self.arguments.seqlens) + self.arguments.answer + 64
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.served.path]
        command += ["--port", str(_PORT), "--host", "127.0.0.1", "--dtype", self.arguments.dtype]
        command += ["--max-model-len", str(longest), "--no-enable-prefix-caching"]
        if self.served.random:
            command += ["--load-format", "dummy", "--tokenizer", str(self.arguments.tokenizer)]
        if self.arguments.eager:
            command.append("--enforce-eager")
        if asked != "dense":
            path, point = self._table(asked)
            settings = {"thresholds": path, "target_sparsity": point, "check_model": False}
            settings["selection"] = self.mode.selection
            command += ["--additional-config", json.dumps({"bsfa": settings})]
            if self.device.type == "cuda":
                command += ["--attention-backend", "CUSTOM"]
        variables = {**os.environ, **_VARIABLES, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        variables["BSFA_STATISTICS"] = str(self.folder / f"statistics-{asked}")
        variables["BSFA_STATISTICS_INTERVAL"] = "1"
        with (self.folder / f"server-{asked}.log").open("w") as log:
            server = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
            try:
                self._wait(server, Path(log.name))
                try:
                    yield
                except RuntimeError as error:
                    words = Path(log.name).read_text()[-3000:]
                    raise RuntimeError(f"{error}\nthe server's log ends: {words}") from error
                time.sleep(2)  # the last statistics are written
            finally:
                server.terminate()
                server.wait(60)

    def _wait(self, server: subprocess.Popen[bytes], log: Path) -> None:
        """Wait until the server answers.

        Raises:
            RuntimeError: it ended, or it takes too long; the message ends with its log.
        """
        end = time.monotonic() + self.arguments.start_seconds
        while time.monotonic() < end and server.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{_PORT}/health", timeout=5),
            ):
                return
            time.sleep(0.5)
        raise RuntimeError(f"the server did not start: {log.read_text()[-3000:]}")

    def _client(self) -> dict[str, Any]:
        """What vLLM's own benchmark client finds.

        Raises:
            RuntimeError: it failed, or some requests did.
        """
        lengths = self.arguments.seqlens
        middle = (max(lengths) + min(lengths)) // 2
        spread = (max(lengths) - min(lengths)) / 2 / middle
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
        command += ["--backend", "openai", "--base-url", f"http://127.0.0.1:{_PORT}"]
        command += ["--model", self.served.path, "--dataset-name", "random"]
        command += ["--seed", str(self.arguments.seed)]
        command += ["--random-input-len", str(middle), "--random-range-ratio", f"{spread:.4f}"]
        command += ["--random-output-len", str(self.arguments.answer), "--ignore-eos"]
        command += ["--request-rate", str(self.arguments.rate)]
        command += ["--num-prompts", str(self.arguments.requests), "--save-result"]
        command += ["--result-dir", str(self.folder), "--result-filename", "client.json"]
        if self.arguments.tokenizer is not None:
            command += ["--tokenizer", str(self.arguments.tokenizer)]
        reply = subprocess.run(
            command, env={**os.environ, **_VARIABLES}, capture_output=True, text=True, check=False
        )
        if reply.returncode:
            raise RuntimeError(f"the client failed: {reply.stderr[-2000:]}")
        found: dict[str, Any] = json.loads((self.folder / "client.json").read_text())
        if found["completed"] != self.arguments.requests:
            raise RuntimeError(
                f"of {self.arguments.requests} requests {found['completed']} were answered: "
                f"{reply.stderr[-2000:]}"
            )
        return found

    def _record(self, asked: str, found: dict[str, Any]) -> Record:
        sparsity = 0.0
        if asked != "dense":
            import bsfa_vllm

            report = bsfa_vllm.statistics(self.folder / f"statistics-{asked}")
            sparsity = 1 - report.mean_kept_fraction
        return {
            **self.environment,
            "kind": "serving_load",
            "implementation": "vllm" if asked == "dense" else "bsfa",
            "model": self.served.name,
            "shortest": min(self.arguments.seqlens),
            "seqlen": max(self.arguments.seqlens),
            "answer": self.arguments.answer,
            "rate": float(self.arguments.rate),
            "requests": found["completed"],
            "asked": asked,
            "sparsity": sparsity,
            "rule": None if asked == "dense" else self.thresholds.rule,
            "geometry": None if asked == "dense" else str(self.thresholds.geometry),
            **({} if asked == "dense" else self.mode._asdict()),
            "dtype": self.arguments.dtype,
            "eager": self.arguments.eager,
            "vllm": _version(),
            "ttft_ms": found["median_ttft_ms"],
            "ttft_p99_ms": found["p99_ttft_ms"],
            "tokens_per_second": found["total_token_throughput"],
            "requests_per_second": found["request_throughput"],
        }


def parse_share(text: str) -> str:
    """A share from 0 to 1; dense attention is measured without being asked for."""
    share = parse_sparsity(text)
    if share == DENSE:
        raise argparse.ArgumentTypeError("dense is measured in any case: name shares from 0 to 1")
    return share


# The shapes that LlamaConfig describes.
_LLAMAS = [name for name, settings in models.SHAPES.items() if "rope_theta" in settings]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Serving with vLLM, dense and block-sparse.")
    commands = result.add_subparsers(dest="command", required=True)
    for name, words in (("ttft", "time to first token"), ("load", "servers under load")):
        command = commands.add_parser(name, help=words)
        add = command.add_argument
        which = command.add_mutually_exclusive_group(required=True)
        which.add_argument("--model", help="a folder that vLLM loads")
        which.add_argument("--model-shape", choices=_LLAMAS, help="with random weights")
        add("--table", type=Path, help="thresholds of --model, with a point for each share")
        add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
        add("--device", default="cuda", help="cuda, or cpu for a self-test")
        add("--seed", type=int, default=0, help="of prompts and arrivals")
        add("--seqlens", type=list_of(parse_length), default=(16384, 131072))
        add("--sparsities", type=list_of(parse_share), default=("0.75", "0.9"))
        add("--rule", choices=bsfa_kernel.RULES, help="that of --table, or peak_lse")
        add("--geometry", type=Geometry.parse, help="that of --table, or the default")
        add("--modes", type=list_of(Mode.parse), help="of exact,int8,int8:4; load takes one")
        add("--eager", action="store_true", help="without torch.compile and CUDA graphs")
        add("--budget-seconds", type=float, help="start nothing that would end later than this")
        add("--out", type=Path, help="records (default benchmarks/results/serving.jsonl)")
    first, load = (commands.choices[name] for name in ("ttft", "load"))
    first.add_argument("--default", action="store_true", help="time vLLM's default engine too")
    first.add_argument("--times", type=Path, help="only that, its times into this file")
    first.add_argument("--repetitions", type=int, default=3, help="(default %(default)s)")
    load.add_argument("--rate", type=float, default=0.5, help="requests a second")
    load.add_argument("--requests", type=int, default=50, help="(default %(default)s)")
    load.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    load.add_argument("--tokenizer", type=Path, help="for --model-shape, a folder")
    load.add_argument("--start-seconds", type=float, default=300, help="for a server to start")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    if arguments.table is not None and arguments.model is None:
        raise SystemExit("--table needs --model: random weights have no thresholds")
    if arguments.command == "load" and arguments.model_shape and arguments.tokenizer is None:
        raise SystemExit("--model-shape needs --tokenizer: the client sends text")
    if arguments.command == "load" or arguments.times is None:
        arguments.out = out_of(parser(), arguments, "serving")
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory(prefix="bsfa-serving-") as folder:
        kind = FirstToken if arguments.command == "ttft" else Load
        benchmark = kind(arguments, Results(arguments.out), Path(folder))
        budget = Budget(arguments.budget_seconds)
        benchmark.run(budget)
    if arguments.command == "ttft" and arguments.times is not None:
        return 0
    print(f"{len(benchmark.records)} records in {arguments.out}, {budget.spent:.0f} s")
    return 0 if benchmark.records else 1


if __name__ == "__main__":
    # An exception, so that the engine or server in another process ends with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run_program(main)
