# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Thresholds learned by gradient: the least divergence from dense at a given sparsity.

Every head gets a scalar, or a few knots over the position. The mean KL divergence of the model's
next-token distributions from dense is measured with all heads skipping at once, and each
threshold's gradient is what the blocks near it are worth to it (``gated``). Thresholds move until a
block skipped costs the same everywhere, while one shift of all of them holds the sparsity. So it
sees how errors of different heads, layers and positions add up or cancel.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bsfa_calib.expected import check_layers
from bsfa_calib.gated import Memo, gated_attention
from bsfa_calib.hook import Attended, HookError, applied, attention_shape
from bsfa_calib.language_model import LanguageModel
from bsfa_calib.recompute import recomputed_layers
from bsfa_kernel import Geometry

Float32Array = npt.NDArray[np.float32]

# Where thresholds start, in units of scaled scores: a moderate sparsity under each rule.
START = {"absolute": 4.0, "running_max": -3.0, "peak_lse": -2.5}

_BETAS = (0.9, 0.95)
_POSITIONS_AT_A_TIME = 512
# Of the way to the target sparsity, made up after every step; and the most of it, in scores.
_STEER, _MOST_STEER = 0.3, 0.5


@dataclass(frozen=True)
class Learned:
    """Thresholds for one sparsity.

    Attributes:
        target: share of blocks that was asked for.
        thresholds: float32 [layers, heads, rows]; one row, or one for each query block of the
            samples.
        sparsity: mean share of blocks skipped over the last half of the steps.
        kl: mean KL divergence from dense over the same, in nats.
    """

    target: float
    thresholds: Float32Array
    sparsity: float
    kl: float


