# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Queries, keys and values with a known share of blocks to skip, and the thresholds that skip it.

Three kinds:

``planted``
    Whole 128-key blocks of k are pushed far below all others, so that every kernel, whatever its
    rule or its tile, agrees which blocks matter; and those that do not matter weigh nothing, so
    that a dense kernel has the same output.
``irregular``
    The verdict of each block is a coin of its own, for every head, query block and key block.
``model``
    q, k and v of one layer of a real model, captured by this file's command line::

        python benchmarks/inputs.py MODEL TEXT --seqlen 8192 --layer 15 --out layer15.safetensors

All else is normally distributed. The data is made on the device, from a seed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bsfa_kernel
from bsfa_kernel import Geometry, reference
from harness import run_program

PLANTED_BLOCK = 128
_PLANTED_KEY = -16.0
# by how much planting lowers a scaled score: far more than normal scores differ
PLANTED_SHIFT = 32.0
_PLANTED_THRESHOLDS = {"absolute": -16.0, "running_max": -10.0, "peak_lse": -16.0}
# The relative rules keep all that comes before a row's first high block, so a query block's own
# keys must be high even where their block is low for others: block j is low for all query blocks
# but those congruent to j.
_PHASES = 24

_CODE_DIMS = 16
# of a block's scaled scores from another block's: far more than maxima of noise differ
_CODE_DEVIATION = 2.0


@dataclass(frozen=True)
class Shape:
    """What an attention call works on, but for its values."""

    seqlen: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    causal: bool = True
    dtype: torch.dtype = torch.bfloat16

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def dtype_name(self) -> str:
        """As in a record."""
        return str(self.dtype).removeprefix("torch.")

    def fields(self) -> dict[str, str | int | bool]:
        """What a record says of it."""
        return {
            "dtype": self.dtype_name,
            "head_dim": self.head_dim,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "batch": self.batch,
            "seqlen": self.seqlen,
            "causal": self.causal,
        }

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs that a head sees in one sequence."""
        return self.seqlen * (self.seqlen + 1) // 2 if self.causal else self.seqlen**2

    @property
    def flops(self) -> float:
        """What a dense kernel must compute: two products of 2 * head_dim operations a pair."""
        return 4.0 * self.head_dim * self.pairs * self.heads * self.batch

    def blocks(self, geometry: Geometry) -> tuple[int, int]:
        """Numbers of (visible, forced) blocks of one head of one sequence."""
        return _count_blocks(self.seqlen, self.causal, geometry)


@functools.lru_cache(maxsize=64)
def _count_blocks(seqlen: int, causal: bool, geometry: Geometry) -> tuple[int, int]:
    options: dict[str, Any] = {"causal": causal, "geometry": geometry}
    visible = reference.visible_blocks(seqlen, seqlen, **options)
    forced = reference.forced_blocks(seqlen, seqlen, **options)
    return int(visible.sum()), int(forced.sum())


@dataclass
class Problem:
    """Inputs of one measurement."""

    shape: Shape
    inputs: str
    rule: str
    q: Tensor
    """[batch, seqlen, heads, head_dim]."""
    k: Tensor
    """[batch, seqlen, kv_heads, head_dim]."""
    v: Tensor
    """As k."""
    thresholds: dict[tuple[Geometry, int], Tensor] = field(default_factory=dict)
    """float32 [heads, rows] for each geometry and number of voters."""
    same_as_dense: bool = False
    """Whether the skipped blocks weigh nothing, so that a dense kernel's output is the same."""
    source: str = ""
    """Where real-model inputs come from."""


def measured_sparsity(kept: Tensor, shape: Shape, geometry: Geometry) -> float:
    """Share of the visible blocks that were skipped.

    Args:
        kept: int32 [batch, heads, q_blocks].
        shape: what was computed.
        geometry: of the blocks that were counted.
    """
    visible = shape.blocks(geometry)[0] * shape.batch * shape.heads
    return 1.0 - float(kept.sum(dtype=torch.int64)) / visible


