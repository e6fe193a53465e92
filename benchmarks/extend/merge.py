# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Write a model with an adapter merged in, for programs that take a model and no adapter.

``bsfa calibrate`` and ``bsfa evaluate`` read the folder that this writes as any other model::

    python benchmarks/extend/merge.py --model MODEL.gguf --adapter ADAPTER --out FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
from harness import run_program


def main(arguments: list[str] | None = None) -> int:
    """Merge and write, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="GGUF file, model directory or hub id")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    options.model_shape, options.device = None, "cpu"
    model, tokenizer, name = models.load(options)
    # Weights that were unpacked from a GGUF file are plain ones; the model still says otherwise.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"merge: {name} is in {options.out}")
    return 0


if __name__ == "__main__":
    run_program(main)
