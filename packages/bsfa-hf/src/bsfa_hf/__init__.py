# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Block-sparse attention for the models of transformers.

Importing this package makes ``attn_implementation="bsfa"`` known to transformers. `enable`,
`disable` and `enabled` switch a model; the names of the paper's repository are here too.
"""

from bsfa_calib.point import Point
from bsfa_calib.reasons import Reason
from bsfa_calib.statistics import Statistics
from bsfa_hf import attention as _attention
from bsfa_hf import baselines as _baselines
from bsfa_hf._version import __version__
from bsfa_hf.integration import disable, enable, enabled, reset, stats
from bsfa_hf.paper import (
    AttentionConfig,
    change_attention_config,
    create_attention_config_from_env,
    get_current_attention_config,
    inject_custom_attention,
    restore_original_attention,
    update_block_sparse_topk,
    update_sparge_attn_params,
)

_attention.register()
_baselines.register()

__all__ = [
    "AttentionConfig",
    "Point",
    "Reason",
    "Statistics",
    "__version__",
    "change_attention_config",
    "create_attention_config_from_env",
    "disable",
    "enable",
    "enabled",
    "get_current_attention_config",
    "inject_custom_attention",
    "reset",
    "restore_original_attention",
    "stats",
    "update_block_sparse_topk",
    "update_sparge_attn_params",
]
