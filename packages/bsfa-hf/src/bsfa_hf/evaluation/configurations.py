# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What attention a model is evaluated under, and how that is written on a command line."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bsfa_calib.point import AXES
from bsfa_calib.thresholds import ThresholdTable
from bsfa_hf.automatic import named_point, named_selection
from bsfa_hf.baselines import SlidingWindow, SpargeAttention
from bsfa_hf.methods import BlockSparse, Method, OneThreshold
from bsfa_kernel import DEFAULT_GEOMETRY, GEOMETRIES, RULES, VOTERS, Geometry

# The options that each kind takes, and whether it must have them.
_OPTIONS: dict[str, dict[str, bool]] = {
    "dense": {},
    "table": {"file": True, **dict.fromkeys(("point", *AXES, "selection"), False)},
    "scalar": {
        "rule": True,
        **dict.fromkeys(("threshold", "sparsity", "geometry", "voters", "selection"), False),
    },
    "sliding_window": {"window": True, "sink": False},
    "sparge_attn": dict.fromkeys(("topk", "simthreshd1", "cdfthreshd", "pvthreshd"), False),
}
KINDS = tuple(_OPTIONS)
_SELECTING = tuple(kind for kind, known in _OPTIONS.items() if "selection" in known)


class ConfigurationError(ValueError):
    """A configuration cannot be had; the message gives the rule and the value."""


@dataclass(frozen=True)
class Configuration:
    """One way to compute attention.

    Attributes:
        name: what tables and plots call it.
        kind: one of ``KINDS``.
        options: the kind's options, as written; the selection as it was asked for, by an option
            or else by the environment.
        digest: changes with whatever changes the result: kind, options, and a table's content.
    """

    name: str
    kind: str
    options: tuple[tuple[str, str], ...] = ()
    digest: str = ""

    def option(self, name: str, default: str = "") -> str:
        """The value of an option, as written."""
        return dict(self.options).get(name, default)

    @property
    def geometry(self) -> Geometry:
        """The sparsity block in which this configuration's sparsity is counted."""
        table = self._table()
        if table is not None:
            return Geometry(table.q_block, table.k_block)
        return Geometry.parse(self.option("geometry", str(DEFAULT_GEOMETRY)))

    @property
    def rule(self) -> str:
        """What scores are compared with, one of ``bsfa_kernel.RULES``; "" without thresholds."""
        table = self._table()
        return self.option("rule") if table is None else table.rule

    @property
    def voters(self) -> int:
        """Of how many query rows one votes."""
        table = self._table()
        return int(self.option("voters", "1")) if table is None else table.voters

    def _table(self) -> ThresholdTable | None:
        return ThresholdTable.load(self.option("file")) if self.kind == "table" else None


def make_configuration(
    kind: str, options: Mapping[str, str] | None = None, *, name: str = ""
) -> Configuration:
    """A checked configuration.

    * ``dense``: SDPA, what everything is compared with.
    * ``table``: thresholds of ``file`` at a ``point``, which may be named by its axis, as ``k``;
      rule, geometry and voters are the table's.
    * ``scalar``: one threshold for the whole model under ``rule`` (running_max is BLASST's, arXiv
      2512.12087); either ``threshold``, or ``sparsity``, for which it is then found on text that
      is not evaluated on; ``voters`` is 1 unless given.
    * ``sliding_window``: the last ``window`` keys, and the first ``sink``.
    * ``sparge_attn``: SpargeAttention (arXiv 2502.18137), if it is installed; ``topk``, or
      ``cdfthreshd``, and its ``simthreshd1`` and ``pvthreshd``.

    For tables and scalars, ``selection`` says from what scores blocks are chosen, as that of
    ``bsfa_hf.enable``.

    Raises:
        ConfigurationError: unknown kind or option, one missing, or a value out of range.
        FileNotFoundError: there is no such table.
        ThresholdFileError: the file is not a table.
    """
    options = dict(options or {})
    if kind not in _OPTIONS:
        raise ConfigurationError(f"a configuration is one of {', '.join(KINDS)}, got {kind!r}")
    known = _OPTIONS[kind]
    for option, value in options.items():
        if option not in known:
            raise ConfigurationError(
                f"{kind} takes {', '.join(known) or 'no options'}, got {option}={value}"
            )
    missing = [option for option, needed in known.items() if needed and option not in options]
    if missing:
        raise ConfigurationError(f"{kind} needs {', '.join(missing)}")
    content = _check_values(kind, options)
    if kind in _SELECTING:
        selection = named_selection(options.get("selection"))
        if selection != "auto":
            options["selection"] = selection
        name = name or _default_name(kind, options)
        options["selection"] = selection
    ordered = tuple(sorted(options.items()))
    described = json.dumps([kind, content, [item for item in ordered if item[0] != "file"]])
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    return Configuration(name or _default_name(kind, options), kind, ordered, digest)


