# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of serving, with engines and servers that are stood in for."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import report
import serving
from bsfa_calib import ThresholdTable
from harness import Budget, Results, read_records
from kernels import Mode

SHAPE = ["--model-shape", "tiny", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_version", lambda: "0.0.0")
    for name in serving._VARIABLES:
        monkeypatch.setenv(name, serving._VARIABLES[name])


class Engine:
    """An engine that skips more the higher the threshold, and the fewer keys there are."""

    def __init__(self, benchmark: Any) -> None:
        self.threshold, self.length, self.runs = 0.0, 1, 0
        self.mode: Any = None
        benchmark._engine = lambda settings: contextlib.nullcontext(self)
        benchmark._once, benchmark._switch = self.once, self.switch
        benchmark._sparsity = self.sparsity

    def switch(self, run: serving.EngineRun) -> None:
        self.threshold, self.mode = run.threshold, run.mode

    def once(self, llm: Any, ids: list[int]) -> float:
        assert llm is self
        self.length = len(ids)
        self.runs += 1
        return 10.0 if self.mode is None else 5.0

    def sparsity(self) -> float:
        return 1 / (1 + math.exp(-2 * (self.threshold + math.log(self.length) - 7)))


def ended(code: int = 0) -> Any:
    """A process that has ended."""
    return SimpleNamespace(returncode=code, poll=lambda: code, terminate=lambda: None)


def test_times_that_are_known_when_a_run_is_stopped_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "serving.jsonl"
    options = ["--seqlens", "1K,4K", "--sparsities", "0.75", "--default"]
    benchmark = serving.FirstToken(
        serving.parser().parse_args(["ttft", *SHAPE, *options]), Results(out), tmp_path
    )
    engine = Engine(benchmark)

    def failing(command: list[str], **options: Any) -> Any:
        Path(command[command.index("--times") + 1]).write_text("[1024, 12.0]\n")
        return ended(1)

    monkeypatch.setattr(subprocess, "Popen", failing)
    with pytest.raises(RuntimeError, match="default engine could not be timed"):
        benchmark.run(Budget(None))
    (record,) = read_records(out)
    assert (record["implementation"], record["seqlen"], record["ms"]) == ("vllm", 1024, 12.0)
    benchmark.arguments.default = False
    ran = engine.once

    def stopped(llm: Any, ids: list[int]) -> float:
        if engine.mode is not None:
            raise KeyboardInterrupt
        return ran(llm, ids)

    benchmark._once = stopped  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(Budget(None))
    _, record = read_records(out)
    assert (record["implementation"], record["repetitions"]) == ("vllm_cpu", 1)


# The program, with a child that sleeps for vLLM's default engine.
STOPPED = """
import os, runpy, subprocess, sys

popen = subprocess.Popen

def started(command, *args, **options):
    if "--times" not in command:
        return popen(command, *args, **options)
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    return popen([sys.executable, "-c", code])

subprocess.Popen = started
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_program_that_is_stopped_leaves_no_engine_behind(tmp_path: Path) -> None:
    options = ["--default", "--seqlens", "1K", "--out", str(tmp_path / "serving.jsonl")]
    arguments = [str(Path(serving.__file__)), "ttft", *SHAPE, *options]
    command = [sys.executable, "-c", STOPPED, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        child = int(program.stdout.readline())
        try:
            program.terminate()
            program.communicate(timeout=60)  # the child has its output, too
            assert program.returncode == 128 + signal.SIGTERM
        finally:
            program.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_first_token_ends_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "serving.jsonl"
    options = ["--seqlens", "1K", "--sparsities", "0.75,0.9"]
    benchmark = serving.FirstToken(
        serving.parser().parse_args(["ttft", *SHAPE, *options]), Results(out), tmp_path
    )
    Engine(benchmark)
    answers = [True, True, True, False, False]  # the length, dense, 0.75, 0.9; the second round
    budget: Any = SimpleNamespace(allows=lambda *_: answers.pop(0))
    benchmark.run(budget)
    assert [record["asked"] for record in benchmark.records] == ["dense", "0.75"]
    assert capsys.readouterr().out.splitlines() == [
        "left out for the budget: 1024 tokens, bsfa 0.9 peak_lse 128x64 exact",
        "left out for the budget: 1024 tokens, repetitions 2 to 3",
    ]


def test_first_token_is_measured_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "serving.jsonl"
    options = ["--seqlens", "1K,4K", "--sparsities", "0.75,0.9", "--repetitions", "2", "--default"]
    arguments = serving.parser().parse_args(["ttft", *SHAPE, *options])
    benchmark = serving.FirstToken(arguments, Results(out), tmp_path)
    engine = Engine(benchmark)

    def child(command: list[str], **options: Any) -> Any:
        times = command[command.index("--times") + 1]
        assert command[command.index("--seqlens") + 1] == "1024,4096"
        alone = serving.parser().parse_args(command[2:])
        other = serving.FirstToken(alone, Results(out), tmp_path)
        Engine(other)
        other.run(Budget(None))
        found = [json.loads(line) for line in Path(times).read_text().splitlines()]
        assert found == [[1024, 10.0]] * 2 + [[4096, 10.0]] * 2
        return ended()

    monkeypatch.setattr(subprocess, "Popen", child)
    monkeypatch.setattr(serving, "environment", lambda device: benchmark.environment)
    benchmark.run(Budget(None))
    written = list(read_records(out))
    records = report.latest(written)
    assert benchmark.records == records
    assert [(r["implementation"], r["asked"], r["seqlen"]) for r in records] == [
        ("vllm", "dense", 1024),
        ("vllm", "dense", 4096),
        *(
            (name, asked, seqlen)
            for seqlen in (1024, 4096)
            for name, asked in (("vllm_cpu", "dense"), ("bsfa", "0.75"), ("bsfa", "0.9"))
        ),
    ]
    assert all(record["repetitions"] == 2 for record in records)
    # The default engine's times are there before the other engine is.
    assert [(r["seqlen"], r["repetitions"], r["speedup"]) for r in written[:4]] == [
        (seqlen, count, {}) for seqlen in (1024, 4096) for count in (1, 2)
    ]
    for record in records:
        sparse = record["implementation"] == "bsfa"
        wanted = float(record["asked"]) if sparse else 0
        assert record["sparsity"] == pytest.approx(wanted, abs=0.011)
        assert record["speedup"].get("vllm", 1.0) == (2.0 if sparse else 1.0)
        assert record["self_test"]
    table = ThresholdTable.load(tmp_path / "scalar.safetensors")
    assert (table.layers, table.heads, table.geometry) == (2, 4, "128x64")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    # Three of each of three configurations, but for what it takes to come close.
    assert engine.runs < 2 * (3 * 3 + 2 * serving._TRIES)


def test_load_is_measured_for_each_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = [5, 5, 4]
    commands: list[list[str]] = []

    def start(command: list[str], **options: Any) -> Any:
        commands.append(command)
        options["stdout"].write("out of memory")
        options["stdout"].flush()
        return SimpleNamespace(terminate=lambda: None, wait=lambda _: None, poll=lambda: None)

    def ask(command: list[str], **options: Any) -> Any:
        commands.append(command)
        found = {
            "completed": answered.pop(0),
            "median_ttft_ms": 80.0,
            "p99_ttft_ms": 90.0,
            "total_token_throughput": 1000.0,
            "request_throughput": 0.4,
        }
        (tmp_path / "client.json").write_text(json.dumps(found))
        return SimpleNamespace(returncode=0, stderr="connection reset")

    out = tmp_path / "serving.jsonl"
    options = ["--seqlens", "1K,3K", "--sparsities", "0.75", "--tokenizer", "words"]
    options += ["--requests", "5", "--modes", "int8:4", "--geometry", "64x64"]
    arguments = serving.parser().parse_args(["load", *SHAPE, *options])
    benchmark = serving.Load(arguments, Results(out), tmp_path)
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(serving.Load, "_wait", lambda *_: None)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    counted = SimpleNamespace(mean_kept_fraction=0.25)
    monkeypatch.setitem(
        sys.modules, "bsfa_vllm", SimpleNamespace(statistics=lambda folder: counted)
    )
    monkeypatch.setattr(subprocess, "run", ask)
    benchmark.run(Budget(None))
    dense, sparse = read_records(out)
    assert (dense["implementation"], dense["sparsity"]) == ("vllm", 0.0)
    assert (sparse["implementation"], sparse["sparsity"]) == ("bsfa", 0.75)
    assert sparse["tokens_per_second"] == 1000.0
    servers = [command for command in commands if "serve" in command and "bench" not in command]
    assert [("--additional-config" in command) for command in servers] == [False, True]
    settings = json.loads(servers[1][servers[1].index("--additional-config") + 1])["bsfa"]
    table = ThresholdTable.load(settings["thresholds"])
    assert float(np.isposinf(table.thresholds).mean()) == pytest.approx(0.75, abs=0.01)
    assert settings["selection"] == sparse["selection"] == "int8"
    assert table.voters == sparse["voters"] == 4
    assert table.geometry == sparse["geometry"] == "64x64"
    assert table.rule == sparse["rule"] == "peak_lse"
    client = commands[1]
    assert client[client.index("--random-input-len") + 1] == "2048"
    assert client[client.index("--random-range-ratio") + 1] == "0.5000"
    failed = "of 5 requests 4 were answered: connection reset\n.*log ends: out of memory"
    with pytest.raises(RuntimeError, match=failed):
        benchmark.run(Budget(None))
    answered[:] = [5, 4]  # dense is there when ours fails
    with pytest.raises(RuntimeError, match="of 5 requests 4 were answered"):
        benchmark.run(Budget(None))
    assert [record["asked"] for record in read_records(out)] == ["dense", "0.75", "dense"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table that is unlike the defaults in all that it says of its thresholds."""
    path = tmp_path / "table.safetensors"
    ThresholdTable(
        thresholds=np.zeros((1, 2, 4, 1), np.float32),
        points=(0.75,),
        axis="target_sparsity",
        rule="absolute",
        q_block=64,
        k_block=64,
        voters=4,
    ).save(path)
    return path


def test_a_table_says_what_its_thresholds_hold_for(table: Path, tmp_path: Path) -> None:
    options = ["--model", "m", "--table", str(table), "--device", "cpu"]
    found = serving.thresholds_of(serving.parser().parse_args(["ttft", *options]))
    assert (found.rule, str(found.geometry)) == ("absolute", "64x64")
    assert found.modes == (Mode("exact", 4),)
    both = ["--modes", "exact:4,int8:4", "--rule", "absolute", "--geometry", "64x64"]
    found = serving.thresholds_of(serving.parser().parse_args(["ttft", *options, *both]))
    assert [mode.selection for mode in found.modes] == ["exact", "int8"]
    for option, value, held in (
        ("--modes", "int8", "4"),
        ("--rule", "peak_lse", "absolute"),
        ("--geometry", "128x64", "64x64"),
    ):
        arguments = serving.parser().parse_args(["ttft", *options, option, value])
        with pytest.raises(SystemExit, match=f"^{option}.*{table} are of {held}$"):
            serving.thresholds_of(arguments)


def test_a_server_runs_one_mode(tmp_path: Path) -> None:
    options = [*SHAPE, "--tokenizer", "words", "--modes", "exact,int8:4"]
    arguments = serving.parser().parse_args(["load", *options])
    with pytest.raises(SystemExit, match="a server runs one of --modes, got exact, int8:4"):
        serving.Load(arguments, Results(tmp_path / "out.jsonl"), tmp_path)


def test_dense_is_no_share(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serving.parser().parse_args(["ttft", *SHAPE, "--sparsities", "dense,0.75"])
    assert "dense is measured in any case" in capsys.readouterr().err


def test_a_server_that_ends_is_told(tmp_path: Path) -> None:
    arguments = serving.parser().parse_args(["load", *SHAPE, "--tokenizer", "words"])
    benchmark = serving.Load(arguments, Results(tmp_path / "out.jsonl"), tmp_path)
    ended: Any = SimpleNamespace(poll=lambda: 1)
    (tmp_path / "log").write_text("no such model")
    with pytest.raises(RuntimeError, match="the server did not start: no such model"):
        benchmark._wait(ended, tmp_path / "log")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ttft", "--model-shape", "tiny", "--table", "t"], "--table needs --model"),
        (["load", "--model-shape", "tiny"], "--model-shape needs --tokenizer"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        serving.main(options)
