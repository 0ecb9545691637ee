"""The one list of methods and of what goes with them; and what [method] makes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from pydantic import TypeAdapter

from sluiceway.errors import InputError, quoted
from sluiceway.experiment.keys import sentence
from sluiceway.experiment.own_code import fault, is_code, load_code, short_name
from sluiceway.experiment.validation import checked
from sluiceway.split.compress import Compressor
from sluiceway.split.methods import METHODS
from sluiceway.strategies import (
    BASELINES,
    PRIVACY,
    ROBUST,
    SERVER,
    STRATEGIES,
    ServerOptimizer,
    Strategy,
    UpdateRule,
)
from sluiceway.strategies.base import Mechanism

#: Kinds of methods, and where a recipe names one.
KINDS = {
    "federated": "[method] of a federated run",
    "split": "[method] of a split run",
    "robust": "[method.robust], with any federated method",
    "server": "[method.server], with any federated method",
    "privacy": "[method.privacy], with federated methods that weigh clients alike",
}
#: The tables inside of [method] of a federated run, and what their names may be besides "none",
#: which is there so that a comparison can leave them out.
INNER: dict[str, dict[str, type[Any]]] = {
    "robust": {**ROBUST},
    "server": {**SERVER},
    "privacy": {**PRIVACY},
}


#: Groups of entry points by which packages bring methods of their own, and of what class they are.
GROUPS: dict[str, tuple[str, type[Any]]] = {
    "federated": ("sluiceway.strategies", Strategy),
    "split": ("sluiceway.compressors", Compressor),
}


@dataclass(frozen=True)
class Method:
    """A method as a recipe names it.

    Attributes:
        name: value of `method.name`, or of `method.robust.name`.
        kind: one of `KINDS`.
        cls: its class.
        text: one line about it.
    """

    name: str
    kind: str
    cls: type[Any]
    text: str

    @property
    def table(self) -> str:
        """The table of a recipe that names it."""
        return f"method.{self.kind}" if self.kind in INNER else "method"


def methods() -> list[Method]:
    """Every method that ships: what the tables of the documentation show."""
    tables: dict[str, Mapping[str, type[Any]]] = {
        "federated": {**STRATEGIES, **BASELINES},
        "split": METHODS,
        **INNER,
    }
    return [
        Method(name, kind, cls, one_line(cls, kind))
        for kind, table in tables.items()
        for name, cls in table.items()
    ]


def found_methods() -> list[Method]:
    """The methods that installed packages bring; of one that fails the text says why."""
    found = []
    for kind, (group, _) in GROUPS.items():
        for point in entry_points(group=group):
            package = point.dist.name if point.dist else point.value
            try:
                cls = found_class(kind, point.name)
                text = f"{sentence((cls.__doc__ or '').strip().partition(chr(10))[0])} "
            except InputError as error:
                cls, text = object, f"Cannot be used: {error} "
            found.append(Method(point.name, kind, cls, f"{text}(package {package})"))
    return found


def found_class(kind: str, name: str) -> type[Any]:
    """The method of the user's own that a name stands for: code, or an entry point.

    Raises:
        InputError: there is none, or it is not what a method of that kind must be.
    """
    group, base = GROUPS[kind]
    if is_code(name):
        cls = load_code("method.name", name)
    else:
        point = next(iter(entry_points(group=group, name=name)))
        try:
            cls = point.load()
        except Exception as error:
            raise InputError(f"method.name = {quoted(name)}: {fault(error)}") from None
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise InputError(
            f"method.name = {quoted(short_name(name))}: expected a class derived from "
            f"sluiceway's {base.__name__}, found {quoted(str(cls))}"
        )
    if "__pydantic_fields__" not in vars(cls):
        raise InputError(
            f"method.name = {quoted(short_name(name))}: the class needs the decorator "
            "@pydantic.dataclasses.dataclass(config=PARAMETERS, kw_only=True) of "
            "sluiceway.strategies.parameters"
        )
    return cls


def one_line(cls: type[Any], kind: str) -> str:
    """What a method does: the first line of its class, or of a strategy's file after its name."""
    doc = sys.modules[cls.__module__].__doc__ if kind == "federated" else cls.__doc__
    first = (doc or "").strip().partition("\n")[0]
    return sentence(first.partition(": ")[2] or first if kind == "federated" else first)


def method_of(table: Mapping[str, Any], *, split: bool) -> Strategy | Compressor:
    """The strategy that [method] names, or in a split run the compressor. Raises InputError."""
    known: dict[str, type[Any]] = {**METHODS} if split else {**STRATEGIES, **BASELINES}
    name, apart = table.get("name"), {"name"} if split else {"name", *INNER}
    if isinstance(name, str) and name in known:  # a list is not even hashable
        cls = known[name]
    else:
        kind = "split" if split else "federated"
        named = [point.name for point in entry_points(group=GROUPS[kind][0])]
        if not is_code(name) and name not in named:
            raise InputError(
                f"method.name = {quoted(name)}; allowed: {', '.join([*known, *named])}, "
                'or your own, "file.py:Class"'
            )
        cls = found_class(kind, str(name))
    parameters = {key: value for key, value in table.items() if key not in apart}
    made: Strategy | Compressor = checked("method", cls, parameters, sorted(apart))
    if isinstance(made, Strategy):
        found = {key: inner(key, table[key]) for key in INNER if key in table}
        if rule := found.get("robust"):
            made = made.with_rules(rule)
        if mechanism := found.get("privacy"):
            made = made.with_privacy(mechanism)
        if optimizer := found.get("server"):
            try:
                made = made.with_server(optimizer)
            except ValueError as error:
                raise InputError(f"method.server: {error}") from None
    return made


def inner(key: str, table: Any) -> Any:
    """What the table `[method.KEY]` names; None for "none". Raises InputError."""
    known, where = INNER[key], f"method.{key}"
    if not isinstance(table, Mapping):
        raise InputError(f"{where} = {quoted(table)}: must be a table with a name")
    name = table.get("name")
    if not isinstance(name, str) or name not in ("none", *known):
        raise InputError(f"{where}.name = {quoted(name)}; allowed: none, {', '.join(known)}")
    parameters = {other: value for other, value in table.items() if other != "name"}
    if name != "none":
        return checked(where, known[name], parameters, ["name"])
    if parameters:
        raise InputError(f"unknown key {where}.{min(parameters)}; allowed in [{where}]: name")
    return None


def method_table(table: Mapping[str, Any], made: Strategy | Compressor) -> dict[str, Any]:
    """[method] with defaults included, of the object that it made."""
    tables = {}
    for key in INNER:
        if key in table:
            tables[key] = {"name": table[key]["name"], **parameters_of(inner(key, table[key]))}
    return {"name": table["name"], **parameters_of(made), **tables}


def parameters_of(
    made: Strategy | Compressor | UpdateRule | ServerOptimizer | Mechanism | None,
) -> dict[str, Any]:
    """The parameters of a checked dataclass, by the names that a recipe uses; none of None."""
    if made is None:
        return {}
    kind = TypeAdapter(type(made))
    found: dict[str, Any] = kind.dump_python(made, by_alias=True, exclude_none=True)
    return found
