# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Block-sparse prefill inside vLLM.

vLLM finds this package by its entry point; nothing needs to be imported to serve with it. What is
here reads the statistics of an engine, in its process or in another.
"""

from bsfa_calib.reasons import Reason
from bsfa_vllm._version import __version__
from bsfa_vllm.counting import Report, reports, statistics
from bsfa_vllm.versions import UnsupportedVersionError

__all__ = [
    "Reason",
    "Report",
    "UnsupportedVersionError",
    "__version__",
    "reports",
    "statistics",
]
