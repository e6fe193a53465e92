# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The operators under torch.compile, torch.export and autograd; fake tensors; opcheck."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import paging
from bsfa_kernel import (
    GEOMETRIES,
    _auto,
    _native,
    attend_blocks,
    block_maxima,
    block_sparse_attention,
    reference,
    select_blocks,
)

INF = math.inf
DIM = torch.export.Dim


def inputs(seqlen_q=300, seqlen_k=333, dtype=torch.float32, device="cpu", batch=2):
    generator = torch.Generator().manual_seed(seqlen_q + seqlen_k)
    shapes = (batch, seqlen_q, 6, 64), (batch, seqlen_k, 2, 64), (batch, seqlen_k, 2, 64)
    q, k, v = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    return q, k, v, torch.full((6, 3), 2.5, device=device)


def packed_inputs():
    q, k, v, thresholds = inputs()
    starts_q = torch.tensor([0, 100, 300], dtype=torch.int32)
    starts_k = torch.tensor([0, 100, 333], dtype=torch.int32)
    return q[0], k[0], v[0], thresholds, starts_q, starts_k


def paged_inputs(lengths=(100, 333), page_size=48):
    """q [batch, 300, ...], k, v, thresholds, block_table and seqused_k."""
    q, k, v, thresholds = inputs(300, max(lengths), batch=len(lengths))
    keys, values = ([x[:n] for x, n in zip(y, lengths, strict=True)] for y in (k, v))
    cache = paging.paged(keys, values, page_size, layout="heads first", seed=1)
    return q, cache.k, cache.v, thresholds, cache.block_table, cache.seqused_k


def paged_packed_inputs():
    """q [total_q, ...] and the rest of ``paged_inputs``, then cu_seqlens_q."""
    q, *rest = paged_inputs()
    return q.flatten(0, 1)[:400], *rest, torch.tensor([0, 270, 400], dtype=torch.int32)


def model(q, k, v, thresholds):
    """A function that uses everything, between other operations."""
    out, lse, kept = block_sparse_attention(
        q * 2, k, v, thresholds, rule="running_max", return_lse=True, return_kept=True
    )
    return out + 1, lse, kept, block_maxima(q, k)


class Attention(torch.nn.Module):
    def forward(self, q, k, v, thresholds):
        return block_sparse_attention(q.sin(), k, v, thresholds).cos()


class TwoSteps(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = {"rule": "peak_lse", "voters": 2, "selection": "int8", **options}

    def forward(self, q, k, v, thresholds):
        return block_sparse_attention(q.sin(), k, v, thresholds, **self.options)


class EachStep(torch.nn.Module):
    def forward(self, q, k, v, thresholds):
        return steps(q, k, v, thresholds)


def steps(q, k, v, thresholds, *starts):
    """Each step on its own, and a mask that other operations have changed."""
    packed = {}
    if starts:
        packed = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}
    mask = select_blocks(q * 2, k, thresholds, rule="running_max", **packed)
    out, lse, kept = attend_blocks(q, k, v, mask | 1, return_lse=True, return_kept=True, **packed)
    return mask, out + 1, lse, kept


class Everything(torch.nn.Module):
    def forward(self, q, k, v, thresholds):
        return model(q, k, v, thresholds)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(found, expected):
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def operator_call(arguments, *options, longest=None):
    """Arguments of the operator, of paged_inputs or paged_packed_inputs."""
    q, k, v, thresholds, table, seqused_k, *starts = arguments
    return (q, k, v, thresholds, *(starts or [None]), None, *options, longest, table, seqused_k)


def select_call(arguments, *options, longest=None):
    q, k, _, thresholds, table, seqused_k, *starts = arguments
    return (q, k, thresholds, *(starts or [None]), None, *options, longest, table, seqused_k)


