# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""``bsfa generate``: a model's answer to a prompt, with block-sparse prefill."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import Any

import torch

from bsfa_calib.convert import load_table
from bsfa_calib.data import check_text, read_text
from bsfa_calib.statistics import Statistics
from bsfa_hf.cli import common
from bsfa_hf.integration import enabled

# Above this share of kept blocks there is nothing to be gained.
_NO_GAIN = 0.95


def add_subcommand(subparsers: Any) -> None:
    """Add ``generate`` to the subcommands of a parser."""
    parser = subparsers.add_parser(
        "generate",
        help="generate from your model and prompt file",
        description="Generate greedily from a prompt. The text goes to stdout, all else to stderr.",
        allow_abbrev=False,
    )
    common.add_model_options(parser)
    common.add_table_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt-file", metavar="FILE", help="prompt, UTF-8; - is stdin")
    source.add_argument("--prompt", help="the prompt itself")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the chat template")
    parser.add_argument("--max-new-tokens", type=common.positive, default=64, metavar="N")
    parser.add_argument(
        "--prefill-chunk-size",
        type=common.positive,
        metavar="N",
        help="read the prompt in chunks of N tokens",
    )
    parser.add_argument("--compare", action="store_true", help="generate with dense attention too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Generate, and print what became of the blocks."""
    prompt = _prompt(arguments)
    table = common.named_table(arguments)
    loaded = common.load_model(arguments)
    tokenizer = loaded.tokenizer
    if arguments.chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(loaded.model.device)
    length = int(inputs["input_ids"].shape[1])
    if length == 0:
        raise ValueError("the prompt is empty")
    common.check_positions(loaded.model, length + arguments.max_new_tokens)
    if table is None:
        path = common.find_table(loaded, length, common.named_point(arguments))
        if path is None:
            raise ValueError(
                f"there is no threshold table for {loaded.name} in ./thresholds: make one with "
                "bsfa calibrate, and name it with --thresholds"
            )
        common.note(f"thresholds: {path}")
        table = load_table(path)
    point = common.choose_point(table, arguments, length)
    dense = _generate(loaded, inputs, arguments) if arguments.compare else None
    options: Any = {"check_model": not arguments.any_model, "selection": arguments.selection}
    with enabled(loaded.model, table, point, **options) as stats:
        sparse = _generate(loaded, inputs, arguments)
    if dense is None:
        print(sparse[0])
    else:
        print(f"--- dense ({dense[1]:.1f} s)\n{dense[0]}")
        print(f"--- block-sparse ({sparse[1]:.1f} s)\n{sparse[0]}")
    _report(stats, length, sparse[1])
    return 0


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        return check_text("--prompt", str(arguments.prompt))
    if arguments.prompt_file == "-":
        return check_text("stdin", sys.stdin.read())
    return read_text(arguments.prompt_file)


@torch.inference_mode()
def _generate(
    loaded: common.Loaded, inputs: Any, arguments: argparse.Namespace
) -> tuple[str, float]:
    common.synchronize(loaded.model.device)
    started = time.perf_counter()
    options: dict[str, Any] = {}
    if arguments.prefill_chunk_size:
        options["prefill_chunk_size"] = arguments.prefill_chunk_size
    with common.quiet() if not arguments.chat else contextlib.nullcontext():
        output = loaded.model.generate(
            **inputs,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id,
            **options,
        )
    common.synchronize(loaded.model.device)
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(
        loaded.tokenizer.decode(new, skip_special_tokens=True)
    ), time.perf_counter() - started


def _report(stats: Statistics, length: int, seconds: float) -> None:
    common.note(f"{length} tokens of prompt, {seconds:.1f} s")
    for line in stats.summary().split("\n"):
        common.note(line)
    gain_note(stats, length)


def gain_note(stats: Statistics, length: int) -> None:
    """Tell the user where block-sparse attention has nothing to gain."""
    if not stats.sparse_calls:
        common.note(
            f"nothing was skipped: with a prompt of {length} tokens this model gains nothing from "
            "block-sparse attention"
        )
    elif stats.mean_kept_fraction > _NO_GAIN:
        common.note(
            f"only {1 - stats.mean_kept_fraction:.1%} of the blocks were skipped: this model gains "
            f"nothing with a prompt of {length} tokens at this operating point; take a smaller k "
            "or a longer prompt"
        )
