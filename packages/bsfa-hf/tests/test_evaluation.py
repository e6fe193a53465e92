# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Evaluation on a small random model, and once on the real one."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import bsfa_hf
from bsfa_calib import Point, ThresholdTable
from bsfa_calib.language_model import LanguageModel
from bsfa_calib.text import read_windows
from bsfa_hf.cli import main, make_parser
from bsfa_hf.cli.evaluate import configurations
from bsfa_hf.evaluation import run
from bsfa_hf.evaluation.configurations import (
    Configuration,
    ConfigurationError,
    make_method,
    parse_configuration,
)
from bsfa_hf.evaluation.intervals import mean_interval, share_interval, t_quantile
from bsfa_hf.evaluation.needle import NEEDLE, make_prompt, noise
from bsfa_hf.evaluation.plot import merged, plot_results
from bsfa_hf.evaluation.results import Results, ResultsError, load
from bsfa_hf.evaluation.ruler import HarnessError
from bsfa_hf.evaluation.run import Evaluation, EvaluationError, Plan, rank_path
from bsfa_hf.evaluation.summary import advice, markdown, summarise
from bsfa_hf.methods import BlockSparse, OneThreshold
from bsfa_kernel import DEFAULT_GEOMETRY, Geometry
from tiny import small_llama

LENGTH = 512
# A plan in which nothing is wrong, and a scalar whose threshold is searched for.
_PLAN = ("--config", "sliding_window:window=8", "--text", "TEXT")
_SEARCHED = "s=scalar:rule=peak_lse,sparsity=0.7"
LAYERS, HEADS = 2, 4


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return small_llama()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["sun", "river", "stone", "walks", "under", "old", "the", "green", "slowly", "house"]
    for kind in ("novels", "code"):
        (directory / kind).mkdir()
        for index in range(2):
            sentences = (" ".join(rng.choice(words, 8)) + ". " for _ in range(200))
            (directory / kind / f"{index}.txt").write_text("".join(sentences))
    return directory


def a_table(path: Path, threshold: float, *, layers: int = LAYERS, model: str = "") -> Path:
    values = np.full((2, layers, HEADS, 1), threshold, np.float32)
    values[0] = -np.inf
    table = ThresholdTable(values, (0.0, 0.5), axis="target_sparsity", rule="peak_lse", model=model)
    table.save(path)
    return path


def a_plan(text: Path, *specifications: str, **options: object) -> Plan:
    configurations = tuple(parse_configuration(s) for s in specifications)
    defaults = {"lengths": (LENGTH,), "samples": 2, "text": text}
    return Plan(configurations, **{**defaults, **options})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- configurations


def test_a_configuration_is_read_as_it_is_written() -> None:
    found = parse_configuration("blasst=scalar:rule=running_max,threshold=-7")
    assert (found.name, found.kind) == ("blasst", "scalar")
    assert found.option("threshold") == "-7"
    assert found.geometry == DEFAULT_GEOMETRY


def test_the_digest_follows_the_table_and_not_its_name(tmp_path: Path) -> None:
    paths = [a_table(tmp_path / name, t) for name, t in (("a", -1.0), ("b", -1.0), ("c", -2.0))]
    a, b, c = (parse_configuration(f"table:file={p},target_sparsity=0.5").digest for p in paths)
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "a configuration is one of dense, table"),
        ("scalar:rule=running_max", "either threshold or sparsity"),
        ("scalar:rule=running_max,threshold=-1,sparsity=0.5", "either threshold or sparsity"),
        ("scalar:rule=best,threshold=1", "rule must be one of"),
        ("scalar:rule=absolute,threshold=nan", "threshold must be a number"),
        ("scalar:rule=absolute,threshold=1,geometry=32x32", "geometry must be one of"),
        ("scalar:threshold=1", "scalar needs rule"),
        ("sliding_window:window=0", "window must be at least 1, got 0"),
        ("sliding_window:window=8,depth=2", "takes window, sink, got depth=2"),
        ("sliding_window:window", "options are option=value"),
        ("=dense", "a configuration is"),
        ("scalar:rule=absolute,threshold=1,voters=3", r"voters must be one of \(1, 2, 4\), got 3"),
        ("scalar:rule=absolute,threshold=1,selection=fp8", "selection must be one of exact, int8"),
        ("sparge_attn:topk=2", r"topk must be in \(0, 1\]"),
    ],
)
def test_what_is_no_configuration_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_configuration(text)


def test_a_table_without_the_point_is_refused_with_those_there_are(tmp_path: Path) -> None:
    path = a_table(tmp_path / "table", -1.0)
    with pytest.raises(ConfigurationError, match=r"target_sparsity = 0\.0, 0\.5"):
        parse_configuration(f"table:file={path},target_sparsity=0.7")


def test_a_point_is_written_by_its_axis_or_as_a_point(tmp_path: Path) -> None:
    path = a_table(tmp_path / "table", -1.0)
    for point in ("target_sparsity=0.5", "point=target_sparsity=0.5"):
        method = make_method(parse_configuration(f"table:file={path},{point}"))
        assert method == BlockSparse(str(path), Point("target_sparsity", 0.5), selection="auto")


