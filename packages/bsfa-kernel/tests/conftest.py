# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures and markers that the tests share."""

from __future__ import annotations

import datetime
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import hypothesis
import pytest
import torch

import bsfa_kernel
from bsfa_kernel import _native

hypothesis.settings.register_profile("cpu", max_examples=8, deadline=None)
hypothesis.settings.register_profile("default", max_examples=50, deadline=None)
hypothesis.settings.register_profile("nightly", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile(
    os.environ.get("BSFA_HYPOTHESIS_PROFILE", "default" if torch.cuda.is_available() else "cpu")
)

# Set once for all processes of pytest-xdist, which midnight would part.
os.environ.setdefault("BSFA_TEST_DAY", datetime.date.today().isoformat())


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "gpu: needs a CUDA device",
        "sm80: runs the sm_80 kernels",
        "sm90: runs the sm_90 kernels",
        "slow: takes more than a few seconds",
    ):
        config.addinivalue_line("markers", marker)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # as many threads as cores in each would fight for them
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // workers, 1))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("BSFA_REQUIRE_GPU") == "1":
        pytest.fail("BSFA_REQUIRE_GPU=1, and torch sees no CUDA device", pytrace=False)
    pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the kernels' tests, run a fifth on the CPU: there they only show that they work."""
    if os.environ.get("BSFA_ALL_TARGETS") == "1":
        return
    rehearsed = re.compile(r"::test_(\w+)\[(?:.*-)?cpu(?:-.*)?\]$")
    left_out = [
        item
        for item in items
        if "target" in getattr(item, "fixturenames", ())
        and (torch.cuda.is_available() or "test_properties" not in item.nodeid)
        and rehearsed.search(item.nodeid)
        and zlib.crc32(item.nodeid.rpartition("/")[2].encode()) % 5
    ]
    if len(left_out) < len(items):
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@dataclass(frozen=True)
class Target:
    """What a test runs on: the reference back end on the CPU, or one architecture's kernels."""

    name: str
    device: str
    arch: int  # 0 on the CPU

    def __str__(self) -> str:
        return self.name

    def insist(self) -> AbstractContextManager[None]:
        """Within the context, calls use this architecture's kernels and no others."""
        return _native.force_arch(self.arch) if self.arch else nullcontext()

    def require(self, kernel: str, dtype: torch.dtype, head_dim: int) -> None:
        """Skip the test where the library was built without the kernel that it needs."""
        if self.arch and not any(
            (found.name, found.arch, found.dtype)
            == (kernel, self.arch, str(dtype).removeprefix("torch."))
            and head_dim in found.head_dims
            for found in bsfa_kernel.build_info().kernels
        ):
            pytest.skip(f"the library has no {kernel} kernel for {self}, {dtype}, {head_dim}")


CPU = Target("cpu", "cpu", 0)
SM80 = Target("sm80", "cuda", 80)
SM90 = Target("sm90", "cuda", 90)


def gpu_target(target: Target) -> Target:
    """The target, if its kernels are in the library and run on this GPU; else the test is skipped.

    Where a GPU is required, a library without kernels fails the test instead.
    """
    info = bsfa_kernel.build_info()
    if not info.kernels:
        if os.environ.get("BSFA_REQUIRE_GPU") == "1":
            pytest.fail(f"BSFA_REQUIRE_GPU=1, and there are no kernels: {info}", pytrace=False)
        pytest.skip(f"no kernels: {info.reason or 'the library was built without CUDA'}")
    if target.arch not in info.architectures:
        pytest.skip(f"the library has no kernels for {target}; it has {info.architectures}")
    major, minor = torch.cuda.get_device_capability()
    runs = major == 9 if target.arch == 90 else major >= 8
    if not runs:
        pytest.skip(f"the kernels for {target} do not run on this GPU (sm_{major}{minor})")
    return target


GPU_PARAMETERS = (
    pytest.param(SM80, id="sm80", marks=(pytest.mark.gpu, pytest.mark.sm80)),
    pytest.param(SM90, id="sm90", marks=(pytest.mark.gpu, pytest.mark.sm90)),
)


@pytest.fixture(params=[pytest.param(CPU, id="cpu"), *GPU_PARAMETERS])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every back end that this machine has: the tests of kernels are so tried on a CPU as well."""
    chosen: Target = request.param
    if chosen.arch:
        gpu_target(chosen)
    with chosen.insist():
        yield chosen


@pytest.fixture(params=GPU_PARAMETERS)
def arch(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every architecture whose kernels this machine's GPU runs."""
    chosen = gpu_target(request.param)
    with chosen.insist():
        yield chosen


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The element types of the kernels."""
    return request.param


@pytest.fixture(params=bsfa_kernel.RULES)
def rule(request: pytest.FixtureRequest) -> str:
    """The rules."""
    return request.param


@pytest.fixture(params=bsfa_kernel.GEOMETRIES, ids=str)
def geometry(request: pytest.FixtureRequest) -> bsfa_kernel.Geometry:
    """The sparsity blocks."""
    return request.param
