# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The command lines as a user types them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bsfa_calib import ThresholdTable, learned
from bsfa_calib.capture import Progress
from bsfa_calib.cli import main
from bsfa_calib.cli.common import k_values, table_path
from bsfa_calib.cli.flags import METHODS
from bsfa_calib.progress import Interrupted, ProgressReporter
from bsfa_calib.thresholds import checksum_of

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
    assert table.provenance["command"].startswith("bsfa-calibrate calibrate --method topk --model")
    assert "--geometry 128x64" in table.provenance["command"]
    assert table.provenance["data"].startswith("prose/0.txt+@0; prose/0.txt+@1023; verse/")
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
    captured = capsys.readouterr()
    assert "tables are safetensors files" in captured.err
    assert "4 samples of 1024 to 1024 tokens, 2 held out (t0: 2 + 1" in captured.err


def test_a_target_sparsity_gives_scalars(
    model_directory: Path, text_directory: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--rule", "peak_lse", "--target-sparsity", "0.3", "0.5", "--no-resume")
    assert calibrate(model_directory, text_directory, output, *more) == 0
    table = ThresholdTable.load(output)
    assert (table.axis, table.rule, table.rows) == ("target_sparsity", "peak_lse", 1)
    assert (table.geometry, len(table.provenance["expected_kl"].split(", "))) == ("128x64", 2)
    out = capsys.readouterr().out
    assert "target_sparsity  sparsity   KL, nats  change of NLL" in out
    assert "measured on 2 samples of up to 1024 tokens that nothing was made from" in out
    alone = (*more, "--holdout_samples", "0")
    assert calibrate(model_directory, text_directory, output, *alone) == 0
    assert "No text was held out" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["info"], ["table", "info"]])
