"""Worker processes that die, hang or raise lose their own task and no other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sluiceway.transport import worker_pool
from sluiceway.transport.worker_pool import Pool, TaskFailure


@pytest.fixture
def pool() -> Iterator[Pool[int]]:
    made = Pool(100, 2)
    yield made
    made.close()


def add(common: int, value: int, pause: float = 0) -> int:
    time.sleep(pause)
    return common + value


def fail(common: int, value: int) -> int:
    if value == 1:
        raise ValueError("no\nmore")
    if value == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if value == 3:
        os._exit(7)
    if value == 4:
        time.sleep(600)
    return common + value


class Unpicklable(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def raise_unpicklable(common: int) -> int:
    raise Unpicklable("odd", "one")


def mark(common: dict[str, int], place: int) -> None:
    common["place"] = place


def place_of(common: dict[str, int], end: bool) -> int:
    if end:
        os._exit(1)
    time.sleep(0.2)
    return common["place"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_each_process_has_a_place_which_its_successor_takes(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "start_method", lambda: method)
    pool = Pool(dict[str, int](), 3, settle=mark)
    try:
        assert set(pool.map(place_of, [(False,)] * 9)) == {0, 1, 2}
        assert isinstance(next(pool.map(place_of, [(True,)])), TaskFailure)
        assert set(pool.map(place_of, [(False,)] * 9)) == {0, 1, 2}
    finally:
        pool.close()


def test_results_come_in_order_whoever_is_first(pool: Pool[int]) -> None:
    jobs = [(0, 0.3), (1, 0.0), (2, 0.1), (3, 0.0), (4, 0.0)]
    assert list(pool.map(add, jobs)) == [100, 101, 102, 103, 104]
    assert list(pool.map(add, [])) == []


def test_a_failed_task_fails_no_other(pool: Pool[int]) -> None:
    found: list[Any] = list(pool.map(fail, [(n,) for n in range(8)], timeout=2))
    assert found[0] == 100
    assert found[5:] == [105, 106, 107]
    assert all(isinstance(failed, TaskFailure) for failed in found[1:5])
    assert [failed.why for failed in found[1:5]] == [
        "ValueError: no",
        "its process ended by signal 9",
        "its process ended with code 7",
        "no update within 2 s",
    ]
    assert isinstance(found[1].error, ValueError)
    assert "raise ValueError" in str(found[1].error.__cause__)
    assert list(pool.map(add, [(1,), (2,), (3,)])) == [101, 102, 103]


def test_an_error_that_cannot_be_sent_is_told(pool: Pool[int]) -> None:
    (failed,) = pool.map(raise_unpicklable, [()])
    assert failed.why == "Unpicklable: odd"
    assert "raise Unpicklable" in str(failed.error)


def test_leaving_early_ends_what_runs(pool: Pool[int]) -> None:
    began = time.monotonic()
    for found in pool.map(add, [(0, 0.0), (1, 600.0), (2, 600.0)]):
        assert found == 100
        break
    pool.close()
    assert time.monotonic() - began < 60
    assert not pool.workers


def test_a_worker_killed_between_tasks_is_replaced(pool: Pool[int]) -> None:
    list(pool.map(add, [(1,), (2,)]))
    for worker in pool.workers:
        assert worker.process.pid is not None
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.join()
    assert list(pool.map(add, [(1,), (2,)])) == [101, 102]


def threads(common: int) -> int:
    return torch.get_num_threads()


def test_workers_have_their_threads() -> None:
    pool = Pool(0, 2, threads=3)
    assert list(pool.map(threads, [(), ()])) == [3, 3]
    pool.close()
