#!/usr/bin/env -S uv run --script
# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
# /// script
# dependencies = ["nox>=2025.2.9"]
# ///
"""Every command that a developer or CI runs.

``nox -l`` lists the sessions, ``nox -t cpu`` runs all that needs no GPU, and ``nox -t gpu`` what
does. Arguments after ``--`` go to pytest, or to the command that the session runs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PACKAGES = ("bsfa-kernel", "bsfa-calib", "bsfa-hf")
ASSETS = ROOT / ".cache" / "assets"
WHEELHOUSE = ROOT / ".nox" / "wheelhouse"
CUDA_SOURCES = ("csrc", "include", "examples")

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.tags = ["cpu"]
nox.options.error_on_missing_interpreters = True


# ------------------------------------------------------------------------------------------ checks


@nox.session(tags=["cpu", "lint"])
def lint(session: nox.Session) -> None:
    """Check the format and the style of Python, C++ and CUDA sources."""
    session.install("ruff==0.17.6", "clang-format==23.1.5")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    kernel = ROOT / "packages" / "bsfa-kernel"
    endings = {".h", ".hpp", ".cpp", ".cuh", ".cu", ".c"}
    sources = [
        str(path)
        for folder in CUDA_SOURCES
        for path in sorted((kernel / folder).rglob("*"))
        if path.suffix in endings
    ]
    session.run("clang-format", "--dry-run", "--Werror", *sources)


@nox.session(tags=["cpu", "lint"])
def check_versions(session: nox.Session) -> None:
    """Check that the packages' versions satisfy each other's pins and stand in the changelogs."""
    session.install("pytest", "packaging", "tomli; python_version < '3.11'")
    session.run("pytest", "-q", ".github/scripts")
    session.run("python", ".github/scripts/check_versions.py", str(ROOT / "packages"))


# ------------------------------------------------------------------------------------------- tests


@nox.session(tags=["cpu"])
def kernel(session: nox.Session) -> None:
    """Test bsfa-kernel without a GPU: reference, operators, C interface, build and wheel."""
    cuda = "ci" if shutil.which("nvcc") else "off"
    install(session, "bsfa-kernel", wheels=[build_wheel(session, "bsfa-kernel", cuda=cuda)])
    install_cutlass(session)
    check_types(session, "bsfa-kernel")
    run_pytest(session, "packages/bsfa-kernel/tests", "-m", "not gpu")


@nox.session(tags=["cpu"])
def calib(session: nox.Session) -> None:
    """Test bsfa-calib: the file format, the estimator, and calibrating a real model."""
    install(session, "bsfa-calib", wheels=wheels_up_to(session, "bsfa-calib"))
    check_types(session, "bsfa-calib")
    run_pytest(session, "packages/bsfa-calib/tests", "-m", "not gpu", env=assets(session))


@nox.session(tags=["cpu"])
def hf(session: nox.Session) -> None:
    """Test bsfa-hf on small random models and on a real one."""
    install(session, "bsfa-hf", wheels=wheels_up_to(session, "bsfa-hf"))
    check_types(session, "bsfa-hf")
    run_pytest(session, "packages/bsfa-hf/tests", "-m", "not gpu", env=assets(session))


@nox.session(tags=["cpu"])
def benchmark_tests(session: nox.Session) -> None:
    """Test the benchmark scripts on the reference back end."""
    install(session, "bsfa-hf", wheels=wheels_up_to(session, "bsfa-hf"))
    run_pytest(session, "benchmarks/tests", "-m", "not gpu", env=assets(session))


@nox.session(default=False, tags=["gpu"])
def kernel_gpu(session: nox.Session) -> None:
    """Test the CUDA kernels; fails, not skips, where there is no GPU."""
    require_gpu(session)
    install(session, "bsfa-kernel", wheels=[build_wheel(session, "bsfa-kernel", cuda="release")])
    install_cutlass(session)
    run_pytest(session, "packages/bsfa-kernel/tests", env={"BSFA_REQUIRE_GPU": "1"})


@nox.session(default=False, tags=["gpu"])
def hf_gpu(session: nox.Session) -> None:
    """Test calibration and the transformers integration on a GPU."""
    require_gpu(session)
    install(session, "bsfa-hf", wheels=wheels_up_to(session, "bsfa-hf"))
    run_pytest(
        session,
        "packages/bsfa-calib/tests",
        "packages/bsfa-hf/tests",
        env={"BSFA_REQUIRE_GPU": "1", **assets(session)},
    )


# --------------------------------------------------------------------------------------- main jobs


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Ask a real model about a long text, dense and block-sparse.

    What follows ``--`` goes to ``bsfa demo``: ``nox -s demo -- --tokens 4096 --calibrate``.
    """
    install(session, "bsfa-hf", wheels=wheels_up_to(session, "bsfa-hf"), tests=False)
    paths = assets(session)
    session.run(
        *("bsfa", "demo", "--model", paths["BSFA_TEST_MODEL"], "--text", paths["BSFA_TEST_TEXT"]),
        *session.posargs,
    )


