"""The cost of clients elsewhere with NVFlare: a server and two sites over TLS on this machine.

    python benchmarks/deployed.py                     all of it, about six minutes on 2 cores
    python benchmarks/deployed.py --only connections  one of: rounds, connections, large

rounds: the same recipe on the local engine, with a worker a client, and deployed; the numbers must
be equal, and the bytes on the server's port (as the kernel counts them, TLS included) within 5 % of
those that the run counts and of what it brings home at the end, its model above all. connections:
frames of 128 KB each way on connections of split learning; at least 100 a second a client. large: a
request and its response of a site that does nothing, and one response of 2.5 GB.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import Memory, repeated, report
from sluiceway.deploy.nvflare.admin import opened
from sluiceway.deploy.nvflare.job import write_job
from sluiceway.deploy.nvflare.kits import CLASSES
from sluiceway.deploy.nvflare.local_deployment import START_TIMEOUT, Deployment
from sluiceway.deploy.nvflare.submit import JobSpec, submit
from sluiceway.deploy.site_file import write_site_file
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.run import run
from sluiceway.transport.tls import Connection, TlsServer

ROOT = Path(__file__).resolve().parent.parent
SITES = ["site-1", "site-2"]
PARTS = "benchmarks.deployed_parts"
RECIPE = ["data.clients=2", "data.limit=240", "data.test_limit=100", "run.device=cpu"]
#: Limits: bytes on the socket beyond the counted ones, as a share; frames a second a client.
BEYOND, RATE = 0.05, 100
FRAME, FRAMES = 128 << 10, 1000
LARGE = 2_500_000_000
#: Bytes of a few messages of next to nothing, and of a few updates of an upcycled MiniLM.
SMALL, UPDATE = [1000] * 5, [38_000_000] * 3


@dataclass
class Socket:
    """What the kernel says that connections at a port carried, ended ones included.

    Attributes:
        port: of the server.
    """

    port: int
    seen: dict[str, int] = field(default_factory=dict)

    def look(self) -> None:
        """Note what each connection has carried so far."""
        command = ["ss", "-tinHO", "sport", "=", f":{self.port}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for text in found.splitlines():
            ends = " ".join(re.findall(r"\S+:\d+(?=\s)", text)[:2])
            self.seen[ends] = sum(map(int, re.findall(r"bytes_(?:sent|received):(\d+)", text)))


def rounds(deployment: Deployment, folder: Path) -> dict[str, Any]:
    """The same recipe on the local engine and deployed."""
    settings = [*RECIPE, "run.rounds=4", "run.workers=2"]
    _, local = run(load_recipe("quickstart", settings), folder / "local")
    recipe = load_recipe("quickstart", [*settings, "run.engine=nvflare"])
    socket = Socket(deployment.admin.address[1])
    with opened(deployment.admin, START_TIMEOUT) as session:
        session.wait_for_sites(SITES, START_TIMEOUT, print)
        socket.look()
        before = sum(socket.seen.values())
        with repeated(socket.look, 0.1):
            submit(session, JobSpec(recipe, "rounds", SITES), folder / "deployed", print)
    summary = json.loads((folder / "deployed" / "summary.json").read_text())
    counted = summary["bytes_up"] + summary["bytes_down"]
    home = sum(f.stat().st_size for f in (folder / "deployed").rglob("*") if f.is_file())
    carried = sum(socket.seen.values()) - before
    assert summary["accuracy_by_round"] == local["accuracy_by_round"]
    assert abs(carried / (counted + home) - 1) <= BEYOND, (carried, counted, home)
    return {
        "accuracy by round as with the local engine": "yes",
        "seconds a round, local, two workers": seconds_in(folder / "local"),
        "seconds a round, deployed": seconds_in(folder / "deployed"),
        "MB up and down, counted": counted / 1e6,
        "MB brought home": home / 1e6,
        "MB on the socket": carried / 1e6,
        "more on the socket, %": 100 * (carried / (counted + home) - 1),
    }


def seconds_in(folder: Path) -> float:
    """The median over rounds but the first, in which frozen layers are run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return statistics.median(float(json.loads(text)["seconds"]) for text in lines[1:])


def connections(deployment: Deployment, folder: Path) -> dict[str, Any]:
    """Frames on connections of split learning, one client and then two at once."""
    rows = {}
    for count in (1, 2):
        sites = SITES[:count]
        with TlsServer(deployment.kits["server"].keys, sites, "127.0.0.1") as server:
            echo = [sys.executable, "-m", PARTS, "echo"]
            ends = [
                subprocess.Popen([*echo, deployment.kits[site].folder, str(server.port)])
                for site in sites
            ]
            try:
                rate = slowest([server.connection(site, START_TIMEOUT) for site in sites])
            finally:
                for end in ends:
                    end.kill()
                    end.wait()
        assert rate >= RATE, rate
        rows[f"mini-batches a second a client, 128 KB each way, {count} at once"] = rate
    return rows


def slowest(connections: list[Connection]) -> float:
    """Frames a second on the slowest of some connections, all used at once."""
    rates: list[float] = []

    def use(one: Connection) -> None:
        body = bytes(FRAME)
        began = time.perf_counter()
        for _ in range(FRAMES):
            one.send({}, body)
            if one.receive(60)[1] != body:
                raise RuntimeError("another frame came back")
        rates.append(FRAMES / (time.perf_counter() - began))

    threads = [threading.Thread(target=use, args=(one,)) for one in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return min(rates) if len(rates) == len(connections) else 0.0


def large(deployment: Deployment, folder: Path) -> dict[str, Any]:
    """Small and large messages, and the memory of the processes that they pass."""
    memory = Memory(deployment)
    write_job(
        folder / "job",
        "large",
        SITES[:1],
        {"both": [*SMALL, *UPDATE], "back": [LARGE]},
        controller=f"{PARTS}.Clock",
        executor=f"{PARTS}.BytesExecutor",
    )
    with opened(deployment.admin, START_TIMEOUT) as session:
        session.wait_for_sites(SITES[:1], START_TIMEOUT, print)
        with repeated(memory.look, 0.2):
            job = session.session.submit_job(str(folder / "job"))
            session.watch(job, print)
        result = session.fetch(job, folder / "result")
    assert result is not None
    times = json.loads((result / "times.json").read_text())
    peaks = {name: memory.peaks[name] for name in ("server", SITES[0])}
    assert max(peaks.values()) < LARGE / 2, peaks
    return {
        "seconds of a request beyond its work, 1 KB": statistics.median(times["both"][:5]),
        "the same, 38 MB each way": statistics.median(times["both"][5:]),
        "seconds for a response of 2.5 GB": times["back"][0],
        **{f"peak MB of a process of {name}": peak / 1e6 for name, peak in peaks.items()},
    }


def main() -> None:
    parts: dict[str, Callable[[Deployment, Path], dict[str, Any]]]
    parts = {"rounds": rounds, "connections": connections, "large": large}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(parts))
    chosen = parser.parse_args().only
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="deployed-") as name:
        folder = Path(name)
        with Deployment(
            folder=folder / "kits",
            sites={site: write_site_file(folder / site, "cpu") for site in SITES},
            runs=folder / "runs",
            classes=[*CLASSES, f"{PARTS}.Clock", f"{PARTS}.BytesExecutor"],
            environment={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        ) as deployment:
            for part, measure in parts.items():
                if chosen in (None, part):
                    (folder / part).mkdir()
                    rows |= measure(deployment, folder / part)
    report(rows)


if __name__ == "__main__":
    main()
