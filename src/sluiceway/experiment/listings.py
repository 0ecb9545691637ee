"""Lists on the terminal: recipes, methods, and the keys of a recipe."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sluiceway.errors import InputError, quoted

if TYPE_CHECKING:
    from sluiceway.experiment.keys import Key


def show(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and what they are, wrapped where the output is a terminal."""
    wide = max(len(name) for name, _ in rows) + 2
    room = max(shutil.get_terminal_size((100, 0)).columns - wide, 30)
    for name, text in rows:
        first, *rest = textwrap.wrap(text, room) or [""]
        print(f"{name:{wide}}{first}".rstrip(), *(" " * wide + more for more in rest), sep="\n")


def show_methods(kind: str | None) -> None:
    """Print the methods and metrics with a line each. Raises InputError."""
    from sluiceway.experiment.methods import KINDS, found_methods, methods
    from sluiceway.experiment.own_metrics import listed_metrics

    if kind not in (None, *KINDS, "metric"):
        allowed = ", ".join([*KINDS, "metric"])
        raise InputError(f"{quoted(kind)} is no kind of method; allowed: {allowed}")
    for other, title in KINDS.items():
        if kind in (None, other):
            print(f"{title}:")
            listed = [*methods(), *found_methods()]
            show([(f"  {m.name}", m.text) for m in listed if m.kind == other])
    if kind in (None, "metric"):
        print("run.metric, of any run:")
        show([(f"  {name}", text) for name, text in listed_metrics()])


def show_keys(table: str | None) -> None:
    """Print the keys of a table or a method, or of all tables. Raises InputError."""
    from sluiceway.core.settings import SplitTraining
    from sluiceway.experiment.keys import keys_of
    from sluiceway.experiment.methods import methods
    from sluiceway.experiment.reference import TABLES, own_keys

    known: dict[str, tuple[str, type[Any]]] = {name: (name, cls) for name, cls in TABLES.items()}
    for method in methods():
        known[method.name] = (method.table, method.cls)
    if table is not None and table not in known:
        raise InputError(f"{quoted(table)} is no table or method; allowed: {', '.join(known)}")
    for prefix, cls in [known[table]] if table else [known[name] for name in TABLES]:
        keys = keys_of(cls)
        if prefix == "train":
            keys += own_keys(SplitTraining)
        rows = [(f"{prefix}.{key.name}", f"{key.text} {bounds(key)}") for key in keys]
        show(rows or [(table or "", "has no parameters")])


def bounds(key: Key) -> str:
    """Type, range and default in parentheses."""
    return f"({key.limits()}{f'; default {key.default}' if key.default else ''})"
