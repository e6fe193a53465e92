# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Text from files of every kind, the windows cut from it, and what is said of broken files."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest

from bsfa_calib.data import (
    DataError,
    Document,
    by_kind,
    check_text,
    find_files,
    read_documents,
    read_json,
    read_text,
)
from bsfa_calib.text import encode, parse_part, read_windows, special_prefix, split_by_kind

ENTRIES = [{"input_text": f"text {i}", "task_name": f"task{i % 2}"} for i in range(6)]


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_a_list_and_json_lines_give_the_same_documents(tmp_path: Path, lines: bool) -> None:
    path = tmp_path / "data.json"
    text = "\n\n".join(map(json.dumps, ENTRIES)) if lines else json.dumps(ENTRIES, indent=1)
    path.write_text(text)
    documents = read_json(path)
    assert [(d.text, d.kind) for d in documents] == [
        (e["input_text"], e["task_name"]) for e in ENTRIES
    ]


def test_the_task_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"input_text": "a", "other": 1}')
    assert read_json(path) == [Document("a", "", f"{path}:1", whole=True)]


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
        (
            '{"input_text": "a"}\n{"input_text": "x \\ud83d y"}',
            r"data:2: .* character 3 .* U\+D83D",
        ),
        ('{"input_text": "a", "task_name": "\\udc00"}', r"data:1: 'task_name' .* U\+DC00"),
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
    with pytest.raises(DataError, match=r"data:2 \(byte 21\): not UTF-8"):
        read_json(path)
    with pytest.raises(DataError, match="there is no such file"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1e"])
def test_json_lines_end_at_line_feeds_only(tmp_path: Path, separator: str) -> None:
    texts = [f"a{separator}b", "c"]
    lines = [json.dumps({"input_text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "data.jsonl"
    path.write_bytes("\r\n".join(lines).encode())
    assert [document.text for document in read_json(path)] == texts


def test_pairs_of_surrogates_in_json_are_one_character(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"input_text": "\\ud83d\\ude00"}')
    assert read_json(path)[0].text == "\U0001f600"


# -------------------------------------------------------------------------------- files of text

WORDS = " ".join(str(number * 7919 % 9973) for number in range(4000))


def packed(data: bytes) -> bytes:
    """Gzip without the time of packing: two processes of pytest-xdist must collect the same."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", WORDS.encode()),
        ("a.txt", b"\xef\xbb\xbf" + WORDS.encode()),
        ("a.txt.gz", packed(WORDS.encode())),
        ("a.txt.xz", lzma.compress(WORDS.encode())),
    ],
    ids=["plain", "mark", "gz", "xz"],
)
def test_a_text_is_the_same_however_it_is_stored(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_text(tmp_path / name) == WORDS
    assert list(find_files(tmp_path)) == ["text"]


def damaged(data: bytes) -> bytes:
    content = bytearray(packed(data))
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("utf16.txt", WORDS.encode("utf-16"), r"utf16.txt:1 \(byte 1\): not UTF-8 text"),
        ("utf16.txt", WORDS.encode("utf-16-le"), r"utf16.txt:1 \(byte 2\): .* NUL characters"),
        ("latin1.txt", b"one\ngar\xe7on", r"latin1.txt:2 \(byte 8\): not UTF-8 text"),
        ("mark.txt", b"\xef\xbb\xbfone\n\xff", r"mark.txt:2 \(byte 8\): not UTF-8 text"),
        ("any.txt", random.Random(0).randbytes(4000), r"any.txt:\d+ \(byte \d+\): not UTF-8"),
        ("packed.txt", packed(b"x"), r"packed.txt:1 \(byte 2\): not UTF-8 text"),
        ("bad.txt.gz", damaged(WORDS.encode()), "bad.txt.gz: cannot be read"),
        ("bad.txt.gz", packed(WORDS.encode())[:-20], "bad.txt.gz: cannot be read"),
        ("bad.txt.gz", b"plain", "bad.txt.gz: cannot be read"),
        ("bad.txt.xz", b"plain", "bad.txt.xz: cannot be read"),
    ],
    ids=[
        "utf-16",
        "utf-16 without its mark",
        "latin-1",
        "a byte behind the mark",
        "random bytes",
        "gzip by the name of text",
        "gzip, a byte changed",
        "gzip, cut",
        "no gzip",
        "no xz",
    ],
)
def test_what_is_no_text_is_refused_with_file_line_and_byte(
    tmp_path: Path, tokenizer: Any, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents(path)
    with pytest.raises(DataError, match=message):
        read_windows(tmp_path, tokenizer, length=100, count=1)


def test_what_no_encoding_takes_is_refused() -> None:
    assert check_text("--prompt", "gar\xe7on") == "gar\xe7on"
    with pytest.raises(DataError, match=r"--prompt is not text: character 2 .* U\+DCFF"):
        check_text("--prompt", b"a\xff".decode("utf-8", "surrogateescape"))


def test_a_nul_is_no_text_in_json_either(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"input_text": "a"}\n{"input_text": "a\\u0000"}')
    with pytest.raises(DataError, match=r"data.jsonl:2: 'input_text' .* character 2 is NUL"):
        read_json(path)


def test_kinds_are_the_folders_and_other_files_are_passed_over(tmp_path: Path) -> None:
    for name in ("a.txt", "b/c.md", "b/deep/d.txt.gz", "e/f", ".g/h.txt", "b/.i.txt", "b/j.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    found = {kind: [path.name for path in files] for kind, files in find_files(tmp_path).items()}
    assert found == {"text": ["a.txt"], "b": ["c.md", "d.txt.gz"], "e": ["f"]}
    found = {
        kind: [path.name for path in files]
        for kind, files in find_files([tmp_path / "a.txt", tmp_path / "b", tmp_path / "e"]).items()
    }
    assert found == {"a": ["a.txt"], "b": ["c.md"], "deep": ["d.txt.gz"], "e": ["f"]}


def test_missing_empty_and_ambiguous_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or directory"):
        find_files(tmp_path / "none")
    with pytest.raises(DataError, match="no text file"):
        find_files(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(DataError, match="another text is named 'a'"):
        find_files([tmp_path / "a.txt", tmp_path / "a.md"])
    (tmp_path / "blank.txt").write_text(" \n")


# -------------------------------------------------------------------------------------- windows


def test_windows_alternate_between_kinds_and_do_not_overlap(
    text_directory: Path, tokenizer: Any
) -> None:
    windows = read_windows(text_directory, tokenizer, length=200, count=8, part=(0.5, 1))
    assert [window.kind for window in windows] == ["prose", "verse"] * 4
    assert {len(window.ids) for window in windows} == {200}
    assert len({window.name for window in windows}) == len({window.ids for window in windows}) == 8
    for window in windows:
        assert window.ids[0] == 256
        assert window.ids[1:] == window.body
    prose = "".join(path.read_text() for path in sorted((text_directory / "prose").iterdir()))
    assert tokenizer.decode(windows[0].body) in prose


def test_the_same_folder_gives_the_same_tokens_whichever_way_it_is_read(
    text_directory: Path, tokenizer: Any
) -> None:
    documents = read_documents(text_directory)
    options: dict[str, Any] = {"length": 300, "part": (0.1, 0.9)}
    windows = read_windows(text_directory, tokenizer, count=6, **options)
    assert windows == read_windows(documents, tokenizer, count=6, **options)
    assert windows[:4] == read_windows(str(text_directory), tokenizer, count=4, **options)
    split = split_by_kind([text_directory], tokenizer, each=2, held_out=1, **options)
    assert sorted(windows, key=lambda w: w.name) == sorted(
        (*split.calibration, *split.held_out), key=lambda w: w.name
    )
    for kind in ("prose", "verse"):
        assert [w for w in split.calibration if w.kind == kind] == [
            w for w in windows if w.kind == kind
        ][:2]


def test_windows_do_not_depend_on_how_many_are_asked_for(tmp_path: Path) -> None:
    class Words:
        """A token is a word, so that a cut within one would make another."""

        def __call__(self, text: str, **options: Any) -> dict[str, Any]:
            return {"input_ids": [hash(word) for word in text.split(" ")]}

    (tmp_path / "a.txt").write_text(" ".join("five5" for _ in range(6)) + " " + WORDS)
    few = read_windows(tmp_path, Words(), length=5, count=1)
    assert few == read_windows(tmp_path, Words(), length=5, count=50)[:1]


def test_parts_of_the_text_have_nothing_in_common(text_directory: Path, tokenizer: Any) -> None:
    halves = [
        read_windows(text_directory / "prose" / "2.txt", tokenizer, length=200, count=6, part=part)
        for part in ((0, 0.5), (0.5, 1))
    ]
    first, second = ({window.ids for window in half} for half in halves)
    assert not first & second
    for text in ("1:0", "0.5", "0:2", "a:b", "0:0.5:1", "nan:1"):
        with pytest.raises(ValueError, match="A:B with 0 <= A < B <= 1"):
            parse_part(text)


def test_too_little_text_is_told_with_what_there_is(text_directory: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"100 windows of 1000 tokens were asked for.* gives \d+;"):
        read_windows(text_directory, tokenizer, length=1000, count=100)
    with pytest.raises(ValueError, match="length must be greater than 1, the special"):
        read_windows(text_directory, tokenizer, length=1, count=1)


def test_short_files_are_joined(tmp_path: Path, tokenizer: Any) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name * 60)
    split = split_by_kind(tmp_path, tokenizer, length=101, each=5, held_out=0)
    (sample,) = split.calibration
    assert tokenizer.decode(sample.body) == "a" * 60 + "\n\n" + "b" * 38
    assert split.calibration == tuple(read_windows(tmp_path, tokenizer, length=101, count=1))


def test_less_text_than_a_sample_gives_one_that_is_shorter(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("few words")
    split = split_by_kind(tmp_path / "a.txt", tokenizer, length=101, each=5, held_out=1)
    assert [len(s.ids) for s in split.calibration] == [10]
    assert split.held_out == ()
    (tmp_path / "a.txt").write_text("  \n")
    with pytest.raises(DataError, match="all of it is blank"):
        split_by_kind(tmp_path / "a.txt", tokenizer, length=101, each=5, held_out=1)


def test_each_json_sample_is_a_window_unless_windows_of_one_length_are_wanted(
    tmp_path: Path, tokenizer: Any
) -> None:
    documents = by_kind([Document("abc" * (9 + i), f"t{i % 2}", str(i), True) for i in range(9)])
    split = split_by_kind(documents, tokenizer, length=40, each=3, held_out=2)
    assert [s.name for s in split.calibration] == ["t0/0", "t0/2", "t0/4", "t1/1", "t1/3", "t1/5"]
    assert [s.name for s in split.held_out] == ["t0/6", "t0/8", "t1/7"]
    assert [len(s.ids) for s in split.calibration] == [28, 34, 40, 31, 37, 40]
    whole = read_windows(documents, tokenizer, length=40, count=3, whole=True)
    assert [window.name for window in whole] == ["t0/0", "t1/1", "t0/2"]
    cut = read_windows(documents, tokenizer, length=40, count=3)
    assert {len(window.ids) for window in cut} == {40}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"input_text": "x" * 50}) for _ in range(2)))
    (first, _) = read_windows(path, tokenizer, length=40, count=2, whole=True)
    assert first.name == f"text/{path}:1"


def test_the_special_tokens_before_a_text_are_found(tokenizer: Any) -> None:
    assert special_prefix(tokenizer) == [256]
    assert encode(tokenizer, "ab") == list(tokenizer("ab")["input_ids"])[1:]
