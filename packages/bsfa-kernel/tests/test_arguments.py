# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The C interface refuses whatever breaks a rule, and says which rule and which value.

Arguments are checked before the first CUDA call, so that all this holds on a machine without a
GPU. The pointers here are addresses of nothing; the device is one that no machine has, so that no
call gets as far as a launch.
"""

from __future__ import annotations

import ctypes
import math
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bsfa_kernel
from bsfa_kernel import _native
from bsfa_kernel._calls import ForwardCall
from bsfa_kernel._native import (
    AttendBlocksArgs,
    BlockMaximaArgs,
    ForwardArgs,
    Problem,
    SelectBlocksArgs,
    Strides,
    TensorArg,
)

OK, INVALID, UNSUPPORTED, CUDA_ERROR = range(4)
NO_SUCH_DEVICE = 9999
BATCH, SEQLEN_Q, SEQLEN_K, HEADS, KV_HEADS, HEAD_DIM = 2, 300, 500, 8, 2, 128
INT32_MAX = 2**31 - 1

Args = ForwardArgs | BlockMaximaArgs | SelectBlocksArgs | AttendBlocksArgs
FUNCTIONS: dict[type, str] = {
    ForwardArgs: "bsfa_forward",
    BlockMaximaArgs: "bsfa_block_maxima",
    SelectBlocksArgs: "bsfa_select_blocks",
    AttendBlocksArgs: "bsfa_attend_blocks",
}


def tensor(data: int | None, seqlen: int, heads: int) -> TensorArg:
    """A contiguous tensor."""
    strides = Strides(seqlen * heads * HEAD_DIM, heads * HEAD_DIM, HEAD_DIM)
    return TensorArg(data, strides)


PROBLEM = {
    "device": NO_SUCH_DEVICE,
    "dtype": 1,
    "causal": 1,
    "q_block": 128,
    "k_block": 64,
    "scale": HEAD_DIM**-0.5,
    "batch": BATCH,
    "heads": HEADS,
    "kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "seqlen_q": SEQLEN_Q,
    "seqlen_k": SEQLEN_K,
    "q": tensor(0x10000, SEQLEN_Q, HEADS),
    "k": tensor(0x20000, SEQLEN_K, KV_HEADS),
}
FORWARD_ARGS = {
    "v": tensor(0x30000, SEQLEN_K, KV_HEADS),
    "out": tensor(0x40000, SEQLEN_Q, HEADS),
    "thresholds": 0x50000,
    "threshold_rows": 3,
    "lse": 0x60000,
    "kept": 0x70000,
}
SELECT_ARGS = {
    "thresholds": 0x50000,
    "threshold_rows": 3,
    "precision": 1,
    "block_mask": 0x90000,
    "mask_words": 1,
    "workspace": 0xA0000,
    "workspace_bytes": 2**40,
}
ATTEND_ARGS = {
    **FORWARD_ARGS,
    "block_mask": 0x90000,
    "mask_words": 1,
    "workspace": 0xA0000,
    "workspace_bytes": 2**40,
}
PACKED = {"cu_seqlens_q": 0x80000, "cu_seqlens_k": 0x80000}
USED = {"seqused_k": 0x81000}
PAGED = {
    **USED,
    "block_table": 0x82000,
    "block_table_stride": 20,
    "pages": 30,
    "page_size": 16,
}


def make(struct: type[Args], own: dict[str, Any], changes: dict[str, Any]) -> Any:
    """A structure with changes to its own fields or to those of its problem.

    A tensor is changed by its address, or by ``<name>_strides``.
    """
    values = {"abi_version": _native.ABI_VERSION, "struct_size": ctypes.sizeof(struct), **own}
    problem = dict(PROBLEM)
    for name, value in changes.items():
        tensor_name = name.removesuffix("_strides")
        known = problem if tensor_name in {field for field, *_ in Problem._fields_} else values
        before = known.get(tensor_name)
        if isinstance(before, TensorArg):
            changed = TensorArg(before.data, before.strides)
            setattr(changed, "data" if tensor_name == name else "strides", value)
            known[tensor_name] = changed
        else:
            known[name] = value
    return struct(problem=Problem(**problem), **values)


def forward_args(**changes: Any) -> ForwardArgs:
    """Arguments of bsfa_forward that break no rule, but for the changes."""
    args: ForwardArgs = make(ForwardArgs, FORWARD_ARGS, changes)
    return args


def maxima_args(**changes: Any) -> BlockMaximaArgs:
    """Arguments of bsfa_block_maxima that break no rule, but for the changes."""
    args: BlockMaximaArgs = make(BlockMaximaArgs, {"maxima": 0x40000}, changes)
    return args


def select_args(**changes: Any) -> SelectBlocksArgs:
    """Arguments of bsfa_select_blocks that break no rule, but for the changes."""
    args: SelectBlocksArgs = make(SelectBlocksArgs, SELECT_ARGS, changes)
    return args


def attend_args(**changes: Any) -> AttendBlocksArgs:
    """Arguments of bsfa_attend_blocks that break no rule, but for the changes."""
    args: AttendBlocksArgs = make(AttendBlocksArgs, ATTEND_ARGS, changes)
    return args


ALL_ARGS = [forward_args, maxima_args, select_args, attend_args]


def call(args: Args | None, function: str = "") -> tuple[int, str]:
    """The status of a call, by default of the struct's function; where not OK, the message."""
    library = _native.library()
    name = function or FUNCTIONS[type(args)]
    status = getattr(library, name)(None if args is None else bytes(args))
    return status, "" if status == OK else library.bsfa_last_error().decode()


