# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsfa_calib.reasons import Reason
from bsfa_kernel import GEOMETRIES, Geometry
from bsfa_kernel.geometry import count_full
from bsfa_vllm.planning import Row, reason_of, split

SQUARE, WIDE = Geometry(64, 64), Geometry(128, 64)


@pytest.mark.parametrize(
    ("row", "geometry", "reason"),
    [
        (Row(1, 9000), WIDE, Reason.DECODE),
        (Row(4, 9000, False), WIDE, Reason.DECODE),
        (Row(4, 9000, True), WIDE, Reason.PART_OF_BLOCK),
        (Row(4, 9000), WIDE, Reason.PART_OF_BLOCK),
        (Row(1, 9000, True), WIDE, Reason.PART_OF_BLOCK),
        (Row(100, 9000), WIDE, Reason.PART_OF_BLOCK),
        (Row(100, 9000), SQUARE, None),
        (Row(1, 1), SQUARE, Reason.TOO_SHORT),
        (Row(64, 64), SQUARE, Reason.TOO_SHORT),
        (Row(65, 65), SQUARE, None),
        (Row(128, 128), WIDE, Reason.TOO_SHORT),
        (Row(129, 129), WIDE, None),
        (Row(128, 192), WIDE, None),
    ],
)
def test_reasons(row: Row, geometry: Geometry, reason: Reason | None) -> None:
    assert reason_of(row, geometry) is reason


rows = st.builds(
    lambda queries, before, prefilling: Row(queries, queries + before, prefilling),
    st.sampled_from([0, 1, 2, 63, 64, 100, 128, 129, 500]),
    st.sampled_from([0, 1, 64, 100, 700, 20000]),
    st.sampled_from([None, False, True]),
)


@given(st.lists(rows, max_size=12), st.sampled_from(GEOMETRIES), st.sampled_from([0, 600, 1 << 30]))
def test_every_query_is_in_one_part(batch: list[Row], geometry: Geometry, two_steps: int) -> None:
    plan = split(batch, geometry, lambda keys: "int8" if keys >= two_steps else "exact")
    token = 0
    for part in plan.parts:
        inside = [row for row in batch[part.rows] if row.queries]
        assert part.lengths == [(row.queries, row.keys) for row in inside]
        assert part.tokens == slice(token, token + sum(row.queries for row in inside))
        assert part.max_keys == max(row.keys for row in batch[part.rows])
        token = part.tokens.stop
        sparse = [row.real and reason_of(row, geometry) is None for row in inside]
        assert set(sparse) == {part.selection is not None}
        if part.selection == "int8":
            assert len(inside) == 1
            assert inside[0].keys >= two_steps
        for row in inside:
            assert part.selection is None or count_full(row.queries, row.keys, geometry) > 0
    assert token == sum(row.queries for row in batch)
    real = [row for row in batch if row.real]
    reasons = Counter(reason_of(row, geometry) for row in real)
    assert plan.sparse == reasons.pop(None, 0)
    assert plan.dense == reasons
    for before, after in zip(plan.parts, plan.parts[1:], strict=False):
        assert before.selection != after.selection or before.selection == "int8"


def test_rows_of_dummy_steps_run_dense_uncounted() -> None:
    dummy = Row(300, 300, False)
    assert not dummy.real
    assert Row(300, 300, True).real
    assert Row(300, 300).real
    plan = split([dummy, Row(300, 300, True)], WIDE, lambda _: "exact")
    assert [part.selection for part in plan.parts] == [None, "exact"]
    assert plan.sparse == 1
    assert not plan.dense


def test_nothing_to_do() -> None:
    assert split([Row(0, 0), Row(0, 5)], SQUARE, lambda _: "exact").parts == []
