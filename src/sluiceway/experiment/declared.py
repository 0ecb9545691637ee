"""A mistyped key of [method] or [train] is said at once: what may be there is read, not imported.

The classes that these tables make need torch, which takes seconds to import. Their fields are read
from the source instead. Whatever cannot be read is left to the classes themselves.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import sluiceway
from sluiceway.errors import InputError
from sluiceway.experiment.validation import unknown_key

#: Tables and names inside of [method] besides a method's parameters.
BESIDES: Final = {"federated": ("name", "privacy", "robust", "server"), "split": ("name",)}
#: The class that [train] makes.
TRAINING: Final = {"federated": "Training", "split": "SplitTraining"}
#: Where the classes are.
SOURCES: Final = {
    "federated": ("core/settings.py", "strategies/*.py"),
    "split": ("core/settings.py", "split/*.py"),
}


def require_known_keys(kind: str, method: Mapping[str, Any], train: Mapping[str, Any]) -> None:
    """Raise InputError for a key of [method] or [train] that no class has.

    Args:
        kind: of the run, "federated" or "split".
        method, train: the tables.
    """
    besides = BESIDES[kind]
    if not train and not method.keys() - set(besides):
        return
    classes = Sources(kind)
    require(train, "train", fields(classes, TRAINING[kind]), ())
    named = classes.named(str(method.get("name")))
    if len(named) == 1:
        require(method, "method", fields(classes, named[0]), besides)


def require(
    table: Mapping[str, Any], where: str, known: Mapping[str, str] | None, besides: Sequence[str]
) -> None:
    """Raise InputError for a key that is neither a field, by either name, nor one besides."""
    if known is None:
        return
    allowed = [*besides, *known.values()]
    for key in table:
        if key not in allowed and key not in known:
            raise InputError(unknown_key(where, key, allowed))


class Sources(Mapping[str, ast.ClassDef]):
    """The classes of a kind's sources by name; none where the source is not there as files.

    A file is parsed when one of its classes is asked for: parsing all of them takes longer than
    everything else that a mistyped key needs.
    """

    def __init__(self, kind: str) -> None:
        root = Path(sluiceway.__file__).parent
        files = [file for pattern in SOURCES[kind] for file in sorted(root.glob(pattern))]
        self.texts = [file.read_text("utf-8") for file in files]
        self.holders = {
            name: number
            for number, text in enumerate(self.texts)
            for name in re.findall(r"^class (\w+)", text, re.MULTILINE)
        }
        self.parsed: dict[int, dict[str, ast.ClassDef]] = {}

    def __getitem__(self, name: str) -> ast.ClassDef:
        number = self.holders[name]
        if number not in self.parsed:
            body = ast.parse(self.texts[number]).body
            self.parsed[number] = {n.name: n for n in body if isinstance(n, ast.ClassDef)}
        return self.parsed[number][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.holders)

    def __len__(self) -> int:
        return len(self.holders)

    def named(self, method: str) -> list[str]:
        """The classes that a recipe names so."""
        said = re.compile(rf"name: .*= ['\"]{re.escape(method)}['\"]")
        holders = {number for number, text in enumerate(self.texts) if said.search(text)}
        return [c for c in self if self.holders[c] in holders and name_of(self[c]) == method]


def fields(classes: Mapping[str, ast.ClassDef], name: str) -> dict[str, str] | None:
    """A checked dataclass's fields, and by which name a recipe has them, in their order.

    None for a class that is not among those read.
    """
    if name not in classes:
        return None
    found: dict[str, str] = {}
    for base in reversed(classes[name].bases):
        if isinstance(base, ast.Name):
            found |= fields(classes, base.id) or {}
    if any(
        "dataclass" in ast.unparse(d) or "checked" in ast.unparse(d)
        for d in classes[name].decorator_list
    ):
        found |= dict(own_fields(classes[name]))
    return found


def own_fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """The fields that a class itself declares."""
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        if "ClassVar" in ast.unparse(line.annotation):
            continue
        given = line.value.keywords if isinstance(line.value, ast.Call) else []
        values = {word.arg: word.value for word in given}
        if "exclude" in values:
            continue
        alias = values.get("alias", values.get("validation_alias"))
        attribute = line.target.id
        yield attribute, str(alias.value) if isinstance(alias, ast.Constant) else attribute


def name_of(node: ast.ClassDef) -> str | None:
    """The name that a recipe gives a method: `name: ClassVar[str] = "fedavg"`."""
    for line in node.body:
        if (
            isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and line.target.id == "name"
            and isinstance(line.value, ast.Constant)
        ):
            return str(line.value.value)
    return None
