# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Which kernel a GPU gets, tried with tables of kernels instead of GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from native_build import INCLUDE, NATIVE_TESTS, PACKAGE, run_well, tool

# Of the widths, 128 has both architectures' kernels, 64 only sm_80's, 256 only sm_90's.
KERNELS = """\
{80, BSFA_FLOAT16, 64, nullptr},
{80, BSFA_FLOAT16, 128, nullptr},
{90, BSFA_FLOAT16, 128, nullptr},
{90, BSFA_FLOAT16, 256, nullptr},
"""
FLOAT16, BFLOAT16 = 0, 1
UNSUPPORTED = "2: "


def compile_dispatch(folder: Path, kernels: str, *, on_90: bool = True, ptx: bool = True) -> Path:
    (folder / "forward_kernels.inc").write_text(kernels)
    for name in ("block_maxima", "select_blocks", "attend_blocks"):
        (folder / f"{name}_kernels.inc").write_text("")
    csrc = PACKAGE / "csrc"
    run_well(
        *(tool("c++"), "-std=c++17", f"-DBSFA_SM80_PTX={ptx:d}", f"-DBSFA_SM80_ON_90={on_90:d}"),
        *(f"-I{INCLUDE}", f"-I{csrc}", f"-I{folder}"),
        *(csrc / "dispatch.cpp", NATIVE_TESTS / "dispatch.cpp", "-o", folder / "dispatch"),
    )
    return folder / "dispatch"


@pytest.fixture(scope="module")
def dispatch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, with KERNELS."""
    return compile_dispatch(tmp_path_factory.mktemp("dispatch"), KERNELS)


def ask(
    dispatch: Path, *, capability: int, arch: int = 0, dtype: int = 0, head_dim: int = 128
) -> str:
    return run_well(dispatch, *map(str, (capability, arch, dtype, head_dim))).strip()


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(80, "80"), (86, "80"), (89, "80"), (90, "90"), (100, "80"), (103, "80"), (120, "80")],
)
def test_newest_kernel_that_runs_is_taken(dispatch: Path, capability: int, expected: str) -> None:
    assert ask(dispatch, capability=capability) == expected


def test_hopper_falls_back_to_the_general_kernel(dispatch: Path) -> None:
    assert ask(dispatch, capability=90, head_dim=64) == "80"


def test_architecture_that_is_insisted_on_is_taken(dispatch: Path) -> None:
    assert ask(dispatch, capability=90, arch=80) == "80"
    assert ask(dispatch, capability=90, arch=90) == "90"


@pytest.mark.parametrize(
    ("capability", "arch", "head_dim", "words"),
    [
        (75, 0, 128, "compute capability 7.5"),
        (80, 90, 128, "compute capability 8.0"),
        (100, 90, 128, "compute capability 10.0"),
        (80, 0, 256, "compute capability 8.0"),
    ],
)
def test_gpu_that_runs_no_kernel_is_named_with_what_is_needed(
    dispatch: Path, capability: int, arch: int, head_dim: int, words: str
) -> None:
    said = ask(dispatch, capability=capability, arch=arch, head_dim=head_dim)
    assert said.startswith(UNSUPPORTED + f"this GPU has {words}")
    assert "(sm_80 kernels run on 8.0 and newer, sm_90 kernels on 9.0)" in said
    assert "it has float16 with head_dim 8 to 64 on sm_80, float16 with head_dim 72 to 128" in said


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [(8, "80"), (56, "80"), (72, "90"), (96, "90"), (120, "90"), (136, "90"), (248, "90")],
)
def test_next_wider_kernel_serves_the_head_dims_between(
    dispatch: Path, head_dim: int, expected: str
) -> None:
    assert ask(dispatch, capability=90, head_dim=head_dim) == expected
    said = ask(dispatch, capability=90, arch=80, head_dim=head_dim)
    assert said == "80" if head_dim <= 128 else said.startswith(UNSUPPORTED)


def test_a_kernel_of_twice_the_width_does_not_stand_in_for_one_that_lacks(dispatch: Path) -> None:
    said = ask(dispatch, capability=90, arch=90, head_dim=56)
    assert "no forward kernel for float16 with head_dim 56 on sm_90" in said


def test_kernel_that_was_not_built_is_named_with_those_that_were(dispatch: Path) -> None:
    said = ask(dispatch, capability=90, dtype=BFLOAT16)
    assert said.startswith(
        UNSUPPORTED + "this libbsfa has no forward kernel for bfloat16 with head_dim 128; it has "
    )
    said = ask(dispatch, capability=90, arch=90, head_dim=64)
    assert "no forward kernel for float16 with head_dim 64 on sm_90" in said


def test_general_kernel_without_ptx_runs_on_what_it_was_compiled_for(tmp_path: Path) -> None:
    ampere = compile_dispatch(tmp_path, KERNELS, on_90=False, ptx=False)
    assert ask(ampere, capability=89, head_dim=64) == "80"
    assert "(sm_80 kernels run on 8.x, sm_90" in ask(ampere, capability=90, head_dim=64)
    hopper = compile_dispatch(tmp_path, KERNELS, on_90=True, ptx=False)
    assert ask(hopper, capability=90, head_dim=64) == "80"
    assert "(sm_80 kernels run on 8.x and 9.0, sm_90" in ask(hopper, capability=100)


def test_library_without_kernels_says_how_to_get_some(tmp_path: Path) -> None:
    said = ask(compile_dispatch(tmp_path, ""), capability=90)
    assert said == (
        UNSUPPORTED + "this libbsfa was built without forward kernels: build it with nvcc 12.4 or "
        "newer and BSFA_CUDA=ON (docs/build.md)"
    )
