# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The compiled library, by its C interface (include/bsfa/bsfa.h). The only module with ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

import torch
from torch import Tensor

from bsfa_kernel._calls import (
    AnyCall,
    AttendCall,
    BlockMaximaCall,
    ForwardCall,
    SelectCall,
    most_keys,
    sequence_count,
    starts_of_keys,
    starts_of_queries,
)
from bsfa_kernel.rules import PRECISION_CODES, RULE_CODES

ABI_VERSION = 1
"""BSFA_ABI_VERSION of the header that the structures below mirror."""

LIBRARY_VARIABLE = "BSFA_LIBRARY"
"""Environment variable that names the library to load instead of the one beside the package."""

_OK, _INVALID_ARGUMENT, _UNSUPPORTED, _CUDA_ERROR = range(4)
_ERRORS: dict[int, type[Exception]] = {
    _INVALID_ARGUMENT: ValueError,
    _UNSUPPORTED: NotImplementedError,
    _CUDA_ERROR: RuntimeError,
}


class Strides(Structure):
    """bsfa_strides, in elements."""

    _fields_ = (("batch", c_int64), ("seqlen", c_int64), ("heads", c_int64))


class TensorArg(Structure):
    """bsfa_tensor."""

    _fields_ = (("data", c_void_p), ("strides", Strides))


