# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
import argparse
import hashlib
import json
import lzma
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
from extend import check, data, merge, tasks, train
from harness import read_records

WORDS = [f"{a}{b}" for a in ("ash", "bel", "cor", "dun", "elm") for b in "abcdefghijklmnopqrst"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:.*gradient_checkpointing_(enable|disable).*:FutureWarning",
)


@pytest.fixture(scope="session")
def prepared(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    sources = [source for source in data.SOURCES if source.registry == "repository"]
    data.prepare(folder, tokenizer, sources[:2])
    return folder


@pytest.fixture
def shape(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(models.SHAPES, "tiny", {**models.SHAPES["tiny"], "vocab_size": 2048})
    return "tiny"


def build(shape: str) -> Any:
    return models.build(shape, dtype=torch.float32, device=torch.device("cpu"))


def write_adapter(folder: Path, model: Any, **changes: Any) -> dict[str, torch.Tensor]:
    """An adapter of rank 2 on two layers' projections, by hand; returns what it adds to each."""
    factors, added = {}, {}
    torch.manual_seed(1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("q_proj", "down_proj")):
            down, up = torch.randn(2, module.in_features), torch.randn(module.out_features, 2)
            factors[f"base_model.model.{name}.lora_A.weight"] = down
            factors[f"base_model.model.{name}.lora_B.weight"] = up
            added[name] = 1.5 * up @ down
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    extension = {"rope_theta": 7e5, "max_position_embeddings": 65536}
    (folder / "extension.json").write_text(json.dumps(extension))
    return added


def test_the_manifest_names_the_source_and_held_out_novels_are_no_source(prepared: Path) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert [source["name"] for source in manifest["sources"]] == ["northangerabbey", "persuasion"]
    tokens = sum(source["tokens"] for source in manifest["sources"])
    assert (prepared / "prose.bin").stat().st_size == 2 * tokens
    assert all(source.licence for source in data.SOURCES)
    assert not set(data.HELD_OUT_NOVELS) & {source.name for source in data.SOURCES}


def test_text_is_taken_out_of_pages_and_packed_files() -> None:
    page = b"<html><head><title>no</title></head><body><p>One.</p><script>no</script><p>Two</p>"
    assert data.plain_text("a.html", page) == "One.\nTwo"
    assert data.plain_text("a.txt.xz", lzma.compress(b"One.  \r\n\n\n\nTwo")) == "One.\n\nTwo"


@pytest.mark.parametrize("length", [1024, 4096])
def test_windows_are_full_repeatable_and_hold_their_answers(
    prepared: Path, tokenizer: Any, length: int
) -> None:
    windows = data.Windows(prepared, tokenizer)
    answered = 0
    for seed in range(60):
        ids, kinds = windows.make(length, seed)
        again, _ = windows.make(length, seed)
        assert len(ids) == len(kinds) == length
        assert np.array_equal(ids, again)
        answers = np.flatnonzero(kinds == data.ANSWER)
        if len(answers) == 0:
            assert (kinds == data.TEXT).all()
            continue
        answered += 1
        # The first word of the first answer stands in the text before it.
        rest = np.flatnonzero(kinds[answers[0] :] != data.ANSWER)
        end = answers[0] + rest[0] if len(rest) else length
        answer = tokenizer.decode(ids[answers[0] : end]).strip().rstrip(".")
        assert answer.split(", ")[0] in tokenizer.decode(ids[: answers[0]])
    assert answered > 30


def test_a_tokenizer_without_words_is_refused(prepared: Path) -> None:
    class Bytes:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [chr(i) for i in ids]

        def __len__(self) -> int:
            return 256

    with pytest.raises(ValueError, match="at least 200 whole words, got 0"):
        data.Windows(prepared, Bytes())


@pytest.mark.parametrize("seed", range(5))
def test_counts_of_words_are_right(seed: int) -> None:
    task = tasks.common_words(random.Random(seed), WORDS)
    assert task.haystack is not None
    text = task.haystack(20_000)
    for separator in "/;,\n":
        text = text.replace(separator, " ")
    wanted = task.questions[0].answer.strip().split(", ")
    found = [word for word, _ in Counter(text.split()).most_common(len(wanted))]
    assert sorted(found) == sorted(wanted)

    task = tasks.coded_words(random.Random(seed))
    assert task.haystack is not None
    counts = Counter(task.haystack(50_000).replace(",", " ").replace(".", " ").split())
    assert task.questions[0].answer.strip().split(", ") == [w for w, _ in counts.most_common(3)]


@pytest.mark.parametrize("seed", range(8))
def test_chains_lead_to_the_names_that_are_asked_for(seed: int) -> None:
    task = tasks.chains(random.Random(seed), count=3, length=4)
    for question in task.questions:
        number = next(word for word in question.text.replace(",", " ").split() if word.isdigit())
        wanted = question.answer.strip().split(", ")
        # A name holds the number if its statement has the number or a name known to hold it.
        known: set[str] = set()
        for statement in task.hidden:
            words = statement.replace(".", " ").replace(";", " ").split()
            names = [word for word in words if word.isupper() and word.isalpha()]
            if number in words or known & set(names):
                known |= set(names)
        assert sorted(known) == sorted(wanted)


def test_no_window_uses_a_wording_that_something_is_measured_with(
    prepared: Path, tokenizer: Any
) -> None:
    from bsfa_hf.evaluation import needle

    measured = [wording.statement for wording in tasks.HELD_OUT]
    measured += [wording.question for wording in tasks.HELD_OUT]
    measured += [needle.NEEDLE, needle.QUESTION, needle.INTRODUCTION]
    starts = [" ".join(text.split("{")[0].split()[:4]) for text in measured]
    windows = data.Windows(prepared, tokenizer, plain=0.0)
    for seed in range(60):
        text = tokenizer.decode(windows.make(2048, seed)[0])
        assert not [start for start in starts if start in text]


def test_a_schedule_follows_the_share_that_is_done() -> None:
    schedule = train.Schedule.parse(["0:32K", "0.5:32K,128K"])
    assert schedule.longest == 131072
    assert [schedule.length(0.4, step) for step in range(2)] == [32768, 32768]
    assert [schedule.length(0.5, step) for step in range(2)] == [32768, 131072]
    with pytest.raises(ValueError, match="begin at 0"):
        train.Schedule.parse(["0.5:32K"])
    with pytest.raises(ValueError, match="SHARE:LENGTH"):
        train.Schedule.parse(["32K"])
    for length in ("", "K", "-5", "1.5K", "x"):
        with pytest.raises(ValueError, match=f"such as 512 or 32K, got '{length}'"):
            train.Schedule.parse([f"0:{length}"])
    for length in ("0", "0K"):
        with pytest.raises(ValueError, match=f"a length must be at least 1, got {length}"):
            train.Schedule.parse([f"0:{length}"])
    assert train.rate(0.0, 0) < train.rate(0.0, 19) == 1.0 > train.rate(0.5, 99) > train.rate(1, 99)


def test_a_merged_adapter_adds_the_product_and_sets_the_rotary_base(
    shape: str, tmp_path: Path
) -> None:
    model = build(shape)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    added = write_adapter(tmp_path / "adapter", model)
    models.merge_adapter(model, tmp_path / "adapter")
    for name, value in model.state_dict().items():
        change = added.get(name.removesuffix(".weight"), torch.zeros(()))
        torch.testing.assert_close(value, before[name] + change)
    head_dim = model.config.head_dim
    exponents = torch.arange(0, head_dim, 2) / head_dim
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, 7e5**-exponents)
    assert model.config.max_position_embeddings == 65536
    with torch.inference_mode():
        assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_a_merged_model_reads_back_the_same(shape: str, tokenizer: Any, tmp_path: Path) -> None:
    from bsfa_calib.models import load

    model = build(shape)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_adapter(tmp_path / "adapter", model)
    words = ["--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter")]
    assert merge.main([*words, "--dtype", "float32", "--out", str(tmp_path / "merged")]) == 0
    models.merge_adapter(model, tmp_path / "adapter")
    again = load(tmp_path / "merged", dtype="float32", device="cpu").model
    assert again.config.max_position_embeddings == 65536
    ids = torch.arange(64)[None]
    with torch.inference_mode():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_adapter_that_does_not_fit_is_refused(shape: str, tmp_path: Path) -> None:
    model = build(shape)
    write_adapter(tmp_path / "dora", model, use_dora=True)
    with pytest.raises(ValueError, match="plain LoRA"):
        models.merge_adapter(model, tmp_path / "dora")
    write_adapter(tmp_path / "pattern", model, rank_pattern={"q_proj": 4})
    with pytest.raises(ValueError, match="one rank"):
        models.merge_adapter(model, tmp_path / "pattern")
    write_adapter(tmp_path / "fits", model)
    with pytest.raises(ValueError, match="is not for this model"):
        models.merge_adapter(nn.Linear(2, 2), tmp_path / "fits")
    arguments = argparse.Namespace(
        model_shape=shape, adapter=tmp_path / "fits", device="cpu", dtype="float32", seed=0
    )
    with pytest.raises(ValueError, match="--adapter needs --model"):
        models.load(arguments)
    file = tmp_path / "fits" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged"):
        models.merge_adapter(model, tmp_path / "fits")
    file.write_bytes(content)
    about = tmp_path / "fits" / "extension.json"
    extension = json.loads(about.read_text()) | {"sha256": hashlib.sha256(content).hexdigest()}
    about.write_text(json.dumps(extension))
    models.merge_adapter(model, tmp_path / "fits")
    file.write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])
    with pytest.raises(ValueError, match=r"its SHA-256 must be [0-9a-f]{64}, got [0-9a-f]{64}"):
        models.merge_adapter(model, tmp_path / "fits")


