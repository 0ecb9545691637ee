"""The cost of Flower beside the local engine: time and bytes of a round, memory of a big update.

    python benchmarks/flower.py rounds           a quickstart on 2 clients, here and over Flower
    python benchmarks/flower.py big              one update of 2.5 GB (needs 10 GB of disk)

Bytes are counted where they pass: all SuperNodes connect to a relay in front of the SuperLink. They
should be within 5 % of those that the run counts itself.
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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import Memory, repeated, report
from sluiceway.deploy.flower.deployment import Deployment, write_app
from sluiceway.deploy.flower.local_deployment import run_locally
from sluiceway.deploy.processes import LOOPBACK
from sluiceway.experiment.progress import described, line
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.run import run
from sluiceway.experiment.session import Progress


@dataclass
class Relay:
    """Passes on all that comes to a port of its own, and counts it.

    Attributes:
        total: bytes, both ways.
    """

    target: int = 0
    total: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def front(self, port: int) -> int:
        """Begin to relay to `port`; the relay's own."""
        self.target = port
        listener = socket.create_server((LOOPBACK, 0))
        threading.Thread(target=self.listen, args=[listener], daemon=True).start()
        return int(listener.getsockname()[1])

    def listen(self, listener: socket.socket) -> None:
        while True:
            near, _ = listener.accept()
            threading.Thread(target=self.pass_on, args=[near], daemon=True).start()

    def pass_on(self, near: socket.socket) -> None:
        """Both ways of one connection, until either side ends it."""
        with suppress(OSError), near, socket.create_connection((LOOPBACK, self.target)) as far:
            watch = selectors.DefaultSelector()
            watch.register(near, selectors.EVENT_READ, far)
            watch.register(far, selectors.EVENT_READ, near)
            while True:
                for key, _ in watch.select():
                    data = (near if key.fileobj is near else far).recv(1 << 18)
                    if not data:
                        return
                    key.data.sendall(data)
                    with self.lock:
                        self.total += len(data)


def rounds(settings: list[str]) -> None:
    """The same recipe on both engines, and the bytes at the relay."""
    small = ["data.clients=2", "data.limit=240", "data.test_limit=200", "run.rounds=3"]
    small += ["run.device=cpu", "run.workers=2", *settings]
    progress = Progress(say=line, on_round=lambda record: line(described(record)))
    relay = Relay()
    with tempfile.TemporaryDirectory() as name:
        here, local = run(load_recipe("quickstart", small), Path(name) / "here", progress=progress)
        recipe = load_recipe("quickstart", [*small, "run.engine=flower"])
        there = run_locally(recipe, Path(name) / "there", progress=progress, relay=relay.front)
        lines = (Path(name) / "there" / "metrics.jsonl").read_text().splitlines()
    taken = [json.loads(text)["seconds"] for text in lines]
    counted = there["bytes_up"] + there["bytes_down"]
    report(
        {
            "the same accuracies": there["accuracy_by_round"] == here.accuracy_by_round,
            "local, s a round": statistics.median(r.seconds for r in here.records),
            "Flower, s a round": statistics.median(taken),
            "whole run, local, s": local["seconds"],
            "whole run, Flower, s": there["seconds"],
            "counted, MB": counted / 1e6,
            "on the socket, MB": relay.total / 1e6,
            "more on the socket, %": 100 * (relay.total / counted - 1),
        }
    )


def big(gigabytes: float, chunk: int) -> None:
    """One update of many bytes, from a file of the site to a file of the server."""
    size = int(gigabytes * 1e9)
    relay = Relay()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "update"
        with path.open("wb") as file:
            for start in range(0, size, 1 << 24):
                file.write(os.urandom(min(1 << 24, size - start)))
        done = folder / "found.json"
        write_app(
            folder / "app",
            "flower_big:server",
            "flower_big:client",
            {"piece-mb": chunk, "out": str(folder)},
        )
        shutil.copy(Path(__file__).with_name("flower_big.py"), folder / "app")
        with Deployment(folder=folder / "flower") as flower:
            memory = Memory(flower)
            flower.fleet = f"{LOOPBACK}:{relay.front(flower.port)}"
            flower.start_link()
            flower.start_executor()
            flower.register("site")
            flower.start_node("site", {"file": str(path), "room": str(folder / "room")})
            number = flower.run(folder / "app", {})
            with repeated(memory.look, 0.1):
                while not done.exists() and not flower.status(number)[0].startswith("finished"):
                    time.sleep(10)  # asking takes a second of a processor
            base = (flower.folder / "superlink.sqlite").stat().st_size
        found = json.loads(done.read_text())
    assert found["bytes"] == size, found
    rows: dict[str, Any] = {
        "update, GB": size / 1e9,
        "chunks of, MiB": chunk,
        "seconds": found["seconds"],
        "seconds of a processor": sum(memory.seconds.values()),
        "on the socket, GB": relay.total / 1e9,
        "the SuperLink's database, GB": base / 1e9,
    }
    report(rows | {f"memory of {name}, GB": peak / 1e9 for name, peak in memory.peaks.items()})


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
