"""The raw tables of a recipe: TOML, `key=value` overrides, and keys that have got a new name.

Nothing here needs torch, so that recipes can be listed and completed at once.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

from sluiceway.errors import InputError, line, quoted
from sluiceway.experiment.own_code import (
    CODE_KEYS,
    MAYBE_PATH_KEYS,
    PATH_KEYS,
    changed,
    placed,
    short_name,
)
from sluiceway.files import listed

#: Largest recipe file and largest `key=value`, in bytes and characters.
RECIPE_LIMIT: Final = 256 << 10
OVERRIDE_LIMIT: Final = 16 << 10
#: Tables and lists in each other, at most; and dots in a line, for reading a key of n parts takes
#: time by n^2.
DEPTH_LIMIT: Final = 16
DOTS_LIMIT: Final = 100

#: Endings of files that hold data and are given in a recipe's place by mistake.
DATA_FILES: Final = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")

#: Recipe keys that were renamed, by their old names, which are still accepted.
OLD_KEYS: Final = {
    "run.form": "run.schedule",
    "run.fronts": "run.client_aggregation",
    "run.repeats": "run.max_retries",
}
#: Keys of summary.json that were renamed: new name to old name. A summary has both.
OLD_SUMMARY_KEYS: Final = {"rejected": "refused", "rejected_updates": "refused_updates"}

_told: set[str] = set()


def current_key(key: str) -> str:
    """The name that a dotted key has now; says on stderr, once, that an old one was used."""
    if key in OLD_KEYS and key not in _told:
        _told.add(key)
        print(f"note: {key} is now {OLD_KEYS[key]}", file=sys.stderr)
    return OLD_KEYS.get(key, key)


def with_current_keys(tables: Mapping[str, Any], *, tell: bool = True) -> dict[str, Any]:
    """The tables of a recipe with renamed keys under their current names.

    Args:
        tables: as they were written.
        tell: say on stderr that old names were used.

    Raises:
        InputError: a table has both names of a key.
    """
    found = dict(tables)
    for old, new in OLD_KEYS.items():
        (name, before), after = old.split("."), new.partition(".")[2]
        table = found.get(name)
        if not isinstance(table, Mapping) or before not in table:
            continue
        if after in table:
            raise InputError(f"{old} is the old name of {new}; give one of them")
        found[name] = {after if key == before else key: v for key, v in table.items()}
        if tell:
            current_key(old)
    return found


def with_old_keys(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary with renamed keys under their old names too."""
    return {**summary, **{old: summary[new] for new, old in OLD_SUMMARY_KEYS.items()}}


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with Sluiceway, by name."""
    folder = Path(str(resources.files("sluiceway") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_tables(recipe: str | Path) -> dict[str, Any]:
    """The raw tables of a recipe by name or path. Raises InputError."""
    shipped = shipped_recipes()
    path = shipped.get(str(recipe)) or Path(recipe)
    name = line(str(path))
    try:
        if (path / "recipe.toml").is_file():
            raise InputError(f"{name} is a run folder; its recipe is {name}/recipe.toml")
        if path.suffix.lower() in DATA_FILES and path.is_file():
            raise InputError(
                f"{name} is data, not a recipe: name it in a recipe's [data], path = {name!r}, "
                "or run one with --set data.path=..."
            )
        if not path.is_file():
            raise InputError(
                f"no recipe {quoted(str(recipe))}: not a file, and the shipped ones are "
                f"{', '.join(shipped)}"
            )
        with path.open("rb") as file:
            content = file.read(RECIPE_LIMIT + 1)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    if len(content) > RECIPE_LIMIT:
        raise InputError(f"{name} is larger than {RECIPE_LIMIT} bytes, the limit of a recipe")
    if any(part.count(b".") > DOTS_LIMIT for part in content.splitlines()):
        raise InputError(f"{name} has a line with more than {DOTS_LIMIT} dots")
    try:
        tables = parsed_toml(content.decode())
    except ValueError as error:
        raise InputError(f"{name} is not TOML: {line(str(error))}") from None
    return tables if str(recipe) in shipped else anchored(tables, path.parent)


def anchored(tables: dict[str, Any], base: Path) -> dict[str, Any]:
    """The tables of a recipe with the files that it names found relative to its folder."""
    keys = dict.fromkeys((*PATH_KEYS, *CODE_KEYS, *MAYBE_PATH_KEYS))
    tables = changed(tables, keys, lambda key, value: placed(key, value, base))
    compare = tables.get("compare")
    vary = compare.get("vary") if isinstance(compare, dict) else None
    if isinstance(vary, dict):
        vary |= {key: placed(key, values, base) for key, values in vary.items()}
    return tables


def parsed_toml(text: str) -> dict[str, Any]:
    """TOML as tables. Raises ValueError."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("tables and lists are too deep in each other") from None


