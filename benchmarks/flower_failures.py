"""What happens when a part of a Flower deployment dies: prints what was observed.

    python benchmarks/flower_failures.py [node link command]

Every case is a run of the quickstart on two clients, on a deployment of its own:

    node       a SuperNode is killed in round 2, and started again after 70 s: before that the
               SuperLink takes it for alive, and rejects a second one
    link       the SuperLink is killed in round 2 and started again with its database
    command    `sluiceway run --engine flower` itself is killed with -9
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sluiceway.core.round_loop import Record
from sluiceway.deploy.flower import local_deployment
from sluiceway.deploy.flower.deployment import Deployment, program
from sluiceway.experiment.progress import described, line
from sluiceway.experiment.recipe import Recipe, load_recipe
from sluiceway.experiment.run import run
from sluiceway.experiment.session import Progress

SMALL = ["data.clients=2", "data.limit=120", "data.test_limit=100", "run.rounds=5"]
SMALL += ["run.device=cpu", "run.workers=2", "method.name=scaffold"]
#: Seconds after round 1 at which a part is killed: the second round is then under way.
LATER = 4.0


def small(engine: str) -> Recipe:
    return load_recipe("quickstart", [*SMALL, f"run.engine={engine}"])


def disturbed(disturb: Callable[[Deployment], None]) -> dict[str, Any]:
    """A run over Flower that is disturbed in its second round; its summary and rounds' times."""
    over = threading.Event()
    seconds: list[str] = []
    plain = local_deployment.follow

    def follow(flower: Deployment, run: str, log: Path, progress: Progress) -> None:
        def on_round(record: Record) -> None:
            seconds.append(f"{record.seconds:.0f}")
            line(described(record))
            if record.round == 1:
                threading.Timer(LATER, disturb_and_stay, [flower]).start()

        try:
            plain(flower, run, log, Progress(say=line, on_round=on_round))
        finally:
            over.set()

    def disturb_and_stay(flower: Deployment) -> None:
        disturb(flower)
        over.wait()  # what a thread started ends with it

    local_deployment.follow = follow
    try:
        with tempfile.TemporaryDirectory() as name:
            out, progress = Path(name) / "out", Progress(say=line)
            summary = local_deployment.run_locally(small("flower"), out, progress=progress)
    finally:
        local_deployment.follow = plain
    return {**summary, "seconds_by_round": ", ".join(seconds)}


def node() -> str:
    """A SuperNode that comes back after a while."""

    def disturb(flower: Deployment) -> None:
        flower.kill("site-1")
        time.sleep(70)
        flower.start_node("site-1", flower.configs["site-1"])

    found = disturbed(disturb)
    failed = json.dumps(found["failed"])
    return f"rounds took {found['seconds_by_round']} s; left out: {failed}"


def link() -> str:
    """A SuperLink that comes back."""

    def disturb(flower: Deployment) -> None:
        flower.kill("superlink")
        time.sleep(5)
        flower.start_link()

    here = run(small("local"))[0].accuracy_by_round
    found = disturbed(disturb)
    same = "the same accuracies" if found["accuracy_by_round"] == here else "OTHER accuracies"
    times = found["seconds_by_round"]
    return f"{same} as the local engine; rounds took {times} s; left out: {found['failed']}"


def killed_command() -> str:
    """The command itself is killed."""
    with tempfile.TemporaryDirectory() as name:
        words = [word for text in SMALL for word in ("--set", text)]
        process = subprocess.Popen(
            [
                *(program("sluiceway"), "run", "quickstart", *words),
                *("--engine", "flower", "--out", f"{name}/out"),
            ],
            env={**os.environ, "TMPDIR": name},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for text in process.stderr:
            if text.startswith("round 1"):
                break
        before = len(of_folder(Path(name)))
        began = time.monotonic()
        process.send_signal(signal.SIGKILL)
        process.wait()
        while (left := of_folder(Path(name))) and time.monotonic() - began < 30:
            time.sleep(0.2)
        taken = time.monotonic() - began
        return f"of {before} processes {len(left)} are left after {taken:.1f} s"


def of_folder(folder: Path) -> list[int]:
    """Processes whose environment names a folder (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


CASES = {"node": node, "link": link, "command": killed_command}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), choices=list(CASES))
    for name in parser.parse_args().cases:
        began = time.perf_counter()
        print(f"{name}: {CASES[name]()} ({time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