class Problem(Structure):
    """bsfa_problem."""

    _fields_ = (
        ("device", c_int32),
        ("arch", c_int32),
        ("stream", c_void_p),
        ("dtype", c_int32),
        ("rule", c_int32),
        ("causal", c_int32),
        ("q_block", c_int32),
        ("k_block", c_int32),
        ("scale", c_float),
        ("voters", c_int32),
        ("batch", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("seqlen_q", c_int64),
        ("seqlen_k", c_int64),
        ("q", TensorArg),
        ("k", TensorArg),
        ("cu_seqlens_q", c_void_p),
        ("cu_seqlens_k", c_void_p),
        ("seqused_k", c_void_p),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("pages", c_int64),
        ("page_size", c_int32),
        ("sinks", c_void_p),
    )


class ForwardArgs(Structure):
    """bsfa_forward_args."""

    _fields_ = (
        ("abi_version", c_uint32),
        ("struct_size", c_uint32),
        ("problem", Problem),
        ("v", TensorArg),
        ("out", TensorArg),
        ("thresholds", c_void_p),
        ("threshold_rows", c_int64),
        ("lse", c_void_p),
        ("kept", c_void_p),
    )


class BlockMaximaArgs(Structure):
    """bsfa_block_maxima_args."""

    _fields_ = (
        ("abi_version", c_uint32),
        ("struct_size", c_uint32),
        ("problem", Problem),
        ("maxima", c_void_p),
    )


class SelectBlocksArgs(Structure):
    """bsfa_select_blocks_args."""

    _fields_ = (
        ("abi_version", c_uint32),
        ("struct_size", c_uint32),
        ("problem", Problem),
        ("thresholds", c_void_p),
        ("threshold_rows", c_int64),
        ("precision", c_int32),
        ("block_mask", c_void_p),
        ("mask_words", c_int64),
        ("workspace", c_void_p),
        ("workspace_bytes", c_uint64),
    )


class AttendBlocksArgs(Structure):
    """bsfa_attend_blocks_args."""

    _fields_ = (
        ("abi_version", c_uint32),
        ("struct_size", c_uint32),
        ("problem", Problem),
        ("v", TensorArg),
        ("out", TensorArg),
        ("block_mask", c_void_p),
        ("mask_words", c_int64),
        ("thresholds", c_void_p),
        ("threshold_rows", c_int64),
        ("lse", c_void_p),
        ("kept", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_uint64),
    )


_FORMATS = {
    c_uint32: "I",
    c_uint64: "Q",
    c_int32: "i",
    c_int64: "q",
    c_float: "f",
    c_void_p: "P",
}


def _format(mirror: type[Structure]) -> str:
    """A structure's fields for ``struct``, those of inner ones written out."""
    return "".join(
        _format(kind) if issubclass(kind, Structure) else _FORMATS[kind]
        for _, kind, *_ in mirror._fields_
    )


def _packer(mirror: type[Structure]) -> struct.Struct:
    """Packs a structure's fields in native layout, at a tenth of what constructing it costs."""
    packer = struct.Struct("@" + _format(mirror))
    if packer.size != ctypes.sizeof(mirror):
        raise AssertionError(f"{mirror.__name__} has padding, which the packer leaves out")
    return packer


_forward_packer = _packer(ForwardArgs)
_block_maxima_packer = _packer(BlockMaximaArgs)
_select_blocks_packer = _packer(SelectBlocksArgs)
_attend_blocks_packer = _packer(AttendBlocksArgs)
_FORWARD_SIZE, _BLOCK_MAXIMA_SIZE = _forward_packer.size, _block_maxima_packer.size
_SELECT_BLOCKS_SIZE, _ATTEND_BLOCKS_SIZE = _select_blocks_packer.size, _attend_blocks_packer.size

# The last two fields of the structures that have a workspace.
_workspace_packer = struct.Struct("@PQ")


def library_path() -> Path:
    """Where the library is looked for: $BSFA_LIBRARY, or beside the package.

    An editable installation has the modules in the tree, and the library elsewhere on the package's
    path.
    """
    override = os.environ.get(LIBRARY_VARIABLE)
    if override:
        return Path(override)
    folders = map(Path, sys.modules[__name__.partition(".")[0]].__path__)
    paths = [folder / "lib" / "libbsfa.so" for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded on first use.

    Raises:
        NotImplementedError: there is none, or it cannot be used; the message says what would help.
    """
    path = library_path()
    if not path.is_file():
        source = f"{LIBRARY_VARIABLE} names" if os.environ.get(LIBRARY_VARIABLE) else "expected at"
        raise NotImplementedError(
            f"this installation of bsfa-kernel has no native library ({source} {path}, where there "
            "is no file). CUDA tensors need it, and are never computed by the reference back end "
            "instead: install a wheel that was built with nvcc, or set "
            f"{LIBRARY_VARIABLE} to a libbsfa.so"
        )
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NotImplementedError(
            f"the native library {path} could not be loaded: {error}"
        ) from error
    try:
        loaded.bsfa_abi_version.restype = c_uint32
        found = loaded.bsfa_abi_version()
        if found != ABI_VERSION:
            raise NotImplementedError(
                f"the native library {path} has ABI version {found}, and this bsfa-kernel needs "
                f"{ABI_VERSION}: install both from the same release"
            )
        for name in (
            "bsfa_forward",
            "bsfa_block_maxima",
            "bsfa_select_blocks",
            "bsfa_attend_blocks",
        ):
            function = getattr(loaded, name)
            function.argtypes = (c_char_p,)  # the bytes of the structure
            function.restype = c_int
        for name in ("bsfa_select_blocks_workspace", "bsfa_attend_blocks_workspace"):
            function = getattr(loaded, name)
            function.argtypes = (c_char_p, POINTER(c_uint64))
            function.restype = c_int
        for name in ("bsfa_version", "bsfa_build_info", "bsfa_last_error"):
            function = getattr(loaded, name)
            function.argtypes = ()
            function.restype = c_char_p
    except AttributeError as error:
        raise NotImplementedError(f"{path} is not a bsfa library: {error}") from error
    return loaded


def version() -> str:
    """Version of the library."""
    return _text(library().bsfa_version())


def build_info_json() -> str:
    """The library's description of its build."""
    return _text(library().bsfa_build_info())


_DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1}


def forward(call: ForwardCall, out: Tensor, lse: Tensor | None, kept: Tensor | None) -> None:
    """Call bsfa_forward.

    Args:
        call: the arguments, CUDA tensors.
        out: written, as q.
        lse: written, contiguous float32.
        kept: written, contiguous int32.

    Raises:
        ValueError: the arguments break a rule.
        NotImplementedError: no native library, or valid but unsupported by it or by the GPU.
        RuntimeError: a CUDA call failed, or a defect of the library.
    """
    thresholds = _contiguous(call.thresholds)
    arrays = _Arrays(call)
    status = library().bsfa_forward(
        _forward_packer.pack(
            ABI_VERSION,
            _FORWARD_SIZE,
            *_problem(call, arrays),
            *_tensor(call.v),
            *_tensor(out),
            thresholds.data_ptr(),
            thresholds.shape[1],
            0 if lse is None else lse.data_ptr(),
            0 if kept is None else kept.data_ptr(),
        )
    )
    if status != _OK:
        _raise(status)


def block_maxima(call: BlockMaximaCall, maxima: Tensor) -> None:
    """Call bsfa_block_maxima.

    Args:
        call: the arguments, CUDA tensors.
        maxima: written, contiguous float32.

    Raises:
        ValueError: the arguments break a rule.
        NotImplementedError: no native library, or valid but unsupported by it or by the GPU.
        RuntimeError: a CUDA call failed, or a defect of the library.
    """
    arrays = _Arrays(call)
    status = library().bsfa_block_maxima(
        _block_maxima_packer.pack(
            ABI_VERSION,
            _BLOCK_MAXIMA_SIZE,
            *_problem(call, arrays),
            maxima.data_ptr(),
        )
    )
    if status != _OK:
        _raise(status)


def select_blocks(call: SelectCall, block_mask: Tensor) -> None:
    """Call bsfa_select_blocks.

    Args:
        call: the arguments, CUDA tensors.
        block_mask: written, contiguous int64.

    Raises: as ``forward``.
    """
    thresholds = _contiguous(call.thresholds)
    arrays = _Arrays(call)
    arguments = _select_blocks_packer.pack(
        ABI_VERSION,
        _SELECT_BLOCKS_SIZE,
        *_problem(call, arrays),
        thresholds.data_ptr(),
        thresholds.shape[1],
        PRECISION_CODES[call.precision],
        block_mask.data_ptr(),
        block_mask.shape[-1],
        0,
        0,
    )
    arguments, _workspace = _with_workspace("bsfa_select_blocks_workspace", arguments, call.q)
    status = library().bsfa_select_blocks(arguments)
    if status != _OK:
        _raise(status)


def attend_blocks(call: AttendCall, out: Tensor, lse: Tensor | None, kept: Tensor | None) -> None:
    """Call bsfa_attend_blocks.

    Args:
        call: the arguments, CUDA tensors.
        out: written, as q.
        lse: written, contiguous float32.
        kept: written, contiguous int32.

    Raises: as ``forward``.
    """
    block_mask = _contiguous(call.block_mask)
    thresholds = None if call.thresholds is None else _contiguous(call.thresholds)
    arrays = _Arrays(call)
    arguments = _attend_blocks_packer.pack(
        ABI_VERSION,
        _ATTEND_BLOCKS_SIZE,
        *_problem(call, arrays),
        *_tensor(call.v),
        *_tensor(out),
        block_mask.data_ptr(),
        block_mask.shape[-1],
        0 if thresholds is None else thresholds.data_ptr(),
        0 if thresholds is None else thresholds.shape[1],
        0 if lse is None else lse.data_ptr(),
        0 if kept is None else kept.data_ptr(),
        0,
        0,
    )
    arguments, _workspace = _with_workspace("bsfa_attend_blocks_workspace", arguments, call.q)
    status = library().bsfa_attend_blocks(arguments)
    if status != _OK:
        _raise(status)


def _with_workspace(query: str, arguments: bytes, q: Tensor) -> tuple[bytes, Tensor]:
    """The arguments with a workspace of the size that the library asks for, and that workspace.

    It comes from torch's allocator, so that a graph's capture keeps it in the graph's pool.
    """
    size = c_uint64()
    status = getattr(library(), query)(arguments, size)
    if status != _OK:
        _raise(status)
    workspace = q.new_empty(size.value, dtype=torch.uint8)
    tail = _workspace_packer.pack(workspace.data_ptr(), size.value)
    return arguments[: -len(tail)] + tail, workspace


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


class _Arrays:
    """The small arrays of a problem, contiguous; must live until the call is made."""

    __slots__ = ("cu_seqlens_k", "cu_seqlens_q", "seqused_k", "sinks")

    def __init__(self, call: AnyCall) -> None:
        self.cu_seqlens_q = _contiguous_or_none(starts_of_queries(call))
        self.cu_seqlens_k = _contiguous_or_none(starts_of_keys(call))
        self.seqused_k = _contiguous_or_none(call.seqused_k)
        self.sinks = _contiguous_or_none(call.sinks)


def _contiguous_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else _contiguous(x)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _tensor(x: Tensor) -> tuple[int, ...]:
    """The fields of TensorArg."""
    strides = x.stride()
    if len(strides) == 4:
        return x.data_ptr(), strides[0], strides[1], strides[2]
    return x.data_ptr(), 0, strides[0], strides[1]


def _problem(call: AnyCall, arrays: _Arrays) -> tuple[float, ...]:
    """The fields of Problem."""
    q, k, scale, table = call.q, call.k, call.scale, call.block_table
    seqlen_q, heads, head_dim = q.shape[-3:]
    batch = sequence_count(call)
    device = _device(q)
    return (
        device,
        _arch,
        _current_stream(device),
        _DTYPE_CODES[q.dtype],
        0 if isinstance(call, AttendCall) else RULE_CODES[call.rule],
        call.causal,
        call.q_block,
        call.k_block,
        head_dim**-0.5 if scale is None else scale,
        call.voters if isinstance(call, (ForwardCall, SelectCall)) else 1,
        batch,
        heads,
        k.shape[-2],
        head_dim,
        seqlen_q,
        k.shape[-3] if table is None else most_keys(call),
        *_tensor(q),
        *_tensor(k),
        _pointer(arrays.cu_seqlens_q),
        _pointer(arrays.cu_seqlens_k),
        _pointer(arrays.seqused_k),
        _pointer(table),
        0 if table is None else table.stride(0),
        0 if table is None else k.shape[0],
        0 if table is None else k.shape[1],
        _pointer(arrays.sinks),
    )


def _device(q: Tensor) -> int:
    """Ordinal of the device that a call runs on."""
    return q.get_device()


def _current_stream(device: int) -> int:
    """The caller's stream; the public function makes an object of it, at ten times the cost."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


def _raise(status: int) -> None:
    message = _text(library().bsfa_last_error())
    error = _ERRORS.get(status)
    if error is None:
        raise RuntimeError(
            f"libbsfa failed with status {status}, which is a defect of it: {message}"
        )
    raise error(message)


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")


# Which kernel to use: 0 lets the library pick by device. Not thread-safe, and meant for tests.
_arch = 0


def insisted_arch() -> int:
    """What ``force_arch`` set; 0 where the library picks."""
    return _arch


@contextmanager
def force_arch(arch: int) -> Iterator[None]:
    """Within the context, use the kernels of one architecture, or fail.

    Args:
        arch: 80 or 90; 0 lets the library pick by device.
    """
    global _arch
    previous, _arch = _arch, arch
    try:
        yield
    finally:
        _arch = previous
