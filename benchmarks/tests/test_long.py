# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Accuracy against time at long lengths, on a tiny model and on records made by hand."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import long
import page
import report
from bsfa_calib import ThresholdTable
from bsfa_calib.hook import Attended
from conftest import attention_record, fake_fa3
from harness import check_record, read_records
from study import curves, lengths, rivals, ruler

WORDS = [f"{a}{b}" for a in ("ash", "bel", "cor", "dun", "elm") for b in "abcdefghijklmnopqrst"]


def heads(seqlen: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q, k and v of four heads and two kv heads."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, seqlen, n, 32, generator=generator) for n in (4, 2, 2))


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention where a query sees the keys of a mask and none after its own."""
    seqlen = q.shape[1]
    seen = seen & torch.ones(seqlen, seqlen, dtype=torch.bool).tril()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.2, enable_gqa=True)
    return out.transpose(1, 2)


def test_a_window_sees_whole_blocks_of_it_and_the_first() -> None:
    q, k, v = heads(640)
    found = rivals.Window(100, sink=64)(q, k, v, 0, 0.2)
    block = torch.arange(640) // 64
    seen = (block >= block[:, None] - 2) | (block == 0)
    torch.testing.assert_close(found.out, masked(q, k, v, seen), rtol=1e-4, atol=1e-5)
    # Ten rows of blocks, of which the last six have one, two, ... six that are not seen.
    assert found.skipped.tolist() == pytest.approx([21 / 55] * 4)
    cached = torch.arange(640.0).view(1, 1, 640, 1)
    left = rivals.Window(100, sink=64).crop(cached)[0, 0, :, 0].tolist()
    assert left == [*range(64), *range(540, 640)]


def test_sparge_attention_is_called_as_its_package_wants() -> None:
    """Its functions take HND, as many heads of keys as of queries, and numbers of Python's own."""
    calls: list[dict[str, Any]] = []

    def kernel(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        simthreshd1: float = -0.1,
        topk: float = 0.5,
        pvthreshd: float = 50,
        tensor_layout: str = "HND",
        output_dtype: torch.dtype = torch.float16,
        return_sparsity: bool = False,
    ) -> Any:
        assert q.shape == k.shape == v.shape == (1, 4, 640, 32)
        assert {type(x) for x in (simthreshd1, topk, pvthreshd)} <= {int, float}
        calls.append({"topk": topk, "layout": tensor_layout, "told": return_sparsity})
        out = scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
        return (out, 0.25) if return_sparsity else out

    q, k, v = heads(640)
    expected = masked(q, k, v, torch.ones(640, 640, dtype=torch.bool))
    for counts in (True, False):
        found = rivals.Sparge(kernel, 0.35, counts)(q, k, v, 0, 0.2)
        torch.testing.assert_close(found.out, expected, rtol=1e-4, atol=1e-5)
        assert found.skipped.shape == (4,)
        assert bool(found.skipped.isnan().all()) == (not counts)
    assert calls == [{"topk": 0.35, "layout": "HND", "told": told} for told in (True, False)]


def test_antidiagonal_sums_are_those_of_the_scores() -> None:
    q, k, _ = heads(256)
    chosen = rivals.Antidiagonal(1.0, stride=16)
    scores = 0.2 * q[0, :, 1] @ k[0, :, 0].T
    sums = torch.zeros(16, 16)
    for row in range(16):
        for column in range(16):
            tile = scores[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            sums[row, column] = tile.flip(0).diagonal().sum() / 16
    hidden = torch.ones(16, 16, dtype=torch.bool).triu(1)
    shares = sums.masked_fill(hidden, -torch.inf).softmax(-1)
    expected = shares.view(2, 8, 2, 8).sum((1, 3)) / 8
    torch.testing.assert_close(chosen._weights(q[0, :, 1], k[0, :, 0], 0.2), expected)


def test_antidiagonal_sums_keep_the_fewest_blocks_that_weigh_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = heads(640)
    everything = rivals.Antidiagonal(1.0)(q, k, v, 0, 0.2)
    seen = torch.ones(640, 640, dtype=torch.bool)
    torch.testing.assert_close(everything.out, masked(q, k, v, seen), rtol=1e-4, atol=1e-5)
    assert everything.skipped.tolist() == [0.0] * 4
    weights = torch.tensor(
        [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.6, 0.3, 0], [0.1, 0.2, 0.6, 0.1]]
    )
    monkeypatch.setattr(rivals.Antidiagonal, "_weights", lambda *_: weights)
    chosen = rivals.Antidiagonal(0.55).choose(q[:, :512], k[:, :512], 0.2)
    assert chosen[0, 0].tril().int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 0, 1, 1],
    ]
    with pytest.raises(ValueError, match="multiple of 128"):
        rivals.Antidiagonal(0.9)(q[:, :500], k[:, :500], v[:, :500], 0, 0.2)


