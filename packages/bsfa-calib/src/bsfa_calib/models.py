# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Load a language model and its tokenizer, from a directory, a GGUF file or the Hub."""

from __future__ import annotations

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

DTYPES = ("auto", "float32", "bfloat16", "float16")


class ModelError(ValueError):
    """A model cannot be loaded; the message says which and why."""


class Loaded(NamedTuple):
    """A model in evaluation mode and its tokenizer, of the classes that transformers chose."""

    model: Any
    tokenizer: Any


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    offline: bool = False,
) -> Loaded:
    """Load a causal language model with SDPA attention.

    Args:
        name: a model directory, a ``.gguf`` file, a directory with one such file, or a Hub id such
            as ``meta-llama/Llama-3.1-8B-Instruct``. A path never leads to a network access.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: float32 on a CPU, else bfloat16.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: the first GPU, if there is one.
        offline: take Hub ids from the local cache only.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
        ImportError: a package that it needs is not installed.
        ValueError: there is no such dtype.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    directory, gguf = locate(name)
    missing = [each for each in ("gguf", "accelerate") if gguf and find_spec(each) is None]
    if missing:
        raise ImportError(
            f"a .gguf file needs {' and '.join(missing)}, which the extras bsfa-calib[capture] and "
            "bsfa-hf[cli] bring"
        )
    options: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    if offline or os.path.isdir(directory):
        options["local_files_only"] = True
    try:
        place = torch.device(device)
        if dtype == "auto":
            dtype = "float32" if place.type == "cpu" else "bfloat16"
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), **options
        )
        return Loaded(model.to(place).eval(), tokenizer)
    except Exception as error:  # whatever a damaged file or an absent device makes them raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"the model {name} cannot be loaded: {reason}") from error


def locate(name: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Directory or Hub id of a model, and the name of its GGUF file, if it is one.

    Raises:
        ModelError: the name is that of a path, and there is no model under it.
    """
    path = Path(name)
    text = os.fspath(name)
    if not text:
        raise ModelError("there is no model at '': name a model")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is not a model: name a .gguf file or a model directory")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file, or it is damaged")
        return str(path.parent), path.name
    if path.is_dir():
        if (path / "config.json").exists():
            return text, None
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise ModelError(
                f"the directory {path} must hold a config.json or one .gguf file, it holds "
                f"{len(files)} .gguf files and no config.json"
            )
        return text, files[0].name
    parts = text.split("/")
    looks_like_path = (
        len(parts) > 2
        or path.suffix == ".gguf"
        or text.startswith((".", "/", "~"))
        or (len(parts) == 2 and Path(parts[0]).is_dir())
    )
    if looks_like_path:
        raise ModelError(f"there is no model at {text!r}: no such file or directory")
    return text, None


def identity(name: str | os.PathLike[str], model: Any) -> tuple[str, str]:
    """Name and revision of a model, to be written into a threshold table.

    The revision of a GGUF file is its SHA-256, that of a model from the Hub its commit, and empty
    for a directory.
    """
    directory, gguf = locate(name)
    if gguf:
        digest = hashlib.sha256()
        with open(Path(directory) / gguf, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return Path(gguf).stem, f"sha256:{digest.hexdigest()}"
    if os.path.isdir(directory):
        return Path(directory).resolve().name, ""
    return directory, getattr(model.config, "_commit_hash", None) or ""
