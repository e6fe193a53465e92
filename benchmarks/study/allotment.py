# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""One threshold a head, chosen by what the head's error does to the model's predictions.

Skipping changes the output o of a head by d. To second order, the KL divergence of the predictions
from dense is then half of d' F d, with F the Fisher information of the predictions about o. It is
measured without any sparse forward pass: tokens are drawn from the model's own distributions, the
gradient g of their log-likelihood is taken at every o, and the mean of (g'd)^2 / 2 is the
divergence. d follows from the dense q, k and v for any threshold. What it neglects: that errors at
different positions and heads add up or cancel, and that sparse layers feed later ones.

From the curves of error and sparsity by threshold, thresholds are chosen so that each head's last
skipped block costs the same (Lagrange), for a given share of blocks skipped in all; or, to compare
with, so that each head loses the same softmax mass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from bsfa_calib.hook import Attended, applied, attention_shape
from bsfa_calib.language_model import LanguageModel
from bsfa_kernel import Geometry
from study.emulation import emulate, refuse_sinks

Float64Array = npt.NDArray[np.float64]

GROUPS = ("head", "layer", "model")

# Thresholds between those that were measured are interpolated to this step.
_STEP = 1 / 16


@dataclass(frozen=True)
class Profile:
    """What each head skips and loses, by threshold; float64 [thresholds, layers, heads].

    Attributes:
        thresholds: those measured, ascending, float64 [thresholds].
        skipped: mean share of the visible blocks skipped.
        error: expected KL divergence of the model's predictions, in nats a position, if only this
            head skips.
        lost: mean square of the softmax mass lost by a row.
        mass: mean softmax mass lost by a row.
        samples: contexts that were measured.
    """

    thresholds: Float64Array
    skipped: Float64Array
    error: Float64Array
    lost: Float64Array
    mass: Float64Array
    samples: int

    def skipped_at(self, thresholds: npt.ArrayLike) -> Float64Array:
        """Share skipped by each head under thresholds that broadcast to [layers, heads]."""
        _, layers, heads = self.skipped.shape
        wanted = np.broadcast_to(np.asarray(thresholds, np.float64), (layers, heads))
        found = np.empty((layers, heads))
        for layer in range(layers):
            for head in range(heads):
                curve = self.skipped[:, layer, head]
                found[layer, head] = np.interp(wanted[layer, head], self.thresholds, curve)
        return found


@dataclass
class _Layer:
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float


class _Recording:
    """Dense attention that keeps what it was given and what it gave, gradient included."""

    def __init__(self) -> None:
        self.layers: dict[int, _Layer] = {}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Attended:
        refuse_sinks(sinks)
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        ).transpose(1, 2)
        out.retain_grad()
        self.layers[layer] = _Layer(q.detach(), k.detach(), v.detach(), out, scale)
        return Attended(out, q.new_zeros(q.shape[2]))


