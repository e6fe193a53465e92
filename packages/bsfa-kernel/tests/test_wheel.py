# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The package builds from the tree and from its sdist, and the wheel holds what it should.

Built without CUDA and without isolation here, which takes seconds; what CUDA adds is one file more.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from native_build import PACKAGE, run, run_well

pytestmark = pytest.mark.slow

BUILD = (sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check")
OFF = "-Ccmake.define.BSFA_CUDA=OFF"
IN_REPOSITORY = not (PACKAGE / "cmake").is_dir()


def build(what: str, source: Path, folder: Path, *options: str) -> Path:
    """Build a wheel or an sdist, in a build directory of its own."""
    run_well(
        *(*BUILD, f"--{what}", "--outdir", folder, *options),
        *(f"-Cbuild-dir={folder / 'build'}", source),
    )
    (built,) = (path for path in folder.iterdir() if path.is_file())
    return built


def unpacked(sdist: Path, folder: Path) -> Path:
    """The sources in an sdist."""
    with tarfile.open(sdist) as archive:
        # As an attribute: Python before 3.11.4 has neither the argument nor the filter.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)
    (source,) = folder.iterdir()
    return source


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's sdist."""
    return build("sdist", PACKAGE, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist, in an build directory of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    return build("wheel", unpacked(sdist, folder / "source"), folder / "dist", OFF)


def test_sdist_holds_all_that_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        *("pyproject.toml", "CMakeLists.txt", "CMakePresets.json", "README.md", "LICENSE"),
        *("cmake/FindCUTLASS.cmake", "cmake/BsfaKernels.cmake", "cmake/keep_ptxas_log.sh"),
        *("csrc/api.cpp", "csrc/kernels.cmake", "csrc/sm80/instantiations/half_64.cu"),
        *("include/bsfa/bsfa.h", "src/bsfa_kernel/__init__.py", "examples/CMakeLists.txt"),
        *("tests/test_wheel.py", "tests/native/abi_layout.c"),
    ):
        assert needed in names
    unwanted = [name for name in names if "__pycache__" in name or name.startswith("build/")]
    assert unwanted == []


def test_wheel_serves_every_python(wheel: Path) -> None:
    assert wheel.name.startswith("bsfa_kernel-0.1.0-py3-none-linux_")


def test_wheel_holds_package_library_header_and_configuration(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for needed in (
        *("__init__.py", "py.typed", "lib/libbsfa.so", "include/bsfa/bsfa.h"),
        *(f"lib/cmake/bsfa/bsfaConfig{part}.cmake" for part in ("", "Version")),
    ):
        assert f"bsfa_kernel/{needed}" in names
    sources = {
        f"bsfa_kernel/{path.relative_to(PACKAGE / 'src' / 'bsfa_kernel')}"
        for path in (PACKAGE / "src" / "bsfa_kernel").rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources
    assert {name.split("/")[0] for name in names} == {"bsfa_kernel", "bsfa_kernel-0.1.0.dist-info"}


def test_wheel_states_its_name_needs_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(read(archive, "METADATA"))
        notices = read(archive, "licenses/THIRD_PARTY_NOTICES.txt")
        entry_points = read(archive, "entry_points.txt")
    assert metadata["Name"] == "bsfa-kernel"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata.get_all("License-File") == ["LICENSE", "THIRD_PARTY_NOTICES.txt"]
    assert "NVIDIA CORPORATION" in notices
    assert metadata.get_all("Requires-Dist") == ["torch>=2.9", "numpy>=1.24"]
    assert "[cmake.prefix]\nbsfa = bsfa_kernel" in entry_points.replace("bsfa=", "bsfa = ")


def test_library_of_the_wheel_loads_where_nothing_else_is_installed(
    wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extract("bsfa_kernel/lib/libbsfa.so", tmp_path)
    program = (
        "import ctypes, sys; describe = ctypes.CDLL(sys.argv[1]).bsfa_build_info; "
        "describe.restype = ctypes.c_char_p; print(describe().decode())"
    )
    said = run_well(
        sys.executable, "-I", "-c", program, tmp_path / "bsfa_kernel" / "lib" / "libbsfa.so"
    )
    assert '"cuda": null, "kernels": []' in said


def test_an_editable_installation_finds_its_library(tmp_path: Path) -> None:
    settings = {"cmake.define.BSFA_CUDA": "OFF", "build-dir": str(tmp_path / "build")}
    backend = (
        f"from scikit_build_core.build import *; build_editable({str(tmp_path)!r}, {settings})"
    )
    run_well(sys.executable, "-c", backend, cwd=PACKAGE)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = (
        "import site, sys; site.addsitedir(sys.argv[1]); import bsfa_kernel; "
        "from bsfa_kernel._native import library_path; print(bsfa_kernel.__file__); "
        "print(library_path()); print(bsfa_kernel.build_info().version)"
    )
    # Not from PYTHONPATH, where the tree may stand.
    env = {"PYTHONPATH": "", "BSFA_LIBRARY": ""}
    package, found, version = run_well(sys.executable, "-c", program, site, env=env).split()
    assert package == str(PACKAGE / "src" / "bsfa_kernel" / "__init__.py")
    assert found == str(site / "bsfa_kernel" / "lib" / "libbsfa.so")
    assert version == "0.1.0"


def test_a_pre_release_is_one_in_the_library_too(sdist: Path, tmp_path: Path) -> None:
    source = unpacked(sdist, tmp_path / "source")
    project = source / "pyproject.toml"
    project.write_text(project.read_text().replace('version = "0.1.0"', 'version = "0.2.0rc1"'))
    wheel = build("wheel", source, tmp_path / "dist", OFF)
    assert wheel.name.startswith("bsfa_kernel-0.2.0rc1-")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("bsfa_kernel/lib/libbsfa.so")
        configuration = archive.read("bsfa_kernel/lib/cmake/bsfa/bsfaConfigVersion.cmake")
    assert b"0.2.0rc1\0" in library or b'"0.2.0rc1"' in library
    assert b'PACKAGE_VERSION "0.2.0"' in configuration


def test_build_that_fails_says_what_would_help(tmp_path: Path) -> None:
    result = run(
        *(*BUILD, "--wheel", "--outdir", tmp_path),
        *("-Ccmake.define.BSFA_CUDA=ON", f"-Cbuild-dir={tmp_path / 'build'}", PACKAGE),
        env={"CUDACXX": str(tmp_path / "no-such-nvcc")},
    )
    assert result.returncode != 0
    assert "for the CUDA kernels nvcc 12.4 or newer" in " ".join(result.stdout.split())
    assert "without kernels it builds with BSFA_CUDA=OFF" in " ".join(result.stdout.split())


@pytest.mark.skipif(not IN_REPOSITORY, reason="an sdist holds the modules and nothing to compare")
def test_sdist_has_the_modules_of_the_repository(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {Path(name).name for name in archive.getnames() if "/cmake/" in name}
    assert names == {path.name for path in (PACKAGE.parents[1] / "cmake").iterdir()}


def read(archive: zipfile.ZipFile, name: str) -> str:
    """A file of the wheel's metadata."""
    return archive.read(f"bsfa_kernel-0.1.0.dist-info/{name}").decode()