def dense(shape: Shape, device: torch.device, *, seed: int = 0) -> Problem:
    """Normal inputs without thresholds."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = _normal(shape, generator)
    return Problem(shape, "normal", "absolute", q, k, v, same_as_dense=True)


def keep_everything(problem: Problem) -> Tensor:
    """Thresholds of -inf, which make the attention dense: float32 [heads, 1]."""
    shape = (problem.shape.heads, 1)
    return torch.full(shape, -math.inf, dtype=torch.float32, device=problem.q.device)


def planted(
    shape: Shape,
    sparsity: float,
    device: torch.device,
    *,
    rule: str = "absolute",
    geometries: tuple[Geometry, ...] = bsfa_kernel.GEOMETRIES,
    voters: tuple[int, ...] = (1,),
    seed: int = 0,
) -> Problem:
    """Inputs in which whole 128-key blocks of k are low.

    They are evenly spread, at another phase for each kv head. For the absolute rule one dimension
    of q is constant, and the same dimension of k is 0 or -16. Key block 0 is never low, so that
    every query sees a key that is not.

    Args:
        shape: what to make.
        sparsity: share of the visible blocks to skip; more than the unforced ones is not possible,
            and gives those.
        device: where to make it.
        rule: one of ``bsfa_kernel.RULES``; the relative ones need 24 dimensions instead of one.
        geometries: blocks to give thresholds for.
        voters: numbers of voters to give thresholds for.
        seed: of the random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = _normal(shape, generator)
    phases = 1 if rule == "absolute" else _PHASES
    blocks = math.ceil(shape.seqlen / PLANTED_BLOCK)
    low = _low_blocks(shape, sparsity, blocks, phases, generator)  # [batch, blocks, kv_heads]
    height = PLANTED_SHIFT / (shape.scale * -_PLANTED_KEY)

    block = torch.arange(shape.seqlen, device=device) // PLANTED_BLOCK
    phase = torch.arange(phases, device=device)
    own = block[:, None] % phases == phase  # [seqlen, phases]
    q[..., :phases] = (height * own).to(shape.dtype)[None, :, None, :]
    lowered = low[:, block, :, None]
    if phases > 1:
        lowered = lowered & ~own[None, :, None, :]
    k[..., :phases] = torch.where(lowered, _PLANTED_KEY, 0.0).to(shape.dtype)

    value = _PLANTED_THRESHOLDS[rule]
    thresholds = torch.full((shape.heads, 1), value, dtype=torch.float32, device=device)
    keys = itertools.product(geometries, voters)
    return Problem(
        shape, "planted", rule, q, k, v, dict.fromkeys(keys, thresholds), same_as_dense=True
    )


def _low_blocks(
    shape: Shape, sparsity: float, blocks: int, phases: int, generator: torch.Generator
) -> Tensor:
    """Which planted blocks are low: bool [batch, blocks, kv_heads], by systematic sampling."""
    visible, forced = shape.blocks(Geometry(PLANTED_BLOCK, 64))
    reachable = (visible - forced) / visible * (1.0 - 1.0 / phases if phases > 1 else 1.0)
    high = 1.0 - min(sparsity / reachable, 1.0) if reachable > 0 else 1.0
    # Block j is high where the count phase + j * high passes an integer; the phase is such that
    # block 0 is.
    device = generator.device
    draw = torch.rand(shape.batch, 1, shape.kv_heads, generator=generator, device=device)
    count = torch.arange(blocks + 1, device=device, dtype=torch.float64)[None, :, None] * high
    count = torch.floor(count + 1.0 - draw.double() * high)
    is_high = count[:, 1:] > count[:, :-1]
    is_high[:, 0] = True
    return ~is_high


