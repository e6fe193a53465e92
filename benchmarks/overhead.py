# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What a call costs on the host: its time until it returns, the GPU being done long before.

::

    python benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bsfa_kernel import _native, block_sparse_attention, build_info
from harness import Results, environment

# Calls in a row, fewer than a stream takes before it makes its host wait.
_CALLS = 200
_ROUNDS = 50


def host_microseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call on the host, in microseconds."""
    cuda = device.type == "cuda"
    rounds = _ROUNDS if cuda else 2
    times = []
    for _ in range(rounds + 1):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        times.append((time.perf_counter() - start) / _CALLS)
    if cuda:
        torch.cuda.synchronize()
    return 1e6 * statistics.median(times[1:])


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Host time of a call of attention.")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a self-test")
    parser.add_argument("--out", type=Path, help="JSON Lines file to append a record to")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    results = Results(arguments.out) if arguments.out else None
    q, k = (torch.randn(1, 64, heads, 64, device=device, dtype=torch.bfloat16) for heads in (2, 2))
    thresholds = torch.zeros((2, 1), device=device)
    operator: Callable[..., Any] = torch.ops.bsfa.forward.default
    options = (None, None, True, None, "absolute", 128, 64, 1, False, False)
    found: dict[str, float] = {}

    def measure(name: str, call: Callable[[], Any]) -> None:
        found[name] = host_microseconds(call, device)
        print(f"{name:44s} {found[name]:6.2f} us")

    with torch.inference_mode():
        for arch in build_info().architectures if device.type == "cuda" else (0,):
            with _native.force_arch(arch):
                name = f"bsfa_sm{arch}" if arch else "bsfa_reference"
                measure(name, lambda: block_sparse_attention(q, k, k, thresholds))
                measure(
                    f"{name}, lse and kept",
                    lambda: block_sparse_attention(
                        q, k, k, thresholds, return_lse=True, return_kept=True
                    ),
                )
                measure(
                    f"{name}, through the dispatcher",
                    lambda: operator(q, k, k, thresholds, *options),
                )
        heads_first = [x.transpose(1, 2) for x in (q, k)]
        if device.type == "cuda":
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                measure(
                    "fa2 (torch SDPA)",
                    lambda: scaled_dot_product_attention(
                        heads_first[0], heads_first[1], heads_first[1], is_causal=True
                    ),
                )
        measure("torch.empty_like", lambda: torch.empty_like(q))
    if results is not None:
        record = {**environment(device), "kind": "overhead", "host_microseconds": found}
        results.append(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