OPERATOR_CALLS = {
    "plain": (*inputs(), None, None, True, None, "absolute", 128, 64, 1, False, False),
    "all": (*inputs(), None, None, False, 0.3, "peak_lse", 64, 64, 4, True, True),
    "bfloat16": (
        *inputs(dtype=torch.bfloat16),
        *(None, None, True, None, "absolute", 128, 64, 1, True, False),
    ),
    "float64": (
        *(x.double() for x in inputs()[:3]),
        *(inputs()[3], None, None, True, None, "absolute", 128, 64, 1, True, True),
    ),
    "packed": (*packed_inputs(), True, None, "running_max", 128, 64, 1, True, True),
    "two steps": (
        *inputs(),
        *(None, None, True, None, "peak_lse", 64, 64, 2, True, True, "int8"),
    ),
    "two steps, packed": (
        *packed_inputs(),
        *(True, None, "running_max", 128, 64, 1, False, True, "int8", 400),
    ),
    "auto": (*inputs(), None, None, True, None, "absolute", 128, 64, 1, False, False, "auto"),
    "paged": operator_call(
        paged_inputs(), True, None, "absolute", 128, 64, 1, True, True, "exact", longest=400
    ),
    "paged, packed": operator_call(
        paged_packed_inputs(), True, None, "peak_lse", 64, 64, 2, True, True, "exact"
    ),
    "paged, two steps": operator_call(
        paged_packed_inputs(), False, None, "peak_lse", 64, 64, 2, True, True, "int8"
    ),
    "used keys": (
        *inputs(),
        *(None, None, True, None, "absolute", 128, 64, 1, True, True, "exact", None, None),
        torch.tensor([333, 7], dtype=torch.int32),
    ),
    "sinks": (
        *inputs(),
        *(None, None, True, None, "peak_lse", 128, 64, 1, True, True, "exact", None, None, None),
        torch.zeros(6),
    ),
    "sinks, two steps": (
        *inputs(),
        *(None, None, True, None, "peak_lse", 128, 64, 1, True, True, "int8", None, None, None),
        torch.zeros(6),
    ),
    "no query": (*inputs(0), None, None, True, None, "absolute", 128, 64, 1, True, True),
    "no key": (*inputs(seqlen_k=0), None, None, True, None, "absolute", 128, 64, 1, True, True),
}


@pytest.mark.parametrize("call", OPERATOR_CALLS.values(), ids=OPERATOR_CALLS)
def test_opcheck_passes_for_forward(call):
    torch.library.opcheck(torch.ops.bsfa.forward.default, call)


SELECT_CALLS = {
    "plain": (None, None, True, None, "absolute", 128, 64, 1, "int8", None),
    "all": (None, None, False, 0.3, "peak_lse", 64, 64, 4, "exact", None),
    "packed": (*packed_inputs()[4:], True, None, "running_max", 128, 64, 2, "int8", None),
    "packed, longest": (*packed_inputs()[4:], True, None, "peak_lse", 64, 64, 1, "int8", 5000),
}


def two_step_inputs(name):
    """q, k, v and thresholds of a call of SELECT_CALLS."""
    q, k, v, thresholds = inputs()
    return (q[0], k[0], v[0], thresholds) if "packed" in name else (q, k, v, thresholds)


@pytest.mark.parametrize("name", SELECT_CALLS)
def test_opcheck_passes_for_the_two_steps(name):
    q, k, v, thresholds = two_step_inputs(name)
    options = SELECT_CALLS[name]
    torch.library.opcheck(torch.ops.bsfa.select_blocks.default, (q, k, thresholds, *options))
    mask = torch.ops.bsfa.select_blocks(q, k, thresholds, *options)
    starts, shape = options[:2], (*options[2:4], *options[5:7])
    for given, asked in ((thresholds, (True, True)), (None, (False, False))):
        call = (q, k, v, mask, given, *starts, *shape, *asked)
        torch.library.opcheck(torch.ops.bsfa.attend_blocks.default, call)