def test_voters_and_selection_are_part_of_a_configuration(tmp_path: Path) -> None:
    one = parse_configuration("scalar:rule=peak_lse,threshold=-1,geometry=64x64")
    four = parse_configuration("scalar:rule=peak_lse,threshold=-1,geometry=64x64,voters=4")
    assert (one.voters, four.voters) == (1, 4)
    assert one.digest != four.digest
    assert make_method(four) == OneThreshold(-1.0, "peak_lse", Geometry(64, 64), 4, "auto")
    path = a_table(tmp_path / "table", -1.0)
    chosen = parse_configuration(f"table:file={path},target_sparsity=0.5,selection=int8")
    method = make_method(chosen)
    assert method == BlockSparse(str(path), Point("target_sparsity", 0.5), selection="int8")
    plain = parse_configuration(f"table:file={path},target_sparsity=0.5")
    assert plain.digest != chosen.digest
    values = ThresholdTable.load(path)
    dataclasses.replace(values, voters=2).save(path)
    by_two = parse_configuration(f"table:file={path},target_sparsity=0.5")
    assert by_two.digest != plain.digest
    assert (by_two.rule, by_two.voters, by_two.geometry) == ("peak_lse", 2, Geometry(128, 64))


@pytest.mark.parametrize("kind", ["table", "scalar"])
def test_the_environments_selection_is_part_of_a_configuration(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_table(tmp_path / "table", -1.0)
    text = f"table:file={path},target_sparsity=0.5"
    if kind == "scalar":
        text = "scalar:rule=peak_lse,threshold=-1"
    found = {}
    for selection in ("", "auto", "exact", "int8"):
        monkeypatch.setenv("BSFA_SELECTION", selection)
        found[selection] = parse_configuration(text)
    assert found[""] == found["auto"]
    assert len({each.digest for each in found.values()}) == 3
    assert len({each.name for each in found.values()}) == 3
    # What a configuration says counts, whatever the environment says later.
    method = make_method(found["exact"])
    assert isinstance(method, (BlockSparse, OneThreshold))
    assert method.selection == "exact"
    assert parse_configuration(f"{text},selection=exact") == found["exact"]
    monkeypatch.setenv("BSFA_SELECTION", "fp4")
    with pytest.raises(ConfigurationError, match="BSFA_SELECTION must be one of"):
        parse_configuration(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "are for 3 layers and 4 query heads, and this model has 2 layers"),
        ({"model": "org/other"}, "thresholds are of org/other, and this model is org/tiny"),
    ],
    ids=str,
)
def test_thresholds_of_another_model_are_refused_before_anything_is_run(
    changes: dict[str, Any],
    message: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model.config, "_name_or_path", "org/tiny")
    path = a_table(tmp_path / "table", -1.0, **changes)
    plan = a_plan(text, f"table:file={path},target_sparsity=0.5")
    with pytest.raises(ValueError, match=message):
        Evaluation(model, tokenizer, plan, tmp_path / "results.json")
    if "model" in changes:
        plan = dataclasses.replace(plan, check_model=False)
        Evaluation(model, tokenizer, plan, tmp_path / "results.json")


