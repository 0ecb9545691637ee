"""No process outlives the block that started it, nor does what that process started."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("psutil", reason="comes with the extras [flower] and [nvflare]")

import psutil

from sluiceway.deploy.processes import Processes, marked

#: Starts a process in a session of its own that ignores signals, says its number, and ends.
LEAVES = """
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", '''
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
'''], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
"""


def orphan(processes: Processes, name: str, folder: Path) -> psutil.Process:
    """A process that outlived the one, which had that name, that started it."""
    folder.mkdir()
    processes.start(name, [sys.executable, "-c", LEAVES], {}, folder / name)
    assert processes.running[name].wait(60) == 0
    found = psutil.Process(int((folder / name).read_text()))
    assert found.is_running()
    return found


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended within five seconds; one that nobody reaps has too."""
    deadline = time.monotonic() + 5
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_what_an_ended_process_left_behind_is_ended(tmp_path: Path) -> None:
    with Processes() as processes:
        first, second = (orphan(processes, name, tmp_path / name) for name in ("a", "ab"))
        processes.end("a")
        assert gone(first)
        assert second.is_running()
        assert marked(processes.mark) == [second.pid]
        assert processes.ended() == "ab"
        processes.running.pop("ab")  # as one that is waited for elsewhere
    assert gone(second)


def test_processes_of_others_are_left_alone(tmp_path: Path) -> None:
    with Processes() as others:
        kept = orphan(others, "a", tmp_path / "kept")
        with Processes() as processes:
            left = orphan(processes, "a", tmp_path / "left")
        assert gone(left)
        assert kept.is_running()
    assert gone(kept)
