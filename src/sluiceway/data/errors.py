"""The error of this package, and how a place says that it lacks a data set."""

from __future__ import annotations

from sluiceway.errors import InputError


class DataError(InputError):
    """Bad data or a bad request for data: one line on what is wrong, where, and what is right."""


class Absent(Exception):
    """A place does not have a data set; says which place and why. Never leaves this package."""
