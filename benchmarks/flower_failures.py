"""What happens when a part of a Flower deployment dies: prints what was seen.

    python benchmarks/flower_failures.py [node link key trial]

Every case is a run of the quickstart on two clients, on a deployment of its own:

    node       a SuperNode is killed in round 2, and started again after 70 s: before that the
               SuperLink takes it for alive, and lets no second one in
    link       the SuperLink is killed in round 2 and started again with its database
    key        a SuperNode with a key that nobody registered
    trial      `sluiceway run --engine flower` itself is killed with -9
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
from sluiceway.deploy.flower import trial
from sluiceway.deploy.flower.certificates import new_node_key
from sluiceway.deploy.flower.deployment import Deployment, command
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
    seconds: list[float] = []
    follow = trial.followed

    def followed(flower: Deployment, run: str, told: Path, progress: Progress) -> None:
        def on_round(record: Record) -> None:
            seconds.append(record.seconds)
            line(described(record))
            if record.round == 1:
                threading.Timer(LATER, disturb_and_stay, [flower]).start()

        try:
            follow(flower, run, told, Progress(say=line, on_round=on_round))
        finally:
            over.set()

    def disturb_and_stay(flower: Deployment) -> None:
        disturb(flower)
        over.wait()  # what a thread started ends with it

    trial.followed = followed
    try:
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "out"
            summary = trial.run_trial(small("flower"), out, progress=Progress(say=line))
    finally:
        trial.followed = follow
    return {**summary, "seconds_by_round": seconds}


def node(here: list[float]) -> str:
    """A SuperNode that comes back after a while."""

    def disturb(flower: Deployment) -> None:
        flower.kill("site-1")
        time.sleep(70)
        flower.start_node("site-1", flower.configs["site-1"])

    found = disturbed(disturb)
    rounds = [f"{seconds:.0f}" for seconds in found["seconds_by_round"]]
    return f"rounds took {', '.join(rounds)} s; left out: {json.dumps(found['failed'])}"


def link(here: list[float]) -> str:
    """A SuperLink that comes back."""

    def disturb(flower: Deployment) -> None:
        flower.kill("superlink")
        time.sleep(5)
        flower.start_link()

    return compared(disturbed(disturb), here)


def compared(found: dict[str, Any], here: list[float]) -> str:
    """How a disturbed run ended, beside the embedded one that was not."""
    same = "the same accuracies" if found["accuracy_by_round"] == here else "OTHER accuracies"
    rounds = [f"{seconds:.0f}" for seconds in found["seconds_by_round"]]
    return f"{same} as embedded; rounds took {', '.join(rounds)} s; left out: {found['failed']}"


def key(here: list[float]) -> str:
    """A SuperNode that nobody knows."""
    with tempfile.TemporaryDirectory() as name, Deployment(Path(name)) as flower:
        flower.start_link()
        flower.register("site-0")
        private, _ = new_node_key(flower.folder, "unknown")
        flower.start_node("stranger", {}, private)
        stranger = flower.processes.pop("stranger")
        stranger.wait(120)
        said = flower.log("stranger").read_text(errors="replace")
        reason = [
            text for text in said.splitlines() if "[code:" in text or "Failed to init" in text
        ]
        return f"a stranger ended with code {stranger.returncode}: {' '.join(reason)}"


def killed_trial(here: list[float]) -> str:
    """The command itself is killed."""
    with tempfile.TemporaryDirectory() as name:
        words = [word for text in SMALL for word in ("--set", text)]
        end = ["--engine", "flower", "--out", f"{name}/out"]
        process = subprocess.Popen(
            [command("sluiceway"), "run", "quickstart", *words, *end],
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


CASES = {"node": node, "link": link, "key": key, "trial": killed_trial}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    here = run(small("local"))[0].accuracy_by_round if "link" in args.cases else []
    for name in args.cases:
        began = time.perf_counter()
        said = CASES[name](here)
        print(f"{name} ({time.perf_counter() - began:.0f} s): {said}", flush=True)


if __name__ == "__main__":
    main()