def irregular(
    shape: Shape,
    sparsity: float,
    device: torch.device,
    *,
    geometry: Geometry,
    rule: str = "absolute",
    voters: tuple[int, ...] = (1,),
    seed: int = 0,
) -> Problem:
    """Inputs in which each block is kept or skipped at random.

    Every head and query block has a pattern of its own. Query blocks and key blocks carry random
    codes of signs in 16 dimensions, whose products move the scores of a block as a whole and are
    independent from block to block. The thresholds are quantiles of the block maxima.

    Args:
        shape: what to make.
        sparsity: share of the visible blocks of each query block to skip.
        device: where to make it.
        geometry: of the blocks.
        rule: one of ``bsfa_kernel.RULES``.
        voters: numbers of voters to give thresholds for.
        seed: of the random numbers.
    """
    q, k, v, maxima = _irregular(shape, geometry, rule, voters, device, seed)
    problem = Problem(shape, "irregular", rule, q, k, v)
    for each, values in maxima.items():
        found = quantile_thresholds(values, shape, sparsity, geometry)
        problem.thresholds[geometry, each] = found
    return problem


# Cases that follow each other differ in their sparsity alone.
@functools.lru_cache(maxsize=1)
def _irregular(
    shape: Shape,
    geometry: Geometry,
    rule: str,
    voters: tuple[int, ...],
    device: torch.device,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:
    """Irregular q, k and v, and the block maxima over the rows that vote, by voters."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = _normal(shape, generator)
    height = (_CODE_DEVIATION / (shape.scale * math.sqrt(_CODE_DIMS))) ** 0.5
    for tensor, size in ((q, geometry.q_block), (k, geometry.k_block)):
        blocks = math.ceil(shape.seqlen / size)
        signs = torch.randint(
            2,
            (shape.batch, blocks, tensor.shape[2], _CODE_DIMS),
            generator=generator,
            device=device,
        )
        codes = ((2 * signs - 1) * height).to(shape.dtype)
        tensor[..., :_CODE_DIMS] = codes.repeat_interleave(size, dim=1)[:, : shape.seqlen]
    return q, k, v, {each: voting_maxima(q, k, shape, rule, geometry, each) for each in voters}


def from_model(
    path: Path,
    sparsity: float | None,
    device: torch.device,
    *,
    dtype: torch.dtype,
    rule: str = "absolute",
    geometries: tuple[Geometry, ...] = bsfa_kernel.GEOMETRIES,
    voters: tuple[int, ...] = (1,),
) -> Problem:
    """Inputs captured from a real model, with thresholds for a share of their own blocks.

    Args:
        path: a file that this module's command line wrote.
        sparsity: share of the visible blocks to skip; None leaves the thresholds out.
        device: where to put the tensors.
        dtype: of the tensors.
        rule: one of ``bsfa_kernel.RULES``.
        geometries: blocks to give thresholds for.
        voters: numbers of voters to give thresholds for.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        q, k, v = (file.get_tensor(name).to(device, dtype) for name in "qkv")
    shape = Shape(q.shape[1], q.shape[2], k.shape[2], q.shape[3], q.shape[0], True, dtype)
    problem = Problem(shape, "model", rule, q, k, v, source=metadata.get("source", path.name))
    if sparsity is not None:
        for geometry, each in itertools.product(geometries, voters):
            maxima = voting_maxima(q, k, shape, rule, geometry, each)
            found = quantile_thresholds(maxima, shape, sparsity, geometry)
            problem.thresholds[geometry, each] = found
    return problem


def voting_maxima(
    q: Tensor, k: Tensor, shape: Shape, rule: str, geometry: Geometry, voters: int
) -> Tensor:
    """What is compared with thresholds, over the rows that vote.

    Returns:
        float32 [batch, heads, q_blocks, k_blocks].
    """
    options: dict[str, Any] = {"causal": shape.causal, "rule": rule, "geometry": geometry}
    if voters == 1:
        return bsfa_kernel.block_maxima(q, k, **options)
    options |= {"voters": voters, "compute_dtype": torch.float32}
    return reference.block_maxima(q, k, **options)


def quantile_thresholds(
    maxima: Tensor, shape: Shape, sparsity: float, geometry: Geometry
) -> Tensor:
    """For each head and query block, the threshold below which the share of the blocks lies.

    Args:
        maxima: [batch, heads, q_blocks, k_blocks], what is compared with the thresholds.
        shape: of the inputs.
        sparsity: share of the visible blocks to skip.
        geometry: of the blocks.

    Returns:
        float32 [heads, q_blocks], halfway between the largest maximum skipped and the smallest
        kept.
    """
    options: dict[str, Any] = {"causal": shape.causal, "geometry": geometry}
    visible = reference.visible_blocks(shape.seqlen, shape.seqlen, **options)
    forced = reference.forced_blocks(shape.seqlen, shape.seqlen, **options)
    free = visible & ~forced
    candidates = shape.batch * free.sum(1)  # [q_blocks]
    skipped = torch.round(shape.batch * sparsity * visible.sum(1)).long()
    skipped = torch.minimum(skipped, candidates).to(maxima.device)

    thresholds = torch.empty(maxima.shape[1:3], dtype=torch.float32, device=maxima.device)
    free = free.to(maxima.device)
    for head in range(shape.heads):  # one at a time: a sort needs several times its input
        values = maxima[:, head].masked_fill(~free, math.inf).movedim(0, 1).flatten(1)
        values = values.sort(dim=1).values
        values = torch.nn.functional.pad(values, (1, 1), value=math.inf)
        values[:, 0] = -math.inf
        below, above = (values.gather(1, skipped[:, None] + i).squeeze(1) for i in (0, 1))
        thresholds[head] = torch.where(above.isinf(), below + 1.0, (below + above) / 2)
    return thresholds


def _normal(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    def draw(heads: int) -> Tensor:
        size = (shape.batch, shape.seqlen, heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=generator.device, dtype=shape.dtype)

    return draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads)


def capture(
    model: Any, tokens: Tensor, layer: int, *, keep: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """q, k and v as one layer of a transformers model gives them to its attention function.

    Args:
        model: a causal language model of transformers.
        tokens: [batch, seqlen].
        layer: which layer.
        keep: what to do with each tensor [batch, seqlen, heads, head_dim], such as a conversion.

    Raises:
        ValueError: the model has no such layer.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    found: dict[str, Tensor] = {}

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        **more: Any,
    ) -> object:
        if getattr(module, "layer_idx", None) == layer:
            for name, tensor in zip("qkv", (query, key, value), strict=True):
                found[name] = keep(tensor.transpose(1, 2)).contiguous()
        return sdpa_attention_forward(module, query, key, value, *rest, **more)

    name = "bsfa_benchmark_capture"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    previous = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        with torch.no_grad():
            model(tokens, use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(previous)
    if not found:
        raise ValueError(f"layer must be one of the model's layers, got {layer}")
    return found


def main() -> int:
    """Capture q, k and v of one layer into a file; returns the exit status."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", help="GGUF file, model directory or hub id")
    parser.add_argument("text", type=Path, help="text file, long enough")
    parser.add_argument("--seqlen", type=int, default=8192, help="tokens (default %(default)s)")
    parser.add_argument("--layer", type=int, default=0, help="layer (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()

    from safetensors.torch import save_file

    from bsfa_calib.models import load

    model, tokenizer = load(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.seqlen]
    if tokens.shape[1] < arguments.seqlen:
        parser.error(f"{arguments.text} has {tokens.shape[1]} tokens, --seqlen asks for more")
    device = next(model.parameters()).device
    tensors = capture(
        model, tokens.to(device), arguments.layer, keep=lambda x: x.to("cpu", torch.bfloat16)
    )
    name = Path(arguments.model).name
    source = f"{name}, layer {arguments.layer}, {arguments.seqlen} tokens of {arguments.text.name}"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments.out, metadata={"source": source})
    return 0


if __name__ == "__main__":
    run_program(main)
