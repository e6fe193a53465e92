# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Calls on a GPU go to the caller's stream, synchronise nothing, and can be captured in a graph."""

from __future__ import annotations

import math

import pytest
import torch

import cases
from bsfa_kernel import (
    PRECISIONS,
    attend_blocks,
    block_maxima,
    block_sparse_attention,
    select_blocks,
)

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


@pytest.fixture
def both_steps(arch):
    """Skips the test where a step has no kernel."""
    for kernel in ("select_blocks", "attend_blocks"):
        arch.require(kernel, torch.bfloat16, CASE.head_dim)


def in_two_steps(q, k, v, thresholds, rule):
    return block_sparse_attention(
        q,
        k,
        v,
        thresholds,
        rule=rule,
        voters=4,
        selection="int8",
        return_lse=True,
        return_kept=True,
    )


def test_two_steps_can_be_captured_with_their_workspaces(both_steps, inputs, rule):
    q, k, v, thresholds = inputs
    in_two_steps(*inputs, rule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = in_two_steps(*inputs, rule)
    # Whatever else is allocated meanwhile takes nothing that the graph works in.
    others = [torch.full((1 << 24,), math.nan, device="cuda") for _ in range(4)]
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape, generator=generator, device="cuda"))
        thresholds.fill_(-math.inf if seed == 0 else 0.5 * seed)
        graph.replay()
        for found, expected in zip(captured, in_two_steps(*inputs, rule), strict=True):
            assert torch.equal(found, expected)
    assert all(x.isnan().all() for x in others)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_step_can_be_captured_for_packed_sequences(both_steps, inputs, precision):
    q, k, v, thresholds = (x[0] if x.dim() == 4 else x for x in inputs)
    starts = torch.tensor([0, 100, 350, 700], dtype=torch.int32, device="cuda")
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}

    def steps():
        mask = select_blocks(q, k, thresholds, precision=precision, max_seqlen_k=700, **packed)
        return mask, *attend_blocks(q, k, v, mask, return_kept=True, **packed)

    steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = steps()
    starts[1], starts[2] = 64, 65
    graph.replay()
    for found, expected in zip(captured, steps(), strict=True):
        assert torch.equal(found, expected)


def test_two_steps_return_before_the_gpu_has_done_them(both_steps, inputs, rule):
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        torch.cuda._sleep(1_000_000_000)
        in_two_steps(*inputs, rule)
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "the call waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


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


# Lets the next kernel start at once, and copies after a while.
COPY_LATE = r"""
extern "C" __global__ void copy_late(const unsigned char* from, unsigned char* to, int count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const long long start = clock64();
  while (clock64() - start < 2000000) {
  }
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    to[i] = from[i];
  }
}
"""


def copy_late(source, target):
    """Copies bytes by a kernel that says that the next one may start, and works on for 1 ms."""
    kernel = torch.cuda._compile_kernel(COPY_LATE, "copy_late")
    return lambda: kernel((8, 1, 1), (256, 1, 1), [source, target, source.numel()])


def run_eagerly(work, outputs):
    """Runs it and returns what it made, in memory that held NaN before."""
    stale = [torch.full_like(x, -1 if x.dtype == torch.int32 else math.nan) for x in outputs]
    torch.cuda.synchronize()
    del stale
    return work()


def run_as_graph(work, outputs):
    """Captures it on a stream of its own, replays it, and returns what the replay made."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()
    for x in made:
        x.fill_(-1 if x.dtype == torch.int32 else math.nan)
    graph.replay()
    return made


@pytest.mark.parametrize("run", [run_eagerly, run_as_graph])
class TestStartingEarly:
    """The sm_90a kernel may start before earlier work has ended, and must not read until then."""

    def test_inputs_written_by_a_kernel_that_lets_the_next_one_start(self, inputs, run):
        expected = everything(*inputs, "absolute")
        source = torch.cat([x.contiguous().view(torch.uint8).flatten() for x in inputs])
        target = torch.empty_like(source)
        copy = copy_late(source, target)

        def work():
            target.fill_(255)  # NaN, whatever the type
            copy()
            taken, end = [], 0
            for x in inputs:
                start, end = end, end + x.numel() * x.element_size()
                taken.append(target[start:end].view(x.dtype).view(x.shape))
            return everything(*taken, "absolute")

        for found, wanted in zip(run(work, expected), expected, strict=True):
            assert torch.equal(found, wanted)

    def test_the_two_steps_read_what_was_written_just_before(self, both_steps, inputs, run):
        expected = in_two_steps(*inputs, "peak_lse")
        source = torch.cat([x.contiguous().view(torch.uint8).flatten() for x in inputs])
        target = torch.empty_like(source)
        copy = copy_late(source, target)

        def work():
            target.fill_(255)  # NaN, whatever the type
            copy()
            taken, end = [], 0
            for x in inputs:
                start, end = end, end + x.numel() * x.element_size()
                taken.append(target[start:end].view(x.dtype).view(x.shape))
            return in_two_steps(*taken, "peak_lse")

        for found, wanted in zip(run(work, expected), expected, strict=True):
            assert torch.equal(found, wanted)

    def test_one_call_reading_what_the_last_one_wrote(self, inputs, run):
        q, k, v, thresholds = inputs

        def calls(between):
            x, made = q, []
            for _ in range(4):
                made += everything(x, k, v, thresholds, "absolute")
                between()
                x = made[-3]
            return tuple(made)

        expected = calls(torch.cuda.synchronize)
        found = run(lambda: calls(lambda: None), expected)
        for one, wanted in zip(found, expected, strict=True):
            assert torch.equal(one, wanted)

    def test_streams_that_join_with_copies(self, inputs, run):
        q, k, v, thresholds = inputs
        made_q, made_v = torch.empty_like(q), torch.empty_like(v)
        expected = everything(q, k, v, thresholds, "absolute")
        filler = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        other = torch.empty_like(filler)

        def work():
            made_q.fill_(math.nan)
            made_v.fill_(math.nan)
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                other.copy_(filler)
                made_q.copy_(q)
            made_v.copy_(v)
            here.wait_stream(side)
            return everything(made_q, k, made_v, thresholds, "absolute")

        for found, wanted in zip(run(work, expected), expected, strict=True):
            assert torch.equal(found, wanted)


def test_a_call_returns_before_the_gpu_has_done_it(inputs, rule):
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
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
