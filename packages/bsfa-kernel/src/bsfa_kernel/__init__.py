# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause

"""Block-sparse attention for long prompts: exact scores, and no value work where it cannot matter.

``block_sparse_attention`` and ``block_maxima`` take torch tensors; CPU tensors are computed by
``bsfa_kernel.reference``, CUDA tensors by the native library that ``build_info()`` describes.
"""

from bsfa_kernel import reference
from bsfa_kernel.attention import block_maxima, block_sparse_attention
from bsfa_kernel.build_info import BuildInfo, Kernel, build_info, package_version
from bsfa_kernel.geometry import DEFAULT_GEOMETRY, GEOMETRIES, Geometry, threshold_row
from bsfa_kernel.rules import RULES, VOTERS

__version__ = package_version()

__all__ = [
    "DEFAULT_GEOMETRY",
    "GEOMETRIES",
    "RULES",
    "VOTERS",
    "BuildInfo",
    "Geometry",
    "Kernel",
    "block_maxima",
    "block_sparse_attention",
    "build_info",
    "reference",
    "threshold_row",
]