def parse_configuration(text: str, *, selection: str | None = None) -> Configuration:
    """Read ``[NAME=]KIND[:option=value,...]``, as ``blasst=scalar:rule=running_max,threshold=-7``.

    Args:
        text: the configuration.
        selection: the selection of a table or scalar that names none.

    Raises:
        ConfigurationError: it is not written so, or breaks a rule of its kind.
    """
    head, _, tail = text.partition(":")
    name, separator, kind = head.rpartition("=")
    if separator and not name:
        raise ConfigurationError(f"a configuration is [NAME=]KIND[:option=value,...], got {text!r}")
    options: dict[str, str] = {}
    for item in filter(None, tail.split(",")):
        option, equals, value = item.partition("=")
        if not equals or not value or option in options:
            raise ConfigurationError(
                f"options are option=value, each once, got {item!r} in {text!r}"
            )
        options[option.strip()] = value.strip()
    kind = kind.strip()
    if selection is not None and kind in _SELECTING:
        options.setdefault("selection", selection)
    return make_configuration(kind, options, name=name.strip())


def check_names(configurations: Iterable[Configuration]) -> None:
    """Refuse two configurations of one name.

    Raises:
        ConfigurationError: there are.
    """
    seen: set[str] = set()
    for configuration in configurations:
        if configuration.name in seen:
            raise ConfigurationError(
                f"two configurations are called {configuration.name!r}; name one: NAME=KIND:..."
            )
        seen.add(configuration.name)


def make_method(
    configuration: Configuration, *, check_model: bool = True, threshold: float | None = None
) -> Method | None:
    """What a model is switched to for a configuration; None for dense.

    Args:
        configuration: what to compute.
        check_model: refuse a table that names another model.
        threshold: for a scalar that was asked for by its sparsity: the threshold that was found.
    """
    options = dict(configuration.options)
    if configuration.kind == "dense":
        return None
    if configuration.kind == "table":
        point = named_point(options.get, "")
        return BlockSparse(options["file"], point, check_model, options.get("selection"))
    if configuration.kind == "scalar":
        if threshold is None:
            threshold = float(options["threshold"])
        return OneThreshold(
            *(threshold, options["rule"], configuration.geometry, configuration.voters),
            selection=options.get("selection"),
            expected_skipped=float(options["sparsity"]) if "sparsity" in options else None,
        )
    if configuration.kind == "sliding_window":
        return SlidingWindow(int(options["window"]), int(options.get("sink", 0)))
    return SpargeAttention({name: float(options[name]) for name in options}, measure=True)


def _check_values(kind: str, options: Mapping[str, str]) -> str:
    """Check the values of a kind's options; returns what else identifies the configuration."""
    try:
        if kind == "table":
            table = ThresholdTable.load(options["file"])
            values = table.select(named_point(options.get, ""))
            identity = hashlib.sha256(values.tobytes()).hexdigest()
            named_selection(options.get("selection"))
            return f"{identity} {table.rule} {table.geometry} {table.voters}"
        if kind == "scalar":
            _check_scalar(options)
            return ""
        make_method(Configuration("", kind, tuple(options.items())))
    except (ConfigurationError, FileNotFoundError):
        raise
    except ValueError as error:
        raise ConfigurationError(f"{kind}: {error}") from error
    return ""


def _check_scalar(options: Mapping[str, str]) -> None:
    if options["rule"] not in RULES:
        raise ConfigurationError(f"rule must be one of {', '.join(RULES)}, got {options['rule']!r}")
    if ("threshold" in options) == ("sparsity" in options):
        raise ConfigurationError("scalar needs either threshold or sparsity")
    if math.isnan(float(options.get("threshold", 0))):
        raise ConfigurationError("threshold must be a number, got nan")
    if not 0 <= float(options.get("sparsity", 0)) < 1:
        raise ConfigurationError(f"sparsity must be in [0, 1), got {options['sparsity']}")
    geometry = Geometry.parse(options.get("geometry", str(DEFAULT_GEOMETRY)))
    if options.get("voters", "1") not in map(str, VOTERS):
        raise ConfigurationError(f"voters must be one of {VOTERS}, got {options['voters']}")
    named_selection(options.get("selection"))
    if geometry not in GEOMETRIES:
        raise ConfigurationError(
            f"geometry must be one of {', '.join(map(str, GEOMETRIES))}, got {geometry}"
        )


def _default_name(kind: str, options: Mapping[str, str]) -> str:
    parts = [Path(v).stem if o == "file" else f"{o}={v}" for o, v in options.items()]
    if kind == "table":
        return " ".join(parts)
    return f"{kind}({', '.join(parts)})" if parts else kind
