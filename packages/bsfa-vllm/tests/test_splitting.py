# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Steps that are split between block-sparse calls and vLLM's own attention."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import standins
from bsfa_calib.reasons import Reason
from bsfa_kernel import Geometry, reference
from bsfa_vllm.binding import Engine, engine_of
from bsfa_vllm.splitting import PLAN
from standins import OurBuilder, OurImpl, Step

CPU = torch.device("cpu")


def made(path: Path, value: float, *impls: OurImpl, **changes: Any) -> tuple[Engine, OurBuilder]:
    """An engine with a table of one value, and the builder of its layers."""
    settings = {"thresholds": standins.table(path / "table.safetensors", value)} | changes
    config = standins.config(additional_config={"bsfa": settings})
    engine = engine_of(config, 0, CPU, required=True)
    assert engine is not None
    layers = {}
    for index, impl in enumerate(impls):
        impl.attach(engine)
        layers[f"model.layers.{index}.self_attn.attn"] = SimpleNamespace(impl=impl)
    builder = OurBuilder()
    builder.prepare(layers, standins.SPEC, torch.float32)
    return engine, builder


def run(impl: OurImpl, step: Step, metadata: Any, layer: int = 0) -> torch.Tensor:
    output = torch.full_like(step.query, torch.nan)
    named = SimpleNamespace(layer_name=f"model.layers.{layer}.self_attn.attn")
    assert impl.forward(named, step.query, None, None, step.cache, metadata, output) is output
    return output


MIXED = [(1, 300), (1, 17), (200, 400), (20, 20), (130, 130), (30, 90), (64, 512), (70, 333)]


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("selection", ["exact", "int8"])
def test_minus_infinity_gives_dense_attention_of_mixed_steps(
    tmp_path: Path, padding: int, selection: str
) -> None:
    impl, step = OurImpl(), Step(MIXED, padding)
    engine, builder = made(tmp_path, -torch.inf, impl, selection=selection)
    metadata = builder.build(0, step.common)
    torch.testing.assert_close(run(impl, step, metadata), step.expected(), atol=2e-6, rtol=1e-5)
    assert impl.tokens == 1 + 1 + 20 + 30
    assert engine.calls == {
        selection: 4,
        "int8" if selection == "exact" else "exact": 0,
        Reason.PART_OF_BLOCK: 1,
        Reason.DECODE: 2,
        Reason.TOO_SHORT: 1,
    }
    statistics = engine.state.statistics
    assert statistics.kept_fraction[0] == 1
    assert statistics.visible_blocks[1] == 0


def test_blocks_are_skipped_and_counted_by_their_absolute_position(tmp_path: Path) -> None:
    impl = OurImpl()
    engine, builder = made(tmp_path, torch.inf, impl)
    step = Step([(256, 1024)])
    output = run(impl, step, builder.build(0, step.common))
    # Four blocks of queries keep their diagonal alone, of 13 to 16 that they see.
    assert engine.state.statistics.kept_blocks[0].tolist() == [4] * standins.HEADS
    assert engine.state.statistics.visible_blocks[0] == 13 + 14 + 15 + 16
    assert not torch.allclose(output, step.expected())
    assert not output.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selection", ["exact", "int8"])
def test_sinks_join_the_softmax_of_every_row(
    tmp_path: Path, selection: str, dtype: torch.dtype
) -> None:
    impl, step = OurImpl(sinks=torch.full((standins.HEADS,), torch.nan, dtype=dtype)), Step(MIXED)
    _, builder = made(tmp_path, -torch.inf, impl, selection=selection)
    metadata = builder.build(0, step.common)
    # Weights are loaded into the parameter after the layer was made.
    sinks = torch.tensor([-30.0, -torch.inf, 2.3, 30.0]).to(dtype)
    impl.sinks.copy_(sinks)
    found, expected = run(impl, step, metadata), step.expected(sinks)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(found[:, 2], step.expected()[:, 2], atol=0.01)
    # A query that sees one key, in a call that is block-sparse: a share of its value.
    assert found[222 + 0 : 222 + 1, 3].abs().max() < 1e-9


