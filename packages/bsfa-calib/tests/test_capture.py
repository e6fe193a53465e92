# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Measuring models: the model is unharmed, and the numbers are those of its attention."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bsfa_kernel
from bsfa_calib import estimate, hook, recording
from bsfa_calib.capture import CaptureError, Progress, Recorder, Settings, calibrate, capturing
from bsfa_calib.report import verdict
from bsfa_kernel import DEFAULT_GEOMETRY
from bsfa_kernel.geometry import count_visible
from tiny_calib import HEADS, LAYERS, random_tokens, tiny_model

MLA = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}
GPT_OSS = {
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "sliding_window": 200,
    "layer_types": ["full_attention"] * 2,
}

SAMPLES = [random_tokens(1024, 0), random_tokens(900, 1), random_tokens(640, 2)]


def recorder_into(maxima: dict[int, torch.Tensor], rule: str = "absolute") -> Recorder:
    return Recorder(rule, 128, 64, maxima.__setitem__)


def run(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("llama", {}),
        ("qwen2", {"head_dim": 16}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": None}),
        ("phi3", {"sliding_window": None}),
        ("gemma3_text", {"sliding_window": 4096, "query_pre_attn_scalar": 16}),
    ],
)
def test_any_decoder_is_measured_and_answers_as_before(kind: str, extra: dict[str, Any]) -> None:
    model = tiny_model(kind, **extra)
    before = run(model, SAMPLES[0])
    implementation = model.config._attn_implementation
    maxima: dict[int, torch.Tensor] = {}
    with capturing(model, recorder_into(maxima)):
        within = run(model, SAMPLES[0])
    assert sorted(maxima) == [0, 1]
    assert maxima[0].shape == (HEADS, 8, 16)
    assert torch.equal(before, within)
    assert model.config._attn_implementation == implementation
    assert torch.equal(before, run(model, SAMPLES[0]))


@pytest.mark.parametrize("rule", bsfa_kernel.RULES)
def test_maxima_are_those_of_the_layers_queries_and_keys(model: Any, rule: str) -> None:
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb

    def spy(q: torch.Tensor, k: torch.Tensor, *rest: Any, **options: Any) -> Any:
        result = original(q, k, *rest, **options)
        seen[len(seen)] = result
        return result

    maxima: dict[int, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch, capturing(model, recorder_into(maxima, rule)):
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", spy)
        run(model, SAMPLES[1])
    for layer, (q, k) in seen.items():
        expected = bsfa_kernel.reference.block_maxima(
            q.transpose(1, 2), k.transpose(1, 2), rule=rule
        )
        torch.testing.assert_close(maxima[layer], expected[0])


@pytest.mark.parametrize("voters", [1, 4])
@pytest.mark.parametrize("rule", bsfa_kernel.RULES)
def test_maxima_are_over_references_that_begin_with_the_sink(rule: str, voters: int) -> None:
    model = gpt_oss(layer_types=["sliding_attention", "full_attention"])
    maxima: dict[int, torch.Tensor] = {}
    recorder = Recorder(rule, 128, 64, maxima.__setitem__, voters)
    given: list[Any] = []

    def looking(*arguments: Any) -> None:
        given.append(arguments)
        recorder(*arguments)

    with hook.applied(model, looking):
        run(model, SAMPLES[2])
    ((q, k, _, layer, scale, sinks),) = given
    assert (layer, sorted(maxima)) == (1, [1])
    group = q.shape[2] // k.shape[2]
    q, k = q[0].double(), k[0].double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores.masked_fill_(torch.ones(640, 640).triu(1).bool(), -torch.inf)
    peaks = scores.view(HEADS, 640, 10, 64).amax(-1)
    reference = sinks.double()[:, None].expand(HEADS, 640)
    expected = torch.empty(HEADS, 5, 10, dtype=torch.float64)
    for column in range(9, -1, -1):
        peak = peaks[..., column]
        over = peak - (0 if rule == "absolute" else reference)
        by_block = over.view(HEADS, 5, 128)
        expected[..., column] = by_block[:, :, voters - 1 :: voters].amax(-1)
        expected[:, -1, column] = by_block[:, -1].amax(-1)
        reference = (
            torch.maximum(reference, peak)
            if rule == "running_max"
            else torch.logaddexp(reference, peak)
        )
    found = maxima[1].double()
    seen = expected > -torch.inf
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-5, atol=1e-4)
    assert (found[~seen] == -torch.inf).all()