def passes_validation(args: Args) -> bool:
    """Whether a call got as far as asking for the device."""
    status, message = call(args)
    if status == INVALID:
        assert re.match("device must be below the number of CUDA devices", message), message
    return status in {INVALID, UNSUPPORTED, CUDA_ERROR}


EVERY = [
    ("abi_version", 2, "abi_version must be 1, got 2: the caller and libbsfa come from different"),
    ("struct_size", 8, r"struct_size must be \d+, got 8"),
    ("device", -1, "device must be a CUDA device ordinal, 0 or more, got -1"),
    ("arch", 86, r"arch must be 0 \(pick by device\), 80 or 90, got 86"),
    ("dtype", 2, r"dtype must be 0 \(float16\) or 1 \(bfloat16\), got 2"),
    ("dtype", -1, r"dtype must be .*, got -1"),
    ("rule", 3, r"rule must be 0 \(absolute\), 1 \(running_max\) or 2 \(peak_lse\), got 3"),
    ("rule", -1, r"rule must be .*, got -1"),
    ("voters", 3, r"voters must be 1, 2 or 4 \(or 0, which means 1\), got 3"),
    ("voters", -1, r"voters must be 1, 2 or 4 .*, got -1"),
    ("causal", 2, "causal must be 0 or 1, got 2"),
    ("q_block", 32, r"\(q_block x k_block\) must be 128x64 or 64x64, got 32x64"),
    ("k_block", 128, r"\(q_block x k_block\) must be 128x64 or 64x64, got 128x128"),
    ("scale", 0.0, "scale must be positive and finite, got 0"),
    ("scale", -0.5, "scale must be positive and finite, got -0.5"),
    ("scale", math.inf, "scale must be positive and finite, got inf"),
    ("scale", math.nan, "scale must be positive and finite, got nan"),
    ("batch", -1, f"batch must be between 0 and {INT32_MAX}, got -1"),
    ("batch", 2**31, f"batch must be between 0 and {INT32_MAX}, got 2147483648"),
    ("heads", 0, f"heads must be between 1 and {INT32_MAX}, got 0"),
    ("heads", 2**32, f"heads must be between 1 and {INT32_MAX}, got 4294967296"),
    ("kv_heads", 0, f"kv_heads must be between 1 and {INT32_MAX}, got 0"),
    ("kv_heads", 3, "heads must be a multiple of kv_heads, got 8 and 3"),
    ("kv_heads", 16, "heads must be a multiple of kv_heads, got 8 and 16"),
    ("head_dim", 0, "head_dim must be a multiple of 8 up to 256, got 0"),
    ("head_dim", 100, "head_dim must be a multiple of 8 up to 256, got 100"),
    ("head_dim", 264, "head_dim must be a multiple of 8 up to 256, got 264"),
    ("seqlen_q", -1, "seqlen_q must be between 0 and 1073741824, got -1"),
    ("seqlen_q", 2**31, "seqlen_q must be between 0 and 1073741824, got 2147483648"),
    ("seqlen_k", -1, "seqlen_k must be between 0 and 1073741824, got -1"),
    ("seqlen_k", 2**40, "seqlen_k must be between 0 and 1073741824, got 1099511627776"),
    ("batch", 2**29, r"batch \* heads \* ceil\(seqlen_q / 64\) must be at most 1073741823, got"),
    ("cu_seqlens_q", 0x80000, "cu_seqlens_q must come with .*, got only cu_seqlens_q"),
    ("cu_seqlens_k", 0x80000, "cu_seqlens_k must come with cu_seqlens_q, got only cu_seqlens_k"),
    ("seqused_k", 0x81002, "seqused_k must be aligned to 4 bytes, and is 2 bytes off"),
    ("block_table", 0x82000, "block_table must come with seqused_k, .* got null"),
    ("block_table_stride", 20, "block_table_stride must be 0 where block_table is null, got 20"),
    ("pages", 30, "pages must be 0 where block_table is null, got 30"),
    ("page_size", 16, "page_size must be 0 where block_table is null, got 16"),
    ("sinks", 0x83001, "sinks must be aligned to 4 bytes, and is 1 bytes off"),
    ("q", None, "q must not be null"),
    ("k", None, "k must not be null"),
    ("q", 0x10008, "q must be aligned to 16 bytes, and is 8 bytes off"),
    ("k", 0x20002, "k must be aligned to 16 bytes, and is 2 bytes off"),
    (
        "q_strides",
        Strides(-8, 1024, 128),
        "the batch stride of q must be a multiple of 8 .*, got -8",
    ),
    ("q_strides", Strides(0, 1028, 128), "the seqlen stride of q must be .*16 bytes.*, got 1028"),
    ("k_strides", Strides(0, 256, 4), "the heads stride of k must be a multiple of 8 .*, got 4"),
    ("k_strides", Strides(0, 2**39, 128), "the seqlen stride of k must be .*, got 549755813888"),
]