def test_sinks_keep_what_falls_below_them_from_being_kept(tmp_path: Path) -> None:
    kept = {}
    for sink in (-torch.inf, 5.0):
        impl, step = OurImpl(sinks=torch.full((standins.HEADS,), sink)), Step([(512, 512)])
        engine, builder = made(tmp_path, -0.5, impl)
        output = run(impl, step, builder.build(0, step.common))
        kept[sink] = engine.state.statistics.kept_fraction[0]
        expected = reference.attention(
            step.query[None],
            *(x[None] for x in step.keys_and_values(0)),
            torch.full((standins.HEADS, 1), -0.5),
            rule="peak_lse",
            geometry=Geometry(64, 64),
            sinks=impl.sinks,
            compute_dtype=torch.float64,
        )
        torch.testing.assert_close(output.double(), expected.out[0], atol=2e-6, rtol=1e-5)
        assert kept[sink] == pytest.approx(float(expected.kept.sum()) / (4 * 36))
    assert kept[5.0] < kept[-torch.inf] < 1


def chunk_of(prompt: int, first: int, last: int) -> Step:
    """The step that runs the queries from first to last of a prompt, and no other."""
    step = Step([(prompt, prompt)], seed=3)
    step.common.query_start_loc = torch.tensor([0, last - first], dtype=torch.int32)
    step.common.query_start_loc_cpu = step.common.query_start_loc
    step.common.seq_lens = torch.tensor([last], dtype=torch.int32)
    step.common.seq_lens_cpu_upper_bound = step.common.seq_lens
    step.common.num_actual_tokens = last - first
    step.common.slot_mapping = step.common.slot_mapping[first:last]
    step.query = step.query[first:last]
    return step


@pytest.mark.parametrize("value", [-torch.inf, -1.0])
@pytest.mark.parametrize("seed", range(8))
def test_chunks_cut_at_random_give_what_the_whole_prompt_does(
    tmp_path: Path, seed: int, value: float
) -> None:
    """But for the blocks that are cut, and a rest shorter than a block, which is dense."""
    impl, prompt, block = OurImpl(), 700, 64
    engine, builder = made(tmp_path, value, impl)
    whole = Step([(prompt, prompt)], seed=3)
    expected, dense = run(impl, whole, builder.build(0, whole.common)), whole.expected()
    draws = random.Random(seed)
    cuts = [0, *sorted(draws.sample(range(1, prompt), draws.randrange(1, 7))), prompt]
    if seed % 2:  # whole blocks alone
        cuts = sorted({*(cut // block * block for cut in cuts), prompt})
    for first, last in itertools.pairwise(cuts):
        chunk = chunk_of(prompt, first, last)
        output = run(impl, chunk, builder.build(0, chunk.common))
        place = torch.arange(first, last) // block
        ends = ((place + 1) * block).clamp_max(prompt)
        same = (place * block >= first) & (ends <= last) | (value == -torch.inf)
        if first > 0 and last - first < block:
            torch.testing.assert_close(output, dense[first:last], atol=2e-6, rtol=1e-5)
            continue
        torch.testing.assert_close(output[same], expected[first:last][same], atol=2e-6, rtol=1e-5)
        assert output.isfinite().all()
    assert engine.calls["exact"] > 1


def test_steps_without_anything_to_skip_are_vllms_alone(tmp_path: Path) -> None:
    impl, step = OurImpl(), Step([(1, 300), (1, 64), (50, 50)])
    engine, builder = made(tmp_path, 0.0, impl)
    metadata = builder.build(7, step.common)
    assert not hasattr(metadata, PLAN)
    assert metadata.prefix == 7
    assert builder.built == [(3, False)]
    torch.testing.assert_close(run(impl, step, metadata), step.expected())
    assert engine.calls[Reason.DECODE] == 2
    assert engine.state.statistics.sparse_calls == 0


def test_short_rows_next_to_each_other_share_a_call(tmp_path: Path) -> None:
    impl, step = OurImpl(), Step([(1, 9), (1, 300), (40, 40), (256, 256), (30, 30)])
    _, builder = made(tmp_path, 0.0, impl)
    metadata = builder.build(0, step.common)
    # The whole step for layers that run dense, then its parts, without a schedule made ahead.
    assert builder.built == [(5, False), (3, True), (1, True)]
    plan = getattr(metadata, PLAN)
    assert [part.selection for part in plan.parts] == [None, "exact", None]
    assert [part.metadata.max_num_splits for part in plan.parts if part.metadata] == [0, 0]


def test_layers_that_run_dense_are_counted_with_the_reason(tmp_path: Path) -> None:
    able, window = OurImpl(), OurImpl(sliding_window=(127, 0))
    engine, builder = made(tmp_path, torch.inf, able, window)
    step = Step([(256, 256), (1, 40)])
    metadata = builder.build(0, step.common)
    assert run(window, step, metadata, layer=1).allclose(step.expected(), atol=1e-6)
    assert window.tokens == 257
    assert engine.dense_layers == {1: Reason.SLIDING_WINDOW}
    assert engine.calls[Reason.SLIDING_WINDOW] == 2
    assert engine.calls["exact"] == engine.calls[Reason.DECODE] == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"causal": False}, Reason.NOT_CAUSAL),
        ({"causal": torch.tensor([True])}, Reason.NOT_CAUSAL),
        ({"mm_req_doc_ranges": {0: [], 1: [(0, 9)]}}, Reason.OWN_MASK),
        ({"seq_lens_cpu_upper_bound": None}, Reason.UNKNOWN_LENGTHS),
    ],
)
def test_other_masks_are_vllms(tmp_path: Path, changes: dict[str, Any], reason: Reason) -> None:
    impl = OurImpl()
    engine, builder = made(tmp_path, torch.inf, impl)
    step = Step([(256, 256), (1, 9)], padding=2)
    for name, value in changes.items():
        setattr(step.common, name, value)
    assert not hasattr(builder.build(0, step.common), PLAN)
    assert +engine.calls == {reason: 2}


