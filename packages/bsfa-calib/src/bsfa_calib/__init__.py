# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Threshold tables for block-sparse attention: their file format, and how to calibrate them.

Only numpy and safetensors are needed to read, write and estimate tables. Capturing a model's scores
(`bsfa_calib.capture`, `bsfa_calib.models`) needs the extra ``capture``.
"""

from bsfa_calib._version import __version__
from bsfa_calib.point import Point
from bsfa_calib.thresholds import ThresholdFileError, ThresholdTable

__all__ = ["Point", "ThresholdFileError", "ThresholdTable", "__version__"]
