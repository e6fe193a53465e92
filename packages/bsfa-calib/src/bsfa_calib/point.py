# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The operating point: which of a table's thresholds to use."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypedDict

if TYPE_CHECKING:
    from typing_extensions import Unpack

AXES = ("k", "target_sparsity", "max_loss")
_LARGEST = 1 << 31


class PointOptions(TypedDict, total=False):
    """A point as keyword arguments: one of these.

    Attributes:
        k: unforced key blocks that a query block keeps on average, at least 1.
        target_sparsity: share of the visible blocks that is skipped, in [0, 1).
        max_loss: bound on the KL divergence from dense, in nats, at least 0.
    """

    k: int | None
    target_sparsity: float | None
    max_loss: float | None


@dataclass(frozen=True)
class Point:
    """An operating point.

    Attributes:
        axis: one of ``AXES``; `PointOptions` says what each means.
        value: the number on it; an integer for ``"k"``.

    Raises:
        TypeError: the value is not a number.
        ValueError: there is no such axis, or the value is out of its range.
    """

    axis: str
    value: float

    def __post_init__(self) -> None:
        """Check the value."""
        if self.axis not in AXES:
            raise ValueError(f"axis must be one of {', '.join(AXES)}, got {self.axis!r}")
        value: object = self.value
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{self.axis} must be a number, got {value!r}")
        if isinstance(value, numbers.Integral) and abs(int(value)) > _LARGEST:
            raise ValueError(f"{self.axis} must be at most {_LARGEST}")
        number = float(value)
        if self.axis == "k":
            if not math.isfinite(number) or number != int(number) or number < 1:
                raise ValueError(f"k must be an integer of at least 1, got {value!r}")
            object.__setattr__(self, "value", int(number))
            return
        if not math.isfinite(number) or number < 0:
            raise ValueError(f"{self.axis} must be finite and at least 0, got {value!r}")
        if self.axis == "target_sparsity" and number >= 1:
            raise ValueError(f"target_sparsity must be in [0, 1), got {value!r}")
        object.__setattr__(self, "value", number)

    @classmethod
    def parse(cls, text: str) -> Point:
        """Read what ``str()`` writes, as ``target_sparsity=0.75`` or ``k=32``.

        Raises:
            ValueError: the text is not a point.
        """
        axis, equals, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(
                f"a point is written AXIS=NUMBER with an axis of {', '.join(AXES)}, as "
                f"target_sparsity=0.75; got {text!r}"
            )
        return cls(axis.strip(), value)

    def __str__(self) -> str:
        return f"{self.axis}={self.value:.10g}"


PointLike: TypeAlias = Point | str


def as_point(point: PointLike | None = None, **named: Unpack[PointOptions]) -> Point | None:
    """The one point that the arguments name.

    Args:
        point: a point, or its text.
        named: or the point by the name of its axis; None stands for not given.

    Returns:
        The point; None if none is named.

    Raises:
        TypeError: an argument that is no axis, or a value that is not a number.
        ValueError: several points are named, or one that is out of range.
    """
    unknown = set(named) - set(AXES)
    if unknown:
        raise TypeError(f"a point is named by {', '.join(AXES)}, got {sorted(unknown)[0]}")
    given = [Point(axis, value) for axis, value in named.items() if value is not None]  # type: ignore[arg-type]
    if point is not None:
        given.append(Point.parse(point) if isinstance(point, str) else point)
        if not isinstance(given[-1], Point):
            raise TypeError(f"a point is a Point or its text, got {point!r}")
    if len(given) > 1:
        raise ValueError(f"name one operating point, got {' and '.join(map(str, given))}")
    return given[0] if given else None
