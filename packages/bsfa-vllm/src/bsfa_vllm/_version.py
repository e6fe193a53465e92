# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The version of the package, as in pyproject.toml (a test compares the two)."""

__version__ = "0.1.0"
