# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The command line on a tiny model, and what it says to those who err."""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import re
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bsfa_calib import Point, ThresholdFileError, ThresholdTable
from bsfa_hf import __version__
from bsfa_hf.cli import main, make_parser
from bsfa_hf.cli.common import Loaded, choose_point, find_table
from bsfa_hf.cli.demo import make_questions
from tiny import byte_tokenizer, table, tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer that takes a byte for a token."""
    path = tmp_path_factory.mktemp("models") / "tiny-model"
    model = tiny_model("llama", vocabulary=260)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["the", "lake", "is", "calm", "and", "grey", "today", "they", "walk"]
    sentences = [" ".join(draw.choices(words, k=8)) + "." for _ in range(600)]
    path.write_text(" ".join(sentences), encoding="utf-8")
    return path


@pytest.fixture
def thresholds(tmp_path: Path) -> Path:
    path = tmp_path / "table.safetensors"
    table(math.inf, points=(4, 8), model="someone/Tiny-Model").save(path)
    return path


def test_demo_prints_its_table(
    directory: Path, text: Path, thresholds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--model", str(directory), "--text", str(text), "--tokens", "900"]
    arguments += ["--questions", "2", "--thresholds", str(thresholds), "--k", "8"]
    arguments += ["--selection", "exact"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    for expected in (
        "tokens, k=8, rule absolute, blocks of 128x64",
        "questions answered",
        "Left out: ",
        "answers that dense attention gives are kept, and perplexity changes by",
        "On a CPU this is the time of a reference",
        "perplexity (tokens",
        "KL divergence from dense",
        "key blocks kept, by layer:",
        "asked for",
    ):
        assert expected in out
    assert "bsfa: loading" in err
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert out.split("Time to read")[0] == again.split("Time to read")[0]
    assert main([*arguments, "--calibrate"]) == 2
    assert f"--thresholds names one, {thresholds}: give one" in capsys.readouterr().err


def test_a_file_that_holds_no_results_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    for content in (b"\x88\xff", b"[1]", b"{"):
        path.write_bytes(content)
        assert main(["plot", str(path)]) == 2
        assert f"{path} is not a file of results" in capsys.readouterr().err


def test_demo_calibrates_where_there_is_no_table(
    directory: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["demo", "--model", str(directory), "--text", str(text), "--tokens", "700"]
    assert main([*arguments, "--questions", "1", "--target-sparsity", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert "calibrated on 2 of 2 samples" in err
    assert "rule peak_lse, blocks of 128x64, one query row in 4 votes" in out


@pytest.mark.parametrize(
    ("named", "taken"),
    [
        ([], "taking target_sparsity=0.5"),
        (["--target-sparsity", "0.55"], ""),
        (["--point", "target_sparsity=0.6"], ""),
    ],
    ids=str,
)
def test_demo_calibrates_what_is_named_or_what_the_shortest_text_allows(
    named: list[str],
    taken: str,
    directory: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["demo", "--model", str(directory), "--text", str(text), "--tokens", "512"]
    arguments += ["--questions", "1", "--calibrate", *named]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert taken in err
    assert (named[-1] if named else "target_sparsity=0.5,").removeprefix("target_sparsity=") in out


def test_the_installed_command_mounts_every_subcommand() -> None:
    # None where the tests run on a source tree that is not installed.
    for command in metadata.entry_points(group="console_scripts", name="bsfa"):
        assert command.load() is main
    help_text = make_parser().format_help()
    for name in ("demo", "generate", "calibrate", "table", "evaluate", "plot", "info"):
        assert re.search(rf"^    {name}\b", help_text, re.M), name


def test_table_info_says_what_a_table_holds(
    thresholds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", "info", str(thresholds)]) == 0
    out = capsys.readouterr().out
    assert "someone/Tiny-Model" in out
    assert out.endswith("k\n4\n8\n")


def test_demo_finds_the_shipped_table(
    directory: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table(points=(4, 8)).save(tmp_path / "thresholds" / "tiny-model" / "4k.safetensors")
    table(points=(4,)).save(tmp_path / "thresholds" / "other-model" / "4k.safetensors")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    arguments = ["demo", "--model", str(directory), "--text", str(text), "--tokens", "600"]
    assert main([*arguments, "--questions", "1"]) == 0
    err = capsys.readouterr().err
    assert "tiny-model/4k.safetensors" in err
    assert "no operating point given: taking k=4" in err


def test_needles_lie_at_even_depths_and_are_asked_for() -> None:
    class Bytes:
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

    questions = make_questions("A short sentence. " * 200, Bytes(), 2000, 4, 0)
    said = [bytes(question.ids).decode() for question in questions]
    assert len({text.rsplit("\n\n", 1)[0] for text in said}) == 1
    assert len({text.rsplit("\n\n", 1)[1].split()[1] for text in said}) == 4
    for question, text in zip(questions, said, strict=True):
        assert f"{question.asked} {question.number}." in text
        assert text.endswith(f"\n\n{question.asked}")
    places = [said[0].index(question.number) for question in questions]
    assert places == sorted(places)
    assert len(said[0]) < 2150


def test_generate_prints_the_text_and_what_was_kept(
    directory: Path, text: Path, thresholds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = text.parent / "prompt.txt"
    prompt.write_text(text.read_text(encoding="utf-8")[:500], encoding="utf-8")
    arguments = ["generate", "--model", str(directory), "--prompt-file", str(prompt), "--k", "8"]
    arguments += ["--thresholds", str(thresholds), "--max-new-tokens", "4"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out
    assert "500 tokens of prompt" in err
    assert "2 block-sparse calls, kept" in err
    assert "6 dense calls: decode step" in err
    assert main([*arguments, "--prefill-chunk-size", "128"]) == 0
    assert capsys.readouterr().out == out
    assert main([*arguments, "--prefill-chunk-size", "150"]) == 0
    assert "8 block-sparse calls, kept" in capsys.readouterr().err
    assert main([*arguments, "--compare"]) == 0
    both = capsys.readouterr().out
    assert "--- dense (" in both
    assert "--- block-sparse (" in both


def test_a_short_prompt_is_told_that_it_gains_nothing(
    directory: Path, thresholds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--model", str(directory), "--prompt", "Hello there.", "--k", "8"]
    assert main([*arguments, "--thresholds", str(thresholds), "--max-new-tokens", "2"]) == 0
    assert "gains nothing from block-sparse attention" in capsys.readouterr().err


def test_a_prompt_beyond_the_models_positions_is_told(
    directory: Path, text: Path, thresholds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = text.parent / "long.txt"
    prompt.write_text(text.read_text(encoding="utf-8")[:4100], encoding="utf-8")
    arguments = ["generate", "--model", str(directory), "--prompt-file", str(prompt), "--k", "8"]
    arguments += ["--thresholds", str(thresholds), "--max-new-tokens", "1"]
    assert main(arguments) == 0
    assert "has 4101 tokens, and the model was made for 4096 positions" in capsys.readouterr().err
    assert main(["generate", *arguments[1:3], "--prompt", "short", *arguments[5:]]) == 0
    assert "positions" not in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--k", "8"], ["--point", "k=8"]], ids=str)
def test_a_point_is_named_by_its_axis_or_as_a_point(
    option: list[str], directory: Path, thresholds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--model", str(directory), "--prompt", "Hello there. " * 20]
    arguments += ["--thresholds", str(thresholds), "--max-new-tokens", "2", *option]
    assert main(arguments) == 0
    assert "no operating point" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--max-loss", "1"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_info_describes_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}, transformers {transformers.__version__}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--model", "no/such/model", "--text", "TEXT"], "no model at 'no/such/model'"),
        (
            ["demo", "--model", "MODEL", "--text", "no/text"],
            "no/text: there is no such",
        ),
        (["demo", "--model", "MODEL", "--text", "TEXT", "--tokens", "9"], "at least 512, got 9"),
        (
            ["demo", "--model", "no/model", "--text", "TEXT", "--calibrate", "--k", "5"],
            "demo calibrates for a target_sparsity, got k=5",
        ),
        (
            [
                *("demo", "--model", "no/model", "--text", "TEXT", "--calibrate"),
                *("--tokens", "512", "--target-sparsity", "0.9"),
            ],
            "a sparsity of 0.9 cannot be reached: of prompts of 512 tokens, 0.400 of the blocks",
        ),
        (["demo", "--model", "MODEL", "--text", "TEXT", "--questions", "99"], "at most 9, got 99"),
        (["generate", "--model", "no/model", "--prompt-file", "DAMAGED"], "not UTF-8 text"),
        (["generate", "--model", "no/model", "--prompt", "x\udcff"], "surrogate U+DCFF"),
        (["table", "info", "no.safetensors"], "no threshold file no.safetensors"),
        (
            ["evaluate", "--model", "no/model", "--config", "dense", "--lengths", "4k"],
            "--lengths must be a whole number, got '4k'",
        ),
        (
            ["generate", "--model", "no/model", "--prompt", "x", "--point", "k=nan"],
            "k must be an integer of at least 1, got nan",
        ),
        (
            ["demo", "--model", "no/model", "--text", "TEXT", "--thresholds", "TABLE", "--k", "5"],
            "no k=5; its points are k = 4, 8",
        ),
        (
            ["generate", "--model", "MODEL", "--prompt-file", "no.txt"],
            "no.txt: there is no such",
        ),
        (
            ["generate", "--model", "MODEL", "--prompt", "x", "--thresholds", "TABLE", "--k", "5"],
            "no k=5; its points are k = 4, 8",
        ),
        (
            ["generate", "--model", "MODEL", "--prompt", "x", "--thresholds", "TEXT"],
            "not a threshold table",
        ),
        (
            ["generate", "--model", "MODEL", "--prompt", "x", "--thresholds", "FOREIGN"],
            "thresholds are of org/other, and this model is",
        ),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_status_two(
    arguments: list[str],
    message: str,
    directory: Path,
    text: Path,
    thresholds: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    foreign = tmp_path / "foreign.safetensors"
    table(points=(4,), model="org/other").save(foreign)
    damaged = tmp_path / "damaged.txt"
    damaged.write_bytes(b"text\xff")
    names = {"MODEL": directory, "TEXT": text, "TABLE": thresholds, "FOREIGN": foreign}
    names["DAMAGED"] = damaged
    assert main([str(names.get(argument, argument)) for argument in arguments]) == 2
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last.startswith("bsfa: error: ")
    assert message in last


def test_notes_do_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", "/no\x1b[31m\nmodel", "--prompt", "x"]) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert r"loading /no\x1b[31m\nmodel" in err


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


def test_versions_agree(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"bsfa-hf {__version__}\n"
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{__version__}"\n' in project


def test_of_two_shipped_tables_for_a_length_the_one_with_more_points_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "thresholds" / "tiny"
    folder.mkdir(parents=True)
    made = ThresholdTable(
        np.zeros((3, 2, 4, 1), np.float32),
        (0.5, 0.7, 0.9),
        axis="target_sparsity",
        rule="peak_lse",
        max_seqlen=8192,
    )
    made.save(folder / "8k-learned.safetensors")
    few = dataclasses.replace(made, thresholds=made.thresholds[:1], points=(0.92,))
    few.save(folder / "8k-learned-64x64.safetensors")
    dataclasses.replace(few, max_seqlen=4096).save(folder / "4k.safetensors")
    monkeypatch.chdir(tmp_path)
    loaded = Loaded(tiny_model(), None, "tiny")
    for tokens, name in ((5000, "8k-learned"), (4096, "4k"), (100_000, "8k-learned")):
        found = find_table(loaded, tokens)
        assert found is not None
        assert found.stem == name
    served = dataclasses.replace(few, max_seqlen=4096, serve_seqlen=65536)
    served.save(folder / "4k-at-64k.safetensors")
    for tokens, name in ((4096, "4k"), (9000, "4k-at-64k"), (100_000, "4k-at-64k")):
        found = find_table(loaded, tokens)
        assert found is not None
        assert found.stem == name
    asked = find_table(loaded, 5000, Point("target_sparsity", 0.92))
    assert asked is not None
    assert asked.stem == "8k-learned-64x64"
    assert find_table(loaded, 5000, Point("k", 16)) is None


@pytest.mark.parametrize("names", [("a", "b", "c", "d"), ("d", "c", "b", "a")])
def test_of_tables_for_a_length_that_of_calibrations_default_is_taken(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "thresholds" / "tiny"
    made = [table(points=(4, 8), voters=voters) for voters in (1, 2, 4)]
    made.append(dataclasses.replace(made[2], q_block=64))
    for one, name in zip(made, names, strict=True):
        one.save(folder / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    found = find_table(Loaded(tiny_model(), None, "tiny"), 512)
    assert found == folder / f"{names[2]}.safetensors"


def test_a_table_that_cannot_be_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "thresholds" / "tiny"
    folder.mkdir(parents=True)
    (folder / "broken.safetensors").write_bytes(b"nothing")
    monkeypatch.chdir(tmp_path)
    loaded = Loaded(tiny_model(), None, "tiny")
    with pytest.raises(ThresholdFileError, match=r"broken\.safetensors: the file has 7 bytes"):
        find_table(loaded, 512)
    table(points=(4, 8)).save(folder / "good.safetensors")
    capsys.readouterr()
    found = find_table(loaded, 512)
    assert found is not None
    assert found.stem == "good"
    assert re.search(r"passed over: .*broken\.safetensors: the file has", capsys.readouterr().err)
    assert find_table(loaded, 512, Point("max_loss", 0.1)) is None


@pytest.mark.parametrize(
    ("expected", "point"),
    [
        ("0.001, 0.003, 0.004", "target_sparsity=0.6"),
        ("0.1, 0.2, 0.3", "target_sparsity=0.5"),
        ("", "target_sparsity=0.7"),
    ],
)
def test_without_a_point_the_most_at_a_small_expected_loss_is_taken(
    expected: str, point: str
) -> None:
    made = ThresholdTable(
        np.zeros((3, 2, 4, 1), np.float32),
        (0.5, 0.6, 0.75),
        axis="target_sparsity",
        provenance={"expected_kl": expected} if expected else {},
    )
    if not expected:
        made = dataclasses.replace(made, points=(0.5, 0.7, 0.75))
    arguments = argparse.Namespace(point=None, k=None, target_sparsity=None, max_loss=None)
    assert str(choose_point(made, arguments, 4096)) == point