@pytest.mark.parametrize("task", ruler.TASKS)
@pytest.mark.parametrize("length", [512, 3000])
def test_prompts_have_their_length_and_hold_their_answers(
    task: str, length: int, tokenizer: Any, novel: str
) -> None:
    texts = [("novel", tokenizer(novel[:40_000]).input_ids)]
    maker = ruler.Maker(tokenizer, texts, WORDS)
    first = maker.make(task, length, 1, 3)
    assert len(first.ids) == length
    assert maker.make(task, length, 1, 3) == first != maker.make(task, length, 2, 3)
    text = tokenizer.decode(first.ids)
    counts = {"single": 1, "multikey": 1, "multivalue": 4, "multiquery": 4, "variables": 5}
    assert len(first.answers) == {**counts, "common": 10, "frequent": 3}[task]
    assert all(answer in text for answer in first.answers)
    assert (first.depth is None) == (task in ("variables", "common", "frequent"))
    other = dataclasses.replace(maker, seed=3).make(task, length, 1, 3)
    assert (first.name, other.name) == (f"{task} 1", f"{task} 1 of seed 3")
    assert len(other.ids) == length
    assert other.ids != first.ids
    assert other.answers != first.answers


def test_a_single_needle_lies_at_its_depth(tokenizer: Any, novel: str) -> None:
    maker = ruler.Maker(tokenizer, [("novel", tokenizer(novel[:40_000]).input_ids)], WORDS)
    for index in range(5):
        prompt = maker.make("single", 2000, index, 5)
        text = tokenizer.decode(prompt.ids)
        assert text.index(prompt.answers[0]) / len(text) == pytest.approx(index / 4, abs=0.1)
    with pytest.raises(ValueError, match="too few"):
        maker.make("multikey", 100, 0, 1)
    with pytest.raises(ValueError, match="a task is one of"):
        maker.make("haystack", 500, 0, 1)


def test_the_commonest_words_are_asked_for(tokenizer: Any) -> None:
    maker = ruler.Maker(tokenizer, [], WORDS)
    for length in (1000, 4000):
        prompt = maker.make("common", length, 0, 1)
        body = tokenizer.decode(prompt.ids).partition("Question")[0]
        counts = {word: body.count(f" {word} |") for word in WORDS}
        ranked = sorted(counts, key=counts.__getitem__, reverse=True)
        assert set(ranked[:10]) == set(prompt.answers)
        assert counts[ranked[9]] >= 3 * counts[ranked[10]] > 0
        prompt = maker.make("frequent", length, 0, 1)
        words = tokenizer.decode(prompt.ids).partition("Question")[0].split()[5:-1]
        ranked = sorted(set(words), key=words.count, reverse=True)
        assert set(ranked[:3]) == set(prompt.answers)


def test_a_score_is_the_share_of_the_answers() -> None:
    assert ruler.score("it is 12, and Ash.", ["12", "ash", "34", "bel"]) == 0.5
    assert ruler.vocabulary(["The river's banks, a BRIDGE; rivers flow", "banks"]) == [
        "banks",
        "rivers",
    ]


