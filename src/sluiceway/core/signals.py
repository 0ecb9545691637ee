"""Stopping a run between two steps, on Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_asked = threading.Event()


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and did so between two steps."""


def check_stop() -> None:
    """Raise `Stopped` if the run was asked to stop. Called between steps."""
    if _asked.is_set():
        raise Stopped


def ask_to_stop() -> None:
    """Ask the run that goes on, inside `graceful_stop`, to stop after the step in hand."""
    _asked.set()


@contextlib.contextmanager
def graceful_stop(say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """While it lasts, SIGINT and SIGTERM let the step in hand end, and then raise `Stopped`.

    A second signal raises KeyboardInterrupt at once. Outside the main thread, where signals cannot
    be handled, nothing changes; a signal that the process ignores stays ignored.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if _asked.is_set():
            raise KeyboardInterrupt
        _asked.set()
        say("stopping after this step; once more stops at once")

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                with contextlib.suppress(ValueError):
                    before[number] = signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()
