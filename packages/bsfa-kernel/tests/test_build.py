# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""CMake says what it builds and what is missing, and C++ projects find what it installed.

Nothing here compiles a kernel: where CUDA matters, a script plays nvcc.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from bsfa_kernel import _native
from native_build import MODULES, PACKAGE, library, run, run_well, tool


def configure(
    build: Path, *options: str, nvcc: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Configure the library; CUDACXX names the nvcc, or one that does not exist."""
    return run(
        *(tool("cmake"), "-S", PACKAGE, "-B", build, "-G", "Ninja"),
        *options,
        env={"CUDACXX": str(nvcc or build / "no-such-nvcc")},
    )


def play_nvcc(folder: Path, release: str) -> Path:
    """A program that says it is nvcc of a release, and can do nothing else."""
    script = folder / "nvcc"
    script.write_text(
        f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.99"\n'
    )
    script.chmod(0o755)
    return script


def words(text: str) -> str:
    """Text without CMake's line breaks."""
    return " ".join(text.split())


@pytest.mark.parametrize("release", ["11.8", "12.3"])
def test_old_nvcc_is_refused_where_cuda_is_asked_for(release: str, tmp_path: Path) -> None:
    nvcc = play_nvcc(tmp_path, release)
    result = configure(tmp_path / "build", "-DBSFA_CUDA=ON", nvcc=nvcc)
    assert result.returncode != 0
    assert "The CUDA kernels need nvcc 12.4 or newer" in words(result.stdout)
    assert f"is of CUDA {release}" in words(result.stdout)


def test_new_nvcc_is_not_refused_for_its_version(tmp_path: Path) -> None:
    result = configure(tmp_path / "build", "-DBSFA_CUDA=ON", nvcc=play_nvcc(tmp_path, "12.4"))
    assert result.returncode != 0  # the script compiles nothing
    assert "need nvcc 12.4 or newer" not in words(result.stdout)


def test_missing_nvcc_is_an_error_where_cuda_is_asked_for(tmp_path: Path) -> None:
    result = configure(tmp_path / "build", "-DBSFA_CUDA=ON")
    assert result.returncode != 0
    said = words(result.stdout)
    assert "need nvcc 12.4 or newer" in said
    assert "or build without kernels (BSFA_CUDA=OFF)" in said


def test_missing_nvcc_is_a_loud_warning_by_default(tmp_path: Path) -> None:
    result = configure(tmp_path / "build")
    assert result.returncode == 0, result.stdout
    said = words(result.stdout)
    assert "CMake Warning" in said
    assert "Building libbsfa WITHOUT CUDA kernels: they need nvcc 12.4 or newer" in said


def test_build_without_cuda_asks_for_no_nvcc(tmp_path: Path) -> None:
    result = configure(tmp_path / "build", "-DBSFA_CUDA=OFF")
    assert result.returncode == 0, result.stdout
    assert "Warning" not in result.stdout
    assert "CUDA compiler" not in result.stdout


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("BSFA_CUDA=MAYBE", "BSFA_CUDA must be AUTO, ON or OFF, got MAYBE"),
        ("BSFA_PRESET=fast", "BSFA_PRESET must be release, ci or dev, got fast"),
        (
            "BSFA_DTYPES=float16,float8",
            "BSFA_DTYPES must name some of float16, bfloat16, got float8",
        ),
        ("BSFA_HEAD_DIMS=63", "BSFA_HEAD_DIMS must name some of 64, 128, 256, got 63"),
        ("BSFA_ARCHITECTURES=70", "BSFA_ARCHITECTURES must name some of 80, 90a, got 70"),
        ("BSFA_SM80_TARGETS=100", "BSFA_SM80_TARGETS must name some of 80-real, .*, got 100"),
    ],
)
def test_option_that_means_nothing_is_refused(option: str, message: str, tmp_path: Path) -> None:
    result = configure(tmp_path / "build", f"-D{option}")
    assert result.returncode != 0
    assert re.search(message, words(result.stdout)), result.stdout


def test_options_of_an_earlier_preset_do_not_linger(tmp_path: Path) -> None:
    script = tmp_path / "CMakeLists.txt"
    script.write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(options NONE)\n"
        f'include("{MODULES}/BsfaOptions.cmake")\n'
        'message(STATUS "chosen: ${BSFA_DTYPES} / ${BSFA_HEAD_DIMS} / ${BSFA_ARCHITECTURES}")\n'
    )

    def chosen(*options: str) -> str:
        said = run_well(tool("cmake"), "-S", tmp_path, "-B", tmp_path / "build", *options)
        match = re.search("chosen: (.*)", said)
        assert match is not None
        return match[1]

    everything = "float16;bfloat16 / 64;128;256 / 80;90a"
    assert chosen() == everything
    assert chosen("-DBSFA_PRESET=dev") == "float16 / 128 / 90a"
    assert chosen("-DBSFA_PRESET=dev", "-DBSFA_HEAD_DIMS=64,128") == "float16 / 64;128 / 90a"
    assert chosen("-DBSFA_PRESET=ci", "-DBSFA_HEAD_DIMS=") == "bfloat16 / 128 / 80;90a"
    assert chosen("-DBSFA_PRESET=release") == everything


