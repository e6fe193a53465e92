# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The study of a selection in 8 bits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bsfa_kernel
import page
import selection_study
from bsfa_kernel import Geometry, reference
from conftest import attention_record
from harness import check_record, read_records
from selection_study import Rounding

GEOMETRY = Geometry(64, 64)


def queries_and_keys(seqlen: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(1, seqlen, 4, 32, generator=generator)
    k = 2 * torch.randn(1, seqlen, 2, 32, generator=generator)
    k[..., 3] += 20  # the offset takes this out
    return q, k


@pytest.mark.parametrize("rule", bsfa_kernel.RULES)
def test_verdicts_that_differ_are_those_of_the_references_selections(rule: str) -> None:
    q, k = queries_and_keys(500)
    scale = 0.25
    maxima = reference.block_maxima(q, k, scale=scale, rule=rule, geometry=GEOMETRY)
    middle = float(maxima[maxima.isfinite()].median())
    scalars = torch.tensor([[middle - 1, middle, middle + 1]]).repeat(3, 1)
    found = Rounding(scalars, rule, GEOMETRY)
    found(q, k, k, 0, scale)
    forced = reference.forced_blocks(500, 500, geometry=GEOMETRY)
    free = (reference.visible_blocks(500, 500, geometry=GEOMETRY) & ~forced).sum()
    assert found.verdicts == 4 * int(free)
    for index, voters in enumerate((1, 2, 4)):
        for point in range(3):
            options: dict[str, Any] = {"scale": scale, "rule": rule, "geometry": GEOMETRY}
            options["voters"] = voters
            threshold = torch.full((4, 1), float(scalars[index, point]))
            exact, rounded = (
                reference.select_blocks(q, k, threshold, precision=precision, **options).mask
                for precision in ("exact", "int8")
            )
            assert int(found.flips[index, point]) == int((exact != rounded).sum())
    assert found.flips.sum() > 0


def test_the_error_of_a_peak_is_counted() -> None:
    q, k = queries_and_keys(256)
    found = Rounding(torch.zeros(3, 1), "absolute", GEOMETRY)
    found(q, k, k, 0, 0.25)
    error = found.error()
    assert 0 < error["rms"] < error["p999"] <= error["largest"] < 0.5
    # Queries of whole numbers, and keys whose mean is 0 and whose largest is 127, lose nothing.
    q = torch.full((1, 256, 2, 32), 127.0)
    k = torch.cat((torch.full((1, 128, 1, 32), 127.0), torch.full((1, 128, 1, 32), -127.0)), 1)
    exact = Rounding(torch.zeros(3, 1), "absolute", GEOMETRY)
    exact(q, k, k, 0, 2.0**-10)
    assert exact.error()["largest"] < 1e-2


def study_record(**changes: Any) -> dict[str, Any]:
    return {
        **{name: attention_record()[name] for name in ("schema", "self_test", "date", "command")},
        **{name: attention_record()[name] for name in ("gpu", "driver", "torch", "cuda", "commit")},
        "sources": "0",
        "kind": "selection_study",
        "model": "m",
        "dtype": "float16",
        "seqlen": 4096,
        "contexts": ["a", "b"],
        "rule": "peak_lse",
        "geometry": "64x64",
        "voters": 4,
        "asked": 0.75,
        "peak_error": {"rms": 0.01, "p999": 0.05, "largest": 0.2},
        "flips": 0.002,
        "sparsity": {"exact": [0.7, 0.8], "int8": [0.7, 0.8]},
        "kl": {"exact": [0.01, 0.02], "int8": [0.01, 0.02]},
        **changes,
    }


def test_what_was_measured_before_a_study_was_stopped_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(_: Any) -> Iterator[dict[str, Any]]:
        yield study_record()
        yield study_record(asked=0.9)
        raise KeyboardInterrupt

    monkeypatch.setattr(selection_study, "study", stopped)
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        selection_study.main(["--model", "m", "--text", "t", "--out", str(out)])
    assert [record["asked"] for record in read_records(out)] == [0.75, 0.9]


def test_a_record_has_a_row() -> None:
    record = study_record()
    check_record(record)
    text = page.text([record])
    assert "off by 0.0100 nats" in text
    row = next(line for line in text.splitlines() if "1 in 4" in line)
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        *("0.75", "0.200%", "0.7500", "0.7500", "0.01500", "0.01500"),
    ]