Refused = tuple[str, Any, str, dict[str, Any]]
"""A field, its value, what is said of it, and further changes."""

LENGTHS: list[Refused] = [
    ("seqlen_q", 2**30, r"batch \* heads \* ceil\(seqlen_q / 64\) must be", {"batch": 100}),
    ("cu_seqlens_q", 0x80001, "cu_seqlens_q must be aligned to 4 bytes", {"cu_seqlens_k": 0x80000}),
    ("cu_seqlens_k", 0x80002, "cu_seqlens_k must be aligned to 4 bytes", {"cu_seqlens_q": 0x80000}),
    (
        "batch",
        0,
        "batch must be at least 1 where cu_seqlens are given",
        {"cu_seqlens_q": 0x80000, "cu_seqlens_k": 0x80000},
    ),
]

THRESHOLDS: list[Refused] = [
    ("threshold_rows", 0, f"threshold_rows must be between 1 and {INT32_MAX}, got 0", {}),
    (
        "threshold_rows",
        2**31,
        f"threshold_rows must be between 1 and {INT32_MAX}, got 2147483648",
        {},
    ),
    ("thresholds", None, "thresholds must not be null", {}),
    ("thresholds", 0x50002, "thresholds must be aligned to 4 bytes", {}),
]

OUTPUTS: list[Refused] = [
    ("v", None, "v must not be null", {}),
    ("v", 0x30001, "v must be aligned to 16 bytes, and is 1 bytes off", {}),
    ("v_strides", Strides(0, 12, 128), "the seqlen stride of v must be a multiple of 8", {}),
    ("out", None, "out must not be null", {}),
    ("out", 0x40004, "out must be aligned to 16 bytes", {}),
    ("out", 0x10000, "out must not be one of the inputs", {}),
    ("out", 0x20000, "out must not be one of the inputs", {}),
    ("out", 0x30000, "out must not be one of the inputs", {}),
    ("out_strides", Strides(0, 1024, 128), "the strides of out must keep its entries apart", {}),
    (
        "out_strides",
        Strides(307200, 1024, 64),
        "the strides of out must keep its entries apart",
        {},
    ),
    (
        "out_strides",
        Strides(307200, 512, 128),
        "the strides of out must keep its entries apart",
        {},
    ),
    ("lse", 0x60001, "lse must be aligned to 4 bytes", {}),
    ("kept", 0x70003, "kept must be aligned to 4 bytes", {}),
]