def small(vocabulary: int = 2048) -> Any:
    """A model whose attention is uneven."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.2,
        **options,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def test_prompts_that_are_answered_together_get_their_own_answers(tokenizer: Any) -> None:
    model = small()
    generator = torch.Generator().manual_seed(1)
    every = torch.randint(2048, (3, 200), generator=generator).tolist()
    prompts = [ruler.Prompt("single", "", tuple(ids), ("1",)) for ids in every]
    read = itertools.count(1)

    @contextlib.contextmanager
    def reading() -> Iterator[Any]:
        yield lambda: next(read)

    found = list(ruler.answer(model, tokenizer, prompts, reading, together=2))
    assert [number for _, number in found] == [1, 2, 3]
    for ids, (text, _) in zip(every, found, strict=True):
        inputs = torch.tensor([ids])
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": ruler.ANSWER}
        more = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        expected = tokenizer.decode(more[0, 200:], skip_special_tokens=True)
        assert text == expected.strip().partition("\n")[0]
    window = rivals.Window(64).crop
    cropped = list(ruler.answer(model, tokenizer, prompts, reading, crop=window))
    assert [text for text, _ in cropped] != [text for text, _ in found]


def test_shares_rise_with_the_length_and_leave_what_is_forced() -> None:
    found = [lengths.shares_at(2048 << i, (1.5, 1.0, 0.7)) for i in range(7)]
    assert found[1][1] == pytest.approx(0.72)
    assert all(0 < a < b < 1 for one in found for a, b in itertools.pairwise(one))
    assert all(a[0] < b[0] for a, b in itertools.pairwise(found))
    assert lengths.shares_at(256, (0.1,)) == ()


def test_thresholds_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(-3, 1, (1, 2, 4, 1)).astype(np.float32)
    table = ThresholdTable(
        values, (0.3,), axis="target_sparsity", q_block=64, k_block=64, rule="peak_lse",
        voters=2, max_seqlen=256,
    )  # fmt: skip
    samples = [torch.randint(2048, (512,), generator=torch.Generator().manual_seed(3)).tolist()]

    def made() -> lengths.Candidates:
        return lengths.Candidates(
            small(), samples, tables=[table], shares=(0.2, 0.4), folder=tmp_path
        )

    candidates = made()
    every = candidates.all()
    assert len({one.name for one in every}) == len(every)
    assert every[1].name == "peak_lse, learned at 0.25K, 64x64, 1 in 2"
    methods: dict[str, Any] = {one.name: candidates.method(one, one.points[-1]) for one in every}
    pointed = methods[every[1].name].thresholds
    # A shift of the table's thresholds, up or down.
    shift = pointed.numpy() - values[0]
    assert np.ptp(shift) < 1e-5
    assert methods[every[1].name].voters == 2
    assert torch.isneginf(methods[lengths.CONTROL].thresholds).all()
    fail = lambda *_, **__: pytest.fail("made again")  # noqa: E731
    for name in ("scalar.one_pass", "capture.calibrate", "serving.serve"):
        monkeypatch.setattr(f"study.lengths.{name}", fail)
    again = made()
    for one in again.all():
        if one.prepare is not None and one.name != lengths.CONTROL:
            kept: Any = again.method(one, one.points[-1])
            assert torch.equal(kept.thresholds, methods[one.name].thresholds)


def a_table(path: Path, seed: int, **changes: Any) -> Path:
    """A table for the small model, as if learned at 256 tokens."""
    values = np.random.default_rng(seed).normal(-3, 1, (1, 2, 4, 1)).astype(np.float32)
    how: dict[str, Any] = {"q_block": 64, "k_block": 64, "rule": "peak_lse", "max_seqlen": 256}
    ThresholdTable(values, (0.3,), axis="target_sparsity", **{**how, **changes}).save(path)
    return path


def test_other_thresholds_and_other_origins_are_measured_anew(folder: Path) -> None:
    one, other = (a_table(folder / f"{seed}.safetensors", seed) for seed in range(2))
    (folder / "calibration-2").mkdir()
    novels = (folder / "calibration" / "c.txt").read_text()
    (folder / "calibration-2" / "c.txt").write_text(novels[12_000:])
    out = folder / "long.jsonl"

    def measured(*more: str) -> list[Any]:
        before = len(list(read_records(out))) if out.exists() else 0
        options = ["--prompts", "0", "--only", "learned", "1 in 4", "--shares", "0.3"]
        assert long.main([*words(folder), *options, *more]) == 0
        return list(read_records(out))[before:]

    first = measured("--tables", str(one))
    assert [record["candidate"] for record in first] == [
        *("dense", "peak_lse, learned at 0.25K, 64x64", "peak_lse, one scalar, 128x64, 1 in 4")
    ]
    assert measured("--tables", str(one)) == []
    (of_other,) = measured("--tables", str(other))
    assert of_other["candidate"] == first[1]["candidate"]
    assert of_other["kl"] != first[1]["kl"]
    for more in (
        ["--selection", "int8"],
        ["--calibration-text", str(folder / "calibration-2")],
        ["--calibration-samples", "2"],
    ):
        again = measured("--tables", str(one), *more)
        assert [record["candidate"] for record in again] == [r["candidate"] for r in first[1:]]
        assert measured("--tables", str(one), *more) == []


def test_two_tables_of_one_name_are_refused(folder: Path) -> None:
    tables = [str(a_table(folder / f"{seed}.safetensors", seed)) for seed in range(2)]
    with pytest.raises(ValueError, match=r"got two of 'peak_lse, learned at 0.25K, 64x64'"):
        long.main(words(folder, "--tables", *tables))
    a_table(folder / "1.safetensors", 1, max_seqlen=512)
    assert long.main(words(folder, "--prompts", "0", "--only", "0.5K", "--tables", *tables)) == 0


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any, novel: str) -> Path:
    """A model, text to measure on and text to calibrate on."""
    small().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for index, name in enumerate(("novels/emma", "novels/mansfieldpark", "essays/a", "code/b")):
        path = tmp_path / "text" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(novel[12_000 * index : 12_000 * (index + 1)])
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "c.txt").write_text(novel[60_000:90_000])
    return tmp_path


def words(folder: Path, *more: str) -> list[str]:
    found = ["--model", str(folder / "model"), "--text", str(folder / "text")]
    found += ["--calibration-text", str(folder / "calibration"), "--device", "cpu"]
    found += ["--dtype", "float32", "--length", "512", "--samples", "2", "--shares", "0.2,0.4"]
    found += ["--repetitions", "1", "--calibration-samples", "1", "--voters", "1,4"]
    return [*found, "--out", str(folder / "long.jsonl"), *more]


def test_every_candidate_is_measured_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompts", "1", "--depths", "2", "--tasks", "single,variables"]
    assert long.main(words(folder, *options)) == 0
    assert "SpargeAttention is left out" in capsys.readouterr().err
    records = list(read_records(folder / "long.jsonl"))
    text = [record for record in records if record["kind"] == "long_text"]
    by_name: dict[str, list[Any]] = {}
    for record in text:
        by_name.setdefault(record["candidate"], []).append(record)
    assert set(by_name) == {
        *("dense", lengths.CONTROL, "peak_lse, one scalar, 128x64"),
        *("peak_lse, one scalar, 128x64, 1 in 4", "running_max, one scalar, 128x64"),
        *("absolute, k blocks, 128x64", "sliding window and sink"),
        "antidiagonal sums (XAttention)",
    }
    (control,) = by_name[lengths.CONTROL]
    assert max(map(abs, control["kl"])) < 1e-6
    assert control["sparsity"] == [0.0, 0.0]
    low, high = by_name["peak_lse, one scalar, 128x64"]
    assert np.mean(low["sparsity"]) == pytest.approx(0.2, abs=0.1)
    assert np.mean(low["sparsity"]) < np.mean(high["sparsity"])
    assert 1e-6 < np.mean(low["kl"]) < np.mean(high["kl"])
    for record in text:
        assert record["self_test"]
        assert record["contexts"] == ["emma@0", "essays@0"]
        assert 0 < record["attention_ms"] < record["ms"]
        assert set(record["speedup"]) == {"sdpa"}
        positions = [band[1] - band[0] for band in record["by_position"]]
        kl = np.average([band[2] for band in record["by_position"]], weights=positions)
        assert kl == pytest.approx(np.mean(record["kl"]), abs=1e-6)
    tasks = {r["candidate"]: r for r in records if r["kind"] == "long_tasks"}
    assert set(tasks) == set(by_name)
    assert tasks["dense"]["contexts"] == ["single 0", "single 1", "variables 0"]
    assert tasks[lengths.CONTROL]["scores"] == tasks["dense"]["scores"]
    assert tasks["dense"]["depths"] == [0.0, 1.0]
    assert long.main(words(folder, *options)) == 0
    assert "0 new records" in capsys.readouterr().out
    with pytest.raises(ValueError, match="self-test"):
        report.load([folder / "long.jsonl"])


def test_a_spent_budget_leaves_the_rest_to_the_next_run(folder: Path) -> None:
    options = ["--prompts", "0", "--only", "peak_lse, one scalar, 128x64"]
    assert long.main(words(folder, *options, "--seconds", "0")) == 0
    assert [r["candidate"] for r in read_records(folder / "long.jsonl")] == ["dense"]
    assert long.main(words(folder, *options, "--voters", "1")) == 0
    names = [record["candidate"] for record in read_records(folder / "long.jsonl")]
    assert names == ["dense", *["peak_lse, one scalar, 128x64"] * 2]


def test_a_candidate_that_fails_does_not_stop_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(rivals.Window, "__call__", fail)
    options = ["--prompts", "0", "--only", "sliding", "antidiagonal"]
    assert long.main(words(folder, *options)) == 0
    assert "sliding window and sink is left out: no such kernel" in capsys.readouterr().err
    names = {record["candidate"] for record in read_records(folder / "long.jsonl")}
    assert names == {"dense", "antidiagonal sums (XAttention)"}


def test_sparge_attention_is_timed_without_its_count(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[bool] = []

    def call(self: rivals.Sparge, *arguments: Any) -> Attended:
        counted.append(self.counts)
        return rivals.Window(256)(*arguments)

    monkeypatch.setattr(rivals.Sparge, "find", staticmethod(lambda _, k: rivals.Sparge(print, k)))
    monkeypatch.setattr(rivals.Sparge, "__call__", call)
    assert long.main(words(folder, "--prompts", "0", "--only", "Sparge")) == 0
    names = [record["candidate"] for record in read_records(folder / "long.jsonl")]
    assert names == ["dense", *["SpargeAttention"] * 4]
    layers = counted.index(False) // 2  # two windows are read before the first is timed
    assert layers > 0
    assert counted.count(True) == 4 * 2 * layers
    assert counted.count(False) >= 4 * layers


def small_with_sinks() -> Any:
    """A gpt-oss model with windows of 128 in two of its four layers."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        initializer_range=0.2,
        max_position_embeddings=8192,
    )
    model: Any = GptOssForCausalLM(config)
    return model.eval()


