# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
r"""Extend a model to longer texts: a larger rotary base, and LoRA on all its linear layers.

On one GPU, or on several by data parallelism::

    accelerate launch --num_processes 8 benchmarks/extend/train.py \
        --model MODEL --data DIRECTORY --out ADAPTER --minutes 7 --schedule 0:32K 0.4:32K,64K,128K

Each step reads one window a GPU, all of the same length. A run ends after ``--steps`` or
``--minutes``, whichever is first; the learning rate (a cosine) and the lengths follow the share
done. State is saved next to the adapter, and ``--resume`` goes on from it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
from bsfa_calib.thresholds import write_atomically
from extend import data
from harness import parse_length, run_program

BINS = 8  # of position, in what is printed
_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
_CHUNK = 4096  # tokens whose logits are held at once
_PREFETCH = 2  # steps whose windows are made ahead
_WARM_UP = 20  # steps
# Where neither the command line nor an adapter that the run goes on from says it.
_DEFAULTS = {"rope_theta": 5e6, "rank": 16, "alpha": 32.0}


@dataclass(frozen=True)
class Schedule:
    """Lengths of windows by the share of the run that is done.

    Attributes:
        stages: from which share on, and the lengths that then take turns.
    """

    stages: tuple[tuple[float, tuple[int, ...]], ...]

    @classmethod
    def parse(cls, words: list[str]) -> Schedule:
        """Read ``SHARE:LENGTH,LENGTH ...``; a length may end in K.

        Raises:
            ValueError: it is malformed, or does not begin at 0.
        """
        stages = []
        for word in words:
            share, colon, lengths = word.partition(":")
            if not colon:
                raise ValueError(f"a stage is SHARE:LENGTH,LENGTH..., got {word!r}")
            stages.append((float(share), tuple(map(parse_length, lengths.split(",")))))
        if not stages or stages[0][0] != 0 or stages != sorted(stages):
            raise ValueError(f"stages must begin at 0 and be in order, got {' '.join(words)}")
        return cls(tuple(stages))

    @property
    def longest(self) -> int:
        """The longest window of all."""
        return max(max(lengths) for _, lengths in self.stages)

    def length(self, progress: float, step: int) -> int:
        """The length of the windows of a step."""
        (lengths,) = [lengths for share, lengths in self.stages if share <= progress][-1:]
        return lengths[step % len(lengths)]


def rate(progress: float, step: int) -> float:
    """The learning rate of a step, as a share of the highest."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, (step + 1) / _WARM_UP) * cosine


