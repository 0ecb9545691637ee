"""Processes of a deployment on this machine: each with its log, and none left at the end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
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

    What they start in turn inherits an environment variable, by which it is found and ended too:
    in sessions of its own, and after the process that started it.

    Attributes:
        running: by name.
        logs: path of each log, by name.
        mark: the beginning of that variable's name.
    """

    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    logs: dict[str, Path] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: f"SLUICEWAY_{secrets.token_hex(8)}")

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(*reversed(self.running))
        end_marked(f"{self.mark}_")  # of processes that were taken out of `running` meanwhile

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
                env={**os.environ, **environment, self.mark_of(name): "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process
                preexec_fn=end_with_parent,
            )

    def end(self, *names: str, how: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to processes; after `END_TIMEOUT` kill them and all that they started."""
        ending = {name: self.running.pop(name) for name in names}
        for process in ending.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, how)
        deadline = time.monotonic() + END_TIMEOUT
        for process in ending.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
        end_marked(*map(self.mark_of, ending))

    def mark_of(self, name: str) -> str:
        """The variable that marks a process, and all that it starts."""
        return f"{self.mark}_{name.encode().hex()}_"

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


def end_marked(*marks: str) -> None:
    """Kill all processes that have an environment variable whose name begins with one of these."""
    while found := marked(*marks):
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.01)


def marked(*marks: str) -> list[int]:
    """Process ids of this user's that have such a variable and have not ended."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if any(name.startswith(marks) for name in process.environ()):
                found.append(process.pid)
    return found


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