def test_sparge_attention_that_is_not_installed_is_told(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    plan = a_plan(text, "sparge_attn:topk=0.5")
    with pytest.raises(ImportError, match="spas_sage_attn_meansim_topk_cuda of the package"):
        Evaluation(model, tokenizer, plan, tmp_path / "results.json")


def test_records_say_from_what_scores_blocks_were_chosen(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = a_table(tmp_path / "table", -1.0)
    specifications = (
        f"table:file={path},target_sparsity=0.5,selection=int8",
        "scalar:rule=absolute,threshold=-1",
        "sliding_window:window=64",
    )
    plan = a_plan(text, *specifications, tasks=("kl",), samples=1)
    Evaluation(model, tokenizer, plan, tmp_path / "results.json").run()
    content = load(tmp_path / "results.json")
    about = content["header"]["configurations"]
    found = {
        about[r["configuration"]]["kind"]: r["sparse_calls_by_selection"]
        for r in content["records"]
    }
    assert found == {
        "dense": {},
        "table": {"exact": 0, "int8": LAYERS},
        "scalar": {"exact": LAYERS, "int8": 0},  # on a CPU "auto" is exact
        "sliding_window": {},
    }
    rules = {each["kind"]: (each["rule"], each["voters"]) for each in about.values()}
    assert rules["table"] == ("peak_lse", 1)
    assert rules["scalar"] == ("absolute", 1)
    assert rules["dense"] == rules["sliding_window"] == ("", 1)
    # With another selection nothing of this is done already.
    monkeypatch.setenv("BSFA_SELECTION", "int8")
    plan = a_plan(text, *specifications, tasks=("kl",), samples=1)
    Evaluation(model, tokenizer, plan, tmp_path / "results.json").run()
    assert len(load(tmp_path / "results.json")["records"]) == len(content["records"]) + 1


def test_a_scalar_for_a_sparsity_is_found_with_its_selection(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = run.find_scalar
    told: list[dict[str, Any]] = []

    def find(*args: Any, **options: Any) -> Any:
        told.append(options)
        return right(*args, **options)

    monkeypatch.setattr(run, "find_scalar", find)
    scalars = [f"scalar:rule=peak_lse,sparsity=0.2,selection={s}" for s in ("int8", "auto")]
    plan = a_plan(text, *scalars, tasks=("kl",), samples=1)
    evaluation = Evaluation(model, tokenizer, plan, tmp_path / "results.json")
    evaluation.run()
    assert [options["selection"] for options in told] == ["int8", "auto"]
    for configuration in plan.configurations:
        method = make_method(configuration, threshold=1.0)
        assert method is not None
        state = method.state(model)
        assert state is not None
        assert state.expected_skipped == 0.2


# ------------------------------------------------------------------------- intervals and needles


def test_intervals_are_those_of_the_textbook() -> None:
    assert t_quantile(1) == pytest.approx(12.706)
    assert t_quantile(60) == pytest.approx(2.0003, abs=1e-3)
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert mean_interval([5.0]) == (5.0, None, None)
    assert share_interval(0, 10) == pytest.approx((0.0, 0.0, 0.2775), abs=1e-3)
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])


@pytest.mark.parametrize("keys", [1, 4])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_lies_at_its_depth_and_the_prompt_fits(
    tokenizer: PreTrainedTokenizerFast, depth: float, keys: int
) -> None:
    haystack = noise(tokenizer, 1000)
    made = make_prompt(haystack, tokenizer, length=1000, depth=depth, keys=keys, seed=3)
    assert 800 < len(made.prompt) + len(made.answer) <= 1000
    number = tokenizer.decode(made.answer).strip()
    asked = made.text.rsplit("for ", 1)[1].split(" is")[0]
    needle = NEEDLE.format(word=asked, number=number)
    assert made.text.count("One of the special magic numbers") == keys + 1
    assert made.text.find(needle) / len(made.text) == pytest.approx(depth, abs=0.25)


def test_a_needle_without_room_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="too few"):
        make_prompt(noise(tokenizer, 100), tokenizer, length=100, depth=0.5)


# ------------------------------------------------------------------------- evaluation and results


