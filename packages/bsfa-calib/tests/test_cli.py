# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The command line as a user types it."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bsfa_calib import ThresholdTable
from bsfa_calib.capture import Progress
from bsfa_calib.cli import main, parse_k_values
from bsfa_calib.progress import Interrupted, ProgressReporter

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "table.safetensors"


def calibrate(model: Path, text: Path, output: Path, *more: str) -> int:
    return main(
        [
            *("--model", str(model), "--text", str(text), "--max_seq_len", "1024"),
            *("--device", "cpu"),  # its heads are smaller than the kernels'
            *("--num_examples", "2", "--thresholds_save_path", str(output), *more),
        ]
    )


def test_calibrating_writes_a_table_and_says_what_to_expect(
    model_directory: Path, text_directory: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(model_directory, text_directory, output, "--k_values", "2-4,6") == 0
    table = ThresholdTable.load(output)
    assert table.k_values == (2, 3, 4, 6)
    assert (table.model, table.samples, table.max_seqlen) == ("tiny-llama", 4, 1024)
    assert "bsfa-calibrate run --model" in table.provenance["command"]
    assert "prose: 0.txt from token 0" in table.provenance["data"]
    captured = capsys.readouterr()
    assert "k  sparsity  kept  held-out sparsity  held-out kept" in captured.out
    for text in ("On the calibration samples", "On held-out text"):
        assert f"{text}, the mean number of blocks kept is within" in captured.out
    assert "4 samples of 1024 to 1024 tokens, 2 held out (prose: 2 + 1" in captured.err
    assert "sample 6/6 done" in captured.err
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_the_papers_command_line_works(
    model_directory: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.json"
    entries = [{"input_text": f"{i} word " * 200, "task_name": f"t{i % 2}"} for i in range(6)]
    data.write_text(json.dumps(entries))
    command = [
        *("--model_name", str(model_directory), "--data_file", str(data)),
        *("--q_block_size", "128", "--k_block_size", "64", "--max_seq_len", "1024"),
        *("--num_layers", "2", "--num_heads", "4", "--k_values", "2,4,8"),
        *("--num_examples", "2", "--thresholds_save_path", str(output.with_suffix(".pt"))),
        *("--device", "cpu"),
    ]
    assert main(command) == 0
    assert ThresholdTable.load(output).samples == 4
    assert "tables are safetensors files" in capsys.readouterr().err


def test_a_target_sparsity_gives_scalars(
    model_directory: Path, text_directory: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--rule", "running_lse", "--target-sparsity", "0.3", "0.5")
    assert calibrate(model_directory, text_directory, output, *more) == 0
    table = ThresholdTable.load(output)
    assert (table.axis, table.rule, table.rows) == ("target_sparsity", "running_lse", 1)
    out = capsys.readouterr().out
    assert "target_sparsity  threshold" in out
    assert "On held-out text, the sparsity is within" in out


def test_info_tells_what_a_table_holds(capsys: pytest.CaptureFixture[str]) -> None:
    golden = str(Path(__file__).parent / "golden" / "v1.safetensors")
    assert main(["info", golden]) == 0
    out = capsys.readouterr().out
    for fact in ("example/tiny", "running_max", "128x64", "2 layers, 3 heads, 4 rows", "sha256:00"):
        assert fact in out
    assert main(["info", golden, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == [16, 64]


@pytest.mark.parametrize("rows", [1, 9])
def test_plot_draws_a_picture(tmp_path: Path, rows: int) -> None:
    generator = np.random.default_rng(0)
    thresholds = generator.normal(size=(5, 3, 4, rows)).astype(np.float32)
    thresholds[..., 0] = -np.inf if rows > 1 else 0
    table = ThresholdTable(
        thresholds,
        tuple(range(4, 9)),
        statistics={"sparsity": generator.random((5, 3, 4), np.float32)},
    )
    table.save(tmp_path / "t.safetensors")
    for name, more in (("a.png", []), ("b.png", ["--points", "4", "8"])):
        assert main(["plot", str(tmp_path / "t.safetensors"), str(tmp_path / name), *more]) == 0
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_plot_of_a_table_without_statistics_and_of_a_missing_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ThresholdTable(np.zeros((1, 2, 2, 3)), (4,)).save(tmp_path / "t.safetensors")
    command = ["plot", str(tmp_path / "t.safetensors"), str(tmp_path / "a.png")]
    assert main(command) == 0
    assert main([*command, "--points", "5"]) == 1
    assert "its points are k = 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/none", "--text", "{text}"], "there is no model at '/none'"),
        (["--model", "{model}", "--text", "/none"], "/none: there is no such file or directory"),
        (["--model", "{model}", "--data_file", "/none"], "/none: there is no such file"),
        (["--model", "{model}"], "either --data_file or --text"),
        (["--model", "{model}", "--text", "a", "--data_file", "b"], "either --data_file or --text"),
        (["--model", "{model}", "--text", "{text}", "--max_seq_len", "9999"], "4096 positions"),
        (["--model", "{model}", "--text", "{text}", "--num_layers", "3"], "the model has 2"),
        (["--model", "{model}", "--text", "{text}", "--k_block_size", "128"], "got 128x128"),
        (["--model", "{model}", "--text", "{text}", "--aggregate", "mode"], "aggregate must be"),
        (
            ["--model", "{model}", "--text", "{text}", "--max_seq_len", "256", "--k_values", "2"],
            "no query block has more than 2 blocks",
        ),
        (
            ["--model", "m", "--text", "t", "--k_values", "4", "--target_sparsity", "0.5"],
            "either --k_values or --target_sparsity",
        ),
        (["info", "/none"], "there is no threshold file /none"),
        (["convert", "/none", "{out}"], "there is no file /none"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    model_directory: Path,
    text_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    names = {"model": model_directory, "text": text_directory, "out": tmp_path / "t.safetensors"}
    assert main([argument.format(**names) for argument in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bsfa-calibrate: error: ")
    assert message in error


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--text", "x"],
        ["--model", "m", "--k_values", "64-4"],
        ["--model", "m", "--k_values", "0"],
        ["--model", "m", "--k_values", "4-x"],
        ["--model", "m", "--num_examples", "0"],
        ["--model", "m", "--target_sparsity", "1.5"],
        ["--model", "m", "--rule", "none"],
        ["--model", "m", "--unknown"],
    ],
)
def test_wrong_usage_has_status_2(arguments: list[str]) -> None:
    try:
        status: Any = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2


def test_lists_of_k_are_read() -> None:
    assert parse_k_values("4-6") == (4, 5, 6)
    assert parse_k_values("16, 4,4 8-9") == (4, 8, 9, 16)
    with pytest.raises(ValueError, match="no k value"):
        parse_k_values(",")


def test_a_first_interrupt_finishes_the_sample_and_a_second_does_not() -> None:
    stream = io.StringIO()
    reporter = ProgressReporter(stream)
    with reporter.interruptible():
        reporter(Progress(0, 3, 100, 1, 2))
        signal.raise_signal(signal.SIGINT)
        reporter(Progress(0, 3, 100, 2, 2))
        with pytest.raises(Interrupted):
            reporter(Progress(1, 3, 100, None, 2))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "stopping after this sample" in stream.getvalue()


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_names_sample_layer_and_time() -> None:
    stream = Terminal()
    reporter = ProgressReporter(stream)
    reporter(Progress(1, 3, 100, None, 2, resumed=True))
    reporter(Progress(1, 3, 100, 1, 2))
    reporter(Progress(2, 3, 100, None, 2))
    shown = stream.getvalue()
    assert "sample 1/3 done before" in shown
    assert "sample 2/3 (100 tokens), layer 1/2, 0:00 taken, about 0:00 left" in shown


def test_ctrl_c_keeps_the_samples_and_the_same_command_goes_on(
    model_directory: Path, text_directory: Path, output: Path
) -> None:
    command = [
        *(sys.executable, "-m", "bsfa_calib.cli", "--model", str(model_directory)),
        *("--text", str(text_directory), "--max_seq_len", "1024", "--num_examples", "3"),
        *("--k_values", "2-4", "--thresholds_save_path", str(output), "--device", "cpu"),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "sample 1/" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        status = process.wait(timeout=60)
    kept = list(output.with_name(f"{output.name}.samples").iterdir())
    assert kept
    if status == 0:  # it was faster than the signal
        pytest.fail("the calibration ended before the interrupt came")
    assert status == 130
    assert f"{len(kept)} samples are done and kept in" in rest
    assert not output.exists()

    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"sample {len(kept)}/8 done before" in done.stderr
    assert f"sample {len(kept) + 1}/8 done," in done.stderr
    assert ThresholdTable.load(output).samples == 6
