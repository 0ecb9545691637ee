"""How a run on a server ended, for whoever started it."""

from __future__ import annotations

from sluiceway.core.guards import RunFailed
from sluiceway.core.signals import Stopped
from sluiceway.errors import BAD_INPUT, STOPPED, InputError


def raise_outcome(code: int, text: str) -> None:
    """Raise the error of an exit code and its one line; nothing for 0."""
    if code == STOPPED:
        raise Stopped
    if code == BAD_INPUT:
        raise InputError(text)
    if code:
        raise RunFailed(text)
