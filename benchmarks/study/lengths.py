# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The ways to leave out blocks that ``long.py`` compares at a length, and their thresholds."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bsfa_calib import capture, scalar, serving
from bsfa_calib.hook import BlockSparse, Method, attention_shape
from bsfa_calib.language_model import fingerprint
from bsfa_calib.thresholds import ThresholdTable
from bsfa_kernel import Geometry
from bsfa_kernel.geometry import forced_share
from harness import progress
from study.rivals import Antidiagonal, Sparge, Window

CONTROL = "dense, by our kernel"
FINE, COARSE = Geometry(64, 64), Geometry(128, 64)

Thresholds = npt.NDArray[np.float32]


def shares_at(length: int, factors: Sequence[float]) -> tuple[float, ...]:
    """Shares to skip, around where the extended SmolLM2 loses 0.01 nats at a length.

    There it keeps about 0.28 of the blocks at 4K, and two thirds of that at twice the length. What
    is forced is always kept.

    Args:
        length: tokens.
        factors: what is kept, in units of that.
    """
    kept = 0.28 * 0.67 ** np.log2(length / 4096)
    most = 0.97 * (1 - forced_share(length, length, COARSE))
    found = {round(float(1 - kept * factor), 4) for factor in factors}
    return tuple(sorted(share for share in found if 0.02 < share < most))


@dataclass(frozen=True)
class Candidate:
    """A way to leave out blocks, at several points.

    Attributes:
        name: what records call it.
        axis: what a point is: ``share`` to skip, ``k`` blocks, ``window`` in tokens, ``topk`` or
            ``weight``.
        points: in the order in which they are measured.
        method: what runs a point; it is given the thresholds of ``prepare``.
        about: rule, geometry, voters and selection, as far as there are any, for records.
        prepare: of points, thresholds [layers, heads, rows]; None where there are none.
        table: the thresholds that it starts from; None where it makes its own.
    """

    name: str
    axis: str
    points: tuple[float, ...]
    method: Callable[[float, Any], Method]
    about: dict[str, Any]
    prepare: Callable[[Sequence[float]], dict[float, Thresholds]] | None = None
    table: ThresholdTable | None = None


