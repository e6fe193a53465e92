# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Write the golden vectors again: python make.py.

They come from tests/oracle.py, score by score, and not from the package, and pin its results for
ever. Do this only where docs/semantics.md changes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import oracle  # noqa: E402

RULES = ("absolute", "running_max", "peak_lse")
GEOMETRIES = ((128, 64), (64, 64))
EVERY = 11  # of the output, this many-th row is stored


def main() -> None:
    """Two calls of 2 heads on 1 kv head: a later chunk of a prefill, and one without a mask."""
    for name, seed, seqlen_q, seqlen_k, causal, levels in (
        ("chunk", 1, 150, 333, True, (0.8, -0.5, -0.6)),
        ("full", 2, 70, 200, False, (0.8, 0.6, 0.3)),
    ):
        random = np.random.default_rng(seed)
        shapes = (1, seqlen_q, 2, 64), (1, seqlen_k, 1, 64), (1, seqlen_k, 1, 64)
        q, k, v = (random.standard_normal(shape).astype(np.float16) for shape in shapes)
        # Blocks of keys are loud or quiet, so that verdicts differ.
        loudness = random.uniform(0.1, 0.6, -(-seqlen_k // 64)).repeat(64)[:seqlen_k]
        k = (k * loudness[None, :, None, None]).astype(np.float16)
        stored: dict[str, np.ndarray] = {"q": q, "k": k, "v": v}
        for rule, level in zip(RULES, levels, strict=True):
            for q_block, k_block in GEOMETRIES:
                thresholds = level + random.uniform(-0.3, 0.3, (2, 4))
                thresholds = thresholds.astype(np.float32)
                expected = oracle.attend(
                    *(x.astype(np.float64) for x in (q, k, v, thresholds)),
                    causal=causal,
                    scale=0.125,
                    rule=rule,
                    q_block=q_block,
                    k_block=k_block,
                )
                key = f"{rule}.{q_block}x{k_block}"
                stored[f"{key}.thresholds"] = thresholds
                stored[f"{key}.out"] = np.ascontiguousarray(expected.out[:, ::EVERY])
                stored[f"{key}.lse"] = expected.lse
                stored[f"{key}.mask"] = expected.mask
                stored[f"{key}.maxima"] = expected.maxima
                print(name, key, expected.mask.astype(int).tolist())
        path = HERE / f"{name}.safetensors"
        save_file(stored, str(path), metadata={"causal": str(int(causal))})
        path.chmod(0o644)


if __name__ == "__main__":
    main()
