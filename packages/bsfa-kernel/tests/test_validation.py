# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Bad arguments are refused with rule and value; odd ones give sound results."""

from __future__ import annotations

import _ctypes
import ctypes
import math
import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bsfa_kernel
from bsfa_kernel import (
    DEFAULT_GEOMETRY,
    GEOMETRIES,
    Geometry,
    _auto,
    _checks,
    _native,
    _torch_op,
    block_maxima,
    block_sparse_attention,
    reference,
    resolve_selection,
    threshold_row,
)
from bsfa_kernel._calls import ForwardCall
from bsfa_kernel.rules import RULE_CODES, RULES, SELECTIONS

INF = math.inf


def arguments(**changes):
    """Arguments of a valid call, with some of them changed."""
    valid = {
        "q": torch.zeros(2, 10, 4, 8),
        "k": torch.zeros(2, 12, 2, 8),
        "v": torch.zeros(2, 12, 2, 8),
        "thresholds": torch.zeros(4, 3),
    }
    return {**valid, **changes}


def packed_arguments(**changes):
    """Arguments of a valid call on packed sequences, with some of them changed."""
    valid = {
        "q": torch.zeros(10, 4, 8),
        "k": torch.zeros(12, 2, 8),
        "v": torch.zeros(12, 2, 8),
        "thresholds": torch.zeros(4, 3),
        "cu_seqlens_q": torch.tensor([0, 4, 10], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 6, 12], dtype=torch.int32),
    }
    return {**valid, **changes}


