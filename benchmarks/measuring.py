"""Shared by the benchmarks of deployments: memory and CPU time of processes, and a table."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from sluiceway.deploy.processes import Processes, marked


@contextmanager
def repeated(look: Callable[[], None], every: float) -> Iterator[None]:
    """Call `look` every so many seconds while the block runs."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(every):
            look()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass
class Memory:
    """Peak memory and CPU time of a deployment's processes, what they started included.

    Attributes:
        deployment: the processes.
        peaks: most bytes that one process of each name allocated, and all of them at once.
        seconds: of a processor, by process id.
    """

    deployment: Processes
    peaks: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[int, float] = field(default_factory=dict)

    def look(self) -> None:
        """Note the present state."""
        total = 0
        for name in list(self.deployment.running):
            for number in marked(self.deployment.mark_of(name)):
                with suppress(psutil.Error):
                    found = psutil.Process(number)
                    memory, times = found.memory_info(), found.cpu_times()
                    private = memory.rss - getattr(memory, "shared", 0)
                    self.peaks[name] = max(self.peaks[name], private)
                    self.seconds[number] = times.user + times.system
                    total += private
        self.peaks["all at once"] = max(self.peaks["all at once"], total)


def report(rows: Mapping[str, Any]) -> None:
    """A table, and how busy the machine is, without which times mean nothing."""
    print("| | |\n|---|---:|")
    busy = {"load of the machine now": os.getloadavg()[0], "cores": os.cpu_count()}
    for name, value in {**rows, **busy}.items():
        print(f"| {name} | {value:.2f} |" if isinstance(value, float) else f"| {name} | {value} |")
