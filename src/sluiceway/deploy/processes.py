"""Processes of a deployment on this machine: each with its log, and none left at the end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sluiceway.errors import line

#: Seconds that processes have to end after SIGTERM.
END_TIMEOUT: Final = 10.0
#: Seconds between two looks at whether another process is alive.
LOOK: Final = 1.0
LOOPBACK: Final = "127.0.0.1"
#: Of prctl: the signal that a process gets when its parent ends.
PR_SET_PDEATHSIG: Final = 1


@dataclass
class Processes:
    """Named processes, each in a session of its own; all end when the block is left.

    Attributes:
        running: by name.
        logs: path of each log, by name.
    """

    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    logs: dict[str, Path] = field(default_factory=dict)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(*reversed(self.running))

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        """Start a process. On Linux it ends, at the latest, with the thread that calls this.

        Args:
            environment: added to that of this process.
        """
        self.logs[name] = log
        with log.open("ab") as file:
            self.running[name] = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process
                preexec_fn=end_with_parent,
            )

    def end(self, *names: str, how: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to processes; after `END_TIMEOUT` kill them and all their descendants."""
        ending = [self.running.pop(name) for name in names]
        families = [descendants(process.pid) for process in ending]
        for process in ending:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, how)
        deadline = time.monotonic() + END_TIMEOUT
        for process, family in zip(ending, families, strict=True):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            for number in {process.pid, *family, *descendants(process.pid)}:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(number, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def ended(self) -> str | None:
        """The name of a process that ended by itself, if there is one."""
        return next((n for n, p in self.running.items() if p.poll() is not None), None)

    def last_line(self, name: str) -> str:
        """The last line of a log, for a message."""
        return last_line(self.logs[name])


def last_line(log: Path) -> str:
    """The last line of a log, for a message."""
    found = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return line(found[-1]) if found else "without output"


def descendants(number: int) -> list[int]:
    """Process ids of all that a process started, also in sessions of their own."""
    import psutil

    try:
        return [child.pid for child in psutil.Process(number).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end_with_parent() -> None:
    """Have the kernel (Linux) kill this process when the thread that started it has ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def alive(number: int, starter: int) -> bool:
    """Whether a process is alive; `starter` is the one that started this process."""
    if number == starter:  # reliable also where nobody reaps the dead
        return os.getppid() == starter
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def exit_with(number: int) -> None:
    """End this process, however busy it is, when another has ended; for a thread."""
    starter = os.getppid()
    while alive(number, starter):
        time.sleep(LOOK)
    os._exit(0)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])
