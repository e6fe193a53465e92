# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""``python -m bsfa_calib.cli``."""

import sys

from bsfa_calib.cli import main

sys.exit(main())
