# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The reference back end's memory grows with the length, and not with its square."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

GIGABYTE = 2**30

PROGRAM = """
    import resource, sys
    import torch
    import bsfa_kernel

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    torch.set_num_threads(1)
    before = peak()
    q = torch.randn(1, int(sys.argv[1]), 32, 128)
    k, v = torch.randn(1, 8192, 8, 128), torch.randn(1, 8192, 8, 128)
    for rule in sys.argv[2:]:
        threshold = {"absolute": 4.0, "running_max": -1.0, "peak_lse": -3.0}[rule]
        thresholds = torch.full((32, 64), threshold)
        bsfa_kernel.block_sparse_attention(q, k, v, thresholds, rule=rule, return_kept=True)
        if q.shape[1] < 8192:
            bsfa_kernel.block_maxima(q, k, rule=rule)
    print(peak() - before)
"""


def peak_bytes(seqlen_q: int, *rules: str) -> int:
    """Peak memory, beyond its libraries, of a process that attends to 8192 keys with 32 heads."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(seqlen_q), *rules],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_8k_tokens_of_32_heads_take_less_than_2_gb():
    # All scores at once would take 8.6 GB.
    assert peak_bytes(8192, "absolute") < 2 * GIGABYTE


def test_the_last_chunk_of_8k_tokens_takes_less_than_1_gb_under_every_rule():
    assert peak_bytes(256, "absolute", "running_max", "peak_lse") < GIGABYTE
