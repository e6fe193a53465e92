# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Time to first token of a whole model, dense and block-sparse, by prompt length.

The same model reads the same prompt with torch's attention, with FlashAttention-3 where it is
installed, and patched by bsfa_hf with thresholds that are calibrated on that prompt for each
sparsity asked for::

    python benchmarks/prefill.py --model-shape llama-3.1-8b --seqlens 32K,128K --sparsities 0.5,0.9

A model whose layers have windows or sinks, which torch's function does not know, is read dense by
what comes closest: torch's flash kernel and a correction for the sinks, products of diagonal blocks
in windows, and FlashAttention-3 with its own windows and the same correction. Under bsfa_hf its
layers with windows run as under the last of these.

The time runs from the call to the first token on the host, key and value cache included. The
attention's part of it is taken with device events around each layer's attention function, its
changes of layout included.

With ``--lean``, of Llama models alone, the norms, the rotary embedding and the activation move less
memory than transformers' own, for every implementation alike; the records say so.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import bsfa_hf
import bsfa_kernel
import models
from attention import DENSE, list_of, parse_length, parse_sparsity
from bsfa_calib.capture import calibrate
from bsfa_calib.dense import flash_with_sinks, with_sinks
from bsfa_kernel import Geometry
from harness import ROOT, Budget, Record, Results, clocks, device_event, environment, progress
from inputs import Shape
from kernels import EXACT, FlashAttention3, Mode

_FA3, _TORCH = "bsfa_benchmark_fa3", "bsfa_benchmark_torch"


def fa3_attention(
    _module: object, query: Tensor, key: Tensor, value: Tensor, _mask: object, **options: Any
) -> tuple[Tensor, None]:
    """FlashAttention-3 as an attention function of transformers, for prompts without padding."""
    from fa3_fwd_interface import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    window, sinks = options.get("sliding_window"), options.get("s_aux")
    more: dict[str, Any] = {} if window is None else {"window_size": (window - 1, 0)}
    if sinks is not None:
        more["return_attn_probs"] = True  # the log-sum-exp of each row, too
    out = flash_attn_func(q, k, v, softmax_scale=options.get("scaling"), causal=True, **more)
    if sinks is not None:
        return with_sinks(out[0], out[1], sinks), None
    return (out[0] if isinstance(out, tuple) else out), None


def torch_attention(
    _module: object, query: Tensor, key: Tensor, value: Tensor, _mask: object, **options: Any
) -> tuple[Tensor, None]:
    """Windows and sinks by torch's functions, for prompts without padding."""
    window, sinks = options.get("sliding_window"), options.get("s_aux")
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    if window is not None and window < query.shape[2]:
        out, lse = _banded(query, key, value, window, scale)
        return (out if sinks is None else with_sinks(out, lse, sinks)), None
    if sinks is not None:
        return flash_with_sinks(query, key, value, sinks, scale), None
    attend = functional.scaled_dot_product_attention
    out = attend(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2), None


