"""A site at home: its file says where its own data are; the recipe comes from the server.

[data]                      one of three:
path = "notes.parquet"      the site's own file, with text_column and label_column
name = "agnews"             the training part of a data set that has a name
share = true                this client's part of the recipe's own partition, for trials
"""

from __future__ import annotations

import json
import os
import threading
import tomllib
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, ValidationError, model_validator

from sluiceway.data import ChoiceData, TextData, TextDataset
from sluiceway.engines.carrying import Answer, Ask
from sluiceway.engines.local import standing
from sluiceway.engines.site import SiteError, Trainer
from sluiceway.experiment.errors import InputError, first_fault
from sluiceway.experiment.kinds import chosen_strategy, language_model, parts_of
from sluiceway.experiment.recipe import TABLE, Data, Recipe, Text, recipe_from
from sluiceway.experiment.run import usable_device
from sluiceway.experiment.session import Session, capped, load_texts
from sluiceway.federated.client import prepare
from sluiceway.federated.evaluation import label_counts
from sluiceway.federated.joining import Card

#: What is remembered of the newest joining, so that a site that was restarted can go on.
JOINED = "joined.json"


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


class Work(Protocol):
    """What a site does once it has joined."""

    def answer(self, ask: Ask, folder: Path) -> Answer:
        """Do what is asked; see `Site.answer`."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


def open_site(path: Path) -> HomeSite:
    """A site by its file. Raises InputError."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    known = {"": list(SiteFile.model_fields), "data": list(Own.model_fields)}
    try:
        return HomeSite(SiteFile.model_validate(tables), path.parent.resolve())
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error, '', known)}") from None


class HomeSite:
    """Joins runs and does their work; one request at a time.

    Args:
        file: what the site says of itself.
        place: folder that its paths are relative to.
    """

    def __init__(self, file: SiteFile, place: Path) -> None:
        self.file = file
        self.place = place
        self.folder = place / file.folder
        self.work: Work | None = None
        self._lock = threading.Lock()

    def answer(self, ask: Ask, folder: Path) -> Answer:
        """See `Site.answer`. "join" begins; the rest is the work's."""
        with self._lock:
            if ask.what == "join":
                return self.join(ask)
            if self.work is None:
                self.work, _ = self.begun(self.remembered())
            return self.work.answer(ask, folder)

    def join(self, ask: Ask) -> Answer:
        """Prepare for a run, and say what this site exchanges and how much it holds."""
        self.close()
        facts = dict(ask.facts)
        self.work, said = self.begun(facts)
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.folder / f"{JOINED}.new"
        fresh.write_text(json.dumps(facts), encoding="utf-8")
        os.replace(fresh, self.folder / JOINED)
        return Answer(said)

    def remembered(self) -> dict[str, Any]:
        """What the site was told when it last joined. Raises SiteError."""
        try:
            found = json.loads((self.folder / JOINED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise SiteError("this site has not joined") from None
        if not isinstance(found, dict):
            raise SiteError("this site has not joined")
        return found

    def begun(self, facts: dict[str, Any]) -> tuple[Work, dict[str, Any]]:
        """The work of a run, and what the server is told. Raises InputError, DataError."""
        invited = invitation(facts)
        return begin_federated(self.file, self.place, self.folder, invited)

    def close(self) -> None:
        """Leave the run."""
        if self.work is not None:
            self.work.close()
            self.work = None


@dataclass(frozen=True)
class Invitation:
    """What a site is told when it joins: the recipe, the classes' names, and its number."""

    recipe: Recipe
    label_names: tuple[str, ...]
    client: int


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
    return Invitation(checked, tuple(names), client)


class FederatedWork:
    """A client's training; see `Trainer`."""

    def __init__(self, trainer: Trainer, stack: ExitStack) -> None:
        self.trainer = trainer
        self.stack = stack

    def answer(self, ask: Ask, folder: Path) -> Answer:
        """Train. Raises SiteError for anything else."""
        if ask.what != "train":
            raise SiteError(f"a federated run has no {ask.what!r}")
        return self.trainer.train(ask, folder)

    def close(self) -> None:
        """Let go of the model."""
        self.stack.close()


def begin_federated(
    file: SiteFile, place: Path, folder: Path, invited: Invitation
) -> tuple[Work, dict[str, Any]]:
    """A site's part of a federated run."""
    recipe, device = invited.recipe, usable_device(file.device)
    if file.model is not None:
        chosen = recipe.model.model_copy(update={"name": str(place / file.model)})
        recipe = recipe.model_copy(update={"model": chosen})
    if device == "cpu":
        torch.set_num_threads(recipe.run.threads)
    model, train, test = own_examples(file.data, place, recipe, invited)
    strategy, training = chosen_strategy(recipe)
    prepare(model, strategy, recipe.data.clients)
    clients = [train.subset([]) for _ in range(recipe.data.clients)]
    clients[invited.client] = train
    stack = ExitStack()
    worker = stack.enter_context(
        standing(
            model,
            clients,
            test,
            strategy,
            training,
            loss=F.cross_entropy,
            device=torch.device(device),
            seed=recipe.run.seed,
        )
    )
    work = FederatedWork(Trainer(worker, invited.client, folder / "states"), stack)
    card = Card.of(strategy.tensors).to_json()
    return work, {"card": card, "label_counts": label_counts([train])[0].tolist()}


def own_examples(
    own: Own, place: Path, recipe: Recipe, invited: Invitation
) -> tuple[Any, TextDataset, TextDataset]:
    """The model, and what the site trains on and judges its own model by. Raises DataError."""
    session = Session()
    if own.share:
        data: TextData | ChoiceData = load_texts(recipe.data)
        model, train, test, _ = language_model(recipe, data, session)
        return model, train.subset(parts_of(recipe, data)[invited.client]), test
    data = named_texts(own, recipe) if own.name else own_texts(own, place, invited)
    require_names(data, invited)
    model, train, test, _ = language_model(recipe, data, session)
    return model, train, test


def own_texts(own: Own, place: Path, invited: Invitation) -> TextData:
    """Texts of the site's file; without `test_path` all are trained on. Raises DataError."""
    from sluiceway.data import load_own

    path = place / str(own.path)
    found = load_own(
        path,
        text_column=own.text_column,
        label_column=own.label_column,
        test_path=place / own.test_path if own.test_path else path,
        label_names=invited.label_names,
    )
    train, test = capped(found.train, found.test, Data(path="-", alpha=1, limit=own.limit))
    return replace(found, train=train, test=test if own.test_path else test.take([]))


def named_texts(own: Own, recipe: Recipe) -> TextData | ChoiceData:
    """A data set by name, all of its training part. Raises DataError."""
    wanted = Data(name=own.name, alpha=1, limit=own.limit, test_limit=recipe.data.test_limit)
    return load_texts(wanted)


def require_names(data: TextData | ChoiceData, invited: Invitation) -> None:
    """Raise InputError unless the data's classes are those of the run."""
    if tuple(data.label_names) != invited.label_names:
        raise InputError(
            f"the data's classes are {', '.join(data.label_names)[:200]}; the run's are "
            f"{', '.join(invited.label_names)[:200]}"
        )