MASK: list[Refused] = [
    ("mask_words", 2, r"mask_words must be ceil\(seqlen_k / 4096\), 1, got 2", {}),
    ("mask_words", 1, r"mask_words must be ceil\(seqlen_k / 4096\), 2, got 1", {"seqlen_k": 4097}),
    ("mask_words", 1, r"mask_words must be ceil\(seqlen_k / 4096\), 0, got 1", {"seqlen_k": 0}),
    ("mask_words", 0, "mask_words must be between 1 and 262144, got 0", PACKED),
    ("mask_words", 262145, "mask_words must be between 1 and 262144, got 262145", PACKED),
    ("block_mask", None, "block_mask must not be null", {}),
    ("block_mask", 0x90004, "block_mask must be aligned to 8 bytes, and is 4 bytes off", {}),
]

SELECT: list[Refused] = [
    ("precision", 2, r"precision must be 0 \(exact\) or 1 \(int8\), got 2", {}),
    (
        "precision",
        1,
        r"kv_heads must be at most 65535 for precision 1 \(int8\), got 65536",
        {"heads": 65536, "kv_heads": 65536},
    ),
    ("block_mask", None, "block_mask must not be null", {**PACKED, "seqlen_q": 0}),
]

ATTEND: list[Refused] = [
    ("threshold_rows", 0, "threshold_rows must be 0 where thresholds is null, and only there", {}),
    ("thresholds", None, "threshold_rows must be 0 where thresholds is null, .* got 3", {}),
    ("threshold_rows", -1, f"threshold_rows must be between 0 and {INT32_MAX}, got -1", {}),
    ("thresholds", 0x50002, "thresholds must be aligned to 4 bytes", {}),
]

PAGES: list[Refused] = [
    ("block_table", 0x82001, "block_table must be aligned to 4 bytes", PAGED),
    ("block_table_stride", -1, "block_table_stride must be between 0 and .*, got -1", PAGED),
    ("pages", -1, f"pages must be between 1 and {INT32_MAX}, got -1", PAGED),
    ("pages", 0, f"pages must be between 1 and {INT32_MAX}, got 0", PAGED),
    ("pages", 2**31, f"pages must be between 1 and {INT32_MAX}, got 2147483648", PAGED),
    ("page_size", 0, "page_size must be between 16 and .*, got 0", PAGED),
    ("page_size", 24, "page_size must be a multiple of 16, got 24", PAGED),
    ("k_strides", Strides(12, 256, 128), "the pages stride of k must be a multiple of 8", PAGED),
    ("k_strides", Strides(4096, 12, 128), "the seqlen stride of k must be a multiple of 8", PAGED),
    ("k", None, "k must not be null", PAGED),
]

BOTH_KEYS: list[Refused] = [
    ("seqused_k", 0x81000, "cu_seqlens_k and seqused_k must not both be given", PACKED),
    ("cu_seqlens_k", 0x80000, "cu_seqlens_k must come with cu_seqlens_q", USED),
]

MAXIMA = [
    ("maxima", None, "maxima must not be null"),
    ("maxima", 0x40002, "maxima must be aligned to 4 bytes"),
]


