"""The reference of every recipe key as Markdown: `python -m sluiceway.experiment.reference`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from sluiceway.core.settings import Optimisation, SplitTraining, Training
from sluiceway.experiment.keys import Key, keys_of
from sluiceway.experiment.methods import KINDS, Method, methods
from sluiceway.experiment.recipe import Compare, Data, Model, Run
from sluiceway.experiment.tables import OLD_KEYS

#: The tables with fixed keys. [train] has those of `Training`; of a split run `SplitTraining`.
TABLES: dict[str, type[Any]] = {
    "run": Run,
    "data": Data,
    "model": Model,
    "train": Training,
    "compare": Compare,
}
INTRODUCTION = """\
# Every key of a recipe

A recipe is a TOML file with the tables below. `sluiceway run RECIPE --set table.key=value` sets a
key; `sluiceway keys` prints these texts on a terminal. A key that is not given has its default.
"""


def reference() -> str:
    """The whole reference."""
    return "\n".join([INTRODUCTION, *tables_text(), *methods_text(), *old_keys_text()])


def tables_text() -> Iterator[str]:
    """Every table with fixed keys."""
    for table, cls in TABLES.items():
        yield f"## [{table}]\n"
        yield first_line(cls) + "\n"
        yield markdown_table(keys_of(cls), table)
        if cls is Training:
            fewer = [key.name for key in keys_of(cls) if key.owner is not Optimisation]
            yield f"A split run has none of: {', '.join(f'`{name}`' for name in fewer)}. It has:\n"
            yield markdown_table(own_keys(SplitTraining), table)


def own_keys(cls: type[Any]) -> list[Key]:
    """The keys of a table that its bases do not have."""
    return [key for key in keys_of(cls) if key.owner is cls]


def methods_text() -> Iterator[str]:
    """Every method; a parameter is described where it is declared."""
    for kind, title in KINDS.items():
        mine = [method for method in methods() if method.kind == kind]
        yield f"## {title}\n"
        for method in mine:
            key = method.table
            yield f'### `{key}.name = "{method.name}"`\n'
            yield f"{method.text}\n"
            own, inherited = split_keys(method, mine)
            if own:
                yield markdown_table(own, key)
            for name, names in inherited.items():
                yield f"Also, as for `{name}`: {', '.join(f'`{n}`' for n in names)}.\n"


def methods_table(kind: str) -> str:
    """The methods of a kind, one line each, as a Markdown table."""
    rows = [f"| `{m.name}` | {m.text.rstrip('.')} |" for m in methods() if m.kind == kind]
    return "\n".join(["| `method.name` | |", "|---|---|", *rows]) + "\n"


def split_keys(method: Method, known: Iterable[Method]) -> tuple[list[Key], dict[str, list[str]]]:
    """The keys to describe with a method, and by an earlier method's name those described there."""
    own: list[Key] = []
    inherited: dict[str, list[str]] = {}
    for key in keys_of(method.cls):
        earlier = next(other for other in known if issubclass(other.cls, key.owner))
        if earlier is method or key not in keys_of(earlier.cls):
            own.append(key)
        else:
            inherited.setdefault(earlier.name, []).append(key.name)
    return own, inherited


def old_keys_text() -> Iterator[str]:
    """The keys that were renamed."""
    yield "## Renamed keys\n\nThe old names are still accepted.\n"
    yield "| old | now |\n|---|---|"
    yield from (f"| `{old}` | `{new}` |" for old, new in OLD_KEYS.items())


def markdown_table(keys: Iterable[Key], table: str) -> str:
    """The keys of a table as a Markdown table."""
    rows = ["| key | type and range | default | |", "|---|---|---|---|"]
    for key in keys:
        default = f"`{key.default}`" if key.default else ""
        cells = (f"`{table}.{key.name}`", key.limits(), default, key.text)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def first_line(cls: type[Any]) -> str:
    """The first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


if __name__ == "__main__":
    print(reference())