def test_cutlass_is_found_in_the_python_that_builds_or_where_it_is_told(tmp_path: Path) -> None:
    script = tmp_path / "CMakeLists.txt"
    script.write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(cutlass NONE)\n"
        f'list(PREPEND CMAKE_MODULE_PATH "{MODULES}")\nfind_package(CUTLASS 4.2 REQUIRED)\n'
        'message(STATUS "found: ${CUTLASS_VERSION} ${CUTLASS_INCLUDE_DIR}")\n'
    )
    header = tmp_path / "cutlass" / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    for version, fits in (("4 2 1", True), ("3 9 0", False)):
        names = ("MAJOR", "MINOR", "PATCH")
        header.write_text(
            "".join(
                f"#define CUTLASS_{name} {number}\n"
                for name, number in zip(names, version.split(), strict=True)
            )
        )
        build = tmp_path / version.replace(" ", ".")
        root = f"-DCUTLASS_ROOT={tmp_path / 'cutlass'}"
        result = run(tool("cmake"), "-S", tmp_path, "-B", build, root)
        assert (result.returncode == 0) == fits, result.stdout
        assert (f"found: {build.name} {header.parents[1]}" in result.stdout) == fits

    missing = run(
        *(tool("cmake"), "-S", tmp_path, "-B", tmp_path / "missing"),
        f"-DCUTLASS_ROOT={tmp_path / 'elsewhere'}",
    )
    assert missing.returncode != 0
    assert "pip install nvidia-cutlass, or set CUTLASS_ROOT" in words(missing.stdout)


def test_build_fails_where_a_library_exports_more_than_its_interface(tmp_path: Path) -> None:
    """The check of exports stands in the build itself; here a version script lets one more out."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("CMakeLists.txt", "pyproject.toml", "csrc", "include"):
        (source / name).symlink_to(PACKAGE / name)
    modules = source / "cmake"
    modules.mkdir()
    for path in MODULES.iterdir():
        (modules / path.name).write_text(path.read_text())
    leaky = (modules / "bsfa.map").read_text().replace("local: *;", "")
    (modules / "bsfa.map").write_text(leaky)
    build = tmp_path / "build"
    run_well(tool("cmake"), "-S", source, "-B", build, "-G", "Ninja", "-DBSFA_CUDA=OFF")
    result = run(tool("cmake"), "--build", build)
    assert result.returncode != 0
    assert "must export nothing but bsfa_*, and exports" in words(result.stdout)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix with the package configuration: that of the installed wheel, or one built here."""
    prefix = library().parents[1]
    if (prefix / "lib" / "cmake" / "bsfa" / "bsfaConfig.cmake").is_file():
        return prefix
    folder = tmp_path_factory.mktemp("installed")
    run_well(tool("cmake"), "-S", PACKAGE, "-B", folder / "build", "-G", "Ninja", "-DBSFA_CUDA=OFF")
    run_well(tool("cmake"), "--build", folder / "build")
    run_well(tool("cmake"), "--install", folder / "build", "--prefix", folder / "prefix")
    return folder / "prefix"


def test_example_finds_builds_and_runs(installed: Path, tmp_path: Path) -> None:
    run_well(
        *(tool("cmake"), "-S", PACKAGE / "examples", "-B", tmp_path, "-G", "Ninja"),
        f"-DCMAKE_PREFIX_PATH={installed}",
    )
    run_well(tool("cmake"), "--build", tmp_path)
    said = run_well(tmp_path / "attention").splitlines()
    assert said[0] == f"bsfa {_native.version()}, ABI {_native.ABI_VERSION}"
    assert said[1].startswith('{"version": ')
    assert said[2] == "a wrong argument: head_dim must be a multiple of 8 up to 256, got 100"
    # Causal, 1024 x 1024: the last query block is crossed by the diagonal in two key blocks.
    assert said[3].startswith("no forward call: ") or said[3].endswith("kept 2 of 16 key blocks")


def test_package_of_another_version_is_not_found(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(user CXX)\nfind_package(bsfa 9.0 REQUIRED)\n"
    )
    result = run(
        *(tool("cmake"), "-S", tmp_path, "-B", tmp_path / "build"),
        f"-DCMAKE_PREFIX_PATH={installed}",
    )
    assert result.returncode != 0
    assert 'compatible with requested version "9.0"' in words(result.stdout)


def test_ptxas_log_keeps_warnings_on_the_screen(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        "echo 'ptxas info    : Used 32 registers' >&2\n"
        "echo 'ptxas warning : spills' >&2\n"
        "exit 3\n"
    )
    compiler.chmod(0o755)
    launcher = MODULES / "keep_ptxas_log.sh"
    assert os.access(launcher, os.X_OK)
    result = run(launcher, compiler, "-c", "a.cu", "-o", tmp_path / "a.o")
    assert result.returncode == 3
    assert result.stdout == "ptxas warning : spills\n"
    assert "Used 32 registers" in (tmp_path / "a.o.ptxas").read_text()
