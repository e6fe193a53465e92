# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The kernels that are compared, each behind the same small adapter."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import bsfa_kernel
from bsfa_kernel import Geometry, _native
from inputs import Problem, Shape

Call = Callable[[], Tensor]


class Mode(NamedTuple):
    """How blocks are chosen.

    Attributes:
        selection: "exact" or "int8": from what scores.
        voters: one query row in 1, 2 or 4 votes.
    """

    selection: str = "exact"
    voters: int = 1

    @classmethod
    def parse(cls, text: str) -> Mode:
        """Read what ``str()`` writes: int8, or int8:4.

        Raises:
            ValueError: there is no such mode.
        """
        selection, _, voters = text.partition(":")
        mode = cls(selection, int(voters or 1))
        if selection not in bsfa_kernel.PRECISIONS or mode.voters not in bsfa_kernel.VOTERS:
            raise ValueError(
                f"a mode is one of {', '.join(bsfa_kernel.PRECISIONS)}, and where not every row "
                f"votes :VOTERS of {bsfa_kernel.VOTERS}, got {text!r}"
            )
        return mode

    def __str__(self) -> str:
        return self.selection if self.voters == 1 else f"{self.selection}:{self.voters}"


EXACT = Mode()
"""By exact scores of every row, in one kernel with attention."""


class Kernel(Protocol):
    """A kernel, ours or another's."""

    @property
    def name(self) -> str:
        """As in a record."""
        ...

    def available(self, shape: Shape, device: torch.device) -> str | None:
        """Why it cannot compute this shape here; None where it can."""
        ...


class DenseKernel(Kernel, Protocol):
    """A kernel that computes every block."""

    def prepare(self, problem: Problem) -> Call:
        """What to time; it returns [batch, seqlen, heads, head_dim]. Layouts change here."""
        ...

    def note(self, problem: Problem) -> str:
        """What is not as for the other kernels; "" where nothing is."""
        ...


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA device"


def _needs_hopper(device: torch.device, package: str, module: str) -> str | None:
    """What is missing for a module of a package that runs on Hopper GPUs alone."""
    if reason := _needs_cuda(device):
        return reason
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"package {package} is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"needs compute capability 9.0, the device has {major}.{minor}"
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f"package {package} does not load: {error}"
    return None


@dataclass(frozen=True)
class Sdpa:
    """A back end of torch's scaled_dot_product_attention."""

    name: str
    backend: SDPBackend

    def available(self, shape: Shape, device: torch.device) -> str | None:
        """Torch says so itself when it is called; asked for here with a few tokens."""
        if self.backend != SDPBackend.MATH and (reason := _needs_cuda(device)):
            return reason
        few = Shape(128, shape.heads, shape.kv_heads, shape.head_dim, 1, shape.causal, shape.dtype)
        q, k, v = (
            torch.zeros(1, few.seqlen, n, few.head_dim, dtype=few.dtype, device=device)
            for n in (few.heads, few.kv_heads, few.kv_heads)
        )
        try:
            self.prepare(Problem(few, "", "", q, k, v))()
        except RuntimeError as error:
            return " ".join(str(error).split())[:200]
        return None

    def prepare(self, problem: Problem) -> Call:
        """The call; keys and values are repeated beforehand where the back end needs it."""
        q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
        grouped = problem.shape.heads != problem.shape.kv_heads
        if grouped and self._repeats(problem):
            repeats = problem.shape.heads // problem.shape.kv_heads
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
            grouped = False
        causal = problem.shape.causal

        def call() -> Tensor:
            with sdpa_kernel(self.backend):
                out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
            return out.transpose(1, 2)

        return call

    def note(self, problem: Problem) -> str:
        """Says where keys and values were repeated."""
        return "keys and values repeated" if self._repeats(problem) else ""

    def _repeats(self, problem: Problem) -> bool:
        shape = problem.shape
        if shape.heads == shape.kv_heads:
            return False
        q, k, v = (x[:1, :128].transpose(1, 2) for x in (problem.q, problem.k, problem.v))
        try:
            with sdpa_kernel(self.backend):
                scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=True)
        except RuntimeError:
            return True
        return False


@dataclass(frozen=True)
class FlashAttention3:
    """FlashAttention-3's forward pass, from the PyPI package fa3-fwd, built for bfloat16."""

    name: str = "fa3"

    def available(self, shape: Shape, device: torch.device) -> str | None:
        """It needs the package and a Hopper GPU."""
        return _needs_hopper(device, "fa3-fwd", "fa3_fwd_interface")

    def prepare(self, problem: Problem) -> Call:
        """The call, on the inputs rounded to bfloat16."""
        from fa3_fwd_interface import flash_attn_func

        q, k, v = (x.to(torch.bfloat16) for x in (problem.q, problem.k, problem.v))
        causal = problem.shape.causal

        def call() -> Tensor:
            out = flash_attn_func(q, k, v, causal=causal)
            result: Tensor = out[0] if isinstance(out, tuple) else out
            return result

        return call

    def note(self, problem: Problem) -> str:
        """Says where the inputs were rounded."""
        return "in bfloat16" if problem.shape.dtype != torch.bfloat16 else ""


