"""What Flower costs beside the embedded engine: time and bytes of a round, memory of a big update.

    python benchmarks/flower.py rounds           a quickstart on 2 clients, here and over Flower
    python benchmarks/flower.py big              one update of 2.5 GB (needs 10 GB of disk)

Bytes are counted where they pass: all SuperNodes dial a relay in front of the SuperLink. They
should be within 5 % of those that the run counts itself. Memory is that of every process of the
deployment, looked at ten times a second (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sluiceway.deploy.flower.deployment import HERE, Deployment, write_app
from sluiceway.deploy.flower.local_deployment import run_trial
from sluiceway.experiment.progress import described, line
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.run import run
from sluiceway.experiment.session import Progress


@dataclass
class Relay:
    """Passes on all that comes to a port of its own, and counts it.

    Attributes:
        up: bytes from those who dialled.
        down: bytes to them.
    """

    target: int = 0
    up: int = 0
    down: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def front(self, port: int) -> int:
        """Begin to relay to `port`; the relay's own."""
        self.target = port
        listener = socket.create_server((HERE, 0))
        threading.Thread(target=self.listen, args=[listener], daemon=True).start()
        return int(listener.getsockname()[1])

    def listen(self, listener: socket.socket) -> None:
        while True:
            near, _ = listener.accept()
            threading.Thread(target=self.pass_on, args=[near], daemon=True).start()

    def pass_on(self, near: socket.socket) -> None:
        """Both ways of one connection, until either side ends it, however it does."""
        with suppress(OSError), near, socket.create_connection((HERE, self.target)) as far:
            watch = selectors.DefaultSelector()
            watch.register(near, selectors.EVENT_READ, far)
            watch.register(far, selectors.EVENT_READ, near)
            while True:
                for key, _ in watch.select():
                    source = near if key.fileobj is near else far
                    data = source.recv(1 << 18)
                    if not data:
                        return
                    key.data.sendall(data)
                    with self.lock:
                        self.up += len(data) if source is near else 0
                        self.down += len(data) if source is far else 0


