# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What every benchmark shares: timing, the record of the machine, and the file of results.

A result file is JSON Lines, one record a measurement. ``benchmarks/README.md`` says what each field
means.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import torch

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1

Record = dict[str, Any]

_NUMBER = (int, float)
_OPTIONAL_TEXT = (str, type(None))
_COMMON: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "kind": (str,),
    "self_test": (bool,),
    "date": (str,),
    "command": (str,),
    "gpu": (str,),
    "driver": _OPTIONAL_TEXT,
    "torch": (str,),
    "cuda": _OPTIONAL_TEXT,
    "commit": _OPTIONAL_TEXT,
    "sources": (str,),
}

_KERNEL: dict[str, tuple[type, ...]] = {
    "kernel": (str,),
    "dtype": (str,),
    "head_dim": (int,),
    "heads": (int,),
    "kv_heads": (int,),
    "batch": (int,),
    "seqlen": (int,),
    "causal": (bool,),
}

_STEP: dict[str, tuple[type, ...]] = {
    **_KERNEL,
    "geometry": (str,),
    "ms": _NUMBER,
    "tflops": _NUMBER,
    "repetitions": (int,),
    "of_dense": (dict,),
    "rate": (dict,),
}

_POINT: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "dtype": (str,),
    "seqlen": (int,),
    "candidate": (str,),
    "axis": (str,),
    "asked": _NUMBER,
    "contexts": (list,),
    "calibration_contexts": (list,),
    "sparsity": (list,),
}

# Times to first token.
_FIRST_TOKEN: dict[str, tuple[type, ...]] = {
    "implementation": (str,),
    "model": (str,),
    "seqlen": (int,),
    "asked": (str,),
    "sparsity": _NUMBER,
    "rule": _OPTIONAL_TEXT,
    "geometry": _OPTIONAL_TEXT,
    "ms": _NUMBER,
    "repetitions": (int,),
    "speedup": (dict,),
}

# The fields that a record must have, by its kind, with their types. More are welcome.
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "attention": {
        **_COMMON,
        **_KERNEL,
        "inputs": (str,),
        "asked": (str,),
        "sparsity": _NUMBER,
        "rule": _OPTIONAL_TEXT,
        "geometry": _OPTIONAL_TEXT,
        "ms": _NUMBER,
        "tflops": _NUMBER,
        "repetitions": (int,),
        "speedup": (dict,),
    },
    "select_blocks": {
        **_COMMON,
        **_STEP,
        "rule": (str,),
        "precision": (str,),
        "voters": (int,),
    },
    "attend_blocks": {**_COMMON, **_STEP, "asked": (str,), "kept": _NUMBER},
    "prefill": {**_COMMON, **_FIRST_TOKEN, "attention_ms": _NUMBER},
    "serving": {**_COMMON, **_FIRST_TOKEN, "vllm": (str,)},
    "serving_load": {
        **_COMMON,
        "implementation": (str,),
        "model": (str,),
        "shortest": (int,),
        "seqlen": (int,),
        "answer": (int,),
        "rate": _NUMBER,
        "requests": (int,),
        "asked": (str,),
        "sparsity": _NUMBER,
        "rule": _OPTIONAL_TEXT,
        "geometry": _OPTIONAL_TEXT,
        "vllm": (str,),
        "ttft_ms": _NUMBER,
        "ttft_p99_ms": _NUMBER,
        "tokens_per_second": _NUMBER,
        "requests_per_second": _NUMBER,
    },
    "calibration": {
        **_COMMON,
        "model": (str,),
        "seqlen": (int,),
        "samples": (int,),
        "rule": (str,),
        "geometry": (str,),
        "dense_seconds": _NUMBER,
        "calibration_seconds": _NUMBER,
        "ratio": _NUMBER,
    },
    "calibration_phase": {
        **_COMMON,
        "model": (str,),
        "method": (str,),
        "seqlen": (int,),
        "serve_seqlen": (int,),
        "rule": (str,),
        "geometry": (str,),
        "voters": (int,),
        "phase": (str,),
        "dtype": (str,),
        "unit": (str,),
        "done": (int,),
        "whole": (int,),
        "seconds": _NUMBER,
        "seconds_each": _NUMBER,
        "whole_seconds_estimated": _NUMBER,
        "peak_gib": _NUMBER,
    },
    "overhead": {**_COMMON, "host_microseconds": (dict,)},
    "thresholds_study": {
        **_COMMON,
        "model": (str,),
        "seqlen": (int,),
        "contexts": (list,),
        "calibration_contexts": (list,),
        "candidate": (str,),
        "asked": _NUMBER,
        "sparsity": (list,),
        "kl": (list,),
        "nll_change": (list,),
    },
    "thresholds_study_summary": {**_COMMON, "compared": (dict,)},
    "selection_study": {
        **_COMMON,
        "model": (str,),
        "seqlen": (int,),
        "contexts": (list,),
        "rule": (str,),
        "geometry": (str,),
        "voters": (int,),
        "asked": _NUMBER,
        "peak_error": (dict,),
        "flips": _NUMBER,
        "sparsity": (dict,),
        "kl": (dict,),
    },
    "long_text": {
        **_COMMON,
        **_POINT,
        "kl": (list,),
        "nll_change": (list,),
        "by_position": (list,),
        "ms": _NUMBER,
        "attention_ms": _NUMBER,
        "repetitions": (int,),
        "speedup": (dict,),
        "attention_speedup": (dict,),
    },
    "extension": {
        # What it runs has no native kernels.
        **{name: types for name, types in _COMMON.items() if name != "sources"},
        "model": (str,),
        "dtype": (str,),
        "seqlen": (int,),
        "max_position_embeddings": (int,),
        "nll": (dict,),
        "nll_mean": (dict,),
        "needles": (list,),
    },
    "long_tasks": {**_COMMON, **_POINT, "scores": (list,), "depths": (list,)},
    "evaluation": {
        **_COMMON,
        "model": (str,),
        "task": (str,),
        "seqlen": (int,),
        "keys": (int,),
        "method": (str,),
        "rule": (str,),
        "geometry": (str,),
        "voters": (int,),
        "options": (dict,),
        "contexts": (list,),
        "sparsity": (list,),
    },
}