def starts(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def paged_arguments(**changes):
    """Arguments of a valid call on paged keys, with some of them changed."""
    valid = {
        "q": torch.zeros(2, 10, 4, 8),
        "k": torch.zeros(7, 16, 2, 8),
        "v": torch.zeros(7, 16, 2, 8),
        "thresholds": torch.zeros(4, 3),
        "block_table": torch.tensor([[6, 0, -1], [3, 9, 9]], dtype=torch.int32),
        "seqused_k": torch.tensor([17, 16], dtype=torch.int32),
    }
    return {**valid, **changes}


REFUSED = {
    "q no tensor": (arguments(q=[1.0]), TypeError, "q must be a torch.Tensor, got list"),
    "v no tensor": (arguments(v=None), TypeError, "v must be a torch.Tensor, got NoneType"),
    "thresholds no tensor": (
        arguments(thresholds=0.0),
        TypeError,
        "thresholds must be a torch.Tensor, got float",
    ),
    "q of three dimensions": (
        arguments(q=torch.zeros(10, 4, 8)),
        ValueError,
        "q must be [batch, seqlen_q, heads, head_dim], got the shape [10, 4, 8]",
    ),
    "k of five dimensions": (
        arguments(k=torch.zeros(1, 2, 12, 2, 8)),
        ValueError,
        "k must be [batch, seqlen_k, kv_heads, head_dim], got the shape [1, 2, 12, 2, 8]",
    ),
    "v of another shape": (
        arguments(v=torch.zeros(2, 11, 2, 8)),
        ValueError,
        "v must have the shape of k, got [2, 11, 2, 8] and [2, 12, 2, 8]",
    ),
    "integers": (
        arguments(q=torch.zeros(2, 10, 4, 8, dtype=torch.int64)),
        TypeError,
        "q must be float16, bfloat16, float32 or float64, got int64",
    ),
    "mixed dtypes": (
        arguments(k=torch.zeros(2, 12, 2, 8, dtype=torch.float16)),
        TypeError,
        "k must have the dtype of q (float32), got float16",
    ),
    "v of another dtype": (
        arguments(v=torch.zeros(2, 12, 2, 8, dtype=torch.float64)),
        TypeError,
        "v must have the dtype of q (float32), got float64",
    ),
    "another batch": (
        arguments(k=torch.zeros(3, 12, 2, 8), v=torch.zeros(3, 12, 2, 8)),
        ValueError,
        "q and k must have the same batch, got 2 and 3",
    ),
    "v of another head_dim": (
        arguments(v=torch.zeros(2, 12, 2, 16)),
        ValueError,
        "v must have the head_dim of k: values that are narrower or wider than keys are not "
        "supported, got 16 and 8",
    ),
    "sinks of other heads": (
        arguments(sinks=torch.zeros(2)),
        ValueError,
        "sinks must be [heads], here [4]; got the shape [2]",
    ),
    "sinks of each batch": (
        arguments(sinks=torch.zeros(2, 4)),
        ValueError,
        "sinks must be [heads], here [4]; got the shape [2, 4]",
    ),
    "sinks of another dtype": (
        arguments(sinks=torch.zeros(4, dtype=torch.bfloat16)),
        TypeError,
        "sinks must be float32, got bfloat16",
    ),
    "sinks that are no tensor": (
        arguments(sinks=0.0),
        TypeError,
        "sinks must be a torch.Tensor, got float",
    ),
    "sinks on another device": (
        arguments(sinks=torch.zeros(4, device="meta")),
        ValueError,
        "sinks must be on the device of q (cpu), got meta",
    ),
    "another head_dim": (
        arguments(k=torch.zeros(2, 12, 2, 16), v=torch.zeros(2, 12, 2, 16)),
        ValueError,
        "q and k must have the same head_dim, got 8 and 16",
    ),
    "no head_dim": (
        arguments(**{name: torch.zeros(2, 12, 2, 0) for name in "qkv"}),
        ValueError,
        "head_dim must be at least 1, got 0",
    ),
    "heads no multiple": (
        arguments(k=torch.zeros(2, 12, 3, 8), v=torch.zeros(2, 12, 3, 8)),
        ValueError,
        "the heads of q must be a positive multiple of those of k, got 4 and 3",
    ),
    "no kv heads": (
        arguments(k=torch.zeros(2, 12, 0, 8), v=torch.zeros(2, 12, 0, 8)),
        ValueError,
        "the heads of q must be a positive multiple of those of k, got 4 and 0",
    ),
    "thresholds of one dimension": (
        arguments(thresholds=torch.zeros(4)),
        ValueError,
        "thresholds must be [heads, rows], got the shape [4]",
    ),
    "thresholds for other heads": (
        arguments(thresholds=torch.zeros(2, 3)),
        ValueError,
        "q has 4 heads, thresholds have the shape [2, 3]",
    ),
    "thresholds without rows": (
        arguments(thresholds=torch.zeros(4, 0)),
        ValueError,
        "thresholds must have at least one row, got none",
    ),
    "thresholds in float64": (
        arguments(thresholds=torch.zeros(4, 3, dtype=torch.float64)),
        TypeError,
        "thresholds must be float32, got float64",
    ),
    "a NaN threshold": (
        arguments(thresholds=torch.tensor([[0.0], [0.0], [math.nan], [0.0]])),
        ValueError,
        "thresholds must not be NaN, got NaN for head 2, row 0",
    ),
    "no scale": (
        arguments(scale=0.0),
        ValueError,
        "scale must be between 2**-126 and 2**127, got 0.0",
    ),
    "negative scale": (
        arguments(scale=-1),
        ValueError,
        "scale must be between 2**-126 and 2**127, got -1",
    ),
    "infinite scale": (
        arguments(scale=INF),
        ValueError,
        "scale must be between 2**-126 and 2**127, got inf",
    ),
    "NaN scale": (
        arguments(scale=math.nan),
        ValueError,
        "scale must be between 2**-126 and 2**127, got nan",
    ),
    "scale no number": (
        arguments(scale="1"),
        TypeError,
        "scale must be a number or None, got str",
    ),
    "unknown rule": (
        arguments(rule="relative"),
        ValueError,
        "rule must be one of absolute, running_max, peak_lse; got 'relative'",
    ),
    "rule no string": (arguments(rule=None), ValueError, "got None"),
    "three voters": (
        arguments(voters=3),
        ValueError,
        "voters must be one of 1, 2, 4; got 3",
    ),
    "voters as text": (
        arguments(voters="2"),
        ValueError,
        "voters must be one of 1, 2, 4; got '2'",
    ),
    "voters as a float": (
        arguments(voters=2.0),
        ValueError,
        "voters must be one of 1, 2, 4; got 2.0",
    ),
    "voters as a bool": (
        arguments(voters=True),
        ValueError,
        "voters must be one of 1, 2, 4; got True",
    ),
    "unknown selection": (
        arguments(selection="int4"),
        ValueError,
        "selection must be one of exact, int8, auto; got 'int4'",
    ),
    "selection none": (
        arguments(selection=None),
        ValueError,
        "selection must be one of exact, int8, auto; got None",
    ),
    "a longest sequence of padded tensors": (
        arguments(selection="int8", max_seqlen_k=12),
        ValueError,
        "max_seqlen_k is for packed sequences and block tables: without cu_seqlens_k and "
        "block_table it must be None, got 12",
    ),
    "unknown geometry": (
        arguments(geometry=Geometry(64, 128)),
        ValueError,
        "geometry must be one of the Geometry values 128x64, 64x64; got 64x128",
    ),
    "geometry of three": (
        arguments(geometry=(1, 2, 3)),
        ValueError,
        "geometry must be one of the Geometry values 128x64, 64x64; got (1, 2, 3)",
    ),
    "scale that float32 lacks": (
        arguments(scale=1e39),
        ValueError,
        "scale must be between 2**-126 and 2**127, got 1e+39",
    ),
    "scale that overflows in base 2": (
        arguments(scale=2.5e38),
        ValueError,
        "scale must be between 2**-126 and 2**127, got 2.5e+38",
    ),
    "scale that is 0 in float32": (
        arguments(scale=1e-50),
        ValueError,
        "scale must be between 2**-126 and 2**127, got 1e-50",
    ),
    "scale beyond float64": (
        arguments(scale=10**400),
        ValueError,
        "scale must be between 2**-126 and 2**127, got 1000",
    ),
    "causal as text": (
        arguments(causal="False"),
        TypeError,
        "causal must be True or False, got 'False'",
    ),
    "causal none": (arguments(causal=None), TypeError, "causal must be True or False, got None"),
    "causal as a number": (arguments(causal=1), TypeError, "causal must be True or False, got 1"),
    "geometry of floats": (
        arguments(geometry=(64.0, 64.0)),
        ValueError,
        "geometry must be one of the Geometry values 128x64, 64x64; got (64.0, 64.0)",
    ),
    "geometry as an array": (
        arguments(geometry=np.array([64, 64])),
        ValueError,
        "geometry must be one of the Geometry values 128x64, 64x64; got array([64, 64])",
    ),
    "geometry as text": (
        arguments(geometry="128x64"),
        ValueError,
        "geometry must be one of the Geometry values 128x64, 64x64; got '128x64'",
    ),
    "geometry none": (
        arguments(geometry=None),
        ValueError,
        "geometry must be one of the Geometry values 128x64, 64x64; got None",
    ),
    "only cu_seqlens_q": (
        packed_arguments(cu_seqlens_k=None),
        ValueError,
        "cu_seqlens_q must be given together with cu_seqlens_k, or with seqused_k; got "
        "cu_seqlens_q without either",
    ),
    "only cu_seqlens_k": (
        packed_arguments(cu_seqlens_q=None),
        ValueError,
        "got cu_seqlens_k without cu_seqlens_q",
    ),
    "cu_seqlens no tensor": (
        packed_arguments(cu_seqlens_q=[0, 4, 10]),
        TypeError,
        "cu_seqlens_q must be a torch.Tensor, got list",
    ),
    "cu_seqlens with four dimensions": (
        arguments(cu_seqlens_q=starts(0, 10), cu_seqlens_k=starts(0, 12)),
        ValueError,
        "with cu_seqlens_q, q must be [total_q, heads, head_dim], got the shape [2, 10, 4, 8]",
    ),
    "cu_seqlens in int64": (
        packed_arguments(cu_seqlens_q=starts(0, 4, 10, dtype=torch.int64)),
        TypeError,
        "cu_seqlens_q must be int32, got int64",
    ),
    "cu_seqlens of two dimensions": (
        packed_arguments(cu_seqlens_q=starts([0, 4, 10])),
        ValueError,
        "cu_seqlens_q must be [batch + 1], got the shape [1, 3]",
    ),
    "cu_seqlens empty": (
        packed_arguments(cu_seqlens_q=starts(), cu_seqlens_k=starts()),
        ValueError,
        "cu_seqlens_q must be [batch + 1], got the shape [0]",
    ),
    "cu_seqlens of different lengths": (
        packed_arguments(cu_seqlens_q=starts(0, 10)),
        ValueError,
        "cu_seqlens_q and cu_seqlens_k must have the same length (batch + 1), got 2 and 3",
    ),
    "cu_seqlens that do not start at 0": (
        packed_arguments(cu_seqlens_q=starts(1, 4, 10)),
        ValueError,
        "cu_seqlens_q must go from 0 to total_q (10), got 1 to 10",
    ),
    "cu_seqlens that stop early": (
        packed_arguments(cu_seqlens_k=starts(0, 6, 11)),
        ValueError,
        "cu_seqlens_k must go from 0 to total_k (12), got 0 to 11",
    ),
    "cu_seqlens that decrease": (
        packed_arguments(cu_seqlens_q=starts(0, 12, 10)),
        ValueError,
        "cu_seqlens_q must not decrease, got 12 followed by 10 at sequence 1",
    ),
    "used keys of packed ones": (
        packed_arguments(seqused_k=starts(6, 6)),
        ValueError,
        "seqused_k says how many keys there are of padded or paged ones; got both seqused_k and "
        "cu_seqlens_k",
    ),
    "a table without lengths": (
        paged_arguments(seqused_k=None),
        ValueError,
        "block_table needs seqused_k, got block_table without seqused_k",
    ),
    "a table for packed keys": (
        packed_arguments(block_table=torch.zeros(2, 1, dtype=torch.int32)),
        ValueError,
        "block_table needs seqused_k",
    ),
    "used keys no tensor": (
        paged_arguments(seqused_k=[17, 16]),
        TypeError,
        "seqused_k must be a torch.Tensor, got list",
    ),
    "used keys in int64": (
        paged_arguments(seqused_k=starts(17, 16, dtype=torch.int64)),
        TypeError,
        "seqused_k must be int32, got int64",
    ),
    "used keys of two dimensions": (
        paged_arguments(seqused_k=starts([17, 16])),
        ValueError,
        "seqused_k must be [batch], got the shape [1, 2]",
    ),
    "used keys of another batch": (
        paged_arguments(seqused_k=starts(17, 16, 1)),
        ValueError,
        "seqused_k must have one number for each of 2 sequences, got 3",
    ),
    "used keys elsewhere": (
        paged_arguments(seqused_k=starts(17, 16).to("meta")),
        ValueError,
        "seqused_k must be on the device of q (cpu), got meta",
    ),
    "less keys than none": (
        paged_arguments(seqused_k=starts(17, -1)),
        ValueError,
        "seqused_k must be between 0 and the keys that there is room for (48), got -1 for sequence "
        "1",
    ),
    "more keys than pages": (
        paged_arguments(seqused_k=starts(49, 16)),
        ValueError,
        "seqused_k must be between 0 and the keys that there is room for (48), got 49 for sequence "
        "0",
    ),
    "more keys than padded ones": (
        arguments(seqused_k=starts(12, 13)),
        ValueError,
        "seqused_k must be between 0 and the keys that there is room for (12), got 13 for sequence "
        "1",
    ),
    "a page that is none": (
        paged_arguments(seqused_k=starts(33, 16)),
        ValueError,
        "entries of block_table must be pages of k, 0 to 6; got -1 for sequence 0, page 2",
    ),
    "a page too far": (
        paged_arguments(seqused_k=starts(17, 17)),
        ValueError,
        "entries of block_table must be pages of k, 0 to 6; got 9 for sequence 1, page 1",
    ),
    "a table in int64": (
        paged_arguments(block_table=torch.zeros(2, 3, dtype=torch.int64)),
        TypeError,
        "block_table must be int32, got int64",
    ),
    "a table of another batch": (
        paged_arguments(block_table=torch.zeros(3, 3, dtype=torch.int32)),
        ValueError,
        "block_table must be [batch, max_pages], here [2, max_pages]; got the shape [3, 3]",
    ),
    "a table of one dimension": (
        paged_arguments(block_table=torch.zeros(2, dtype=torch.int32)),
        ValueError,
        "block_table must be [batch, max_pages], here [2, max_pages]; got the shape [2]",
    ),
    "a table with gaps": (
        paged_arguments(block_table=torch.zeros(2, 6, dtype=torch.int32)[:, ::2]),
        ValueError,
        "the last stride of block_table must be 1, got the strides (6, 2)",
    ),
    "a table elsewhere": (
        paged_arguments(block_table=torch.zeros(2, 3, dtype=torch.int32, device="meta")),
        ValueError,
        "block_table must be on the device of q (cpu), got meta",
    ),
    "a page of 24 keys": (
        paged_arguments(**{name: torch.zeros(7, 24, 2, 8) for name in "kv"}),
        ValueError,
        "the keys of a page must be a positive multiple of 16, got 24",
    ),
    "a page of no keys": (
        paged_arguments(**{name: torch.zeros(7, 0, 2, 8) for name in "kv"}),
        ValueError,
        "the keys of a page must be a positive multiple of 16, got 0",
    ),
    "pages of three dimensions": (
        paged_arguments(**{name: torch.zeros(7, 16, 8) for name in "kv"}),
        ValueError,
        "with block_table, k must be [pages, page_size, kv_heads, head_dim], got the shape "
        "[7, 16, 8]",
    ),
    "no page": (
        paged_arguments(**{name: torch.zeros(0, 16, 2, 8) for name in "kv"}),
        ValueError,
        "with block_table, k must hold a page at least, got the shape [0, 16, 2, 8]",
    ),
    "pages of another shape": (
        paged_arguments(v=torch.zeros(8, 16, 2, 8)),
        ValueError,
        "v must have the shape of k, got [8, 16, 2, 8] and [7, 16, 2, 8]",
    ),
    "a longest sequence beyond the table": (
        paged_arguments(max_seqlen_k=49),
        ValueError,
        "max_seqlen_k must be at most max_pages * page_size, 48; got 49",
    ),
    "a longest sequence that is exceeded": (
        paged_arguments(max_seqlen_k=16),
        ValueError,
        "max_seqlen_k must be at least the keys of the longest sequence, 17; got 16",
    ),
    "a longest sequence of used keys": (
        arguments(seqused_k=starts(12, 3), selection="int8", max_seqlen_k=12),
        ValueError,
        "max_seqlen_k is for packed sequences and block tables",
    ),
    "used keys of another packed batch": (
        {**arguments(q=torch.zeros(10, 4, 8)), "cu_seqlens_q": starts(0, 4, 8, 10)}
        | {"seqused_k": starts(1, 2, 3)},
        ValueError,
        "cu_seqlens_q and k must have the same batch, got 3 and 2",
    ),
    "another device": (
        arguments(thresholds=torch.zeros(4, 3, device="meta")),
        ValueError,
        "thresholds must be on the device of q (cpu), got meta",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_argument_is_refused_with_rule_and_value(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        block_sparse_attention(**call)


@pytest.mark.parametrize(
    "name",
    [
        "q of three dimensions",
        "integers",
        "another head_dim",
        "heads no multiple",
        "unknown rule",
        "unknown geometry",
        "infinite scale",
        "another batch",
    ],
)
def test_block_maxima_refuses_the_same(name):
    call, error, message = REFUSED[name]
    rest = {key: value for key, value in call.items() if key not in ("v", "thresholds")}
    with pytest.raises(error, match=re.escape(message)):
        block_maxima(**rest)


def test_the_operator_itself_checks_its_arguments():
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 16)
    with pytest.raises(ValueError, match="same head_dim"):
        torch.ops.bsfa.forward(
            q, k, k, torch.zeros(2, 1), None, None, True, None, "absolute", 128, 64, 1, False, False
        )


def test_reference_takes_any_geometry_but_no_empty_one():
    assert reference.attention(**arguments(geometry=Geometry(3, 5))).kept.shape == (2, 4, 4)
    with pytest.raises(
        ValueError, match=re.escape("geometry must be a Geometry or a tuple of two positive ints")
    ):
        reference.attention(**arguments(geometry=Geometry(0, 64)))


# ------------------------------------------------------------------------------- odd but valid


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("seqlen_q", [0, 1, 300])
@pytest.mark.parametrize("seqlen_k", [0, 1, 300])
@pytest.mark.parametrize("causal", [True, False])
def test_empty_and_tiny_calls_give_outputs_of_the_stated_shapes(batch, seqlen_q, seqlen_k, causal):
    q = torch.randn(batch, seqlen_q, 4, 8, dtype=torch.bfloat16)
    k = torch.randn(batch, seqlen_k, 2, 8, dtype=torch.bfloat16)
    out, lse, kept = block_sparse_attention(
        q, k, k, torch.full((4, 1), -INF), causal=causal, return_lse=True, return_kept=True
    )
    assert out.shape == q.shape
    assert out.dtype == torch.bfloat16
    assert lse.shape == (batch, 4, seqlen_q)
    assert lse.dtype == torch.float32
    q_blocks = math.ceil((seqlen_q + (seqlen_k - seqlen_q) % 128) / 128) if seqlen_q else 0
    assert kept.shape == (batch, 4, q_blocks)
    assert kept.dtype == torch.int32
    assert not out.isnan().any()
    if seqlen_k == 0:
        assert (out == 0).all()
        assert (lse == -INF).all()
        assert (kept == 0).all()
    maxima = block_maxima(q, k, causal=causal)
    assert maxima.shape == (batch, 4, q_blocks, math.ceil(seqlen_k / 64))
    assert maxima.dtype == torch.float32


def test_empty_packed_calls_give_outputs_of_the_stated_shapes():
    empty = torch.zeros(0, 4, 8)
    out, lse, kept = block_sparse_attention(
        empty,
        empty,
        empty,
        torch.zeros(4, 1),
        cu_seqlens_q=starts(0, 0, 0),
        cu_seqlens_k=starts(0, 0, 0),
        return_lse=True,
        return_kept=True,
    )
    assert out.shape == (0, 4, 8)
    assert lse.shape == (4, 0)
    assert kept.tolist() == [[0, 0, 0, 0]] * 4
    out = block_sparse_attention(
        empty, empty, empty, torch.zeros(4, 1), cu_seqlens_q=starts(0), cu_seqlens_k=starts(0)
    )
    assert out.shape == (0, 4, 8)


def test_one_token_returns_its_value():
    q, k, v = (torch.randn(1, 1, 2, 64) for _ in range(3))
    out, lse, kept = block_sparse_attention(
        q, k, v, torch.full((2, 1), INF), return_lse=True, return_kept=True
    )
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(lse, (q * k).sum(-1).transpose(1, 2) / 8)
    assert kept.tolist() == [[[1], [1]]]


def test_thresholds_need_not_be_contiguous():
    q, k, v = (torch.randn(1, 300, 2, 64) for _ in range(3))
    thresholds = torch.randn(3, 2).T
    assert not thresholds.is_contiguous()
    expected = block_sparse_attention(q, k, v, thresholds.contiguous())
    assert torch.equal(block_sparse_attention(q, k, v, thresholds), expected)


def test_what_is_returned_is_what_was_asked_for():
    call = arguments()
    assert isinstance(block_sparse_attention(**call), torch.Tensor)
    for lse, kept, count in ((True, False, 2), (False, True, 2), (True, True, 3)):
        result = block_sparse_attention(**call, return_lse=lse, return_kept=kept)
        assert len(result) == count
        assert (result[-1].dtype == torch.int32) == kept


def test_float64_is_computed_and_returned_in_float64():
    call = {name: value.double() for name, value in arguments().items()}
    call["thresholds"] = call["thresholds"].float()
    out, lse = block_sparse_attention(**call, return_lse=True)
    assert out.dtype == lse.dtype == torch.float64


@pytest.mark.parametrize("geometry", [64, "64", "6464", (64.0, 64), (64,), [64, 64], None])
def test_reference_refuses_what_is_no_geometry(geometry):
    with pytest.raises(ValueError, match="a Geometry or a tuple of two positive ints, got"):
        reference.attention(**arguments(geometry=geometry))


def test_a_plain_tuple_is_a_geometry():
    expected = block_sparse_attention(**arguments(geometry=GEOMETRIES[1]))
    assert torch.equal(block_sparse_attention(**arguments(geometry=(64, 64))), expected)


@pytest.mark.parametrize("flag", ["return_lse", "return_kept"])
def test_outputs_are_asked_for_by_a_flag(flag):
    for value in ("no", None, 1, torch.tensor(True)):
        with pytest.raises(TypeError, match=f"{flag} must be True or False, got"):
            block_sparse_attention(**arguments(), **{flag: value})


@pytest.mark.parametrize(
    ("seqlen_k", "error", "message"),
    [
        ("9000", TypeError, "seqlen_k must be a whole number, got str"),
        (None, TypeError, "seqlen_k must be a whole number, got NoneType"),
        (1.5, TypeError, "seqlen_k must be a whole number, got float"),
        (-5, ValueError, "seqlen_k must be at least 0, got -5"),
    ],
)
def test_a_length_that_is_none_resolves_no_selection(seqlen_k, error, message):
    with pytest.raises(error, match=message):
        resolve_selection("auto", arguments()["q"], seqlen_k)


# --------------------------------------------------------------------------- geometry and rows


def test_geometry_is_written_and_read_as_queries_x_keys():
    assert str(DEFAULT_GEOMETRY) == "128x64"
    for geometry in GEOMETRIES:
        assert Geometry.parse(str(geometry)) == geometry
    for text in ("", "128", "128x", "x64", "128x64x2", "0x64", "-1x64", "axb"):
        with pytest.raises(ValueError, match="a geometry is written as queries x keys"):
            Geometry.parse(text)


@pytest.mark.parametrize(
    ("first_query", "seqlen_q", "seqlen_k", "rows", "row"),
    [
        (0, 256, 256, 8, 0),
        (128, 256, 256, 8, 1),
        (0, 128, 1024, 8, 7),
        (0, 1, 1024, 8, 7),
        (0, 128, 4096, 8, 7),
        (0, 500, 300, 8, 0),
        (256, 500, 300, 8, 0),
        (384, 500, 300, 8, 1),
        (384, 500, 300, 1, 0),
    ],
)
def test_threshold_row_is_the_absolute_position(first_query, seqlen_q, seqlen_k, rows, row):
    assert threshold_row(first_query, seqlen_q, seqlen_k, 128, rows) == row


def test_threshold_row_refuses_tables_without_rows():
    with pytest.raises(ValueError, match="at least one row, got 0"):
        threshold_row(0, 1, 1, 128, 0)
    with pytest.raises(ValueError, match="q_block must be at least 1, got 0"):
        threshold_row(0, 1, 1, 0, 1)


# --------------------------------------------------------------------------- the native library


class FakeLibrary:
    """Stands in for libbsfa: notes the bytes that it is called with, and returns a status."""

    def __init__(self, status: int = 0, message: bytes = b"") -> None:
        self.status, self.message = status, message
        self.calls: list[bytes] = []
        self.queries: list[bytes] = []

    def bsfa_forward(self, arguments: bytes) -> int:
        self.calls.append(arguments)
        return self.status

    bsfa_block_maxima = bsfa_select_blocks = bsfa_attend_blocks = bsfa_forward

    def bsfa_select_blocks_workspace(self, arguments: bytes, size: ctypes.c_uint64) -> int:
        self.queries.append(arguments)
        size.value = 768
        return self.status

    bsfa_attend_blocks_workspace = bsfa_select_blocks_workspace

    def bsfa_last_error(self) -> bytes:
        return self.message


@pytest.fixture
def fake_library(monkeypatch):
    """A library that does nothing, and CPU tensors that pass for those of device 3."""
    fake = FakeLibrary()
    monkeypatch.setattr(_native, "library", lambda: fake)

    monkeypatch.setattr(_native, "_current_stream", lambda device: 0x5EED)
    monkeypatch.setattr(_native, "_device", lambda q: 3)
    return fake


def test_native_arguments_arrive_in_their_fields(fake_library):
    q = torch.zeros(2, 10, 4, 64, dtype=torch.bfloat16)
    k = torch.zeros(2, 2, 12, 64, dtype=torch.bfloat16).transpose(1, 2)
    v = torch.zeros(2, 12, 2, 128, dtype=torch.bfloat16)[..., :64]
    thresholds = torch.zeros(4, 3)
    with _native.force_arch(90):
        out, lse, kept = _torch_op._forward_cuda(
            q, k, v, thresholds, None, None, True, None, "peak_lse", 64, 64, 1, True, True
        )
    (passed,) = fake_library.calls
    found = fields(_native.ForwardArgs.from_buffer_copy(passed))
    tensors = {
        name: [x.data_ptr(), *x.stride()[:3]] for name, x in zip("qkv", (q, k, v), strict=True)
    }
    assert found == {
        "abi_version": _native.ABI_VERSION,
        "struct_size": ctypes.sizeof(_native.ForwardArgs),
        "problem": {
            "device": 3,
            "arch": 90,
            "stream": 0x5EED,
            "dtype": 1,
            "rule": 2,
            "causal": 1,
            "q_block": 64,
            "k_block": 64,
            "scale": 0.125,
            "voters": 1,
            "batch": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 64,
            "seqlen_q": 10,
            "seqlen_k": 12,
            "q": tensors["q"],
            "k": tensors["k"],
            "cu_seqlens_q": None,
            "cu_seqlens_k": None,
            "seqused_k": None,
            "block_table": None,
            "block_table_stride": 0,
            "pages": 0,
            "page_size": 0,
            "sinks": None,
        },
        "v": tensors["v"],
        "out": [out.data_ptr(), *out.stride()[:3]],
        "thresholds": thresholds.data_ptr(),
        "threshold_rows": 3,
        "lse": lse.data_ptr(),
        "kept": kept.data_ptr(),
    }
    assert _native.insisted_arch() == 0


def fields(struct):
    """The members of a structure by name; a tensor as its address and strides."""
    if isinstance(struct, _native.TensorArg):
        strides = struct.strides
        return [struct.data, strides.batch, strides.seqlen, strides.heads]
    if not isinstance(struct, ctypes.Structure):
        return struct
    return {name: fields(getattr(struct, name)) for name, _ in struct._fields_}


def test_native_arguments_of_packed_sequences_arrive_in_their_fields(fake_library):
    q = torch.zeros(300, 4, 64, dtype=torch.float16)
    k = torch.zeros(200, 2, 64, dtype=torch.float16)
    starts_q, starts_k = starts(0, 100, 300), starts(0, 50, 200)
    thresholds = torch.zeros(4, 3)
    options = (False, 0.5, "absolute", 128, 64, 2, False, True)
    out, lse, kept = _torch_op._forward_cuda(q, k, k, thresholds, starts_q, starts_k, *options)
    found = fields(_native.ForwardArgs.from_buffer_copy(fake_library.calls[0]))
    problem = found["problem"]
    names = ("batch", "seqlen_q", "seqlen_k", "causal", "voters")
    assert [problem[name] for name in names] == [2, 300, 200, 0, 2]
    assert problem["cu_seqlens_q"] == starts_q.data_ptr()
    assert problem["cu_seqlens_k"] == starts_k.data_ptr()
    assert problem["q"] == [q.data_ptr(), 0, 256, 64]
    assert problem["k"] == found["v"] == [k.data_ptr(), 0, 128, 64]
    assert found["out"] == [out.data_ptr(), 0, 256, 64]
    assert found["lse"] is None
    assert lse.numel() == 0
    assert kept.shape == (4, 300 // 128 + 4)
    assert out.shape == q.shape


def paged_on_device(page_size=32):
    """k, v, block_table and seqused_k of two sequences, in one cache of packed keys and values."""
    cache = torch.zeros(9, 2, page_size, 128, dtype=torch.float16).transpose(1, 2)
    table = torch.zeros(2, 10, dtype=torch.int32)[:, 1:8]
    return *cache.split(64, -1), table, torch.zeros(4, dtype=torch.int32)[::2]


PAGED_PROBLEM = {"block_table_stride": 10, "pages": 9, "page_size": 32, "kv_heads": 2, "batch": 2}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("longest", [None, 100])
def test_native_arguments_of_paged_keys_arrive_in_their_fields(
    fake_library, monkeypatch, packed, longest
):
    note_workspaces(monkeypatch)
    kept_alive = note_lengths(monkeypatch)
    q = torch.zeros(2, 150, 4, 64, dtype=torch.float16)
    q = q.flatten(0, 1) if packed else q
    starts_q = starts(0, 100, 300) if packed else None
    k, v, table, used = paged_on_device()
    thresholds = torch.zeros(4, 3)
    options = (False, 0.5, "absolute", 128, 64, 2)
    columns = (4, 300 // 128 + 4) if packed else (2, 4, 3)
    expected = {
        **PAGED_PROBLEM,
        "seqlen_q": 300 if packed else 150,
        "seqlen_k": longest or 7 * 32,
        "cu_seqlens_q": starts_q.data_ptr() if packed else None,
        "cu_seqlens_k": None,
        "block_table": table.data_ptr(),
        "sinks": None,
    }
    call = (q, k, v, thresholds, starts_q, None, *options, True, True)
    for selection, mirrors in (
        ("exact", (_native.ForwardArgs,)),
        ("int8", (_native.SelectBlocksArgs, _native.AttendBlocksArgs)),
    ):
        _, _, kept = _torch_op._forward_cuda(*call, selection, longest, table, used)
        assert kept.shape == columns
        for mirror, passed in zip(mirrors, fake_library.calls, strict=True):
            found = fields(mirror.from_buffer_copy(passed))
            problem = found["problem"]
            # Attention over a mask has room for as many keys as the mask has bits.
            room = {"seqlen_k": 7 * 32} if mirror is _native.AttendBlocksArgs else {}
            assert {name: problem[name] for name in expected} == {**expected, **room}
            assert problem["k"] == [k.data_ptr(), *k.stride()[:3]]
            if mirror is not _native.SelectBlocksArgs:
                assert found["v"] == [v.data_ptr(), *v.stride()[:3]]
            assert problem["seqused_k"] == kept_alive.pop(0).seqused_k.data_ptr()
        fake_library.calls.clear()


@pytest.mark.parametrize("selection", ["exact", "int8"])
def test_native_arguments_of_sinks_arrive_in_their_field(fake_library, monkeypatch, selection):
    note_workspaces(monkeypatch)
    kept_alive = note_lengths(monkeypatch)
    q = torch.zeros(2, 10, 4, 40, dtype=torch.float16)
    options = (True, None, "peak_lse", 128, 64)
    rest = (q, q, torch.zeros(4, 1), None, None, *options, 1, True, True, selection, None, None)
    strided = torch.zeros(8)[::2]
    for sinks in (torch.zeros(4), strided):
        _torch_op._forward_cuda(q, *rest, None, sinks)
        _torch_op._block_maxima_cuda(q, q, *options, None, None, sinks)
        mirrors = {
            "exact": (_native.ForwardArgs, _native.BlockMaximaArgs),
            "int8": (
                _native.SelectBlocksArgs,
                _native.AttendBlocksArgs,
                _native.BlockMaximaArgs,
            ),
        }[selection]
        for mirror, passed in zip(mirrors, fake_library.calls, strict=True):
            problem = fields(mirror.from_buffer_copy(passed).problem)
            given = kept_alive.pop(0).sinks
            assert given.is_contiguous()
            assert (given is sinks) == (sinks is not strided)
            assert problem["sinks"] == given.data_ptr()
            assert problem["head_dim"] == 40
            assert problem["scale"] == pytest.approx(40**-0.5)
        fake_library.calls.clear()


class Operators(TorchDispatchMode):
    """The names of the operators that run within."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("selection", ["exact", "int8"])
def test_a_call_on_paged_keys_runs_nothing_but_allocations(fake_library, selection):
    # Neither a copy nor a look at a value, for which a GPU would have to wait.
    q = torch.zeros(300, 4, 64, dtype=torch.float16)
    k, v, table, used = paged_on_device()
    starts_q, used, thresholds = starts(0, 100, 300), used.contiguous(), torch.zeros(4, 3)
    options = (True, None, "peak_lse", 64, 64, 1, True, True, selection, None)
    with Operators() as seen:
        _torch_op._forward_cuda(q, k, v, thresholds, starts_q, None, *options, table, used)
    assert len(fake_library.calls) == (1 if selection == "exact" else 2)
    assert seen.names <= {"empty", "empty_like", "new_empty"}


def note_lengths(monkeypatch):
    """A list of what calls keep of their lengths, as they come."""
    noted = []

    class Noted(_native._Arrays):
        def __init__(self, call):
            super().__init__(call)
            noted.append(self)

    monkeypatch.setattr(_native, "_Arrays", Noted)
    return noted


def test_native_arguments_of_used_keys_arrive_in_their_fields(fake_library):
    q = torch.zeros(2, 10, 4, 64, dtype=torch.float16)
    k = torch.zeros(2, 300, 2, 64, dtype=torch.float16)
    used, starts_q = starts(300, 7), starts(0, 8, 20)
    options = (True, None, "absolute", 128, 64)
    _torch_op._block_maxima_cuda(q, k, *options, None, used)
    problem = fields(_native.BlockMaximaArgs.from_buffer_copy(fake_library.calls.pop()).problem)
    expected = {"seqused_k": used.data_ptr(), "block_table": None, "pages": 0, "page_size": 0}
    expected |= {"seqlen_k": 300, "batch": 2, "cu_seqlens_q": None, "cu_seqlens_k": None}
    assert {name: problem[name] for name in expected} == expected
    rest = (k, k, torch.zeros(4, 1), starts_q, None, *options, 1, False, False)
    _torch_op._forward_cuda(q.flatten(0, 1), *rest, "exact", None, None, used)
    problem = fields(_native.ForwardArgs.from_buffer_copy(fake_library.calls.pop()).problem)
    expected |= {"cu_seqlens_q": starts_q.data_ptr(), "seqlen_q": 20}
    assert {name: problem[name] for name in expected} == expected
    assert problem["k"] == [k.data_ptr(), *k.stride()[:3]]


def test_attention_of_paged_keys_has_the_room_of_its_mask(fake_library, monkeypatch):
    note_workspaces(monkeypatch)
    k, v, table, used = paged_on_device()
    q = torch.zeros(2, 150, 4, 64, dtype=torch.float16)
    options = (None, None, None, True, None, 128, 64, False, False)
    many = table.new_zeros(2, 200)
    for words, given, room in ((1, table, 7 * 32), (1, many, 4096), (2, many, 200 * 32)):
        mask = torch.zeros(2, 4, 3, words, dtype=torch.int64)
        _torch_op._attend_blocks_cuda(q, k, v, mask, *options, given, used)
        found = _native.AttendBlocksArgs.from_buffer_copy(fake_library.calls.pop())
        assert (found.problem.seqlen_k, found.mask_words) == (room, words)
    with pytest.raises(ValueError, match="block_mask must have at least one word, got 0"):
        _torch_op._attend_blocks_cuda(q, k, v, mask[..., :0], *options, table, used)


def test_native_arguments_of_block_maxima_arrive_in_their_fields(fake_library):
    q = torch.zeros(2, 10, 4, 64, dtype=torch.float16)
    k = torch.zeros(2, 12, 2, 64, dtype=torch.float16)
    maxima = _torch_op._block_maxima_cuda(q, k, True, 0.25, "running_max", 128, 64)
    found = _native.BlockMaximaArgs.from_buffer_copy(fake_library.calls[0])
    assert found.struct_size == ctypes.sizeof(_native.BlockMaximaArgs)
    assert found.maxima == maxima.data_ptr()
    problem = found.problem
    assert (problem.device, problem.dtype, problem.rule, problem.causal) == (3, 0, 1, 1)
    assert (problem.scale, problem.seqlen_q, problem.seqlen_k, problem.kv_heads) == (
        0.25,
        10,
        12,
        2,
    )
    assert fields(problem.q) == [q.data_ptr(), *q.stride()[:3]]
    assert fields(problem.k) == [k.data_ptr(), *k.stride()[:3]]


def test_native_arguments_of_select_blocks_arrive_in_their_fields(fake_library, monkeypatch):
    taken = note_workspaces(monkeypatch)
    q = torch.zeros(2, 300, 4, 64, dtype=torch.bfloat16)
    k = torch.zeros(2, 5000, 2, 64, dtype=torch.bfloat16)
    thresholds = torch.zeros(4, 6)[:, ::2]
    options = (None, None, False, 0.5, "peak_lse", 64, 64, 4, "int8", None)
    mask = _torch_op._select_blocks_cuda(q, k, thresholds, *options)
    assert (mask.shape, mask.dtype) == ((2, 4, 6, 2), torch.int64)
    (workspace,) = taken
    assert (workspace.shape, workspace.dtype) == ((768,), torch.uint8)
    found, asked = (
        fields(_native.SelectBlocksArgs.from_buffer_copy(passed[0]))
        for passed in (fake_library.calls, fake_library.queries)
    )
    problem = found["problem"]
    names = ("batch", "seqlen_q", "seqlen_k", "causal", "voters", "rule", "q_block", "scale")
    assert [problem[name] for name in names] == [2, 300, 5000, 0, 4, 2, 64, 0.5]
    assert problem["q"] == [q.data_ptr(), *q.stride()[:3]]
    assert problem["k"] == [k.data_ptr(), *k.stride()[:3]]
    expected = {
        "threshold_rows": 3,
        "precision": 1,
        "block_mask": mask.data_ptr(),
        "mask_words": 2,
        "workspace": workspace.data_ptr(),
        "workspace_bytes": 768,
        "struct_size": ctypes.sizeof(_native.SelectBlocksArgs),
    }
    assert {name: found[name] for name in expected} == expected
    assert asked == {**found, "workspace": None, "workspace_bytes": 0}


def test_native_arguments_of_attend_blocks_arrive_in_their_fields(fake_library, monkeypatch):
    taken = note_workspaces(monkeypatch)
    q = torch.zeros(300, 4, 64, dtype=torch.float16)
    k = torch.zeros(200, 2, 64, dtype=torch.float16)
    v = torch.zeros(200, 2, 128, dtype=torch.float16)[..., :64]
    starts_q, starts_k = starts(0, 100, 300), starts(0, 50, 200)
    mask, thresholds = torch.zeros(4, 6, 3, dtype=torch.int64), torch.zeros(4, 7)
    for given in (thresholds, None):
        out, lse, kept = _torch_op._attend_blocks_cuda(
            q, k, v, mask, given, starts_q, starts_k, True, None, 128, 64, True, True
        )
        found = fields(_native.AttendBlocksArgs.from_buffer_copy(fake_library.calls.pop()))
        expected = {
            "v": [v.data_ptr(), 0, *v.stride()[:2]],
            "out": [out.data_ptr(), 0, *out.stride()[:2]],
            "block_mask": mask.data_ptr(),
            "mask_words": 3,
            "thresholds": None if given is None else thresholds.data_ptr(),
            "threshold_rows": 0 if given is None else 7,
            "lse": lse.data_ptr(),
            "kept": kept.data_ptr(),
            "workspace": taken[-1].data_ptr(),
            "workspace_bytes": 768,
            "struct_size": ctypes.sizeof(_native.AttendBlocksArgs),
        }
        assert {name: found[name] for name in expected} == expected
        problem = found["problem"]
        assert (problem["cu_seqlens_q"], problem["batch"]) == (starts_q.data_ptr(), 2)
        assert (lse.shape, kept.shape) == ((4, 300), (4, 6))


def test_native_arguments_of_both_steps_arrive_in_their_fields(fake_library, monkeypatch):
    note_workspaces(monkeypatch)
    q = torch.zeros(300, 4, 64, dtype=torch.float16)
    k = torch.zeros(20000, 2, 64, dtype=torch.float16)
    v = torch.zeros(20000, 2, 128, dtype=torch.float16)[..., :64]
    starts_q, starts_k, thresholds = starts(0, 100, 300), starts(0, 50, 20000), torch.zeros(4, 7)
    call = (q, k, v, thresholds, starts_q, starts_k, False, 0.5, "peak_lse", 64, 64, 4, True, True)
    for selection in ("int8", "auto"):
        out, lse, kept = _torch_op._forward_cuda(*call, selection, 19950)
        select, attend = (
            fields(mirror.from_buffer_copy(passed))
            for mirror, passed in zip(
                (_native.SelectBlocksArgs, _native.AttendBlocksArgs),
                fake_library.calls,
                strict=True,
            )
        )
        names = ("causal", "voters", "rule", "q_block", "scale", "cu_seqlens_q", "cu_seqlens_k")
        addresses = [starts_q.data_ptr(), starts_k.data_ptr()]
        assert [select["problem"][name] for name in names] == [0, 4, 2, 64, 0.5, *addresses]
        # The rule is the first step's alone.
        assert attend["problem"] == {**select["problem"], "rule": 0, "voters": 1}
        assert (select["precision"], select["mask_words"]) == (1, 5)
        expected = {
            "v": [v.data_ptr(), 0, *v.stride()[:2]],
            "out": [out.data_ptr(), 0, *out.stride()[:2]],
            "lse": lse.data_ptr(),
            "kept": kept.data_ptr(),
            "block_mask": select["block_mask"],
            "mask_words": 5,
            "thresholds": thresholds.data_ptr(),
            "threshold_rows": 7,
        }
        assert {name: attend[name] for name in expected} == expected
        fake_library.calls.clear()
    for selection, longest in (("auto", _auto.MIN_SEQLEN_K - 1), ("exact", None)):
        _torch_op._forward_cuda(*call, selection, longest)
        (passed,) = fake_library.calls
        assert len(passed) == ctypes.sizeof(_native.ForwardArgs)
        fake_library.calls.clear()


def note_workspaces(monkeypatch):
    """A list of the workspaces that calls take from torch, as they come."""
    taken = []
    plain = _native._with_workspace

    def noted(*arguments):
        passed, workspace = plain(*arguments)
        taken.append(workspace)
        return passed, workspace

    monkeypatch.setattr(_native, "_with_workspace", noted)
    return taken


def test_calls_without_queries_or_keys_reach_the_library_too(fake_library):
    options = (None, None, True, None, "absolute", 128, 64, 1, True, True)
    some = torch.zeros(1, 10, 4, 64, dtype=torch.float16)
    none = some[:, :0]
    thresholds = torch.zeros(4, 1)
    _torch_op._forward_cuda(none, some, some, thresholds, *options)
    _torch_op._forward_cuda(some, none, none, thresholds, *options)
    _torch_op._block_maxima_cuda(some, none, True, None, "absolute", 128, 64)
    passed = [_native.ForwardArgs.from_buffer_copy(call) for call in fake_library.calls[:2]]
    passed.append(_native.BlockMaximaArgs.from_buffer_copy(fake_library.calls[2]))
    lengths = [(found.problem.seqlen_q, found.problem.seqlen_k) for found in passed]
    assert lengths == [(0, 10), (10, 0), (10, 0)]


def test_kernels_take_sixteen_bit_rows_without_gaps_only(fake_library):
    options = (torch.zeros(4, 1), None, None, True, None, "absolute", 128, 64, 1, False, False)
    wide = torch.zeros(1, 10, 4, 64)
    with pytest.raises(TypeError, match="q must be float16 or bfloat16, got float32"):
        _torch_op._forward_cuda(wide, wide, wide, *options)
    good = wide.half()
    bad = torch.zeros(1, 10, 4, 128, dtype=torch.float16)[..., ::2]
    with pytest.raises(ValueError, match="the last stride of v must be 1, got the strides"):
        _torch_op._forward_cuda(good, good, bad, *options)
    assert not fake_library.calls


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (1, ValueError),
        (2, NotImplementedError),
        (3, RuntimeError),
        (4, RuntimeError),
        (99, RuntimeError),
    ],
)
def test_a_status_becomes_an_exception_with_the_library_s_message(fake_library, status, error):
    fake_library.status, fake_library.message = status, b"head_dim must be 64 or 128, got 80"
    q = torch.zeros(1, 10, 4, 80, dtype=torch.float16)
    with pytest.raises(error, match="head_dim must be 64 or 128, got 80"):
        _torch_op._block_maxima_cuda(q, q, True, None, "absolute", 128, 64)


def forward_call(arguments):
    """The call that the public function makes of its arguments, without its outputs."""
    q, k, v, thresholds = (arguments[name] for name in ("q", "k", "v", "thresholds"))
    starts = (arguments.get("cu_seqlens_q"), arguments.get("cu_seqlens_k"))
    keys = {name: arguments.get(name) for name in ("block_table", "seqused_k")}
    scale, rule = arguments.get("scale"), arguments.get("rule", "absolute")
    geometry = arguments.get("geometry", DEFAULT_GEOMETRY)
    return ForwardCall(
        *(q, k, v, thresholds, *starts, True, scale, rule, *geometry, arguments.get("voters", 1)),
        return_lse=False,
        return_kept=False,
        selection=arguments.get("selection", "exact"),
        max_seqlen_k=arguments.get("max_seqlen_k"),
        **keys,
        sinks=arguments.get("sinks"),
    )


# Values of CUDA thresholds are not looked at, and only CUDA tensors come by; a geometry and a flag
# are refused before the call is made.
@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name in REFUSED.keys()
        - {"a NaN threshold", "another device", "sinks on another device"}
        if "geometry" not in name and "causal" not in name
    ),
)
def test_nothing_that_is_refused_passes_the_fast_check(name):
    call = REFUSED[name][0]
    tensors = [call[key] for key in ("q", "k", "v", "thresholds")]
    tensors += [call["sinks"]] if "sinks" in call else []
    if not all(isinstance(x, torch.Tensor) for x in tensors):
        return  # not asked about these
    # In the dtype of the kernels, so that it is not that which is refused.
    if all(call[key].dtype == torch.float32 for key in "qkv"):
        call = {**call, **{key: call[key].half() for key in "qkv"}}
    assert not _checks.passes_fast_check(forward_call(call))


def test_a_right_call_passes_the_fast_check():
    right = {key: x.half() if key in "qkv" else x for key, x in arguments().items()}
    right |= {"scale": 0.5, "rule": "running_max", "geometry": GEOMETRIES[1], "voters": 4}
    for selection in SELECTIONS:
        assert _checks.passes_fast_check(forward_call({**right, "selection": selection}))
    wrong = {
        "q": arguments()["q"],
        "v": torch.zeros(2, 12, 2, 16, dtype=torch.float16)[..., ::2],
        "cu_seqlens_q": starts(0, 10),
        "seqused_k": starts(12, 12),
        "block_table": torch.zeros(2, 1, dtype=torch.int32),
    }
    for name, value in wrong.items():
        assert not _checks.passes_fast_check(forward_call({**right, name: value}))


def test_rules_have_the_numbers_of_the_c_interface():
    assert [RULE_CODES[rule] for rule in RULES] == [0, 1, 2]


@pytest.fixture
def library_at(monkeypatch):
    """Makes the package look for its library at a path."""

    def look_at(path) -> None:
        monkeypatch.setenv(_native.LIBRARY_VARIABLE, str(path))
        _native.library.cache_clear()

    yield look_at
    _native.library.cache_clear()


def test_a_missing_library_is_said_in_words(library_at, tmp_path):
    library_at(tmp_path / "none.so")
    with pytest.raises(NotImplementedError, match=re.escape(f"{tmp_path}/none.so")) as caught:
        _native.library()
    assert "reference back end" in str(caught.value)
    info = bsfa_kernel.build_info()
    assert not info.available
    assert not info.kernels
    assert str(tmp_path) in info.reason
    assert "CUDA tensors: not possible" in str(info)


def test_a_file_that_is_no_library_is_said_in_words(library_at, tmp_path):
    path = tmp_path / "text.so"
    path.write_text("no library")
    library_at(path)
    with pytest.raises(NotImplementedError, match="could not be loaded"):
        _native.library()
    assert "could not be loaded" in bsfa_kernel.build_info().reason


def test_a_foreign_library_is_said_in_words(library_at):
    library_at(_ctypes.__file__)
    with pytest.raises(NotImplementedError, match="is not a bsfa library"):
        _native.library()
