# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The releases of vLLM whose interfaces this package was written for and tested with."""

from __future__ import annotations

import re

FIRST = (0, 26)
"""Oldest minor release that is supported: K and V lie packed in one tensor from here on."""
LAST = (0, 33)
"""Newest minor release that is supported."""


class UnsupportedVersionError(RuntimeError):
    """This release of vLLM is not one that the back end was made for."""


def window() -> str:
    """The supported releases, in words."""
    return f"{FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]}"


def is_supported(version: str) -> bool:
    """Whether a release is within the window.

    Args:
        version: as ``vllm.__version__``; what follows the minor release does not count.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and FIRST <= (int(found[1]), int(found[2])) <= LAST


def check_version(version: str) -> None:
    """Refuse a release outside the window.

    Raises:
        UnsupportedVersionError: it is.
    """
    if not is_supported(version):
        raise UnsupportedVersionError(
            f"bsfa-vllm supports vLLM {window()}, and this is {version}: install one of those, or "
            "choose another attention back end"
        )
