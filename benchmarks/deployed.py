"""What it costs that clients are elsewhere: a server and two sites over TLS on this machine.

    python benchmarks/deployed.py                 all of it, about six minutes on 2 cores
    python benchmarks/deployed.py --only line     one of: rounds, line, large

rounds: the same recipe embedded, with a worker a client, and deployed; the numbers must be equal,
and what the server's port carried (as the kernel counts it, TLS and all) within 5 % of what the run
says. line: frames of 128 KB each way on a line of split learning; at least 100 a second a client.
large: one ask and its answer, of a site that does nothing, and one answer of 2.5 GB.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from sluiceway.deploy.nvflare.admin import opened
from sluiceway.deploy.nvflare.job import write_job
from sluiceway.deploy.nvflare.kits import CLASSES
from sluiceway.deploy.nvflare.local_deployment import (
    STARTING,
    Deployment,
    family_of,
    running,
    site_files,
)
from sluiceway.deploy.nvflare.submit import JobSpec, submit
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.run import run
from sluiceway.transport.tls import Connection, TlsServer

ROOT = Path(__file__).resolve().parent.parent
SITES = ["site-1", "site-2"]
PARTS = "benchmarks.deployed_parts"
RECIPE = ["data.clients=2", "data.limit=240", "data.test_limit=100", "run.device=cpu"]
#: Limits: bytes on the socket beyond those that are counted, as a share; frames a second a client.
BEYOND, RATE = 0.05, 100
FRAME, FRAMES = 128 << 10, 1000
LARGE = 2_500_000_000
#: Bytes of a few asks of next to nothing, and of a few updates of an upcycled MiniLM.
SMALL, UPDATE = [1000] * 5, [38_000_000] * 3

Row = tuple[str, str, bool]


@dataclass
class Wire:
    """What the kernel says that connections at a port carried, those that have ended too.

    Attributes:
        port: of the server.
    """

    port: int
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)

    def look(self) -> None:
        """Note what each connection has carried so far."""
        command = ["ss", "-tinHO", "sport", "=", f":{self.port}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for text in found.splitlines():
            sent, got = (re.search(rf"{key}:(\d+)", text) for key in ("_sent", "_received"))
            ends = " ".join(re.findall(r"\S+:\d+(?=\s)", text)[:2])
            self.seen[ends] = (int(sent[1]) if sent else 0, int(got[1]) if got else 0)

    @property
    def total(self) -> int:
        return sum(map(sum, self.seen.values()))


@contextmanager
def watched(look: Callable[[], None], every: float) -> Iterator[None]:
    """Look again and again while it lasts."""
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


def rounds(deployment: Deployment, folder: Path) -> list[Row]:
    """The same recipe embedded and deployed."""
    settings = [*RECIPE, "run.rounds=4"]
    local = load_recipe("quickstart", [*settings, "run.workers=2"])
    _, embedded = run(local, folder / "local")
    recipe = load_recipe("quickstart", [*settings, "run.workers=2", "run.engine=nvflare"])
    wire = Wire(deployment.admin.address[1])
    with opened(deployment.admin, STARTING) as desk:
        desk.await_sites(SITES, STARTING, print)
        wire.look()
        before = wire.total
        with watched(wire.look, 0.1):
            submit(desk, JobSpec(recipe, "rounds", SITES), folder / "home", print)
    summary = json.loads((folder / "home" / "summary.json").read_text())
    counted = summary["bytes_up"] + summary["bytes_down"]
    beyond = (wire.total - before) / counted - 1
    here, there = seconds_in(folder / "local"), seconds_in(folder / "home")
    same = summary["accuracy_by_round"] == embedded["accuracy_by_round"]
    return [
        ("accuracy by round as embedded", "yes" if same else "no", same),
        ("seconds a round, embedded, two workers", f"{here:.2f}", True),
        ("seconds a round, deployed", f"{there:.2f}", True),
        ("MB up and down, counted", f"{counted / 1e6:.1f}", True),
        ("MB on the socket", f"{(wire.total - before) / 1e6:.1f}", True),
        ("beyond what is counted (limit 5 %)", f"{beyond:.1%}", abs(beyond) <= BEYOND),
    ]


def seconds_in(folder: Path) -> float:
    """The median over rounds but the first, in which frozen layers are run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return statistics.median(float(json.loads(text)["seconds"]) for text in lines[1:])


