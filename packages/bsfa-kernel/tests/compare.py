# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Comparison of a kernel's outputs with the reference's: what may differ, and by how much."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bsfa_kernel import Geometry, reference
from bsfa_kernel.geometry import query_lead

LSE_TOLERANCE = 2**-15
"""Relative to the larger of 1 and the value; good float32 exponentials err by a tenth of it."""

COSINE_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Budget:
    """Errors that an output may have against float64."""

    largest: float
    rms: float


def low_precision_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What a good kernel with 16-bit inputs computes.

    Scores in float32, weights rounded to 16 bits, sums in float32, and the output rounded.

    Args:
        q: [batch, seqlen_q, heads, head_dim], float16 or bfloat16.
        k: [batch, seqlen_k, kv_heads, head_dim].
        v: as k.
        mask: bool [batch, heads, seqlen_q, seqlen_k], true where a score takes part.
        scale: factor of the scores.
        sinks: [heads], which join last.
    """
    group = q.shape[2] // k.shape[2]
    keys, values = (x.transpose(1, 2).repeat_interleave(group, 1).float() for x in (k, v))
    scores = torch.matmul(q.transpose(1, 2).float(), keys.transpose(2, 3))
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    scores.masked_fill_(~mask, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest.masked_fill(largest == -torch.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul(weights.to(v.dtype).float(), values)
    out = out / total.masked_fill(total == 0, 1)
    if sinks is not None:
        lse = largest + total.log()
        share = 1 / (1 + (sinks.float()[:, None, None] - lse).exp())
        out = torch.where(lse == -torch.inf, 0, out * share)
    return out.transpose(1, 2).to(q.dtype)


def by_query(x: Tensor, seqlen_q: int, seqlen_k: int, geometry: Geometry, dim: int = 2) -> Tensor:
    """What there is one of for each query block along ``dim``, for each query."""
    lead = query_lead(seqlen_q, seqlen_k, geometry) if seqlen_q else 0
    return x.repeat_interleave(geometry.q_block, dim).narrow(dim, lead, seqlen_q)


def score_mask(
    blocks: Tensor, seqlen_q: int, seqlen_k: int, causal: bool, geometry: Geometry
) -> Tensor:
    """The scores that take part, [..., seqlen_q, seqlen_k], for a mask of blocks kept."""
    scores = by_query(blocks, seqlen_q, seqlen_k, geometry, -2)
    scores = scores.repeat_interleave(geometry.k_block, -1)[..., :seqlen_k]
    if causal:
        visible = torch.ones((seqlen_q, seqlen_k), dtype=torch.bool, device=blocks.device)
        scores = scores & visible.tril(seqlen_k - seqlen_q)
    return scores


def error_budget(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    expected: reference.AttentionResult,
    *,
    causal: bool,
    scale: float | None,
    geometry: Geometry,
    sinks: Tensor | None = None,
) -> Budget:
    """Twice the errors of ``low_precision_attention`` on the same blocks, and one rounding more."""
    if 0 in (expected.out.numel(), k.numel()):
        return Budget(0.0, 0.0)
    mask = score_mask(expected.mask, q.shape[1], k.shape[1], causal, geometry)
    emulated = low_precision_attention(q, k, v, mask, scale=scale, sinks=sinks)
    error = emulated.double() - expected.out.double()
    rounding = torch.finfo(q.dtype).eps / 2
    return budget_of(error, expected.out, rounding)


def budget_of(error: Tensor, expected: Tensor, rounding: float) -> Budget:
    """Twice an error that was found, and one rounding of the expected values more."""
    if error.numel() == 0:
        return Budget(0.0, 0.0)
    expected = expected.double()
    return Budget(
        largest=2 * error.abs().max().item() + rounding * expected.abs().max().item(),
        rms=2 * _rms(error) + rounding * _rms(expected),
    )


def assert_close(actual: Tensor, expected: Tensor, budget: Budget, name: str = "out") -> None:
    """Fail unless infinities and NaNs are in the same places and errors within the budget."""
    actual, expected = _comparable(actual, expected, name)
    if actual.numel() == 0:
        return
    error = (actual - expected).abs()
    error[~expected.isfinite()] = 0
    worst = error.max().item()
    assert worst <= budget.largest, (
        f"{name}: largest error {worst:.3g}, allowed {budget.largest:.3g}; "
        + _worst(error, actual, expected, budget.largest)
    )
    rms = _rms(error)
    assert rms <= budget.rms, f"{name}: rms error {rms:.3g}, allowed {budget.rms:.3g}; " + _worst(
        error, actual, expected, budget.rms
    )
    a, e = actual[expected.isfinite()], expected[expected.isfinite()]
    norms = (a.norm() * e.norm()).item()
    if norms > 0:
        distance = 1 - (a @ e).item() / norms
        assert distance <= COSINE_TOLERANCE, (
            f"{name}: 1 - cosine is {distance:.3g}, allowed {COSINE_TOLERANCE:.3g}"
        )


def assert_lse_close(actual: Tensor, expected: Tensor, tolerance: float = LSE_TOLERANCE) -> None:
    """Fail unless log-sum-exps agree to a tolerance relative to the larger of 1 and the value."""
    actual, expected = _comparable(actual, expected, "lse")
    if actual.numel() == 0:
        return
    error = (actual - expected).abs() / expected.abs().clamp(min=1)
    error[~expected.isfinite()] = 0
    worst = error.max().item()
    assert worst <= tolerance, (
        f"lse: largest relative error {worst:.3g}, allowed {tolerance:.3g}; "
        + _worst(error, actual, expected, tolerance)
    )


def assert_same_verdicts(kept: Tensor, expected: Tensor, clear: Tensor) -> None:
    """Fail unless kept counts are the same wherever the verdicts are clear.

    Args:
        kept: int32 [..., q_blocks].
        expected: as kept.
        clear: bool, as kept: where no rounding can change a verdict. Few places may not be.
    """
    assert kept.shape == expected.shape, f"kept has the shape {kept.shape}, not {expected.shape}"
    assert kept.dtype == torch.int32
    if clear.numel() >= 20:
        share = clear.float().mean().item()
        assert share >= 0.9, f"only {share:.0%} of the query blocks have clear verdicts"
    wrong = (kept != expected) & clear
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"kept: {wrong.sum().item()} of {wrong.numel()} query blocks differ, "
            f"first at {position}: {kept[position].item()} blocks, "
            f"expected {expected[position].item()}"
        )


def _comparable(actual: Tensor, expected: Tensor, name: str) -> tuple[Tensor, Tensor]:
    assert actual.shape == expected.shape, (
        f"{name} has the shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    actual, expected = actual.double(), expected.to(actual.device).double()
    for what, test in (
        ("NaN", torch.isnan),
        ("+inf", torch.isposinf),
        ("-inf", torch.isneginf),
    ):
        differ = test(actual) != test(expected)
        if differ.any():
            position = tuple(differ.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}: {what} in other places, {differ.sum().item()} in all, "
                f"first at {position}: {actual[position].item()}, "
                f"expected {expected[position].item()}"
            )
    return actual, expected


def _worst(error: Tensor, actual: Tensor, expected: Tensor, allowed: float) -> str:
    index = int(error.argmax())
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), error.shape))
    beyond = (error > allowed).float().mean().item()
    return (
        f"worst at {position}: {actual.flatten()[index].item():.6g}, "
        f"expected {expected.flatten()[index].item():.6g}; {beyond:.2%} beyond"
    )


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_matches(
    found: tuple[Tensor, Tensor, Tensor],
    expected: reference.AttentionResult,
    clear: Tensor,
    budget: Budget,
    geometry: Geometry,
    seqlen_k: int,
) -> None:
    """Fail unless verdicts, output and log-sum-exp agree, where the verdicts are clear.

    A skip is a discontinuity, so that outputs are compared only where the kept blocks are known to
    be the same.

    Args:
        found: out [batch, seqlen_q, heads, head_dim], lse and kept.
        expected: those of the reference.
        clear: bool [batch, heads, q_blocks].
        budget: of the output.
        geometry: the sparsity block.
        seqlen_k: keys of each sequence.
    """
    out, lse, kept = found
    assert_same_verdicts(kept, expected.kept, clear)
    rows = by_query(clear, lse.shape[2], seqlen_k, geometry)
    hidden = ~rows.transpose(1, 2)[..., None]
    assert_close(out.masked_fill(hidden, 0), expected.out.masked_fill(hidden, 0), budget)
    assert_lse_close(lse.masked_fill(~rows, 0), expected.lse.masked_fill(~rows, 0))
