# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Means with intervals: Student's t for averages of samples, Wilson's for shares of hits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_Z_975 = 1.959964


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval; without bounds where one sample gives none."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, good to 0.001.

    Raises:
        ValueError: ``degrees`` is less than 1.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {degrees}")
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = _Z_975
    first = (z**3 + z) / (4 * degrees)
    return z + first + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of samples, with the interval of a t test. For paired data, give the differences.

    Raises:
        ValueError: there are no values.
    """
    if len(values) == 0:
        raise ValueError("at least one value is needed")
    data = np.asarray(values, np.float64)
    mean = float(data.mean())
    if len(data) == 1:
        return Interval(mean, None, None)
    half = t_quantile(len(data) - 1) * float(data.std(ddof=1)) / math.sqrt(len(data))
    return Interval(mean, mean - half, mean + half)


def share_interval(hits: int, total: int) -> Interval:
    """Share of hits with Wilson's interval, which holds for few samples and for shares of 0 and 1.

    Raises:
        ValueError: ``hits`` is not between 0 and ``total``, or ``total`` is 0.
    """
    if total < 1 or not 0 <= hits <= total:
        raise ValueError(f"hits must be in 0..total and total at least 1, got {hits} of {total}")
    share = hits / total
    spread = _Z_975**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = _Z_975 / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))
