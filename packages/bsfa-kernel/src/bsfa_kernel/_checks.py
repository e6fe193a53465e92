# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Checks of arguments, before anything is computed. Each message states the rule and the value."""

from __future__ import annotations

from itertools import pairwise
from typing import TypeGuard

import torch
from torch import Tensor

from bsfa_kernel._calls import (
    AnyCall,
    AttendCall,
    BlockMaximaCall,
    ForwardCall,
    SelectCall,
    columns_shape,
    geometry_of,
    key_capacity,
    mask_words,
    sequence_count,
    starts_of_keys,
    starts_of_queries,
)
from bsfa_kernel.geometry import GEOMETRIES, Geometry
from bsfa_kernel.rules import PRECISIONS, RULES, SELECTIONS, VOTERS

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KERNEL_FLOATS = (torch.float16, torch.bfloat16)

# Kernels use scale * log2(e), in float32.
_LEAST_SCALE, _LARGEST_SCALE = 2.0**-126, 2.0**127
_LARGEST_INT64 = 2**63 - 1

PAGE_MULTIPLE = 16
"""Keys of a page are a multiple of this."""


def check_tensor(value: object, name: str) -> None:
    """Refuse what is not a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_scale(scale: object) -> None:
    """Refuse what is neither None nor a factor that float32 arithmetic can use."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not _LEAST_SCALE <= scale <= _LARGEST_SCALE:
        raise ValueError(f"scale must be between 2**-126 and 2**127, got {scale}")


def as_flag(value: object, name: str) -> bool:
    """True or False, or what a traced condition comes to."""
    if isinstance(value, bool):
        return value
    if isinstance(value, torch.SymBool):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")


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


def _check_max_seqlen_k(call: ForwardCall | SelectCall) -> None:
    """Refuse what is no number of keys, and any for padded keys, whose shape says it."""
    max_seqlen_k: object = call.max_seqlen_k
    if max_seqlen_k is None:
        return
    if isinstance(max_seqlen_k, bool) or not isinstance(max_seqlen_k, (int, torch.SymInt)):
        raise TypeError(
            f"max_seqlen_k must be a whole number or None, got {type(max_seqlen_k).__name__}"
        )
    if call.cu_seqlens_k is None and call.block_table is None:
        raise ValueError(
            "max_seqlen_k is for packed sequences and block tables: without cu_seqlens_k and "
            f"block_table it must be None, got {max_seqlen_k}"
        )
    # A traced number is no larger, and may have no value to ask for.
    is_larger = not torch.compiler.is_compiling() and max_seqlen_k > _LARGEST_INT64
    if max_seqlen_k < 0 or is_larger:
        raise ValueError(f"max_seqlen_k must be between 0 and 2**63 - 1, got {max_seqlen_k}")


def check_two_sizes(geometry: object) -> tuple[int, int]:
    """The sizes of a geometry, which the reference takes any of."""
    if not _is_two_sizes(geometry) or min(geometry) < 1:
        raise ValueError(
            f"geometry must be a Geometry or a tuple of two positive ints, got {geometry!r}"
        )
    return geometry[0], geometry[1]


def as_geometry(geometry: object) -> Geometry:
    """The one of GEOMETRIES that a value is, or that a tuple of two whole numbers equals."""
    for known in GEOMETRIES:
        if geometry is known:
            return known
    if _is_two_sizes(geometry):
        for known in GEOMETRIES:
            if geometry == known:
                return known
    known_ones = ", ".join(map(str, GEOMETRIES))
    got = "x".join(map(str, geometry)) if _is_two_sizes(geometry) else repr(geometry)
    raise ValueError(f"geometry must be one of the Geometry values {known_ones}; got {got}")


def _is_two_sizes(value: object) -> TypeGuard[tuple[int, int]]:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], int)
        and isinstance(value[1], int)
        and not isinstance(value[0], bool)
        and not isinstance(value[1], bool)
    )


