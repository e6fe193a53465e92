# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Is it worth it? A model's accuracy under block-sparse attention and its peers, against dense.

``bsfa evaluate`` and ``bsfa plot`` are the command line; docs/evaluation.md says what each figure
means.
"""

from bsfa_calib import text

__all__ = ["text"]