def _banded(
    query: Tensor, key: Tensor, value: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention in a window: each block of so many queries with its keys and those before.

    Returns:
        [batch, seqlen, heads, head_dim], and the log-sum-exp of each row [batch, heads, seqlen].
    """
    batch, heads, seqlen, head_dim = query.shape
    kv_heads, after = key.shape[1], -seqlen % window
    blocks = (seqlen + after) // window
    q = functional.pad(query, (0, 0, 0, after))
    q = q.view(batch, kv_heads, heads // kv_heads, blocks, window, head_dim)
    k, v = (
        functional.pad(x, (0, 0, window, after)).unfold(2, 2 * window, window)[:, :, None]
        for x in (key, value)
    )
    scores = (q @ k).float() * scale
    row = torch.arange(window, device=query.device)[:, None]
    column = torch.arange(2 * window, device=query.device)
    near = (column > row) & (column <= row + window)
    first = near & (column >= window)  # before the first key there is none
    seen = torch.cat((first[None], near.expand(blocks - 1, -1, -1)))
    scores = scores.masked_fill_(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse[..., None]).exp_().to(query.dtype)
    out = (weights @ v.transpose(-1, -2)).view(batch, heads, -1, head_dim)[:, :, :seqlen]
    return out.transpose(1, 2), lse.view(batch, heads, -1)[..., :seqlen]


def register(name: str, function: Callable[..., Any]) -> None:
    """Make an attention function known to transformers, under a name of this benchmark."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *_, **__: None)


@contextlib.contextmanager
def lean(on: bool) -> Iterator[None]:
    """Compute a Llama model's elementwise parts with fewer passes over memory."""
    if not on:
        yield
        return
    from transformers.models.llama import modeling_llama as llama

    untyped: Any = llama
    places = (
        (untyped.LlamaRMSNorm, "forward", _norm),
        (untyped.LlamaMLP, "forward", _mlp),
        (untyped, "apply_rotary_pos_emb", _rotate),
    )
    before = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, replacement in places:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for (owner, name, _), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    size = (hidden_states.shape[-1],)
    return functional.rms_norm(hidden_states, size, self.weight, self.variance_epsilon)


def _mlp(self: Any, x: Tensor) -> Tensor:
    gate = functional.silu(self.gate_proj(x), inplace=True)
    out: Tensor = self.down_proj(gate.mul_(self.up_proj(x)))
    return out


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Both halves of cos and sin are the same."""
    half = cos.shape[-1] // 2
    cos, sin = (x[..., :half].unsqueeze(unsqueeze_dim) for x in (cos, sin))

    def rotated(x: Tensor) -> Tensor:
        first, second = x[..., :half], x[..., half:]
        out = torch.empty_like(x)
        torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
        return out

    return rotated(q), rotated(k)


@dataclass
class AttentionClock:
    """Adds up the time of the attention function's calls."""

    device: torch.device
    _marks: list[tuple[Any, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def watching(self, name: str) -> Iterator[None]:
        """Time the attention function that transformers knows under a name."""
        from transformers import AttentionInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        function = ALL_ATTENTION_FUNCTIONS[name]

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._mark()
            result = function(*args, **kwargs)
            self._marks.append((start, self._mark()))
            return result

        AttentionInterface.register(name, timed)
        try:
            yield
        finally:
            AttentionInterface.register(name, function)

    def read(self) -> float:
        """Milliseconds since the last reading."""
        marks, self._marks = self._marks, []
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return float(sum(start.elapsed_time(stop) for start, stop in marks))
        return float(sum(1000 * (stop - start) for start, stop in marks))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = device_event()
        event.record()
        return event


@dataclass
class Run:
    """One way to compute the attention, and its times in milliseconds."""

    implementation: str
    asked: str
    switch: Callable[[], AbstractContextManager[Any]]
    function: str
    rule: str | None = None
    geometry: Geometry | None = None
    mode: Mode | None = None
    sparsity: float = 0.0
    times: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    peak_gib: float = 0.0


class Benchmark:
    """Measures one model."""

    def __init__(self, arguments: argparse.Namespace, results: Results) -> None:
        """Load the model."""
        self.arguments = arguments
        self.results = results
        self.device = torch.device(arguments.device)
        self.model, self.tokenizer, self.name = models.load(arguments)
        kind = self.model.config.model_type
        if arguments.lean and kind != "llama":
            raise ValueError(f"--lean is for Llama models, got one of type {kind}")
        self.clock = AttentionClock(self.device)
        self.environment = environment(self.device)
        self.records: list[Record] = []

    def measure(self, seqlen: int) -> None:
        """Measure every implementation at one length, in turns."""
        (ids,) = models.tokens(self.arguments, self.model, self.tokenizer, seqlen, 1)
        runs = self._runs(ids)
        before = clocks(self.device)
        for repetition in range(self.arguments.repetitions + 1):  # the first warms up
            for run in runs:
                self._once(run, ids, count=repetition > 0)
        after = clocks(self.device)
        medians = {
            run.implementation: statistics.median(run.times) for run in runs if run.asked == DENSE
        }
        for run in runs:
            ms = statistics.median(run.times)
            record = {
                **self.environment,
                "kind": "prefill",
                "implementation": run.implementation,
                "model": self.name,
                "seqlen": seqlen,
                "asked": run.asked,
                "sparsity": run.sparsity,
                "rule": run.rule,
                "geometry": str(run.geometry) if run.geometry else None,
                **(run.mode._asdict() if run.mode else {}),
                "dtype": self.arguments.dtype,
                "lean": self.arguments.lean,
                "ms": ms,
                "ms_min": min(run.times),
                "attention_ms": statistics.median(run.attention),
                "repetitions": len(run.times),
                "peak_gib": run.peak_gib,
                "speedup": {n: m / ms for n, m in medians.items() if n != run.implementation},
                "clocks": {"before": before, "after": after},
            }
            self.results.append(record)
            self.records.append(record)
            ratios = ", ".join(f"{v:.2f}x {k}" for k, v in record["speedup"].items())
            progress(
                f"  {run.implementation:5} {run.asked:5} {ms:10.1f} ms, attention "
                f"{record['attention_ms']:9.1f} ms, s={run.sparsity:.3f}  {ratios}"
            )

    def _runs(self, ids: list[int]) -> list[Run]:
        plain = getattr(type(self.model), "_supports_sdpa", False)
        if not plain:
            register(_TORCH, torch_attention)
        torch_name = "sdpa" if plain else _TORCH
        runs = [Run("sdpa", DENSE, lambda: self._dense(torch_name), torch_name)]
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = Shape(len(ids), heads, config.num_key_value_heads, head_dim)
        if reason := FlashAttention3().available(shape, self.device):
            progress(f"  fa3: left out: {reason}")
        else:
            register(_FA3, fa3_attention)
            runs.append(Run("fa3", DENSE, lambda: self._dense(_FA3), _FA3))
        dense = runs[-1].function  # what layers that skip nothing run with
        targets = [float(asked) for asked in self.arguments.sparsities if asked != DENSE]
        choices = itertools.product(self.arguments.rules, self.arguments.geometries)
        for rule, geometry in choices:
            tables: dict[int, Any] = {}
            for mode in self.arguments.modes:
                if mode.voters not in tables:
                    progress(f"  calibrating {rule}, {geometry}, one row in {mode.voters} votes")
                    tables[mode.voters] = calibrate(
                        *(self.model, [ids]),
                        target_sparsities=targets,
                        rule=rule,
                        geometry=geometry,
                        voters=mode.voters,
                    )
                table = tables[mode.voters]
                runs += [self._sparse_run(table, target, mode, dense) for target in targets]
        return runs

    def _sparse_run(self, table: Any, target: float, mode: Mode, dense: str) -> Run:
        options: dict[str, Any] = {"target_sparsity": target, "selection": mode.selection}

        @contextlib.contextmanager
        def switch() -> Iterator[Any]:
            with (
                self._dense(dense),
                bsfa_hf.enabled(self.model, table, check_model=False, **options) as counters,
            ):
                yield counters

        geometry = Geometry(table.q_block, table.k_block)
        return Run("bsfa", f"{target:g}", switch, "bsfa", table.rule, geometry, mode)

    @contextlib.contextmanager
    def _dense(self, implementation: str) -> Iterator[None]:
        previous = self.model.config._attn_implementation
        self.model.set_attn_implementation(implementation)
        try:
            yield
        finally:
            self.model.set_attn_implementation(previous)

    def _once(self, run: Run, ids: list[int], *, count: bool) -> None:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        with run.switch() as counters, self.clock.watching(run.function):
            start = time.perf_counter()
            models.prefill(self.model, ids, use_cache=True)
            elapsed = 1000 * (time.perf_counter() - start)
            attention = self.clock.read()
            if run.implementation == "bsfa":
                run.sparsity = _sparsity(counters)
        if cuda:
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            run.peak_gib = max(run.peak_gib, peak)
        progress(
            f"  {run.implementation:5} {run.asked:5} {elapsed:10.1f} ms, attention "
            f"{attention:9.1f} ms{'' if count else ', not counted'}"
        )
        if count:
            run.times.append(elapsed)
            run.attention.append(attention)


def _sparsity(counters: bsfa_hf.Statistics) -> float:
    """Share of the blocks that were skipped, of the layers that can skip any.

    Raises:
        RuntimeError: no call was block-sparse.
    """
    if counters.sparse_calls == 0:
        raise RuntimeError(f"no layer ran block-sparse: {dict(counters.dense_calls)}")
    return 1.0 - counters.mean_kept_fraction


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Time to first token by prompt length.")
    models.add_model_options(result)
    add = result.add_argument
    add("--seqlens", type=list_of(parse_length), default=(32768, 131072), help="such as 8K,128K")
    add("--sparsities", type=list_of(parse_sparsity), default=("0.5", "0.9"))
    add("--rules", type=list_of(str), default=("peak_lse",))
    add("--geometries", type=list_of(Geometry.parse), default=(bsfa_kernel.DEFAULT_GEOMETRY,))
    add(
        "--modes",
        type=list_of(Mode.parse),
        default=(EXACT,),
        help="of exact,int8,int8:2,int8:4 (:VOTERS)",
    )
    add("--lean", action="store_true", help="fewer passes over memory outside of attention")
    add("--repetitions", type=int, default=3, help="of each prompt (default %(default)s)")
    add("--budget-seconds", type=float, help="start no further length after this time")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "prefill.jsonl")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    budget = Budget(arguments.budget_seconds)
    benchmark = Benchmark(arguments, Results(arguments.out))
    progress(f"{benchmark.name} is loaded, {budget.spent:.0f} s")
    for seqlen in arguments.seqlens:
        if not budget.allows():
            print(f"left out for the budget: {seqlen} tokens")
            continue
        progress(f"[{budget.spent:.0f} s] {seqlen} tokens")
        try:
            with lean(arguments.lean):
                benchmark.measure(seqlen)
        except torch.OutOfMemoryError as failure:
            print(f"{seqlen} tokens: out of memory: {' '.join(str(failure).split())[:200]}")
        if benchmark.device.type == "cuda":
            torch.cuda.empty_cache()
    if benchmark.device.type == "cuda":
        import report

        print(report.prefill_tables(benchmark.records))
    print(f"{len(benchmark.records)} records in {arguments.out}, {budget.spent:.0f} s")
    return 0 if benchmark.records else 1


if __name__ == "__main__":
    sys.exit(main())
