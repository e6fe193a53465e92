# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What a user sets: the table, the operating point, and how blocks are chosen.

``--additional-config '{"bsfa": {...}}'`` comes first, then environment variables of the names that
bsfa-hf reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bsfa_calib.point import AXES, Point, as_point
from bsfa_kernel import SELECTIONS

KEY = "bsfa"
_NAMES = ("thresholds", "point", *AXES, "selection", "check_model")


@dataclass(frozen=True)
class Settings:
    """How an engine runs block-sparse.

    Attributes:
        thresholds: path of the threshold table.
        point: the operating point; None takes the table's only one.
        selection: from what scores blocks are chosen, one of ``bsfa_kernel.SELECTIONS``.
        check_model: whether the table must be of the model's name.
    """

    thresholds: str
    point: Point | None = None
    selection: str = "auto"
    check_model: bool = True


def read_settings(
    additional: Any = None, environment: Mapping[str, str] = os.environ
) -> Settings | None:
    """The settings of an engine.

    Args:
        additional: its ``additional_config``.
        environment: variables, of which ``BSFA_`` and a name in upper case are read.

    Returns:
        The settings; None where no table is named.

    Raises:
        ValueError: a name is unknown, a value cannot be read, or several points are named.
    """
    given = additional.get(KEY, {}) if isinstance(additional, Mapping) else {}
    if not isinstance(given, Mapping):
        raise ValueError(f"the additional config {KEY!r} must be an object, got {given!r}")
    unknown = sorted(set(given) - set(_NAMES), key=str)
    if unknown:
        raise ValueError(
            f"the additional config {KEY!r} takes {', '.join(_NAMES)}, got {unknown[0]!r}"
        )

    def find(name: str) -> tuple[str, Any]:
        value = given.get(name)
        if value is None or value == "":
            return f"BSFA_{name.upper()}", environment.get(f"BSFA_{name.upper()}") or None
        return f"{KEY}.{name}", value

    where, thresholds = find("thresholds")
    if thresholds is None:
        if given:
            raise ValueError(
                f"the additional config {KEY!r} names no table: set {KEY}.thresholds or the "
                "environment variable BSFA_THRESHOLDS to the path of one"
            )
        return None
    if not isinstance(thresholds, str):
        raise ValueError(f"{where} must be the path of a table, got {thresholds!r}")
    # A point in the configuration hides any in the environment.
    named = [name for name in ("point", *AXES) if given.get(name) not in (None, "")]
    found = [find(name) for name in named or ("point", *AXES)]
    points = [_point(*one) for one in found if one[1] is not None]
    if len(points) > 1:
        raise ValueError(f"name one operating point, got {' and '.join(map(str, points))}")
    where, selection = find("selection")
    if selection is not None and selection not in SELECTIONS:
        raise ValueError(f"{where} must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    return Settings(
        thresholds,
        points[0] if points else None,
        selection or "auto",
        _flag(*find("check_model")),
    )


def _point(where: str, value: Any) -> Point:
    axis = where.rpartition(".")[2].lower().removeprefix("bsfa_")
    try:
        if axis != "point":
            return Point(axis, float(value) if isinstance(value, str) else value)
        point = as_point(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    assert point is not None
    return point


def _flag(where: str, value: Any) -> bool:
    known = {None: True, True: True, False: False, "1": True, "0": False, "true": True}
    known["false"] = False
    name = value.lower() if isinstance(value, str) else value
    if not isinstance(name, (str, bool, type(None))) or name not in known:
        raise ValueError(f"{where} must be true or false, got {value!r}")
    return known[name]
