# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Extend a small real model to texts of 32K tokens and more, and check that it reads them."""
