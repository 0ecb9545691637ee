"""`sluiceway show`: a recipe with every value that it uses, and where each comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sluiceway.experiment.methods import method_of, method_table
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.tables import flattened, key_of, read_tables, with_current_keys

#: Column of a line at which its comment begins.
COMMENT = 44


def shown(recipe: Recipe, file: str | Path, overrides: Sequence[str]) -> str:
    """The resolved recipe as TOML; behind each value a comment says where it comes from.

    Args:
        recipe: what was made from `file` and `overrides`.
        file: shipped name or TOML file.
        overrides: as `table.key=value`.
    """
    written = flattened(with_current_keys(read_tables(file), tell=False))
    given = {key_of(one) for one in overrides}
    plain = plain_method(recipe)

    def source(key: str, value: Any) -> str:
        if key in given:
            return "--set"
        if key in written:
            return "recipe"
        preset = key in plain and plain[key] != value
        return f"preset {recipe.method['preset']}" if preset else "default"

    return "\n".join(lines(recipe.resolved(), "", source)) + "\n"


def plain_method(recipe: Recipe) -> dict[str, Any]:
    """The parameters of the recipe's method that a preset may change, by dotted key."""
    if "preset" not in recipe.method:
        return {}
    split = recipe.run.kind == "split"
    alone = {"name": recipe.method["name"]}
    return flattened({"method": method_table(alone, method_of(alone, split=split))})


def lines(tables: Mapping[str, Any], path: str, source: Any) -> Iterator[str]:
    """The lines of a table, its values before the tables in it."""
    inner = {key: value for key, value in tables.items() if isinstance(value, Mapping)}
    values = {key: value for key, value in tables.items() if key not in inner}
    if path and (values or not inner):
        yield f"[{path}]"
    for key, value in values.items():
        name = key if key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)
        text = f"{name} = {inline(value)}"
        yield f"{text:{COMMENT}} # {source(f'{path}.{key}' if path else key, value)}".rstrip()
    if values:
        yield ""
    for key, value in inner.items():
        yield from lines(value, f"{path}.{key}" if path else key, source)


def inline(value: Any) -> str:
    """A value as TOML has it on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {inline(v)}" for key, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
