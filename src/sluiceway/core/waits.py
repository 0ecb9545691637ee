"""Long waits tell how far they are, without knowing who listens."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
#: Called with what is waited for, how much of it is done, and how much there is (1 where it cannot
#: be counted).
Listener = Callable[[str, int, int], None]
#: Seconds from the beginning of a wait until it is told of.
PATIENCE = 2.0

_listeners: list[tuple[int, Listener]] = []


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While it lasts, the listener is told of waits of this process; not of its children."""
    _listeners.append((os.getpid(), listener))
    try:
        yield
    finally:
        _listeners.pop()


def counted(what: str, items: Iterable[T], of: int) -> Iterator[T]:
    """The items, one after the other; a wait above `PATIENCE` seconds is told of, and its end.

    Times from one word to the next double, so that an hour takes about a dozen.

    Args:
        what: is waited for, such as "frozen layers".
        items: what is done, one by one.
        of: how many there are.
    """
    if not _listeners or _listeners[-1][0] != os.getpid():
        yield from items
        return
    tell = _listeners[-1][1]
    began = time.monotonic()
    next_at = PATIENCE
    for done, item in enumerate(items):
        if (passed := time.monotonic() - began) >= next_at:
            tell(what, done, of)
            next_at = 2 * passed
        yield item
    if next_at > PATIENCE:
        tell(what, of, of)


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Something that cannot be counted is done inside; above `PATIENCE` seconds it is told of.

    The listener is called from another thread.
    """
    if not _listeners or _listeners[-1][0] != os.getpid():
        yield
        return
    tell, told = _listeners[-1][1], threading.Event()

    def late() -> None:
        told.set()
        tell(what, 0, 1)

    timer = threading.Timer(PATIENCE, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if told.is_set():
            tell(what, 1, 1)
