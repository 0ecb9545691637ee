"""The one list of methods: strategies, compressors and robust rules; and what [method] makes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from sluiceway.errors import InputError, quoted
from sluiceway.experiment.keys import sentence
from sluiceway.experiment.validation import checked
from sluiceway.split.compress import Compressor
from sluiceway.split.methods import METHODS
from sluiceway.strategies import ROBUST, STRATEGIES, Strategy, UpdateRule

#: What `method.robust.name` may be; "none" so that a comparison can leave it out.
RULES: dict[str, type[UpdateRule] | None] = {"none": None, **ROBUST}


#: Kinds of methods, and where a recipe names one.
KINDS = {
    "federated": "[method] of a federated run",
    "split": "[method] of a split run",
    "robust": "[method.robust], with any federated method",
}


@dataclass(frozen=True)
class Method:
    """A method as a recipe names it.

    Attributes:
        name: value of `method.name`, or of `method.robust.name`.
        kind: "federated", "split" or "robust".
        cls: its class.
        text: one line about it.
    """

    name: str
    kind: str
    cls: type[Any]
    text: str


def methods() -> list[Method]:
    """Every method: what `sluiceway methods` and the tables of the documentation show."""
    tables: dict[str, Mapping[str, type[Any]]] = {
        "federated": STRATEGIES,
        "split": METHODS,
        "robust": ROBUST,
    }
    return [
        Method(name, kind, cls, one_line(cls, kind))
        for kind, table in tables.items()
        for name, cls in table.items()
    ]


def one_line(cls: type[Any], kind: str) -> str:
    """What a method does: the first line of its class, or of a strategy's file after its name."""
    doc = sys.modules[cls.__module__].__doc__ if kind == "federated" else cls.__doc__
    first = (doc or "").strip().partition("\n")[0]
    return sentence(first.partition(": ")[2] or first if kind == "federated" else first)


def method_of(table: Mapping[str, Any], *, split: bool) -> Strategy | Compressor:
    """The strategy that [method] names, or in a split run the compressor. Raises InputError."""
    known: dict[str, type[Any]] = {**METHODS} if split else {**STRATEGIES}
    name, apart = table.get("name"), {"name"} if split else {"name", "robust"}
    if not isinstance(name, str) or name not in known:  # a list is not even hashable
        raise InputError(f"method.name = {quoted(name)}; allowed: {', '.join(known)}")
    parameters = {key: value for key, value in table.items() if key not in apart}
    made: Strategy | Compressor = checked("method", known[name], parameters, sorted(apart))
    if isinstance(made, Strategy) and "robust" in table:
        made = made.with_rules(*robust_rules(table["robust"]))
    return made


def robust_rules(table: Any) -> list[UpdateRule]:
    """The rule that [method.robust] names; none for "none". Raises InputError."""
    if not isinstance(table, Mapping):
        raise InputError(f"method.robust = {quoted(table)}: must be a table with a name")
    name = table.get("name")
    if not isinstance(name, str) or name not in RULES:
        raise InputError(f"method.robust.name = {quoted(name)}; allowed: {', '.join(RULES)}")
    parameters = {key: value for key, value in table.items() if key != "name"}
    rule = RULES[name]
    if rule is None:
        if parameters:
            raise InputError(
                f"unknown key method.robust.{min(parameters)}; allowed in [method.robust]: name"
            )
        return []
    made: UpdateRule = checked("method.robust", rule, parameters, ["name"])
    return [made]


def method_table(table: Mapping[str, Any], made: Strategy | Compressor) -> dict[str, Any]:
    """[method] with defaults included, of the object that it made."""
    robust = {}
    if "robust" in table:
        rules = made.rules if isinstance(made, Strategy) else ()
        parameters = {key: value for rule in rules for key, value in parameters_of(rule).items()}
        robust = {"robust": {"name": table["robust"]["name"], **parameters}}
    return {"name": table["name"], **parameters_of(made), **robust}


def parameters_of(made: Strategy | Compressor | UpdateRule) -> dict[str, Any]:
    """The parameters of a checked dataclass, by the names that a recipe uses."""
    kind = TypeAdapter(type(made))
    found: dict[str, Any] = kind.dump_python(made, by_alias=True, exclude_none=True)
    return found
