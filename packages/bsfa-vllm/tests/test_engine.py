# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The real engine on a CPU, with a real small model: what it answers, and what it counts."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bsfa_vllm
from bsfa_calib import ThresholdTable, models
from bsfa_calib.reasons import Reason
from bsfa_vllm.planning import Plan

pytestmark = pytest.mark.vllm

LEARNED = Path("thresholds/smollm2-135m-instruct/4k-learned-64x64.safetensors")
POINT = "target_sparsity=0.65"
# Tokens of each prompt of a mixed batch: some have blocks to skip, some have not.
LENGTHS = (1500, 10, 700, 60, 330)
BUDGETS = (100, 128, 1000)
ANSWER = 12


@pytest.fixture(autouse=True, scope="module")
def _surroundings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The real model as a folder that vLLM loads."""
    path = tmp_path_factory.mktemp("model") / "SmolLM2-135M-Instruct"
    loaded = models.load(os.environ["BSFA_TEST_MODEL"], dtype="float32", device="cpu")
    # transformers does not save what came out of a GGUF file as it is.
    loaded.model.config.__dict__.pop("quantization_config", None)
    loaded.model.hf_quantizer, loaded.model.is_quantized = None, False
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def learned() -> str:
    """The shipped table for 4K tokens."""
    for parent in Path(__file__).resolve().parents:
        if (parent / LEARNED).exists():
            return str(parent / LEARNED)
    pytest.skip("the shipped tables lie beside the source tree only")


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A table of -inf, which keeps every block."""
    path = tmp_path_factory.mktemp("table") / "everything.safetensors"
    ThresholdTable(
        thresholds=np.full((1, 30, 9, 1), -np.inf, np.float32),
        points=(0.5,),
        axis="target_sparsity",
        model="SmolLM2-135M-Instruct",
        q_block=64,
        k_block=64,
    ).save(path)
    return str(path)


@pytest.fixture(scope="session")
def prompts(folder: str) -> list[list[int]]:
    """Tokens of real text, without a common beginning."""
    from transformers import AutoTokenizer

    root = Path(os.environ["BSFA_TEST_TEXT"])
    text = "\n\n".join(
        file.read_text(encoding="utf-8")[:9000] for file in sorted(root.rglob("*.txt"))[:4]
    )
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    starts = np.cumsum([0, *LENGTHS])
    assert len(ids) > starts[-1]
    return [ids[start : start + length] for start, length in zip(starts, LENGTHS, strict=False)]


