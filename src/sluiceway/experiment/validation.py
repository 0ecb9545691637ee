"""Bad input, said in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sluiceway.errors import InputError, line, quoted
from sluiceway.experiment.keys import description, names_of


def first_fault(
    error: ValidationError, cls: type[Any], table: str = "", more: Sequence[str] = ()
) -> str:
    """The first fault of a pydantic error as one line.

    Args:
        cls: what was validated, for the keys that are allowed and their descriptions.
        table: its name in a recipe, "" for the whole recipe.
        more: keys of that table that are not of `cls`.
    """
    fault = error.errors(include_url=False)[0]
    location = [str(part) for part in fault["loc"]]
    path = [*([table] if table else []), *location]
    key, above = line(".".join(path), 80), ".".join(path[:-1])
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = [*(more if above == table else ()), *names_of(cls, location[:-1])]
        return unknown_key(above, path[-1], known)
    about = description(cls, location).partition(". ")[0].rstrip(".")
    about = f" ({about})" if about else ""
    if fault["type"] in ("missing", "missing_argument"):
        return f"{key} is missing{about}"
    message = fault["msg"][0].lower() + fault["msg"][1:]
    message = re.sub("^(input|string|list|dictionary) should", "must", message)
    message = line(message.removeprefix("value error, "), 1000)
    return f"{key} = {quoted(fault['input'])}: {message}{about}" if key else message


def unknown_key(table: str, key: str, known: Sequence[str]) -> str:
    """One line about a key that is not there, with those that are."""
    name = line(f"{table}.{key}" if table else key, 80)
    where = f" in [{line(table, 80)}]" if table else ""
    return f"unknown key {name}; allowed{where}: {', '.join(known)}"


def checked(table: str, cls: type[Any], values: Mapping[str, Any], more: Sequence[str]) -> Any:
    """An object of a checked dataclass; its faults as one line that names the table."""
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise InputError(first_fault(error, cls, table, more)) from None
