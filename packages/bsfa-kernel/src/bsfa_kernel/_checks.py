# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Checks of arguments, before anything is computed. Each message states the rule and the value."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from bsfa_kernel._calls import (
    AnyCall,
    AttendCall,
    BlockMaximaCall,
    ForwardCall,
    SelectCall,
    geometry_of,
    mask_words,
)
from bsfa_kernel.geometry import GEOMETRIES, block_count
from bsfa_kernel.rules import PRECISIONS, RULES, SELECTIONS, VOTERS

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KERNEL_FLOATS = (torch.float16, torch.bfloat16)


def check_tensor(value: object, name: str) -> None:
    """Refuse what is not a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_number(value: object, name: str) -> None:
    """Refuse what is neither a number nor None."""
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat))
    ):
        raise TypeError(f"{name} must be a number or None, got {type(value).__name__}")


def check_rule(rule: object) -> None:
    """Refuse what is not one of RULES."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")


def check_voters(voters: int, q_block: int | None = None) -> None:
    """Refuse what is not one of VOTERS, or leaves a query block of the reference without one."""
    if isinstance(voters, bool) or not isinstance(voters, int) or voters not in VOTERS:
        raise ValueError(f"voters must be one of {', '.join(map(str, VOTERS))}; got {voters!r}")
    if q_block is not None and q_block % voters:
        raise ValueError(f"voters must divide the queries of a block, got {voters} and {q_block}")


def check_precision(precision: object) -> None:
    """Refuse what is not one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")


def check_selection(selection: object) -> None:
    """Refuse what is not one of SELECTIONS."""
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}; got {selection!r}")


def check_max_seqlen_k(max_seqlen_k: object, varlen: bool) -> None:
    """Refuse what is no number of keys, and any for padded tensors, whose shape says it."""
    if max_seqlen_k is None:
        return
    if isinstance(max_seqlen_k, bool) or not isinstance(max_seqlen_k, (int, torch.SymInt)):
        raise TypeError(
            f"max_seqlen_k must be a whole number or None, got {type(max_seqlen_k).__name__}"
        )
    if not varlen:
        raise ValueError(
            f"max_seqlen_k is for packed sequences: without cu_seqlens it must be None, got "
            f"{max_seqlen_k}"
        )
    if max_seqlen_k < 1:
        raise ValueError(f"max_seqlen_k must be at least 1, got {max_seqlen_k}")


def check_two_sizes(geometry: Sequence[int]) -> tuple[int, int]:
    """The sizes of a geometry, which the reference takes any of."""
    if len(geometry) != 2:
        raise ValueError(f"geometry must be two positive numbers, got {tuple(geometry)}")
    return geometry[0], geometry[1]


def check_geometry(geometry: Sequence[int]) -> None:
    """Refuse what is not one of GEOMETRIES."""
    if geometry not in GEOMETRIES:
        known = ", ".join(map(str, GEOMETRIES))
        got = "x".join(map(str, geometry)) if isinstance(geometry, tuple) else repr(geometry)
        raise ValueError(f"geometry must be one of the Geometry values {known}; got {got}")


def check_types(call: AnyCall) -> None:
    """Refuse what torch's dispatcher would refuse in its own words."""
    for name, value in zip(call._fields, call, strict=True):
        optional = name in _OPTIONAL or (name == "thresholds" and isinstance(call, AttendCall))
        if name in _TENSORS and not (value is None and optional):
            check_tensor(value, name)
    check_number(call.scale, "scale")
    if not isinstance(call, AttendCall):
        check_rule(call.rule)
    if isinstance(call, (ForwardCall, SelectCall)):
        check_voters(call.voters, call.q_block)
        check_max_seqlen_k(call.max_seqlen_k, call.cu_seqlens_q is not None)
    if isinstance(call, ForwardCall):
        check_selection(call.selection)
    if isinstance(call, SelectCall):
        check_precision(call.precision)


