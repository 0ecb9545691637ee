"""Worker processes that may fail: a process that dies or takes too long fails its task, no other.

This pool is our own: pebble 5.2.3 gives up its whole pool when an idle worker is killed
("Unexpected error within the Pool"), and concurrent.futures documents the same.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch

from sluiceway.core.memory import keep_freed_memory
from sluiceway.core.signals import check_stop
from sluiceway.errors import described
from sluiceway.transport.protocol import TaskFailure

T = TypeVar("T")

#: Seconds between looks at whether the run is to stop, or a task took too long.
TICK = 0.1


class RemoteError(Exception):
    """The traceback of an error in a worker process, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass
class WorkerProcess:
    """A worker process, its place in the pool, and the task that it has, by index, since when."""

    process: BaseProcess
    connection: Connection
    place: int
    task: int | None = None
    since: float = 0.0


@dataclass
class Pool(Generic[T]):
    """Processes that each hold `common` and do tasks with it, one at a time.

    Attributes:
        common: given to every task as its first argument; forked processes share its memory with
            this one until they write to it.
        processes: how many, >= 1.
        threads: torch threads of each.
        settle: called first in each process with `common` and the process's place, from 0 and below
            `processes`; a process that replaces another takes its place. A function of a module.
    """

    common: T
    processes: int
    threads: int = 1
    settle: Callable[..., None] | None = None
    workers: list[WorkerProcess] = field(default_factory=list, init=False)

    def map(
        self,
        task: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        timeout: float | None = None,
    ) -> Iterator[Any]:
        """`task(common, *arguments[i])` of each i in order, as they become ready.

        Args:
            task: a function of a module.
            arguments: of each call.
            timeout: seconds that a call may take; its process is then ended.

        Returns:
            Results, or a `TaskFailure` in the place of one. What still runs is ended with the
            iterator.

        Raises:
            Stopped: the run was asked to stop.
        """
        waiting = deque(range(len(arguments)))
        done: dict[int, Any] = {}
        try:
            for index in range(len(arguments)):
                while index not in done:
                    check_stop()
                    self.give(task, arguments, waiting)
                    self.collect(done, timeout)
                yield done.pop(index)
        finally:
            for worker in [worker for worker in self.workers if worker.task is not None]:
                self.end(worker)

    def give(
        self, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], waiting: deque[int]
    ) -> None:
        """Give waiting tasks to idle processes, starting those that are not there."""
        for worker in [s for s in self.workers if s.task is None and not s.process.is_alive()]:
            self.end(worker)
        while len(self.workers) < min(self.processes, len(self.workers) + len(waiting)):
            self.workers.append(self.started())
        for worker in self.workers:
            if worker.task is None and waiting:
                worker.task, worker.since = waiting.popleft(), time.monotonic()
                with contextlib.suppress(OSError):  # it has just died, which `collect` will see
                    worker.connection.send_bytes(pickle.dumps((task, arguments[worker.task])))

    def collect(self, done: dict[int, Any], timeout: float | None) -> None:
        """Wait a moment for results; note those that came, and tasks that failed."""
        busy = [worker for worker in self.workers if worker.task is not None]
        ready = wait([s.connection for s in busy] + [s.process.sentinel for s in busy], TICK)
        for worker in busy:
            task = worker.task
            assert task is not None
            if worker.connection in ready or worker.process.sentinel in ready:
                done[task] = self.result(worker)
            elif timeout and time.monotonic() - worker.since > timeout:
                done[task] = TaskFailure(f"no update within {timeout:g} s")
                self.end(worker)

    def result(self, worker: WorkerProcess) -> Any:
        """What this worker's process gave, which is then idle; a `TaskFailure` if it has died."""
        try:
            if worker.connection.poll():
                found = pickle.loads(worker.connection.recv_bytes())
                worker.task = None
                if isinstance(found, TaskFailure) and found.error is not None:
                    found.error.__cause__ = RemoteError(found.trace)  # pickle leaves it out
                return found
        except (EOFError, OSError):
            pass
        self.end(worker)
        code = worker.process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with code {code}"
        return TaskFailure(f"its process ended {how}")

    def end(self, worker: WorkerProcess) -> None:
        """End a process, whatever it does; another is started when there is a task."""
        self.workers.remove(worker)
        if worker.process.exitcode is None:
            worker.process.join(0.05)  # a dying process gets time to set its exit code
        worker.process.kill()
        worker.process.join()
        worker.connection.close()

    def started(self) -> WorkerProcess:
        """A new process, ready for tasks."""
        method = start_method()
        context = multiprocessing.get_context(method)
        # As bytes: what is sent to a new process otherwise shares its tensors with this one.
        common = self.common if method == "fork" else Packed(pickle.dumps(self.common))
        mine, its = context.Pipe()
        others = [worker.connection for worker in self.workers]
        place = min(set(range(self.processes)) - {worker.place for worker in self.workers})
        settle = None if self.settle is None else partial(self.settle, place=place)
        process = context.Process(  # type: ignore[attr-defined]
            target=work, args=(its, common, self.threads, os.getpid(), [mine, *others], settle)
        )
        process.daemon = True
        process.start()
        its.close()
        return WorkerProcess(process, mine, place)

    def close(self) -> None:
        """End all processes."""
        for worker in list(self.workers):
            self.end(worker)


@dataclass(frozen=True)
class Packed:
    """A pickled object."""

    content: bytes


def start_method() -> str:
    """How processes begin: forked, which shares memory, where that is safe.

    With CUDA visible a backward pass starts threads of autograd that a fork does not have, and
    every task would fail; processes then begin anew and are sent what they need.
    """
    forks = "fork" in multiprocessing.get_all_start_methods()
    return "fork" if forks and not torch.cuda.is_available() else "spawn"


def work(
    connection: Connection,
    common: Any,
    threads: int,
    parent: int,
    others: Sequence[Connection],
    settle: Callable[[Any], None] | None,
) -> None:
    """What a worker process does until it is ended."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent ends the run, once, for all
        signal.signal(number, signal.SIG_IGN)
    for other in others:
        other.close()
    if isinstance(common, Packed):
        common = pickle.loads(common.content)
    torch.set_num_threads(threads)
    keep_freed_memory()
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()
    if settle is not None:
        settle(common)
    while True:
        try:
            task, arguments = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        try:
            found = task(common, *arguments)
        except Exception as error:
            found = failure_of(error)
        connection.send_bytes(pickle.dumps(found))


def failure_of(error: Exception) -> TaskFailure:
    """What a worker says of an error."""
    trace = traceback.format_exc()
    said = TaskFailure(described(error), error, trace)
    try:
        pickle.loads(pickle.dumps(said))
    except Exception:
        return TaskFailure(said.why, RemoteError(trace), trace)
    return said


def leave_with(parent: int) -> None:
    """End this process soon after its parent has gone, however that went."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