@dataclass(frozen=True)
class FlashInferSkipSoftmax:
    """FlashInfer's fmha_v2 prefill, which can skip blocks far below the maximum (BLASST)."""

    name: str = "flashinfer"

    def available(self, shape: Shape, device: torch.device) -> str | None:
        """It needs the package, a Hopper GPU and a causal mask."""
        if reason := _needs_hopper(device, "flashinfer-python", "flashinfer.prefill"):
            return reason
        return None if shape.causal else "compared with a causal mask only"

    def prepare(self, problem: Problem, *, skip_below: float | None) -> Call:
        """The call.

        Args:
            problem: the inputs.
            skip_below: skip a block whose maximum is further than this below the running one, in
                scaled scores (a negative number); None skips nothing.
        """
        from flashinfer.prefill import trtllm_fmha_v2_prefill

        shape = problem.shape
        device = problem.q.device
        lengths = torch.full((shape.batch,), shape.seqlen, dtype=torch.int32, device=device)
        starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * shape.seqlen
        workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
        packed = tuple(x.flatten(0, 1) for x in (problem.q, problem.k, problem.v))
        out = torch.empty_like(packed[0])
        factor = 0.0 if skip_below is None else math.exp(skip_below) * shape.seqlen

        def call() -> Tensor:
            trtllm_fmha_v2_prefill(
                packed,
                "SEPARATE_Q_K_V",
                workspace,
                lengths,
                shape.seqlen,
                shape.seqlen,
                shape.scale,
                1.0,
                shape.batch,
                starts,
                starts,
                out=out,
                mask_mode="causal",
                skip_softmax_threshold_scale_factor=factor,
            )
            return out.view(problem.q.shape)

        return call


@dataclass(frozen=True)
class Bsfa:
    """A kernel of this project: that of one architecture, or on a CPU the reference back end."""

    arch: int

    @property
    def name(self) -> str:
        """As in a record."""
        return f"bsfa_sm{self.arch}" if self.arch else "bsfa_reference"

    def available(self, shape: Shape, device: torch.device, selection: str = "exact") -> str | None:
        """What the native library was built for, and the device can run."""
        needed = {"forward"} if selection == "exact" else {"select_blocks", "attend_blocks"}
        return self.lacks(needed, shape, device)

    def lacks(self, needed: set[str], shape: Shape, device: torch.device) -> str | None:
        """Why kernels of these names cannot run here; None where all can."""
        if not self.arch:
            return None if device.type == "cpu" else "the reference back end is not for timing"
        if reason := _needs_cuda(device):
            return reason
        info = bsfa_kernel.build_info()
        if not info.available:
            return info.reason
        capability = 10 * torch.cuda.get_device_capability(device)[0]
        if self.arch == 90 and capability != 90:
            return "sm_90a code runs on compute capability 9.0 only"
        wanted = (self.arch, shape.dtype_name, shape.head_dim)
        there = {k.name for k in info.kernels if (k.arch, k.dtype, k.head_dim) == wanted}
        if missing := needed - there:
            return (
                f"the library has no sm_{self.arch} kernel {', '.join(sorted(missing))} for "
                f"{shape.dtype_name}, head_dim {shape.head_dim}"
            )
        return None

    def prepare(
        self, problem: Problem, geometry: Geometry, mode: Mode = EXACT
    ) -> tuple[Call, Tensor]:
        """The call, and the blocks that it keeps: int32 [batch, heads, q_blocks]."""
        thresholds = problem.thresholds[geometry, mode.voters]
        options: dict[str, Any] = {
            "causal": problem.shape.causal,
            "rule": problem.rule,
            "geometry": geometry,
            **mode._asdict(),
        }
        q, k, v = problem.q, problem.k, problem.v

        def call() -> Tensor:
            with _native.force_arch(self.arch):
                out: Tensor = bsfa_kernel.block_sparse_attention(q, k, v, thresholds, **options)
                return out

        with _native.force_arch(self.arch):
            _, kept = bsfa_kernel.block_sparse_attention(
                q, k, v, thresholds, return_kept=True, **options
            )
        return call, kept


DENSE: tuple[DenseKernel, ...] = (
    FlashAttention3(),
    Sdpa("cudnn", SDPBackend.CUDNN_ATTENTION),
    Sdpa("fa2", SDPBackend.FLASH_ATTENTION),
)
# What a self-test on a CPU compares with.
SELF_TEST_DENSE: tuple[DenseKernel, ...] = (Sdpa("math", SDPBackend.MATH),)
OURS: tuple[Bsfa, ...] = (Bsfa(90), Bsfa(80))
NAMES: tuple[str, ...] = (
    *(kernel.name for kernel in OURS),
    *(kernel.name for kernel in DENSE),
    FlashInferSkipSoftmax().name,
)
