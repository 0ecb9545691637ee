"""Batches of unequal clients span the round."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sluiceway.split.schedules import spread


def test_by_hand() -> None:
    assert list(spread([4, 2, 0, 1])) == [[0], [0, 1], [0], [0, 1, 3]]
    assert list(spread([])) == list(spread([0, 0])) == []


@given(st.lists(st.integers(0, 30), max_size=8))
def test_every_batch_once_and_evenly(counts: list[int]) -> None:
    steps = list(spread(counts))
    assert len(steps) == max(counts, default=0)
    for i, count in enumerate(counts):
        taken = [i in step for step in steps]
        assert sum(taken) == count
        if not steps:
            continue
        for half in (taken[: len(taken) // 2], taken[len(taken) // 2 :]):
            assert abs(sum(half) - count * len(half) / len(steps)) <= 1