def test_rows_of_text_have_no_mask_of_their_own(tmp_path: Path) -> None:
    _, builder = made(tmp_path, torch.inf, OurImpl())
    step = Step([(256, 256)], changes={"mm_req_doc_ranges": {0: []}})
    assert hasattr(builder.build(0, step.common), PLAN)


def test_rows_that_pad_a_graph_may_have_no_flag(tmp_path: Path) -> None:
    engine, builder = made(tmp_path, torch.inf, OurImpl())
    flags = torch.zeros(3, dtype=torch.bool)
    step = Step([(1, 300)] * 3, padding=1, changes={"is_prefilling": flags})
    assert not hasattr(builder.build(0, step.common), PLAN)
    assert +engine.calls == {Reason.DECODE: 3}


def test_steps_before_the_engine_serves_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impl, noted = OurImpl(), list[Engine]()
    monkeypatch.setattr("bsfa_vllm.splitting.changed", noted.append)
    engine, builder = made(tmp_path, torch.inf, impl)
    # Dummies have all their keys in the step, and are no prompts.
    dummy = Step([(300, 300)], changes={"is_prefilling": torch.tensor([False])})
    assert not hasattr(builder.build(0, dummy.common), PLAN)
    step = Step([(300, 300)], changes={"is_prefilling": torch.tensor([True])})

    def compile_or_warm_up_model() -> None:
        run(impl, step, builder.build(0, step.common))

    compile_or_warm_up_model()
    served = [engine.served]
    assert not engine.calls
    assert not noted
    assert engine.state.statistics.sparse_calls == 0
    run(impl, step, builder.build(0, step.common))
    assert +engine.calls == {"exact": 1}
    assert [*served, engine.served] == [False, True]
    assert noted == [engine]
    assert engine.state.statistics.sparse_calls == 1


def test_a_model_without_a_layer_to_run_block_sparse_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    impl = OurImpl(sliding_window=(127, 0))
    engine, builder = made(tmp_path, torch.inf, impl)
    step = Step([(256, 256)])
    with caplog.at_level("WARNING", logger="vllm.bsfa"):
        for _ in range(2):
            assert not hasattr(builder.build(0, step.common), PLAN)
    assert caplog.messages == ["BSFA: no layer can run block-sparse: sliding-window layer"]
    # The whole step, and no part of it.
    assert builder.built == [(1, False)] * 2
    assert +engine.calls == {Reason.SLIDING_WINDOW: 2}


def test_a_layer_without_a_number_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    impl = OurImpl()
    _, builder = made(tmp_path, torch.inf, impl)
    layers = {"model.attn": SimpleNamespace(impl=impl)}
    with caplog.at_level("WARNING", logger="vllm.bsfa"):
        builder.prepare(layers, standins.SPEC, torch.float32)
    assert caplog.messages[0].endswith("do not hold one number: model.attn")


def test_a_window_that_the_builder_alone_knows_is_vllms(tmp_path: Path) -> None:
    impl = OurImpl()
    engine, builder = made(tmp_path, torch.inf, impl)
    # Every step of the newer runner has lengths of prompts; they mean something with a window.
    step = Step([(256, 256)], changes={"rswa_prefix_lens": torch.tensor([256])})
    assert hasattr(builder.build(0, step.common), PLAN)
    builder.rswa_window = 128  # type: ignore[attr-defined]
    assert not hasattr(builder.build(0, step.common), PLAN)
    chunked = SimpleNamespace(head_size=64, attention_chunk_size=8192)
    builder.prepare({"layers.0.attn": SimpleNamespace(impl=impl)}, chunked, torch.float32)
    assert engine.dense_layers == {0: Reason.SLIDING_WINDOW}
    assert run(impl, step, builder.build(0, step.common)).allclose(step.expected(), atol=1e-6)


