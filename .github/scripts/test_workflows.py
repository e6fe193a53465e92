# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Workflows call nox, and what workflows and sessions set in the environment is read somewhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
# Read by libraries, not by the code of this repository.
OF_OTHERS = {"OMP_NUM_THREADS"}
# What a job may run besides sessions: the installation of Python and of nox.
SET_UP = (
    r"python3? -m venv \.venv",
    r"(\S+/)?(python[\d.]*|pip)( -m pip)? install nox",
    r"dnf install -y [\w. +-]+",
)


def set_by_workflows(node: Any) -> Iterator[str]:
    """The names under every ``env`` of a workflow."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "env":
                yield from value
            yield from set_by_workflows(value)
    elif isinstance(node, list):
        for item in node:
            yield from set_by_workflows(item)


def variables(nodes: Iterable[ast.expr | None]) -> set[str]:
    """The constants that look like names of variables of an environment."""
    values = (node.value for node in nodes if isinstance(node, ast.Constant))
    return {value for value in values if isinstance(value, str) and VARIABLE.fullmatch(value)}


def set_by_sessions(source: str) -> set[str]:
    """The names that a noxfile puts into dictionaries for the environment."""
    keys = [
        key
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Dict)
        for key in node.keys
    ]
    return variables(keys)


def read_by(source: str) -> set[str]:
    """The names that a Python source asks an environment for, directly or by a constant."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            asked = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            asked = node.args[:1] if node.func.attr in {"get", "getenv"} else []
        elif isinstance(node, ast.Assign):
            asked = [node.value]
        names |= variables(asked)
    return names


@pytest.fixture(scope="module")
def read() -> set[str]:
    sources = [*(ROOT / "packages").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    names = set().union(*(read_by(path.read_text(encoding="utf-8")) for path in sources))
    for project in (ROOT / "packages").glob("*/pyproject.toml"):
        names |= set(re.findall(r'env = "(\w+)"', project.read_text(encoding="utf-8")))
    return names | OF_OTHERS


def test_every_variable_that_is_set_is_read(read: set[str]) -> None:
    given = set_by_sessions((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    assert {"BSFA_REQUIRE_GPU", "BSFA_TEST_MODEL"} <= given
    for workflow in WORKFLOWS:
        given |= set(set_by_workflows(yaml.safe_load(workflow.read_text(encoding="utf-8"))))
    assert given - read == set()


def test_a_variable_that_nobody_reads_is_found(read: set[str]) -> None:
    workflow = "jobs: {test: {steps: [{run: nox, env: {HYPOTHESIS_PROFILE: nightly}}]}}"
    assert set(set_by_workflows(yaml.safe_load(workflow))) - read == {"HYPOTHESIS_PROFILE"}
    session = 'run_pytest(session, env={"BSFA_NEED_GPU": "1", "BSFA_REQUIRE_GPU": "1"})'
    assert set_by_sessions(session) - read == {"BSFA_NEED_GPU"}
    assert read_by('os.environ["A_B"]; os.environ.get("C_D"); E_F = "G_H"') == {"A_B", "C_D", "G_H"}


def commands(workflow: str) -> list[str]:
    """The commands of a workflow's steps."""
    runs = [
        step["run"]
        for job in yaml.safe_load(workflow)["jobs"].values()
        for step in job["steps"]
        if "run" in step
    ]
    return [part.strip() for run in runs for part in re.split(r"&&|\n", run) if part.strip()]


def is_allowed(command: str) -> bool:
    session = r"(\S+/)?(nox|python[\d.]* -m nox) -[st] .+"
    return any(re.fullmatch(pattern, command) for pattern in (session, *SET_UP))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_nox_only(path: Path) -> None:
    found = commands(path.read_text(encoding="utf-8"))
    assert found
    assert [command for command in found if not is_allowed(command)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_checkout_leaves_a_token_behind(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    checkouts = [step for step in steps if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts
    for step in checkouts:
        assert step["with"]["persist-credentials"] is False


def test_kernels_are_compiled_before_a_merge_in_the_image_of_releases() -> None:
    read = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in WORKFLOWS}
    container = read["ci"]["jobs"]["kernels"]["container"]
    assert "-devel-" in container
    assert f"'{container}'" in read["release"]["jobs"]["build"]["container"]


@pytest.mark.parametrize("command", ["pytest -q", "grep -qx 'version' pyproject.toml", "nox; ls"])
def test_another_command_would_be_found(command: str) -> None:
    assert not is_allowed(command)
