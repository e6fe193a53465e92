# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What the commands share: converters of arguments, errors in one line, names of files."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from bsfa_calib.report import printable

USAGE_ERROR = 2
INTERRUPTED = 130
NO_READER = 141

# Suffixes of the paper's files, which tables do not have.
_FOREIGN = (".pt", ".pth", ".bin", ".json")

_Value = TypeVar("_Value")


class Parser(argparse.ArgumentParser):
    """Points to the help on errors."""

    def error(self, message: str) -> NoReturn:
        """Print the message and where help is."""
        print(f"{self.prog}: error: {message}\nSee {self.prog} --help.", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def guarded(program: str, action: Callable[[], int]) -> int:
    """Run a command; what a user can mend is told in a line rather than in a traceback.

    Args:
        program: what the user called, for messages and warnings.
        action: the command; gives the exit status.

    Returns:
        The exit status: that of the command, 2 after an error, 130 after Ctrl-C, 141 where nobody
        reads the output any more, as behind ``| head``.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{program}: %(levelname)s: %(message)s"))
    logger = logging.getLogger("bsfa_calib")
    logger.addHandler(handler)
    try:
        status = action()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # What is left in the buffer would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("BSFA_TRACEBACK"):
            raise
        print(f"{program}: error: {_in_a_line(error)}", file=sys.stderr)
        return USAGE_ERROR
    finally:
        logger.removeHandler(handler)


def _in_a_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        extra = "plot" if (error.name or "").startswith("matplotlib") else "capture"
        return f"this command needs {error.name}, which the extra bsfa-calib[{extra}] brings"
    return printable(" ".join(str(error).split())) or type(error).__name__


def note(text: str) -> None:
    """Tell the user what is going on, on stderr."""
    print(text, file=sys.stderr, flush=True)


def checked(convert: Callable[[str], _Value]) -> Callable[[str], _Value]:
    """A converter whose ValueError argparse shows in full."""

    def converted(text: str) -> _Value:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converted


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    if value < 1:
        raise ValueError(f"must be an integer from 1 to 999999999, got {text!r}")
    return value


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    try:
        return 0 if text == "0" else positive(text)
    except ValueError:
        raise ValueError(f"must be an integer from 0 to 999999999, got {text!r}") from None


def seed(text: str) -> int:
    """What random numbers are drawn with: a whole number of at least 0."""
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError(f"a seed must be a whole number of at least 0, got {text[:80]!r}")
    return int(text)


def ceiling(text: str) -> float:
    """A bound of thresholds, which may be infinite."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value:
        raise ValueError(f"a threshold must be a number, got {text!r}")
    return value


def sparsity(text: str) -> float:
    """A share of blocks to skip."""
    value = _number(text)
    if not 0 <= value < 1:
        raise ValueError(f"a sparsity must be at least 0 and below 1, got {text!r}")
    return value


def loss(text: str) -> float:
    """A bound on the loss."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"a bound on the loss must be finite and above 0, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0


def k_values(text: str) -> tuple[int, ...]:
    """The numbers in a list such as ``4-64`` or ``16,32,64-68``, ascending.

    Raises:
        ValueError: the text is not such a list.
    """
    values: set[int] = set()
    for part in text.replace(" ", ",").split(","):
        if not part:
            continue
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"k values must be like '16,32,64' or '4-64', got {text!r}")
        low, high = int(first), int(last) if dash else int(first)
        if low < 1 or high < low or high > 1_000_000:
            raise ValueError(
                f"k values must be at least 1 and ranges must ascend, got {part!r} in {text!r}"
            )
        values.update(range(low, high + 1))
    if not values:
        raise ValueError("no k value is given")
    return tuple(sorted(values))


def table_path(name: str | os.PathLike[str]) -> Path:
    """Where a table is written that is to be called so; its suffix is ``.safetensors``.

    Names may hold dots, as those of models do: only suffixes of other files are replaced.

    Raises:
        ValueError: there is a directory of that name.
    """
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name a file in it")
    if path.suffix == ".safetensors":
        return path
    stem = path.stem if path.suffix in _FOREIGN else path.name
    renamed = path.with_name(f"{stem}.safetensors")
    note(f"note: tables are safetensors files, so {printable(str(renamed))} is written")
    return renamed