def share_text(text: str) -> str:
    """A share of blocks in one form, .5 and 0.50 as 0.5; "dense", which is no share, as it is."""
    return text if text == "dense" else f"{float(text) + 0.0:.12g}"


class LengthError(argparse.ArgumentTypeError, ValueError):
    """A length is malformed; argparse shows what it says."""


def parse_length(text: str) -> int:
    """A number of tokens: 65536 or 64K.

    Raises:
        LengthError: it is malformed, or 0.
    """
    if not re.fullmatch(r"[0-9]+[kK]?", text):
        raise LengthError(f"a length is a number of tokens such as 512 or 32K, got {text!r}")
    length = int(text[:-1]) << 10 if text[-1] in "kK" else int(text)
    if length < 1:
        raise LengthError(f"a length must be at least 1, got {text}")
    return length


def list_of(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A reader of several values with commas between them, for argparse."""

    def items(text: str) -> tuple[Any, ...]:
        return tuple(parse(item) for item in text.split(","))

    items.__name__ = "comma-separated list"
    return items


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """A reader of one of some names, for argparse."""
    known = tuple(names)

    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {text!r}")
        return text

    return parse


def parse_fraction(text: str) -> float:
    """A share from 0 to 1, for argparse."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return float(text)


def out_of(options: argparse.ArgumentParser, arguments: argparse.Namespace, name: str) -> Path:
    """Where records go: to ``--out``, else to the committed ones of that name.

    A self-test, on a CPU, must name its file: the reports take no records of one. ``options`` ends
    the program where it does not.
    """
    if arguments.out is not None:
        return Path(arguments.out)
    device = str(arguments.device)
    if device.startswith("cpu") or (device == "auto" and not torch.cuda.is_available()):
        options.error("a self-test must name its --out, which belongs in no report")
    return ROOT / "benchmarks" / "results" / f"{name}.jsonl"


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a program to its exit; what a user can mend is told in a line.

    BSFA_TRACEBACK=1 shows where it comes from. The exit status is then 2.
    """
    try:
        status = main()
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("BSFA_TRACEBACK"):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    sys.exit(status)


def check_record(record: Mapping[str, Any]) -> None:
    """Check that a record has the fields of its kind.

    Raises:
        ValueError: a field is missing, of another type, or not finite; the message names it.
    """
    kind = record.get("kind")
    fields = FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        raise ValueError(f"kind must be one of {', '.join(FIELDS)}, got {kind!r}")
    if record.get("schema") != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {record.get('schema')!r}")
    for name, types in fields.items():
        if name not in record:
            raise ValueError(f"a record of kind {kind} must have {name!r}; it has {sorted(record)}")
        value = record[name]
        mistaken = isinstance(value, bool) and bool not in types
        if mistaken or not isinstance(value, types):
            expected = " or ".join(t.__name__ for t in types)
            raise ValueError(f"{name} must be {expected}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value!r}")


class Results:
    """A JSON Lines file that grows by one checked record at a time.

    A measurement of several repetitions is written after each of them; ``report.latest`` says which
    of its records counts.
    """

    def __init__(self, path: Path) -> None:
        """Open the file at ``path`` for appending; its folder is made."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, record: Record) -> None:
        """Write one record.

        Raises:
            ValueError: it lacks a field of its kind.
        """
        check_record(record)
        line = json.dumps(record, allow_nan=False) + "\n"
        # In one write, so that a program that is stopped leaves no half of a line. A full disk may
        # have: what follows is a line of its own.
        with self.path.open("a+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(line.encode())


def read_records(path: Path) -> Iterator[Record]:
    """The records of a result file, checked.

    Raises:
        ValueError: a line is no record; the message names the file and line.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"a record must be an object, got {record!r}")
                check_record(record)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            yield record


@functools.cache
def sources() -> str:
    """Hash of the native library's sources: the names and contents in csrc and include."""
    package = ROOT / "packages" / "bsfa-kernel"
    digest = hashlib.sha256()
    for folder in ("csrc", "include"):
        for path in sorted((package / folder).rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                name = path.relative_to(package).as_posix()
                digest.update(f"{name}\0{len(content)}\0".encode())
                digest.update(content)
    return digest.hexdigest()[:16]


def environment(device: torch.device, *, command: str | None = None) -> Record:
    """What a record says about the machine and the code, the same for every record of a run.

    Args:
        device: where the benchmark runs. A CPU makes the records self-tests, which no report takes.
        command: how to run it again; by default this process's own command line.
    """
    gpu = device.type == "cuda"
    card = _query_card() if gpu else {}
    return {
        "schema": SCHEMA,
        "self_test": not gpu,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command or command_line(),
        "gpu": torch.cuda.get_device_name(device) if gpu else "none",
        "driver": card.get("driver_version"),
        "card": card,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _cudnn_version() if gpu else None,
        "python": platform.python_version(),
        "packages": _versions(
            "bsfa-kernel", "fa3-fwd", "flashinfer-python", "transformers", "triton", "vllm"
        ),
        "commit": _commit(),
        "sources": sources(),
    }


def _cudnn_version() -> int | None:
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


def command_line() -> str:
    """This process's command, without where it was started and where it writes to."""
    words = iter(sys.argv[1:])
    kept = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return shlex.join(kept)


def clocks(device: torch.device) -> dict[str, int]:
    """The card's clock, power and temperature now (MHz, W, °C), read only; empty where unknown."""
    if device.type != "cuda":
        return {}
    state: dict[str, int] = {}
    for name, read, unit in (
        ("sm_mhz", torch.cuda.clock_rate, 1),
        ("watts", torch.cuda.power_draw, 1000),
        ("celsius", torch.cuda.temperature, 1),
    ):
        # The management library is optional, and what it can read differs from card to card.
        with contextlib.suppress(Exception):
            state[name] = read(device) // unit
    return state


def _query_card() -> dict[str, str]:
    names = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")
    try:
        reply = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    values = reply.stdout.splitlines()[0].split(", ")
    return dict(zip(names, values, strict=False))


def _commit() -> str | None:
    try:
        reply = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("BSFA_COMMIT")
    return reply.stdout.strip()


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@dataclass(frozen=True)
class Timing:
    """The times of one call, in milliseconds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure that is reported."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median: below about 0.02 on a quiet card."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median

    def fields(self) -> Record:
        """The part of a record that says how well the time is known."""
        return {
            "ms": self.median,
            "ms_min": min(self.samples),
            "spread": self.spread,
            "repetitions": len(self.samples),
        }


@dataclass
class Measured:
    """Times of the calls that ran, and why the others did not."""

    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


# The card is kept waiting for so many times as long as the host last took to issue a turn.
_HEAD_START = 1.5
_LONGEST_WAIT_MS = 100.0  # for calls that themselves wait for the card
_CYCLES_A_MS = 2_000_000  # at no less than any card's clock


class Timer:
    """Times calls against each other with device events and a cold L2 cache.

    The calls take turns in rounds, so that a card that warms up or slows down does so for all of
    them alike. Each repetition first overwrites a buffer larger than any L2 cache. The card starts
    on a turn when the host has issued all of it, so that the host's overhead is not in the times.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        seconds: float = 0.5,
        rounds: int = 3,
        least: int = 6,
        most: int = 60,
        flush_bytes: int = 512 << 20,
    ) -> None:
        """Allocate the buffer.

        Args:
            device: where the calls run.
            seconds: about how long to repeat each call for, warm-up not counted.
            rounds: how often the calls take turns.
            least: smallest number of repetitions of a call.
            most: largest number of repetitions of a call.
            flush_bytes: size of the buffer; 0 keeps the caches warm.
        """
        self.device = device
        self.seconds = seconds
        self.rounds = rounds
        self.least = least
        self.most = most
        self._cuda = device.type == "cuda"
        self._flush = (
            torch.empty(flush_bytes, dtype=torch.int8, device=device)
            if self._cuda and flush_bytes
            else None
        )

    def measure(self, calls: Mapping[str, Callable[[], object]]) -> Measured:
        """Time the calls.

        Args:
            calls: what to time, by name. What a call returns is dropped.

        Returns:
            Timings, and the message of each call that raised while it was warmed up.
        """
        measured = Measured()
        repetitions: dict[str, int] = {}
        host_ms: dict[str, float] = {}  # to issue a repetition, last time
        for name, call in calls.items():
            try:
                call()
                times, host_ms[name] = self._repeat(call, 2, 0.0)
            except (RuntimeError, NotImplementedError) as error:  # out of memory included
                measured.failures[name] = " ".join(str(error).split())[:300]
                continue
            wanted = math.ceil(1000 * self.seconds / max(times[-1], 1e-3))
            count = min(max(wanted, self.least), self.most)
            repetitions[name] = math.ceil(count / self.rounds)
        samples: dict[str, list[float]] = {name: [] for name in repetitions}
        for _ in range(self.rounds):
            for name, count in repetitions.items():
                times, host_ms[name] = self._repeat(calls[name], count, host_ms[name])
                samples[name] += times
        measured.timings = {name: Timing(tuple(times)) for name, times in samples.items()}
        return measured

    def _repeat(
        self, call: Callable[[], object], count: int, host_ms: float
    ) -> tuple[list[float], float]:
        """Times of a turn, and how long the host took to issue one of its repetitions."""
        if not self._cuda:
            times = []
            for _ in range(count):
                start = time.perf_counter()
                call()
                times.append(1000 * (time.perf_counter() - start))
            return times, 0.0
        events = [(device_event(), device_event()) for _ in range(count)]
        wait = min(_HEAD_START * count * host_ms, _LONGEST_WAIT_MS)
        torch.cuda._sleep(int(_CYCLES_A_MS * wait))  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        for begin, end in events:
            if self._flush is not None:
                self._flush.zero_()
            begin.record()
            call()
            end.record()
        host_ms = 1000 * (time.perf_counter() - start) / count
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in events], host_ms


def device_event() -> Any:
    """An event that takes the time when the device reaches it."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Budget:
    """A number of seconds after which a benchmark starts nothing new."""

    def __init__(self, seconds: float | None) -> None:
        """Start the clock; None is a budget without end."""
        self._start = time.monotonic()
        self._seconds = math.inf if seconds is None else seconds

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def allows(self, expected: float = 0.0) -> bool:
        """Whether ``expected`` seconds more fit."""
        return self.spent + expected <= self._seconds


def progress(message: str) -> None:
    """A line for whoever watches, on stderr, so that stdout stays for results."""
    print(message, file=sys.stderr, flush=True)
