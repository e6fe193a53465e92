# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Statistics of an engine: kept blocks and fallbacks, in the log, in files, and from Python.

vLLM runs its layers in processes of their own, and gives a back end no way to tell the front end
anything. So each rank writes what it counted into a file of a folder that all processes of an
engine know by the environment variable BSFA_STATISTICS. A thread does so, every
BSFA_STATISTICS_INTERVAL seconds if there is something new: it may wait for the device, the thread
that runs the model does not.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import logging
import math
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from bsfa_calib.thresholds import write_atomically
from bsfa_vllm.binding import Engine, engines, forget_engines

FOLDER, INTERVAL = "BSFA_STATISTICS", "BSFA_STATISTICS_INTERVAL"
_SECONDS = 10.0
_PREFIX = "bsfa-"
SPARSE = ("exact", "int8")
"""How block-sparse calls choose their blocks; every other outcome of a call is a reason."""
# Methods of vLLM's workers under which steps are no user's, and graphs are captured.
_WARM_UP = frozenset({"compile_or_warm_up_model", "determine_available_memory"})

logger = logging.getLogger("vllm.bsfa")


@dataclass
class Report:
    """What an engine has counted, over its ranks. A call is one request in one layer of one step.

    Attributes:
        engine: vLLM's name of the engine.
        description: the model and operating point of the thresholds.
        started: seconds since the epoch.
        sparse_calls: block-sparse calls, by how they chose their blocks, "exact" or "int8".
        dense_calls: calls that vLLM's own attention ran, by reason, the most frequent first.
        dense_layers: layers that run dense whatever the step, and why.
        kept_blocks: for each layer, key blocks that were kept, over all heads.
        visible_blocks: for each layer, those that could have been.
    """

    engine: str = ""
    description: str = ""
    started: float = 0.0
    sparse_calls: dict[str, int] = field(default_factory=dict)
    dense_calls: dict[str, int] = field(default_factory=dict)
    dense_layers: dict[int, str] = field(default_factory=dict)
    kept_blocks: list[int] = field(default_factory=list)
    visible_blocks: list[int] = field(default_factory=list)

    @property
    def kept_fraction(self) -> list[float]:
        """For each layer, the share of the visible blocks that was kept; NaN where none were."""
        pairs = zip(self.kept_blocks, self.visible_blocks, strict=True)
        return [kept / visible if visible else math.nan for kept, visible in pairs]

    @property
    def mean_kept_fraction(self) -> float:
        """Share of the visible blocks that was kept; NaN where none were visible."""
        visible = sum(self.visible_blocks)
        return sum(self.kept_blocks) / visible if visible else math.nan

    def __str__(self) -> str:
        """A line for people."""
        sparse = sum(self.sparse_calls.values())
        words = [f"{sparse} block-sparse calls"]
        if sparse:
            words[0] += f" kept {self.mean_kept_fraction:.1%} of the visible blocks"
        if self.sparse_calls.get("int8"):
            words[0] += f" ({self.sparse_calls['int8']} chose in 8 bits)"
        words += [f"{number} dense: {reason}" for reason, number in self.dense_calls.items()]
        return "; ".join(words)


def snapshot(engine: Engine) -> dict[str, Any]:
    """What one rank has counted, as it is written. Waits for the device."""
    statistics = engine.state.statistics
    visible = [blocks * statistics.heads for blocks in statistics.visible_blocks]
    return {
        "engine": engine.identity,
        "rank": engine.rank,
        "started": engine.started,
        "description": engine.state.description,
        "calls": dict(engine.calls) if engine.counts_rows else {},
        "dense_layers": {str(layer): str(why) for layer, why in engine.dense_layers.items()},
        "kept": statistics.kept_blocks.sum(-1).tolist(),
        "visible": visible,
    }


def merged(snapshots: Iterable[dict[str, Any]]) -> list[Report]:
    """Reports of engines, the first to be started first, from snapshots of their ranks."""
    found: dict[str, Report] = {}
    calls: dict[str, Counter[str]] = {}
    for one in snapshots:
        name = one["engine"]
        report = found.setdefault(name, Report(name, one["description"], one["started"]))
        report.started = min(report.started, one["started"])
        report.dense_layers |= {int(layer): why for layer, why in one["dense_layers"].items()}
        calls.setdefault(name, Counter()).update(one["calls"])
        for total, part in ((report.kept_blocks, "kept"), (report.visible_blocks, "visible")):
            total[:] = map(sum, itertools.zip_longest(total, one[part], fillvalue=0))
    for name, report in found.items():
        report.sparse_calls = {how: calls[name].pop(how, 0) for how in SPARSE}
        report.dense_calls = {why: number for why, number in calls[name].most_common() if number}
    return sorted(found.values(), key=lambda report: report.started)


def reports(folder: str | os.PathLike[str] | None = None) -> list[Report]:
    """What the engines that write to a folder have counted, the first to be started first.

    Those of this process are read as they are; others are as old as their last writing, up to
    BSFA_STATISTICS_INTERVAL seconds (10 by default).

    Args:
        folder: by default that of the engines that this process starts, or what BSFA_STATISTICS
            names; one that is named keeps those of processes that have ended.
    """
    if folder is None:
        for engine in engines():
            # One that has counted nothing may be about to capture graphs: its device is let alone.
            if engine.served:
                _make_folder()
                _write(engine)
    paths = sorted(Path(folder or statistics_folder()).glob(f"{_PREFIX}*.json"))
    return merged(content for content in map(_read, paths) if content is not None)