_OPTIONAL = ("cu_seqlens_q", "cu_seqlens_k")
_TENSORS = ("q", "k", "v", "thresholds", "block_mask", *_OPTIONAL)


def _check_options(call: AnyCall, any_geometry: bool) -> None:
    """Check what is not a tensor."""
    scale = call.scale
    if scale is not None and not (scale > 0 and scale < float("inf")):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    geometry = geometry_of(call)
    if not any_geometry:
        check_geometry(geometry)
    elif min(geometry) < 1:
        raise ValueError(f"geometry must be two positive numbers, got {tuple(geometry)}")


def check_forward(call: ForwardCall, *, any_geometry: bool = False) -> None:
    """Check all that can be known of a call of attention without reading a tensor's values.

    Args:
        call: the arguments.
        any_geometry: whether this is for the reference, which takes any geometry, and thresholds in
            float64.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument that breaks a rule.
    """
    check_types(call)
    _check_options(call, any_geometry)
    _check_lengths(call)
    _check_values(call.v, call.k, call.q)
    _check_thresholds(call.thresholds, call.q, any_geometry)


def check_select(call: SelectCall, *, any_geometry: bool = False) -> None:
    """Check all that can be known of a call of select_blocks without reading a tensor's values.

    Args, raises: as ``check_forward``.
    """
    check_types(call)
    _check_options(call, any_geometry)
    _check_lengths(call)
    _check_thresholds(call.thresholds, call.q, any_geometry)


def check_attend(call: AttendCall, *, any_geometry: bool = False) -> None:
    """Check all that can be known of a call of attend_blocks without reading a tensor's values.

    Args, raises: as ``check_forward``.
    """
    check_types(call)
    _check_options(call, any_geometry)
    _check_lengths(call)
    _check_values(call.v, call.k, call.q)
    if call.thresholds is not None:
        _check_thresholds(call.thresholds, call.q, any_geometry)
    _check_block_mask(call)


def _check_lengths(call: ForwardCall | SelectCall | AttendCall) -> None:
    """Check q, k and cu_seqlens."""
    q, k, cu_seqlens_q, cu_seqlens_k = call.q, call.k, call.cu_seqlens_q, call.cu_seqlens_k
    varlen = cu_seqlens_q is not None
    if varlen != (cu_seqlens_k is not None):
        given, absent = ("q", "k") if varlen else ("k", "q")
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must be given together; "
            f"got cu_seqlens_{given} without cu_seqlens_{absent}"
        )
    _check_queries_and_keys(q, k, varlen)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        _check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", q)
        _check_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", q)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                "cu_seqlens_q and cu_seqlens_k must have the same length (batch + 1), "
                f"got {cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
            )


def _check_values(v: Tensor, k: Tensor, q: Tensor) -> None:
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, got {_shape(v)} and {_shape(k)}")
    _check_like(v, "v", q)


def _check_thresholds(thresholds: Tensor, q: Tensor, any_geometry: bool) -> None:
    if thresholds.dim() != 2:
        raise ValueError(f"thresholds must be [heads, rows], got the shape {_shape(thresholds)}")
    if thresholds.shape[0] != q.shape[-2]:
        raise ValueError(
            f"thresholds must have one row list per head of q: q has {q.shape[-2]} heads, "
            f"thresholds have the shape {_shape(thresholds)}"
        )
    if thresholds.shape[1] < 1:
        raise ValueError("thresholds must have at least one row, got none")
    if thresholds.dtype != torch.float32 and not (
        any_geometry and thresholds.dtype == torch.float64
    ):
        raise TypeError(f"thresholds must be float32, got {_dtype(thresholds)}")
    _check_device(thresholds, "thresholds", q)


