# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Calls on a GPU go to the caller's stream, synchronise nothing, and can be captured in a graph."""

from __future__ import annotations

import math

import pytest
import torch

import cases
from bsfa_kernel import block_maxima, block_sparse_attention

pytestmark = pytest.mark.gpu

CASE = cases.Case(
    "graph", "", batch=2, seqlen_q=700, seqlen_k=700, heads=4, kv_heads=2, head_dim=128
)


@pytest.fixture
def inputs(arch):
    """q, k, v and thresholds on the GPU, the kernels having run once."""
    arch.require("forward", torch.bfloat16, CASE.head_dim)
    q, k, v = CASE.inputs(torch.bfloat16, "cuda")
    thresholds = torch.full((4, 1), 2.5, device="cuda")
    everything(q, k, v, thresholds, "absolute")
    torch.cuda.synchronize()
    return q, k, v, thresholds


def everything(q, k, v, thresholds, rule):
    return block_sparse_attention(q, k, v, thresholds, rule=rule, return_lse=True, return_kept=True)


def test_a_graph_replays_the_call_on_new_inputs(inputs, rule):
    q, k, v, thresholds = inputs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(q, k, v, thresholds, rule)
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape, generator=generator, device="cuda"))
        thresholds.fill_(-math.inf if seed == 0 else float(seed))
        for output in captured:
            output.zero_()
        graph.replay()
        for found, expected in zip(captured, everything(*inputs, rule), strict=True):
            assert torch.equal(found, expected)


def test_packed_sequences_can_be_captured(inputs):
    q, k, v, thresholds = (x[0] if x.dim() == 4 else x for x in inputs)
    starts = torch.tensor([0, 100, 350, 700], dtype=torch.int32, device="cuda")

    def attend():
        return block_sparse_attention(
            q, k, v, thresholds, cu_seqlens_q=starts, cu_seqlens_k=starts, return_kept=True
        )

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    starts[1], starts[2] = 64, 65
    graph.replay()
    for found, expected in zip(captured, attend(), strict=True):
        assert torch.equal(found, expected)


def test_block_maxima_can_be_captured(inputs, arch, rule):
    arch.require("block_maxima", torch.bfloat16, CASE.head_dim)
    q, k, *_ = inputs
    block_maxima(q, k, rule=rule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = block_maxima(q, k, rule=rule)
    q.neg_()
    graph.replay()
    assert torch.equal(captured, block_maxima(q, k, rule=rule))


def test_a_call_waits_for_its_own_stream_only(inputs):
    q, k, v, thresholds = inputs
    expected = everything(-q, k, v, thresholds, "absolute")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        q.neg_()
        found = everything(q, k, v, thresholds, "absolute")
    side.synchronize()
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_a_call_returns_before_the_gpu_has_done_it(inputs, rule):
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)
        everything(*inputs, rule)
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "the call waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def test_a_call_allocates_its_outputs_and_nothing_else(inputs):
    torch.cuda.synchronize()
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    outputs = everything(*inputs, "absolute")
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated() - before
    needed = sum(x.numel() * x.element_size() for x in outputs)
    assert allocated <= needed + 3 * 512
    assert torch.cuda.mem_get_info()[0] >= free - 2 * 2**20