def overridden_tables(recipe: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The raw tables of a recipe with `key=value` overrides, not checked yet. Raises InputError."""
    tables = with_current_keys(read_tables(recipe))
    for override in overrides:
        if len(override) > OVERRIDE_LIMIT:
            raise InputError(
                f"cannot set {quoted(override)}: it has {len(override)} characters, "
                f"the limit is {OVERRIDE_LIMIT}"
            )
        key, sign, value = override.partition("=")
        if not sign:
            raise bad_override(override)
        set_key(tables, key.strip(), placed(key.strip(), parsed(value.strip()), Path()))
    one_source(tables, [key_of(override) for override in overrides])
    return tables


def flattened(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a recipe by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        inner = isinstance(value, Mapping)
        flat |= flattened(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def method_label(method: Mapping[str, Any]) -> str:
    """A method for people: its name, with that of its robust rule and server optimiser."""
    inner = [method.get(key) for key in ("robust", "server")]
    names = [one.get("name") for one in inner if isinstance(one, Mapping)]
    parts = [name for name in names if name not in (None, "none")]
    own = short_name(str(method.get("name", "unknown method")))
    return " + ".join(map(str, [own, *parts]))


def data_name(recipe: Mapping[str, Any]) -> str:
    """The data set of a recipe's tables for people."""
    data = recipe.get("data", {})
    return str(data.get("name") or Path(listed(data.get("path", "data"))[0]).name)


def key_of(override: str) -> str:
    """The dotted key that a `key=value` sets, by its current name."""
    key = override.partition("=")[0].strip()
    return OLD_KEYS.get(key, key)


def one_source(tables: dict[str, Any], given: Sequence[str]) -> None:
    """Drop the recipe's data.name where data.path is given, and the other way round, in place."""
    for key, other in (("path", "name"), ("name", "path")):
        data = tables.get("data")
        if f"data.{key}" in given and f"data.{other}" not in given and isinstance(data, dict):
            data.pop(other, None)


def bad_override(said: str) -> InputError:
    """The error for what is no `table.key=value`."""
    return InputError(f"cannot set {quoted(said)}; write table.key=value, such as data.alpha=0.1")


def set_key(tables: dict[str, Any], key: str, value: Any) -> None:
    """Set `table.key` (or deeper) in place. Raises InputError."""
    *path, last = current_key(key).split(".")
    if not last or not path:
        raise bad_override(f"{key}={value}")
    for part in path:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise InputError(f"cannot set {line(key, 80)}: {line(part, 80)} is not a table")
    tables[last] = value


def parsed(value: str) -> Any:
    """A value as TOML reads it; what TOML does not read is a string."""
    try:
        found = parsed_toml(f"value = {value}") if value.count(".") <= DOTS_LIMIT else {}
    except ValueError:
        return value
    return found["value"] if list(found) == ["value"] else value


def require_shallow(tables: Mapping[str, Any]) -> None:
    """Raise InputError for what is nested deeper than any recipe: to print it could fail."""
    level: list[Any] = [tables]
    for _ in range(DEPTH_LIMIT):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, Mapping | list | tuple)
        ]
        if not level:
            return
    raise InputError(f"tables and lists are more than {DEPTH_LIMIT} deep in each other")