def _check_block_mask(call: AttendCall) -> None:
    q, k, mask = call.q, call.k, call.block_mask
    if mask.dtype != torch.int64:
        raise TypeError(f"block_mask must be int64, got {_dtype(mask)}")
    _check_device(mask, "block_mask", q)
    if call.cu_seqlens_q is None:
        q_blocks = block_count(q.shape[1], call.q_block)
        words = mask_words(call)
        expected = (q.shape[0], q.shape[2], q_blocks, words)
        if mask.shape != expected:
            raise ValueError(
                "block_mask must be [batch, heads, q_blocks, ceil(k_blocks / 64)], here "
                f"{list(expected)}; got the shape {_shape(mask)}"
            )
        return
    columns = q.shape[0] // call.q_block + call.cu_seqlens_q.shape[0] - 1
    if mask.dim() != 3 or mask.shape[:2] != (q.shape[1], columns):
        raise ValueError(
            "with cu_seqlens, block_mask must be [heads, total_q // q_block + batch, words], here "
            f"[{q.shape[1]}, {columns}, words]; got the shape {_shape(mask)}"
        )
    if mask.shape[2] < 1 and k.shape[0] > 0:
        raise ValueError("with cu_seqlens and keys, block_mask must have at least one word, got 0")


def passes_fast_check(call: ForwardCall) -> bool:
    """Whether padded CUDA tensors pass check_forward and check_kernel_tensor, by few steps.

    Those take longer than a launch. False says nothing: the arguments are to be checked. The
    geometry has been.
    """
    q, k, v, thresholds, cu_seqlens_q, cu_seqlens_k, _, scale, rule, _, _, voters, *_ = call
    shape, key_shape, threshold_shape, dtype = q.shape, k.shape, thresholds.shape, q.dtype
    if len(shape) != 4 or len(key_shape) != 4 or len(threshold_shape) != 2:
        return False
    batch, _, heads, head_dim = shape
    key_batch, _, kv_heads, key_head_dim = key_shape
    device = q.get_device()
    return (
        cu_seqlens_q is None
        and cu_seqlens_k is None
        and v.shape == key_shape
        and batch == key_batch
        and head_dim == key_head_dim > 0
        and kv_heads > 0
        and heads > 0
        and heads % kv_heads == 0
        and threshold_shape[0] == heads
        and threshold_shape[1] > 0
        and dtype in _KERNEL_FLOATS
        and k.dtype == dtype
        and v.dtype == dtype
        and thresholds.dtype == torch.float32
        and k.get_device() == device
        and v.get_device() == device
        and thresholds.get_device() == device
        and q.stride()[3] == 1
        and k.stride()[3] == 1
        and v.stride()[3] == 1
        and (scale is None or (type(scale) is float and 0.0 < scale < float("inf")))
        and rule in RULES
        and type(voters) is int
        and voters in VOTERS
        and call.selection in SELECTIONS
        and call.max_seqlen_k is None
    )


def check_block_maxima(call: BlockMaximaCall, *, any_geometry: bool = False) -> None:
    """Check all that can be known of a call of block_maxima without reading a tensor's values.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument that breaks a rule.
    """
    check_types(call)
    _check_options(call, any_geometry)
    _check_queries_and_keys(call.q, call.k, varlen=False)


