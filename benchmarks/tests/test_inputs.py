# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import inputs
from bsfa_kernel import GEOMETRIES, RULES, Geometry, reference
from inputs import Problem, Shape

CPU = torch.device("cpu")
SHAPE = Shape(2560, heads=4, kv_heads=2, head_dim=64)
FORCED = 1 - SHAPE.blocks(GEOMETRIES[0])[1] / SHAPE.blocks(GEOMETRIES[0])[0]


def attend(problem: Problem, geometry: Geometry, voters: int = 1) -> reference.AttentionResult:
    q, k, v = problem.q.float(), problem.k.float(), problem.v.float()
    options = {"rule": problem.rule, "geometry": geometry, "voters": voters}
    return reference.attention(q, k, v, problem.thresholds[geometry, voters], **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_planting_gives_the_sparsity_asked_for(
    geometry: Geometry, sparsity: float, rule: str
) -> None:
    problem = inputs.planted(SHAPE, sparsity, CPU, rule=rule, seed=1)
    kept = attend(problem, geometry).kept
    # One 128-key block more or less a head, of 20.
    assert inputs.measured_sparsity(kept, SHAPE, geometry) == pytest.approx(sparsity, abs=0.05)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_planted_low_weighs_nothing(rule: str) -> None:
    problem = inputs.planted(SHAPE, 0.6, CPU, rule=rule, seed=2)
    geometry = GEOMETRIES[0]
    sparse = attend(problem, geometry).out
    problem.thresholds[geometry, 1] = inputs.keep_everything(problem)
    dense = attend(problem, geometry)
    assert inputs.measured_sparsity(dense.kept, SHAPE, geometry) == 0.0
    torch.testing.assert_close(sparse, dense.out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_planted_blocks_are_far_from_their_thresholds(rule: str) -> None:
    problem = inputs.planted(SHAPE, 0.5, CPU, rule=rule, seed=3)
    geometry = GEOMETRIES[0]
    mask = attend(problem, geometry).mask
    for shift in (-1.0, 1.0):
        thresholds = {(geometry, 1): problem.thresholds[geometry, 1] + shift}
        moved = replace(problem, thresholds=thresholds)
        assert torch.equal(attend(moved, geometry).mask, mask)


def test_asking_for_everything_leaves_the_forced_blocks_and_the_first() -> None:
    problem = inputs.planted(SHAPE, 1.0, CPU)
    sparsity = inputs.measured_sparsity(attend(problem, GEOMETRIES[0]).kept, SHAPE, GEOMETRIES[0])
    assert FORCED - 0.1 < sparsity < FORCED


@pytest.mark.parametrize("voters", [1, 2, 4])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sparsity", [0.25, 0.75])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_irregular_inputs_skip_the_share_of_every_query_block(
    geometry: Geometry, sparsity: float, rule: str, voters: int
) -> None:
    options = {"geometry": geometry, "rule": rule, "voters": (1, 2, 4), "seed": 4}
    problem = inputs.irregular(SHAPE, sparsity, CPU, **options)
    kept = attend(problem, geometry, voters).kept
    seqlen = SHAPE.seqlen
    visible = reference.visible_blocks(seqlen, seqlen, geometry=geometry).sum(1)
    forced = reference.forced_blocks(seqlen, seqlen, geometry=geometry).sum(1)
    expected = torch.maximum(visible - torch.round(sparsity * visible).long(), forced)
    assert torch.equal(kept, expected.to(kept.dtype).expand_as(kept))


def test_irregular_patterns_differ_between_heads_and_query_blocks() -> None:
    geometry = GEOMETRIES[0]
    mask = attend(inputs.irregular(SHAPE, 0.5, CPU, geometry=geometry, seed=5), geometry).mask[0]
    early = mask[:, -4:, :30].flatten(0, 1)  # columns that are free for the last query blocks
    agreement = (early[:, None] == early).float().mean(-1)
    others = agreement[~torch.eye(len(early), dtype=torch.bool)]
    assert 0.4 < float(others.mean()) < 0.6
    assert float(others.max()) < 0.95


def test_voters_do_without_a_causal_mask() -> None:
    shape = replace(SHAPE, causal=False)
    geometry = GEOMETRIES[0]
    problem = inputs.irregular(shape, 0.5, CPU, geometry=geometry, voters=(1, 2))
    thresholds = problem.thresholds[geometry, 2]
    options = {"causal": False, "geometry": geometry, "voters": 2}
    kept = reference.attention(problem.q, problem.k, problem.v, thresholds, **options).kept
    assert inputs.measured_sparsity(kept, shape, geometry) == pytest.approx(0.5, abs=0.03)


def test_captured_inputs_are_those_that_the_attention_function_got(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    import models

    model = models.build("tiny", dtype=torch.float32, device=CPU)
    tokens = torch.arange(200)[None] % 256
    found = inputs.capture(model, tokens, 1, keep=lambda x: x.to(torch.bfloat16))
    assert found["q"].shape == (1, 200, 4, 16)
    assert found["k"].shape == found["v"].shape == (1, 200, 2, 16)
    assert model.config._attn_implementation == "sdpa"

    path = tmp_path / "layer.safetensors"
    save_file(found, path, metadata={"source": "a model"})
    problem = inputs.from_model(path, None, CPU, dtype=torch.float16)
    assert problem.shape == Shape(200, 4, 2, 16, 1, True, torch.float16)
    assert problem.source == "a model"
    with pytest.raises(ValueError, match="layer"):
        inputs.capture(model, tokens, 2, keep=lambda x: x)


def test_operations_and_pairs_are_those_of_a_causal_mask() -> None:
    assert Shape(3).pairs == 6
    assert Shape(3, causal=False).pairs == 9
    assert Shape(3, heads=2, head_dim=10, batch=5).flops == 4 * 10 * 6 * 2 * 5
