"""Every key of a recipe, described once: what the reference, `sluiceway keys` and errors say.

A key's description is that of its field. Where a field has none, it is the paragraph of the class's
docstring (or a base's) that begins with the field's name: "mu: strength of the proximal term."
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Annotated, Any, Final

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

#: Limits of JSON schemas, and how they are said.
LIMITS: Final = {
    "exclusiveMinimum": "> {}",
    "minimum": ">= {}",
    "exclusiveMaximum": "< {}",
    "maximum": "<= {}",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        name: as in a recipe, without its table.
        kind: "integer", "number", "text", "true or false", "list", "table", or the allowed values.
        default: as TOML writes it; "" if there is none.
        allowed: the range, "" if any value of the type is.
        text: the description, one paragraph; "" if there is none.
        owner: the class that declares it.
    """

    name: str
    kind: str
    default: str
    allowed: str
    text: str
    owner: type[Any]

    def limits(self) -> str:
        """Type and range, for people."""
        return ", ".join(filter(None, (self.kind, self.allowed)))


def all_fields(cls: type[Any]) -> Mapping[str, FieldInfo]:
    """The fields of a pydantic model or dataclass by attribute."""
    found: Mapping[str, FieldInfo] = cls.__pydantic_fields__
    return found


def by_name(cls: type[Any]) -> dict[str, FieldInfo]:
    """The fields that a recipe may set, by the name that it uses."""
    return {
        str(info.validation_alias or attribute): info
        for attribute, info in all_fields(cls).items()
        if not info.exclude
    }


def keys_of(cls: type[Any]) -> list[Key]:
    """The keys of a table or a method, in their order."""
    return [key_of(cls, name, info) for name, info in by_name(cls).items()]


def key_of(cls: type[Any], name: str, info: FieldInfo) -> Key:
    """One field of a class as a key."""
    attribute = next(a for a, other in all_fields(cls).items() if other is info)
    owner = next(c for c in cls.__mro__ if attribute in inspect.get_annotations(c))
    checked: Any = getitem(Annotated, (info.annotation, None, *info.metadata))
    kind, allowed = described(TypeAdapter(checked).json_schema())
    default = "" if info.is_required() else toml(info.get_default(call_default_factory=True))
    text = " ".join((info.description or documented(cls, name)).split())
    return Key(name, kind, default, allowed, text, owner)


def documented(cls: type[Any], name: str) -> str:
    """What the docstring of a class or its bases says of a field, "" if nothing."""
    word = "|".join(sorted(map(re.escape, by_name(cls)), key=len, reverse=True))
    entry = re.compile(rf"(?:^\s*|\.\s+)((?:{word})(?:, (?:{word}))*):\s", re.MULTILINE)
    for base in cls.__mro__:
        for paragraph in re.split(r"\n\s*\n|\n\s*Args:\n", base.__dict__.get("__doc__") or ""):
            found = list(entry.finditer(paragraph))
            for match, after in zip(found, [*found[1:], None], strict=False):
                if name in match[1].split(", "):
                    text = paragraph[match.end() : after.start() if after else None]
                    return sentence(text)
    return ""


def sentence(text: str) -> str:
    """The text with a capital at its beginning and a full stop."""
    text = " ".join(text.split()).rstrip(".")
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def described(schema: Mapping[str, Any]) -> tuple[str, str]:
    """Type and range of a JSON schema, as people say them."""
    options = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    schema = options[0]
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return ", ".join(map(toml, values)), ""
    names = {"string": "text", "boolean": "true or false", "array": "list", "object": "table"}
    limits = [said.format(number(schema[key])) for key, said in LIMITS.items() if key in schema]
    kind = schema.get("type", "any")
    return names.get(kind, kind), ", ".join(limits)


def number(value: float) -> str:
    """A number, large powers as such."""
    if isinstance(value, int) and value >= 1 << 20:
        for base in (2, 10):
            for exponent in range(6, 65):
                if value in (base**exponent, base**exponent - 1):
                    return f"{base}^{exponent}" + (" - 1" if value < base**exponent else "")
    return f"{value:,}"


def toml(value: Any) -> str:
    """A plain value as TOML writes it; "" for none."""
    if value is None or value == {}:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return '"' + value.replace("\n", "\\n") + '"' if isinstance(value, str) else str(value)


def inner_class(cls: type[Any], path: Sequence[str]) -> type[Any] | None:
    """The class of the table at a path below a class, None if there is none."""
    for name in path:
        found = [info.annotation for key, info in by_name(cls).items() if key == name]
        if not found or not isinstance(found[0], type) or not issubclass(found[0], BaseModel):
            return None
        cls = found[0]
    return cls


def names_of(cls: type[Any], path: Sequence[str] = ()) -> list[str]:
    """The names of the keys in the table at a path below a class."""
    table = inner_class(cls, path)
    return list(by_name(table)) if table else []


def description(cls: type[Any], path: Sequence[str]) -> str:
    """The description of the key at a path below a class, "" if it has none."""
    table = inner_class(cls, path[:-1])
    if table is None:
        return ""
    return next((key.text for key in keys_of(table) if [key.name] == list(path[-1:])), "")