def test_thresholds_for_k_hold_with_sinks_and_leave_windows_out() -> None:
    model = gpt_oss(layer_types=["sliding_attention", "full_attention"])
    model.model.layers[1].self_attn.sinks.data = torch.tensor([-30.0, 20.0, 30.0, 40.0])
    table = calibrate(model, SAMPLES, k_values=[2, 4], rule="peak_lse")
    assert table.provenance["dense_layers"] == "layers 0: sliding-window layer"
    assert np.isneginf(table.thresholds[:, 0]).all()
    np.testing.assert_allclose(table.statistics["kept"][0, 1], 2, rtol=1e-6)
    unsunk = gpt_oss(layer_types=["sliding_attention", "full_attention"])
    unsunk.model.layers[1].self_attn.sinks.data.fill_(-torch.inf)
    other = calibrate(unsunk, SAMPLES, k_values=[2, 4], rule="peak_lse")
    last = table.thresholds[:, 1, :, -1] - other.thresholds[:, 1, :, -1]
    # Above a higher reference lies less; a sink far below all scores changes nothing.
    np.testing.assert_allclose(last[:, 0], 0, atol=1e-5)
    assert (np.diff(last[:, 1:]) < -1).all()


@pytest.mark.parametrize("sink", [float("nan"), float("inf")])
def test_sinks_that_are_no_numbers_are_refused(sink: float) -> None:
    model = gpt_oss()
    model.model.layers[1].self_attn.sinks.data[2] = sink
    with pytest.raises(CaptureError, match="layer 1 gives NaN scores"):
        calibrate(model, SAMPLES, k_values=[2], rule="peak_lse")


