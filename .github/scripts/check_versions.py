# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Check that the packages of this repository fit together as they stand.

Every requirement of one package on another must admit the version in the tree, and every version
must have an entry in its package's changelog.

Usage::

    python check_versions.py packages
"""

from __future__ import annotations

import sys
from pathlib import Path

from packages import read_projects, requirements
from packaging.utils import canonicalize_name


def problems(packages: Path) -> list[str]:
    """Return a sentence for everything that does not fit; empty if all is well."""
    projects = read_projects(packages)
    found = [] if projects else [f"no package under {packages}"]
    for name, (directory, project) in projects.items():
        version = project["version"]
        changelog = directory / "CHANGELOG.md"
        if not changelog.exists() or f"## {version}" not in changelog.read_text(encoding="utf-8"):
            found.append(f"{changelog} has no entry '## {version}'")
        for requirement in requirements(project):
            needed = str(canonicalize_name(requirement.name))
            if needed in projects and needed != name:
                there = projects[needed][1]["version"]
                if not requirement.specifier:
                    found.append(f"{name} needs {needed} without a range")
                elif not requirement.specifier.contains(there, prereleases=True):
                    found.append(f"{name} needs {requirement}, but the tree has {needed} {there}")
    return found


def main() -> int:
    """Print what does not fit; the exit code says whether there was any."""
    found = problems(Path(sys.argv[1]))
    for problem in found:
        print(f"check_versions: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
