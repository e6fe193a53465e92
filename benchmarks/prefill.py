# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Time to first token of a whole model, dense and block-sparse, by prompt length.

The same model reads the same prompt with torch's attention, with FlashAttention-3 where it is
installed, and patched by bsfa_hf with thresholds that are calibrated on that prompt for each
sparsity asked for::

    python benchmarks/prefill.py --model-shape llama-3.1-8b --seqlens 32K,128K --sparsities 0.5,0.9

A model whose layers have windows or sinks, which torch's function does not know, is read dense by
what comes closest: torch's flash kernel and a correction for the sinks, products of diagonal blocks
in windows, and FlashAttention-3 with its own windows and the same correction. Layers that the
installed FlashAttention-3 cannot do are torch's under it, too, and counted; where it can do none,
it is left out. Under bsfa_hf layers with windows run as under the last of these.

The time runs from the call to the first token on the host, key and value cache included. The
attention's part of it is taken with device events around each layer's attention function, its
changes of layout included.

Each implementation is warmed up and timed once, then all take turns. Every repetition leaves a
record at once, and another where it changes a ratio; reports take the last of a run. What does not
fit into ``--budget-seconds`` is left out.

With ``--lean``, of Llama models alone, the norms, the rotary embedding and the activation move less
memory than transformers' own, for every implementation alike; the records say so.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
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
from attention import DENSE, ERROR_LIMIT, error, parse_sparsity
from bsfa_calib.capture import calibrate
from bsfa_calib.dense import flash_with_sinks, unknown_arguments, with_sinks
from bsfa_kernel import Geometry
from harness import (
    Budget,
    Record,
    Results,
    device_event,
    environment,
    list_of,
    one_of,
    out_of,
    parse_length,
    progress,
    run_program,
)
from inputs import Shape
from kernels import EXACT, FlashAttention3, Mode
from turns import Run, Turns

_FA3, _TORCH = "bsfa_benchmark_fa3", "bsfa_benchmark_torch"
# A kind of layer is tried on so many tokens, with such a window, and may be so far from torch's.
_TRIED, _TRIED_WINDOW = 128, 16
_TRIED_LIMIT = 2 * max(ERROR_LIMIT.values())


