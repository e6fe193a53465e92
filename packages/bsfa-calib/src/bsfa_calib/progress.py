# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Progress on a terminal or in a log, and a Ctrl-C that loses nothing."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from bsfa_calib.capture import Progress

# Seconds between lines about layers where progress goes into a log.
_LOG_INTERVAL = 30.0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed, and what was in progress is done and kept."""


class ProgressReporter:
    """Shows samples, layers and the time left; one changing line on a terminal, else a log."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Write to a stream, by default stderr."""
        self._stream = stream if stream is not None else sys.stderr
        self._live = self._stream.isatty()
        self._started: float | None = None
        self._last_line = time.monotonic()
        self._resumed = 0
        self._stop = False

    def __call__(self, progress: Progress) -> None:
        """Show how far the calibration is.

        Raises:
            Interrupted: Ctrl-C was pressed, and a sample has been finished since.
        """
        now = time.monotonic()
        if self._started is None:
            self._started = now
        if progress.layer is None:
            self._resumed += progress.resumed
            text = f"sample {progress.sample}/{progress.samples} done"
            text += " before" if progress.resumed else self._time(progress, now)
        else:
            text = (
                f"sample {progress.sample + 1}/{progress.samples} ({progress.seqlen} tokens), "
                f"layer {progress.layer}/{progress.layers}{self._time(progress, now)}"
            )
        if self._live:
            self._stream.write(f"\r\x1b[2K{text}")
            self._stream.flush()
        elif progress.layer is None or now - self._last_line > _LOG_INTERVAL:
            self._line(text)
        if self._stop and progress.layer is None:
            raise Interrupted(f"{progress.sample} of {progress.samples} samples are done")

    def note(self, text: str) -> None:
        """Show a line about something that is done and kept.

        Raises:
            Interrupted: Ctrl-C was pressed meanwhile.
        """
        self._line(text)
        if self._stop:
            raise Interrupted(text)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C stop after what is in progress, and a second one at once."""

        def stop(_number: int, _frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True
            self._line("stopping as soon as this is done and kept; press Ctrl-C again to stop now")

        try:
            before = signal.signal(signal.SIGINT, stop)
        except ValueError:  # not the main thread: signals are not ours to handle
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            if self._live:
                self._stream.write("\n")

    def _line(self, text: str) -> None:
        self._stream.write(f"\n{text}\n" if self._live else f"{text}\n")
        self._stream.flush()
        self._last_line = time.monotonic()

    def _time(self, progress: Progress, now: float) -> str:
        """Time taken and left, the samples to come taking as long as those measured so far."""
        if self._started is None:
            return ""
        taken = now - self._started
        done = progress.sample + (progress.layer or 0) / progress.layers
        measured = done - self._resumed
        if measured <= 0:
            return ""
        left = taken / measured * (progress.samples - done)
        return f", {clock(taken)} taken, about {clock(left)} left"


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