@pytest.mark.parametrize("make_args", ALL_ARGS)
@pytest.mark.parametrize(("name", "value", "message"), EVERY)
def test_every_function_refuses(
    name: str, value: object, message: str, make_args: Callable[..., Args]
) -> None:
    status, said = call(make_args(**{name: value}))
    assert status == INVALID
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("make_args", "name", "value", "message", "others"),
    [
        (make_args, *refused)
        for make_args, lists in (
            (forward_args, (LENGTHS, THRESHOLDS, OUTPUTS, PAGES, BOTH_KEYS)),
            (select_args, (LENGTHS, THRESHOLDS, MASK, SELECT, PAGES, BOTH_KEYS)),
            (attend_args, (LENGTHS, OUTPUTS, MASK, ATTEND, PAGES, BOTH_KEYS)),
            (maxima_args, (PAGES,)),
        )
        for some in lists
        for refused in some
    ],
)
def test_refuses(
    make_args: Callable[..., Args],
    name: str,
    value: object,
    message: str,
    others: dict[str, object],
) -> None:
    status, said = call(make_args(**{**others, name: value}))
    assert status == INVALID
    assert re.search(message, said), said


@pytest.mark.parametrize(("name", "value", "message"), MAXIMA)
def test_block_maxima_refuses(name: str, value: object, message: str) -> None:
    status, said = call(maxima_args(**{name: value}))
    assert status == INVALID
    assert re.search(message, said), said


def test_block_maxima_of_packed_sequences_are_refused() -> None:
    status, said = call(maxima_args(cu_seqlens_q=0x80000, cu_seqlens_k=0x80000))
    assert status == UNSUPPORTED
    assert "cu_seqlens_q must be null" in said


@pytest.mark.parametrize("function", FUNCTIONS.values())
def test_null_for_the_struct_is_refused(function: str) -> None:
    assert call(None, function) == (INVALID, "args must not be null")


@pytest.mark.parametrize(
    "args",
    [
        forward_args(),
        maxima_args(),
        forward_args(lse=None, kept=None),
        forward_args(dtype=0, causal=0, rule=2, q_block=64),
        forward_args(cu_seqlens_q=0x80000, cu_seqlens_k=0x80004, q_strides=Strides(-1, 1024, 128)),
        forward_args(batch=1, q_strides=Strides(7, 1024, 128)),
        forward_args(kv_heads=1, k_strides=Strides(64000, 128, 5), v_strides=Strides(0, 128, -1)),
        forward_args(k_strides=Strides(0, 256, 128), v_strides=Strides(0, 256, 128)),
        forward_args(out_strides=Strides(128, 256, 76800)),
        forward_args(seqlen_k=0, k=None, v=None),
        maxima_args(rule=1, q_block=64, causal=0),
        select_args(),
        select_args(precision=0, voters=4, rule=1, seqlen_k=4097, mask_words=2),
        select_args(**PACKED, mask_words=7),
        select_args(**PACKED, seqlen_q=0, q=None, thresholds=None),
        attend_args(),
        attend_args(thresholds=None, threshold_rows=0, lse=None, kept=None),
        attend_args(**PACKED, mask_words=7),
        attend_args(seqlen_k=0, k=None, v=None, block_mask=None, mask_words=0),
        forward_args(**USED),
        forward_args(**USED, cu_seqlens_q=0x80000),
        forward_args(**PAGED, k_strides=Strides(8192, 512, 256)),
        forward_args(**PAGED, cu_seqlens_q=0x80000, v_strides=Strides(8192, 256, 4096)),
        forward_args(**{**PAGED, "page_size": 48, "block_table_stride": 0}),
        select_args(**PAGED, cu_seqlens_q=0x80000),
        attend_args(**PAGED, mask_words=3),
        maxima_args(**PAGED),
    ],
    ids=[
        "a plain call",
        "plain maxima",
        "no optional output",
        "other codes",
        "packed sequences, whose batch stride means nothing",
        "a batch of one, whose batch stride means nothing",
        "one kv head, whose stride means nothing",
        "keys shared by the batch",
        "an output with its dimensions in another order",
        "no keys, which are nowhere",
        "maxima with other codes",
        "plain selection",
        "selection with other codes",
        "selection of packed sequences",
        "selection of packed sequences without a query",
        "plain attention of a mask",
        "attention of a mask without what is optional",
        "attention of packed sequences' mask",
        "attention of a mask without keys",
        "used keys",
        "used keys and packed queries",
        "pages of packed keys and values",
        "pages, packed queries, heads before tokens",
        "pages of 48 keys, and one row of a table for all",
        "selection of pages",
        "attention of a mask with more bits than there are keys in pages",
        "maxima of pages",
    ],
)
def test_arguments_that_break_no_rule_get_as_far_as_the_device(args: Args) -> None:
    assert passes_validation(args)