class Loss(nn.Module):
    """A model together with its loss, so that data parallelism wraps both."""

    def __init__(self, model: Any, answer_share: float) -> None:
        super().__init__()
        self.model = model
        self.answer_share = answer_share

    def forward(self, ids: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a window, and the negative log-likelihood of each token but the first.

        Args:
            ids: [1, L] int64.
            kinds: [1, L] uint8, as ``data.Windows`` makes them.

        Returns:
            The loss, a scalar: the mean over text and the mean over answers in fixed shares, so
            that answers weigh the same at every length. And [L - 1] float32, in nats.
        """
        causal = self.model.get_base_model()
        hidden = causal.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        head = functools.partial(_token_losses, causal.get_output_embeddings())
        losses = torch.cat(
            [
                checkpoint(head, part, targets, use_reentrant=False)
                for part, targets in zip(
                    torch.split(hidden, _CHUNK), torch.split(ids[0, 1:], _CHUNK), strict=True
                )
            ]
        )
        text = kinds[0, 1:] == data.TEXT
        answer = kinds[0, 1:] == data.ANSWER
        means = [(losses * mask).sum() / mask.sum().clamp(min=1) for mask in (text, answer)]
        share = self.answer_share
        return (1 - share) * means[0] + share * means[1], losses.detach()


def _token_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")


def selective_checkpointing() -> Any:
    """Contexts that keep what attention returned, and compute the rest of a layer again."""
    kept = {
        getattr(torch.ops.aten, name).default
        for name in (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
        )
    }

    def policy(_: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        keep = operator in kept
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]


def recompute_layers(model: Any, recompute: bool) -> None:
    """Whether the backward pass computes layers again, all but their attention, or keeps them."""
    verb = "enable" if recompute else "disable"
    switch = getattr(model, f"activation_checkpointing_{verb}", None)
    switch = switch or getattr(model, f"gradient_checkpointing_{verb}")  # the older name
    options = {"use_reentrant": False, "context_fn": selective_checkpointing}
    switch(options) if recompute else switch()


def fastest_attention(model: Any, length: int, device: torch.device) -> list[SDPBackend]:
    """The attention back ends of torch, the one that is faster forward and backward first."""
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (
        torch.randn(
            (1, n, length, head_dim), dtype=torch.bfloat16, device=device, requires_grad=True
        )
        for n in heads
    )
    seconds: dict[str, float] = {}
    for name, backend in _BACKENDS.items():
        with contextlib.suppress(RuntimeError):  # not there for this shape or card
            for _ in range(3):  # the first ones load and plan
                torch.cuda.synchronize(device)
                start = time.perf_counter()
                with sdpa_kernel(backend):
                    out = nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=True
                    )
                out.backward(out)  # type: ignore[no-untyped-call]
                torch.cuda.synchronize(device)
                seconds[name] = time.perf_counter() - start
    print(f"train: attention, forward and backward at {length}, s: {seconds}", flush=True)
    if not seconds:
        raise RuntimeError(f"neither {' nor '.join(_BACKENDS)} attention runs on {device}")
    return [_BACKENDS[name] for name in sorted(seconds, key=lambda name: seconds[name])]


@dataclass
class Curves:
    """Mean losses since they were last printed: of text by position, and of answers."""

    text: dict[int, Tensor] = field(default_factory=dict)
    answer: dict[int, Tensor] = field(default_factory=dict)

    def add(self, losses: Tensor, kinds: Tensor) -> None:
        """Add a window: [L - 1] float32 losses and [L] kinds."""
        length = len(kinds)
        which = torch.arange(length - 1, device=losses.device) * BINS // (length - 1)
        for store, kind in ((self.text, data.TEXT), (self.answer, data.ANSWER)):
            mask = (kinds[1:] == kind).float()
            found = torch.zeros(BINS, 2, device=losses.device)
            found[:, 0].index_add_(0, which, losses * mask)
            found[:, 1].index_add_(0, which, mask)
            store[length] = store.get(length, torch.zeros_like(found)) + found

    def take(self, accelerator: Any) -> list[str]:
        """A line a length, over all processes; what was added is forgotten."""
        lines = []
        for length in sorted(self.text):
            text = accelerator.reduce(self.text[length], "sum")
            total = accelerator.reduce(self.answer[length], "sum").sum(0)
            bins = [f"{a / n:.3f}" if n else "-" for a, n in text.tolist()]
            answer = f"{total[0] / total[1]:.4f}" if total[1] else "-"
            lines.append(f"  {length:>6}: text {' '.join(bins)}  answers {answer}")
        self.text.clear()
        self.answer.clear()
        return lines


def save(model: Any, folder: Path, extension: dict[str, Any]) -> None:
    """Write the adapter in bfloat16, its configuration, and what else its reader must set.

    Each file is whole whenever the program is stopped; ``extension.json``, which names the
    adapter's digest, comes last.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save as packed_bytes

    state = get_peft_model_state_dict(model)
    packed = {name: value.to(torch.bfloat16).contiguous().cpu() for name, value in state.items()}
    factors = packed_bytes(packed, metadata={"format": "pt"})
    extension = {**extension, "sha256": hashlib.sha256(factors).hexdigest()}
    config = model.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    config["inference_mode"] = True
    config["base_model_name_or_path"] = extension["base_model"]
    text = json.dumps(config, indent=1, sort_keys=True, default=str)
    write_atomically(folder / "adapter_model.safetensors", factors)
    write_atomically(folder / "adapter_config.json", f"{text}\n".encode())
    told = json.dumps(extension, indent=1)
    write_atomically(folder / "extension.json", f"{told}\n".encode())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="GGUF file, model directory or hub id")
    parser.add_argument("--model-shape", choices=models.SHAPES, help="random weights, for a trial")
    parser.add_argument("--data", type=Path, required=True, help="what data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--start-from", type=Path, help="an adapter to train further")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--schedule", nargs="+", default=["0:32K", "0.4:32K,64K,128K"])
    parser.add_argument("--steps", type=int, default=1 << 30)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--save-minutes", type=float, default=2.0)
    parser.add_argument("--log-steps", type=int, default=10)
    earlier = "that of the adapter that the run goes on from, or"
    parser.add_argument("--rope-theta", type=float, help=f"rotary base (default: {earlier} 5e6)")
    parser.add_argument("--rank", type=int, help=f"of the factors (default: {earlier} 16)")
    parser.add_argument("--alpha", type=float, help=f"of LoRA (default: {earlier} 32)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--answer-share", type=float, default=0.3, help="of a window's loss")
    parser.add_argument("--plain", type=float, default=0.1, help="share of windows without a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--recompute-from",
        type=parse_length,
        default=1,
        metavar="LENGTH",
        help="shorter windows keep their activations, which is faster and takes more memory",
    )
    parser.add_argument("--cpu", action="store_true", help="for a trial without a GPU")
    options = parser.parse_args(arguments)
    if (options.model is None) == (options.model_shape is None):
        parser.error("name one of --model and --model-shape")
    if math.isinf(options.minutes) and options.steps == 1 << 30:
        parser.error("say when to end: --steps or --minutes")
    return options