def check_types(call: AnyCall) -> None:
    """Refuse what torch's dispatcher would refuse in its own words."""
    for name, value in zip(call._fields, call, strict=True):
        optional = name in _OPTIONAL or (name == "thresholds" and isinstance(call, AttendCall))
        if name in _TENSORS and not (value is None and optional):
            check_tensor(value, name)
    check_scale(call.scale)
    as_flag(call.causal, "causal")
    if not isinstance(call, AttendCall):
        check_rule(call.rule)
    if isinstance(call, (ForwardCall, SelectCall)):
        check_voters(call.voters, call.q_block)
        _check_max_seqlen_k(call)
    if isinstance(call, ForwardCall):
        check_selection(call.selection)
    if isinstance(call, SelectCall):
        check_precision(call.precision)


_OPTIONAL = ("cu_seqlens_q", "cu_seqlens_k", "block_table", "seqused_k", "sinks")
_TENSORS = ("q", "k", "v", "thresholds", "block_mask", *_OPTIONAL)


def _check_options(call: AnyCall, any_geometry: bool) -> None:
    """Check what is not a tensor."""
    geometry = geometry_of(call)
    if any_geometry:
        check_two_sizes(geometry)
    elif geometry not in GEOMETRIES:
        as_geometry(geometry)  # says why not


def check_forward(call: ForwardCall, *, any_geometry: bool = False) -> None:
    """Check all that can be known of a call of attention without reading a tensor's values.

    Args:
        call: the arguments.
        any_geometry: whether this is for the reference, which takes any geometry, and thresholds
            and sinks in float64.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument that breaks a rule.
    """
    _check_problem(call, any_geometry)
    _check_values(call.v, call.k, call.q)
    _check_thresholds(call.thresholds, call.q, any_geometry)


def check_select(call: SelectCall, *, any_geometry: bool = False) -> None:
    """Check all that can be known of a call of select_blocks without reading a tensor's values.

    Args, raises: as ``check_forward``.
    """
    _check_problem(call, any_geometry)
    _check_thresholds(call.thresholds, call.q, any_geometry)


def check_attend(call: AttendCall, *, any_geometry: bool = False) -> None:
    """Check all that can be known of a call of attend_blocks without reading a tensor's values.

    Args, raises: as ``check_forward``.
    """
    _check_problem(call, any_geometry)
    _check_values(call.v, call.k, call.q)
    if call.thresholds is not None:
        _check_thresholds(call.thresholds, call.q, any_geometry)
    _check_block_mask(call)


def _check_problem(call: AnyCall, any_geometry: bool) -> None:
    """Check what every function takes: types and options, queries, keys and lengths, sinks."""
    check_types(call)
    _check_options(call, any_geometry)
    _check_lengths(call)
    _check_sinks(call, any_geometry)


def _check_lengths(call: AnyCall) -> None:
    """Check q, k and all that says how many queries and keys a sequence has."""
    q, k, table, seqused_k = call.q, call.k, call.block_table, call.seqused_k
    starts_q, starts_k = starts_of_queries(call), starts_of_keys(call)
    if starts_k is not None and seqused_k is not None:
        raise ValueError(
            "seqused_k says how many keys there are of padded or paged ones; got both seqused_k "
            "and cu_seqlens_k"
        )
    if table is not None and seqused_k is None:
        raise ValueError("block_table needs seqused_k, got block_table without seqused_k")
    if starts_q is None and starts_k is not None:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must be given together; got cu_seqlens_k without "
            "cu_seqlens_q"
        )
    if starts_q is not None and starts_k is None and seqused_k is None:
        raise ValueError(
            "cu_seqlens_q must be given together with cu_seqlens_k, or with seqused_k; got "
            "cu_seqlens_q without either"
        )
    _check_queries_and_keys(call)
    if starts_q is not None:
        _check_integers(starts_q, "cu_seqlens_q", "batch + 1", q)
        if starts_q.shape[0] < 1:
            raise ValueError(f"cu_seqlens_q must be [batch + 1], got the shape {_shape(starts_q)}")
    if starts_q is not None and starts_k is not None:
        _check_integers(starts_k, "cu_seqlens_k", "batch + 1", q)
        if starts_q.shape != starts_k.shape:
            raise ValueError(
                "cu_seqlens_q and cu_seqlens_k must have the same length (batch + 1), "
                f"got {starts_q.shape[0]} and {starts_k.shape[0]}"
            )
    batch = sequence_count(call)
    if seqused_k is not None:
        _check_integers(seqused_k, "seqused_k", "batch", q)
        if seqused_k.shape[0] != batch:
            raise ValueError(
                f"seqused_k must have one number for each of {batch} sequences, got "
                f"{seqused_k.shape[0]}"
            )
    if table is not None:
        _check_block_table(call, table, batch)
    elif starts_k is None and k.shape[0] != batch:
        whose = "q" if starts_q is None else "cu_seqlens_q"
        raise ValueError(f"{whose} and k must have the same batch, got {batch} and {k.shape[0]}")


