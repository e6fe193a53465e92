# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Attention with gradients, and thresholds learned by them."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, LlamaForCausalLM

from bsfa_calib import gated, learning
from bsfa_calib import learned as calibration
from bsfa_calib.expected import Measure
from bsfa_calib.gated import gated_attention
from bsfa_calib.hook import BlockSparse, applied
from bsfa_calib.language_model import LanguageModel
from bsfa_calib.learned import ThresholdPath, calibrate, learn_path
from bsfa_calib.learning import Learned, Settings, dense_outputs, knot_weights, learn
from bsfa_calib.thresholds import ThresholdTable
from bsfa_calib.tuning import TuningError, find_scalar
from bsfa_kernel import RULES, Geometry, reference
from tiny_calib import small_llama, tiny_model

LENGTH = 1024
GEOMETRY = Geometry(128, 64)


class Case(NamedTuple):
    """Inputs whose blocks differ, and thresholds that skip some of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    thresholds: Tensor


# Far below and far above all scores, none at all, and one among them.
SINKS = torch.tensor([-30.0, 4.0, -math.inf, 30.0])
BOTH = pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])


def a_case(rule: str, geometry: Geometry) -> Case:
    generator = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(512, 4, 16, generator=generator)
    k, v = torch.randn(2, 512, 2, 16, generator=generator)
    centre = {"absolute": 9.0, "running_max": 2.5, "peak_lse": 1.5}[rule]
    noise = torch.randn(4, 512 // geometry.q_block, generator=generator)
    return Case(q, k, v, centre + noise)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return small_llama()


@pytest.fixture(scope="module")
def samples() -> list[list[int]]:
    return np.random.default_rng(1).integers(0, 256, (3, LENGTH)).tolist()


# ------------------------------------------------------------------------ attention with gradients


@pytest.mark.parametrize("scores_at_a_time", [1 << 24, 1 << 18, 1])
@pytest.mark.parametrize("geometry", [Geometry(128, 64), Geometry(64, 64)], ids=str)
@pytest.mark.parametrize("voters", [1, 2, 4])
@pytest.mark.parametrize("rule", RULES)
@BOTH
def test_attention_with_gradients_is_that_of_the_reference(
    rule: str,
    voters: int,
    geometry: Geometry,
    scores_at_a_time: int,
    sinks: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gated, "_SCORES_AT_A_TIME_CPU", scores_at_a_time)
    case = a_case(rule, geometry)
    options = {"scale": 0.25, "rule": rule, "geometry": geometry, "voters": voters, "sinks": sinks}
    found = gated_attention(*case, **options)
    expected = reference.attention(*(x[None] for x in case[:3]), case.thresholds, **options)
    assert torch.allclose(found.out, expected.out[0], atol=1e-5)
    seen = reference.visible_blocks(512, 512, geometry=geometry)
    skipped = 1 - expected.kept[0].sum(-1) / seen.sum()
    assert torch.allclose(found.skipped, skipped, atol=1e-6)
    assert 0.02 < found.skipped.mean() < 0.7


@pytest.mark.parametrize("sink", [1e4, -1e4, math.nan, math.inf])
@pytest.mark.parametrize("rule", RULES)
def test_no_sink_is_too_large_or_hidden(rule: str, sink: float) -> None:
    case = a_case(rule, GEOMETRY)
    sinks = torch.tensor([sink, 0.0, 0.0, -math.inf])
    own = Case(*(x.clone().requires_grad_() for x in case))
    options = {"scale": 0.25, "rule": rule, "geometry": GEOMETRY, "sinks": sinks}
    with torch.enable_grad():
        found = gated_attention(*own, **options)
        found.out.square().sum().backward()
    expected = reference.attention(*(x[None] for x in case[:3]), case.thresholds, **options)
    assert torch.allclose(found.out, expected.out[0], atol=1e-5, equal_nan=True)
    seen = reference.visible_blocks(512, 512, geometry=GEOMETRY)
    assert torch.allclose(found.skipped, 1 - expected.kept[0].sum(-1) / seen.sum(), atol=1e-6)
    if math.isfinite(sink):
        assert all(x.grad is not None and x.grad.isfinite().all() for x in own)
    else:
        of_q = own.q.grad
        assert of_q is not None
        assert of_q[:, 0].isnan().all()
        assert of_q[:, 1:].isfinite().all()


def brute_force_excess(
    case: Case, rule: str, geometry: Geometry, voters: int, sinks: Tensor | None = None
) -> npt.NDArray[np.float64]:
    """What is compared with thresholds, [heads, q_blocks, k_blocks], row by row; NaN if forced."""
    q_block, k_block = geometry
    seqlen, heads = case.q.shape[:2]
    q_blocks, k_blocks = seqlen // q_block, seqlen // k_block
    excess = np.full((heads, q_blocks, k_blocks), np.nan)
    for head in range(heads):
        scores = 0.25 * (case.q[:, head] @ case.k[:, head // 2].T).double().numpy()
        for block in range(q_blocks):
            first = block * q_block
            rows = range(first, first + q_block)
            if block < q_blocks - 1:
                rows = rows[voters - 1 :: voters]
            for row in rows:
                seen = -np.inf if sinks is None else float(sinks[head])
                for column in reversed(range((row + k_block) // k_block)):
                    keys = range(column * k_block, min(row + 1, (column + 1) * k_block))
                    peak = scores[row, keys].max()
                    if (column + 1) * k_block <= first + 1:
                        over = peak - (0 if rule == "absolute" else seen)
                        before = excess[head, block, column]
                        excess[head, block, column] = np.fmax(before, over)
                    seen = max(seen, peak) if rule == "running_max" else np.logaddexp(seen, peak)
    return excess


@pytest.mark.parametrize("scores_at_a_time", [1 << 24, 1])
@pytest.mark.parametrize("voters", [1, 4])
@pytest.mark.parametrize("rule", RULES)
@BOTH
def test_gradients_are_those_of_attention_to_the_blocks_that_were_kept(
    rule: str,
    voters: int,
    scores_at_a_time: int,
    sinks: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gated, "_SCORES_AT_A_TIME_CPU", scores_at_a_time)
    case = a_case(rule, GEOMETRY)
    options = {"scale": 0.25, "rule": rule, "geometry": GEOMETRY, "voters": voters, "sinks": sinks}
    own = Case(*(x.clone().requires_grad_() for x in case))
    with torch.enable_grad():
        found = gated_attention(*own, **options, width=0.25)
        upstream = torch.randn(found.out.shape, generator=torch.Generator().manual_seed(1))
        found.out.backward(upstream)
    brute_force = brute_force_excess(case, rule, GEOMETRY, voters, sinks)
    excess = torch.tensor(brute_force, dtype=torch.float32)
    mask = ~(excess < case.thresholds[..., None])
    gates = mask.float().requires_grad_()
    plain = [x.clone().requires_grad_() for x in case[:3]]
    with torch.enable_grad():
        q, k, v = plain
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.25
        scores = scores.masked_fill(torch.ones(512, 512).triu(1).bool(), -math.inf)
        weights = scores.exp() * gates.repeat_interleave(128, 1).repeat_interleave(64, 2)
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total if sinks is None else total + sinks.exp()[:, None, None])
        out = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, 1))
        out.backward(upstream)
    for mine, theirs in zip(own[:3], plain, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-4)
    # A threshold's gradient is made of what its blocks' gates are worth.
    assert own.thresholds.grad is not None
    assert gates.grad is not None
    distance = (excess - case.thresholds[..., None]) / 0.25
    share = torch.sigmoid(distance)
    nothing = excess.isnan() | ((distance < -5) & (rule != "absolute"))
    rise = torch.where(nothing, 0.0, share * (1 - share) / 0.25)
    worth = gates.grad * rise
    assert torch.allclose(own.thresholds.grad, -worth.sum(-1), atol=1e-4)
    visible = reference.visible_blocks(512, 512, geometry=GEOMETRY).sum()
    assert torch.allclose(found.slope, rise.sum(-1) / visible, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_heads_that_keep_all_or_only_what_is_forced_have_gradients_too(rule: str) -> None:
    case = a_case(rule, GEOMETRY)
    case.thresholds[0], case.thresholds[1] = -math.inf, math.inf
    options = {"scale": 0.25, "rule": rule, "geometry": GEOMETRY, "voters": 4}
    own = Case(*(x.clone().requires_grad_() for x in case))
    with torch.enable_grad():
        found = gated_attention(*own, **options)
        found.out.backward(torch.randn(found.out.shape))
    expected = reference.attention(*(x[None] for x in case[:3]), case.thresholds, **options)
    assert torch.allclose(found.out, expected.out[0], atol=1e-5)
    assert found.skipped[0] == 0
    forced = reference.forced_blocks(512, 512, geometry=GEOMETRY).sum()
    visible = reference.visible_blocks(512, 512, geometry=GEOMETRY).sum()
    assert found.skipped[1] == pytest.approx(1 - forced / visible)
    assert all(x.grad is not None and x.grad.isfinite().all() for x in own)
    of_thresholds = own.thresholds.grad
    assert of_thresholds is not None
    assert of_thresholds[:2].abs().max() == 0
    assert of_thresholds[2:].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BOTH
def test_attention_with_gradients_keeps_16_bits(dtype: torch.dtype, sinks: Tensor | None) -> None:
    case = a_case("peak_lse", GEOMETRY)
    upstream = torch.randn(case[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {"scale": 0.25, "rule": "peak_lse", "geometry": GEOMETRY, "sinks": sinks}
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    outs, grads = [], []
    for work in (dtype, torch.float32):
        own = [x.to(dtype).to(work).requires_grad_() for x in case[:3]]
        thresholds = case.thresholds.clone().requires_grad_()
        with torch.enable_grad():
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
            with hooks if work == dtype else contextlib.nullcontext():
                found = gated_attention(*own, thresholds, **options)
            found.out.backward(upstream.to(work))
        outs.append(found.out)
        grads.append([x.grad for x in (*own, thresholds)])
    assert outs[0].dtype == dtype
    assert torch.allclose(outs[0].float(), outs[1], atol=2e-2)
    for mine, theirs in zip(*grads, strict=True):
        assert mine is not None
        assert theirs is not None
        assert (mine.float() - theirs).norm() < 0.02 * theirs.norm()
    inputs = [x for x in kept if x.dtype == dtype]
    assert len(inputs) == 4  # q, k, v and the output
    assert all(x.numel() < case[0].numel() for x in kept if x.dtype == torch.float32)


def test_the_slope_is_what_a_shift_of_thresholds_does_to_the_sparsity() -> None:
    case = a_case("absolute", GEOMETRY)
    options = {"rule": "absolute", "geometry": GEOMETRY, "scale": 0.25, "width": 0.5}
    shifts = torch.linspace(-3, 3, 61)
    shares = [
        gated_attention(*case[:3], case.thresholds + shift, **options).skipped for shift in shifts
    ]
    slopes = torch.stack(
        [
            gated_attention(*case[:3], case.thresholds + shift, **options).slope.sum(-1)
            for shift in shifts
        ]
    )
    # Over a stretch much longer than the logistic function is wide, both add up to the same.
    risen = shares[-1] - shares[0]
    assert torch.allclose(slopes.sum(0) * 0.1, risen, rtol=0.35, atol=0.03)


def test_what_attention_with_gradients_cannot_take_is_refused() -> None:
    case = a_case("absolute", GEOMETRY)
    options = {"rule": "absolute", "geometry": GEOMETRY, "scale": 0.25}
    with pytest.raises(ValueError, match=r"thresholds must be \[4, 4\], got \[4, 1\]"):
        gated_attention(*case[:3], case.thresholds[:, :1], **options)
    with pytest.raises(ValueError, match="multiples of 128x64, got 500"):
        gated_attention(*(x[:500] for x in case[:3]), case.thresholds, **options)
    with pytest.raises(ValueError, match="width must be above 0, got 0"):
        gated_attention(*case, **options, width=0)
    with pytest.raises(ValueError, match="rule must be one of"):
        gated_attention(*case, **{**options, "rule": "none"})
    with pytest.raises(ValueError, match=r"voters must be one of \(1, 2, 4\), got 8"):
        gated_attention(*case, **options, voters=8)
    with pytest.raises(ValueError, match="blocks must be 128x64 or 64x64, got 8x1"):
        gated_attention(*case, **{**options, "geometry": Geometry(8, 1)})
    q, k, v, thresholds = case
    for bad in ((q.int(), k, v), (q, k[:, 0], v[:, 0]), (q, k[:, :0], v[:, :0]), (q[:0], k, v)):
        with pytest.raises(ValueError, match="must be of floating point, 3-D and not empty, got"):
            gated_attention(*bad, thresholds, **options)
    for other in ((k, v[:, :1]), (k, v.repeat(2, 1, 1)), (k[..., :8], v[..., :8]), (q[:, :3],) * 2):
        with pytest.raises(
            ValueError, match=r"k and v must be \[512, kv_heads, 16\] with kv_heads"
        ):
            gated_attention(q, *other, thresholds, **options)


def test_attention_with_gradients_ignores_autocast() -> None:
    def compute() -> tuple[Tensor, ...]:
        case = Case(*(x.clone().requires_grad_() for x in a_case("peak_lse", GEOMETRY)))
        with torch.enable_grad():
            found = gated_attention(*case, rule="peak_lse", geometry=GEOMETRY, scale=0.25)
            found.out.square().sum().backward()
        gradients = [x.grad for x in case if x.grad is not None]
        return (found.out, found.skipped, found.slope, *gradients)

    outside = compute()
    assert len(outside) == 7
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = compute()
    for found, expected in zip(inside, outside, strict=True):
        assert torch.equal(found, expected)


def test_gradients_have_no_gradients_themselves() -> None:
    case = a_case("peak_lse", GEOMETRY)
    q = case.q.clone().requires_grad_()
    with torch.enable_grad():
        out = gated_attention(q, *case[1:], rule="peak_lse", geometry=GEOMETRY, scale=0.25).out
        (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()


def test_blocks_far_below_an_absolute_threshold_have_a_worth() -> None:
    q, _, v, thresholds = a_case("absolute", GEOMETRY)
    k = torch.full_like(v, 1e-3)  # every peak is far below
    own = thresholds.clone().requires_grad_()
    with torch.enable_grad():
        found = gated_attention(q, k, v, own, rule="absolute", geometry=GEOMETRY, scale=0.25)
        found.out.square().sum().backward()
    assert found.skipped.min() > 0.5
    assert own.grad is not None
    assert own.grad[:, 1:].abs().min() > 0
    assert found.slope[:, 1:].min() > 0


# --------------------------------------------------------------------------------------- learning


def divergence(model: LlamaForCausalLM, thresholds: np.ndarray, ids: list[int]) -> float:
    language_model = LanguageModel(model)
    with applied(model, None):
        dense = language_model.predict(ids)
    values = torch.tensor(thresholds, dtype=torch.float32)
    with applied(model, BlockSparse(values, "peak_lse", GEOMETRY)):
        found = language_model.predict(ids)
    bands = language_model.compare(found, dense, ids)
    return sum(band.kl * band.positions for band in bands) / (len(ids) - 1)


def test_learned_thresholds_lose_less_than_one_scalar_at_the_same_sparsity(
    model: LlamaForCausalLM, samples: list[list[int]]
) -> None:
    (learned,) = learn(
        model,
        samples[:2],
        [0.4],
        rule="peak_lse",
        geometry=GEOMETRY,
        settings=Settings(steps=40),
        start=np.full((2, 4), -1.0),
    )
    assert learned.thresholds.shape == (2, 4, 1)
    assert learned.sparsity == pytest.approx(0.4, abs=0.05)
    scalar = find_scalar(
        model,
        samples[2:],
        rule="peak_lse",
        target_sparsity=learned.sparsity,
        geometry=GEOMETRY,
    )
    one = np.full((2, 4, 1), scalar.threshold)
    assert divergence(model, learned.thresholds, samples[2]) < 0.8 * divergence(
        model, one, samples[2]
    )


def test_thresholds_stay_below_a_ceiling_and_follow_the_position(
    model: LlamaForCausalLM, samples: list[list[int]]
) -> None:
    settings = Settings(steps=3, knots=3, ceiling=-2.0)
    start = np.linspace(-9, -2, 8) * np.ones((2, 4, 1))
    (learned,) = learn(
        model,
        samples,
        [0.5],
        rule="peak_lse",
        geometry=GEOMETRY,
        settings=settings,
        start=start,
    )
    assert learned.thresholds.shape == (2, 4, 8)
    assert learned.thresholds.max() <= -2.0 + 1e-5
    assert np.all(learned.thresholds[..., 0] < learned.thresholds[..., -1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_learn_what_float32_learns(
    model: LlamaForCausalLM, samples: list[list[int]], dtype: torch.dtype
) -> None:
    options = {"rule": "peak_lse", "geometry": GEOMETRY, "settings": Settings(steps=30)}
    (expected,) = learn(model, samples, [0.4], **options)
    (found,) = learn(copy.deepcopy(model).to(dtype), samples, [0.4], **options)
    assert found.thresholds.dtype == np.float32
    assert np.corrcoef(found.thresholds.ravel(), expected.thresholds.ravel())[0, 1] > 0.95
    assert found.sparsity == pytest.approx(expected.sparsity, abs=0.03)
    assert found.kl == pytest.approx(expected.kl, rel=0.2)


def test_models_that_scale_their_logits_are_learned_too(samples: list[list[int]]) -> None:
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    scaled = GraniteForCausalLM(GraniteConfig(**sizes, **heads, logits_scaling=0.25)).eval()
    options = {"rule": "peak_lse", "geometry": GEOMETRY, "settings": Settings(steps=20)}
    (found,) = learn(scaled, samples, [0.3], **options)
    assert found.sparsity == pytest.approx(0.3, abs=0.05)
    assert 0 < found.kl < 10
    assert found.thresholds.std() > 0  # not one scalar


def test_gradients_that_are_not_finite_are_told(
    model: LlamaForCausalLM, samples: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def divergence(_: Any, hidden: Tensor, dense: Tensor) -> tuple[float, Tensor]:
        return float((hidden - dense).sum()), torch.full_like(hidden, torch.inf)

    monkeypatch.setattr(learning._Learner, "_divergence", divergence)
    half = copy.deepcopy(model).to(torch.float16)
    with pytest.raises(ValueError, match=r"in float16 some are not: learn in bfloat16 or float32"):
        learn(half, samples, [0.3], rule="peak_lse", geometry=GEOMETRY)


def test_knots_share_out_every_position() -> None:
    weights = knot_weights(32, 4)
    assert weights.shape == (4, 32)
    assert np.allclose(weights.sum(0), 1)
    assert weights[0, 0] == weights[-1, -1] == 1
    assert np.array_equal(knot_weights(32, 1), np.ones((1, 32)))


def test_dense_outputs_are_made_once_and_change_nothing(
    model: LlamaForCausalLM, samples: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(steps=2, further_steps=2)
    options: dict[str, Any] = {"rule": "peak_lse", "geometry": GEOMETRY, "settings": settings}
    given = dense_outputs(model, samples)
    assert given.free == (0, 1)
    assert [tuple(hidden.shape) for hidden in given.hidden] == [
        (len(ids), model.config.hidden_size) for ids in samples
    ]
    for found, fresh in zip(
        learn(model, samples, [0.3, 0.4], dense=given, **options),
        learn(model, samples, [0.3, 0.4], **options),
        strict=True,
    ):
        assert np.array_equal(found.thresholds, fresh.thresholds)
        assert found.kl == fresh.kl
    with pytest.raises(ValueError, match=f"must be of the {len(samples)} samples, got 1"):
        learn(model, samples, [0.3], dense=dense_outputs(model, samples[:1]), **options)
    calls: list[int] = []

    def counted(model: LlamaForCausalLM, samples: list[list[int]]) -> Any:
        calls.append(len(samples))
        return dense_outputs(model, samples)

    monkeypatch.setattr(calibration, "dense_outputs", counted)
    told: list[str] = []
    learn_path(
        *(model, samples),
        target_sparsities=(0.3,),
        rungs=(0.3, 0.4),
        progress=told.append,
        **options,
    )
    assert calls == [len(samples)]
    assert told[0].startswith(f"dense outputs of {len(samples)} samples in ")


def test_samples_of_different_lengths_and_odd_settings_are_refused(
    model: LlamaForCausalLM, samples: list[list[int]]
) -> None:
    with pytest.raises(ValueError, match="all of the same length"):
        learn(
            model,
            [samples[0], samples[1][:512]],
            [0.4],
            rule="peak_lse",
            geometry=GEOMETRY,
        )
    for shape in ((2, 3), (1, 4), (3, 4, 1)):
        with pytest.raises(ValueError, match="must be of 2 layers and 4 heads"):
            learn(
                model,
                samples,
                [0.4],
                rule="peak_lse",
                geometry=GEOMETRY,
                start=np.zeros(shape),
            )
    with pytest.raises(ValueError, match="need 1 or 8 rows, got 5"):
        learn(
            model,
            samples,
            [0.4],
            rule="peak_lse",
            geometry=GEOMETRY,
            start=np.zeros((2, 4, 5)),
        )
    with pytest.raises(ValueError, match="steps and knots must be at least 1"):
        Settings(steps=0)
    with pytest.raises(ValueError, match="rate and width must be above 0"):
        Settings(rate=0.0)


# ------------------------------------------------------------------------------------ calibration


def a_path() -> ThresholdPath:
    low, high = np.full((2, 4, 1), -3.0, np.float32), np.full((2, 4, 1), 1.0, np.float32)
    return ThresholdPath([Learned(0.6, low, 0.6, 0.01), Learned(0.75, high, 0.75, 0.1)])


def test_a_path_goes_through_what_was_learned_and_on_beyond() -> None:
    path = a_path()
    found = [float(path.at(place)[0, 0, 0]) for place in (-0.5, 0, 0.25, 1, 1.5)]
    assert found == pytest.approx([-5, -3, -2, 1, 3])
    with pytest.raises(ValueError, match="at least one"):
        ThresholdPath([])


def test_points_are_found_by_sparsity_and_by_loss(
    model: LlamaForCausalLM, samples: list[list[int]]
) -> None:
    by_sparsity = calibrate(model, a_path(), samples[:1], target_sparsities=(0.5, 0.3))
    assert by_sparsity.table.points == (0.3, 0.5)
    for target, expected in zip((0.3, 0.5), by_sparsity.expected, strict=True):
        assert expected.sparsity == pytest.approx(target, abs=0.03)
    by_loss = calibrate(model, a_path(), samples[:1], max_losses=(0.02,))
    assert by_loss.table.axis == "max_loss"
    assert 0 < by_loss.expected[0].kl <= 0.02
    with pytest.raises(TuningError, match="either"):
        calibrate(model, a_path(), samples[:1])
    # In 16 bits two ways to compute the same attention differ by more than this.
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    with pytest.raises(TuningError, match="is exceeded however low"):
        calibrate(rounded, a_path(), samples[:1], max_losses=(1e-12,))


def test_the_ladder_is_climbed_as_far_as_it_is_needed(
    model: LlamaForCausalLM, samples: list[list[int]], tmp_path: Path
) -> None:
    settings = Settings(steps=2, further_steps=1)
    checkpoint = tmp_path / "learned.npz"
    options = {"settings": settings, "checkpoint": checkpoint}
    made = learn_path(model, samples, target_sparsities=(0.5,), **options)
    assert [learned.target for learned in made] == [0.6]
    told: list[str] = []
    made = learn_path(model, samples, target_sparsities=(0.5, 0.7), progress=told.append, **options)
    assert [learned.target for learned in made] == [0.6, 0.75]
    assert told[0] == "target 0.6 was learned before"
    start = np.zeros((2, 4), np.float32)
    made = learn_path(model, samples, max_losses=(1e-6,), start=start, **options)
    assert [learned.target for learned in made] == [0.6]


def test_a_table_gives_its_nearest_point_to_start_from(
    model: LlamaForCausalLM, samples: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.array([-3.0, -2.0, -1.0], np.float32)
    thresholds = np.broadcast_to(values[:, None, None, None], (3, 2, 4, 1)).copy()
    begun: list[float] = []

    def learn(*arguments: Any, start: Any, **options: Any) -> list[Learned]:
        begun.append(float(start[0, 0, 0]))
        raise KeyboardInterrupt

    def begins(rung: float, **table: Any) -> float:
        start = ThresholdTable(thresholds, rule="peak_lse", **table)
        with pytest.raises(KeyboardInterrupt):
            learn_path(model, samples, target_sparsities=(0.5,), rungs=(rung,), start=start)
        return begun[-1]

    monkeypatch.setattr(calibration, "learn", learn)
    by_share: dict[str, Any] = {"points": (0.2, 0.4, 0.6), "axis": "target_sparsity"}
    assert [begins(rung, **by_share) for rung in (0.1, 0.35, 0.7)] == [-3.0, -2.0, -1.0]
    # What was measured counts, not what was asked for.
    measured = {"expected_sparsity": "0.05,0.1,0.4"}
    assert begins(0.35, **by_share, provenance=measured) == -1.0
    start = ThresholdTable(thresholds, rule="absolute", **by_share)
    with pytest.raises(TuningError, match="must be of the rule peak_lse, got absolute"):
        learn_path(model, samples, target_sparsities=(0.5,), start=start)
    by_loss: dict[str, Any] = {"points": (0.01, 0.02, 0.03), "axis": "max_loss"}
    assert begins(0.35, **by_loss) == -3.0
    assert begins(0.2, **by_loss, provenance={"expected_sparsity": "0.1,0.2,0.4"}) == -2.0


def test_rungs_may_be_named_instead(model: LlamaForCausalLM, samples: list[list[int]]) -> None:
    options = {"target_sparsities": (0.5,), "settings": Settings(steps=1, further_steps=1)}
    start = np.zeros((2, 4, 1), np.float32)
    made = learn_path(model, samples, rungs=(0.3, 0.45), start=start, **options)
    assert [learned.target for learned in made] == [0.3, 0.45]
    for wrong in ((), (0.4, 0.3), (0.0, 0.3), (0.3, 0.99)):
        with pytest.raises(TuningError, match=r"rungs must be ascending, above 0 and below 0\.778"):
            learn_path(model, samples, rungs=wrong, **options)


def test_what_was_learned_is_used_for_the_same_model_and_rungs_only(
    model: LlamaForCausalLM, samples: list[list[int]], tmp_path: Path
) -> None:
    options = {"settings": Settings(steps=1, further_steps=1), "checkpoint": tmp_path / "l.npz"}
    told: list[str] = []

    def run(one: LlamaForCausalLM, target: float) -> list[float]:
        told.clear()
        made = learn_path(
            one, samples, target_sparsities=(target,), progress=told.append, **options
        )
        return [learned.target for learned in made]

    assert run(model, 0.75) == [0.75]
    assert run(model, 0.5) == [0.6]  # not the 0.75 that lies there
    assert run(model, 0.5) == [0.6]
    assert told == ["target 0.6 was learned before"]
    other = LlamaForCausalLM(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    assert run(other, 0.5) == [0.6]
    assert not any("before" in line for line in told)


def test_no_flipped_bit_gives_other_learned_thresholds(tmp_path: Path) -> None:
    path = tmp_path / "learned.npz"
    made = [Learned(0.25 * n, np.full((2, 3, 1), n, np.float32), 0.5, 0.125) for n in (1, 2)]
    calibration._save(path, "key", made)
    content = path.read_bytes()
    refused = 0
    for position in range(0, 8 * len(content), 5):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            found = calibration._load(path, "key")
        except TuningError:
            refused += 1
        else:  # in a date or a like field of the archive
            assert [one.target for one in found] == [one.target for one in made]
            for one, other in zip(found, made, strict=True):
                np.testing.assert_array_equal(one.thresholds, other.thresholds)
                assert (one.sparsity, one.kl) == (other.sparsity, other.kl)
    assert refused > len(content)

    # A shape that ends before the part does, which numpy alone would read.
    shape = content.index(b"(2, 2, 3, 1)")
    path.write_bytes(content[:shape] + b"(2, 2, 1, 1)" + content[shape + 12 :])
    with pytest.raises(TuningError, match="holds no learned thresholds"):
        calibration._load(path, "key")


def test_a_file_that_holds_nothing_learned_is_left_as_it_is(
    model: LlamaForCausalLM, samples: list[list[int]], tmp_path: Path
) -> None:
    settings = Settings(steps=1, further_steps=1)
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    cases = (
        ("array.npz", array.getvalue()),
        ("notes.txt", b"mine\n"),
        ("empty.npz", b""),
        ("cut.npz", b"PK\3\4cut"),
    )
    for name, data in cases:
        checkpoint = tmp_path / name
        checkpoint.write_bytes(data)
        with pytest.raises(TuningError, match=f"{name} holds no learned thresholds"):
            learn_path(
                model, samples, target_sparsities=(0.5,), settings=settings, checkpoint=checkpoint
            )
        assert checkpoint.read_bytes() == data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_sparsities": (0.99,)}, "below 0.778, got 0.99"),
        ({"max_losses": (0.0,)}, "must be above 0, got 0"),
        ({}, "give either"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    model: LlamaForCausalLM,
    samples: list[list[int]],
    arguments: dict[str, tuple[float, ...]],
    message: str,
) -> None:
    with pytest.raises(TuningError, match=message):
        learn_path(model, samples, **arguments)


def test_a_prompt_too_short_is_told_so(model: LlamaForCausalLM, samples: list[list[int]]) -> None:
    with pytest.raises(TuningError, match="too short"):
        learn_path(model, [samples[0][:256]], max_losses=(0.01,))
    assert calibration.reachable(256, GEOMETRY) == ()


WINDOW = {
    "sliding_window": 256,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


@pytest.mark.parametrize(
    ("kind", "extra", "reason"),
    [
        ("gemma3_text", WINDOW, "sliding-window layer"),
        ("qwen3_5_text", LINEAR, "it has no causal softmax attention of its own"),
    ],
)
def test_layers_that_skip_nothing_have_no_share_in_what_is_learned(
    kind: str, extra: dict[str, Any], reason: str
) -> None:
    model = tiny_model(kind, **extra)
    samples = np.random.default_rng(1).integers(3, 256, (2, LENGTH)).tolist()
    settings = Settings(steps=30, further_steps=1)
    (learned,) = learn(
        model,
        samples[:1],
        [0.4],
        rule="peak_lse",
        geometry=GEOMETRY,
        settings=settings,
        start=np.full((2, 4), -1.0),
    )
    # Of both layers, twice as much of the second would have to be skipped.
    assert learned.sparsity == pytest.approx(0.4, abs=0.15)
    measure = Measure(model, samples[:1], rule="peak_lse", geometry=GEOMETRY)
    assert measure(learned.thresholds).sparsity == pytest.approx(0.4, abs=0.15)
    found = calibrate(
        model,
        ThresholdPath([learned]),
        samples[1:],
        target_sparsities=(0.4,),
        geometry=GEOMETRY,
    )
    assert found.expected[0].sparsity == pytest.approx(0.4, abs=0.05)
    assert np.isneginf(found.table.thresholds[:, 0]).all()
    assert np.isfinite(found.table.thresholds[:, 1]).all()
    assert found.table.provenance["dense_layers"] == f"layers 0: {reason}"
