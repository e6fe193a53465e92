# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Is it worth it? A model's accuracy under block-sparse attention and its peers, against dense.

``bsfa evaluate`` and ``bsfa plot`` are the command line; docs/evaluation.md says what each figure
means.
"""

from bsfa_hf.evaluation.cli import add_subcommands
from bsfa_hf.evaluation.configurations import (
    Configuration,
    ConfigurationError,
    make_configuration,
    parse_configuration,
)

__all__ = [
    "Configuration",
    "ConfigurationError",
    "add_subcommands",
    "make_configuration",
    "parse_configuration",
]