def profile(
    model: Any,
    samples: Sequence[Sequence[int]],
    thresholds: Sequence[float],
    *,
    rule: str,
    geometry: Geometry,
    order: str = "last_first",
    draws: int = 2,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Measure what each head skips and loses under each of some thresholds.

    Args:
        model: a decoder of transformers whose logits are its output embedding of its last hidden
            state; its parameters' ``requires_grad`` is switched off.
        samples: tokens of each context, a multiple of the sides of a block.
        thresholds: ascending, in units of scaled scores.
        rule: one of ``bsfa_kernel.RULES``.
        geometry: the sparsity block.
        order: see ``study.emulation.emulate``.
        draws: times that tokens are drawn for each context.
        seed: what they are drawn with.
        progress: told of each context.

    Raises:
        ValueError: there are no samples, or thresholds do not ascend.
    """
    profiles = profile_all(
        model,
        samples,
        [(rule, geometry, order, tuple(thresholds))],
        draws=draws,
        seed=seed,
        progress=progress,
    )
    return profiles[0]


def profile_all(
    model: Any,
    samples: Sequence[Sequence[int]],
    requests: Sequence[tuple[str, Geometry, str, tuple[float, ...]]],
    *,
    draws: int = 2,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Profile]:
    """``profile`` for several (rule, geometry, order, thresholds), with one backward pass for all.

    Raises:
        ValueError: there are no samples, or thresholds do not ascend.
    """
    if not samples:
        raise ValueError("at least one sample is needed")
    for _, _, _, thresholds in requests:
        if len(thresholds) < 2 or np.any(np.diff(thresholds) <= 0):
            raise ValueError(f"at least two thresholds that ascend are needed, got {thresholds}")
    layers, heads = attention_shape(model)
    sums = [np.zeros((4, len(thresholds), layers, heads)) for *_, thresholds in requests]
    for number, ids in enumerate(samples):
        recorded, gradients = _record(model, ids, draws, seed + number)
        with torch.inference_mode():
            for (rule, geometry, order, thresholds), total in zip(requests, sums, strict=True):
                for layer, given in recorded.items():
                    total[:, :, layer] += _measure(
                        given, gradients[layer], thresholds, rule, geometry, order
                    )
        progress(f"profiled {number + 1} of {len(samples)} contexts")
    found = []
    for (*_, thresholds), total in zip(requests, sums, strict=True):
        skipped, error, lost, mass = total / len(samples)
        # Each falls nowhere, but for rounding and for the effects of one verdict on the next.
        skipped, error, mass = (np.maximum.accumulate(x) for x in (skipped, error, mass))
        grid = np.asarray(thresholds, np.float64)
        found.append(Profile(grid, skipped, error, lost, mass, len(samples)))
    return found


def _record(
    model: Any, ids: Sequence[int], draws: int, seed: int
) -> tuple[dict[int, _Layer], dict[int, Tensor]]:
    """What attention was given, and gradients [draws, seqlen, heads, head_dim] at its output."""
    language_model = LanguageModel(model)
    model.requires_grad_(False)
    device = language_model.device
    recording = _Recording()
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.enable_grad(), applied(model, recording):
        tokens = torch.tensor([list(ids)], device=device)
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        gradients: dict[int, list[Tensor]] = {layer: [] for layer in recording.layers}
        for draw in range(draws):
            upstream = _likelihood_gradient(language_model, hidden.detach(), generator)
            hidden.backward(upstream, retain_graph=draw + 1 < draws)
            for layer, given in recording.layers.items():
                assert given.out.grad is not None
                gradients[layer].append(given.out.grad[0].float())
                given.out.grad = None
    for given in recording.layers.values():
        given.out = given.out.detach()
    return recording.layers, {layer: torch.stack(found) for layer, found in gradients.items()}


def _likelihood_gradient(
    language_model: LanguageModel, hidden: Tensor, generator: torch.Generator
) -> Tensor:
    """Gradient at the hidden states of the log-likelihood of tokens that the model itself draws."""
    gradient = torch.empty_like(hidden)
    for start in range(0, hidden.shape[1], 256):
        part = hidden[:, start : start + 256].clone().requires_grad_()
        likely = language_model.logits(part[0]).log_softmax(-1)
        drawn = torch.multinomial(likely.detach().exp(), 1, generator=generator)
        (found,) = torch.autograd.grad(likely.gather(1, drawn).sum(), part)
        gradient[:, start : start + 256] = found
    return gradient


def _measure(
    given: _Layer,
    gradients: Tensor,
    thresholds: Sequence[float],
    rule: str,
    geometry: Geometry,
    order: str,
) -> Float64Array:
    """Skipped, error, lost and mass of one layer, float64 [4, thresholds, heads]."""
    heads, seqlen = given.q.shape[2], given.q.shape[1]
    measured = np.empty((4, len(thresholds), heads))
    # The grid and, first, a threshold that keeps everything: d is measured against it.
    values = torch.tensor([-torch.inf, *thresholds], device=given.q.device)
    values = values[:, None, None].expand(-1, heads, 1)
    found = emulate(
        *(given.q, given.k, given.v, values),
        rule=rule,
        geometry=geometry,
        scale=given.scale,
        order=order,
    )
    moved = found.out[1:, 0] - found.out[0, 0]
    effect = (moved[:, None] * gradients).sum(-1).square()  # [thresholds, draws, seqlen, heads]
    measured[0] = found.skipped[1:, 0].double().cpu().numpy()
    measured[1] = (effect.mean(1).sum(1) / (2 * seqlen)).double().cpu().numpy()
    measured[2] = found.lost[1:, 0].square().mean(-1).double().cpu().numpy()
    measured[3] = found.lost[1:, 0].mean(-1).double().cpu().numpy()
    return measured


def scalar_for(measured: Profile, target: float, offsets: npt.ArrayLike = 0.0) -> Float64Array:
    """Thresholds c + offsets at which a share of all visible blocks is skipped.

    Args:
        measured: the heads' curves.
        target: share skipped; what cannot be reached gives what comes closest.
        offsets: broadcast to [layers, heads].

    Returns:
        float64 [layers, heads].
    """
    added = np.asarray(offsets, np.float64)
    low = float(measured.thresholds[0] - np.max(added))
    high = float(measured.thresholds[-1] - np.min(added))
    for _ in range(40):
        middle = (low + high) / 2
        if measured.skipped_at(middle + added).mean() < target:
            low = middle
        else:
            high = middle
    return np.broadcast_to(high + added, measured.skipped.shape[1:]).copy()


def sensitivity_offsets(
    measured: Profile, *, strength: float = 1.0, at: float = 0.5
) -> Float64Array:
    """Offsets that give heads whose lost mass matters more a lower threshold.

    A head's sensitivity is the root of its error by the mean square of its lost mass, measured at
    the one scalar that skips the share ``at``; the offset is minus ``strength`` times its log.

    Returns:
        float64 [layers, heads], with mean 0.
    """
    scalar = scalar_for(measured, at)[0, 0]
    index = int(np.clip(np.searchsorted(measured.thresholds, scalar), 1, len(measured.thresholds)))
    error, lost = measured.error[index - 1], measured.lost[index - 1]
    known = (error > 0) & (lost > 0)
    if not known.any():
        return np.zeros(error.shape)
    ratio = np.where(known, error, 1.0) / np.where(known, lost, 1.0)
    logarithm = np.where(known, 0.5 * np.log(ratio), np.nan)
    logarithm = np.where(known, logarithm, np.nanmean(logarithm))
    return np.asarray(-strength * (logarithm - logarithm.mean()))


def allot(
    measured: Profile, target: float, *, group: str = "head", blend: float = 1.0
) -> Float64Array:
    """Thresholds at which what all heads together lose is least for a share of blocks skipped.

    Args:
        measured: the heads' curves.
        target: share of all visible blocks that is skipped.
        group: what has a threshold of its own: "head", "layer" or "model".
        blend: 1 for those thresholds, 0 for one scalar, between them for a mixture, which trusts
            curves from few samples less.

    Returns:
        float64 [layers, heads].

    Raises:
        ValueError: unknown group, or a blend out of [0, 1].
    """
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r}")
    if not 0 <= blend <= 1:
        raise ValueError(f"blend must be in [0, 1], got {blend}")
    fine = np.arange(measured.thresholds[0], measured.thresholds[-1] + _STEP, _STEP)
    skipped = _finer(measured.skipped, measured.thresholds, fine)
    # Errors grow by powers of ten along the grid: between two points their logarithm is linear.
    floor = max(float(measured.error.max()), 1e-30) * 1e-9
    error = np.exp(_finer(np.log(measured.error + floor), measured.thresholds, fine)) - floor
    axes = {"head": (), "layer": (2,), "model": (1, 2)}[group]
    if axes:
        skipped = np.broadcast_to(skipped.mean(axes, keepdims=True), skipped.shape)
        error = np.broadcast_to(error.mean(axes, keepdims=True), error.shape)

    def chosen(price: float) -> npt.NDArray[np.int64]:
        return np.asarray(np.argmin(error - price * skipped, axis=0), np.int64)

    low, high = -30.0, 30.0  # logarithms of the price of a skipped block
    for _ in range(60):
        middle = (low + high) / 2
        index = chosen(float(np.exp(middle)))
        reached = np.take_along_axis(skipped, index[None], 0).mean()
        low, high = (middle, high) if reached < target else (low, middle)
    own = fine[chosen(float(np.exp(high)))]
    mixed = blend * own + (1 - blend) * scalar_for(measured, target)
    # Discrete choices and mixing miss the target a little: one shift for all puts that right.
    return scalar_for(measured, target, mixed)


def equal_mass(measured: Profile, target: float) -> Float64Array:
    """Thresholds at which all heads lose the same mean softmax mass.

    Each head takes the highest threshold at which it loses no more than a budget, the same for all,
    at which the share asked for is skipped. A head that loses less at every profiled threshold
    takes the last of them, and one that loses more at every one the first.

    Args:
        measured: the heads' curves.
        target: share of all visible blocks that is skipped.

    Returns:
        float64 [layers, heads].
    """
    # As errors do, masses grow by powers of ten along the grid.
    floor = max(float(measured.mass.max()), 1e-30) * 1e-9
    curves = np.log(measured.mass + floor).reshape(len(measured.thresholds), -1)

    def chosen(budget: float) -> Float64Array:
        found = [np.interp(budget, curve, measured.thresholds) for curve in curves.T]
        return np.asarray(found).reshape(measured.mass.shape[1:])

    low, high = float(curves.min()), float(curves.max())  # logarithms of the budget
    if measured.skipped_at(chosen(low)).mean() >= target:
        return chosen(low)
    for _ in range(60):
        middle = (low + high) / 2
        if measured.skipped_at(chosen(middle)).mean() < target:
            low = middle
        else:
            high = middle
    return chosen(high)


def _finer(curves: Float64Array, thresholds: Float64Array, fine: Float64Array) -> Float64Array:
    flat = curves.reshape(len(thresholds), -1)
    found = np.stack([np.interp(fine, thresholds, column) for column in flat.T], axis=1)
    return found.reshape(len(fine), *curves.shape[1:])
