# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What the compiled kernels take of a GPU: the report of ptxas, and the reviewed file.

``python tests/resources.py`` writes ``resources.toml`` anew from the library that is tested (all
kernels: preset release); the difference is what a reviewer looks at.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from native_build import library, run_well, tool

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REVIEWED = Path(__file__).with_name("resources.toml")
HEADING = """\
# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause

# What ptxas gives each kernel. Written by tests/resources.py, reviewed by people: a register, a
# spilled byte or a barrier more than before should have a reason in the commit that brings it.
"""


@dataclass(frozen=True, order=True)
class Resources:
    """What one kernel takes, in one compilation."""

    kernel: str
    """Demangled, without its parameters."""
    target: str
    """"sm_80" for example."""
    registers: int
    """Of a thread."""
    barriers: int
    """Of a block; 16 where their numbers are not known to the compiler."""
    stack: int
    """Bytes of a thread."""
    spill_stores: int
    """Bytes of a thread."""
    spill_loads: int
    """Bytes of a thread."""
    static_shared: int
    """Bytes of a block, besides the dynamic shared memory."""


def report_path() -> Path:
    """The report that the build puts beside the library."""
    return library().with_name(f"{library().name}.ptxas")


def parse_report(report: str) -> tuple[str, list[Resources]]:
    """The version of nvcc, and the kernels of a report.

    Raises:
        ValueError: a kernel is named of which the report then tells nothing.
    """
    version = re.match(r"# ptxas -v of nvcc (\S+)\n", report)
    if version is None:
        raise ValueError(f"not a report of ptxas: {report[:80]!r}")
    entries = re.split(r"Compiling entry function ", report)[1:]
    return version[1], sorted(_parse_entry(entry) for entry in entries)


def _parse_entry(entry: str) -> Resources:
    head = re.match(r"'(\S+)' for '(\w+)'", entry)
    used = re.search(r"Used (\d+) registers(.*)", entry)
    spills = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
    )
    if head is None or used is None or spills is None:
        raise ValueError(f"ptxas says too little of a kernel: {entry[:400]!r}")
    barriers = re.search(r"used (\d+) barriers", used[2])
    shared = re.search(r"(\d+) bytes smem", used[2])
    return Resources(
        kernel=_short_name(head[1]),
        target=head[2],
        registers=int(used[1]),
        barriers=int(barriers[1]) if barriers else 0,
        stack=int(spills[1]),
        spill_stores=int(spills[2]),
        spill_loads=int(spills[3]),
        static_shared=int(shared[1]) if shared else 0,
    )


def _short_name(symbol: str) -> str:
    full = run_well(tool("c++filt"), symbol).strip().removeprefix("void ")
    name = full[: full.rindex(">(") + 1] if ">(" in full else full.partition("(")[0]
    return name.replace("(int)", "").replace("(bool)", "").replace("> >", ">>")


def read_reviewed(path: Path = REVIEWED) -> tuple[str, list[Resources]]:
    """The version of nvcc, and the kernels of the reviewed file."""
    content = tomllib.loads(path.read_text())
    return content["nvcc"], sorted(Resources(**entry) for entry in content["kernels"])


def format_reviewed(version: str, kernels: Iterable[Resources]) -> str:
    """The text of the reviewed file."""
    lines = [HEADING, f'nvcc = "{version}"']
    for kernel in sorted(kernels):
        lines.append("\n[[kernels]]")
        for key, value in asdict(kernel).items():
            lines.append(f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    REVIEWED.write_text(format_reviewed(*parse_report(report_path().read_text())))