@dataclass
class Candidates:
    """Makes the candidates for a model at a length, and their thresholds when they are needed.

    Attributes:
        model: a decoder of transformers, in the dtype that it is used in.
        samples: tokens of the windows to calibrate on, of the length.
        selection: from what scores blocks are chosen; "auto" goes by the share to be skipped.
        voters: numbers of which one row votes, for scalars.
        tables: thresholds made before; those of them that were learned. No two of one name.
        shares: to skip, instead of ``shares_at``.
        folder: where thresholds are kept for a later run; None for nowhere.
    """

    model: Any
    samples: Sequence[Sequence[int]]
    selection: str = "auto"
    voters: Sequence[int] = (1, 2, 4)
    tables: Sequence[ThresholdTable] = ()
    shares: Sequence[float] = ()
    folder: Path | None = None
    _made: dict[tuple[str, float], Thresholds] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse tables that records could not tell apart.

        Raises:
            ValueError: two tables differ in nothing that is in a candidate's name.
        """
        names = Counter(map(_name_of, self.tables))
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(
                "tables must differ in rule, length, blocks or voters, got two of "
                f"'{twice[0]}': measure them with an --out each"
            )

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.samples[0])

    def all(self) -> list[Candidate]:
        """What is compared; what matters most comes first."""
        fine = tuple(self.shares) or shares_at(self.length, (2, 1.2, 0.75, 0.45))
        coarse = tuple(self.shares) or shares_at(self.length, (2.5, 1.5, 1, 0.65))
        # The thresholds that serve every length before those of this one; all rows before few.
        tables = sorted(self.tables, key=lambda table: (table.max_seqlen, table.voters))
        return [
            self._control(),
            *(self._table(table, fine) for table in tables),
            *(self._scalar("peak_lse", COARSE, voters, fine) for voters in self.voters),
            self._scalar("running_max", COARSE, 1, coarse),
            self._paper(),
            *self._rivals(),
        ]

    def method(self, candidate: Candidate, point: float) -> Method:
        """What runs a candidate at a point; thresholds are made for all its points at once."""
        if candidate.prepare is None:
            return candidate.method(point, None)
        if (candidate.name, point) not in self._made:
            for at, values in self._kept(candidate).items():
                self._made[candidate.name, at] = values
        values = self._made[candidate.name, point]
        device = next(self.model.parameters()).device
        return candidate.method(point, torch.tensor(values, dtype=torch.float32, device=device))

    def _kept(self, candidate: Candidate) -> dict[float, Thresholds]:
        """Thresholds of a candidate's points, from the folder if a run before left them there."""
        assert candidate.prepare is not None
        path = None
        if self.folder is not None:
            key = json.dumps([self.origin(candidate), candidate.axis, candidate.points])
            path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
            if path.exists():
                with np.load(path) as kept:
                    return dict(zip(map(float, kept["points"]), kept["thresholds"], strict=True))
        made = candidate.prepare(candidate.points)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, points=list(made), thresholds=np.stack(list(made.values())))
            partial.rename(path)
        return made

    def origin(self, candidate: Candidate | None) -> str:
        """A digest of all that a candidate's figures come from but windows and point.

        That is the model, how the candidate computes and, where it has thresholds, the table and
        the samples that they are made from; of dense (None) the model alone.
        """
        digest = hashlib.sha256(self._fingerprint.encode())
        if candidate is not None:
            digest.update(json.dumps([candidate.name, candidate.about]).encode())
            if candidate.prepare is not None:
                digest.update(json.dumps([list(ids) for ids in self.samples]).encode())
            if candidate.table is not None:
                digest.update(np.ascontiguousarray(candidate.table.thresholds).tobytes())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.model)

    def _control(self) -> Candidate:
        """Dense by our kernel: what it differs from torch's by is rounding."""
        nothing = np.full((*attention_shape(self.model), 1), -np.inf, np.float32)
        about = {"rule": "peak_lse", "geometry": str(COARSE), "voters": 1, "selection": "exact"}
        return Candidate(
            *(CONTROL, "share", (0.0,)),
            lambda _, values: BlockSparse(values, "peak_lse", COARSE),
            about,
            lambda points: dict.fromkeys(points, nothing),
        )

    def _sparse(
        self,
        name: str,
        points: Iterable[float],
        how: tuple[str, Geometry, int],
        prepare: Callable[[Sequence[float]], dict[float, Thresholds]],
        *,
        axis: str = "share",
        expected: Callable[[float], float] = float,
        table: ThresholdTable | None = None,
    ) -> Candidate:
        """Thresholds under a rule; ``expected`` is the share that a point skips."""
        rule, geometry, voters = how
        selection = self.selection

        def method(point: float, values: Any) -> Method:
            share = expected(point) if selection == "auto" else None
            options: dict[str, Any] = {"selection": selection, "expected_skipped": share}
            return BlockSparse(values, rule, geometry, voters=voters, **options)

        about = {"rule": rule, "geometry": str(geometry), "voters": voters, "selection": selection}
        return Candidate(name, axis, tuple(points), method, about, prepare, table)

    def _table(self, table: ThresholdTable, points: Sequence[float]) -> Candidate:
        """Thresholds made before, wherever, pointed at the shares by the samples."""
        geometry = Geometry(table.q_block, table.k_block)

        def prepare(shares: Sequence[float]) -> dict[float, Thresholds]:
            made = serving.find_points(
                self.model, table, self.samples, target_sparsities=shares, progress=progress
            )
            return dict(zip(made.table.points, made.table.thresholds, strict=True))

        how = (table.rule, geometry, table.voters)
        return self._sparse(_name_of(table), points, how, prepare, table=table)

    def _scalar(
        self, rule: str, geometry: Geometry, voters: int, points: Sequence[float]
    ) -> Candidate:
        """One threshold for the whole model, from one dense pass over the samples."""

        def prepare(shares: Sequence[float]) -> dict[float, Thresholds]:
            options: dict[str, Any] = {"rule": rule, "geometry": geometry, "voters": voters}
            table = scalar.one_pass(self.model, self.samples, target_sparsities=shares, **options)
            return dict(zip(table.points, table.thresholds, strict=True))

        name = f"{rule}, one scalar, {geometry}{_voters(voters)}"
        return self._sparse(name, points, (rule, geometry, voters), prepare)

    def _paper(self) -> Candidate:
        """The paper's table: k blocks of each query block, the mean over the samples."""
        blocks = self.length // COARSE.k_block
        points = sorted({max(round(blocks * share), 1) for share in (0.05, 0.1, 0.2, 0.4)})

        def prepare(wanted: Sequence[float]) -> dict[float, Thresholds]:
            table = capture.calibrate(
                self.model,
                self.samples,
                k_values=[int(k) for k in wanted],
                geometry=COARSE,
                aggregate="mean",
                keep_maxima=int(max(wanted)) + 1,
            )
            return dict(zip(map(float, table.points), table.thresholds, strict=True))

        def expected(k: float) -> float:
            visible = 2 * np.arange(1, self.length // COARSE.q_block + 1)
            return float(1 - np.minimum(visible, k + 2).sum() / visible.sum())

        name = f"absolute, k blocks, {COARSE}"
        how = ("absolute", COARSE, 1)
        return self._sparse(name, map(float, points), how, prepare, axis="k", expected=expected)

    def _rivals(self) -> list[Candidate]:
        blocks = self.length // FINE.k_block
        found = [
            Candidate(
                "sliding window and sink",
                "window",
                tuple(64.0 * max(blocks // part, 1) for part in (16, 8, 4)),
                lambda window, _: Window(int(window)),
                {"geometry": str(FINE)},
            ),
            Candidate(
                "antidiagonal sums (XAttention)",
                "weight",
                (0.95, 0.9, 0.8, 0.6),
                lambda share, _: Antidiagonal(share),
                {"geometry": "128x128"},
            ),
        ]
        try:
            Sparge.find(self.model, 0.5)
        except ImportError as error:
            progress(f"SpargeAttention is left out: {error}")
        else:
            points = (0.5, 0.35, 0.2, 0.1)
            found.append(
                Candidate(
                    *("SpargeAttention", "topk", points),
                    lambda topk, _: Sparge.find(self.model, topk),
                    {"geometry": str(COARSE)},
                )
            )
        return found


def _name_of(table: ThresholdTable) -> str:
    """What records call the candidate of a table."""
    at = f"{table.max_seqlen / 1024:g}K"
    geometry = Geometry(table.q_block, table.k_block)
    return f"{table.rule}, learned at {at}, {geometry}{_voters(table.voters)}"


def _voters(voters: int) -> str:
    return "" if voters == 1 else f", 1 in {voters}"