@nox.session(default=False, tags=["perf"])
def benchmark(session: nox.Session) -> None:
    """Measure the kernels against their peers on this machine's GPU, and make the report."""
    require_gpu(session)
    install(session, "bsfa-hf", wheels=wheels_up_to(session, "bsfa-hf"))
    session.run("python", "benchmarks/attention.py", *(session.posargs or ["--preset", "quick"]))
    session.run("python", "benchmarks/report.py")


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Make sdist and wheel of one package, the wheel from the sdist: nox -s build -- bsfa-calib."""
    if len(session.posargs) != 1 or session.posargs[0] not in PACKAGES:
        session.error(f"name one of the packages {', '.join(PACKAGES)}, got {session.posargs}")
    package = ROOT / "packages" / session.posargs[0]
    session.install("build", "twine")
    shutil.rmtree(package / "dist", ignore_errors=True)
    session.run("python", "-m", "build", str(package))  # the wheel is built from the sdist
    session.run("twine", "check", "--strict", *map(str, sorted((package / "dist").iterdir())))


@nox.session(default=False)
def test_wheel(session: nox.Session) -> None:
    """Test the wheel that the session build made: nox -s test_wheel -- bsfa-calib."""
    if len(session.posargs) != 1 or session.posargs[0] not in PACKAGES:
        session.error(f"name one of the packages {', '.join(PACKAGES)}, got {session.posargs}")
    package = session.posargs[0]
    built = sorted((ROOT / "packages" / package / "dist").glob("*.whl"))
    if len(built) != 1:
        session.error(f"packages/{package}/dist must hold one wheel (nox -s build), got {built}")
    below = PACKAGES[: PACKAGES.index(package)]
    install(session, package, wheels=[*(build_wheel(session, name) for name in below), built[0]])
    marks = "not gpu" if not has_gpu() else "not slow"
    env = {} if package == "bsfa-kernel" else assets(session)
    run_pytest(session, f"packages/{package}/tests", "-m", marks, env=env, posargs=())


# ----------------------------------------------------------------------------------------- helpers


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU."""
    return shutil.which("nvidia-smi") is not None


def require_gpu(session: nox.Session) -> None:
    """Fail where there is no GPU: a session that skips everything would look like a success."""
    if not has_gpu():
        session.error("this session needs an NVIDIA GPU, and nvidia-smi is not on the PATH")


def build_wheel(session: nox.Session, package: str, *, cuda: str | None = None) -> Path:
    """Build the wheel of a package, or return the one that was built from the same sources.

    Args:
        session: The session whose interpreter builds.
        package: Name of the package.
        cuda: What the kernel wheel holds: "off" (no kernels), "ci" (a few) or "release" (all). The
            default is all where there is a GPU to run them, and none elsewhere.
    """
    source = ROOT / "packages" / package
    settings: list[str] = []
    if package == "bsfa-kernel":
        cuda = cuda or ("release" if has_gpu() else "off")
        settings = {
            "off": ["--config-settings=cmake.define.BSFA_CUDA=OFF"],
            "ci": ["--config-settings=cmake.define.BSFA_PRESET=ci"],
            "release": ["--config-settings=cmake.define.BSFA_CUDA=ON"],
        }[cuda]
    digest = hashlib.sha256("\n".join([sys.version, *settings]).encode())
    for path in [*sorted(source.rglob("*")), *sorted((ROOT / "cmake").rglob("*"))]:
        relative = path.relative_to(ROOT)
        if path.is_file() and not {"build", "dist", "tests", "__pycache__"} & set(relative.parts):
            digest.update(f"{relative}\n".encode())
            digest.update(path.read_bytes())
    target = WHEELHOUSE / f"{package}-{digest.hexdigest()[:16]}"
    if not list(target.glob("*.whl")):
        session.log(f"building the wheel of {package}" + (f" (kernels: {cuda})" if cuda else ""))
        session.run(
            *("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target)),
            *settings,
            str(source),
        )
    (wheel,) = target.glob("*.whl")
    return wheel


def wheels_up_to(session: nox.Session, package: str) -> list[Path]:
    """Build the wheels of a package and of those that it depends on."""
    return [build_wheel(session, name) for name in PACKAGES[: PACKAGES.index(package) + 1]]


def install(session: nox.Session, package: str, *, wheels: list[Path], tests: bool = True) -> None:
    """Install wheels with all their extras, and what a package's tests need."""
    requirements = [os.environ.get("BSFA_TORCH", "torch")]
    for wheel in wheels:
        extras = "[capture,plot]" if wheel.name.startswith("bsfa_calib") else ""
        requirements.append(f"{wheel}{extras}")
    if tests:
        project = nox.project.load_toml(ROOT / "packages" / package / "pyproject.toml")
        requirements += nox.project.dependency_groups(project, "test")
    constraints = [] if "BSFA_TORCH" in os.environ else ["-c", str(ROOT / "constraints.txt")]
    session.install(*requirements, *constraints)
    # The same version built anew is no upgrade to pip, so the wheels are put in once more by force.
    session.install("--no-deps", "--force-reinstall", *map(str, wheels))


def install_cutlass(session: nox.Session) -> None:
    """Install the CUTLASS headers that the kernel is built with, without what they ask for."""
    project = nox.project.load_toml(ROOT / "packages" / "bsfa-kernel" / "pyproject.toml")
    requirements = project["build-system"]["requires"]
    session.install("--no-deps", *(name for name in requirements if "cutlass" in name))


def check_types(session: nox.Session, package: str) -> None:
    """Check the types of a package against those of the packages that are installed."""
    session.install("mypy==2.4.1")
    source = ROOT / "packages" / package / "src"
    session.run("mypy", "--config-file", str(ROOT / "mypy.ini"), str(source))


def assets(session: nox.Session) -> dict[str, str]:
    """Fetch the real model and texts, and return the variables by which tests find them."""
    session.run("python", "benchmarks/assets.py", str(ASSETS))
    model = ASSETS / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return {"BSFA_TEST_MODEL": str(model), "BSFA_TEST_TEXT": str(ASSETS / "text")}


def run_pytest(
    session: nox.Session,
    *arguments: str,
    env: dict[str, str] | None = None,
    posargs: tuple[str, ...] | None = None,
) -> None:
    """Run pytest, with the options given after ``--``."""
    extra = session.posargs if posargs is None else posargs
    session.run("pytest", "--durations=5", *arguments, *extra, env=env or {})


if __name__ == "__main__":
    nox.main()
