"""What a site says of itself, and what it is told when it joins.

[data]                      one of three:
path = "notes.parquet"      the site's own file, with text_column and label_column
name = "agnews"             the training part of a data set that has a name
share = true                this client's part of the recipe's own partition, for trials
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, model_validator

from sluiceway.errors import InputError
from sluiceway.experiment.recipe import TABLE, Recipe, Text, recipe_from


class Own(BaseModel):
    """[data] of a site file: whose examples are trained on.

    path: a file of texts, with text_column and label_column; test_path: held-out texts of the
    site, by which its own model is judged. name: a data set by name. share: the client's part of
    the recipe's partition. limit: cap on the examples, stratified, 0 for none.
    """

    model_config = TABLE
    path: Text | None = None
    test_path: Text | None = None
    text_column: Text = "text"
    label_column: Text = "label"
    name: Text | None = None
    share: bool = False
    limit: int = Field(default=0, ge=0, le=10**12)

    @model_validator(mode="after")
    def one_source(self) -> Own:
        if (self.path is not None) + (self.name is not None) + self.share != 1:
            raise ValueError("give one of path, name and share = true")
        return self


class SiteFile(BaseModel):
    """What a site says of itself.

    data: see `Own`. folder: where it keeps what outlives a round, beside the file if relative.
    device: where it trains. model: the model's folder here, in place of the recipe's model.name.
    """

    model_config = TABLE
    data: Own
    folder: Text = "kept"
    device: Text = "auto"
    model: Text | None = None


@dataclass(frozen=True)
class Invitation:
    """What a site is told when it joins.

    Attributes:
        recipe: of the run.
        label_names: the classes' names, in the order of their codes.
        client: the site's number.
        gate: host and port to dial in a split run.
    """

    recipe: Recipe
    label_names: tuple[str, ...]
    client: int
    gate: tuple[str, int] | None


def invitation(facts: dict[str, Any]) -> Invitation:
    """The facts, checked. Raises InputError."""
    recipe, names, client = (facts.get(key) for key in ("recipe", "label_names", "client"))
    if not isinstance(recipe, dict):
        raise InputError("the server sent no recipe")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError("the server sent no names of classes")
    checked = recipe_from(recipe)
    if type(client) is not int or not 0 <= client < checked.data.clients:
        raise InputError(f"the server calls this client {client!r}")
    return Invitation(checked, tuple(names), client, gate_of(facts.get("gate")))


def gate_of(found: Any) -> tuple[str, int] | None:
    """Host and port, if the server names any. Raises InputError."""
    if found is None:
        return None
    host, port = (found.get(k) for k in ("host", "port")) if isinstance(found, dict) else (0, 0)
    if not isinstance(host, str) or type(port) is not int or not 0 < port < 1 << 16:
        raise InputError("the server sent no address that can be dialled")
    return host, port
