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
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import ValidationError

from sluiceway.core.evaluation import label_counts
from sluiceway.core.handshake import ModelSignature
from sluiceway.data import ChoiceData, TextData, TextDataset
from sluiceway.deploy.site_file import Invitation, Own, SiteFile, invitation
from sluiceway.deploy.split_work import begin_split
from sluiceway.errors import InputError
from sluiceway.experiment.builders import (
    chosen_strategy,
    language_model,
    parts_of,
    usable_device,
)
from sluiceway.experiment.recipe import Data, Recipe
from sluiceway.experiment.session import Session, capped, load_texts
from sluiceway.experiment.validation import first_fault
from sluiceway.federated.client import prepare
from sluiceway.transport.local import standing
from sluiceway.transport.protocol import Request, Response
from sluiceway.transport.site import ClientStateStore, SiteError, Trainer
from sluiceway.transport.tls import Credentials

#: What is remembered of the newest joining, so that a site that was restarted can go on.
JOINED = "joined.json"


class Work(Protocol):
    """What a site does once it has joined."""

    def answer(self, ask: Request, folder: Path) -> Response:
        """Do what is asked; see `ClientHandler.answer`."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


def open_site(path: Path, keys: Credentials | None = None) -> HomeSite:
    """A site by its file.

    Args:
        path: of the file.
        keys: by which it proves who it is on a line of its own, needed for split learning.

    Raises:
        InputError: the file is not there, or says what cannot be.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    try:
        return HomeSite(SiteFile.model_validate(tables), path.parent.resolve(), keys)
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error, SiteFile)}") from None


class HomeSite:
    """Joins runs and does their work; one request at a time.

    Args:
        file: what the site says of itself.
        place: folder that its paths are relative to.
        keys: see `open_site`.
    """

    def __init__(self, file: SiteFile, place: Path, keys: Credentials | None = None) -> None:
        self.file = file
        self.keys = keys
        self.place = place
        self.folder = place / file.folder
        self.work: Work | None = None
        self._lock = threading.Lock()

    def answer(self, ask: Request, folder: Path) -> Response:
        """See `ClientHandler.answer`. "join" begins; the rest is the work's."""
        with self._lock:
            if ask.what == "join":
                return self.join(ask)
            if self.work is None:
                self.work, _ = self.begun(self.remembered())
            return self.work.answer(ask, folder)

    def join(self, ask: Request) -> Response:
        """Prepare for a run, and say what this site exchanges and how much it holds."""
        self.close()
        facts = dict(ask.facts)
        self.work, said = self.begun(facts)
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.folder / f"{JOINED}.new"
        fresh.write_text(json.dumps(facts), encoding="utf-8")
        os.replace(fresh, self.folder / JOINED)
        return Response(said)

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
        invited, device = invitation(facts), usable_device(self.file.device)
        if invited.recipe.run.kind == "split":
            return begin_split(self.file, self.folder, invited, device, self.keys, self.forget)
        return begin_federated(self.file, self.place, self.folder, invited, device)

    def resume(self) -> None:
        """Go on with a run that this site was in when it was restarted, if it was in one."""
        with self._lock:
            if self.work is None and (self.folder / JOINED).exists():
                self.work, _ = self.begun(self.remembered())

    def forget(self) -> None:
        """The run has ended."""
        (self.folder / JOINED).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leave the run."""
        if self.work is not None:
            self.work.close()
            self.work = None


class FederatedWork:
    """A client's training; see `Trainer`."""

    def __init__(self, trainer: Trainer, stack: ExitStack) -> None:
        self.trainer = trainer
        self.stack = stack

    def answer(self, ask: Request, folder: Path) -> Response:
        """Train. Raises SiteError for anything else."""
        if ask.what != "train":
            raise SiteError(f"a federated run has no {ask.what!r}")
        return self.trainer.train(ask, folder)

    def close(self) -> None:
        """Let go of the model."""
        self.stack.close()


def begin_federated(
    file: SiteFile, place: Path, folder: Path, invited: Invitation, device: str
) -> tuple[Work, dict[str, Any]]:
    """A site's part of a federated run."""
    recipe = invited.recipe
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
    work = FederatedWork(
        Trainer(worker, invited.client, ClientStateStore(folder / "states")), stack
    )
    card = ModelSignature.of(strategy.tensors).to_json()
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
    return found.with_tables(train, test if own.test_path else test.take([]))


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