@pytest.mark.parametrize(
    "name", ["SmolLM2-135M-Instruct-long", "another/SmolLM2-135M-Instruct.Q8_0.gguf"]
)
def test_an_adapter_is_for_the_model_that_it_was_trained_on(name: str) -> None:
    adapter = Path(train.__file__).parent / "smollm2-135m-instruct-128k"
    arguments = argparse.Namespace(
        model=name, model_shape=None, adapter=adapter, device="cpu", dtype="float32"
    )
    said = f"is for the model SmolLM2-135M-Instruct.Q4_1.gguf, got {Path(name).name}"
    with pytest.raises(ValueError, match=re.escape(said)):
        models.load(arguments)


def test_scaled_rotary_embeddings_are_refused(shape: str) -> None:
    model = build(shape)
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(ValueError, match="of type default, got yarn"):
        models.set_rotary(model, 1e6, 4096)


def test_an_interrupted_run_goes_on_to_the_same_adapter(
    shape: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    words = ["--model-shape", shape, "--data", str(prepared), "--cpu", "--save-minutes", "0"]
    words += ["--steps", "6", "--schedule", "0:256", "0.5:512,256", "--rank", "4"]
    words += ["--log-steps", "2", "--learning-rate", "0.01"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert train.main([*words, "--out", str(straight)]) == 0

    step = torch.optim.AdamW.step
    done: list[int] = []

    def fail_at_the_fourth(self: Any, *arguments: Any, **options: Any) -> Any:
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fail_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            train.main([*words, "--out", str(broken)])
    assert json.loads((broken / "extension.json").read_text())["steps"] == 3
    assert train.main([*words, "--out", str(broken), "--resume"]) == 0

    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (straight, broken))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(value.abs().max() > 0 for name, value in one.items() if "lora_B" in name)
    extension = json.loads((broken / "extension.json").read_text())
    assert extension["rope_theta"] == 5e6
    assert extension["max_position_embeddings"] == 512
    assert extension["steps"] == 6

    # A run that starts from it and learns nothing ends with it.
    words += ["--start-from", str(straight), "--steps", "1", "--learning-rate", "0"]
    assert train.main([*words, "--out", str(tmp_path / "further")]) == 0
    further = load_file(tmp_path / "further" / "adapter_model.safetensors")
    assert all(torch.equal(one[name], further[name]) for name in one)
    written = json.loads((tmp_path / "further" / "extension.json").read_text())
    assert written["started_from"] == json.loads((straight / "extension.json").read_text())


def test_a_run_goes_on_as_its_adapter_says(shape: str, tmp_path: Path) -> None:
    words = ["--model-shape", shape, "--data", str(tmp_path), "--steps", "1", "--cpu"]
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 12}
    stated = {"base_model": shape, "rope_theta": 5e5, "max_position_embeddings": 512, "steps": 7}
    for folder in (adapter, out):
        folder.mkdir()
        (folder / "extension.json").write_text(json.dumps(stated))
        (folder / "adapter_config.json").write_text(json.dumps(config))

    def settled(*more: str) -> tuple[Any, ...]:
        options = train.parse([*words, "--out", str(out), "--schedule", "0:1K", *more])
        about = train.settle(options)
        assert about["base_model"] == shape
        assert about["max_position_embeddings"] == 1024
        assert about["rope_theta"] == options.rope_theta
        return options.rope_theta, options.rank, options.alpha, about.get("started_from")

    start = ["--start-from", str(adapter)]
    assert settled() == (5e6, 16, 32, None)
    assert settled("--rope-theta", "1e6", "--rank", "8") == (1e6, 8, 32, None)
    assert settled(*start) == (5e5, 4, 12, stated)
    assert settled(*start, "--rope-theta", "1e6", "--rank", "4") == (1e6, 4, 12, stated)
    assert settled("--resume") == (5e5, 4, 12, None)
    (out / "extension.json").write_text(json.dumps({**stated, "started_from": {"steps": 2}}))
    assert settled(*start, "--resume") == (5e5, 4, 12, {"steps": 2})

    for more, said in (
        ([*start, "--rank", "16"], f"--rank must be 4, that of {adapter}, got 16"),
        ([*start, "--alpha", "32"], f"--alpha must be 12, that of {adapter}, got 32"),
        (["--resume", "--rope-theta", "5e6"], f"--rope-theta must be 500000, that of {out}, got"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            settled(*more)
    for kind in ({"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **kind}))
        with pytest.raises(ValueError, match=re.escape(str(adapter))):
            settled(*start)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "extension.json").write_text(json.dumps({**stated, "base_model": "another"}))
    with pytest.raises(ValueError, match=f"is for the model another, got {shape}"):
        settled(*start)
    with pytest.raises(FileNotFoundError):
        settled("--start-from", str(tmp_path / "nowhere"))
    for content, said in (
        ("{", "is damaged: "),
        ("[]", "must hold a JSON object, got list"),
        ('{"rope_theta": "1e6"}', "must state rope_theta above 0, got '1e6'"),
        ('{"rope_theta": 1e6}', "must state max_position_embeddings above 0, got None"),
    ):
        (adapter / "extension.json").write_text(content)
        with pytest.raises(ValueError, match=re.escape(f"{adapter / 'extension.json'} {said}")):
            settled(*start)


def test_an_adapter_merges_to_what_peft_computes(
    shape: str, prepared: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    words = ["--model-shape", shape, "--data", str(prepared), "--cpu", "--out", str(tmp_path)]
    assert train.main([*words, "--steps", "3", "--schedule", "0:256", "--rank", "4"]) == 0
    theirs = build(shape)
    models.set_rotary(theirs, 5e6, 256)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    ours = build(shape)
    models.merge_adapter(ours, tmp_path)
    ids = torch.arange(32)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )


def test_checkpointing_changes_no_gradient(
    shape: str, prepared: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    ids, kinds = data.Windows(prepared, tokenizer, plain=0.0).make(1024, 3)
    assert (kinds == data.ANSWER).any()
    options = train.parse(
        ["--model-shape", shape, "--data", str(prepared), "--out", "x", "--steps", "1", "--cpu"]
    )
    train.settle(options)
    schedule = train.Schedule.parse(["0:1K"])
    gradients = []
    for checkpointed in (True, False):
        model = train.build(options, schedule, torch.device("cpu"))
        train.recompute_layers(model.get_base_model(), checkpointed)
        assert model.get_base_model().is_gradient_checkpointing == checkpointed
        tensors = (torch.from_numpy(ids)[None], torch.from_numpy(kinds)[None])
        loss, losses = train.Loss(model, 0.3)(*tensors)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        text, answer = (losses[kinds[1:] == kind].mean() for kind in (data.TEXT, data.ANSWER))
        expected = 0.7 * text + 0.3 * answer if (kinds == data.TEXT).any() else 0.3 * answer
        torch.testing.assert_close(loss.detach(), expected)
    for with_it, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_it, without)


def test_short_windows_keep_their_activations(
    shape: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    seen: list[tuple[int, bool]] = []
    forward = train.Loss.forward

    def watched(self: Any, ids: torch.Tensor, kinds: torch.Tensor) -> Any:
        seen.append((ids.numel(), self.model.get_base_model().is_gradient_checkpointing))
        return forward(self, ids, kinds)

    monkeypatch.setattr(train.Loss, "forward", watched)
    words = ["--model-shape", shape, "--data", str(prepared), "--cpu", "--out", str(tmp_path)]
    words += ["--steps", "3", "--schedule", "0:256,512", "--recompute-from", "512"]
    assert train.main(words) == 0
    assert seen == [(256, False), (512, True), (256, False)]


def test_needles_of_the_check_lie_where_they_should(tokenizer: Any, novel: str) -> None:
    texts = [("novel", data.encode(tokenizer, novel[:60_000]))]
    for wording in ("evaluation", "cue", "question"):
        for index in range(3):
            case = check.Case(wording, 4, index, 3)
            made, answer = check.prompt(case, texts, tokenizer, 2048)
            assert len(made) + len(answer) <= 2048
            text = tokenizer.decode(made)
            place = text.index(tokenizer.decode(answer).strip()) / len(text)
            assert abs(place - case.depth) < 0.15
    with pytest.raises(ValueError, match="no text but code has 65536"):
        check.prompt(case, texts, tokenizer, 65536)


def test_the_check_writes_a_record_a_length(
    shape: str, tokenizer: Any, novel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate")
    model = build(shape)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_adapter(tmp_path / "adapter", model)
    for name in ("novels/emma", "novels/mansfieldpark", "essays/a", "code/b"):
        path = tmp_path / "text" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(novel[:12_000])
    out = tmp_path / "records.jsonl"
    words = ["--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter")]
    words += ["--text", str(tmp_path / "text"), "--device", "cpu", "--dtype", "float32"]
    words += ["--lengths", "1K,512", "--needles", "2", "--keys", "1", "--out", str(out)]
    assert check.main(words) == 0
    records = list(read_records(out))
    assert [record["seqlen"] for record in records] == [1024, 512]
    for record in records:
        assert record["kind"] == "extension"
        assert record["model"] == "model + adapter"
        assert record["max_position_embeddings"] == 65536
        assert str(tmp_path) not in record["command"]
        assert set(record["nll"]) == {"emma", "mansfieldpark", "essays", "code"}
        assert len(record["nll_mean"]["by_position"]) == check.BINS
        assert all(one["hits"] == 0 for one in record["needles"])  # random weights find nothing
    # The mean over positions is the model's own loss.
    ids = data.encode(tokenizer, novel[:12_000])[:1024]
    merged = build(shape)
    merged.load_state_dict(model.state_dict())
    models.merge_adapter(merged, tmp_path / "adapter")
    tensor = torch.tensor([ids])
    with torch.inference_mode():
        logits = merged(input_ids=tensor).logits[0, :-1]
    expected = nn.functional.cross_entropy(logits, tensor[0, 1:], reduction="none")
    torch.testing.assert_close(check.token_losses(merged, ids), expected)


def test_the_interval_of_a_share_is_wilsons() -> None:
    low, high = check.wilson(16, 16)
    assert low == pytest.approx(0.806, abs=1e-3)
    assert high == pytest.approx(1.0)
    assert check.wilson(0, 16)[0] == 0.0


ADAPTERS = [
    ("smollm2-135m-instruct-32k", [32768]),
    ("smollm2-135m-instruct-long", [32768, 65536, 131072]),
    ("smollm2-135m-instruct-128k", [131072]),
]


@pytest.mark.parametrize("name", [name for name, _ in ADAPTERS])
def test_a_shipped_adapter_is_small_complete_and_for_its_model(name: str) -> None:
    folder = Path(train.__file__).parent / name
    assert (folder / "adapter_model.safetensors").stat().st_size < 12_000_000
    factors = load_file(folder / "adapter_model.safetensors")
    assert {value.dtype for value in factors.values()} == {torch.bfloat16}
    assert len(factors) == 30 * 7 * 2
    assert all(value.isfinite().all() and value.abs().max() > 0 for value in factors.values())
    assert models.adapter_factors(folder).keys() == factors.keys()
    extension = json.loads((folder / "extension.json").read_text())
    assert len(extension["sha256"]) == 64
    assert extension["base_model"] == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert json.loads((folder / "manifest.json").read_text())["held_out_novels"] == [
        "emma",
        "mansfieldpark",
    ]


@pytest.mark.parametrize(("name", "lengths"), ADAPTERS)
def test_the_card_has_the_figures_of_the_records(name: str, lengths: list[int]) -> None:
    folder = Path(train.__file__).parent / name
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (folder / "README.md").read_text().splitlines()
        if line.startswith("|")
    ]
    records = [json.loads(line) for line in (folder / "check.jsonl").read_text().splitlines()]
    assert [record["seqlen"] for record in records] == lengths
    for column, record in enumerate(records, start=1):
        (by_position,) = [row[1:] for row in rows if row[0] == f"{record['seqlen'] >> 10}K"]
        expected = record["nll_mean"]["by_position"]
        assert [float(cell) for cell in by_position] == pytest.approx(expected, abs=6e-4)
        for label, value in zip(
            ("NLL of the last", "the same tokens"), record["nll_mean"]["last_near_far"], strict=True
        ):
            (cell,) = [row[column] for row in rows if row[0].startswith(label)]
            assert float(cell) == pytest.approx(value, abs=6e-4)
        wordings = {
            "evaluation": "the evaluation's wording",
            "question": "a question in other words",
        }
        for one in record["needles"]:
            keys = "one key" if one["keys"] == 1 else "four keys"
            label = f"{keys}, {wordings[one['wording']]}"
            (cell,) = [row[column] for row in rows if row[0] == label]
            assert cell.startswith(f"{one['hits']} of {one['count']} (")


def test_a_seed_that_draws_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(["--model", "m", "--text", "t", "--out", "o", "--seed", "1"])
    assert "unrecognized arguments: --seed 1" in capsys.readouterr().err
