# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The packages of this repository and what they need of each other, read from their metadata."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_projects(packages: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the folder and the ``[project]`` table of every package, by canonical name."""
    projects = {}
    for path in sorted(packages.glob("*/pyproject.toml")):
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        projects[str(canonicalize_name(project["name"]))] = (path.parent, project)
    return projects


def requirements(project: dict[str, Any]) -> Iterator[Requirement]:
    """What a package requires, with all its extras."""
    optional = project.get("optional-dependencies", {}).values()
    for text in itertools.chain(project.get("dependencies", []), *optional):
        yield Requirement(text)


def oldest_releases(packages: Path) -> dict[str, str]:
    """The lower bound of everything that the packages require of others, by canonical name.

    Where they state several, it is the highest.
    """
    projects = read_projects(packages)
    bounds: dict[str, Version] = {}
    for _, project in projects.values():
        for requirement in requirements(project):
            name = str(canonicalize_name(requirement.name))
            for specifier in requirement.specifier:
                if name not in projects and specifier.operator == ">=":
                    version = Version(specifier.version)
                    bounds[name] = max(version, bounds.get(name, version))
    return {name: str(version) for name, version in sorted(bounds.items())}


def build_order(packages: Path, name: str | None = None) -> list[str]:
    """The packages in an order in which each comes after those that it needs.

    Args:
        packages: The folder of the packages.
        name: Only this package and those that it needs, extras included; it is the last one.

    Raises:
        ValueError: there is no such package, or packages need each other in a circle.
    """
    projects = read_projects(packages)
    if name is not None and name not in projects:
        raise ValueError(f"the package must be one of {', '.join(projects)}, got {name!r}")
    order: list[str] = []

    def add(needed: str, path: tuple[str, ...]) -> None:
        if needed in path:
            raise ValueError(f"packages need each other: {' -> '.join([*path, needed])}")
        if needed in order:
            return
        for requirement in requirements(projects[needed][1]):
            below = str(canonicalize_name(requirement.name))
            if below in projects and below != needed:
                add(below, (*path, needed))
        order.append(needed)

    for wanted in projects if name is None else [name]:
        add(wanted, ())
    return order


def hook_version(configuration: Path, repository: str) -> str:
    """The version of a tool that the pre-commit hooks run: it is pinned there and nowhere else.

    Args:
        configuration: The file ``.pre-commit-config.yaml``.
        repository: End of the repository's address, "ruff-pre-commit" for example.

    Raises:
        ValueError: the file does not pin that repository to a tag ``v1.2.3``.
    """
    text = configuration.read_text(encoding="utf-8")
    found = re.search(rf"repo: \S*/{re.escape(repository)}\n +rev: v(\d+(?:\.\d+)+)\n", text)
    if found is None:
        raise ValueError(f"{configuration.name} must pin {repository} to a tag v1.2.3")
    return found[1]