def _check_block_table(call: AnyCall, table: Tensor, batch: int) -> None:
    """Check a block table, and the pages that it is for."""
    if table.dim() != 2 or table.shape[0] != batch:
        raise ValueError(
            f"block_table must be [batch, max_pages], here [{batch}, max_pages]; got the shape "
            f"{_shape(table)}"
        )
    if table.dtype != torch.int32:
        raise TypeError(f"block_table must be int32, got {_dtype(table)}")
    _check_device(table, "block_table", call.q)
    if table.shape[1] > 1 and table.stride(1) != 1:
        raise ValueError(
            f"the last stride of block_table must be 1, got the strides {table.stride()}"
        )
    page_size = call.k.shape[1]
    if page_size < 1 or page_size % PAGE_MULTIPLE:
        raise ValueError(
            f"the keys of a page must be a positive multiple of {PAGE_MULTIPLE}, got {page_size}"
        )
    if isinstance(call, (ForwardCall, SelectCall)) and call.max_seqlen_k is not None:
        capacity = key_capacity(call)
        if call.max_seqlen_k > capacity:
            raise ValueError(
                f"max_seqlen_k must be at most max_pages * page_size, {capacity}; got "
                f"{call.max_seqlen_k}"
            )


def _check_values(v: Tensor, k: Tensor, q: Tensor) -> None:
    if v.shape[-1] != k.shape[-1] and v.shape[:-1] == k.shape[:-1]:
        raise ValueError(
            "v must have the head_dim of k: values that are narrower or wider than keys are not "
            f"supported, got {v.shape[-1]} and {k.shape[-1]}"
        )
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


def _check_sinks(call: AnyCall, any_dtype: bool) -> None:
    sinks, heads = call.sinks, call.q.shape[-2]
    if sinks is None:
        return
    if sinks.dim() != 1 or sinks.shape[0] != heads:
        raise ValueError(f"sinks must be [heads], here [{heads}]; got the shape {_shape(sinks)}")
    if sinks.dtype != torch.float32 and not (any_dtype and sinks.dtype == torch.float64):
        raise TypeError(f"sinks must be float32, got {_dtype(sinks)}")
    _check_device(sinks, "sinks", call.q)


def _check_block_mask(call: AttendCall) -> None:
    mask = call.block_mask
    if mask.dtype != torch.int64:
        raise TypeError(f"block_mask must be int64, got {_dtype(mask)}")
    _check_device(mask, "block_mask", call.q)
    columns = columns_shape(call)
    layout = "[batch, heads, q_blocks, words]" if len(columns) == 3 else _PACKED_MASK
    if call.cu_seqlens_k is None and call.block_table is None:
        expected = (*columns, mask_words(call))
        if mask.shape != expected:
            raise ValueError(
                f"block_mask must be {layout} with ceil(k_blocks / 64) words, here "
                f"{list(expected)}; got the shape {_shape(mask)}"
            )
        return
    if mask.dim() != len(columns) + 1 or mask.shape[:-1] != columns:
        here = ", ".join(map(str, columns))
        raise ValueError(
            f"block_mask must be {layout}, here [{here}, words]; got the shape {_shape(mask)}"
        )
    if mask.shape[-1] < 1 and key_capacity(call) > 0:
        raise ValueError("with packed or paged keys, block_mask must have at least one word, got 0")