def random_llama(path: Path, tokenizer: str, kv_heads: int) -> str:
    """A Llama of two layers with random weights, in a folder with another model's tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=4096,
        initializer_range=0.1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return str(path)


@contextlib.contextmanager
def engine(folder: str, table: str | None, *, budget: int = 2048, **options: Any) -> Iterator[Any]:
    """vLLM's engine in this process; without a table it is vLLM's own."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    additional = {} if table is None else {"bsfa": {"thresholds": table, "point": POINT}}
    if table is not None and "everything" in table:
        del additional["bsfa"]["point"]
    llm: Any = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        additional_config=additional,
        **{"max_model_len": 4096, "enable_prefix_caching": False, **options},
    )
    try:
        yield llm
    finally:
        with contextlib.suppress(AttributeError):
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answers(llm: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Greedy tokens for each prompt, all asked at once."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": ids} for ids in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    found = llm.generate(asked, sampling, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


@pytest.fixture(scope="module")
def dense(folder: str, prompts: list[list[int]]) -> list[list[int]]:
    """What vLLM's own attention answers."""
    with engine(folder, None, budget=1000) as llm:
        found = answers(llm, prompts)
    assert bsfa_vllm.reports() == []
    return found


@pytest.mark.parametrize("budget", BUDGETS)
def test_minus_infinity_answers_as_vllm_does(
    folder: str, everything: str, prompts: list[list[int]], dense: list[list[int]], budget: int
) -> None:
    with engine(folder, everything, budget=budget) as llm:
        assert answers(llm, prompts) == dense
        report = bsfa_vllm.statistics()
    assert report.sparse_calls["exact"] > 0
    assert report.mean_kept_fraction == 1
    assert report.dense_calls[Reason.DECODE] >= 30 * len(prompts) * (ANSWER - 2)
    assert report.dense_calls[Reason.TOO_SHORT] >= 30


def by_transformers(folder: str, table: str, ids: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens and kept shares of bsfa-hf at the same point."""
    import bsfa_hf

    loaded = models.load(folder, dtype="float32", device="cpu")
    with torch.no_grad(), bsfa_hf.enabled(loaded.model, table, POINT) as statistics:
        out = loaded.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
            max_new_tokens=ANSWER,
            min_new_tokens=ANSWER,
            do_sample=False,
        )
    return out[0, len(ids) :].tolist(), statistics.kept_fraction


def test_whole_chunks_answer_as_transformers_does(
    folder: str, learned: str, prompts: list[list[int]]
) -> None:
    expected, kept = by_transformers(folder, learned, prompts[0])
    for budget in (2048, 128):
        # Chunks of 128 end with a block of queries.
        with engine(folder, learned, budget=budget) as llm:
            assert answers(llm, prompts[:1]) == [expected]
            report = bsfa_vllm.statistics()
        assert report.mean_kept_fraction < 0.7
        np.testing.assert_allclose(report.kept_fraction, kept, atol=2e-3)
        assert report.sparse_calls == {"exact": 30 * -(-(1500 - 64) // budget), "int8": 0}


def test_a_mixed_batch_answers_as_each_request_alone(
    folder: str, learned: str, prompts: list[list[int]]
) -> None:
    with engine(folder, learned) as llm:
        alone = [answers(llm, [prompt])[0] for prompt in prompts]
        kept = bsfa_vllm.statistics().kept_blocks
        assert answers(llm, prompts) == alone
        both = bsfa_vllm.statistics().kept_blocks
    # The batch of 2600 tokens is cut once, by the budget, within a block of queries.
    np.testing.assert_allclose(both, 2 * np.array(kept), rtol=0.05)


def test_a_prefix_that_is_cached_is_not_computed_again(
    folder: str, learned: str, prompts: list[list[int]]
) -> None:
    with engine(folder, learned, enable_prefix_caching=True) as llm:
        first = answers(llm, prompts[:1])
        visible = sum(bsfa_vllm.statistics().visible_blocks)
        assert answers(llm, prompts[:1]) == first
        again = sum(bsfa_vllm.statistics().visible_blocks)
    # 11 pages of 128 tokens are there already; 92 tokens are left.
    assert 0 < again - visible < 0.2 * visible


def test_a_request_that_is_aborted_leaves_the_others_alone(
    folder: str, learned: str, prompts: list[list[int]]
) -> None:
    from vllm import SamplingParams

    with engine(folder, learned, budget=256) as llm:
        expected = answers(llm, prompts[2:3])[0]
        sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
        inner = llm.llm_engine
        for name, ids in (("aborted", prompts[0]), ("kept", prompts[2])):
            inner.add_request(name, {"prompt_token_ids": ids}, sampling)
        found: dict[str, list[int]] = {}
        steps = 0
        while inner.has_unfinished_requests():
            for output in inner.step():
                if output.finished:
                    found[output.request_id] = list(output.outputs[0].token_ids)
            steps += 1
            if steps == 2:
                inner.abort_request(["aborted"])
        assert "aborted" not in found or len(found["aborted"]) < ANSWER
        assert found["kept"] == expected


def one_by_one(llm: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Greedy tokens for each prompt, each asked when the one before is answered."""
    return [answers(llm, [prompt])[0] for prompt in prompts]


@dataclass(frozen=True)
class Asked:
    """A request of the load.

    Attributes:
        prompt: which of the prompts.
        tokens: of its answer.
        aborted: steps after which it is withdrawn; None lets it be answered.
    """

    prompt: int
    tokens: int
    aborted: int | None


def under_load(llm: Any, prompts: Sequence[list[int]], load: Sequence[Asked]) -> dict[int, Any]:
    """The last outputs of requests that arrive at random and are withdrawn at random, by index."""
    from vllm import SamplingParams

    draws, inner = random.Random(1), llm.llm_engine
    found: dict[int, Any] = {}
    due: dict[int, list[str]] = {}
    step = arrived = 0
    while arrived < len(load) or inner.has_unfinished_requests():
        for _ in range(draws.choice((0, 1, 1, 2, 6))):
            if arrived == len(load):
                break
            one = load[arrived]
            sampling = SamplingParams(temperature=0, max_tokens=one.tokens, ignore_eos=True)
            ids = {"prompt_token_ids": prompts[one.prompt]}
            inner.add_request(str(arrived), ids, sampling)
            if one.aborted is not None:
                due.setdefault(step + one.aborted, []).append(str(arrived))
            arrived += 1
        inner.abort_request(due.pop(step, []))
        for output in inner.step():
            found[int(output.request_id)] = output
        step += 1
    return found


def alive(kind: type) -> int:
    """Objects of a class that something holds."""
    gc.collect()
    return sum(isinstance(one, kind) for one in gc.get_objects())


def test_a_load_with_aborts_answers_each_request_and_leaves_nothing(
    folder: str, everything: str, prompts: list[list[int]]
) -> None:
    """200 requests, cut, preempted, from cached prefixes and withdrawn, against one by one."""
    draws, text = random.Random(0), [token for prompt in prompts for token in prompt]
    # A third begin alike, so that prefixes of others are in the cache.
    lengths = [draws.choice((5, 60, 124, 126, 129, 252, 380, 900)) for _ in range(24)]
    starts = [draws.choice((0, draws.randrange(1500), 700)) for _ in lengths]
    asked = [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    load = [
        Asked(
            draws.randrange(len(asked)),
            draws.randrange(1, ANSWER + 1),
            draws.choice((0, 1, 2, 5, 9)) if draws.random() < 0.2 else None,
        )
        for _ in range(200)
    ]
    with engine(folder, None) as llm:
        expected = one_by_one(llm, asked)
    # Pages for little more than the longest prompt: others wait, or are thrown out and come back.
    pages = {"max_model_len": 1024, "num_gpu_blocks_override": 10}
    with engine(folder, everything, budget=300, enable_prefix_caching=True, **pages) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        pool, schedule = scheduler.kv_cache_manager.block_pool, scheduler.schedule
        rows, thrown_out = 0, set[str]()

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal rows
            made = schedule(*arguments, **options)
            rows += len(made.num_scheduled_tokens)
            thrown_out.update(one.request_id for one in scheduler.running if one.num_preemptions)
            return made

        scheduler.schedule = counted
        free, held = pool.get_num_free_blocks(), []
        for part in (load[:100], load[100:]):
            found = under_load(llm, asked, part)
            for index, one in enumerate(part):
                output = found.get(index)
                if output is None or not output.finished:
                    assert one.aborted is not None
                    continue
                tokens = list(output.outputs[0].token_ids)
                if output.outputs[0].finish_reason == "abort":
                    assert one.aborted is not None
                else:
                    assert len(tokens) == one.tokens
                assert tokens == expected[one.prompt][: len(tokens)]
            assert not llm.llm_engine.has_unfinished_requests()
            assert not scheduler.requests
            assert pool.get_num_free_blocks() == free
            held.append((alive(Plan), alive(torch.Tensor)))
        report = bsfa_vllm.statistics()
    calls = sum(report.sparse_calls.values()) + sum(report.dense_calls.values())
    assert calls == 30 * rows
    assert report.sparse_calls["exact"] > 30 * 50
    assert thrown_out
    assert report.kept_blocks == report.visible_blocks
    assert len(set(report.visible_blocks)) == 1
    # Plans and tensors of the second hundred took the place of those of the first.
    assert held[0][0] == held[1][0] <= 1
    assert held[1][1] <= held[0][1] + 8


@contextlib.contextmanager
def ranks(number: int) -> Iterator[None]:
    """A core for each rank of vLLM's CPU workers."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < number:
        pytest.skip(f"{number} ranks need as many cores, and there are {len(cores)}")
    with pytest.MonkeyPatch.context() as patch:
        if number > 1:
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, cores[:number])))
        patch.setenv("BSFA_STATISTICS_INTERVAL", "0.2")
        yield


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_two_ranks_answer_as_one_does(tmp_path: Path, folder: str, kv_heads: int) -> None:
    """Each takes the thresholds of its own heads, also where both hold the only kv head."""
    model = random_llama(tmp_path / "random-llama", folder, kv_heads)
    draws = np.random.default_rng(0)
    path = tmp_path / "by-head.safetensors"
    ThresholdTable(
        thresholds=draws.choice([-np.inf, 1.0, 3.0], (1, 2, 8, 1)).astype(np.float32),
        points=(0.65,),
        axis="target_sparsity",
        model="random-llama",
        rule="peak_lse",
        q_block=64,
        k_block=64,
    ).save(path)
    asked = [draws.integers(0, 4096, length).tolist() for length in (700, 50, 300, 129)]
    found, counted = [], []
    for number in (1, 2):
        with ranks(number), engine(model, str(path), tensor_parallel_size=number) as llm:
            found.append(answers(llm, asked))
            time.sleep(1)
            report = bsfa_vllm.statistics()
        counted.append((report.kept_blocks, report.visible_blocks))
        assert report.sparse_calls["exact"] == 2 * 3
        assert report.mean_kept_fraction < 0.95
    assert found[0] == found[1]
    assert counted[0] == counted[1]


@pytest.fixture
def no_numba_left() -> Iterator[None]:
    """Take what a test imports of numba out of the list of modules.

    An engine of vLLM 0.32 looks for kernels in all of them when it starts, and fails at llvmlite's.
    """
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("numba", "llvmlite"):
            del sys.modules[name]


@pytest.mark.usefixtures("no_numba_left")
def test_drafts_of_n_grams_leave_the_prefill_block_sparse(
    folder: str, learned: str, prompts: list[list[int]]
) -> None:
    """Text that repeats itself has its drafts verified."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    asked = [prompts[2], prompts[4] * 2]
    found = []
    for options in ({}, {"speculative_config": drafts}):
        with engine(folder, learned, **options) as llm:
            found.append(answers(llm, asked))
            report = bsfa_vllm.statistics()
        found.append((report.sparse_calls, report.kept_blocks))
    assert found[:2] == found[2:]
    assert report.sparse_calls["exact"] == 30 * 2
    assert 0 < report.dense_calls[Reason.DECODE] <= 30 * 2 * (ANSWER - 1)


def test_a_table_of_another_model_is_refused(folder: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    ThresholdTable(
        thresholds=np.zeros((1, 30, 9, 1), np.float32),
        points=(0.65,),
        axis="target_sparsity",
        model="another-model",
    ).save(path)
    with (
        pytest.raises(ValueError, match="thresholds are of another-model"),
        engine(folder, str(path)),
    ):
        pass


def test_engines_in_processes_of_their_own_count_each_for_itself(
    folder: str,
    learned: str,
    everything: str,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("BSFA_STATISTICS_INTERVAL", "0.2")
    for table in (learned, everything):
        with engine(folder, table) as llm:
            answers(llm, prompts[2:3])
    first, second = bsfa_vllm.reports()
    assert first.mean_kept_fraction < 0.9 < second.mean_kept_fraction == 1
    assert first.visible_blocks == second.visible_blocks
    assert first.engine != second.engine


# ------------------------------------------------------------------------------------------- sinks


def small_gpt_oss() -> Any:
    """A gpt-oss with random weights, whose heads have sinks of all sizes."""
    import transformers

    config = transformers.AutoConfig.for_model(
        "gpt_oss",
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        sliding_window=100,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 1024,
        },
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            parameter.data.normal_(0, 0.16)
        elif "sinks" in name:
            parameter.data.copy_(torch.tensor([-30.0, 1.0, 3.0, 8.0]))
        elif "lm_head" in name:
            parameter.data.normal_()
    return model


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """The model, and its folder."""
    import vllm

    if tuple(map(int, vllm.__version__.split(".")[:2])) < (0, 32):
        pytest.skip("this release's own kernel for CPUs takes no sinks of a model in float32")
    model, path = small_gpt_oss(), tmp_path_factory.mktemp("model") / "small-gpt-oss"
    model.save_pretrained(path)
    return model, str(path)


@pytest.mark.parametrize("budget", [100, 128, 1000])
@pytest.mark.parametrize("value", [-np.inf, 0.5])
def test_full_layers_with_sinks_answer_as_vllm_and_transformers_do(
    gpt_oss: tuple[Any, str], tmp_path: Path, value: float, budget: int
) -> None:
    import bsfa_hf

    model, folder = gpt_oss
    table = ThresholdTable(
        thresholds=np.full((1, 4, 4, 1), value, np.float32),
        points=(0.65,),
        axis="target_sparsity",
        model="small-gpt-oss",
        rule="peak_lse",
        q_block=64,
        k_block=64,
    )
    table.save(tmp_path / "table.safetensors")
    ids = torch.randint(3, 97, (732,), generator=torch.Generator().manual_seed(1)).tolist()
    options: Any = {"max_new_tokens": ANSWER, "do_sample": False}
    with torch.no_grad(), bsfa_hf.enabled(model, table) as statistics:
        expected = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    settings: Any = {"budget": budget, "skip_tokenizer_init": True, "max_model_len": 1024}
    with engine(folder, str(tmp_path / "table.safetensors"), **settings) as llm:
        found = answers(llm, [ids])[0]
        report = bsfa_vllm.statistics()
    assert report.dense_layers == {0: str(Reason.SLIDING_WINDOW), 2: str(Reason.SLIDING_WINDOW)}
    assert report.sparse_calls["exact"] > 0
    assert Reason.SINKS not in report.dense_calls
    if budget != 100:  # chunks end with a block of queries
        assert found == expected
        kept = [statistics.kept_fraction[layer] for layer in (1, 3)]
        np.testing.assert_allclose([report.kept_fraction[layer] for layer in (1, 3)], kept)
        assert max(kept) < 0.9 or value == -np.inf
    if value == -np.inf:
        with engine(folder, None, **settings) as llm:
            assert answers(llm, [ids])[0] == found
