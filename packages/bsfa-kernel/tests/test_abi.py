# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The header is plain C, and its mirror in Python has the compiler's layout."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path

import pytest

from bsfa_kernel import _native
from bsfa_kernel.rules import PRECISION_CODES, RULE_CODES
from native_build import INCLUDE, NATIVE_TESTS, library, run, run_well, tool

MIRRORS = {
    "bsfa_strides": _native.Strides,
    "bsfa_tensor": _native.TensorArg,
    "bsfa_problem": _native.Problem,
    "bsfa_forward_args": _native.ForwardArgs,
    "bsfa_block_maxima_args": _native.BlockMaximaArgs,
    "bsfa_select_blocks_args": _native.SelectBlocksArgs,
    "bsfa_attend_blocks_args": _native.AttendBlocksArgs,
}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, ...]]:
    """What a C program says of the header: name -> (offset and) size, or value."""
    program = tmp_path_factory.mktemp("abi") / "layout"
    run_well(
        *(tool("cc"), "-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}"),
        *(NATIVE_TESTS / "abi_layout.c", "-o", program),
    )
    lines = (line.split() for line in run_well(program).splitlines())
    return {name: tuple(map(int, numbers)) for name, *numbers in lines}


@pytest.mark.parametrize(
    ("compiler", "standard", "suffix"), [("cc", "c11", "c"), ("c++", "c++17", "cpp")]
)
def test_header_compiles_alone_without_a_warning(
    compiler: str, standard: str, suffix: str, tmp_path: Path
) -> None:
    source = tmp_path / f"include.{suffix}"
    source.write_text("#include <bsfa/bsfa.h>\nbsfa_forward_args args;\n")
    flags = ("-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only")
    run_well(tool(compiler), f"-std={standard}", *flags, f"-I{INCLUDE}", source)


def test_header_check_notices_what_is_not_c11(tmp_path: Path) -> None:
    source = tmp_path / "include.c"
    source.write_text("#include <bsfa/bsfa.h>\nbsfa_forward_args args = {};\nint f() { a: }\n")
    flags = ("-std=c11", "-pedantic", "-Werror", "-fsyntax-only")
    assert run(tool("cc"), *flags, f"-I{INCLUDE}", source).returncode != 0


@pytest.mark.parametrize("name", MIRRORS)
def test_mirror_has_the_layout_of_the_c_struct(
    name: str, layout: dict[str, tuple[int, ...]]
) -> None:
    assert mirrored(name, MIRRORS[name]) == {
        key: value for key, value in layout.items() if key == name or key.startswith(f"{name}.")
    }


def test_layout_comparison_notices_a_member_of_another_size(
    layout: dict[str, tuple[int, ...]],
) -> None:
    class Wrong(ctypes.Structure):
        _fields_ = (
            ("batch", ctypes.c_int32),
            ("seqlen", ctypes.c_int64),
            ("heads", ctypes.c_int64),
        )

    found = mirrored("bsfa_strides", Wrong)
    assert found["bsfa_strides"] == layout["bsfa_strides"]  # padding hides it from sizeof
    assert found["bsfa_strides.batch"] != layout["bsfa_strides.batch"]


@pytest.mark.parametrize("name", MIRRORS)
def test_layout_program_prints_every_member_of_the_header(
    name: str, layout: dict[str, tuple[int, ...]]
) -> None:
    header = re.sub(r"/\*.*?\*/", "", (INCLUDE / "bsfa" / "bsfa.h").read_text(), flags=re.DOTALL)
    body = re.search(rf"struct {name} \{{(.*?)\}}", header, flags=re.DOTALL)
    assert body is not None
    members = re.findall(r"(\w+);", body[1])
    printed = [key.partition(".")[2] for key in layout if key.startswith(f"{name}.")]
    assert printed == members


def test_codes_of_python_are_those_of_the_header(layout: dict[str, tuple[int, ...]]) -> None:
    assert layout["BSFA_ABI_VERSION"] == (_native.ABI_VERSION,)
    assert layout["BSFA_OK"] == (0,)
    errors = {
        layout["BSFA_INVALID_ARGUMENT"][0]: ValueError,
        layout["BSFA_UNSUPPORTED"][0]: NotImplementedError,
        layout["BSFA_CUDA_ERROR"][0]: RuntimeError,
    }
    assert errors == _native._ERRORS
    for kind, codes in (("RULE", RULE_CODES), ("PRECISION", PRECISION_CODES)):
        for name, code in codes.items():
            assert layout[f"BSFA_{kind}_{name.upper()}"] == (code,)


def test_library_states_its_version_and_build() -> None:
    loaded = _native.library()
    assert loaded.bsfa_abi_version() == _native.ABI_VERSION
    described = json.loads(_native.build_info_json())
    assert list(described) == ["version", "abi_version", "cuda", "kernels"]
    assert described["version"] == _native.version()
    assert re.fullmatch(r"\d+\.\d+\.\d+", described["version"])
    assert described["abi_version"] == _native.ABI_VERSION
    assert (described["cuda"] is None) == (not described["kernels"])
    for kernel in described["kernels"]:
        members = {"name", "arch", "ptx", "dtype", "head_dim", "head_dims", "geometries"}
        assert set(kernel) == members
        least = {64: 8, 128: 72}[kernel["head_dim"]]
        assert kernel["head_dims"] == list(range(least, kernel["head_dim"] + 1, 8))
        assert kernel["name"] in {"forward", "block_maxima", "select_blocks", "attend_blocks"}
        assert kernel["arch"] in {80, 90}
        assert kernel["geometries"] == ["128x64", "64x64"]


def test_library_loads_in_a_process_that_has_nothing_else() -> None:
    program = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); "
        "library.bsfa_version.restype = ctypes.c_char_p; print(library.bsfa_version().decode())"
    )
    said = run_well(tool("python"), "-I", "-c", program, library())
    assert said.strip() == _native.version()


def mirrored(name: str, mirror: type[ctypes.Structure]) -> dict[str, tuple[int, ...]]:
    """The layout of a ctypes structure, as the C program prints it."""
    found: dict[str, tuple[int, ...]] = {name: (ctypes.sizeof(mirror),)}
    for member, *_ in mirror._fields_:
        descriptor = getattr(mirror, member)
        found[f"{name}.{member}"] = (descriptor.offset, descriptor.size)
    return found
