# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The package: version, entry point, the window of versions, and what the plug-in registers."""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import bsfa_vllm
from bsfa_vllm import metrics, plugin
from bsfa_vllm.versions import UnsupportedVersionError, check_version, is_supported, window


def test_documents_name_the_supported_releases() -> None:
    package = Path(__file__).parents[1]
    root = package.parents[1]
    documents = [package / "README.md", root / "README.md", root / "docs" / "serving.md"]
    for path in documents[: 3 if (root / "docs").is_dir() else 1]:  # an sdist has one
        named = re.findall(r"\b0\.\d+ to 0\.\d+\b", path.read_text(encoding="utf-8"))
        assert set(named) == {window()}, path


def test_version_and_entry_point() -> None:
    assert bsfa_vllm.__version__ == version("bsfa-vllm")
    (found,) = (one for one in entry_points(group="vllm.general_plugins") if one.name == "bsfa")
    assert found.load() is plugin.register


@pytest.mark.parametrize("text", ["0.26.0", "0.26.0+cu130", "0.32.0.dev3+cpu", "0.33.9"])
def test_supported(text: str) -> None:
    assert is_supported(text)
    check_version(text)


@pytest.mark.parametrize("text", ["0.25.4", "0.34.0", "1.0", "0.3.30", "dev"])
def test_unsupported(text: str) -> None:
    assert not is_supported(text)
    with pytest.raises(UnsupportedVersionError, match=f"vLLM 0.26 to 0.33, and this is {text}"):
        check_version(text)


class Registry:
    """vLLM, as far as the plug-in sees it."""

    def __init__(self, patch: pytest.MonkeyPatch, release: str, *, cpu: bool, names: bool) -> None:
        self.found: dict[Any, str] = {}
        members: dict[str, Any] = {"CUSTOM": "custom", "CPU_ATTN": "cpu_attn"}
        if names:
            members["register"] = object()
        self.members = SimpleNamespace(**members)
        modules = {
            "vllm": {"__version__": release},
            "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: cpu)},
            "vllm.v1.attention.backends.registry": {
                "AttentionBackendEnum": self.members,
                "register_backend": self.found.__setitem__,
            },
        }
        for name in ("vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
            modules[name] = {}
        for name, content in modules.items():
            module = ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
        patch.setattr(metrics, "register", lambda: None)


def test_cuda_gets_a_custom_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(monkeypatch, "0.26.0", cpu=False, names=False)
    plugin.register()
    plugin.register()
    assert registry.found == {"custom": "bsfa_vllm.cuda.CUDABackend"}


def test_an_interval_that_is_none_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    Registry(monkeypatch, "0.26.0", cpu=False, names=False)
    monkeypatch.setenv("BSFA_STATISTICS_INTERVAL", "soon")
    with pytest.raises(ValueError, match="BSFA_STATISTICS_INTERVAL must be a positive number"):
        plugin.register()


@pytest.mark.parametrize("name", ["file", "file/below", "file" * 100])
def test_a_folder_that_cannot_be_one_is_refused_at_the_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Registry(monkeypatch, "0.26.0", cpu=False, names=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BSFA_STATISTICS", str(tmp_path / name))
    with pytest.raises(ValueError, match=r"BSFA_STATISTICS must name a folder .*file"):
        plugin.register()
    monkeypatch.setenv("BSFA_STATISTICS", str(tmp_path / "new" / "folder"))
    plugin.register()
    assert not (tmp_path / "new").exists()


def test_newer_releases_have_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(monkeypatch, "0.33.0", cpu=False, names=True)
    plugin.register()
    assert registry.found.pop("BSFA") == "bsfa_vllm.cuda.NamedCUDABackend"
    # vLLM's own list has the name from then on, and takes none twice.
    vars(registry.members)["BSFA"] = "added"
    plugin.register()
    assert registry.found == {"custom": "bsfa_vllm.cuda.CUDABackend"}


def test_the_back_end_for_cpus_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(monkeypatch, "0.32.0", cpu=True, names=True)
    plugin.register()
    assert registry.found == {"cpu_attn": "bsfa_vllm.cpu.CPUBackend"}


def test_another_release_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(monkeypatch, "0.40.0", cpu=True, names=True)
    with caplog.at_level(logging.WARNING, logger="vllm.bsfa"):
        plugin.register()
    assert caplog.messages == ["bsfa-vllm is left out: it supports vLLM 0.26 to 0.33"]
    assert registry.found == {}
    monkeypatch.setenv("BSFA_THRESHOLDS", "table.safetensors")
    with pytest.raises(UnsupportedVersionError, match=r"this is 0\.40\.0"):
        plugin.register()


@pytest.mark.parametrize("name", ["bsfa_vllm.cuda", "bsfa_vllm.cpu"])
def test_another_release_is_refused_when_it_is_chosen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Registry(monkeypatch, "0.25.0", cpu=False, names=False)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UnsupportedVersionError, match="install one of those"):
        __import__(name)


def test_nothing_of_vllm_or_transformers_is_imported_with_it() -> None:
    code = (
        "import sys, bsfa_vllm.metrics, bsfa_vllm.plugin, bsfa_vllm.splitting; "
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stdout))
    assert {"bsfa_calib", "bsfa_kernel"} <= loaded
    assert not loaded & {"bsfa_hf", "prometheus_client", "transformers", "vllm"}
