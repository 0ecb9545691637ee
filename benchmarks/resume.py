"""Runs killed again and again with SIGKILL, and continued: are the numbers those of a whole run?

    python benchmarks/resume.py                        20 kills of each kind
    python benchmarks/resume.py --kills 5 --only split

A run is started, killed at a random moment (by turns its process alone, or all its processes at
once, as when a machine stops), and started again with --resume. A run that comes to its end is held
against one that was never killed: accuracy by round, bytes by round, and every byte of the saved
weights and of all other state. Then the next begins. Limit: no difference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: What is run, by kind: small, but with processes, masks, and states that clients keep.
RUNS = {
    "federated": [
        *("quickstart", "--set", "data.limit=300", "--set", "data.test_limit=200"),
        *("--set", "run.rounds=12", "--set", "run.workers=2", "--set", "run.participation=0.5"),
        *("--set", "method.name=scaffold"),
    ],
    "split": [
        *("split-quickstart", "--set", "data.limit=1000", "--set", "data.test_limit=500"),
        *("--set", "run.rounds=24", "--set", "run.participation=0.6"),
        *("--set", "method.quantize=int8", "--set", "method.error_feedback=true"),
    ],
}

#: Keys of summary.json that must be equal.
KEYS = ("accuracy_by_round", "bytes_by_round", "personal_accuracy", "accuracy_by_client")


@dataclass
class Counts:
    """What became of the kills.

    Attributes:
        kills: how many there were.
        before, between: of them, before a first checkpoint, and after it.
        finished: runs that came to their end and were compared.
        differences: what differed.
        half: times that an unfinished checkpoint was left behind.
    """

    kills: int = 0
    before: int = 0
    between: int = 0
    finished: int = 0
    half: int = 0
    differences: list[str] = field(default_factory=list)


def command(arguments: Sequence[str], out: Path) -> list[str]:
    """A run that begins, or goes on."""
    return [sys.executable, "-m", "sluiceway", "run", *arguments, "--out", str(out), "--resume"]


def state(out: Path) -> dict[str, Any]:
    """The numbers of a finished run, and the checksums of all that it saved."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    newest = max((out / "checkpoints").glob("round-*"))
    files = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))["files"]
    sums = {name: fact["sha256"] for name, fact in files.items() if name != "run.json"}
    return {key: summary[key] for key in KEYS} | sums


def whole_run(arguments: Sequence[str], out: Path) -> tuple[dict[str, Any], float]:
    """The reference, and how long it took in seconds."""
    began = time.monotonic()
    subprocess.run(command(arguments, out), check=True, capture_output=True)
    return state(out), time.monotonic() - began


def kill_and_resume(
    arguments: Sequence[str], kills: int, folder: Path, seed: int = 0, wait: float | None = None
) -> Counts:
    """Kill runs `kills` times in all, and compare every one that comes to its end.

    Args:
        arguments: of `sluiceway run`.
        kills: >= 1.
        folder: for the runs; must exist.
        seed: of the moments.
        wait: seconds a run may live at most; None takes the time of a whole run.
    """
    rng, counts = random.Random(seed), Counts()
    wanted, took = whole_run(arguments, folder / "whole")
    out = folder / "killed"
    while True:
        process = subprocess.Popen(
            command(arguments, out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            last = counts.kills >= kills
            _, said = process.communicate(timeout=None if last else rng.uniform(0, wait or took))
        except subprocess.TimeoutExpired:
            if counts.kills % 2:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.communicate()
            counts.kills += 1
            saved = list((out / "checkpoints").glob("round-*"))
            counts.between += bool(saved)
            counts.before += not saved
            counts.half += bool(list((out / "checkpoints").glob(".*")))
            continue
        if process.returncode:
            counts.differences.append(f"exit code {process.returncode}: {said.strip()[-500:]}")
        else:
            found = state(out)
            counts.differences += [key for key in wanted if found.get(key) != wanted[key]]
            counts.finished += 1
        shutil.rmtree(out)
        if counts.kills >= kills:
            return counts


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=RUNS)
    args = parser.parse_args()
    print(
        "| kind | kills | before a checkpoint | after | in the middle of one | compared | differ |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    failed = False
    for kind in [args.only] if args.only else RUNS:
        with tempfile.TemporaryDirectory() as folder:
            t = kill_and_resume(RUNS[kind], args.kills, Path(folder), args.seed)
        print(
            f"| {kind} | {t.kills} | {t.before} | {t.between} | {t.half} | {t.finished} "
            f"| {len(t.differences)} |",
            flush=True,
        )
        for difference in t.differences:
            failed = True
            print(f"  {difference}", file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
