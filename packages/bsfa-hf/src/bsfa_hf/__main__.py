# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""``python -m bsfa_hf`` is the command ``bsfa``."""

import sys

from bsfa_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())