@pytest.mark.parametrize(
    "args",
    [
        forward_args(batch=0, q=None, k=None, v=None, out=None, thresholds=None),
        forward_args(seqlen_q=0, q=None, out=None, thresholds=None),
        forward_args(batch=0, seqlen_q=0, seqlen_k=0, cu_seqlens_q=0x80000, cu_seqlens_k=0x80000),
        maxima_args(batch=0, q=None, k=None, maxima=None),
        maxima_args(seqlen_q=0, q=None, maxima=None),
        maxima_args(seqlen_k=0, k=None, maxima=None),
        select_args(batch=0, q=None, k=None, thresholds=None, block_mask=None),
        select_args(seqlen_q=0, q=None, block_mask=None),
        select_args(seqlen_k=0, k=None, mask_words=0, block_mask=None),
        attend_args(batch=0, q=None, k=None, v=None, out=None, block_mask=None),
        attend_args(seqlen_q=0, q=None, out=None, block_mask=None),
        attend_args(**PACKED, seqlen_q=0, q=None, out=None, kept=None, block_mask=None),
    ],
    ids=[
        *("no batch", "no queries", "no sequences"),
        *("maxima of no batch", "maxima of no queries", "maxima of no keys"),
        *("selection of no batch", "selection of no queries", "selection of no keys"),
        *("attention of no batch's mask", "attention of no queries' mask"),
        "attention of packed sequences' mask without queries",
    ],
)
def test_nothing_to_do_is_done_without_a_gpu(args: Args) -> None:
    assert call(args) == (OK, "")


def test_nothing_to_do_is_still_checked() -> None:
    status, said = call(forward_args(batch=0, scale=-1.0))
    assert (status, said) == (INVALID, "scale must be positive and finite, got -1")


@pytest.mark.parametrize("make_args", [select_args, attend_args])
def test_a_workspace_is_asked_for_and_checked(make_args: Callable[..., Any]) -> None:
    kind = "select_blocks" if make_args is select_args else "attend_blocks"
    query = f"bsfa_{kind}_workspace"
    library, size = _native.library(), ctypes.c_uint64(77)
    # Neither tensors nor a workspace are needed, nor a GPU.
    args = make_args(q=None, k=None, block_mask=None, workspace=None, workspace_bytes=0)
    status = getattr(library, query)(bytes(args), size)
    if not any(kernel.name == kind for kernel in bsfa_kernel.build_info().kernels):
        assert status == UNSUPPORTED
        assert f"without {kind} kernels" in library.bsfa_last_error().decode()
        return
    assert status == OK
    assert 0 < size.value < 2**30
    need = f"this call needs {size.value} bytes"
    assert call(make_args(workspace=None)) == (INVALID, f"workspace must not be null: {need}")
    for changes, words in (
        ({"workspace": 0xA0010}, "workspace must be aligned to 256 bytes, and is 16 bytes off"),
        (
            {"workspace_bytes": size.value - 1},
            f"workspace_bytes must be at least {size.value}, got {size.value - 1}",
        ),
    ):
        assert call(make_args(**changes)) == (INVALID, words)
    assert passes_validation(make_args(workspace_bytes=size.value))


@pytest.mark.parametrize("make_args", [select_args, attend_args])
def test_a_workspace_query_is_checked(make_args: Callable[..., Any]) -> None:
    query = "bsfa_select_blocks_workspace"
    if make_args is attend_args:
        query = "bsfa_attend_blocks_workspace"
    library, size = _native.library(), ctypes.c_uint64(77)
    assert getattr(library, query)(bytes(make_args(scale=-1.0)), size) == INVALID
    assert library.bsfa_last_error() == b"scale must be positive and finite, got -1"
    assert getattr(library, query)(bytes(make_args()), None) == INVALID
    assert library.bsfa_last_error() == b"bytes must not be null"
    assert getattr(library, query)(None, size) == INVALID
    assert getattr(library, query)(bytes(make_args(seqlen_q=0)), size) == OK
    assert size.value == 0