@dataclass(frozen=True)
class Settings:
    """How thresholds are learned.

    Attributes:
        steps: for the first target; each reads one sample.
        further_steps: for every further target, which starts from the one before.
        rate: how far a step moves a threshold at most, in units of scaled scores, at first.
        width: see ``gated_attention``.
        knots: thresholds of a head: 1, or several at positions that double.
        ceiling: the most that a threshold may be. At 0, a relative rule keeps every block with a
            peak above the reference of its row.
        seed: what the order of the samples is drawn with.
    """

    steps: int = 80
    further_steps: int = 40
    rate: float = 0.3
    width: float = 0.5
    knots: int = 1
    ceiling: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: one is out of its range.
        """
        if min(self.steps, self.further_steps, self.knots) < 1:
            raise ValueError(
                f"steps and knots must be at least 1, got {self.steps}, {self.further_steps} and "
                f"{self.knots}"
            )
        if not (self.rate > 0 and self.width > 0):
            raise ValueError(
                f"rate and width must be above 0, got {self.rate:g} and {self.width:g}"
            )


@dataclass(frozen=True)
class DenseOutputs:
    """What a model gives under dense attention, which divergences are measured from.

    Attributes:
        hidden: final hidden states of each sample, [seqlen, width], on the model's device.
        free: the layers that can skip blocks of these samples, ascending.
    """

    hidden: tuple[Tensor, ...]
    free: tuple[int, ...]


def dense_outputs(model: Any, samples: Sequence[Sequence[int]]) -> DenseOutputs:
    """Read samples dense, in the dtype that thresholds are learned in.

    Args:
        model: a decoder of transformers.
        samples: tokens of each.

    Raises:
        HookError: no layer of the model can skip a block.
    """
    language_model = LanguageModel(model)
    hidden: list[Tensor] = []
    dense: dict[int, str] = {}
    with _tensor_float32(), applied(model, None) as meter:
        for ids in samples:
            # A copy made outside of inference mode may have a part in gradients.
            hidden.append(language_model.predict(ids).hidden.clone())
            dense = check_layers(meter, model)
    layers, _ = attention_shape(model)
    return DenseOutputs(tuple(hidden), tuple(n for n in range(layers) if n not in dense))


def learn(
    model: Any,
    samples: Sequence[Sequence[int]],
    targets: Sequence[float],
    *,
    rule: str,
    geometry: Geometry,
    voters: int = 1,
    settings: Settings | None = None,
    start: npt.ArrayLike | None = None,
    dense: DenseOutputs | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Learned]:
    """Learn thresholds for several sparsities, one after the other.

    Args:
        model: a decoder of transformers; its parameters' ``requires_grad`` is switched off.
        samples: tokens of each, all of one length, a multiple of the sides of a block.
        targets: shares of the visible blocks to skip, in the order in which they are learned.
        rule: one of ``bsfa_kernel.RULES``.
        geometry: the sparsity block.
        voters: one query row in 1, 2 or 4 votes.
        settings: how.
        start: thresholds to start from: [layers, heads], or [layers, heads, rows] with one row, or
            one for each query block of the samples; by default one scalar.
        dense: ``dense_outputs`` of the model and the samples, if they are there already.
        progress: told of every tenth step.

    Raises:
        HookError: no layer of the model can skip a block.
        ValueError: there are no samples, their lengths differ, the dense outputs are of another
            number of samples, or the thresholds to start from are not of the model's layers and
            heads.
    """
    if len({len(ids) for ids in samples}) != 1:
        raise ValueError("at least one sample is needed, and all of the same length")
    if dense is not None and len(dense.hidden) != len(samples):
        raise ValueError(
            f"dense outputs must be of the {len(samples)} samples, got {len(dense.hidden)}"
        )
    learner = _Learner(
        *(model, samples, settings or Settings(), rule, geometry, voters, start, dense, progress)
    )
    results = []
    with _tensor_float32():
        for number, target in enumerate(targets):
            steps = learner.settings.further_steps if number else learner.settings.steps
            results.append(learner.learn(target, steps))
    return results


def knot_weights(rows: int, knots: int) -> Float32Array:
    """Weights [knots, rows] of knots in the threshold of each query block.

    Between knots, thresholds are linear in the logarithm of the position.
    """
    position = np.log2(np.arange(rows) + 1.0)
    if knots == 1 or rows == 1:
        return np.ones((1, rows), np.float32)
    places = np.linspace(0.0, position[-1], knots)
    identity = np.eye(knots)
    return np.stack([np.interp(position, places, one) for one in identity]).astype(np.float32)


class _Learner:
    """Thresholds under way, and the moments of their gradients."""

    def __init__(
        self,
        model: Any,
        samples: Sequence[Sequence[int]],
        settings: Settings,
        rule: str,
        geometry: Geometry,
        voters: int,
        start: npt.ArrayLike | None,
        dense: DenseOutputs | None,
        progress: Callable[[str], None],
    ) -> None:
        self.language_model = LanguageModel(model)
        self.samples, self.rule, self.geometry, self.voters = samples, rule, geometry, voters
        self.settings, self.progress = settings, progress
        model.requires_grad_(False)
        device = self.language_model.device
        self.weights = torch.tensor(
            knot_weights(len(samples[0]) // geometry.q_block, settings.knots), device=device
        )
        shape = attention_shape(model)
        first = np.asarray(START[rule] if start is None else start, np.float64)
        first = first if first.ndim == 3 else first[..., None]
        rows = self.weights.shape[1]
        if start is not None and first.shape[:-1] != shape:
            raise ValueError(
                f"thresholds to start from must be of {shape[0]} layers and {shape[1]} heads, as "
                f"the model is, got shape {np.shape(start)}"
            )
        if first.shape[-1] not in (1, rows):
            raise ValueError(
                f"thresholds to start from need 1 or {rows} rows, got {first.shape[-1]}"
            )
        first = np.broadcast_to(first, (*shape, rows))
        if settings.knots == 1:
            first = first.mean(-1, keepdims=True)
        else:
            first = first @ np.linalg.pinv(self.weights.cpu().numpy())
        self.knots = torch.tensor(first, dtype=torch.float32, device=device)
        self.moments = [torch.zeros_like(self.knots) for _ in range(2)]
        self.taken = 0
        # Sums over all thresholds of the gradients of divergence and sparsity, decayed.
        self.totals = [0.0, 0.0]
        self.order: list[int] = []
        self.random = np.random.default_rng(settings.seed)
        self.slopes = torch.zeros((*shape, rows), device=device)
        self.skipped = torch.zeros(shape, device=device)
        dense = dense or dense_outputs(model, samples)
        self.dense = dense.hidden
        # Sparsities are those of the layers that can skip; the others stay at 0.
        self.free = list(dense.free)

    def learn(self, target: float, steps: int) -> Learned:
        average = torch.zeros_like(self.knots)
        seen: list[tuple[float, float]] = []
        averaged = 0
        for step in range(steps):
            # From the full rate down to a tenth of it.
            rate = self.settings.rate * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            kl, sparsity = self._step(target, rate)
            seen.append((kl, sparsity))
            if step >= steps // 2:
                average += self.knots
                averaged += 1
            if step % 10 == 9 or step + 1 == steps:
                recent = np.mean(seen[-10:], axis=0)
                self.progress(
                    f"target {target:g}, step {step + 1} of {steps}: KL {recent[0]:.5f}, "
                    f"sparsity {recent[1]:.3f}"
                )
        average /= averaged
        kl, sparsity = np.mean(seen[steps // 2 :], axis=0)
        with torch.no_grad():
            rows = average if self.settings.knots == 1 else average @ self.weights
        return Learned(target, rows.cpu().numpy(), float(sparsity), float(kl))

    def _step(self, target: float, rate: float) -> tuple[float, float]:
        kl, gradient = self._gradient()
        skipped = self.skipped[self.free]
        # All heads have as many blocks, so that the mean over heads is the share of all blocks.
        sparsity = float(skipped.mean())
        slopes = self.slopes / skipped.numel() @ self.weights.T
        fast, slow = _BETAS
        whole = float(slopes.sum())
        for index, total in enumerate((float(gradient.sum()), whole)):
            self.totals[index] = fast * self.totals[index] + (1 - fast) * total
        price = max(self.totals[0], 0.0) / max(self.totals[1], 1e-12)
        descent = gradient - price * slopes
        self.taken += 1
        first, second = self.moments
        first.mul_(fast).add_(descent, alpha=1 - fast)
        second.mul_(slow).add_(descent.square(), alpha=1 - slow)
        root = (second / (1 - slow**self.taken)).sqrt()
        # Heads with hardly a block near the threshold give next to no gradient: leave them alone.
        floor = 0.1 * root.median() + 1e-30
        self.knots -= rate * first / (1 - fast**self.taken) / (root + floor)
        shift = _STEER * (target - sparsity) / max(whole, 1e-3)
        self.knots += min(max(shift, -_MOST_STEER), _MOST_STEER)
        self.knots.clamp_(max=self.settings.ceiling)
        return kl, sparsity

    def _gradient(self) -> tuple[float, Tensor]:
        """Divergence on the next sample and its gradient; slopes and shares are left in self."""
        if not self.order:
            self.order = list(self.random.permutation(len(self.samples)))
        index = int(self.order.pop())
        ids = self.samples[index]
        model = self.language_model.model
        knots = self.knots.clone().requires_grad_()
        tokens = torch.tensor([list(ids)], device=self.language_model.device)
        with torch.enable_grad():
            rows = knots @ self.weights
            training = _Training(self, rows)
            with applied(model, training), recomputed_layers(model):
                hidden = self.language_model.read(tokens)
                training.is_read = True
                kl, upstream = self._divergence(hidden[0].detach(), self.dense[index])
                (gradient,) = torch.autograd.grad(hidden, knots, upstream[None])
        if not bool(gradient.isfinite().all()):
            raise ValueError(
                f"gradients must be finite, and in {str(hidden.dtype).removeprefix('torch.')} "
                "some are not: learn in bfloat16 or float32 (--dtype)"
            )
        return kl / len(ids), gradient / len(ids)

    def _divergence(self, hidden: Tensor, dense: Tensor) -> tuple[float, Tensor]:
        """KL divergence from dense and its gradient at the hidden states [seqlen, width].

        The sum over positions: the gradients of a mean are too small for float16.
        """
        total = 0.0
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), _POSITIONS_AT_A_TIME):
            here = slice(start, start + _POSITIONS_AT_A_TIME)
            with torch.no_grad():
                expected = self.language_model.logits(dense[here]).log_softmax(-1)
            part = hidden[here].clone().requires_grad_()
            actual = self.language_model.logits(part).log_softmax(-1)
            kl = torch.nn.functional.kl_div(actual, expected, log_target=True, reduction="sum")
            (gradient[here],) = torch.autograd.grad(kl, part)
            total += float(kl.detach())
        return total, gradient


@dataclass
class _Training:
    """A method (see ``hook.Method``) of one step, that notes what its thresholds did.

    Attributes:
        learner: who learns.
        rows: thresholds [layers, heads, rows].
        memos: by layer. Attention takes most of the time: a layer that is recomputed has its
            output from there, and computes all else again.
        is_read: whether the forward pass is over.
    """

    learner: _Learner
    rows: Tensor
    memos: dict[int, Memo] = field(default_factory=dict)
    is_read: bool = False

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Attended:
        """See ``hook.Method``."""
        learner = self.learner
        if layer in self.memos and not self.is_read:
            raise HookError(f"layer {layer} computes attention more than once in a pass")
        found = gated_attention(
            *(q[0], k[0], v[0], self.rows[layer]),
            rule=learner.rule,
            geometry=learner.geometry,
            scale=scale,
            voters=learner.voters,
            width=learner.settings.width,
            sinks=sinks,
            memo=self.memos.setdefault(layer, Memo()),
        )
        learner.skipped[layer] = found.skipped
        learner.slopes[layer] = found.slope
        return Attended(found.out[None], found.skipped)


@contextlib.contextmanager
def _tensor_float32() -> Iterator[None]:
    """Products in TF32 where the GPU has it: gradients are noisier than that."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
