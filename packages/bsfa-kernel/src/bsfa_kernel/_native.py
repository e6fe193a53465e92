# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The compiled library, by its C interface (include/bsfa/bsfa.h). The only module with ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import (
    Structure,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_uint32,
    c_void_p,
)
from pathlib import Path

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


class ForwardArgs(Structure):
    """bsfa_forward_args."""

    _fields_ = (
        ("abi_version", c_uint32),
        ("struct_size", c_uint32),
        ("device", c_int32),
        ("arch", c_int32),
        ("stream", c_void_p),
        ("dtype", c_int32),
        ("rule", c_int32),
        ("causal", c_int32),
        ("q_block", c_int32),
        ("k_block", c_int32),
        ("scale", c_float),
        ("batch", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("seqlen_q", c_int64),
        ("seqlen_k", c_int64),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("out", c_void_p),
        ("q_strides", Strides),
        ("k_strides", Strides),
        ("v_strides", Strides),
        ("out_strides", Strides),
        ("thresholds", c_void_p),
        ("threshold_rows", c_int64),
        ("cu_seqlens_q", c_void_p),
        ("cu_seqlens_k", c_void_p),
        ("lse", c_void_p),
        ("kept", c_void_p),
    )


class BlockMaximaArgs(Structure):
    """bsfa_block_maxima_args."""

    _fields_ = (
        ("abi_version", c_uint32),
        ("struct_size", c_uint32),
        ("device", c_int32),
        ("arch", c_int32),
        ("stream", c_void_p),
        ("dtype", c_int32),
        ("rule", c_int32),
        ("causal", c_int32),
        ("q_block", c_int32),
        ("k_block", c_int32),
        ("scale", c_float),
        ("batch", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("seqlen_q", c_int64),
        ("seqlen_k", c_int64),
        ("q", c_void_p),
        ("k", c_void_p),
        ("q_strides", Strides),
        ("k_strides", Strides),
        ("maxima", c_void_p),
    )


_FORMATS = {c_uint32: "I", c_int32: "i", c_int64: "q", c_float: "f", c_void_p: "P", Strides: "qqq"}


def _packer(mirror: type[Structure]) -> struct.Struct:
    """Packs a structure's fields, those of inner ones too, in native layout.

    A call so costs a tenth of what constructing the structure would.
    """
    packer = struct.Struct("@" + "".join(_FORMATS[field[1]] for field in mirror._fields_))
    if packer.size != ctypes.sizeof(mirror):
        raise AssertionError(f"{mirror.__name__} ends in padding, which the packer leaves out")
    return packer


_forward_packer = _packer(ForwardArgs)
_block_maxima_packer = _packer(BlockMaximaArgs)


def library_path() -> Path:
    """Where the library is looked for: $BSFA_LIBRARY, or beside the package."""
    override = os.environ.get(LIBRARY_VARIABLE)
    return Path(override) if override else Path(__file__).parent / "lib" / "libbsfa.so"


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
        for name in ("bsfa_forward", "bsfa_block_maxima"):
            function = getattr(loaded, name)
            function.argtypes = (c_char_p,)  # the bytes of the structure
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


def forward(*fields: float) -> None:
    """Call bsfa_forward.

    Args:
        fields: those of ForwardArgs after struct_size, strides written out, 0 for a null pointer.

    Raises:
        ValueError: the arguments break a rule.
        NotImplementedError: no native library, or valid but unsupported by it or by the GPU.
        RuntimeError: a CUDA call failed, or a defect of the library.
    """
    status = library().bsfa_forward(
        _forward_packer.pack(ABI_VERSION, _forward_packer.size, *fields)
    )
    if status != _OK:
        _raise(status)


def block_maxima(*fields: float) -> None:
    """Call bsfa_block_maxima.

    Args:
        fields: those of BlockMaximaArgs after struct_size, strides written out.

    Raises:
        ValueError: the arguments break a rule.
        NotImplementedError: no native library, or valid but unsupported by it or by the GPU.
        RuntimeError: a CUDA call failed, or a defect of the library.
    """
    status = library().bsfa_block_maxima(
        _block_maxima_packer.pack(ABI_VERSION, _block_maxima_packer.size, *fields)
    )
    if status != _OK:
        _raise(status)


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