class SeededHarness:
    """Scores that the seed gives."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model

    def load(self, task: str, length: int, seed: int) -> int:
        return seed

    def scores(self, loaded: int, numbers: list[int]) -> dict[int, float]:
        self.model(torch.arange(1, 500)[None] % 97)
        return {number: float(loaded + number) for number in numbers}


def use_seeded_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Harness", SeededHarness)
    monkeypatch.setattr(run, "check_harness", lambda: None)


def test_an_evaluation_compares_every_configuration_with_dense(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    table = a_table(tmp_path / "table", 0.0)
    plan = a_plan(
        text,
        f"exact=table:file={table},target_sparsity=0.0",
        f"table:file={table},target_sparsity=0.5",
        "scalar:rule=running_max,threshold=inf",
        "sliding_window:window=128",
        tasks=("kl", "perplexity", "needle"),
        depths=(0.5,),
    )
    out = tmp_path / "results.json"
    Evaluation(model, tokenizer, plan, out, model_name="tiny").run()
    content = load(out)
    assert len(content["records"]) == 2 * 5 + 2 * 5
    rows = {(row.task, row.name): row for row in summarise(content)}
    dense, exact = rows["text", "dense"], rows["text", "exact"]
    assert dense.kl is not None
    assert exact.kl is not None
    assert dense.kl.mean == 0
    assert exact.kl.mean == pytest.approx(0, abs=1e-5)
    assert exact.sparsity == 0
    scalar = rows["text", "scalar(rule=running_max, threshold=inf)"]
    assert scalar.kl is not None
    assert scalar.sparsity > 0
    assert scalar.kl.mean > 1e-4
    change = rows["needle", "dense"].accuracy_change
    assert change is not None
    assert tuple(change) == (0, 0, 0)
    window = rows["text", "sliding_window(window=128)"]
    assert window.sparsity == pytest.approx(1 - (2 + 4 + 4 + 4) / (2 + 4 + 6 + 8), abs=1e-6)
    table_text = markdown(content)
    assert "| sliding_window(window=128) |" in table_text
    for record in content["records"]:
        layers = [] if record["configuration"] == "dense" else [HEADS] * LAYERS
        assert [len(layer) for layer in record["skipped"]] == layers

    made = {path.name for path in plot_results([out], tmp_path / "plots")}
    assert made >= {"table.md", "accuracy-text-512.png", "heads-text-512.png", "needle-1.png"}


def test_what_is_evaluated_is_what_enable_gives(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    path = a_table(tmp_path / "table", 1.0)
    plan = a_plan(text, f"table:file={path},target_sparsity=0.5", tasks=("kl",), samples=1)
    Evaluation(model, tokenizer, plan, tmp_path / "results.json").run()
    assert model.config._attn_implementation == "sdpa"
    record = load(tmp_path / "results.json")["records"][1]
    window = read_windows(text, tokenizer, length=LENGTH, count=1, part=(0.5, 1.0))[0]
    ids = torch.tensor([window.ids])
    with torch.no_grad():
        dense = model(ids).logits[0, :-1].log_softmax(-1)
        with bsfa_hf.enabled(model, path, "target_sparsity=0.5") as stats:
            sparse = model(ids).logits[0, :-1].log_softmax(-1)
    divergence = (dense.exp() * (dense - sparse)).sum(-1).mean()
    assert record["bands"][0]["kl"] == pytest.approx(float(divergence), rel=1e-3)
    assert record["sparsity"] == pytest.approx(1 - stats.mean_kept_fraction, abs=1e-6)
    kept = torch.tensor(record["skipped"]).sub(1).neg()
    assert torch.allclose(kept, stats.kept_fraction_by_head.float(), atol=1e-4)
    assert 0.1 < record["sparsity"] < 0.9


def test_what_was_asked_otherwise_is_a_row_and_a_picture_of_its_own(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text((text / "code" / "0.txt").read_text())
    out = tmp_path / "results.json"
    window = "w=sliding_window:window=64"
    two_tasks = {"tasks": ("kl", "needle"), "depths": (0.5,), "samples": 1}
    first = a_plan(text, window, **two_tasks, text_name="texts")
    plans = [
        first,
        dataclasses.replace(first, needle_keys=4),
        # The same windows: the part begins where the other does.
        dataclasses.replace(first, part=(0.5, 0.9)),
        dataclasses.replace(first, text=other, text_name="other"),
    ]
    added = []
    for plan in (*plans, *plans):
        before = len(load(out)["records"]) if out.exists() else 0
        Evaluation(model, tokenizer, plan, out).run()
        added.append(len(load(out)["records"]) - before)
    assert added == [4, 2, 4, 4, 0, 0, 0, 0]
    content = load(out)
    assert {row.samples for row in summarise(content)} == {1}
    printed = markdown(content)
    for title in (
        "Needles, 1 key, 512 tokens, part 0.5:1 of texts",
        "Needles, 4 keys, 512 tokens, part 0.5:1 of texts",
        "Needles, 1 key, 512 tokens, part 0.5:0.9 of texts",
        "Next-token predictions, 512 tokens, part 0.5:1 of texts",
        "Next-token predictions, 512 tokens, part 0.5:0.9 of texts",
        "Next-token predictions, 512 tokens, part 0.5:1 of other",
    ):
        assert printed.count(f"### {title}\n") == 1
    made = [path.name for path in plot_results([out], tmp_path / "plots")]
    assert len(set(made)) == len(made)
    kinds = [name.split("-")[0] for name in made]
    assert (kinds.count("accuracy"), kinds.count("needle")) == (7, 4)


def test_one_text_is_not_named(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    plan = a_plan(text, "scalar:rule=peak_lse,threshold=-1", tasks=("kl", "needle"), samples=1)
    Evaluation(model, tokenizer, plan, out).run()
    printed = markdown(load(out))
    assert "### Needles, 1 key, 512 tokens\n" in printed
    assert "### Next-token predictions, 512 tokens\n" in printed
    assert "\n\nAt 512 tokens " in printed


def test_samples_of_another_seed_are_other_samples(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_seeded_harness(monkeypatch)
    out = tmp_path / "results.json"
    for seed in (0, 7):
        plan = Plan((), tasks=("niah_single_1",), lengths=(512,), samples=2, seed=seed)
        Evaluation(model, tokenizer, plan, out).run()
    found = {record["sample"]: record["score"] for record in load(out)["records"]}
    assert found == {"0 of seed 0": 0, "1 of seed 0": 1, "0 of seed 7": 7, "1 of seed 7": 8}


def test_a_threshold_found_on_other_text_is_not_mixed_with_the_first(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    wanted = "scalar:rule=peak_lse,sparsity=0.3"
    Evaluation(model, tokenizer, a_plan(text, wanted, tasks=("kl",), samples=1), out).run()
    (about,) = (c for c in load(out)["header"]["configurations"].values() if c["name"] != "dense")
    more = a_plan(text, wanted, tasks=("kl",), samples=2)
    Evaluation(model, tokenizer, more, out).run()
    assert len(load(out)["records"]) == 4
    other = tmp_path / "other.txt"
    other.write_text("".join(chr(33 + i * i % 83) for i in range(3 * LENGTH)))
    plan = a_plan(other, wanted, tasks=("kl",), samples=1)
    begun = f"with a threshold of {about['thresholds'][str(LENGTH)]:g}, and this text gives"
    with pytest.raises(EvaluationError, match=re.escape(begun)):
        Evaluation(model, tokenizer, plan, out).run()


def test_sparge_attention_is_measured_by_its_own_count(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, float]:
        assert options["return_sparsity"] is True
        assert options["cdfthreshd"] == 0.9
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=options["scale"])
        return out, 0.3

    package = ModuleType("spas_sage_attn")
    package.spas_sage_attn_meansim_cuda = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spas_sage_attn", package)
    plan = a_plan(text, "sparge=sparge_attn:cdfthreshd=0.9", tasks=("kl",), samples=1)
    Evaluation(model, tokenizer, plan, tmp_path / "results.json").run()
    record = load(tmp_path / "results.json")["records"][1]
    assert record["sparsity"] == pytest.approx(0.3)
    assert record["skipped"] == [[0.3] * HEADS] * LAYERS
    assert record["bands"][0]["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("tasks", [("kl",), ("needle",)], ids=str)
def test_a_configuration_that_leaves_the_model_dense_is_an_error(
    tasks: tuple[str, ...],
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model.config, "is_causal", False, raising=False)
    plan = a_plan(text, "always=scalar:rule=absolute,threshold=1", tasks=tasks, depths=(0.5,))
    out = tmp_path / "results.json"
    with pytest.raises(EvaluationError, match=r"always leaves the model dense.*not causal"):
        Evaluation(model, tokenizer, plan, out).run()
    assert {record["configuration"] for record in load(out)["records"]} == {"dense"}


def test_an_evaluation_that_was_stopped_goes_on_where_it_was(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = a_plan(text, "sliding_window:window=64", tasks=("kl",))
    out = tmp_path / "results.json"
    compared = LanguageModel.compare

    def stop_at_third(self: LanguageModel, *args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compared(self, *args)  # type: ignore[arg-type]

    calls: list[int] = []
    monkeypatch.setattr(LanguageModel, "compare", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        Evaluation(model, tokenizer, plan, out).run()
    assert len(load(out)["records"]) == 2
    Evaluation(model, tokenizer, plan, out).run()
    assert len(load(out)["records"]) == 4
    assert len(calls) == 5
    Evaluation(model, tokenizer, plan, out).run()
    assert len(calls) == 5


def test_processes_share_the_samples_and_their_results_merge(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    plan = a_plan(text, "sliding_window:window=64", tasks=("kl",), samples=3)
    out = tmp_path / "results.json"
    first = Evaluation(model, tokenizer, plan, out, rank=0, world=2)
    first.run()
    Evaluation(model, tokenizer, plan, out, rank=1, world=2).run()
    assert len(load(out)["records"]) == 4
    first.results.merge(rank_path(out, 1))
    assert len({record["sample"] for record in load(out)["records"]}) == 3
    assert len(load(out)["records"]) == 6


def a_header(**changes: Any) -> dict[str, Any]:
    made_with = {"device": "CPU", "torch": "2.11.0"}
    return {"model": {"digest": "a"}, "configurations": {}, "environment": made_with, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"digest": "b"}}, r"another model than .*\{'digest': 'a'\} and .*'b'"),
        ({"environment": {"device": "A GPU"}}, "another device than .* CPU and A GPU"),
        (
            {
                "configurations": {
                    "x": {"name": "half", "kind": "scalar", "thresholds": {"512": 2.0}}
                }
            },
            "half must have one threshold at 512 tokens: .* has 1, and .* has 2",
        ),
    ],
    ids=str,
)
def test_results_that_do_not_go_together_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    one = a_header(
        configurations={"x": {"name": "half", "kind": "scalar", "thresholds": {"512": 1.0}}}
    )
    Results(paths[0], one).write()
    Results(paths[1], {**one, **changes}).write()
    with pytest.raises(ResultsError, match=message):
        Results(paths[0], {**one, **changes})
    with pytest.raises(ResultsError, match=message):
        merged(paths)
    with pytest.raises(ResultsError, match=message):
        Results(paths[0], one).merge(paths[1])


def test_a_file_names_every_version_that_it_was_made_with(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Results(path, a_header()).write()
    for _ in range(2):
        Results(path, a_header(environment={"device": "CPU", "torch": "2.12.0"})).write()
    assert load(path)["header"]["environment"] == {"device": "CPU", "torch": "2.11.0, 2.12.0"}


def timed(
    configuration: str, seconds: float, dense_seconds: float, sample: str = "s"
) -> dict[str, Any]:
    record = {"task": "niah", "length": 512, "sample": sample, "kind": "niah", "skipped": []}
    times = {"seconds": seconds, "dense_seconds": dense_seconds}
    return {**record, **times, "configuration": configuration, "sparsity": 0.5, "score": 1.0}


def test_speedups_do_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    paths = [tmp_path / "slow.json", tmp_path / "fast.json"]
    names = {each: {"name": each, "kind": each} for each in ("dense", "scalar")}
    contents = (
        [timed("dense", 10.0, 10.0), timed("scalar", 5.0, 10.0)],
        [timed("dense", 1.0, 1.0)],
        [timed("dense", 1.0, 1.0), timed("scalar", 0.8, 1.0)],
    )
    for second, expected in ((1, 2.0), (2, 1.25)):
        for path, records in zip(paths, (contents[0], contents[second]), strict=True):
            path.unlink(missing_ok=True)
            results = Results(path, a_header(configurations=names))
            for record in records:
                results.add(record)
            results.write()
        for order in (paths, paths[::-1]):
            rows = {row.name: row for row in summarise(merged(order))}
            assert (rows["dense"].speedup, rows["scalar"].speedup) == (1.0, expected)
            assert rows["dense"].seconds == 1.0


def test_records_without_the_time_of_dense_have_no_speedup() -> None:
    records = [timed("dense", 1.0, 1.0), timed("scalar", 0.5, 1.0)]
    for record in records:
        del record["dense_seconds"]
    names = {each: {"name": each, "kind": each} for each in ("dense", "scalar")}
    content = {"header": a_header(configurations=names), "records": records}
    assert [row.speedup for row in summarise(content)] == [None, None]
    assert "| 0.500 |  |" in markdown(content)


@pytest.mark.parametrize("task", ["kl", "needle", "niah_single_1"])
@pytest.mark.parametrize("wrong", ["sliding_window", "dense"])
def test_what_is_not_finite_is_left_out_and_the_rest_stays(
    wrong: str,
    task: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = Evaluation._add
    faulty = [wrong]

    def add_one_nan(
        self: Evaluation, base: Any, configuration: Any, *args: Any, **found: Any
    ) -> Any:
        if faulty == [configuration.kind]:
            faulty.clear()
            if task == "kl":
                found["bands"][0]["nll"] = float("nan")
            else:
                found["log_probability" if task == "needle" else "score"] = float("-inf")
        return add(self, base, configuration, *args, **found)

    monkeypatch.setattr(Evaluation, "_add", add_one_nan)
    use_seeded_harness(monkeypatch)
    scalar = "scalar:rule=peak_lse,threshold=-1"
    plan = a_plan(text, "w=sliding_window:window=64", scalar, tasks=(task,), depths=(0.5,))
    out = tmp_path / "results.json"
    told: list[str] = []
    evaluation = Evaluation(model, tokenizer, plan, out, progress=told.append)
    evaluation.run()
    (message,) = (line for line in told if "left out" in line)
    name, lost = ("w", 1) if wrong == "sliding_window" else ("dense", 3)
    field = {"kl": r"bands\[0\].nll must be finite, got nan", "needle": "log_probability .* -inf"}
    assert re.match(f"left out: {name} on .* 512, .*{field.get(task, 'score .* -inf')}", message)
    assert ("for all configurations" in message) == (wrong == "dense")
    assert evaluation.left_out == lost
    assert len(load(out)["records"]) == 6 - lost
    again = Evaluation(model, tokenizer, plan, out)
    again.run()
    assert again.left_out == 0
    assert len(load(out)["records"]) == 6


@pytest.mark.parametrize("task", ["kl", "needle", "niah_single_1"])
def test_what_is_added_is_timed_beside_dense_in_the_same_run(
    task: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    speed = [1.0]
    forward = type(model).forward

    @functools.wraps(forward)  # what it calls its cache is read from its signature
    def slow(self: LlamaForCausalLM, *args: Any, **options: Any) -> Any:
        now[0] += speed[0] * (2 if self.config._attn_implementation == "sdpa" else 1)
        return forward(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", slow)
    # Its base model alone is read for text.
    monkeypatch.setattr(LanguageModel, "_is_plain", lambda _: False)
    use_seeded_harness(monkeypatch)
    out = tmp_path / "results.json"
    for name, factor in (("a", 1.0), ("b", 50.0)):
        speed[0] = factor
        window = f"{name}=sliding_window:window={64 + ord(name)}"
        plan = a_plan(text, window, tasks=(task,), depths=(0.5,))
        Evaluation(model, tokenizer, plan, out).run()
    content = load(out)
    found = {row.name: (row.speedup, row.samples) for row in summarise(content)}
    assert found == {"dense": (1.0, 2), "a": (2.0, 2), "b": (2.0, 2)}
    assert len(content["records"]) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a file of results"),
        ("{}", "no format"),
        ('{"format": "bsfa-evaluation", "version": 9}', "version 9"),
        ('{"format": "bsfa-evaluation", "version": 1, "records": 3, "header": {}}', "no list"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ResultsError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"header": {}}, "model of a header must be dict, and it is missing"),
        ({"header": a_header(configurations=[])}, r"configurations .* must be dict, got \[\]"),
        ({"header": a_header(configurations={"x": {}})}, "name of a configuration must be str"),
        ({"records": [{}]}, "task of a record must be str, and it is missing"),
        ({"records": [3]}, "a record must be an object, got 3"),
        (
            {"records": [{**timed("x", 1.0, 1.0), "seconds": "1"}]},
            "seconds .* must be float or int",
        ),
        ({"records": [{**timed("x", 1.0, 1.0), "task": "text"}]}, "bands of a record must be list"),
        ({"records": [{**timed("x", 1.0, 1.0), "task": "needle"}]}, "keys of a record must be int"),
        ({"records": [timed("x", float("nan"), 1.0)]}, "seconds must be finite, got nan"),
        (
            {"records": [{**timed("x", 1.0, 1.0), "task": "text", "bands": [{"start": 0}]}]},
            "stop of a band must be int",
        ),
        (
            {"records": [{**timed("x", 1.0, 1.0), "task": "text", "bands": []}]},
            "bands of a record must have positions",
        ),
        ({"header": a_header(environment={"torch": 2})}, "torch of environment must be str, got 2"),
        ({"header": a_header(texts=[])}, r"texts of a header must be dict, got \[\]"),
        ({"header": a_header(texts={"x": 1})}, "x of texts must be str, got 1"),
        (
            {
                "header": a_header(
                    configurations={"x": {"name": "x", "kind": "d", "thresholds": []}}
                )
            },
            "thresholds of a configuration must be dict",
        ),
        (
            {"records": [{**timed("x", 1.0, 1.0), "dense_seconds": "1"}]},
            "dense_seconds of a record must be",
        ),
        (
            {"records": [{**timed("x", 1.0, 1.0), "dense_seconds": None}]},
            "dense_seconds of a record must be float or int, got None",
        ),
        ({"records": [{**timed("x", 1.0, 1.0), "text": []}]}, "text of a record must be str"),
        ({"records": [{**timed("x", 1.0, 1.0), "keys": "4"}]}, "keys of a record must be int"),
    ],
)
def test_a_damaged_file_is_told_in_a_line(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    content = {"format": "bsfa-evaluation", "version": 1, "header": a_header(), "records": []}
    path.write_text(json.dumps({**content, **changes}))
    assert main(["plot", str(path), "--out", str(tmp_path / "plots")]) == 2
    assert re.match(
        f"bsfa: error: .*results.json is damaged: .*{message}.*\n$", capsys.readouterr().err
    )


def test_a_length_beyond_the_models_positions_is_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    plan = a_plan(text, "sliding_window:window=64", lengths=(4096,))
    with pytest.raises(EvaluationError, match="2048 positions, and 4096"):
        Evaluation(model, tokenizer, plan, tmp_path / "results.json")


def test_perplexity_without_text_is_refused() -> None:
    with pytest.raises(EvaluationError, match="--text"):
        Plan((Configuration("w", "sliding_window", (("window", "8"),)),), tasks=("perplexity",))


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    band = {"start": 0, "stop": 1, "positions": 1, "kl": 0.0, "nll": 1000.0, "agreement": 1.0}
    record = {**timed("dense", 1.0, 1.0), "task": "text", "bands": [band]}
    names = {"dense": {"name": "dense", "kind": "dense"}}
    content = {"header": a_header(configurations=names), "records": [record]}
    assert "| inf |" in markdown(content)


# ---------------------------------------------------------------------------- advice, command line


def test_a_model_that_gains_nothing_is_told_so(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    plan = a_plan(text, "scalar:rule=peak_lse,threshold=-30", tasks=("kl",), samples=1)
    evaluation = Evaluation(model, tokenizer, plan, tmp_path / "results.json")
    evaluation.run()
    content = load(tmp_path / "results.json")
    (sentence,) = advice(content)
    assert "At 512 tokens there is nothing to gain" in sentence
    assert "Leave this model dense" in sentence

    for record in content["records"]:
        record["sparsity"] = 0.5
        for band in record["bands"]:
            band["kl"] = 1.0
    (sentence,) = advice(content)
    assert "gain little" in sentence
    for record in content["records"]:
        for band in record["bands"]:
            band["kl"] = 0.001
    (sentence,) = advice(content)
    assert "skips 50% of the blocks" in sentence
    assert sentence.endswith("speed-up is then 1.33x.")
    for configuration in content["header"]["configurations"].values():
        configuration["voters"] = 4
    (sentence,) = advice(content)
    assert sentence.endswith("1.33x, 1.78x if blocks are chosen in 8 bits.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare with dense"),
        (["--k", "4"], "give --thresholds"),
        (["--thresholds", "none.safetensors"], "a table needs points"),
        (["--thresholds", "none.safetensors", "--k", "4"], "there is no threshold file"),
        (["--point", "k4", "--thresholds", "none"], "AXIS=NUMBER"),
        (["--config", "sliding_window:window=8"], "need text"),
        (["--config", "sliding_window:window=8", "--text", "x", "--text-part", "1:0"], "A:B"),
        ([*_PLAN, "--tasks", "kl,needle", "--needle-keys", "100"], "between 1 and 54, got 100"),
        ([*_PLAN, "--tasks", "kl,needle", "--needle-keys", "0"], "between 1 and 54, got 0"),
        ([*_PLAN, "--tasks", "kl,needle", "--depths", "0,1.5"], "between 0 and 1, got 1.5"),
        ([*_PLAN, "--tasks", "kl,ruler"], "bsfa-hf[harness]"),
        ([*_PLAN, "--tasks", "kl,harness:any"], "bsfa-hf[harness]"),
        ([*_PLAN, "--config", _SEARCHED, "--text-part", "0:1"], "starts above 0"),
        (["--config", _SEARCHED, "--tasks", "needle"], "give --text"),
        (
            [*_PLAN, "--config", _SEARCHED, "--lengths", "4096,512"],
            "0.7 cannot be reached: of prompts of 512 tokens, 0.400 of the blocks are forced",
        ),
    ],
)
def test_the_command_line_says_what_is_wrong_before_it_loads_a_model(
    arguments: list[str],
    message: str,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    given = [str(text) if argument == "TEXT" else argument for argument in arguments]
    assert main(["evaluate", "--model", "nowhere", *given]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "loading" not in err


@pytest.mark.parametrize(
    ("plan", "out", "message"),
    [
        ({"lengths": (512, 1024), "samples": 20}, "r.json", "20 windows of 1024 tokens .* gives 1"),
        ({"lengths": (512, 200), "tasks": ("kl", "needle")}, "r.json", "200 tokens are too few"),
        ({"lengths": (512,), "tasks": ("kl", "niah_single_1")}, "r.json", "no such task"),
        ({"lengths": (512,)}, "file/r.json", "file"),
    ],
    ids=str,
)
def test_what_needs_the_model_is_checked_before_anything_is_evaluated(
    plan: dict[str, Any],
    out: str,
    message: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Lacking(SeededHarness):
        def load(self, task: str, length: int, seed: int) -> int:
            raise HarnessError("no such task")

    use_seeded_harness(monkeypatch)
    monkeypatch.setattr(run, "Harness", Lacking)
    (tmp_path / "file").touch()
    told: list[str] = []
    made = a_plan(text, "sliding_window:window=64", **plan)
    with pytest.raises((ValueError, HarnessError, OSError), match=message):
        Evaluation(model, tokenizer, made, tmp_path / out, progress=told.append).run()
    assert told == []


def test_a_threshold_is_found_on_a_window_of_every_kind(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = run.find_scalar
    searched: list[Any] = []

    def find(found: Any, samples: Any, **options: Any) -> Any:
        searched.append(samples)
        return right(found, samples, **options)

    monkeypatch.setattr(run, "find_scalar", find)
    for samples in (1, 2):  # more of them are added without another threshold
        plan = a_plan(text, _SEARCHED.replace("0.7", "0.2"), tasks=("kl",), samples=samples)
        Evaluation(model, tokenizer, plan, tmp_path / "results.json").run()
    expected = [
        read_windows(text / kind, tokenizer, length=LENGTH, count=1, part=(0.0, 0.5))[0].ids
        for kind in ("code", "novels")
    ]
    assert [sorted(each) for each in searched] == [sorted(expected)] * 2


def test_a_kind_without_text_to_find_a_threshold_on_is_told(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "text" / "short").mkdir(parents=True)
    shutil.copytree(text / "code", tmp_path / "text" / "code")
    (tmp_path / "text" / "short" / "a.txt").write_text("x" * 700)
    plan = a_plan(tmp_path / "text", _SEARCHED.replace("0.7", "0.2"), part=(0.2, 1.0))
    with pytest.raises(EvaluationError, match=r"starts at 0\.2; there are fewer of short"):
        Evaluation(model, tokenizer, plan, tmp_path / "results.json")
    # What is not evaluated on need not be there.
    plan = dataclasses.replace(plan, samples=1)
    Evaluation(model, tokenizer, plan, tmp_path / "results.json")


def chosen_by(arguments: list[str]) -> list[str]:
    parsed = make_parser().parse_args(["evaluate", "--model", "m", *arguments])
    return [each.option("selection") for each in configurations(parsed)]


def test_the_selection_option_is_for_configurations_that_name_none(tmp_path: Path) -> None:
    path = a_table(tmp_path / "table", -1.0)
    arguments = ["--selection", "int8", "--thresholds", str(path), "--target-sparsity", "0.5"]
    arguments += ["--config", "scalar:rule=absolute,threshold=-1"]
    arguments += ["--config", "scalar:rule=absolute,threshold=-1,selection=exact"]
    arguments += ["--config", "sliding_window:window=64"]
    assert chosen_by(arguments) == ["int8", "int8", "exact", ""]
    assert chosen_by(arguments[:2] + arguments[6:]) == ["int8", "exact", ""]
    with pytest.raises(ValueError, match="--selection int8 is for tables and scalars"):
        chosen_by(["--selection", "int8", "--config", "sliding_window:window=64"])


def test_plotting_without_pairs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    Results(path, a_header()).write()
    assert main(["plot", str(path), "--out", str(tmp_path / "plots")]) == 2
    assert "no results" in capsys.readouterr().err


@pytest.mark.model
def test_the_real_model_is_evaluated_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    arguments = [
        *("evaluate", "--model", os.environ["BSFA_TEST_MODEL"]),
        *("--text", os.environ["BSFA_TEST_TEXT"], "--lengths", "512", "--samples", "1"),
        *("--tasks", "kl,needle", "--depths", "0.5", "--out", str(out)),
        *("--config", "lse=scalar:rule=peak_lse,threshold=-5"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| lse |" in printed
    rows = {(row.task, row.name): row for row in summarise(json.loads(out.read_text()))}
    lse = rows["text", "lse"]
    assert lse.kl is not None
    assert 0 < lse.kl.mean < 0.1
    assert rows["needle", "dense"].accuracy == share_interval(1, 1)
    assert dataclasses.asdict(lse)["samples"] == 1