def settle(options: argparse.Namespace) -> dict[str, Any]:
    """Take what the command line leaves open from the adapter that the run goes on from.

    That is the one in ``--out`` with ``--resume``, or else that of ``--start-from``. Without
    either, the defaults are taken.

    Returns:
        What ``extension.json`` is to say of the run but for steps, tokens and the SHA-256.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: it is for another model or not plain LoRA, or its rank or alpha, or with
            ``--resume`` its rotary base, is not what the command line says.
    """
    name = Path(options.model).name if options.model else options.model_shape
    adapter: Path | None = options.out if options.resume else options.start_from
    extension: dict[str, Any] = {}
    settings = dict(_DEFAULTS)
    fixed: tuple[str, ...] = ()
    if adapter is not None:
        models.check_base(adapter, name)
        extension = models.adapter_extension(adapter)
        config = models.adapter_config(adapter)
        if config.get("use_rslora"):
            raise ValueError(f"{adapter} scales by alpha over the root of its rank: not supported")
        settings["rope_theta"] = extension["rope_theta"]
        settings["rank"], settings["alpha"] = config["r"], config["lora_alpha"]
        fixed = ("rank", "alpha", "rope_theta") if options.resume else ("rank", "alpha")
    for key, value in settings.items():
        said = getattr(options, key)
        if key in fixed and said not in (None, value):
            flag = f"--{key.replace('_', '-')}"
            raise ValueError(f"{flag} must be {value:g}, that of {adapter}, got {said:g}")
        if said is None:
            setattr(options, key, value)
    about: dict[str, Any] = {
        "base_model": name,
        "rope_theta": options.rope_theta,
        "max_position_embeddings": Schedule.parse(options.schedule).longest,
    }
    if options.resume and "started_from" in extension:
        about["started_from"] = extension["started_from"]
    elif adapter is not None and not options.resume:
        about["started_from"] = extension
    return about


