"""The one error of this package, and how its parts say that a place lacks something."""

from __future__ import annotations

from sluiceway.errors import BAD_INPUT, SluicewayError


class DataError(SluicewayError, ValueError):
    """Bad data or a bad request for data: one line on what is wrong, where, and what is right."""

    exit_code = BAD_INPUT


class Absent(Exception):
    """A place does not have a data set; says which place and why. Never leaves this package."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name if it has none.

    Messages of other libraries run over several lines; a `DataError` has one.
    """
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