@pytest.mark.parametrize("name", SELECT_CALLS)
def test_fake_masks_have_the_shapes_of_real_ones(name):
    q, k, _, thresholds = two_step_inputs(name)
    call = (q, k, thresholds, *SELECT_CALLS[name])
    real = torch.ops.bsfa.select_blocks(*call)
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in call]
    fake = torch.ops.bsfa.select_blocks(*meta)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_two_steps_compile_without_a_graph_break(dynamic):
    compiled = torch.compile(steps, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ((300, 333), (257, 257)):
        assert_same(compiled(*inputs(*lengths)), steps(*inputs(*lengths)))
    assert_same(compiled(*packed_inputs()), steps(*packed_inputs()))
    both = TwoSteps()
    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ((300, 333), (257, 257)):
        torch.testing.assert_close(compiled(*inputs(*lengths)), both(*inputs(*lengths)))


PAGED = {"padded": paged_inputs, "packed": paged_packed_inputs}


def paged_model(q, k, v, thresholds, table, seqused_k, *starts, longest=400):
    """Every function on paged keys, between other operations."""
    keys = {"block_table": table, "seqused_k": seqused_k}
    packed = {"cu_seqlens_q": starts[0]} if starts else {}
    how = {**keys, **packed, "return_lse": True, "return_kept": True}
    exact = block_sparse_attention(q * 2, k, v, thresholds, max_seqlen_k=longest, **how)
    int8 = block_sparse_attention(q, k, v, thresholds, selection="int8", **how)
    mask = select_blocks(q, k, thresholds, precision="exact", **keys, **packed)
    attended = attend_blocks(q, k, v, mask, **how)
    maxima = () if starts else (block_maxima(q, k, **keys),)
    return exact[0] + 1, *exact[1:], *int8, mask, *attended, *maxima


class Paged(torch.nn.Module):
    def __init__(self, longest=400):
        super().__init__()
        self.longest = longest

    def forward(self, *arguments):
        return paged_model(*arguments, longest=self.longest)


@pytest.mark.parametrize("make", PAGED.values(), ids=PAGED)
def test_opcheck_passes_for_the_steps_on_paged_keys(make):
    call = select_call(make(), True, None, "peak_lse", 64, 64, 2, "int8")
    torch.library.opcheck(torch.ops.bsfa.select_blocks.default, call)
    mask = torch.ops.bsfa.select_blocks(*call)
    q, k, v, thresholds, table, seqused_k, *starts = make()
    shape = (*(starts or [None]), None, True, None, 64, 64, True, True)
    call = (q, k, v, mask, thresholds, *shape, table, seqused_k)
    torch.library.opcheck(torch.ops.bsfa.attend_blocks.default, call)
    if not starts:
        call = (q, k, True, None, "peak_lse", 128, 64, table, seqused_k)
        torch.library.opcheck(torch.ops.bsfa.block_maxima.default, call)


@pytest.mark.parametrize("make", PAGED.values(), ids=PAGED)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_paged_keys_compile_without_a_graph_break(make, dynamic):
    compiled = torch.compile(paged_model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same(compiled(*make()), paged_model(*make()))


@pytest.mark.parametrize("make", PAGED.values(), ids=PAGED)
def test_fake_outputs_of_paged_keys_have_the_shapes_of_real_ones(make):
    real = paged_model(*make())
    fakes = paged_model(*(x.to("meta") for x in make()))
    for fake, wanted in zip(fakes, real, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (
            wanted.shape,
            wanted.dtype,
            wanted.stride(),
        )


def test_one_compilation_serves_other_lengths_pages_and_tables():
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(Paged(), fullgraph=True, dynamic=True, backend=counter)
    for lengths in ((100, 333), (400, 20), (64, 390)):
        call = paged_inputs(lengths)
        assert_same(compiled(*call), paged_model(*call))
    assert counter.frame_count == 1


def test_paged_keys_export_with_any_lengths():
    # Of the table at least as many pages as make two words of a mask.
    seqlen_q, pages = DIM("seqlen_q", min=129, max=5000), DIM("pages", min=3, max=5000)
    most = DIM("most", min=86, max=5000)
    keys = {0: pages}
    shapes = (({1: seqlen_q}, keys, keys, None, {1: most}, None),)
    call = [x.contiguous() for x in paged_inputs((200, 4200))]
    program = torch.export.export(Paged(None), tuple(call), dynamic_shapes=shapes)
    assert len(operators_of(program)) == 5
    other = [x.contiguous() for x in paged_inputs((300, 5000))]
    assert_same(program.module()(*other), paged_model(*other, longest=None))


def operators_of(program):
    return [str(n.target) for n in program.graph.nodes if str(n.target).startswith("bsfa.")]


@pytest.mark.parametrize("selection", ["exact", "int8"])
@pytest.mark.parametrize("lengths", ["equal", "different"])
def test_both_ways_export_with_any_length(selection, lengths):
    seqlen_q = DIM("seqlen_q", min=1, max=100_000)
    seqlen_k = seqlen_q if lengths == "equal" else DIM("seqlen_k", min=1, max=100_000)
    attend = TwoSteps(selection=selection, return_lse=True)
    shapes = ({1: seqlen_q}, {1: seqlen_k}, {1: seqlen_k}, None)
    program = torch.export.export(attend, inputs(500, 500), dynamic_shapes=shapes)
    assert operators_of(program) == ["bsfa.forward.default"]
    pairs = [(1, 1), (64, 64), (129, 129), (4200, 4200)]
    if lengths == "different":
        pairs += [(1, 5000), (200, 1)]
    for pair in pairs:
        assert_same(program.module()(*inputs(*pair)), attend(*inputs(*pair)))


def test_kept_exports_where_there_are_two_query_blocks():
    seqlen = DIM("seqlen", min=129, max=100_000)
    attend = TwoSteps(return_kept=True)
    shapes = ({1: seqlen}, {1: seqlen}, {1: seqlen}, None)
    program = torch.export.export(attend, inputs(500, 500), dynamic_shapes=shapes)
    for length in (129, 4200):
        assert_same(program.module()(*inputs(length, length)), attend(*inputs(length, length)))


def test_auto_exports_with_any_length_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_auto, "_head_dims_with_both_steps", lambda *_: (64,))
    with torch._subclasses.FakeTensorMode():  # which needs no GPU
        q, k, v = (
            torch.empty((2, 500, heads, 64), dtype=torch.bfloat16, device="cuda")
            for heads in (6, 2, 2)
        )
        call = (q, k, v, torch.empty((6, 3), device="cuda"))
    seqlen = DIM("seqlen", min=1, max=100_000)
    attend = TwoSteps(selection="auto", expected_skipped=0.9)
    shapes = ({1: seqlen}, {1: seqlen}, {1: seqlen}, None)
    program = torch.export.export(attend, call, dynamic_shapes=shapes)
    (node,) = (n for n in program.graph.nodes if str(n.target) == "bsfa.forward.default")
    assert node.args[-1] == "auto"  # the library's choice of kernels is made, the length's is not


def test_each_step_exports_where_there_are_two_query_blocks_and_words():
    batch, seqlen_q, seqlen_k = DIM("batch"), DIM("seqlen_q", min=129), DIM("seqlen_k", min=4097)
    keys = {0: batch, 1: seqlen_k}
    program = torch.export.export(
        EachStep(),
        inputs(200, 4200),
        dynamic_shapes=({0: batch, 1: seqlen_q}, keys, keys, None),
    )
    assert operators_of(program) == ["bsfa.select_blocks.default", "bsfa.attend_blocks.default"]
    other = inputs(300, 9000, batch=1)
    assert_same(program.module()(*other), steps(*other))


@pytest.mark.parametrize("selection", ["exact", "int8"])
def test_one_compilation_serves_lengths_of_other_words(selection):
    counter = torch._dynamo.testing.CompileCounter()
    attend = TwoSteps(selection=selection)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for length in (300, 100, 4200):
        call = inputs(length, length)
        torch.testing.assert_close(compiled(*call), attend(*call))
    assert counter.frame_count == 1


def test_opcheck_passes_for_the_other_operators_with_sinks():
    q, k, v, thresholds = inputs()
    sinks = torch.linspace(-1, 2, 6)
    options = (None, None, True, None, "peak_lse", 64, 64, 2, "int8", None, None, None, sinks)
    torch.library.opcheck(torch.ops.bsfa.select_blocks.default, (q, k, thresholds, *options))
    mask = torch.ops.bsfa.select_blocks(q, k, thresholds, *options)
    attend = (q, k, v, mask, None, None, None, True, None, 64, 64, True, True, None, None, sinks)
    torch.library.opcheck(torch.ops.bsfa.attend_blocks.default, attend)
    maxima = (q, k, True, None, "peak_lse", 128, 64, None, None, sinks)
    torch.library.opcheck(torch.ops.bsfa.block_maxima.default, maxima)


def with_sinks(q, k, v, thresholds, sinks):
    """Every function with sinks, between other operations."""
    sinks = sinks.float() * 2
    how = {"return_lse": True, "return_kept": True, "sinks": sinks}
    rule = {"rule": "running_max", "sinks": sinks}
    exact = block_sparse_attention(q, k, v, thresholds, rule="running_max", **how)
    int8 = block_sparse_attention(q, k, v, thresholds, rule="running_max", selection="int8", **how)
    mask = select_blocks(q, k, thresholds, precision="exact", **rule)
    return *exact, *int8, mask, *attend_blocks(q, k, v, mask, **how), block_maxima(q, k, **rule)


class WithSinks(torch.nn.Module):
    def forward(self, *arguments):
        q, k, v, thresholds, sinks = arguments
        return block_sparse_attention(q, k, v, thresholds, rule="peak_lse", sinks=sinks)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_sinks_compile_without_a_graph_break(dynamic):
    sinks = torch.linspace(-1, 2, 6, dtype=torch.bfloat16)
    compiled = torch.compile(with_sinks, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same(compiled(*inputs(), sinks), with_sinks(*inputs(), sinks))


class Conditional(torch.nn.Module):
    def forward(self, *call):
        return block_sparse_attention(*call, causal=call[0].shape[1] > 1)


def test_a_condition_on_a_length_may_say_whether_a_call_is_causal():
    length = DIM("length", min=2, max=4096)
    shapes = ({1: length}, {1: length}, {1: length}, None)
    call = inputs(300, 300)
    program = torch.export.export(Conditional(), call, dynamic_shapes=(shapes,), strict=False)
    for seqlen in (300, 200):
        call = inputs(seqlen, seqlen)
        torch.testing.assert_close(program.module()(*call), Conditional()(*call))


class Longest(torch.nn.Module):
    def forward(self, q, k, v, thresholds, starts_q, starts_k):
        longest = starts_k.diff().max().item()
        torch._check(longest >= 1)
        return block_sparse_attention(
            *(q, k, v, thresholds),
            cu_seqlens_q=starts_q,
            cu_seqlens_k=starts_k,
            max_seqlen_k=longest,
            selection="int8",
        )


@pytest.mark.parametrize("strict", [False, True])
def test_a_longest_sequence_that_is_read_from_a_tensor_is_exported(strict):
    call = packed_inputs()
    program = torch.export.export(Longest(), call, strict=strict)
    torch.testing.assert_close(program.module()(*call), Longest()(*call))


def test_sinks_export_and_take_other_values():
    module, sinks = WithSinks(), torch.linspace(-1, 2, 6)
    program = torch.export.export(module, (*inputs(), sinks))
    for other in (sinks, sinks - 3):
        torch.testing.assert_close(program.module()(*inputs(), other), module(*inputs(), other))


@pytest.mark.parametrize("seqlen_q", [0, 300])
def test_opcheck_passes_for_block_maxima(seqlen_q):
    q, k, *_ = inputs(seqlen_q)
    call = (q, k, True, None, "peak_lse", 128, 64)
    torch.library.opcheck(torch.ops.bsfa.block_maxima.default, call)


def test_opcheck_finds_autograd_registered():
    q, *rest = OPERATOR_CALLS["plain"]
    torch.library.opcheck(
        torch.ops.bsfa.forward.default,
        (q.clone().requires_grad_(), *rest),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic):
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ((300, 333), (257, 257)):
        assert_same(compiled(*inputs(*lengths)), model(*inputs(*lengths)))


@pytest.mark.slow
def test_compiles_with_the_default_compiler():
    compiled = torch.compile(model, fullgraph=True)
    assert_same(compiled(*inputs()), model(*inputs()))


def test_packed_sequences_compile_without_a_graph_break():
    def attend(q, k, v, thresholds, starts_q, starts_k):
        return block_sparse_attention(
            q, k, v, thresholds, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, return_kept=True
        )

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same(compiled(*packed_inputs()), attend(*packed_inputs()))


def test_one_compilation_serves_other_lengths():
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(Attention(), fullgraph=True, dynamic=True, backend=counter)
    for length in (300, 400, 517):
        compiled(*inputs(length, length + 10))
    assert counter.frame_count == 1


def test_exports_with_any_batch_and_lengths():
    batch, seqlen_q, seqlen_k = DIM("batch"), DIM("seqlen_q"), DIM("seqlen_k")
    keys = {0: batch, 1: seqlen_k}
    program = torch.export.export(
        Attention(), inputs(), dynamic_shapes=({0: batch, 1: seqlen_q}, keys, keys, None)
    )
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "bsfa.forward.default" in operators
    for lengths in ((300, 333), (100, 700)):
        other = inputs(*lengths, batch=3)
        torch.testing.assert_close(program.module()(*other), Attention()(*other))


def test_exports_with_all_outputs_where_there_are_two_blocks():
    seqlen_q, seqlen_k = DIM("seqlen_q", min=129), DIM("seqlen_k", min=65)
    program = torch.export.export(
        Everything(), inputs(), dynamic_shapes=({1: seqlen_q}, {1: seqlen_k}, {1: seqlen_k}, None)
    )
    other = inputs(400, 500)
    assert_same(program.module()(*other), model(*other))


def test_fake_tensors_have_the_shapes_dtypes_and_strides_of_real_ones():
    for call in (*OPERATOR_CALLS.values(),):
        real = torch.ops.bsfa.forward(*call)
        meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in call]
        for fake, wanted in zip(torch.ops.bsfa.forward(*meta), real, strict=True):
            assert (fake.shape, fake.dtype, fake.stride()) == (
                wanted.shape,
                wanted.dtype,
                wanted.stride(),
            )


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_fake_tensors_of_a_gpu_are_checked_for_its_kernels(name):
    with FakeTensorMode():
        thresholds = torch.empty(4, 1, device="cuda")

        def compute(dtype, changed):
            call = {key: torch.empty(1, 300, 4, 64, dtype=dtype, device="cuda") for key in "qkv"}
            call[name] = changed(call[name])
            q, k, v = call.values()
            mask = torch.empty(1, 4, 3, 1, dtype=torch.int64, device="cuda")
            yield lambda: block_sparse_attention(q, k, v, thresholds)
            yield lambda: attend_blocks(q, k, v, mask)
            if name != "v":
                yield lambda: select_blocks(q, k, thresholds)
                yield lambda: block_maxima(q, k)

        def strided(x):
            return torch.empty(1, 64, 4, 300, dtype=x.dtype, device="cuda").transpose(1, 3)

        for attend in compute(torch.float16, lambda x: x):
            attend()
        for attend in compute(torch.float32, lambda x: x):
            with pytest.raises(TypeError, match="on a CUDA device q must be float16 or bfloat16"):
                attend()
        for attend in compute(torch.float16, strided):
            with pytest.raises(ValueError, match=f"the last stride of {name} must be 1"):
                attend()


def test_fake_tensors_are_checked_like_real_ones():
    q, k, v, thresholds = (x.to("meta") for x in inputs())
    with pytest.raises(ValueError, match="same batch"):
        block_sparse_attention(q[:1], k, v, thresholds)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_inputs_that_require_gradients_run_forward_and_refuse_backward(which):
    call = list(inputs())
    expected = block_sparse_attention(*call)
    call[which] = call[which].clone().requires_grad_()
    out = block_sparse_attention(*call)
    assert torch.equal(out, expected)
    assert out.requires_grad
    with pytest.raises(NotImplementedError, match="no backward pass"):
        out.sum().backward()


def in_every_function(name, x, call):
    """What each function gives with one input replaced; those that take it."""
    call = {**call, name: x}
    q, k, v, thresholds, sinks = (call[key] for key in ("q", "k", "v", "thresholds", "sinks"))
    mask = select_blocks(*(call[key].detach() for key in ("q", "k", "thresholds")))
    yield lambda: block_sparse_attention(q, k, v, thresholds, sinks=sinks)
    yield lambda: block_sparse_attention(q, k, v, thresholds, sinks=sinks, selection="int8")
    if name != "thresholds":
        yield lambda: attend_blocks(q, k, v, mask, sinks=sinks)
    if name not in ("v", "thresholds"):
        yield lambda: block_maxima(q, k, sinks=sinks)
    if name != "v":
        yield lambda: select_blocks(q, k, thresholds, sinks=sinks)


def named_inputs():
    q, k, v, thresholds = inputs()
    return {"q": q, "k": k, "v": v, "thresholds": thresholds, "sinks": torch.linspace(-1, 2, 6)}


@pytest.mark.parametrize("name", ["q", "k", "v", "thresholds", "sinks"])
def test_forward_mode_derivatives_are_refused(name):
    call = named_inputs()
    tangent = torch.ones_like(call[name])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(call[name], tangent)
        for compute in in_every_function(name, dual, call):
            with pytest.raises(NotImplementedError, match="nor forward-mode derivatives"):
                compute()
        # One that has no part in it is computed as ever.
        block_sparse_attention(*inputs())

    def scaled(factor):
        return block_sparse_attention(**{**call, name: call[name] * factor})

    ones = torch.ones(2)
    for transform in (
        lambda: torch.func.jvp(scaled, (ones[0],), (ones[0],)),
        lambda: torch.func.jacfwd(scaled)(ones[0]),
        lambda: torch.func.vmap(torch.func.jacfwd(scaled))(ones),
        lambda: torch.func.jacfwd(torch.func.vmap(scaled))(ones),
    ):
        with pytest.raises(NotImplementedError, match="nor forward-mode derivatives"):
            transform()


def test_forward_mode_derivatives_are_refused_while_a_graph_is_traced():
    def derivative(factor, q, k, v, thresholds):
        def scaled(x):
            return block_sparse_attention(q, k, v * x, thresholds)

        return torch.func.jvp(scaled, (factor,), (factor,))

    compiled = torch.compile(derivative, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="nor forward-mode derivatives"):
        compiled(torch.ones(()), *inputs())
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["q", "k", "v", "thresholds", "sinks"])
def test_functional_derivatives_are_refused(name):
    call = named_inputs()

    def total(factor):
        return block_sparse_attention(**{**call, name: call[name] * factor}).sum()

    ones = torch.ones(2)
    for transform in (
        lambda: torch.func.grad(total)(ones[0]),
        lambda: torch.func.jacrev(total)(ones[0]),
        lambda: torch.func.vjp(total, ones[0]),
        lambda: torch.func.vmap(torch.func.grad(total))(ones),
        lambda: torch.func.jacrev(torch.func.vmap(total))(ones),
    ):
        with pytest.raises(NotImplementedError, match="no backward pass"):
            transform()
    # Attention of what is not differentiated is a constant.
    gradient = torch.func.grad(lambda x: (x * total(1.0)).sum())(ones)
    torch.testing.assert_close(gradient, total(1.0).expand(2))


@pytest.mark.parametrize("name", ["q", "k", "v", "thresholds", "sinks"])
def test_what_requires_gradients_runs_forward_and_refuses_backward(name):
    call = named_inputs()
    parameter = call[name].clone().requires_grad_()
    weight = torch.ones((), requires_grad=True)
    for compute in in_every_function(name, parameter, call):
        out = compute()
        if out.dtype == torch.int64:
            assert not out.requires_grad
            continue
        assert out.requires_grad
        with pytest.raises(NotImplementedError, match="no backward pass"):
            (out.nan_to_num(0, 0, 0).sum() * weight).backward()
    assert parameter.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_recorded(context):
    q, *rest = inputs()
    with context():
        out = block_sparse_attention(q.requires_grad_(), *rest)
    assert not out.requires_grad


def test_outputs_share_no_memory_with_inputs_or_each_other():
    call = inputs()
    out, lse, kept = block_sparse_attention(*call, return_lse=True, return_kept=True)
    pointers = {x.untyped_storage().data_ptr() for x in (*call, out, lse, kept)}
    assert len(pointers) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cast_to", [torch.float16, torch.bfloat16])
def test_autocast_leaves_every_function_alone(dtype, cast_to):
    q, k, v, thresholds = inputs(dtype=dtype)

    def compute():
        call = (q * 20, k * 20, v, thresholds)  # scores that overflow float16
        options = {"rule": "peak_lse", "return_lse": True, "return_kept": True}
        mask = select_blocks(q, k, thresholds, rule="peak_lse")
        return (
            *block_sparse_attention(*call, **options),
            *block_sparse_attention(*call, **options, selection="int8"),
            mask,
            *attend_blocks(q, k, v, mask, return_lse=True, return_kept=True),
            block_maxima(q * 20, k * 20),
            *reference.attention(*call, rule="peak_lse"),
            *reference.select_blocks(q, k, thresholds),
            *reference.attend_blocks(q, k, v, mask),
            reference.block_maxima(q, k),
        )

    outside = compute()
    with torch.autocast("cpu", dtype=cast_to):
        assert torch.mm(q[0, :, 0], k[0, :, 0].T).dtype == (
            torch.float64 if dtype == torch.float64 else cast_to
        )
        inside = compute()
    for found, expected in zip(inside, outside, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_subclasses_reach_the_operator_through_dispatch():
    class Noting(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Noting() as mode:
        block_sparse_attention(*inputs())
    assert "bsfa.forward.default" in mode.seen


@pytest.mark.gpu
def test_kernels_compile_and_export(arch):
    call = inputs(dtype=torch.bfloat16, device="cuda")
    q, k, v, thresholds = call
    thresholds.fill_(-INF)
    attention = Attention()
    expected = attention(*call)
    for made in (
        torch.compile(attention, fullgraph=True),
        torch.export.export(attention, call).module(),
    ):
        torch.testing.assert_close(made(*call), expected, rtol=1e-2, atol=1e-2)
    with _native.force_arch(0):  # block maxima have kernels of one architecture alone
        compiled = torch.compile(model, fullgraph=True)
        for found, expected in zip(compiled(*call), model(*call), strict=True):
            torch.testing.assert_close(found, expected)
    options = (None, None, True, None, "absolute", 128, 64, 1, True, True)
    torch.library.opcheck(torch.ops.bsfa.forward.default, (q, k, v, thresholds, *options))


@pytest.mark.gpu
def test_the_two_steps_compile_and_export_on_a_gpu(arch):
    for kernel in ("select_blocks", "attend_blocks"):
        arch.require(kernel, torch.bfloat16, 64)
    call = inputs(300, 16384, torch.bfloat16, "cuda")
    both = TwoSteps()
    expected = both(*call)
    for made in (
        torch.compile(both, fullgraph=True),
        torch.compile(both, fullgraph=True, mode="reduce-overhead"),
        torch.export.export(both, call).module(),
    ):
        for _ in range(3):
            found = made(*call)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)

    def chosen(*tensors):
        return block_sparse_attention(*tensors, selection="auto", expected_skipped=0.9)

    chosen_first = torch.compile(chosen, fullgraph=True)(*call)
    assert torch.equal(chosen_first, block_sparse_attention(*call, selection="int8"))
    q, k, v, thresholds = call
    options = (None, None, True, None, "peak_lse", 128, 64, 4, "int8", None)
    torch.library.opcheck(torch.ops.bsfa.select_blocks.default, (q, k, thresholds, *options))
    mask = torch.ops.bsfa.select_blocks(q, k, thresholds, *options)
    attend = (q, k, v, mask, thresholds, None, None, True, None, 128, 64, True, True)
    torch.library.opcheck(torch.ops.bsfa.attend_blocks.default, attend)


@pytest.mark.gpu
def test_the_short_way_to_the_kernel_gives_what_the_operator_gives():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 300, heads, 64, generator=generator).to("cuda", torch.bfloat16)
        for heads in (4, 2, 2)
    )
    thresholds = torch.full((4, 3), 2.0, device="cuda")
    options = (None, None, True, 0.2, "peak_lse", 64, 64, 1, True, True)
    expected = torch.ops.bsfa.forward(q, k, v, thresholds, *options)

    def call():
        return block_sparse_attention(
            q,
            k,
            v,
            thresholds,
            scale=0.2,
            rule="peak_lse",
            geometry=GEOMETRIES[1],
            return_lse=True,
            return_kept=True,
        )

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        watched = call()
    assert "bsfa::forward" in {event.key for event in profile.key_averages()}
    for found in (call(), watched, torch.compile(call, fullgraph=True)()):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
