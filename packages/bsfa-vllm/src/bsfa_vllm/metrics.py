# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Statistics for Prometheus, on the page of metrics that vLLM's server shows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from bsfa_vllm.counting import SPARSE, Report, reports

logger = logging.getLogger("vllm.bsfa")
_registered = False


class Collector:
    """Reads what the engines have written whenever metrics are asked for."""

    def describe(self) -> Iterable[Any]:
        """Nothing: names are not looked at before there is an engine."""
        return []

    def collect(self) -> Iterator[Any]:
        """The families of metrics."""
        try:
            found = reports()
        except Exception:
            # The page has vLLM's own metrics too.
            logger.exception("BSFA: statistics cannot be read")
            found = []
        return families(found)


def families(found: Iterable[Report]) -> Iterator[Any]:
    """Metrics of reports; each is labelled with vLLM's name of its engine."""
    from prometheus_client.core import CounterMetricFamily

    kept = CounterMetricFamily(
        "bsfa_kept_blocks", "Key blocks that block-sparse calls kept.", labels=["engine"]
    )
    visible = CounterMetricFamily(
        "bsfa_visible_blocks", "Key blocks that they could have kept.", labels=["engine"]
    )
    calls = CounterMetricFamily(
        "bsfa_calls",
        "Requests in one layer of one step, by how blocks were chosen or why attention was dense.",
        labels=["engine", "path", "reason"],
    )
    for report in found:
        kept.add_metric([report.engine], sum(report.kept_blocks))
        visible.add_metric([report.engine], sum(report.visible_blocks))
        for how in SPARSE:
            calls.add_metric([report.engine, "sparse", how], report.sparse_calls.get(how, 0))
        for reason, number in report.dense_calls.items():
            calls.add_metric([report.engine, "dense", reason], number)
    yield from (kept, visible, calls)


def register() -> None:
    """Add the metrics to those of this process, once; without prometheus_client do nothing."""
    global _registered
    if _registered:
        return
    try:
        from prometheus_client import REGISTRY
    except ImportError:
        return
    REGISTRY.register(Collector())
    _registered = True