class Memory(threading.Thread):
    """Most memory that a deployment's processes took, by program and at once; and their work."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.mark = f"FLWR_HOME={folder}".encode()
        self.going = True
        self.peaks: dict[str, int] = defaultdict(int)
        self.worked: dict[str, float] = {}

    def run(self) -> None:
        names: dict[str, str] = {}
        first: dict[str, float] = {}
        while self.going:
            now: dict[str, int] = defaultdict(int)
            for path in Path("/proc").glob("[0-9]*"):
                try:
                    # What was forked a moment ago is not yet what it will be.
                    seen = first.setdefault(path.name, time.monotonic())
                    if path.name not in names or time.monotonic() - seen < 2:
                        names[path.name] = self.program(path)
                    if names[path.name]:
                        now[names[path.name]] += anonymous(path)
                        self.worked[path.name] = worked(path)
                except OSError:
                    names.pop(path.name, None)
            now["all at once"] = sum(now.values())
            for name, size in now.items():
                self.peaks[name] = max(self.peaks[name], size)
            time.sleep(0.1)

    def program(self, path: Path) -> str:
        """A process's program, "" if it is none of the deployment's."""
        if self.mark not in (path / "environ").read_bytes():
            return ""
        words = (path / "cmdline").read_text().split("\0")
        return next((Path(word).name for word in words if "fl" in Path(word).name), "")


def anonymous(path: Path) -> int:
    """Bytes that a process allocated (Linux)."""
    lines = (path / "status").read_text().splitlines()
    return next((int(text.split()[1]) << 10 for text in lines if text.startswith("RssAnon")), 0)


def worked(path: Path) -> float:
    """Seconds of a processor that a process has taken (Linux)."""
    fields = (path / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def measured(folder: Path) -> Iterator[Memory]:
    """Memory of a deployment whose folder is this."""
    memory = Memory(folder / "flwr")
    memory.start()
    yield memory
    memory.going = False
    memory.join()


def rounds(settings: list[str]) -> None:
    """The same recipe on both engines, and what the relay saw."""
    small = ["data.clients=2", "data.limit=240", "data.test_limit=200", "run.rounds=3"]
    small += ["run.device=cpu", "run.workers=2", *settings]
    told = Progress(say=line, on_round=lambda record: line(described(record)))
    relay = Relay()
    with tempfile.TemporaryDirectory() as name:
        here, embedded = run(load_recipe("quickstart", small), Path(name) / "here", progress=told)
        recipe = load_recipe("quickstart", [*small, "run.engine=flower"])
        there = run_trial(recipe, Path(name) / "there", progress=told, front=relay.front)
        lines = (Path(name) / "there" / "metrics.jsonl").read_text().splitlines()
    taken = [json.loads(text)["seconds"] for text in lines]
    counted = there["bytes_up"] + there["bytes_down"]
    report(
        {
            "the same accuracies": there["accuracy_by_round"] == here.accuracy_by_round,
            "embedded, s a round": statistics.median(r.seconds for r in here.records),
            "Flower, s a round": statistics.median(taken),
            "Flower beyond embedded, s a round": statistics.median(
                b - a.seconds for a, b in zip(here.records, taken, strict=True)
            ),
            "whole run, embedded s": embedded["seconds"],
            "whole run, Flower s": there["seconds"],
            "counted, MB": counted / 1e6,
            "on the socket, MB": (relay.up + relay.down) / 1e6,
            "more on the socket, %": 100 * ((relay.up + relay.down) / counted - 1),
        }
    )


def big(gigabytes: float, piece: int) -> None:
    """One update of many bytes, from a file of the site to a file of the server."""
    size = int(gigabytes * 1e9)
    relay = Relay()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = random_file(folder / "update", size)
        (folder / "out").mkdir()
        config: dict[str, bool | float | int | str] = {
            "piece-mb": piece,
            "out": str(folder / "out"),
        }
        write_app(folder / "app", "flower_big:server", "flower_big:client", config)
        shutil.copy(Path(__file__).with_name("flower_big.py"), folder / "app")
        with Deployment(folder / "flower") as flower, measured(folder / "flower") as memory:
            flower.fleet = f"{HERE}:{relay.front(flower.port)}"
            flower.start_link()
            flower.start_executor()
            flower.register("site")
            flower.start_node("site", {"file": str(path), "room": str(folder / "room")})
            number = flower.run(folder / "app", {})
            done = folder / "out" / "found.json"
            status, looked = ("", ""), time.monotonic()
            while not done.exists() and not status[0].startswith("finished"):
                time.sleep(0.5)
                if time.monotonic() - looked > 30:  # which takes a second of a processor
                    status, looked = flower.status(number), time.monotonic()
            base = (flower.folder / "superlink.sqlite").stat().st_size
        assert done.exists(), status
        found = json.loads(done.read_text())
    assert found["bytes"] == size, found
    rows: dict[str, Any] = {
        "update, GB": size / 1e9,
        "pieces of, MiB": piece,
        "seconds": found["seconds"],
        "seconds of a processor, start and end included": sum(memory.worked.values()),
        "on the socket, GB": (relay.up + relay.down) / 1e9,
        "the SuperLink's database, GB": base / 1e9,
    }
    for program, most in sorted(memory.peaks.items(), key=lambda pair: pair[1]):
        rows[f"memory of {program}, GB"] = most / 1e9
    report(rows)


def random_file(path: Path, size: int) -> Path:
    """A file of random bytes."""
    with path.open("wb") as file:
        for start in range(0, size, 1 << 24):
            file.write(os.urandom(min(1 << 24, size - start)))
    return path


def report(rows: dict[str, Any]) -> None:
    """A table, and how busy the machine is, for times mean nothing without it."""
    rows["load of the machine now"] = os.getloadavg()[0]
    rows["cores"] = os.cpu_count()
    print("| | |\n|---|---:|")
    for name, value in rows.items():
        print(f"| {name} | {value:.2f} |" if isinstance(value, float) else f"| {name} | {value} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["rounds", "big"])
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--piece", type=int, default=256, help="MiB of a file in one message")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    args = parser.parse_args()
    if args.what == "rounds":
        rounds(args.settings)
    else:
        big(args.gigabytes, args.piece)


if __name__ == "__main__":
    main()
