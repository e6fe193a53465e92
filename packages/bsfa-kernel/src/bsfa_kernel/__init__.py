# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause

"""Block-sparse attention for long prompts: no work where it cannot matter.

``block_sparse_attention``, its two steps ``select_blocks`` and ``attend_blocks``, and
``block_maxima`` take torch tensors; CPU tensors are computed by ``bsfa_kernel.reference``, CUDA
tensors by the native library that ``build_info()`` describes.
"""

from bsfa_kernel import reference
from bsfa_kernel._auto import CROSSOVERS, resolve_selection
from bsfa_kernel.attention import block_maxima, block_sparse_attention
from bsfa_kernel.build_info import BuildInfo, Kernel, build_info, package_version
from bsfa_kernel.geometry import DEFAULT_GEOMETRY, GEOMETRIES, Geometry, threshold_row
from bsfa_kernel.masks import pack_blocks, unpack_blocks
from bsfa_kernel.rules import PRECISIONS, RULES, SELECTIONS, VOTERS
from bsfa_kernel.selection import attend_blocks, select_blocks

__version__ = package_version()

__all__ = [
    "CROSSOVERS",
    "DEFAULT_GEOMETRY",
    "GEOMETRIES",
    "PRECISIONS",
    "RULES",
    "SELECTIONS",
    "VOTERS",
    "BuildInfo",
    "Geometry",
    "Kernel",
    "attend_blocks",
    "block_maxima",
    "block_sparse_attention",
    "build_info",
    "pack_blocks",
    "reference",
    "resolve_selection",
    "select_blocks",
    "threshold_row",
    "unpack_blocks",
]