@pytest.mark.parametrize("points", [{"k_values": [1, 2]}, {"target_sparsities": [0.3]}])
def test_layers_may_be_reduced_together_or_one_by_one(
    model: Any, points: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    together = calibrate(model, SAMPLES, checkpoint=tmp_path / "together", **points)
    monkeypatch.setattr(recording, "_MAXIMA_TOGETHER", 0)
    one_by_one = calibrate(model, SAMPLES, **points)
    assert np.array_equal(together.thresholds, one_by_one.thresholds)
    found_again = calibrate(model, SAMPLES, checkpoint=tmp_path / "together", **points)
    assert np.array_equal(together.thresholds, found_again.thresholds)


def test_the_model_is_restored_after_an_error(model: Any) -> None:
    def fail(layer: int, maxima: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), capturing(model, Recorder("absolute", 128, 64, fail)):
        run(model, SAMPLES[2])
    assert model.config._attn_implementation == "sdpa"
    run(model, SAMPLES[2])


def test_the_attention_function_is_of_no_use_outside(model: Any) -> None:
    with capturing(model, recorder_into({})):
        pass
    model.set_attn_implementation(hook.ATTENTION_NAME)
    try:
        with pytest.raises(RuntimeError, match="works within"):
            run(model, SAMPLES[2])
    finally:
        model.set_attn_implementation("sdpa")


def test_mean_kept_is_k_on_the_samples_and_the_attention_agrees(model: Any) -> None:
    ks = [1, 2, 4, 6]
    table = calibrate(model, SAMPLES, k_values=ks, held_out=[random_tokens(1024, 7)])
    assert table.thresholds.shape == (4, LAYERS, HEADS, 8)
    assert (table.k_values, table.samples, table.max_seqlen) == ((1, 2, 4, 6), 3, 1024)
    for point, k in enumerate(ks):
        np.testing.assert_allclose(table.statistics["kept"][point], k, rtol=1e-6)
    assert set(table.statistics) == {"kept", "sparsity", "held_out_kept", "held_out_sparsity"}

    # The same, counted in the attention itself, on the queries and keys of the first layer.
    total, blocks = 0, 0
    for tokens in SAMPLES:
        recorded: dict[int, Any] = {}
        with capturing(model, recorder_into(recorded)):
            run(model, tokens)
        unforced = estimate.unforced_blocks(len(tokens), DEFAULT_GEOMETRY)
        hidden = recorded[0].masked_fill(
            torch.arange(recorded[0].shape[-1]) >= torch.from_numpy(unforced)[:, None], -torch.inf
        )
        thresholds = torch.from_numpy(table.select(k=4)[0].copy())[:, : len(unforced)]
        kept = (hidden >= thresholds[..., None].clamp(min=-1e30)).sum(-1)
        total += int(kept[:, unforced > 4].sum())
        blocks += HEADS * int((unforced > 4).sum())
    assert total / blocks == pytest.approx(4)


@pytest.mark.parametrize("aggregate", ["mean", "median", "quantile:0.4"])
def test_other_aggregates_come_close_to_k(model: Any, aggregate: str) -> None:
    table = calibrate(model, SAMPLES, k_values=[2, 4], aggregate=aggregate)
    assert table.aggregate == aggregate
    np.testing.assert_allclose(np.nanmean(table.statistics["kept"], (1, 2)), [2, 4], rtol=0.4)


def gpt_oss(**extra: Any) -> Any:
    """A model with a sink among each head's scores, and one far below and above them."""
    model = tiny_model("gpt_oss", implementation="eager", **(GPT_OSS | extra))
    for layer in model.model.layers:
        layer.self_attn.sinks.data = torch.tensor([-30.0, 1.0, 4.0, 8.0])
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
@pytest.mark.parametrize(
    ("rule", "voters"), [("absolute", 1), ("running_max", 1), ("peak_lse", 1), ("peak_lse", 4)]
)
def test_a_scalar_meets_its_target_sparsity(kind: str, rule: str, voters: int) -> None:
    model = gpt_oss() if kind == "gpt_oss" else tiny_model()
    targets = [0.2, 0.4, 0.6]
    table = calibrate(
        *(model, SAMPLES),
        target_sparsities=targets,
        rule=rule,
        voters=voters,
        held_out=[random_tokens(1024, 7)],
    )
    assert (table.rule, table.voters) == (rule, voters)
    assert (table.axis, table.points, table.rows) == ("target_sparsity", tuple(targets), 1)
    assert len(np.unique(table.thresholds)) == 3
    predicted = table.statistics["sparsity"].mean(axis=(1, 2))
    np.testing.assert_allclose(predicted, targets, atol=2e-3)

    kept = np.zeros(3)
    visible = 0
    for tokens in SAMPLES:
        visible += count_visible(len(tokens), len(tokens)) * HEADS * LAYERS
        kept += _kept_with(model, tokens, table.thresholds[:, 0, 0, 0], rule, voters)
    np.testing.assert_allclose(1 - kept / visible, targets, atol=2e-3)


def _kept_with(
    model: Any, tokens: list[int], scalars: np.ndarray, rule: str, voters: int
) -> np.ndarray:
    """Blocks that attention with scalar thresholds keeps of each layer's queries and keys."""
    kept = np.zeros(len(scalars))

    def counting(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        scale: float,
        sinks: torch.Tensor | None,
    ) -> None:
        for index, scalar in enumerate(scalars):
            thresholds = torch.full((q.shape[2], 1), float(scalar))
            result = bsfa_kernel.reference.attention(
                *(q, k, v, thresholds), scale=scale, rule=rule, voters=voters, sinks=sinks
            )
            kept[index] += int(result.kept.sum())

    with hook.applied(model, counting):
        run(model, tokens)
    return kept


def test_layers_with_a_window_stay_dense_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(
        "gemma3_text",
        sliding_window=256,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    with caplog.at_level(logging.WARNING):
        table = calibrate(model, SAMPLES, k_values=[2])
    assert np.isneginf(table.thresholds[:, 0]).all()
    assert np.isfinite(table.thresholds[:, 1, :, -1]).all()
    assert np.isnan(table.statistics["kept"][:, 0]).all()
    assert not table.statistics["sparsity"][:, 0].any()
    assert table.provenance["dense_layers"] == "layers 0: sliding-window layer"
    assert "these run dense and are counted so: layers 0" in caplog.text
    assert "These run dense and skip nothing: layers 0: sliding-window" in verdict(table)[0]


def test_a_model_with_windows_everywhere_is_refused() -> None:
    model = tiny_model("mistral", sliding_window=256)
    with pytest.raises(CaptureError, match="all run dense: layers 0, 1: sliding-window"):
        calibrate(model, SAMPLES, k_values=[2])


@pytest.mark.parametrize(
    ("kind", "extra", "reason"),
    [
        ("gemma2", {"sliding_window": 4096, "query_pre_attn_scalar": 16}, "soft-capped scores"),
        ("deepseek_v3", MLA, "keys and values differ in head_dim"),
    ],
)
def test_a_model_that_will_run_dense_is_promised_nothing(
    kind: str, extra: dict[str, Any], reason: str
) -> None:
    model = tiny_model(kind, implementation="eager" if kind != "deepseek_v3" else "sdpa", **extra)
    before = run(model, SAMPLES[2])
    with pytest.raises(CaptureError, match=f"all run dense: layers 0, 1: {reason}"):
        calibrate(model, SAMPLES, k_values=[2])
    assert model.config._attn_implementation != hook.ATTENTION_NAME
    with capturing(model, recorder_into({})) as meter:
        torch.testing.assert_close(run(model, SAMPLES[2]), before, rtol=1e-4, atol=1e-4)
    assert meter.dense_layers == {0: reason, 1: reason}


def test_a_model_that_passes_what_nobody_knows_is_refused_by_name() -> None:
    model = tiny_model(
        "minimax_m3_vl_text",
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["minimax_m3_sparse", "full_attention"],
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=16,
        index_topk_blocks=3,
        index_local_blocks=1,
    )
    with pytest.raises(hook.HookError, match="passes block_indices to its attention function"):
        calibrate(model, SAMPLES, k_values=[2])
    assert model.config._attn_implementation == "sdpa"


def test_nan_scores_are_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(CaptureError, match="layer 1 gives NaN scores"):
        calibrate(model, SAMPLES, k_values=[2])


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {"k_values": [2]}, "at least one sample"),
        ([[5] * 900, []], {"k_values": [2]}, "a sample is empty"),
        (SAMPLES, {"k_values": [2], "held_out": [[]]}, "a held-out sample is empty"),
        ([[5] * 200], {"k_values": [2, 3]}, "no query block has more than 2 blocks"),
        ([[5] * 100], {"target_sparsities": [0.5]}, "no block may be skipped"),
        (SAMPLES, {}, "either k_values or target_sparsities"),
        (SAMPLES, {"k_values": [2], "target_sparsities": [0.5]}, "either k_values or"),
        (SAMPLES, {"k_values": [0]}, "k_values must be integers of at least 1"),
        (SAMPLES, {"k_values": [2], "keep_maxima": 2}, "keep_maxima must be greater than k=2"),
        (SAMPLES, {"k_values": [2], "aggregate": "mode"}, "aggregate must be one of"),
        (SAMPLES, {"k_values": [2], "rule": "always"}, "rule"),
        (SAMPLES, {"target_sparsities": [0.99]}, "cannot be reached"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    model: Any, samples: list[list[int]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(model, samples, **options)


def test_an_interrupted_calibration_goes_on_where_it_was(model: Any, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop_after_two(progress: Progress) -> None:
        if progress.layer is None and progress.sample == 2:
            raise StopError

    with pytest.raises(StopError):
        calibrate(model, SAMPLES, k_values=[2], checkpoint=tmp_path, progress=stop_after_two)
    seen: list[Progress] = []
    table = calibrate(model, SAMPLES, k_values=[2], checkpoint=tmp_path, progress=seen.append)
    done = [progress for progress in seen if progress.layer is None]
    assert [progress.resumed for progress in done] == [True, True, False]
    assert [p.layer for p in seen if p.layer is not None] == [1, 2]
    fresh = calibrate(model, SAMPLES, k_values=[2])
    np.testing.assert_array_equal(table.thresholds, fresh.thresholds)


def test_a_damaged_or_foreign_checkpoint_is_measured_again(model: Any, tmp_path: Path) -> None:
    calibrate(model, SAMPLES, k_values=[2], checkpoint=tmp_path)
    first, second, _ = sorted(tmp_path.iterdir())
    first.write_bytes(first.read_bytes()[:500])
    second.write_bytes(b"")
    seen: list[Progress] = []
    calibrate(model, SAMPLES, k_values=[2], checkpoint=tmp_path, progress=seen.append)
    assert sum(p.resumed for p in seen if p.layer is None) == 1
    # Another model must not be given this one's measurements.
    seen.clear()
    other = tiny_model()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    calibrate(other, SAMPLES, k_values=[2], checkpoint=tmp_path, progress=seen.append)
    assert not any(p.resumed for p in seen)


@pytest.mark.parametrize("points", [{"k_values": [2]}, {"target_sparsities": [0.5]}])
def test_a_flipped_bit_in_a_checkpoint_is_measured_again(
    model: Any, tmp_path: Path, points: dict[str, Any]
) -> None:
    whole = calibrate(model, SAMPLES, checkpoint=tmp_path, **points)
    first, second, third = sorted(tmp_path.iterdir())
    for path, flipped, by in ((first, -1, 0x40), (second, -200, 1)):
        content = bytearray(path.read_bytes())
        content[flipped] ^= by
        path.write_bytes(content)
    content = bytearray(third.read_bytes())
    content[content.index(b'"seqlen":"') + 10] ^= 1
    third.write_bytes(content)
    seen: list[Progress] = []
    again = calibrate(model, SAMPLES, checkpoint=tmp_path, progress=seen.append, **points)
    assert [p.resumed for p in seen if p.layer is None] == [False] * 3
    np.testing.assert_array_equal(again.thresholds, whole.thresholds)


def test_samples_of_a_version_without_checksums_are_measured_again(
    model: Any, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    calibrate(model, SAMPLES, k_values=[2], checkpoint=tmp_path)
    for path in tmp_path.iterdir():
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        del metadata["checksum"]
        save_file(tensors, path, metadata)
    seen: list[Progress] = []
    calibrate(model, SAMPLES, k_values=[2], checkpoint=tmp_path, progress=seen.append)
    assert not any(p.resumed for p in seen)


def test_cut_maxima_that_do_not_suffice_are_warned_of(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        calibrate(model, SAMPLES, k_values=[4], keep_maxima=5)
    assert "thresholds may be too low" in caplog.text


def test_settings_come_as_one_value_or_by_name(model: Any) -> None:
    settings = Settings(k_values=[4, 2, 4])
    assert (settings.points, settings.keep) == ((2, 4), 16)
    by_value = calibrate(model, SAMPLES, settings)
    by_name = calibrate(model, SAMPLES, k_values=[2, 4])
    np.testing.assert_array_equal(by_value.thresholds, by_name.thresholds)
    with pytest.raises(TypeError, match="or their fields by name, got both"):
        calibrate(model, SAMPLES, settings, rule="absolute")
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        calibrate(model, SAMPLES, k_value=[2])
