# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Which modules need what: transformers where a model is run, and torch not for tables."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import bsfa_calib

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(bsfa_calib.__path__, "bsfa_calib.")
    if not module.name.endswith("__main__")
)

BLOCKED = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
for name in {modules!r}:
    importlib.import_module(name)
print(*sorted(name for name in sys.modules if name.startswith("bsfa_")))
"""

# Reading, checking and describing tables, and the command line up to where it loads a model.
LIGHT = (
    *("bsfa_calib", "bsfa_calib.cli", "bsfa_calib.convert", "bsfa_calib.data"),
    *("bsfa_calib.estimate", "bsfa_calib.models", "bsfa_calib.plot", "bsfa_calib.point"),
    *("bsfa_calib.progress", "bsfa_calib.reasons", "bsfa_calib.report", "bsfa_calib.store"),
    *("bsfa_calib.switch", "bsfa_calib.text", "bsfa_calib.thresholds"),
)


def imported(modules: tuple[str, ...], blocked: tuple[str, ...]) -> set[str]:
    """Import modules in a fresh interpreter that lacks some packages; what it then holds."""
    program = BLOCKED.format(modules=modules, blocked=blocked)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_every_module_can_be_imported_without_transformers() -> None:
    heavy = ("transformers", "matplotlib", "gguf", "accelerate", "bsfa_hf")
    assert set(MODULES) <= imported(tuple(MODULES), heavy)


def test_tables_need_neither_torch_nor_the_kernels() -> None:
    held = imported(LIGHT, ("torch", "transformers", "matplotlib", "bsfa_kernel", "bsfa_hf"))
    assert set(LIGHT) <= held


def test_a_blocked_package_is_noticed() -> None:
    with pytest.raises(AssertionError, match="torch is blocked"):
        imported(("bsfa_calib.hook",), ("torch",))