def test_other_pages_of_the_same_step(tmp_path: Path) -> None:
    impl = OurImpl()
    engine, builder = made(tmp_path, -torch.inf, impl)
    step, other = Step([(1, 100), (256, 256)]), Step([(1, 100), (256, 256)], seed=5)
    metadata = builder.build(0, step.common)
    changed = builder.update_block_table(
        metadata, other.common.block_table_tensor, other.common.slot_mapping
    )
    other.query = step.query
    torch.testing.assert_close(run(impl, other, changed), other.expected(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(run(impl, step, metadata), step.expected(), atol=2e-6, rtol=1e-5)
    assert engine.calls["exact"] == 2


def test_pages_of_a_builder_without_an_engine(tmp_path: Path) -> None:
    impl, other = OurImpl(), OurBuilder()
    engine, builder = made(tmp_path, torch.inf, impl)
    other.prepare({}, standins.SPEC, torch.float32)
    step = Step([(256, 256)])
    metadata = builder.build(0, step.common)
    changed = other.update_block_table(
        metadata, step.common.block_table_tensor, step.common.slot_mapping
    )
    assert not hasattr(changed, PLAN)
    assert engine.calls["exact"] == 1


@pytest.mark.parametrize("rows", [[(1, 100), (1, 64)], [(1, 100), (256, 256)]])
def test_groups_of_layers_that_share_metadata_are_all_counted(
    tmp_path: Path, rows: list[tuple[int, int]]
) -> None:
    """vLLM makes it once for groups of one kind: of the first, whose layers may all run dense."""
    window, able = OurImpl(sliding_window=(127, 0)), OurImpl()
    engine, builder = made(tmp_path, torch.inf, window)
    able.attach(engine)
    other = OurBuilder()
    other.prepare({"layers.1.attn": SimpleNamespace(impl=able)}, standins.SPEC, torch.float32)
    step = Step(rows, seed=5)
    metadata = builder.build(0, step.common)
    common = step.common
    table, slots = common.block_table_tensor, common.slot_mapping
    # Pages of another group, in which the same keys lie elsewhere.
    count = len(step.cache)
    turned = torch.where(table < count, count - 1 - table, table)
    changed = other.update_block_table(metadata, turned, slots)
    flipped = step.cache.flip(0)
    step.cache, cache = flipped, step.cache
    output = run(able, step, changed, layer=1)
    step.cache = cache
    torch.testing.assert_close(output[:1], step.expected()[:1])
    assert engine.calls[Reason.SLIDING_WINDOW] == 2
    assert engine.calls[Reason.DECODE] + engine.calls["exact"] == 2
    sparse = rows[1][0] > 1
    assert hasattr(changed, PLAN) == sparse
    assert not hasattr(metadata, PLAN)
    assert able.tokens == (1 if sparse else 2)
    assert engine.state.statistics.visible_blocks == [0, 10 if sparse else 0]


def test_capture_profiling_and_fused_scales_are_vllms(tmp_path: Path) -> None:
    impl, step = OurImpl(), Step([(256, 256)])
    engine, builder = made(tmp_path, torch.inf, impl)
    assert not hasattr(builder.build_for_cudagraph_capture(step.common), PLAN)
    assert not engine.calls
    assert run(impl, step, None).eq(0).all()
    scale = torch.ones(())
    layer = SimpleNamespace(layer_name="model.layers.0.self_attn.attn")
    with pytest.raises(NotImplementedError, match="fused output"):
        impl.forward(
            layer,
            step.query,
            None,
            None,
            step.cache,
            builder.build(0, step.common),
            step.query,
            scale,
        )


def test_without_a_table_nothing_is_changed() -> None:
    impl, step = OurImpl(), Step([(256, 256)])
    impl.attach(None)
    builder = OurBuilder()
    layers = {"model.layers.0.attn": SimpleNamespace(impl=impl)}
    builder.prepare(layers, standins.SPEC, torch.float32)
    metadata = builder.build(0, step.common)
    torch.testing.assert_close(run(impl, step, metadata), step.expected())
    assert impl.tokens == 256


def test_layers_beyond_the_table_are_vllms(tmp_path: Path) -> None:
    impl, step = OurImpl(), Step([(256, 256)])
    _, builder = made(tmp_path, torch.inf, impl)
    metadata = builder.build(0, step.common)
    # A draft head that predicts further tokens is numbered after the model's layers.
    torch.testing.assert_close(run(impl, step, metadata, layer=7), step.expected())