def skip_if_served(dtype: str, head_dim: int) -> None:
    """Skip a test of what has no kernel where the library has all of them."""
    kernels = bsfa_kernel.build_info().kernels
    if any(k.name == "forward" and k.dtype == dtype and head_dim in k.head_dims for k in kernels):
        pytest.skip("the library has a kernel for every head dimension")


def too_wide(**changes: object) -> ForwardArgs:
    """Right arguments, of a head dimension that no kernel serves."""
    skip_if_served("bfloat16", 136)
    strides = Strides(SEQLEN_Q * HEADS * 136, HEADS * 136, 136)
    return forward_args(head_dim=136, out_strides=strides, **changes)


def test_kernel_that_was_not_built_is_named_with_those_that_were() -> None:
    status, said = call(too_wide())
    assert status == UNSUPPORTED
    if bsfa_kernel.build_info().kernels:
        assert "no forward kernel for bfloat16 with head_dim 136; it has " in said
    else:
        assert "built without forward kernels: build it with nvcc 12.4 or newer" in said


@pytest.mark.parametrize("arch", [80, 90])
def test_architecture_that_is_insisted_on_is_named(arch: int) -> None:
    status, said = call(too_wide(arch=arch))
    assert status == UNSUPPORTED
    assert not bsfa_kernel.build_info().kernels or f"head_dim 136 on sm_{arch}; it has" in said


def test_device_that_is_not_there_is_reported_in_words() -> None:
    kernels = bsfa_kernel.build_info().kernels
    if not kernels:
        pytest.skip("the library was built without kernels, and never asks for a device")
    dtype = {"float16": 0, "bfloat16": 1}[kernels[0].dtype]
    status, said = call(forward_args(head_dim=kernels[0].head_dim, dtype=dtype))
    if status == INVALID:
        assert re.fullmatch(r"device must be below the number of CUDA devices, \d+, got 9999", said)
    else:
        assert status == CUDA_ERROR
        assert re.match(r"cudaGetDevice\(.*\) failed: cudaError\w+: \w+", said)


def test_message_of_the_last_failure_outlives_a_success() -> None:
    call(forward_args(causal=5))
    call(forward_args(batch=0))
    assert _native.library().bsfa_last_error() == b"causal must be 0 or 1, got 5"


def test_messages_belong_to_threads() -> None:
    call(forward_args(causal=5))
    said: list[str] = []

    def other() -> None:
        said.append(_native.library().bsfa_last_error().decode())
        said.append(call(forward_args(causal=7))[1])

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert said == ["", "causal must be 0 or 1, got 7"]
    assert _native.library().bsfa_last_error() == b"causal must be 0 or 1, got 5"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"q_block": 32}, ValueError),
        ({"q": torch.zeros(1, 10, 4, 136, dtype=torch.float16)}, NotImplementedError),
    ],
)
def test_python_raises_what_the_status_means(
    changes: dict[str, Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    if error is NotImplementedError:
        skip_if_served("float16", 136)
    monkeypatch.setattr(_native, "_device", lambda q: NO_SUCH_DEVICE)
    monkeypatch.setattr(_native, "_current_stream", lambda device: 0)
    q = torch.zeros(1, 10, 4, 64, dtype=torch.float16)
    valid = ForwardCall(
        *(q, q, q, torch.zeros(4, 1), None, None, True, None, "absolute", 128, 64, 1),
        return_lse=False,
        return_kept=False,
    )
    wrong = valid._replace(**changes)
    wrong = wrong._replace(k=wrong.q, v=wrong.q)
    with pytest.raises(error, match=r"sparsity block|forward kernel"):
        _native.forward(wrong, torch.zeros_like(wrong.q), None, None)