def build(options: argparse.Namespace, schedule: Schedule, device: torch.device) -> Any:
    """The model with its new base and fresh adapters (or those to start from)."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    dtype = "float32" if options.cpu else "bfloat16"
    if options.model_shape:
        model = models.build(options.model_shape, dtype=getattr(torch, dtype), device=device)
    else:
        from bsfa_calib.models import load

        model = load(options.model, dtype=dtype, device=str(device)).model
    models.set_rotary(model, options.rope_theta, schedule.longest)
    torch.manual_seed(options.seed)  # the same factors in every process
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(model, config)
    if options.start_from:
        factors = models.adapter_factors(options.start_from)
        left: Any = set_peft_model_state_dict(adapted, factors)
        if left.unexpected_keys:
            raise ValueError(f"{options.start_from} is not for this model: {left.unexpected_keys}")
    recompute_layers(model, True)
    return adapted.train()


def main(arguments: list[str] | None = None) -> int:
    """Train, as the command line says."""
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]

    options = parse(arguments)
    extension = settle(options)
    schedule = Schedule.parse(options.schedule)
    began = time.perf_counter()
    accelerator: Any = Accelerator(mixed_precision="no" if options.cpu else "bf16", cpu=options.cpu)
    device = accelerator.device
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.data / "tokenizer")
    windows = data.Windows(options.data, tokenizer, plain=options.plain)
    model = build(options, schedule, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    state_file = options.out / "state.pt"
    step, spent, tokens = 0, 0.0, 0
    if options.resume:
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["factors"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        step, spent, tokens = state["step"], state["spent"], state["tokens"]
    backends = [] if options.cpu else fastest_attention(model, schedule.longest, device)
    loss_module = accelerator.prepare(Loss(model, options.answer_share))
    if accelerator.is_main_process:
        count = sum(p.numel() for p in trained)
        print(f"train: {count:,} parameters, {accelerator.num_processes} processes", flush=True)
        print(f"train: ready after {time.perf_counter() - began:.0f} s", flush=True)

    def write() -> None:
        if accelerator.is_main_process:
            save(model, options.out, {**extension, "steps": step, "tokens": tokens})
            factors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
            state = {
                "factors": factors,
                "optimizer": optimizer.state_dict(),
                "step": step,
                "spent": spent,
                "tokens": tokens,
            }
            partial = state_file.with_suffix(".partial")
            torch.save(state, partial)
            os.replace(partial, state_file)

    def make(step: int, length: int) -> Future[Any]:
        seed = (options.seed * 1_000_003 + step) * 4096 + accelerator.process_index
        return maker.submit(windows.make, length, seed)

    maker = ThreadPoolExecutor(_PREFETCH)
    start = last_saved = time.perf_counter()
    before = spent
    curves = Curves()
    coming: deque[Future[Any]] = deque()
    recomputed = True
    while True:
        spent = before + time.perf_counter() - start
        progress = max(step / options.steps, spent / 60 / options.minutes)
        # One process's clock decides, so that all take windows of one length and end together.
        (progress,) = broadcast_object_list([progress])
        if progress >= 1:
            break
        while len(coming) <= _PREFETCH:
            ahead = step + len(coming)
            share = max(progress, ahead / options.steps)
            coming.append(make(ahead, schedule.length(share, ahead)))
        ids, kinds = (torch.from_numpy(a)[None].to(device) for a in coming.popleft().result())
        if recomputed != (ids.numel() >= options.recompute_from):
            recomputed = not recomputed
            recompute_layers(model.get_base_model(), recomputed)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate(progress, step)
        with sdpa_kernel(backends, set_priority=True) if backends else contextlib.nullcontext():
            loss, losses = loss_module(ids, kinds)
            accelerator.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        curves.add(losses, kinds[0])
        step += 1
        tokens += ids.numel() * accelerator.num_processes
        if step % options.log_steps == 0:
            lines = curves.take(accelerator)
            if accelerator.is_main_process:
                seconds = time.perf_counter() - start
                print(
                    f"step {step}  {seconds:.0f} s  {progress:.0%}  {tokens / 1e6:.1f}M tokens  "
                    f"gradient {float(norm):.2f}  lr {optimizer.param_groups[0]['lr']:.1e}",
                    *lines,
                    sep="\n",
                    flush=True,
                )
        if time.perf_counter() - last_saved > 60 * options.save_minutes:
            write()
            last_saved = time.perf_counter()
    spent = before + time.perf_counter() - start
    write()
    maker.shutdown(cancel_futures=True)
    if accelerator.is_main_process:
        peak = 0.0 if options.cpu else torch.cuda.max_memory_allocated(device) / 2**30
        print(f"train: {step} steps, {tokens:,} tokens, {spent:.0f} s, {peak:.1f} GiB", flush=True)
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_program(main)