class Fa3Layers:
    """FlashAttention-3 as an attention function of transformers, for prompts without padding.

    Builds lack windows or dtypes. Each kind of layer is therefore first tried on a few tokens
    beside `torch_attention`, which computes the layers that FlashAttention-3 cannot.

    Attributes:
        reasons: by layer of the last calls, why it was torch's; "" where it was FlashAttention-3's.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """Nothing tried yet.

        Args:
            dtype: what q, k and v are rounded to for FlashAttention-3; their own by default.
        """
        self.reasons: dict[int, str] = {}
        self._dtype = dtype
        self._tried: dict[tuple[object, ...], str] = {}

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: object,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """See transformers' ``AttentionInterface``.

        Raises:
            NotImplementedError: neither can compute the layer.
        """
        reason = self._lacks(query, key, value, options)
        self.reasons[module.layer_idx] = reason
        if reason:
            return torch_attention(module, query, key, value, mask, **options)
        return self._compute(query, key, value, options), None

    def layers(self) -> dict[str, int]:
        """How many layers of the last calls were whose: "fa3" and "torch"."""
        torch_ran = sum(bool(reason) for reason in self.reasons.values())
        counts = {"fa3": len(self.reasons) - torch_ran, "torch": torch_ran}
        return {name: count for name, count in counts.items() if count}

    def why(self) -> str:
        """Why layers of the last calls were torch's."""
        return "; ".join(sorted({reason for reason in self.reasons.values() if reason}))

    def check(self) -> None:
        """Check that some layer of the last calls was FlashAttention-3's.

        Raises:
            NotImplementedError: none was; the message says why.
        """
        if "fa3" not in self.layers():
            raise NotImplementedError(f"FlashAttention-3 can do no layer: {self.why()}")

    def _compute(
        self, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        from fa3_fwd_interface import flash_attn_func

        dtype = self._dtype or query.dtype
        q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
        window, sinks = _window(key, options), options.get("s_aux")
        more: dict[str, Any] = {} if window is None else {"window_size": (window - 1, 0)}
        if sinks is not None:
            more["return_attn_probs"] = True  # the log-sum-exp of each row, too
        out = flash_attn_func(q, k, v, softmax_scale=options.get("scaling"), causal=True, **more)
        if sinks is not None:
            return with_sinks(out[0], out[1], sinks).to(query.dtype)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found.to(query.dtype)

    def _lacks(self, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> str:
        """Why FlashAttention-3 cannot compute a call; "" where it can."""
        windowed, sinks = _window(key, options) is not None, options.get("s_aux")
        kind = (query.shape[1], key.shape[1], query.shape[-1], value.shape[-1], query.dtype)
        what = (*kind, query.device, options.get("scaling"), windowed, sinks is not None)
        if what not in self._tried:
            self._tried[what] = self._try(query, key, value, windowed, options)
        return self._tried[what]

    def _try(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        windowed: bool,
        options: Mapping[str, Any],
    ) -> str:
        generator = torch.Generator(query.device).manual_seed(0)
        heads = ((x.shape[1], x.shape[-1]) for x in (query, key, value))
        q, k, v = (
            torch.randn(1, n, _TRIED, d, generator=generator, device=query.device).to(query.dtype)
            for n, d in heads
        )
        options = {**options, "sliding_window": _TRIED_WINDOW if windowed else None}
        expected, _ = torch_attention(None, q, k, v, None, **options)
        try:
            off = error(self._compute(q, k, v, options), expected)
        except (RuntimeError, TypeError, NotImplementedError) as failure:
            return " ".join(str(failure).split())[:200]
        return "" if off <= _TRIED_LIMIT else f"its error is {off:.2e}, more than {_TRIED_LIMIT:g}"


def torch_name(model: Any) -> str:
    """The name of torch's dense attention for a model, which transformers knows afterwards.

    Transformers' own function for SDPA passes over sinks, so that models with sinks do not take it.
    """
    if getattr(type(model), "_supports_sdpa", False):
        return "sdpa"
    register(_TORCH, torch_attention)
    return _TORCH


def _window(key: Tensor, options: Mapping[str, Any]) -> int | None:
    """The window of a call; None where it hides no key."""
    window: int | None = options.get("sliding_window")
    return None if window is None or window >= key.shape[2] else window


def torch_attention(
    _module: object, query: Tensor, key: Tensor, value: Tensor, _mask: object, **options: Any
) -> tuple[Tensor, None]:
    """Windows and sinks by torch's functions, for prompts without padding.

    Raises:
        NotImplementedError: the model asks for more than these.
    """
    others = ("softcap", "position_bias", "sinks")
    unknown = [*unknown_arguments(options), *(n for n in others if options.get(n) is not None)]
    if unknown:
        raise NotImplementedError(f"attention must have no {', '.join(unknown)} here")
    window, sinks = _window(key, options), options.get("s_aux")
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    if window is not None:
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


@dataclass(eq=False, kw_only=True)
class ModelRun(Run):
    """One way to compute the attention of a model.

    Attributes:
        switch: lets the model run so.
        function: the attention function that is watched.
        prepare: makes what it needs, once.
        calibrates: whether that has to be calibrated.
        attention: milliseconds in attention functions, of each repetition.
        layers: attention layers by whose they were, where that is known.
        note: why layers were another's.
    """

    switch: Callable[[], AbstractContextManager[Any]]
    function: str
    prepare: Callable[[], None] = lambda: None
    calibrates: Callable[[], bool] = lambda: False
    attention: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    layers: dict[str, int] = field(default_factory=dict)
    note: str = ""

    def facts(self) -> Record:
        """What its record says beside times to first token."""
        return {
            **super().facts(),
            "attention_ms": statistics.median(self.attention),
            "peak_gib": self.peak_gib,
            "layers": self.layers,
            "note": self.note,
        }


class Benchmark:
    """Measures one model."""

    def __init__(self, arguments: argparse.Namespace, results: Results, budget: Budget) -> None:
        """Load the model."""
        self.arguments = arguments
        self.results = results
        self.budget = budget
        self.device = torch.device(arguments.device)
        self.model, self.tokenizer, self.name = models.load(arguments)
        kind = self.model.config.model_type
        if arguments.lean and kind != "llama":
            raise ValueError(f"--lean is for Llama models, got one of type {kind}")
        self.clock = AttentionClock(self.device)
        self.fa3 = Fa3Layers()
        self.environment = environment(self.device)
        self.runs: list[Run] = []
        self.left_out: list[str] = []
        # Under bsfa_hf, what layers that skip nothing run with.
        self._filling = torch_name(self.model)
        # The most seconds that each took so far, by tokens.
        self._longest: dict[str, dict[int, float]] = {"prefill": {}, "calibration": {}}

    @property
    def records(self) -> list[Record]:
        """The last record of each measurement."""
        return [run.record for run in self.runs]

    def measure(self, seqlen: int) -> None:
        """Measure every implementation at one length, in turns after a first repetition of each."""
        (ids,) = models.tokens(self.arguments, self.model, self.tokenizer, seqlen, 1)
        about = {
            **self.environment,
            "kind": "prefill",
            "model": self.name,
            "seqlen": seqlen,
            "dtype": self.arguments.dtype,
            "lean": self.arguments.lean,
        }
        turns = Turns(self.results, about, self.device)
        runs: list[ModelRun] = []

        def once(run: ModelRun) -> float:
            return self._once(run, ids)

        self._filling = torch_name(self.model)
        for run in self._runs(ids):
            expected = 2 * self._expected("prefill", seqlen)  # the first of each warms up
            if run.calibrates():
                expected += self._expected("calibration", seqlen)
            if not self.budget.allows(expected):
                self._leave_out(f"left out for the budget: {seqlen} tokens, {run}")
                continue
            prepared = False
            try:
                run.prepare()
                prepared = True
                self._once(run, ids, count=False)
                turns.time(run, once)
            except (RuntimeError, NotImplementedError, ValueError) as failure:
                # A length can be too short for a share; that our kernels fail is never passed over.
                is_too_short = not prepared and isinstance(failure, ValueError)
                if run.asked != DENSE and not is_too_short:
                    raise
                reason = " ".join(str(failure).split())[:300]
                self._leave_out(f"left out: {seqlen} tokens, {run}: {reason}")
                continue
            runs.append(run)
            self.runs.append(run)
            if run.implementation == "fa3":
                self._filling = _FA3
        wanted = self.arguments.repetitions
        rest = turns.repeat(runs, wanted, self.budget, once)
        if rest:
            self._leave_out(rest)
        for run in runs:
            record = run.record
            ratios = ", ".join(f"{v:.2f}x {k}" for k, v in record["speedup"].items())
            layers = ", ".join(f"{n} {name}" for name, n in run.layers.items())
            progress(
                f"  {run.implementation:5} {run.asked:5} {record['ms']:10.1f} ms, attention "
                f"{record['attention_ms']:9.1f} ms, s={run.sparsity:.3f}  {ratios}"
                f"{f', layers: {layers}' if layers else ''}{f' ({run.note})' if run.note else ''}"
            )

    def _leave_out(self, line: str) -> None:
        self.left_out.append(line)
        progress(f"  {line}")

    def _runs(self, ids: list[int]) -> Iterator[ModelRun]:
        """What is to be measured, dense first."""
        name = torch_name(self.model)
        yield ModelRun("sdpa", switch=lambda: self._dense(name), function=name)
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = Shape(len(ids), heads, config.num_key_value_heads, head_dim)
        if reason := FlashAttention3().available(shape, self.device):
            progress(f"  fa3: left out: {reason}")
        else:
            register(_FA3, self.fa3)
            yield ModelRun("fa3", switch=lambda: self._dense(_FA3), function=_FA3)
        targets = [asked for asked in self.arguments.sparsities if asked != DENSE]
        choices = itertools.product(self.arguments.rules, self.arguments.geometries)
        for rule, geometry in choices:
            tables: dict[int, Any] = {}
            for mode, asked in itertools.product(self.arguments.modes, targets):
                yield self._sparse_run(rule, geometry, mode, float(asked), tables, ids)

    def _sparse_run(
        self,
        rule: str,
        geometry: Geometry,
        mode: Mode,
        target: float,
        tables: dict[int, Any],
        ids: list[int],
    ) -> ModelRun:
        """A run that calibrates where ``tables`` lacks its number of voters."""

        def lacks() -> bool:
            return mode.voters not in tables

        def prepare() -> None:
            if not lacks():
                return
            progress(f"  calibrating {rule}, {geometry}, one row in {mode.voters} votes")
            start = time.perf_counter()
            tables[mode.voters] = calibrate(
                *(self.model, [ids]),
                target_sparsities=[float(a) for a in self.arguments.sparsities if a != DENSE],
                rule=rule,
                geometry=geometry,
                voters=mode.voters,
            )
            self._took("calibration", time.perf_counter() - start, len(ids))

        @contextlib.contextmanager
        def switch() -> Iterator[Any]:
            table = tables[mode.voters]
            options: dict[str, Any] = {"target_sparsity": target, "selection": mode.selection}
            with (
                self._dense(self._filling),
                bsfa_hf.enabled(self.model, table, check_model=False, **options) as counters,
            ):
                yield counters

        return ModelRun(
            *("bsfa", f"{target:g}", rule, geometry, mode),
            switch=switch,
            function="bsfa",
            prepare=prepare,
            calibrates=lacks,
        )

    @contextlib.contextmanager
    def _dense(self, implementation: str) -> Iterator[None]:
        previous = self.model.config._attn_implementation
        self.model.set_attn_implementation(implementation)
        try:
            yield
        finally:
            self.model.set_attn_implementation(previous)

    def _once(self, run: ModelRun, ids: list[int], *, count: bool = True) -> float:
        """Milliseconds until the first token; what else is measured is added to the run.

        Raises:
            NotImplementedError: FlashAttention-3 is to do it, and can do no layer.
        """
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.fa3.reasons.clear()
        with run.switch() as counters, self.clock.watching(run.function):
            start = time.perf_counter()
            models.prefill(self.model, ids, use_cache=True)
            elapsed = 1000 * (time.perf_counter() - start)
            attention = self.clock.read()
            run.layers, run.note = self.fa3.layers(), self.fa3.why()
            if run.implementation == "bsfa":
                run.sparsity = _sparsity(counters)
                others = sum(counters.dense_calls.values())
                dense = run.layers or ({"torch": others} if others else {})
                run.layers = {"bsfa": counters.sparse_calls, **dense}
        if run.implementation == "fa3":
            self.fa3.check()
        if cuda:
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            run.peak_gib = max(run.peak_gib, peak)
        progress(
            f"  {run.implementation:5} {run.asked:5} {elapsed:10.1f} ms, attention "
            f"{attention:9.1f} ms{'' if count else ', not counted'}"
        )
        self._took("prefill", elapsed / 1000, len(ids))
        if count:
            run.attention.append(attention)
        return elapsed

    def _took(self, what: str, seconds: float, tokens: int) -> None:
        longest = self._longest[what]
        longest[tokens] = max(longest.get(tokens, 0.0), seconds)

    def _expected(self, what: str, tokens: int) -> float:
        """No less seconds than it will take, from the nearest length known; 0 before the first."""
        longest = self._longest[what]
        if not longest:
            return 0.0
        nearest = min(longest, key=lambda known: abs(known - tokens))
        factor = tokens / nearest
        return longest[nearest] * factor * max(factor, 1.0)  # attention's part grows by its square


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
    add("--rules", type=list_of(one_of(bsfa_kernel.RULES)), default=("peak_lse",))
    add("--geometries", type=list_of(Geometry.parse), default=(bsfa_kernel.DEFAULT_GEOMETRY,))
    add(
        "--modes",
        type=list_of(Mode.parse),
        default=(EXACT,),
        help="of exact,int8,int8:2,int8:4 (:VOTERS)",
    )
    add("--lean", action="store_true", help="fewer passes over memory outside of attention")
    add("--repetitions", type=int, default=3, help="of each prompt (default %(default)s)")
    add("--budget-seconds", type=float, help="start nothing that would end later than this")
    add("--out", type=Path, help="records (default benchmarks/results/prefill.jsonl)")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    budget = Budget(arguments.budget_seconds)
    arguments.out = out_of(parser(), arguments, "prefill")
    benchmark = Benchmark(arguments, Results(arguments.out), budget)
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
    for line in benchmark.left_out:
        print(line)
    if benchmark.device.type == "cuda":
        import report

        print(report.prefill_tables(benchmark.records))
    print(f"{len(benchmark.records)} records in {arguments.out}, {budget.spent:.0f} s")
    return 0 if benchmark.records else 1


if __name__ == "__main__":
    run_program(main)
