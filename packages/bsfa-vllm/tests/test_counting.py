# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Statistics: what is written, merged over ranks, logged and shown to Prometheus."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

import bsfa_vllm
import standins
from bsfa_calib.reasons import Reason
from bsfa_vllm import counting, metrics
from bsfa_vllm.binding import Engine, engine_of
from bsfa_vllm.counting import Report
from standins import HEADS, LAYERS, OurBuilder, OurImpl, Step

CPU = torch.device("cpu")


def ran(
    path: Path, *, size: int = 1, rank: int = 0, name: str = "one", whole: str | None = None
) -> Engine:
    """An engine of one rank that has run one prompt and one decode step in layer 0."""
    config = standins.config(
        additional_config={"bsfa": {"thresholds": standins.table(path / "t.safetensors", 9e9)}},
        tensor_parallel_size=size,
        rank=rank,
        instance_id=name,
    )
    engine = engine_of(config, rank, CPU, required=True)
    assert engine is not None
    impl = OurImpl()
    impl.attach(engine)
    builder = OurBuilder()
    layer = SimpleNamespace(impl=impl, layer_name="model.layers.0.attn")
    builder.prepare({layer.layer_name: layer}, standins.SPEC, torch.float32, whole)
    step = Step([(1, 40), (256, 256)])
    step.query = step.query[:, : HEADS // size].contiguous()
    cache = step.cache[:, : max(standins.KV_HEADS // size, 1)]
    metadata = builder.build(0, step.common)
    impl.forward(layer, step.query, None, None, cache, metadata, torch.empty_like(step.query))
    return engine


def test_one_rank(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no engine has written statistics to"):
        bsfa_vllm.statistics()
    engine = ran(tmp_path)
    report = bsfa_vllm.statistics()
    assert report.engine == engine.identity == "one"
    assert report.description == "tiny-model at target_sparsity=0.5"
    assert report.sparse_calls == {"exact": 1, "int8": 0}
    assert report.dense_calls == {Reason.DECODE: 1}
    assert report.kept_blocks == [4 * HEADS, 0]
    assert report.visible_blocks == [10 * HEADS, 0]
    assert report.kept_fraction[0] == 0.4 == report.mean_kept_fraction
    assert math.isnan(report.kept_fraction[1])
    assert str(report) == (
        "1 block-sparse calls kept 40.0% of the visible blocks; 1 dense: decode step"
    )


def test_ranks_are_merged_and_engines_kept_apart(tmp_path: Path) -> None:
    ranks = [ran(tmp_path, size=2, rank=rank, name="two") for rank in range(2)]
    other = ran(tmp_path, name="other")
    other.started += 1
    first, second = bsfa_vllm.reports()
    assert (first.engine, second.engine) == ("two", "other")
    # Rows are those of one rank, blocks those of the heads of all.
    assert first.sparse_calls == second.sparse_calls
    assert first.kept_blocks == second.kept_blocks == [4 * HEADS, 0]
    assert bsfa_vllm.statistics().engine == "other"
    assert len(list(Path(os.environ["BSFA_STATISTICS"]).glob("*.json"))) == len(ranks) + 1
    assert bsfa_vllm.reports(tmp_path) == []


def test_ranks_whose_model_has_parts_are_merged(tmp_path: Path) -> None:
    """Each names the part that has layers by the time when it was made."""
    ranks = []
    for rank in range(2):
        engine = ran(tmp_path, size=2, rank=rank, name=f"made at {rank}", whole="whole")
        ranks.append(engine)
    (report,) = bsfa_vllm.reports()
    assert report.engine == "whole"
    assert report.kept_blocks == [4 * HEADS, 0]
    assert sum(report.sparse_calls.values()) == 1


def test_what_changed_is_written_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(counting, "_writer", None)
    monkeypatch.setenv("BSFA_STATISTICS_INTERVAL", "0.05")
    with caplog.at_level(logging.INFO, logger="vllm.bsfa"):
        engine = ran(tmp_path)
        end = time.monotonic() + 20
        while not caplog.messages and time.monotonic() < end:
            time.sleep(0.02)
    assert caplog.messages[0].startswith("BSFA, tiny-model at target_sparsity=0.5: 1 block-sparse")
    assert [report.engine for report in bsfa_vllm.reports(os.environ["BSFA_STATISTICS"])] == ["one"]
    assert counting._writer is not None
    counting._writer.finish()
    del engine


def test_nothing_is_read_while_another_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may capture graphs, and a device that is read from another thread ends a capture."""
    monkeypatch.setattr(counting, "_writer", None)
    monkeypatch.setenv("BSFA_STATISTICS_INTERVAL", "0.02")
    starts, done = threading.Event(), threading.Event()
    written: list[Engine] = []

    def compile_or_warm_up_model() -> None:
        starts.set()
        done.wait(20)

    other = threading.Thread(target=compile_or_warm_up_model)
    other.start()
    starts.wait(20)

    def write(engine: Engine) -> Report:
        written.append(engine)
        return Report()

    monkeypatch.setattr(counting, "_write", write)
    engine = ran(tmp_path)
    time.sleep(0.3)
    assert not written
    done.set()
    other.join()
    end = time.monotonic() + 20
    while not written and time.monotonic() < end:
        time.sleep(0.02)
    assert written == [engine]


def test_a_full_disk_does_not_end_the_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BSFA_STATISTICS_INTERVAL", "1000")
    engine = ran(tmp_path)
    writer, tried = counting._writer, list[Path]()
    assert writer is not None

    def full(path: Path, data: bytes) -> None:
        tried.append(path)
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(counting, "write_atomically", full)
        writer.write()
    assert len(tried) == 1
    assert "statistics of one cannot be written" in caplog.messages[0]
    assert bsfa_vllm.reports(counting.statistics_folder()) == []
    writer.write()
    assert [report.engine for report in bsfa_vllm.reports(counting.statistics_folder())] == ["one"]
    del engine


def test_a_folder_that_is_gone_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BSFA_STATISTICS_INTERVAL", "1000")
    engine, folder = ran(tmp_path), counting.statistics_folder()
    assert folder.is_dir()
    folder.rmdir()
    assert counting._writer is not None
    counting._writer.write()
    assert not folder.exists()
    del engine


def test_a_folder_that_cannot_be_made_does_not_end_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(counting, "_writer", None)
    monkeypatch.setenv("BSFA_STATISTICS_INTERVAL", "1000")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BSFA_STATISTICS", str(tmp_path / "file"))
    engine = ran(tmp_path)
    assert "statistics cannot be written to" in caplog.messages[0]
    assert engine.calls["exact"] == 1
    with caplog.at_level(logging.INFO, logger="vllm.bsfa"):
        assert counting._writer is not None
        counting._writer.write()
    assert caplog.messages[1].startswith("BSFA, tiny-model at target_sparsity=0.5: 1 block-sparse")


def test_files_of_others_are_passed_over(tmp_path: Path) -> None:
    engine, folder = ran(tmp_path), counting.statistics_folder()
    for name, text in (
        ("bsfa-cut.json", '{"engine": "o'),
        ("bsfa-list.json", "[1]"),
        ("bsfa-other.json", '{"engine": "other"}'),
        ("settings.json", "{}"),
    ):
        (folder / name).write_text(text)
    (folder / "bsfa-folder.json").mkdir()
    assert [report.engine for report in bsfa_vllm.reports()] == ["one"]
    del engine


_FOREIGN = {
    "text for a time": {"started": "x"},
    "no time": {"started": float("nan")},
    "a time that is no float": {"started": 10**400},
    "text for a number of calls": {"calls": {"exact": "2"}},
    "calls as a list": {"calls": ["exact"]},
    "fewer layers kept": {"kept": [1]},
    "a negative number": {"kept": [-5, 2]},
    "a share": {"kept": [0.5, 2]},
    "a layer without a number": {"dense_layers": {"first": "window"}},
    "a reason that is none": {"dense_layers": {"1": 3}},
    "a number for a name": {"engine": 3},
    "a list for a name": {"engine": []},
    "no description": {"description": None},
    "a layer's number too long to read": {"dense_layers": {"1" * 5000: "window"}},
}


@pytest.mark.parametrize("changes", _FOREIGN.values(), ids=_FOREIGN.keys())
@pytest.mark.parametrize("name", ["one", "another"])
def test_a_file_with_an_odd_field_is_passed_over(
    tmp_path: Path, changes: dict[str, object], name: str
) -> None:
    engine, folder = ran(tmp_path), counting.statistics_folder()
    (expected,) = bsfa_vllm.reports()
    content = {**counting.snapshot(engine), "engine": name}
    path = folder / "bsfa-1.json"
    path.write_text(json.dumps({**content, **changes}))
    assert bsfa_vllm.reports() == [expected]
    path.write_text("[" * 100000)
    assert bsfa_vllm.reports() == [expected]
    path.write_text(json.dumps(content))
    assert bsfa_vllm.reports() != [expected]


def test_ranks_may_know_of_other_numbers_of_layers(tmp_path: Path) -> None:
    content = counting.snapshot(ran(tmp_path))
    fewer = {**content, "kept": content["kept"][:1], "visible": content["visible"][:1]}
    for snapshots in ([content, fewer], [fewer, content]):
        (report,) = counting.merged(snapshots)
        assert report.kept_blocks == [8 * HEADS, 0]


_FORK = """
import os, pathlib, sys, threading, time
import bsfa_vllm
from test_counting import ran

path = pathlib.Path(sys.argv[1])
parent = ran(path, name="parent")
child = os.fork()
if not child:
    names = [thread.name for thread in threading.enumerate()]
    assert "bsfa-statistics" not in names, names
    engine = ran(path, name="child")
    end = time.monotonic() + 20
    while len(bsfa_vllm.reports(path / "statistics")) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    sys.exit(0)  # writes once more
assert os.waitpid(child, 0)[1] == 0
reports = {report.engine: report for report in bsfa_vllm.reports()}
assert sorted(reports) == ["child", "parent"], reports
for report in reports.values():
    assert sum(report.sparse_calls.values()) == 1, report
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_writes_what_it_counts_and_nothing_of_its_parent(tmp_path: Path) -> None:
    (tmp_path / "statistics").mkdir()
    environment = {
        **os.environ,
        "BSFA_STATISTICS": str(tmp_path / "statistics"),
        "BSFA_STATISTICS_INTERVAL": "0.05",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    command = [sys.executable, "-c", _FORK, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Exception ignored" not in done.stderr


def test_the_thread_of_statistics_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSFA_STATISTICS_INTERVAL", "0.02")
    writer = counting._Writer()
    writer.start()
    writer.finish()
    writer.join(20)
    assert not writer.is_alive()


def test_an_engine_that_has_counted_nothing_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ran(tmp_path)
    config = standins.config(
        additional_config={"bsfa": {"thresholds": standins.table(tmp_path / "t.safetensors", 0)}}
    )
    idle = engine_of(config, 0, CPU, required=True)
    assert idle is not None
    assert [report.engine for report in bsfa_vllm.reports()] == [engine.identity]


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_an_interval_must_be_positive(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSFA_STATISTICS_INTERVAL", text)
    with pytest.raises(ValueError, match="BSFA_STATISTICS_INTERVAL must be a positive number"):
        counting.interval()


def test_an_interval_may_be_longer_than_a_thread_can_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSFA_STATISTICS_INTERVAL", "1e300")
    assert threading.Lock().acquire(timeout=counting.interval())


def test_the_folder_goes_with_the_process_that_chose_it() -> None:
    code = (
        "import pathlib, os; from bsfa_vllm.counting import statistics_folder as folder; "
        "path = folder(); path.mkdir(); assert folder() == path; print(path); "
        "assert os.environ['BSFA_STATISTICS'] == str(path)"
    )
    environment = {name: v for name, v in os.environ.items() if name != "BSFA_STATISTICS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert not Path(done.stdout.strip()).exists()


def test_prometheus_shows_them(tmp_path: Path) -> None:
    engine = ran(tmp_path)
    registry = CollectorRegistry()
    registry.register(metrics.Collector())
    text = generate_latest(registry).decode()
    assert f'bsfa_kept_blocks_total{{engine="one"}} {4.0 * HEADS}' in text
    assert f'bsfa_visible_blocks_total{{engine="one"}} {10.0 * HEADS}' in text
    assert 'bsfa_calls_total{engine="one",path="sparse",reason="exact"} 1.0' in text
    assert 'bsfa_calls_total{engine="one",path="dense",reason="decode step"} 1.0' in text
    assert len(engine.state.thresholds) == LAYERS


def test_the_page_of_metrics_outlives_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(metrics, "reports", fail)
    registry = CollectorRegistry()
    registry.register(metrics.Collector())
    assert "bsfa_calls_total{" not in generate_latest(registry).decode()
    assert caplog.messages == ["BSFA: statistics cannot be read"]


def test_metrics_are_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[object] = []
    monkeypatch.setattr("prometheus_client.REGISTRY.register", registered.append)
    monkeypatch.setattr(metrics, "_registered", False)
    metrics.register()
    metrics.register()
    assert len(registered) == 1
