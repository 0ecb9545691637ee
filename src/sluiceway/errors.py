"""Errors of one line, exit codes, and untrusted values quoted in messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

#: Exit codes besides 0: a run that could not go on, bad input, and stopped by Ctrl-C or SIGTERM.
FAILED, BAD_INPUT, STOPPED = 1, 2, 130


class SluicewayError(Exception):
    """An error that a user is told in one line, without a traceback."""

    exit_code: ClassVar[int] = FAILED


class InputError(SluicewayError, ValueError):
    """Something the user gave cannot be used; the message is one line that says what would be."""

    exit_code = BAD_INPUT


def exit_code_of(error: BaseException) -> int:
    """The exit code of an error that has ended a run."""
    if isinstance(error, SluicewayError):
        return error.exit_code
    return STOPPED if isinstance(error, KeyboardInterrupt) else FAILED


def outcome_of(action: Callable[[], None]) -> tuple[int, str]:
    """Call `action`; returns the exit code and the line that says why, "" if it went well.

    Errors that are neither bad input nor a known failure of a run are raised as they are.
    """
    try:
        action()
    except SluicewayError as error:
        return error.exit_code, f"{error}"
    except KeyboardInterrupt as stop:
        return STOPPED, f"stopped{stop}"
    return 0, ""


def how_to_install(extra: str) -> str:
    """The command that installs an extra, for messages: Sluiceway is on no package index."""
    return f"pip install -c constraints.txt -e '.[{extra}]', in a checkout of Sluiceway"


def quoted(value: object, most: int = 80) -> str:
    """A value as Python writes it, on one line and cut after `most` characters."""
    try:
        text = repr(value[: most + 1] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # integers of thousands of digits, tables in tables
        text = f"{type(value).__name__} too large to be shown"
    return line(text, most)


def line(text: str, most: int = 300) -> str:
    """A text on one line and cut after `most` characters; control characters are escaped."""
    short = text if len(text) <= most else f"{text[:most]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in short)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name if it has none.

    Messages of other libraries run over several lines; ours have one.
    """
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def described(error: BaseException) -> str:
    """An error in one line: its type, and the first line of its message."""
    kind, first = type(error).__name__, first_line(error)
    return kind if first == kind else line(f"{kind}: {first}")
