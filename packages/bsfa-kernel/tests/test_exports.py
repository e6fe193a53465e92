# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The library shows nothing but its interface, and needs nothing but the C and C++ libraries."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from native_build import INCLUDE, MODULES, library, run, run_well, tool

FUNCTIONS = {
    "bsfa_abi_version",
    "bsfa_attend_blocks",
    "bsfa_attend_blocks_workspace",
    "bsfa_block_maxima",
    "bsfa_build_info",
    "bsfa_forward",
    "bsfa_last_error",
    "bsfa_select_blocks",
    "bsfa_select_blocks_workspace",
    "bsfa_version",
}
ALLOWED_NEEDS = re.compile(
    r"lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so\.\d+|ld-linux-x86-64\.so\.2|ld-linux-aarch64\.so\.1"
)


def exports(path: Path) -> set[str]:
    lines = run_well(tool("nm"), "-D", "--defined-only", path).splitlines()
    return {line.split()[-1] for line in lines}


def needs(path: Path) -> list[str]:
    lines = run_well(tool("readelf"), "-d", path).splitlines()
    return [match[1] for line in lines if (match := re.search(r"\(NEEDED\).*\[(.+)\]", line))]


def check_symbols(path: Path) -> subprocess.CompletedProcess[str]:
    """The check that the build makes."""
    settings = (f"-DNM={tool('nm')}", f"-DLIBRARY={path}")
    return run(tool("cmake"), *settings, "-P", MODULES / "CheckSymbols.cmake")


def compile_shared(tmp_path: Path, code: str, *flags: str) -> Path:
    source, output = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text(code)
    run_well(tool("cc"), "-shared", "-fPIC", source, "-o", output, *flags)
    return output


def test_library_exports_its_functions_and_nothing_else() -> None:
    assert exports(library()) == FUNCTIONS


def test_header_declares_what_the_library_exports() -> None:
    header = (INCLUDE / "bsfa" / "bsfa.h").read_text()
    assert set(re.findall(r"^BSFA_API .*?(bsfa_\w+)\(", header, flags=re.MULTILINE)) == FUNCTIONS


def test_library_needs_neither_cuda_nor_torch_nor_python() -> None:
    unexpected = [name for name in needs(library()) if not ALLOWED_NEEDS.fullmatch(name)]
    assert unexpected == []


def test_library_has_no_search_path_of_the_build_machine() -> None:
    assert not re.search(r"\(R(UN)?PATH\)", run_well(tool("readelf"), "-d", library()))


def test_needs_are_read_from_the_file(tmp_path: Path) -> None:
    other = compile_shared(tmp_path, "int f(void) { return 0; }", "-Wl,--no-as-needed", "-lresolv")
    assert not all(ALLOWED_NEEDS.fullmatch(name) for name in needs(other))


def test_symbol_check_of_the_build_passes_on_the_library() -> None:
    result = check_symbols(library())
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("int bsfa_f(void) { return 0; } int cudaMalloc(void) { return 0; }", "cudaMalloc"),
        ("static int f(void) { return 0; } int (*const g)(void) = f;", "exports"),
        ("typedef int nothing;", "exports no bsfa_"),
    ],
    ids=["a foreign function", "foreign data", "nothing"],
)
def test_symbol_check_of_the_build_fails_on(code: str, message: str, tmp_path: Path) -> None:
    result = check_symbols(compile_shared(tmp_path, code))
    assert result.returncode != 0
    assert message in result.stdout


def test_symbol_check_of_the_build_fails_on_what_is_no_library(tmp_path: Path) -> None:
    text = tmp_path / "libtext.so"
    text.write_text("no library")
    assert check_symbols(text).returncode != 0
    assert check_symbols(tmp_path / "missing.so").returncode != 0