def statistics(folder: str | os.PathLike[str] | None = None) -> Report:
    """What the engine that was started last has counted.

    Args:
        folder: as of `reports`.

    Raises:
        ValueError: no engine has counted anything yet.
    """
    found = reports(folder)
    if not found:
        raise ValueError(
            f"no engine has written statistics to {folder or statistics_folder()} yet: has it run "
            "a prompt with the back end of bsfa-vllm?"
        )
    return found[-1]


def statistics_folder() -> Path:
    """Where this process and those that it starts write statistics.

    It is made when something is first written, and removed when the process that chose it ends;
    one that BSFA_STATISTICS names stays.
    """
    if not os.environ.get(FOLDER):
        path = Path(tempfile.gettempdir()) / f"bsfa-vllm-{os.getpid()}-{secrets.token_hex(8)}"
        os.environ[FOLDER] = str(path)
        atexit.register(_remove, path, os.getpid())
    return Path(os.environ[FOLDER])


def warming_up(frame: FrameType | None) -> bool:
    """Whether a frame is run by vLLM's worker before it serves anything.

    Its steps look like requests of a user, and no argument tells them apart.
    """
    while frame is not None:
        if frame.f_code.co_name in _WARM_UP:
            return True
        frame = frame.f_back
    return False


def check_folder() -> None:
    """Refuse a folder of statistics that cannot be made or written to.

    Raises:
        ValueError: something in its path is no folder, or not ours to write to.
    """
    path = statistics_folder()
    usable = False
    with contextlib.suppress(OSError):  # such as of a name that is too long
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
        usable = there.is_dir() and os.access(there, os.W_OK)
    if not usable:
        raise ValueError(f"{FOLDER} must name a folder that can be written to, got {path}")


def interval() -> float:
    """Seconds between two writings.

    Raises:
        ValueError: BSFA_STATISTICS_INTERVAL is not a positive number.
    """
    text = os.environ.get(INTERVAL) or str(_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{INTERVAL} must be a positive number of seconds, got {text!r}")
    return min(seconds, threading.TIMEOUT_MAX)


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)


def _make_folder() -> None:
    statistics_folder().mkdir(mode=0o700, parents=True, exist_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    """What a rank has written; None where that is not what the file holds, or it is gone."""
    try:
        return _checked(json.loads(path.read_text()))
    except (OSError, ValueError, OverflowError, RecursionError):
        logger.debug("BSFA: no statistics in %s", path, exc_info=True)
        return None


def _checked(content: Any) -> dict[str, Any]:
    """What a snapshot is, as it was read.

    Raises:
        ValueError: it is something else.
    """
    fields = content if isinstance(content, dict) else {}
    calls, layers = fields.get("calls"), fields.get("dense_layers")
    kept, visible = fields.get("kept"), fields.get("visible")
    started = fields.get("started")
    if not (
        isinstance(fields.get("engine"), str)
        and isinstance(fields.get("description"), str)
        and isinstance(started, (int, float))
        and math.isfinite(started)
        and isinstance(calls, dict)
        and all(map(_is_count, calls.values()))
        and isinstance(layers, dict)
        and all(int(layer) >= 0 and isinstance(why, str) for layer, why in layers.items())
        and isinstance(kept, list)
        and isinstance(visible, list)
        and len(kept) == len(visible)
        and all(map(_is_count, kept + visible))
    ):
        raise ValueError(f"not what a rank writes: {str(content)[:200]}")
    return fields


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _write(engine: Engine) -> Report:
    content = snapshot(engine)
    folder = statistics_folder()
    # Once removed, by the process that chose it, it is not made again.
    if folder.is_dir():
        name = f"{_PREFIX}{engine.identity}-{engine.rank}-{os.getpid()}.json"
        write_atomically(folder / name, json.dumps(content).encode())
    (report,) = merged([content])
    return report


class _Writer(threading.Thread):
    """Writes and logs what the engines of this process count."""

    def __init__(self) -> None:
        super().__init__(name="bsfa-statistics", daemon=True)
        self._changed: set[Engine] = set()
        self._lock = threading.Lock()
        self._seconds = interval()
        self._ended = threading.Event()
        try:
            _make_folder()
        except OSError:
            logger.exception("BSFA: statistics cannot be written to %s", statistics_folder())
        atexit.register(self.finish)

    def add(self, engine: Engine) -> None:
        with self._lock:
            self._changed.add(engine)

    def run(self) -> None:
        while not self._ended.wait(self._seconds):
            # Another engine of this process may capture graphs, which reading the device would end.
            if not any(map(warming_up, sys._current_frames().values())):
                self.write()

    def write(self) -> None:
        with self._lock:
            pending, self._changed = self._changed, set()
        for engine in pending:
            try:
                report = _write(engine)
            except Exception:
                # As where the disk is full: the next time may do.
                logger.exception("BSFA: statistics of %s cannot be written", engine.identity)
                self.add(engine)
                continue
            if engine.counts_rows:
                logger.info("BSFA, %s: %s", report.description, report)

    def finish(self) -> None:
        """Write for the last time, when the process ends."""
        self._ended.set()
        if os.environ.get(FOLDER) and Path(os.environ[FOLDER]).exists():
            self.write()


_writer: _Writer | None = None
_start = threading.Lock()


def _after_fork() -> None:
    """Leave the engines of the process that forked to it: its thread is not in the child."""
    global _writer, _start
    if _writer is not None:
        atexit.unregister(_writer.finish)
    _writer, _start = None, threading.Lock()
    forget_engines()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def changed(engine: Engine) -> None:
    """Note that an engine has counted something: it is written and logged before long."""
    global _writer
    if _writer is None or _writer.ident is None:
        with _start:
            if _writer is None:
                _writer = _Writer()
                _writer.start()
    _writer.add(engine)
