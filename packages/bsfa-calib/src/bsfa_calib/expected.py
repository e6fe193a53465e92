# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What thresholds do to a model: the share of blocks that they skip, and what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bsfa_calib.dense import named
from bsfa_calib.hook import BlockSparse, HookError, Meter, applied, attention_shape
from bsfa_calib.language_model import LanguageModel, Predictions
from bsfa_calib.report import speed_limit
from bsfa_calib.thresholds import ThresholdTable
from bsfa_kernel import Geometry

# A divergence that hardly shows, and the least share that attention is faster for.
_CHEAP_KL, _WORTH = 0.03, 0.3


@dataclasses.dataclass(frozen=True)
class Expected:
    """What thresholds do on samples that they were not made from.

    Attributes:
        sparsity: mean share of the blocks skipped, in the layers that can skip any.
        kl: mean KL divergence from dense, in nats.
        nll: mean change of the negative log-likelihood of the next token, in nats.
    """

    sparsity: float
    kl: float
    nll: float


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A table and what to expect of each of its points."""

    table: ThresholdTable
    expected: tuple[Expected, ...]


class Measure:
    """Runs a model under thresholds on samples, and compares its predictions with dense ones.

    Attributes:
        device: the model's.
        dense_layers: layers that run dense whatever the thresholds, and why.
    """

    def __init__(
        self,
        model: Any,
        samples: Sequence[Sequence[int]],
        *,
        rule: str,
        geometry: Geometry,
        voters: int = 1,
        backend: str = "auto",
    ) -> None:
        """Read the samples dense.

        Args:
            model: a decoder of transformers, in the dtype that it is to be used in.
            samples: tokens of each.
            rule: one of ``bsfa_kernel.RULES``.
            geometry: the sparsity block.
            voters: one query row in 1, 2 or 4 votes.
            backend: one of ``bsfa_calib.hook.BACKENDS``.

        Raises:
            HookError: no layer of the model can skip a block.
            ValueError: there are no samples.
        """
        if not samples:
            raise ValueError("at least one sample is needed to measure on")
        self._language_model = LanguageModel(model)
        self.device = self._language_model.device
        self._samples, self._rule = samples, rule
        self._geometry, self._voters, self._backend = geometry, voters, backend
        with applied(model, None) as meter:
            self._dense = [self._language_model.predict(ids) for ids in samples]
        self.dense_layers = check_layers(meter, model)
        self._nll = [
            self._compare(d, d, ids)[1] for d, ids in zip(self._dense, samples, strict=True)
        ]

    def __call__(self, thresholds: npt.NDArray[np.float32]) -> Expected:
        """What thresholds float32 [layers, heads, rows] do, as the mean over the samples."""
        model = self._language_model
        values = torch.tensor(thresholds, device=self.device)
        method = BlockSparse(values, self._rule, self._geometry, self._backend, self._voters)
        rows = []
        for ids, dense, nll in zip(self._samples, self._dense, self._nll, strict=True):
            with applied(model.model, method) as meter:
                found = model.predict(ids)
                skipped = float(np.mean(meter.take()))
            kl, own = self._compare(found, dense, ids)
            rows.append((skipped, kl, own - nll))
        return Expected(*(float(x) for x in np.mean(rows, axis=0)))

    def _compare(
        self, found: Predictions, dense: Predictions, ids: Sequence[int]
    ) -> tuple[float, float]:
        """Mean KL divergence from dense and negative log-likelihood."""
        bands = self._language_model.compare(found, dense, ids)
        count = sum(band.positions for band in bands)
        kl = sum(band.kl * band.positions for band in bands) / count
        return kl, sum(band.nll * band.positions for band in bands) / count


def check_layers(meter: Meter, model: Any) -> dict[int, str]:
    """The layers that skip nothing, and why, after a look whether some other is left.

    Raises:
        HookError: none is.
    """
    layers, _ = attention_shape(model)
    dense = meter.skip_nothing(layers)
    if len(dense) >= layers:
        raise HookError(f"no layer of this model can be calibrated, all run dense: {named(dense)}")
    return dense


def with_expected(
    table: ThresholdTable, expected: Sequence[Expected], dense_layers: dict[int, str]
) -> Calibrated:
    """Write what was measured into a table; layers that run dense get thresholds of −inf."""
    provenance = dict(table.provenance)
    for name in ("sparsity", "kl", "nll"):
        values = [getattr(one, name) for one in expected]
        provenance[f"expected_{name}"] = ", ".join(f"{value:.6g}" for value in values)
    thresholds = table.thresholds.copy()
    if dense_layers:
        provenance["dense_layers"] = named(dense_layers)
        thresholds[:, sorted(dense_layers)] = -np.inf
    changed = dataclasses.replace(table, thresholds=thresholds, provenance=provenance)
    return Calibrated(changed, tuple(expected))


def report(found: Calibrated) -> str:
    """What each point does, one line a point under a heading."""
    axis = found.table.axis
    lines = [f"{axis:>15}  {'sparsity':>8}  {'KL, nats':>9}  change of NLL"]
    for point, one in zip(found.table.points, found.expected, strict=True):
        lines.append(f"{point:15g}  {one.sparsity:8.3f}  {one.kl:9.5f}  {one.nll:+.5f}")
    return "\n".join(lines)


def verdict(found: Calibrated) -> list[str]:
    """What the points mean, in sentences; says so where nothing is gained."""
    dense = found.table.provenance.get("dense_layers")
    sentences = []
    if dense:
        count = int(np.isneginf(found.table.thresholds).all(axis=(0, 2, 3)).sum())
        share = 1 - count / found.table.layers
        sentences.append(
            f"{count} of {found.table.layers} layers run dense ({dense}). Sparsities are those of "
            f"the other layers; of the whole model, multiply them by {share:.2f}."
        )
    cheap = [one.sparsity for one in found.expected if one.kl <= _CHEAP_KL]
    if not cheap:
        least = min(found.expected, key=lambda one: one.kl)
        sentences.append(
            f"Nothing to gain: even {least.sparsity:.0%} of the blocks cost a KL divergence of "
            f"{least.kl:.3g} nats. Leave this model dense at this length, or ask for less."
        )
        return sentences
    most = max(cheap)
    if most < _WORTH:
        sentences.append(
            f"Little to gain: within a KL divergence of {_CHEAP_KL:g} nats {most:.0%} of the "
            "blocks can be skipped, and below about 30% attention is hardly faster. Prompts may be "
            "too short."
        )
        return sentences
    sentences.append(
        f"Up to {most:.0%} of the blocks can be skipped within a KL divergence of {_CHEAP_KL:g} "
        f"nats; the limit of attention's speed-up is then {speed_limit(most, found.table.voters)}."
    )
    return sentences
