# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What vLLM calls in each of its processes, by the entry point ``vllm.general_plugins``."""

from __future__ import annotations

import logging
import os

from bsfa_vllm import metrics
from bsfa_vllm.counting import check_folder, interval
from bsfa_vllm.versions import check_version, is_supported, window

logger = logging.getLogger("vllm.bsfa")


def register() -> None:
    """Make the back end known to vLLM: as CUSTOM, and as BSFA where names can be added.

    On the CPU platform vLLM takes no other back end than its own, so that one is replaced; it does
    what it did where no table is named. Outside the supported window the back end refuses to be
    chosen, and nothing else is touched.

    Raises:
        UnsupportedVersionError: a table is named, and this release is outside the window.
        ValueError: BSFA_STATISTICS_INTERVAL is not a positive number, or BSFA_STATISTICS names what
            cannot be a folder.
    """
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        if is_supported(vllm.__version__):
            register_backend(AttentionBackendEnum.CPU_ATTN, "bsfa_vllm.cpu.CPUBackend")
        elif os.environ.get("BSFA_THRESHOLDS"):
            check_version(vllm.__version__)
        else:
            logger.warning("bsfa-vllm is left out: it supports vLLM %s", window())
            return
    else:
        register_backend(AttentionBackendEnum.CUSTOM, "bsfa_vllm.cuda.CUDABackend")
        # A name is added once, and this may be called again.
        if hasattr(AttentionBackendEnum, "register") and not hasattr(AttentionBackendEnum, "BSFA"):
            register_backend("BSFA", "bsfa_vllm.cuda.NamedCUDABackend")
    # Processes that are started from here on write their statistics to the same place.
    check_folder()
    interval()
    metrics.register()