@pytest.mark.parametrize(
    ("lacks", "factor", "layers"),
    [
        ((), 1.0, {"fa3": 4}),
        (("local attention",), 1.0, {"fa3": 2, "torch": 2}),
        (("local attention",), 1.1, None),
    ],
)
def test_flash_attention_3_is_timed_on_the_layers_that_it_can_do(
    lacks: tuple[str, ...],
    factor: float,
    layers: dict[str, int] | None,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small_with_sinks().save_pretrained(folder / "model")
    told = fake_fa3(monkeypatch, lacks=lacks, factor=factor)
    options = ["--prompts", "0", "--only", "peak_lse, one scalar, 128x64", "--voters", "1"]
    assert long.main(words(folder, *options)) == 0
    assert {each["dtype"] for each in told} == {torch.bfloat16}
    said = capsys.readouterr().err
    assert ("FlashAttention-3 is left out: FlashAttention-3 can do" in said) == (layers is None)
    assert ("layers by fa3: 2 of 4: This flash attention build" in said) == (
        layers == {"fa3": 2, "torch": 2}
    )
    _, *points = read_records(folder / "long.jsonl")
    assert points
    for record in points:
        assert set(record["speedup"]) == ({"sdpa"} if layers is None else {"sdpa", "fa3"})
        assert record.get("fa3_layers") == layers


def test_predictions_that_are_not_finite_are_no_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(self: Any, q: torch.Tensor, *_: Any) -> Attended:
        return Attended(torch.full_like(q, torch.nan), torch.zeros(q.shape[2]))

    monkeypatch.setattr(rivals.Window, "__call__", spoil)
    assert long.main(words(folder, "--prompts", "0", "--only", "sliding")) == 0
    assert "not finite in float32" in capsys.readouterr().err
    assert [r["candidate"] for r in read_records(folder / "long.jsonl")] == ["dense"]


def test_what_is_missing_is_an_error(folder: Path) -> None:
    with pytest.raises(SystemExit):
        long.main(["--model-shape", "tiny", "--length", "512", "--device", "cpu"])
    with pytest.raises(SystemExit):
        long.main(words(folder, "--length", "500"))
    with pytest.raises(ValueError, match="held-out text"):
        long.held_out([("a", [1] * 10)], 512, 2)


def point(candidate: str, seqlen: int, share: float, kl: float, **changes: Any) -> dict[str, Any]:
    base = attention_record()
    common = ("schema", "self_test", "date", "command", "gpu", "driver", "torch", "cuda", "commit")
    return {
        **{name: base[name] for name in common},
        "sources": "0",
        "kind": "long_text",
        "model": "m",
        "dtype": "bfloat16",
        "lean": True,
        "seqlen": seqlen,
        "candidate": candidate,
        "axis": "share",
        "asked": share,
        "contexts": ["a", "b", "c"],
        "calibration_contexts": ["d"],
        "sparsity": [share - 0.01, share, share + 0.01],
        "kl": [0.9 * kl, kl, 1.1 * kl],
        "nll_change": [kl / 2] * 3,
        "by_position": [[0, 512, kl, 3.0], [512, 1024, 2 * kl, 2.5]],
        "ms": 100 * (1 - share),
        "attention_ms": 80 * (1 - share),
        "repetitions": 2,
        "speedup": {"sdpa": 1 / (1 - share), "fa3": 0.9 / (1 - share)},
        "attention_speedup": {"sdpa": 1 / (1 - share), "fa3": 0.8 / (1 - share)},
        **changes,
    }


def tasks(candidate: str, seqlen: int, share: float, scores: list[float]) -> dict[str, Any]:
    contexts = ["single 0", "single 1", "variables 0", "variables 1"]
    record = point(candidate, seqlen, share, 0.0)
    kept = {n: v for n, v in record.items() if n not in ("kl", "nll_change", "by_position")}
    more = {"contexts": contexts, "sparsity": [share] * 4, "scores": scores, "depths": [0.0, 1.0]}
    return {**kept, "kind": "long_tasks", **more}


@pytest.fixture
def measured() -> list[dict[str, Any]]:
    learned, scalar = "peak_lse, learned at 4K, 64x64", "running_max, one scalar, 128x64"
    found = []
    for seqlen, base in ((8192, 0.7), (32768, 0.75)):
        found += [point("dense", seqlen, 0.0, 0.0), point(lengths.CONTROL, seqlen, 0.0, 1e-5)]
        found += [
            point(learned, seqlen, base + more, kl)
            for more, kl in ((0, 0.001), (0.1, 0.01), (0.2, 0.1))
        ]
        found += [
            point(scalar, seqlen, base - 0.3 + more, kl) for more, kl in ((0, 0.02), (0.1, 0.2))
        ]
        found += [
            tasks("dense", seqlen, 0.0, [1, 1, 0.5, 0.5]),
            tasks(learned, seqlen, base + 0.1, [1, 0, 0.5, 0.5]),
        ]
    for record in found:
        check_record(record)
    return found


def test_tables_say_what_the_records_say(measured: list[dict[str, Any]]) -> None:
    text = page.text(measured)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    learned = next(r for r in rows if r[0].startswith("peak_lse, learned") and "0.800" in r)
    assert learned[1:3] == ["share 0.8", "0.800"]
    assert learned[3].startswith("0.0100 [0.0075, 0.0125]")
    assert learned[5:11] == ["20", "5.00", "4.50", "16", "5.00", "4.00"]
    assert learned[11:13] == ["4", "0.500"]
    assert learned[13].startswith("66.7% [")
    law = curves.law([r for r in measured if r["kind"] == "long_text"], 0.03)
    mean, low, high = law["peak_lse, learned at 4K, 64x64"][8192]
    # Half way between 0.01 and 0.1 of the logarithm lies 0.0316.
    assert mean == pytest.approx(0.8 + 0.1 * np.log10(3))
    assert low < mean < high
    assert law["running_max, one scalar, 128x64"][32768][0] == pytest.approx(
        0.45 + 0.1 * np.log10(1.5)
    )
    assert "running_max, one scalar, 128x64 (BLASST's rule)" in text
    assert "out of range" in text  # running_max at 0.01


def test_windows_are_not_mixed(measured: list[dict[str, Any]]) -> None:
    few = {**measured[2], "contexts": ["a"], "sparsity": [0.1], "kl": [0.5], "nll_change": [0.1]}
    many, alone, _ = curves.texts([*measured, few])
    assert few not in many
    assert alone == [few]
    before = curves.law([r for r in measured if r["kind"] == "long_text"], 0.03)
    assert curves.law([*many, few], 0.03)[few["candidate"]][8192] == before[few["candidate"]][8192]


def test_a_point_on_more_windows_hides_no_curve(measured: list[dict[str, Any]]) -> None:
    scalar = next(r for r in measured if r["kind"] == "long_text" and "scalar" in r["candidate"])
    windows = [f"window {i}" for i in range(8)]
    wide = {**scalar, "contexts": windows, **dict.fromkeys(("sparsity", "kl"), [0.01] * 8)}
    wide["nll_change"] = [0.01] * 8
    texts = [r for r in measured if r["kind"] == "long_text"]
    name = scalar["candidate"]
    assert curves.law([*texts, wide], 0.03)[name][8192] == curves.law(texts, 0.03)[name][8192]
    # Where two points on more windows reach the loss, these count.
    beyond = {**wide, "sparsity": [0.9] * 8, "kl": [0.1] * 8}
    assert curves.law([*texts, wide, beyond], 0.03)[name][8192][0] > 0.42


def test_scores_are_compared_with_dense_on_the_same_prompts(measured: list[dict[str, Any]]) -> None:
    learned = "peak_lse, learned at 4K, 64x64"
    contexts = [f"{task} {i}" for task in ("single", "variables") for i in range(3)]
    more = [
        {**tasks(name, 8192, share, []), "contexts": contexts, "sparsity": [share] * 6, **scored}
        for name, share, scored in (
            ("dense", 0.0, {"scores": [1, 1, 1, 0, 0, 0]}),
            (learned, 0.7, {"scores": [1, 1, 1, 0, 0, 0.3]}),
        )
    ]
    for order in ([*measured, *more], [*more, *measured]):
        (by_point,) = [v for k, v in curves.scored(order).items() if "8192" in k]
        assert by_point["dense", "share", 0.0][0]["contexts"] == contexts
        score, dense = by_point[learned, "share", 0.7]
        assert dense is not None
        assert score["contexts"] == dense["contexts"] == contexts
        score, dense = by_point[learned, "share", 0.7 + 0.1]
        assert dense is not None
        assert len(score["contexts"]) == 4
        assert dense["contexts"] == score["contexts"]
        text = curves.task_tables(order)
        assert "### 8K tokens, 6 prompts" in text
        assert "### 8K tokens, 4 prompts" in text


def test_prompts_of_other_seeds_join_those_of_the_first(measured: list[dict[str, Any]]) -> None:
    names = [name for name in dict.fromkeys(r["candidate"] for r in measured) if "4K" in name]
    firsts = [r for r in measured if r["kind"] == "long_tasks" and r["seqlen"] == 8192]
    firsts = [r for r in firsts if r["candidate"] in ("dense", *names)]
    others = [
        {**r, "contexts": [f"{name} of seed 2" for name in r["contexts"]]}
        | {"scores": [1 - score for score in r["scores"]]}
        for r in firsts
    ]
    for order in ([*firsts, *others], [*others, *firsts]):
        (by_point,) = curves.scored(order).values()
        assert len(by_point) == len(firsts)
        for score, dense in by_point.values():
            assert dense is not None
            assert len(score["contexts"]) == len(set(score["contexts"])) == 8
            assert score["contexts"] == dense["contexts"]
            assert np.mean(score["scores"]) == pytest.approx(0.5)
        same, dense = by_point["dense", "share", 0.0]
        assert same is dense
        assert "### 8K tokens, 4 prompts of seed 2: m" in curves.task_tables(order)
    assert len({report.key_of(record) for record in [*firsts, *others]}) == 2 * len(firsts)


def test_pictures_are_drawn(measured: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = page.draw_pictures(measured, tmp_path)
    assert {path.name for path in files} == {
        *("long-accuracy-008192.png", "long-accuracy-032768.png", "long-law-m.png"),
        "long-needles.png",
    }
    assert all(path.stat().st_size > 5000 for path in files)
    assert "long-law-m.png" in page.text(measured, page.links(tmp_path / "a.md", files))


def test_a_model_measured_at_one_length_is_drawn_beside_another(
    measured: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn: list[Any] = []

    def keep(figure: Any, path: Path) -> Path:
        drawn.append(figure)
        return path

    monkeypatch.setattr(report, "save", keep)
    texts = [record for record in measured if record["kind"] == "long_text"]
    other = [{**r, "model": "n", "seqlen": 131072} for r in texts if r["seqlen"] == 32768]
    other_card = [{**r, "gpu": "another"} for r in other]
    names = [path.name for path in curves.draw([*texts, *other, *other_card], tmp_path)]
    assert len(set(names)) == len(names)
    cards = {f"long-accuracy-131072-{card}.png" for card in ("A-GPU", "another")}
    assert {"long-accuracy-008192.png", "long-law-m.png"} | cards < set(names)
    assert "long-law-n.png" not in names
    figure = drawn[names.index("long-law-m.png")]
    assert figure.get_suptitle().endswith("; hollow: n (128K)")
    hollow = [
        line
        for axis in figure.axes
        for line in axis.lines
        if line.get_markerfacecolor() == "white" and len(line.get_xdata())
    ]
    assert hollow
    assert {float(x) for line in hollow for x in line.get_xdata()} == {131072.0}
    for figure in drawn:
        pyplot.close(figure)


def test_models_of_one_length_have_a_picture_each(
    measured: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    texts = [record for record in measured if record["kind"] == "long_text"]
    files = curves.draw([*texts, *({**r, "model": "a_b + n"} for r in texts)], tmp_path)
    assert sorted(path.name for path in files) == sorted(
        f"long-{name}.png"
        for model in ("m", "a-b-n")
        for name in (f"accuracy-008192-{model}", f"accuracy-032768-{model}", f"law-{model}")
    )


def test_records_are_merged_by_what_they_measure(measured: list[dict[str, Any]]) -> None:
    assert len({report.key_of(record) for record in measured}) == len(measured)