_PACKED_MASK = "[heads, total_q // q_block + 2 * batch, words]"


def passes_fast_check(call: ForwardCall) -> bool:
    """Whether padded CUDA tensors pass check_forward and check_kernel_tensors, by few steps.

    Those take longer than a launch. False says nothing: the arguments are to be checked. Geometry
    and flags have been.
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
        and call.block_table is None
        and call.seqused_k is None
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
        and (scale is None or (type(scale) is float and _LEAST_SCALE <= scale <= _LARGEST_SCALE))
        and rule in RULES
        and type(voters) is int
        and voters in VOTERS
        and call.selection in SELECTIONS
        and call.max_seqlen_k is None
        and (
            (sinks := call.sinks) is None
            or (
                sinks.shape == threshold_shape[:1]
                and sinks.dtype == torch.float32
                and sinks.get_device() == device
            )
        )
    )


def check_block_maxima(call: BlockMaximaCall, *, any_geometry: bool = False) -> None:
    """Check all that can be known of a call of block_maxima without reading a tensor's values.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument that breaks a rule.
    """
    _check_problem(call, any_geometry)


def _check_queries_and_keys(call: AnyCall) -> None:
    q, k = call.q, call.k
    if starts_of_queries(call) is not None:
        if q.dim() != 3:
            raise ValueError(
                f"with cu_seqlens_q, q must be [total_q, heads, head_dim], got the shape "
                f"{_shape(q)}"
            )
    elif q.dim() != 4:
        raise ValueError(f"q must be [batch, seqlen_q, heads, head_dim], got the shape {_shape(q)}")
    if call.block_table is not None:
        if k.dim() != 4:
            raise ValueError(
                "with block_table, k must be [pages, page_size, kv_heads, head_dim], "
                f"got the shape {_shape(k)}"
            )
        if k.shape[0] == 0:
            raise ValueError(
                f"with block_table, k must hold a page at least, got the shape {_shape(k)}"
            )
    elif starts_of_keys(call) is not None:
        if k.dim() != 3:
            raise ValueError(
                "with cu_seqlens_k, k must be [total_k, kv_heads, head_dim], "
                f"got the shape {_shape(k)}"
            )
    elif k.dim() != 4:
        raise ValueError(
            f"k must be [batch, seqlen_k, kv_heads, head_dim], got the shape {_shape(k)}"
        )
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


def _check_integers(x: Tensor, name: str, length: str, q: Tensor) -> None:
    if x.dim() != 1:
        raise ValueError(f"{name} must be [{length}], got the shape {_shape(x)}")
    if x.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {_dtype(x)}")
    _check_device(x, name, q)


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


def check_seqused_values(lengths: list[int], capacity: int) -> None:
    """Check how many keys sequences have.

    Raises:
        ValueError: less than none, or more than there is room for.
    """
    for index, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"seqused_k must be between 0 and the keys that there is room for ({capacity}), "
                f"got {length} for sequence {index}"
            )


def check_pages(entries: list[int], sequence: int, pages: int) -> None:
    """Check the entries of a block table that a sequence uses.

    Raises:
        ValueError: one is no page.
    """
    for index, entry in enumerate(entries):
        if not 0 <= entry < pages:
            raise ValueError(
                f"entries of block_table must be pages of k, 0 to {pages - 1}; got {entry} for "
                f"sequence {sequence}, page {index}"
            )


def check_kernel_tensors(call: AnyCall) -> None:
    """Check what the CUDA kernels ask of q, k and v and the reference back end does not.

    Raises:
        TypeError: a dtype that they do not take.
        ValueError: the last dimension is not contiguous.
    """
    _check_kernel_tensor(call.q, "q")
    _check_kernel_tensor(call.k, "k")
    if isinstance(call, (ForwardCall, AttendCall)):
        _check_kernel_tensor(call.v, "v")


def _check_kernel_tensor(x: Tensor, name: str) -> None:
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
