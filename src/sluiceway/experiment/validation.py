"""Bad input, said in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass

from sluiceway.errors import InputError, line, quoted


def first_fault(error: ValidationError, where: str, allowed: dict[str, list[str]]) -> str:
    """The first fault of a pydantic error as one line.

    Args:
        where: name of the table the error is about, "" for the whole recipe.
        allowed: the keys of each table by its name, for unknown keys.
    """
    fault = error.errors(include_url=False)[0]
    location = [str(part) for part in fault["loc"]]
    path = [*([where] if where else []), *location]
    key, table = line(".".join(path), 80), ".".join(path[:-1])
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = ", ".join(allowed.get(table, []))
        return f"unknown key {key}; allowed{f' in [{line(table, 80)}]' if table else ''}: {known}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{key} is missing"
    message = fault["msg"][0].lower() + fault["msg"][1:]
    message = re.sub("^(input|string|list|dictionary) should", "must", message)
    message = line(message.removeprefix("value error, "), 1000)
    return f"{key} = {quoted(fault['input'])}: {message}" if key else message


def checked(table: str, cls: type[Any], values: Mapping[str, Any], more: Sequence[str]) -> Any:
    """An object of a checked dataclass; its faults as one line that names the table."""
    assert is_pydantic_dataclass(cls)
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise InputError(first_fault(error, table, {table: [*more, *keys_of(cls)]})) from None


def keys_of(cls: type[Any]) -> list[str]:
    """The parameters of a checked dataclass, by the names that a recipe uses."""
    described = cls.__pydantic_fields__
    return [
        str(info.validation_alias or name) for name, info in described.items() if not info.exclude
    ]
