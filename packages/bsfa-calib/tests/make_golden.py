# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The golden threshold files; run this file to make that of the current version and its checksum.

There is one of each format version without a checksum, and one with. They stay as they are for
ever: every reader must read them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bsfa_calib import ThresholdTable
from bsfa_calib.thresholds import FORMAT_VERSION


def golden_table(version: int = 1) -> ThresholdTable:
    """A small table with every field of a format version filled in."""
    thresholds = np.arange(2 * 2 * 3 * 4, dtype=np.float32).reshape(2, 2, 3, 4) / 8 - 2
    thresholds[:, :, :, 0] = -np.inf
    thresholds[0, 1, 2, 3] = np.inf
    statistic = np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 2, 3)
    unmeasured = statistic.copy()
    unmeasured[0, 1] = np.nan
    return ThresholdTable(
        thresholds=thresholds,
        points=(16, 64),
        axis="k",
        q_block=128,
        k_block=64,
        rule="running_max",
        voters=1 if version == 1 else 4,
        model="example/tiny",
        revision="sha256:00ff",
        max_seqlen=512,
        samples=3,
        aggregate="pooled",
        provenance={"command": "bsfa-calibrate …", "data": "golden"},
        statistics={"sparsity": statistic, "held_out_kept": unmeasured},
    )


if __name__ == "__main__":
    golden = Path(__file__).parent / "golden"
    golden_table(FORMAT_VERSION).save(golden / f"v{FORMAT_VERSION}-checksum.safetensors")
