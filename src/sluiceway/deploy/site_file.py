"""The settings of a site, and what the server sends when it joins.

[data]                      one of three:
path = "notes.parquet"      the site's own file, with text_column and label_column
name = "agnews"             the training part of a data set that has a name
share = true                this client's part of the recipe's own partition, to try a deployment
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, Field, model_validator

from sluiceway.errors import InputError, quoted
from sluiceway.experiment.own_code import is_code
from sluiceway.experiment.recipe import TABLE, Files, Recipe, Text, recipe_from
from sluiceway.files import listed


class OwnData(BaseModel):
    """[data] of a site file: the examples to train on.

    path: tables of texts, with text_column and label_column, or folders or tables of images, as
    data.path of a recipe; encoding: of tables; image_column: of tables of images; test_path:
    held-out examples of the site, on which its own model is evaluated; classes: labels of `path`
    whose examples alone are used, by name, all by default (labels are numbered as the run's,
    whatever is named here). name: a data set by name. share: the client's part of the recipe's
    partition. limit: cap on the examples, stratified, 0 for none.
    """

    model_config = TABLE
    path: Files | None = None
    test_path: Files | None = None
    encoding: Text = "utf-8"
    image_column: Text | None = None
    text_column: Text = "text"
    label_column: Text = "label"
    classes: tuple[Text, ...] | None = Field(default=None, min_length=1, max_length=65_536)
    name: Text | None = None
    share: bool = False
    limit: int = Field(default=0, ge=0, le=10**12)

    @model_validator(mode="after")
    def one_source(self) -> OwnData:
        if (self.path is not None) + (self.name is not None) + self.share != 1:
            raise ValueError("give one of path, name and share = true")
        if self.classes is not None and self.path is None:
            raise ValueError("data.classes of a site file needs data.path")
        return self

    def taken(self, invited: Invitation) -> set[str] | None:
        """The labels of `path` whose rows are used in a run, None for all.

        They are those of `classes`, and where the recipe has data.classes those of the run alone,
        so that a recipe takes the same rows here as it does where all data are.

        Raises:
            InputError: `classes` names one that the run does not have; the run merges labels.
        """
        if invited.recipe.data.coarse:
            raise InputError(
                "data.coarse merges labels of a data set that both sides have; a site's own files "
                "are numbered by the names of the run's classes, which they do not have then"
            )
        names = set(invited.label_names)
        chosen = None if self.classes is None else set(self.classes)
        if invited.recipe.data.classes is not None:
            return names if chosen is None else names & chosen
        if chosen is not None and (unknown := sorted(chosen - names)):
            raise InputError(
                f"the site file's data.classes has {quoted(unknown[0])}, which is no class of the "
                f"run: {', '.join(invited.label_names)[:200]}"
            )
        return chosen


class Policy(BaseModel):
    """[policy] of a site file: the runs that a site takes part in.

    least_examples: that it must hold. methods: names that method.name may have, all by default.
    schedules: names that run.schedule may have in a split run, all by default. epsilon: a run's
    epsilon with noise at the client, at most; a run without any is refused then.
    """

    model_config = TABLE
    least_examples: int = Field(default=1, ge=0, le=10**12)
    methods: list[Text] | None = None
    schedules: list[Text] | None = None
    epsilon: float | None = Field(default=None, gt=0)


class SiteFile(BaseModel):
    """The settings of a site.

    data: see `OwnData`. policy: see `Policy`. folder: for client states, relative to the file.
    device: where it trains. model: in place of the recipe's model.name the model's folder here, or
    the code that makes it, "file.py:make", both relative to the file.
    recipe_files: folders of this machine from which a recipe may name files, none by default.
    """

    model_config = TABLE
    data: OwnData
    policy: Policy = Field(default_factory=Policy)
    recipe_files: list[Text] = Field(default_factory=list)
    folder: Text = "kept"
    device: Text = "auto"
    model: Text | None = None


@dataclass(frozen=True)
class Invitation:
    """What the server sends when a site joins.

    Attributes:
        recipe: of the run.
        label_names: the classes' names, in the order of their codes.
        client: the site's number.
        endpoint: host and port of the server in a split run.
    """

    recipe: Recipe
    label_names: tuple[str, ...]
    client: int
    endpoint: tuple[str, int] | None


def invitation(facts: dict[str, Any], model: str | None = None) -> Invitation:
    """The facts, checked.

    Args:
        facts: of the server.
        model: code of the site that makes its model; see `recipe_from`.

    Raises:
        InputError: they cannot be used; the recipe names code.
    """
    recipe, names, client = (facts.get(key) for key in ("recipe", "label_names", "client"))
    if not isinstance(recipe, dict):
        raise InputError("the server sent no recipe")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError("the server sent no names of classes")
    checked = recipe_from(recipe, model=model)
    if type(client) is not int or not 0 <= client < checked.data.clients:
        raise InputError(f"the server calls this client {client!r}")
    return Invitation(checked, tuple(names), client, endpoint_of(facts.get("endpoint")))


def endpoint_of(found: Any) -> tuple[str, int] | None:
    """Host and port, if the server names any. Raises InputError."""
    if found is None:
        return None
    host, port = (found.get(k) for k in ("host", "port")) if isinstance(found, dict) else (0, 0)
    if not isinstance(host, str) or type(port) is not int or not 0 < port < 1 << 16:
        raise InputError("the server sent no host and port")
    return host, port


def require_allowed(recipe: Recipe, folders: Sequence[str | Path], *, data: bool = True) -> None:
    """Refuse a recipe from elsewhere that names files of this machine outside of these folders.

    Args:
        folders: absolute, or relative to the working directory.
        data: whether its data.path would be read here.

    Raises:
        InputError: which key names what.
    """
    named = [
        ("model.name", recipe.model.name),
        ("model.gguf", recipe.model.gguf),
        ("model.pretrained", recipe.model.pretrained),
    ]
    for key in ("path", "test_path") if data else ():
        named += [(f"data.{key}", file) for file in listed(getattr(recipe.data, key))]
    roots = [Path(folder).resolve() for folder in folders]
    for key, value in named:
        here = (
            value is not None
            and not is_code(value)
            and (  # code is this machine's own
                key.startswith("data.") or value.startswith(("/", ".", "~")) or Path(value).exists()
            )
        )
        if here and not any(Path(str(value)).resolve().is_relative_to(root) for root in roots):
            raise InputError(
                f"{key} = {quoted(value)} names a file of this machine, which a recipe from "
                "elsewhere may not: see `recipe_files` of a site file, `start --files` of a server"
            )


def require_policy(recipe: Recipe, policy: Policy, examples: int) -> None:
    """Refuse a run that the site's policy does not allow. Raises InputError."""
    if examples < policy.least_examples:
        raise InputError("the site's policy: it holds fewer than its least number of examples")
    method = str(recipe.method.get("name"))
    if policy.methods is not None and method not in policy.methods:
        raise InputError(f"the site's policy does not allow method.name = {quoted(method)}")
    split = recipe.run.kind == "split"
    if split and policy.schedules is not None and recipe.run.schedule not in policy.schedules:
        raise InputError(f"the site's policy does not allow run.schedule = {recipe.run.schedule!r}")
    if policy.epsilon is not None:
        cost = epsilon_of(recipe)
        if cost > policy.epsilon * (1 + 1e-6):
            raise InputError(
                f"the site's policy allows an epsilon of {policy.epsilon:g} with noise at the "
                f"client, and this run's is {cost:.3g}"
            )


def epsilon_of(recipe: Recipe) -> float:
    """What a run costs a client against the server, at most; infinity without noise there."""
    from sluiceway.core.privacy import releases_of
    from sluiceway.strategies import Strategy

    strategy = recipe.built()
    private = strategy.privacy if isinstance(strategy, Strategy) else None
    if private is None or private.where != "client":
        return float("inf")
    assert isinstance(strategy, Strategy)
    releases = releases_of(strategy, recipe.run.rounds, recipe.head_start)
    private.setup(releases)
    return private.spent(releases)


def toml_of(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises InputError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None


def write_site_file(folder: Path, device: str, model: str | None = None) -> Path:
    """Write a file for a site whose data are its client's part of the recipe's own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "site.toml"
    # On a machine of one's own a recipe may name any file, and clients may hold nothing.
    tables: dict[str, Any] = {"device": device, "recipe_files": ["/"], "data": {"share": True}}
    tables["policy"] = {"least_examples": 0}
    if model is not None and is_code(model):
        tables["model"] = model
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path