def line(deployment: Deployment, folder: Path) -> list[Row]:
    """Frames on lines of split learning, one client and then two at once."""
    rows = []
    for count in (1, 2):
        sites = SITES[:count]
        with TlsServer(deployment.kits["server"].keys, sites, "127.0.0.1") as gate:
            homes = [subprocess.Popen(dialling(deployment, site, gate.port)) for site in sites]
            try:
                rate = slowest([gate.line(site, STARTING) for site in sites])
            finally:
                for home in homes:
                    home.kill()
                    home.wait()
        what = f"mini-batches a second a client, 128 KB each way, {count} at once (limit {RATE})"
        rows.append((what, f"{rate:.0f}", rate >= RATE))
    return rows


def dialling(deployment: Deployment, site: str, port: int) -> list[str]:
    """What starts a site that sends back what comes."""
    kit = str(deployment.kits[site].folder)
    return [sys.executable, "-m", PARTS, "echo", kit, str(port)]


def slowest(lines: list[Connection]) -> float:
    """Frames a second on the slowest of some lines, all used at once."""
    rates: list[float] = []

    def use(one: Connection) -> None:
        body = bytes(FRAME)
        began = time.perf_counter()
        for _ in range(FRAMES):
            one.send({}, body)
            if one.receive(60)[1] != body:
                raise RuntimeError("another frame came back")
        rates.append(FRAMES / (time.perf_counter() - began))

    threads = [threading.Thread(target=use, args=(one,)) for one in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return min(rates) if len(rates) == len(lines) else 0.0


def large(deployment: Deployment, folder: Path) -> list[Row]:
    """One answer of 2.5 GB, and the memory of the processes that it passes."""
    peaks: dict[str, int] = {}
    write_job(
        folder / "job",
        "large",
        SITES[:1],
        {"both": [*SMALL, *UPDATE], "back": [LARGE]},
        conductor=f"{PARTS}.Clock",
        relay=f"{PARTS}.BytesRelay",
    )
    with opened(deployment.admin, STARTING) as desk:
        desk.await_sites(SITES[:1], STARTING, print)
        with watched(lambda: note(deployment, peaks), 0.2):
            job = desk.submit(folder / "job")
            desk.watch(job, print)
        brought = desk.fetch(job, folder / "brought")
    if brought is None:
        return [("2.5 GB", "did not arrive", False)]
    times = json.loads((brought / "times.json").read_text())
    small, update = times["both"][: len(SMALL)], times["both"][len(SMALL) :]
    rows: list[Row] = [
        (
            "seconds of a client's turn beyond its work, 1 KB",
            f"{statistics.median(small):.3f}",
            True,
        ),
        ("the same, 38 MB each way", f"{statistics.median(update):.2f}", True),
        ("seconds for an answer of 2.5 GB", f"{times['back'][0]:.0f}", True),
    ]
    named = {"server": "the server", SITES[0]: "the site"}
    return rows + [
        (f"peak MB of a process of {who}", f"{peaks[name] / 1e6:.0f}", peaks[name] < LARGE / 2)
        for name, who in named.items()
    ]


def note(deployment: Deployment, peaks: dict[str, int]) -> None:
    """Keep the largest resident memory of one process of each party."""
    for name, process in list(deployment.started.items()):
        for member in family_of(process.pid):
            try:
                peaks[name] = max(peaks.get(name, 0), member.memory_info().rss)
            except psutil.Error:
                continue


def main() -> int:
    parts: dict[str, Callable[[Deployment, Path], list[Row]]]
    parts = {"rounds": rounds, "line": line, "large": large}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(parts))
    chosen = parser.parse_args().only
    folder = Path(tempfile.mkdtemp(prefix="deployed-"))
    rows: list[Row] = []
    try:
        files = site_files(folder / "homes", folder / "kept", SITES)
        classes = [*CLASSES, f"{PARTS}.Clock", f"{PARTS}.BytesRelay"]
        more: dict[str, Any] = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        deployment = Deployment(folder / "kits", SITES, folder / "runs", classes, more)
        with running(deployment, files):
            for name, measure in parts.items():
                if chosen in (None, name):
                    (folder / name).mkdir()
                    rows += measure(deployment, folder / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\n| | |\n|---|---:|")
    for what, found, fine in rows:
        print(f"| {what} | {found}{'' if fine else ' (!)'} |")
    return 0 if all(fine for _, _, fine in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