def _check_queries_and_keys(q: Tensor, k: Tensor, varlen: bool) -> None:
    if varlen:
        if q.dim() != 3:
            raise ValueError(
                f"with cu_seqlens, q must be [total_q, heads, head_dim], got the shape {_shape(q)}"
            )
        if k.dim() != 3:
            raise ValueError(
                "with cu_seqlens, k must be [total_k, kv_heads, head_dim], "
                f"got the shape {_shape(k)}"
            )
    else:
        if q.dim() != 4:
            raise ValueError(
                f"q must be [batch, seqlen_q, heads, head_dim], got the shape {_shape(q)}"
            )
        if k.dim() != 4:
            raise ValueError(
                f"k must be [batch, seqlen_k, kv_heads, head_dim], got the shape {_shape(k)}"
            )
        if q.shape[0] != k.shape[0]:
            raise ValueError(f"q and k must have the same batch, got {q.shape[0]} and {k.shape[0]}")
    if q.dtype not in _FLOATS:
        raise TypeError(f"q must be float16, bfloat16, float32 or float64, got {_dtype(q)}")
    if q.shape[-1] < 1:
        raise ValueError(f"head_dim must be at least 1, got {q.shape[-1]}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q and k must have the same head_dim, got {q.shape[-1]} and {k.shape[-1]}"
        )
    if k.shape[-2] < 1 or q.shape[-2] < 1 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            "the heads of q must be a positive multiple of those of k, "
            f"got {q.shape[-2]} and {k.shape[-2]}"
        )
    _check_like(k, "k", q)


def _check_like(x: Tensor, name: str, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise TypeError(f"{name} must have the dtype of q ({_dtype(q)}), got {_dtype(x)}")
    _check_device(x, name, q)


def _check_device(x: Tensor, name: str, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q ({q.device}), got {x.device}")


def _check_cu_seqlens(cu_seqlens: Tensor, name: str, q: Tensor) -> None:
    check_tensor(cu_seqlens, name)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must be [batch + 1], got the shape {_shape(cu_seqlens)}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {_dtype(cu_seqlens)}")
    _check_device(cu_seqlens, name, q)


def check_thresholds_values(thresholds: Tensor) -> None:
    """Refuse NaN, for thresholds whose values can be read without a synchronisation.

    Raises:
        ValueError: a threshold is NaN.
    """
    nan = thresholds.isnan()
    if nan.any():
        head, row = nan.nonzero()[0].tolist()
        raise ValueError(f"thresholds must not be NaN, got NaN for head {head}, row {row}")


def check_cu_seqlens_values(cu_seqlens: Tensor, name: str, total_name: str, total: int) -> None:
    """Check where packed sequences begin and end.

    Raises:
        ValueError: not from 0 to the total, or decreasing.
    """
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != total:
        raise ValueError(
            f"{name} must go from 0 to {total_name} ({total}), got {starts[0]} to {starts[-1]}"
        )
    for index, (start, stop) in enumerate(pairwise(starts)):
        if stop < start:
            raise ValueError(
                f"{name} must not decrease, got {start} followed by {stop} at sequence {index}"
            )


def check_packed_values(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Check where packed sequences begin and end.

    Raises:
        ValueError: not from 0 to the total, or decreasing.
    """
    check_cu_seqlens_values(cu_seqlens_q, "cu_seqlens_q", "total_q", q.shape[0])
    check_cu_seqlens_values(cu_seqlens_k, "cu_seqlens_k", "total_k", k.shape[0])


def check_longest(max_seqlen_k: int, longest: int) -> None:
    """Refuse a max_seqlen_k that a sequence exceeds.

    Raises:
        ValueError: one does.
    """
    if longest > max_seqlen_k:
        raise ValueError(
            f"max_seqlen_k must be at least the keys of the longest sequence, {longest}; "
            f"got {max_seqlen_k}"
        )


def check_kernel_tensor(x: Tensor, name: str) -> None:
    """Check what the CUDA kernels ask of a tensor and the reference back end does not.

    Raises:
        TypeError: a dtype that they do not take.
        ValueError: the last dimension is not contiguous.
    """
    if x.dtype not in _KERNEL_FLOATS:
        raise TypeError(
            f"on a CUDA device {name} must be float16 or bfloat16, got {_dtype(x)} "
            "(bsfa_kernel.reference computes in float32 and float64 on any device)"
        )
    if x.stride(-1) != 1:
        raise ValueError(
            f"on a CUDA device the last stride of {name} must be 1, got the strides {x.stride()}"
        )


def _shape(x: Tensor) -> str:
    return f"[{', '.join(map(str, x.shape))}]"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