def test_info_tells_what_a_table_holds(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    golden = str(Path(__file__).parent / "golden" / "v1.safetensors")
    assert main([*command, golden]) == 0
    out = capsys.readouterr().out
    for fact in ("example/tiny", "running_max", "128x64", "2 layers, 3 heads, 4 rows", "sha256:00"):
        assert fact in out
    assert main([*command, golden, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == [16, 64]


def test_info_says_whether_a_table_has_a_checksum_that_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = Path(__file__).parent / "golden"
    table = ThresholdTable.load(golden / "v2.safetensors")
    path = tmp_path / "t.safetensors"
    made_up = {"checksum": "sha256:made up, holds", "rule": "made up"}
    dataclasses.replace(table, provenance=made_up).save(path)
    checksum = checksum_of(path)
    assert main(["table", "info", str(path)]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^checksum +{checksum}, holds$", out, re.MULTILINE)
    assert re.search(rf"^rule +{table.rule}$", out, re.MULTILINE)
    assert re.search(r"^rule \(provenance\) +made up$", out, re.MULTILINE)
    assert main(["table", "info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checksum"] == checksum
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert main(["table", "info", str(path)]) == 2
    assert "t.safetensors: the file is damaged" in capsys.readouterr().err
    assert main(["table", "info", str(golden / "v2.safetensors")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^checksum +none: damage to the file may go unnoticed$", out, re.MULTILINE)
    assert main(["table", "info", str(golden / "v2.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checksum"] is None


def test_info_does_to_a_terminal_nothing_that_a_table_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ThresholdTable(
        np.zeros((1, 2, 4, 1)),
        (8,),
        model="\x1b[31mred\u202e",
        provenance={"note": "x\nk  sparsity\n1  99.9 %", "dense_layers": "\x07"},
    ).save(tmp_path / "t.safetensors")
    assert main(["table", "info", str(tmp_path / "t.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert r"\x1b[31mred\u202e" in out
    assert r"x\nk  sparsity\n1  99.9 %" in out


def test_info_reads_the_papers_files_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"thresholds": torch.zeros(1, 2, 4, 6), "k_values": [8]}, tmp_path / "a.pt")
    assert main(["table", "info", str(tmp_path / "a.pt")]) == 0
    assert "2 layers, 4 heads, 6 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("llama-3.1-8b", "llama-3.1-8b.safetensors"),
        ("llama-3.1", "llama-3.1.safetensors"),
        ("t.safetensors", "t.safetensors"),
        ("t.pt", "t.safetensors"),
        ("plain", "plain.safetensors"),
    ],
)
def test_a_table_keeps_the_name_that_it_was_given(
    tmp_path: Path, name: str, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert table_path(tmp_path / name) == tmp_path / written
    assert ("so " in capsys.readouterr().err) == (name != written)


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
    assert main([*command, "--points", "5"]) == 2
    assert "its points are k = 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/none", "--text", "{text}"], "there is no model at '/none'"),
        (["--model", "{model}", "--text", "/none"], "/none: there is no such file or directory"),
        (["--model", "{model}", "--data_file", "/none"], "/none: there is no such file"),
        (["--model", "{model}"], "either --data_file or --text"),
        (["--model", "{model}", "--text", "a", "--data_file", "b"], "either --data_file or --text"),
        (
            ["--model", "{model}", "--text", "{text}", "--max_seq_len", "9999"],
            "exceed the model's 4096 positions",
        ),
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
        (["--model", "m", "--method", "topk", "--text", "/none"], "/none: there is no such file"),
        (["info", "/none"], "there is no threshold file /none"),
        (["convert", "/none", "{out}"], "there is no threshold file /none"),
        (["convert", "/none.pt", "{out}"], "there is no file /none.pt"),
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
    assert main([argument.format(**names) for argument in arguments]) == 2
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
    assert k_values("4-6") == (4, 5, 6)
    assert k_values("16, 4,4 8-9") == (4, 8, 9, 16)
    with pytest.raises(ValueError, match="no k value"):
        k_values(",")


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
    assert "stopping as soon as this is done" in stream.getvalue()
    with reporter.interruptible(), pytest.raises(Interrupted, match="measured"):
        reporter.note("measured")


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
        *(sys.executable, "-m", "bsfa_calib.cli", "run", "--model", str(model_directory)),
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
    kept = list(output.with_name(f"{output.name}.checkpoint").iterdir())
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


# ----------------------------------------------------------------------------- one calibrate


QUICK = {
    "learned": ("--steps", "3", "--further-steps", "2", "--target-sparsity", "0.4", "0.5"),
    "scalar": ("--target-sparsity", "0.4", "0.5"),
    "topk": ("--k", "2,4"),
}


def command(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    return [
        *("calibrate", "--model", str(model), "--text", str(text), "--length", "1024"),
        *("--samples", "2", "--holdout", "1", "--device", "cpu", "--out", str(output), *more),
    ]


def program() -> list[str]:
    """The installed ``bsfa-calibrate``, or what pyproject.toml says that it runs."""
    installed = Path(sys.executable).with_name("bsfa-calibrate")
    if installed.exists():
        return [str(installed)]
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    found = re.search(r'^bsfa-calibrate = "([\w.]+):(\w+)"$', project, re.MULTILINE)
    assert found is not None
    module, function = found.groups()
    return [sys.executable, "-c", f"import sys, {module} as m; sys.exit(m.{function}())"]


def test_a_reader_that_goes_away_is_no_error() -> None:
    table = Path(__file__).with_name("golden") / "v1.safetensors"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as output:
        done = subprocess.run(
            [*program(), "table", "info", str(table)],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("method", METHODS)
def test_the_installed_program_calibrates_by_every_method(
    model_directory: Path, text_directory: Path, output: Path, method: str
) -> None:
    arguments = command(model_directory, text_directory, output, "--method", method, *QUICK[method])
    done = subprocess.run([*program(), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = ThresholdTable.load(output)
    assert table.points == ((2, 4) if method == "topk" else (0.4, 0.5))
    assert (table.model, table.samples, table.max_seqlen) == ("tiny-llama", 2, 1024)
    assert (table.rule, table.geometry, table.voters) == (
        ("absolute", "128x64", 1) if method == "topk" else ("peak_lse", "128x64", 4)
    )
    assert table.provenance["data"].startswith("prose/")
    assert "; verse/" in table.provenance["data"]
    assert f"--method {method}" in table.provenance["command"]
    assert ("expected_kl" in table.provenance) == (method != "topk")
    assert "2 samples of 1024 to 1024 tokens, 1 held out" in done.stderr
    assert f"wrote {output}" in done.stdout
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize("method", METHODS)
def test_voters_are_recorded_in_the_table(
    model_directory: Path, text_directory: Path, output: Path, method: str
) -> None:
    more = ("--method", method, *QUICK[method], "--voters", "2")
    assert main(command(model_directory, text_directory, output, *more)) == 0
    table = ThresholdTable.load(output)
    assert table.voters == 2
    assert "--voters 2" in table.provenance["command"]
    # Measured, where it is, with as many voters: the scalars skip what they are to skip.
    if method == "scalar":
        skipped = [float(share) for share in table.provenance["expected_sparsity"].split(", ")]
        assert skipped == pytest.approx([0.4, 0.5], abs=0.1)


def test_every_method_reads_the_same_tokens(
    model_directory: Path, text_directory: Path, tmp_path: Path
) -> None:
    named = []
    for method in METHODS:
        out = tmp_path / f"{method}.safetensors"
        more = ("--method", method, *QUICK[method])
        assert main(command(model_directory, text_directory, out, *more)) == 0
        named.append(ThresholdTable.load(out).provenance["data"])
    assert len(set(named)) == 1


def test_a_table_may_be_learned_on_from_and_what_was_learned_is_kept(
    model_directory: Path, text_directory: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model_directory, text_directory, output, *QUICK["learned"])) == 0
    again, kept = output.with_name("again.safetensors"), output.with_name("kept")
    more = ("--start", str(output), "--max-loss", "0.5", "--steps", "2", "--further-steps", "1")
    arguments = command(model_directory, text_directory, again, *more)
    arguments += ["--checkpoint", str(kept), "--keep-checkpoint"]
    assert main(arguments) == 0
    assert ThresholdTable.load(again).points == (0.5,)
    assert [path.name for path in kept.iterdir()] == ["learned.npz"]
    capsys.readouterr()
    assert main(arguments) == 0
    assert "was learned before" in capsys.readouterr().err
    assert main([*arguments, "--no-resume"]) == 0
    assert "was learned before" not in capsys.readouterr().err


def test_finding_points_leaves_what_was_learned_where_it_is(
    model_directory: Path, text_directory: Path, output: Path
) -> None:
    start, kept = output.with_name("start.safetensors"), output.with_name("kept")
    kept.mkdir()
    (kept / "learned.npz").write_bytes(b"of another run")
    ThresholdTable(
        np.zeros((1, 2, 4, 1), np.float32), (0.5,), "target_sparsity", 64, 64, "peak_lse"
    ).save(start)
    arguments = command(model_directory, text_directory, output, "--points-only")
    arguments.remove("--holdout")
    arguments.remove("1")
    arguments += ["--start", str(start), "--target-sparsity", "0.3", "--checkpoint", str(kept)]
    for more in ([], ["--no-resume"]):
        assert main([*arguments, *more]) == 0
        assert [path.name for path in kept.iterdir()] == ["learned.npz"]


def test_points_are_found_on_the_thresholds_of_a_table(
    model_directory: Path, text_directory: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = output.with_name("start.safetensors")
    heads = np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 2, 4, 1)
    ThresholdTable(
        *(heads, (0.5,), "target_sparsity", 64, 64, "peak_lse", 2),
        samples=7,
        aggregate="learned",
        provenance={"command": "made it so"},
    ).save(start)
    arguments = command(model_directory, text_directory, output, "--points-only")
    arguments.remove("--holdout")
    arguments.remove("1")
    arguments += ["--start", str(start)]
    for points in (["--max-loss", "0.01", "0.05"], ["--target-sparsity", "0.2", "0.4"]):
        assert main([*arguments, *points]) == 0
        table = ThresholdTable.load(output)
        assert (table.axis, table.geometry, table.voters, table.samples, table.aggregate) == (
            *(points[0][2:].replace("-", "_"), "64x64", 2, 7, "learned"),
        )
        assert table.points == tuple(map(float, points[1:]))
        # Heads differ as they did.
        assert np.allclose(table.thresholds - table.thresholds[:, :1, :1], heads - heads[:, :1, :1])
        assert table.provenance["start_command"] == "made it so"
        assert "--points-only" in table.provenance["command"]
        assert "served" in table.provenance
        assert "data" not in table.provenance
        losses, shares = (
            [float(each) for each in table.provenance[f"expected_{what}"].split(", ")]
            for what in ("kl", "sparsity")
        )
        if table.axis == "max_loss":
            assert all(loss <= bound for loss, bound in zip(losses, table.points, strict=True))
        else:
            assert shares == pytest.approx(table.points, abs=0.01)
    assert "target_sparsity 0.4: skips" in capsys.readouterr().err
    # Points of that table in turn: the thresholds still come from the first one.
    arguments[arguments.index(str(start))] = str(output)
    again = output.with_name("again.safetensors")
    arguments[arguments.index("--out") + 1] = str(again)
    assert main([*arguments, "--target-sparsity", "0.3"]) == 0
    provenance = ThresholdTable.load(again).provenance
    assert [key for key in provenance if key.startswith("start_")] == [
        "start_command",
        "start_model",
    ]
    assert provenance["start_command"] == "made it so"


def test_points_are_found_for_samples_of_different_lengths(
    model_directory: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    words = (" ".join(f"w{i * i % 997}" for i in range(count)) for count in (110, 400))
    data.write_text("\n".join(json.dumps({"input_text": text}) for text in words))
    start = output.with_name("start.safetensors")
    thresholds = np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 2, 4, 1)
    ThresholdTable(
        *(thresholds, (0.5,), "target_sparsity", 64, 64, "peak_lse"), max_seqlen=2048
    ).save(start)
    arguments = command(model_directory, data, output, "--points-only", "--start", str(start))
    arguments[arguments.index("--holdout") : arguments.index("--holdout") + 2] = []
    assert main(arguments) == 0
    table = ThresholdTable.load(output)
    # The shortest decides what can be asked for, the longest what the table is for.
    assert table.points == (0.5, 0.6, 0.7, 0.75)
    assert table.max_seqlen == 1024
    assert "at 1024 tokens, place" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_json_samples_are_read_by_every_method(
    model_directory: Path, output: Path, tmp_path: Path, method: str
) -> None:
    data = tmp_path / "data.jsonl"
    entries = [{"input_text": f"{i} word " * 300, "task_name": f"t{i % 2}"} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, entries)))
    more = ("--method", method, *QUICK[method])
    assert main(command(model_directory, data, output, *more)) == 0
    table = ThresholdTable.load(output)
    assert table.samples == 2
    assert table.provenance["data"].startswith("t0/")


def test_json_samples_beside_other_text_need_to_be_told_their_part(
    model_directory: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, text = tmp_path / "data.jsonl", tmp_path / "text.txt"
    data.write_text(json.dumps({"input_text": "some words " * 900}))
    text.write_text("other words " * 900)
    arguments = command(model_directory, data, output, "--method", "scalar", *QUICK["scalar"])
    arguments.insert(arguments.index("--text") + 1, str(text))
    assert main(arguments) == 2
    assert "need --text-part, which holds for both" in capsys.readouterr().err
    assert main([*arguments, "--text-part", "0:1"]) == 0


def test_a_list_of_many_windows_fits_into_a_table(
    model_directory: Path, output: Path, tmp_path: Path
) -> None:
    folder = tmp_path / ("n" * 120)
    folder.mkdir()
    for number in range(900):
        (folder / f"{number}-{'a' * 100}.txt").write_text("word word word ")
    arguments = command(model_directory, folder, output, "--method", "scalar", *QUICK["scalar"])
    assert main(arguments) == 0
    data = ThresholdTable.load(output).provenance["data"]
    assert len(data) <= 16384 + 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "1000"], "must be a multiple of 128, got 1000"),
        (["--geometry", "32x64"], "--geometry must be 128x64 or 64x64 (queries x keys), got 32x64"),
        (["--geometry", "64"], "a geometry is written as queries x keys"),
        (["--holdout", "0"], "--holdout must be at least 1 for --method learned, got 0"),
        (["--start", "missing.safetensors"], "missing.safetensors"),
        (["--text-part", "1:0"], "A:B with 0 <= A < B <= 1"),
        (["--k", "4"], "--k is not for --method learned"),
        (["--aggregate", "mean"], "--aggregate is not for --method learned"),
        (["--method", "topk", "--target-sparsity", "0.5"], "--target-sparsity is not for --method"),
        (["--method", "topk", "--backend", "reference"], "--backend is not for --method topk"),
        (["--method", "topk", "--aggregate", "mode"], "aggregate must be one of pooled"),
        (["--method", "scalar", "--max-loss", "0.1"], "--max-loss is not for --method scalar"),
        (["--method", "scalar", "--steps", "9"], "--steps is not for --method scalar"),
        (["--method", "scalar", "--seed", "0"], "--seed is not for --method scalar"),
        (["--method", "scalar", "--points-only"], "--points-only is not for --method scalar"),
        (["--points-only", "--max-loss", "0.1"], "--points-only needs --start"),
        (["--points-only", "--rule", "absolute"], "--rule is not for --points-only"),
        (["--points-only", "--voters", "2"], "--voters is not for --points-only"),
        (["--points-only", "--serve-length", "9"], "--serve-length is not for --points-only"),
    ],
)
def test_calibrate_says_what_is_wrong_before_it_loads_a_model(
    text_directory: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(text_directory)
    assert main(["calibrate", "--model", "none", "--text", text, *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("bsfa-calibrate: error: ")
    assert message in printed
    assert "loading" not in printed


@pytest.mark.parametrize("method", METHODS)
def test_a_text_that_cannot_be_read_is_told_before_a_model_is_loaded(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\xff")
    arguments = ["calibrate", "--model", "none", "--text", str(tmp_path), "--method", method]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert "a.txt:2 (byte 5): not UTF-8 text" in printed
    assert "loading" not in printed


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("learned", "nothing to gain: of prompts of 128 tokens"),
        ("scalar", "nothing to gain: of prompts of 128 tokens"),
        ("topk", "no query block has more than"),
    ],
)
def test_samples_that_are_too_short_are_told(
    model_directory: Path,
    text_directory: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    message: str,
) -> None:
    arguments = command(model_directory, text_directory, output, "--method", method)
    arguments[arguments.index("1024")] = "128"
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_interrupt_while_learning_says_what_is_kept(
    model_directory: Path,
    text_directory: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(learned, "calibrate", interrupt)
    arguments = command(model_directory, text_directory, output, *QUICK["learned"])
    assert main(arguments) == 130
    printed = capsys.readouterr().err
    assert f"what was learned is kept in {output}.checkpoint" in printed
    monkeypatch.undo()
    assert main(arguments) == 0
    assert "target 0.6 was learned before" in capsys.readouterr().err


def test_a_traceback_is_shown_to_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSFA_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="there is no threshold file"):
        main(["table", "info", "none.safetensors"])


def test_the_example_of_the_readme_runs(
    model_directory: Path, text_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    use, make = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    for old, new in (
        ('"SmolLM2-135M-Instruct.Q4_1.gguf"', f"{str(model_directory)!r}, device='cpu'"),
        ('"texts"', repr(str(text_directory))),
        ("length=4096, count=10", "length=1024, count=3"),
        ("ids[:8], ids[8:]", "ids[:2], ids[2:]"),
    ):
        assert old in make
        make = make.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(compile(make, "README.md", "exec"), {})
    assert ThresholdTable.load("table.safetensors").points == (0.5, 0.7)
    values = np.zeros((61, 2, 32, 3))
    ThresholdTable(values, tuple(range(4, 65))).save("table.safetensors")
    scope: dict[str, Any] = {}
    exec(compile(use, "README.md", "exec"), scope)
    assert scope["thresholds"].shape == (2, 32, 3)
    assert scope["rank"].heads == 8


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--seed", "-1", "a seed must be a whole number of at least 0, got '-1'"),
        ("--ceiling", "nan", "a threshold must be a number, got 'nan'"),
        ("--samples", "9999999999", "must be an integer from 1 to 999999999, got '9999999999'"),
        ("--holdout", "-1", "must be an integer from 0 to 999999999, got '-1'"),
    ],
)
def test_numbers_out_of_range_are_refused_by_their_flag(
    flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["calibrate", "--model", "no/model", "--text", "none", flag, value])
    assert f"argument {flag}: {message}" in capsys.readouterr().err
