# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Calibration samples from JSON and from plain text, and what is said of broken ones."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from bsfa_calib.data import (
    DataError,
    Document,
    read_json,
    special_prefix,
    split_documents,
    split_texts,
    text_tasks,
)

ENTRIES = [{"input_text": f"text {i}", "task_name": f"task{i % 2}"} for i in range(6)]


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_a_list_and_json_lines_give_the_same_documents(tmp_path: Path, lines: bool) -> None:
    path = tmp_path / "data.json"
    text = "\n\n".join(map(json.dumps, ENTRIES)) if lines else json.dumps(ENTRIES, indent=1)
    path.write_text(text)
    documents = read_json(path)
    assert [(d.text, d.task) for d in documents] == [
        (e["input_text"], e["task_name"]) for e in ENTRIES
    ]


def test_the_task_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"input_text": "a", "other": 1}')
    assert read_json(path) == [Document("a", "", f"{path}:1")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"input_text": "a"}\n{"input_text": "b"\n', r"data:2: not valid JSON: .*column 19"),
        ('{"input_text": "a"}\nplain words\n', r"data:2: not valid JSON"),
        ('[\n{"input_text": "a"},\n{"input_text" "b"}]', r"data:3: not valid JSON: .*column 15"),
        ('{"input_text": "a"}\n{"text": "b"}', r"data:2: .*'input_text', got none; .*'text'"),
        ('[{"input_text": "a"}, {"input_text": 5}]', r"sample 2: .*'input_text', got 5"),
        ('{"input_text": " "}', r"data:1: 'input_text' is empty"),
        ('{"input_text": "a", "task_name": 3}', r"data:1: 'task_name' must be a string, got 3"),
        ("[1]", "sample 1: a sample must be an object, got int"),
        ('"text"', "data:1: a sample must be an object, got str"),
        ("[" * 100_000, "nested too deeply|not valid JSON"),
        ("", "the file holds no samples"),
        ("[]", "the file holds no samples"),
    ],
)
def test_broken_json_is_refused_with_file_and_line(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "data"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_json(path)


def test_bytes_that_are_no_text_are_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b'{"input_text": "a"}\n\xff\xfe\n')
    with pytest.raises(DataError, match="data:2: not UTF-8"):
        read_json(path)
    with pytest.raises(DataError, match="there is no such file"):
        read_json(tmp_path / "none.json")


def test_samples_are_taken_from_every_task_and_cut(tokenizer: Any) -> None:
    documents = [Document("abc" * 50, f"t{i % 2}", str(i)) for i in range(9)]
    split = split_documents(documents, tokenizer, max_seq_len=40, examples=3, held_out=2)
    assert [s.source for s in split.calibration] == ["0", "2", "4", "1", "3", "5"]
    assert [s.source for s in split.held_out] == ["6", "8", "7"]
    assert {len(s.tokens) for s in split.calibration} == {40}


def test_text_is_cut_into_whole_samples_in_turns(text_directory: Path, tokenizer: Any) -> None:
    tasks = text_tasks([text_directory])
    assert list(tasks) == ["prose", "verse"]
    split = split_texts(tasks, tokenizer, max_seq_len=1024, examples=3, held_out=1)
    assert {len(s.tokens) for s in (*split.calibration, *split.held_out)} == {1024}
    assert all(s.tokens[0] == 256 for s in split.calibration)
    assert len({s.tokens for s in (*split.calibration, *split.held_out)}) == 8
    assert len({s.source.split()[0] for s in split.calibration if s.task == "prose"}) == 3


def test_short_files_are_joined(tmp_path: Path, tokenizer: Any) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name * 60)
    split = split_texts(
        {"x": text_tasks([tmp_path])[tmp_path.name]},
        tokenizer,
        max_seq_len=101,
        examples=5,
        held_out=0,
    )
    (sample,) = split.calibration
    assert tokenizer.decode(sample.tokens[1:]) == "a" * 60 + "\n\n" + "b" * 38


def test_less_text_than_a_sample_gives_one_that_is_shorter(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("few words")
    split = split_texts(
        text_tasks([tmp_path / "a.txt"]), tokenizer, max_seq_len=101, examples=5, held_out=1
    )
    assert [len(s.tokens) for s in split.calibration] == [10]
    assert split.held_out == ()


def test_compressed_text_is_read_and_hidden_files_are_not(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"word " * 50))
    (tmp_path / ".hidden").write_text("x")
    tasks = text_tasks([tmp_path])
    assert [p.name for p in tasks[tmp_path.name]] == ["a.txt.xz"]
    split = split_texts(tasks, tokenizer, max_seq_len=100, examples=1, held_out=0)
    assert tokenizer.decode(split.calibration[0].tokens[1:]).startswith("word word")
    (tmp_path / "a.txt.xz").write_bytes(b"not compressed")
    with pytest.raises(DataError, match="cannot be read"):
        split_texts(tasks, tokenizer, max_seq_len=100, examples=1, held_out=0)


def test_missing_empty_and_ambiguous_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or directory"):
        text_tasks([tmp_path / "none"])
    with pytest.raises(DataError, match="no text file"):
        text_tasks([tmp_path])
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(DataError, match="another text is named 'a'"):
        text_tasks([tmp_path / "a.txt", tmp_path / "a.md"])


def test_the_special_tokens_before_a_text_are_found(tokenizer: Any) -> None:
    assert special_prefix(tokenizer) == [256]
