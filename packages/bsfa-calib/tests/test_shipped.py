# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The tables of the repository: they load, and the manifest tells the truth about them."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bsfa_calib import ThresholdTable, report
from bsfa_calib.thresholds import checksum_of

DIRECTORY = Path(__file__).parents[3] / "thresholds"
# Models merged from the adapters of benchmarks/extend, which have no revisions of their own, and
# the lengths of their points.
EXTENDED = {
    "SmolLM2-135M-Instruct-32k": (4096, 32768),
    "SmolLM2-135M-Instruct-long": (4096, 32768, 65536),
    "SmolLM2-135M-Instruct-128k": (131072,),
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("manifest", DIRECTORY / "update_manifest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_manifest_is_what_the_tables_say(tool: ModuleType) -> None:
    assert tool.MANIFEST.read_text(encoding="utf-8") == tool.manifest()


def test_a_manifest_that_is_out_of_date_is_noticed(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["update_manifest.py", "--check"])
    assert tool.main() == 0
    monkeypatch.setattr(tool, "MANIFEST", tmp_path / "manifest.toml")
    assert tool.main() == 1
    tool.MANIFEST.write_text(tool.manifest() + "\n")
    assert tool.main() == 1


def test_the_manifest_says_where_points_were_found_at_another_length(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    served = tmp_path / "model" / "served.safetensors"
    learned = next(path for path in tool.table_paths() if "1in4" in path.name)
    dataclasses.replace(ThresholdTable.load(learned), serve_seqlen=65536).save(served)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    said = tool.entry(served).splitlines()
    assert {"max_seqlen = 4096", "serve_seqlen = 65536", "voters = 4"} <= set(said)


def test_shipped_tables_load_are_small_and_say_where_they_are_from(tool: ModuleType) -> None:
    for path in tool.table_paths():
        table = ThresholdTable.load(path)
        assert path.stat().st_size <= (6e5 if table.axis == "k" else 1e4)
        assert table.model
        assert table.revision or table.model in EXTENDED
        assert table.samples * table.max_seqlen >= 60_000
        assert "served" in table.provenance or table.serve_seqlen == 0
        made = "start_" if "start_command" in table.provenance else ""
        assert {f"{made}data", f"{made}command", "command", "versions"} <= set(table.provenance)
        for key, value in table.provenance.items():
            if "command" in key:
                assert " /" not in value
            assert not re.search(r"unknown|not installed", value)


def test_shipped_tables_have_checksums(tool: ModuleType) -> None:
    for path in tool.table_paths():
        assert checksum_of(path) is not None, path


def test_shipped_tables_for_k_blocks_keep_what_they_promise(tool: ModuleType) -> None:
    for path in tool.table_paths():
        table = ThresholdTable.load(path)
        if table.axis != "k":
            continue
        kept = report.model_means(table, "kept")
        held_out = report.model_means(table, "held_out_kept")
        assert kept is not None
        assert held_out is not None
        reached = ~np.isnan(kept)
        points = np.array(table.points)[reached]
        np.testing.assert_allclose(kept[reached], points, rtol=0.05)
        np.testing.assert_allclose(held_out[reached], points, rtol=0.25)


def test_shipped_learned_tables_skip_what_they_promise(tool: ModuleType) -> None:
    learned = [ThresholdTable.load(path) for path in tool.table_paths()]
    learned = [table for table in learned if table.axis == "target_sparsity"]
    assert {table.rule for table in learned} == {"peak_lse"}
    kinds = {(table.model, table.geometry, table.voters, table.seqlen) for table in learned}
    (base,) = {model for model, *_ in kinds} - set(EXTENDED)
    assert kinds == {
        *(
            (base, geometry, voters, length)
            for geometry, voters in (("128x64", 1), ("128x64", 2), ("128x64", 4), ("64x64", 1))
            for length in (4096, 8192)
        ),
        *((model, "128x64", 4, length) for model, found in EXTENDED.items() for length in found),
    }
    for table in learned:
        named = ("expected_sparsity", "expected_kl")
        sparsity, kl = (np.array(list(map(float, table.provenance[n].split(", ")))) for n in named)
        np.testing.assert_allclose(sparsity, table.points, atol=0.005)
        assert np.all(np.diff(kl) > 0)
