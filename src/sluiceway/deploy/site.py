"""A site: its file says where its own data are; the recipe comes from the server.

[data]                      one of three:
path = "notes.parquet"      the site's own file, with text_column and label_column
name = "agnews"             the training part of a data set that has a name
share = true                this client's part of the recipe's own partition, to try a deployment
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from sluiceway.core.evaluation import label_counts
from sluiceway.core.handshake import ModelSignature
from sluiceway.core.privacy import arrange_privacy, releases_of, told
from sluiceway.core.trial import try_model
from sluiceway.data import ChoiceData, TextData, local_tests
from sluiceway.data.own import found_files
from sluiceway.deploy.site_file import (
    Invitation,
    OwnData,
    SiteFile,
    invitation,
    require_allowed,
    require_policy,
    toml_of,
)
from sluiceway.deploy.site_images import named_data, own_images, within
from sluiceway.deploy.split_site import begin_split
from sluiceway.errors import InputError, quoted
from sluiceway.experiment.builders import (
    AnyDataset,
    chosen_network,
    chosen_strategy,
    language_model,
    parts_of,
    usable_device,
)
from sluiceway.experiment.own_code import code_file, is_code, placed
from sluiceway.experiment.recipe import Data, Recipe
from sluiceway.experiment.session import Session, capped, load_texts
from sluiceway.experiment.validation import first_fault
from sluiceway.federated.client import prepare
from sluiceway.files import write_atomically
from sluiceway.transport.local import standing
from sluiceway.transport.protocol import ClientHandler, Request, Response
from sluiceway.transport.site import ClientStateStore, SiteError, Trainer
from sluiceway.transport.tls import Credentials

#: File with the newest join request, by which a site that was restarted continues.
JOINED = "joined.json"
#: Log of all that left the site: a line of JSON for each answer, without its content.
SENT = "sent.jsonl"


class RunHandler(ClientHandler, Protocol):
    """Handles the requests of a run that the site has joined."""

    def close(self) -> None:
        """Release what it holds."""
        ...


def open_site(path: Path, keys: Credentials | None = None) -> Site:
    """A site by its file.

    Args:
        path: of the file.
        keys: of the site, needed for split learning.

    Raises:
        InputError: the file cannot be read, or a setting cannot be used.
    """
    try:
        file = SiteFile.model_validate(toml_of(path))
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error, SiteFile)}") from None
    model = code_file(file.model) if is_code(file.model) else file.model
    named = {
        "data.path": file.data.path,
        "data.test_path": file.data.test_path,
        "model": None if model is None else str(model),
    }
    for key, value in named.items():
        if value is not None and not all(
            f.exists() for f in found_files(within(path.parent, value))
        ):
            raise InputError(f"{path}: {key} = {quoted(value)}: there is no such file")
    usable_device(file.device)
    return Site(file, path.parent.resolve(), keys)


class Site(ClientHandler):
    """Joins runs and handles their requests, one at a time.

    Args:
        file: the site's settings.
        place: folder that its paths are relative to.
        keys: see `open_site`.
    """

    def __init__(self, file: SiteFile, place: Path, keys: Credentials | None = None) -> None:
        self.file = file
        self.keys = keys
        self.place = place
        self.folder = place / file.folder
        self.run: RunHandler | None = None
        self._lock = threading.Lock()

    def handle(self, request: Request, folder: Path) -> Response:
        """See `ClientHandler.handle`. "join" joins a run; the run handles the rest."""
        with self._lock:
            if request.what == "join":
                return self.logged(request, self.join(request))
            if self.run is None:
                self.run, _ = self.begin(self.remembered())
            return self.logged(request, self.run.handle(request, folder))

    def logged(self, request: Request, response: Response) -> Response:
        """The response, once a line of the site's log says that it leaves."""
        message = response.message
        entry: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "asked": request.what,
            "run": request.facts.get("run"),
            "facts": dict(response.facts),
            "bytes": 0 if message is None else message.stat().st_size,
        }
        if message is not None:
            with message.open("rb") as file:
                entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / SENT).open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        return response

    def join(self, request: Request) -> Response:
        """Prepare for a run; the response has the model signature and the label counts."""
        self.close()
        facts = dict(request.facts)
        self.run, reported = self.begin(facts)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / JOINED, json.dumps(facts))
        return Response(reported)

    def remembered(self) -> dict[str, Any]:
        """The facts of the newest join request. Raises SiteError."""
        try:
            found = json.loads((self.folder / JOINED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise SiteError("this site has not joined")
        return found

    def begin(self, facts: dict[str, Any]) -> tuple[RunHandler, dict[str, Any]]:
        """A run's handler, and what the server gets. Raises InputError, DataError."""
        model = placed("model.name", self.file.model, self.place)
        code = model if is_code(model) else None
        invited, device = invitation(facts, code), usable_device(self.file.device)
        recipe, file = invited.recipe, self.file
        if file.model is not None:
            chosen = recipe.model.model_copy(update={"name": "minilm"})  # it is not read
            recipe = recipe.model_copy(update={"model": chosen})
        folders = [self.place / folder for folder in file.recipe_files]
        require_allowed(recipe, folders, data=file.data.share)
        found = self.prepared(invited, device)
        try:
            require_policy(invited.recipe, file.policy, sum(found[1]["label_counts"]))
        except InputError:
            found[0].close()
            raise
        return found

    def prepared(self, invited: Invitation, device: str) -> tuple[RunHandler, dict[str, Any]]:
        """A run's handler, and what the server gets. Raises InputError, DataError."""
        if invited.recipe.run.kind == "split":
            given = self.file, self.place, self.folder, invited, device
            return begin_split(*given, self.keys, self.leave)
        return begin_federated(self.file, self.place, self.folder, invited, device)

    def resume(self) -> None:
        """Continue the run that this site had joined when it was restarted, if there is one."""
        with self._lock:
            if self.run is None and (self.folder / JOINED).exists():
                self.run, _ = self.begin(self.remembered())

    def leave(self) -> None:
        """The run has ended."""
        (self.folder / JOINED).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Release what the run holds."""
        if self.run is not None:
            self.run.close()
            self.run = None


class FederatedRun(RunHandler):
    """A client's training; see `Trainer`."""

    def __init__(self, trainer: Trainer, stack: ExitStack) -> None:
        self.trainer = trainer
        self.stack = stack

    def handle(self, request: Request, folder: Path) -> Response:
        """Train, or give sums for the head's start. Raises SiteError for anything else."""
        if request.what == "head-sums":
            return self.trainer.head_sums(request, folder)
        if request.what != "train":
            raise SiteError(f"a federated run has no {request.what!r}")
        return self.trainer.train(request, folder)

    def close(self) -> None:
        self.stack.close()


def begin_federated(
    file: SiteFile, place: Path, folder: Path, invited: Invitation, device: str
) -> tuple[RunHandler, dict[str, Any]]:
    """A site's part of a federated run."""
    recipe = invited.recipe
    if file.model is not None and not is_code(file.model):
        chosen = recipe.model.model_copy(update={"name": str(place / file.model)})
        recipe = recipe.model_copy(update={"model": chosen})
    if device == "cpu":
        torch.set_num_threads(recipe.run.threads)
    model, train, test = own_examples(file.data, place, recipe, invited)
    strategy, training = chosen_strategy(recipe)
    device_here = torch.device(device)
    prepare(model.to(device_here), strategy, recipe.data.clients)
    arrange_privacy(strategy, model, recipe.run.rounds, recipe.head_start)
    train, own_test = with_own_test(file.data, recipe, train, test)
    clients, tests = ([train.subset([]) for _ in range(recipe.data.clients)] for _ in range(2))
    clients[invited.client], tests[invited.client] = train, own_test
    if shown := next((held for held in (train, own_test) if len(held)), None):
        try_model(
            model,
            clients,
            shown,
            "accuracy",
            device_here,
            layout=strategy.layout,
            training=training,
            must=True,
        )
    stack = ExitStack()
    worker = stack.enter_context(
        standing(
            model,
            clients,
            test,
            strategy,
            training,
            loss=F.cross_entropy,
            device=device_here,
            seed=recipe.run.seed,
            personal_examples=recipe.run.personal,
            local_tests=tests if recipe.data.local_test else None,
        )
    )
    store = ClientStateStore(folder / "states")
    releases = releases_of(strategy, recipe.run.rounds, recipe.head_start)
    # A trial on the recipe's own data gives the numbers of a run on one machine.
    secret = b"" if file.data.share else own_secret(folder)
    trainer = Trainer(worker, invited.client, store, secret, releases)
    signature = ModelSignature.of(strategy.tensors).to_json()
    counts = told(label_counts([train]), strategy)[0].tolist()
    return FederatedRun(trainer, stack), {"signature": signature, "label_counts": counts}


def with_own_test(
    own: OwnData, recipe: Recipe, train: AnyDataset, test: AnyDataset
) -> tuple[Any, Any]:
    """What a site trains on, and its own test part, which the recipe's data.local_test asks for.

    Args:
        train, test: its examples, and those of the test_path that its file may name.
    """
    if recipe.data.local_test and own.test_path:
        return train, test
    rows = np.arange(len(train))
    settings = recipe.data.local_test, recipe.data.seed
    (kept,), (held_out,) = local_tests(train.labels.numpy(), [rows], *settings)
    return train.subset(kept), train.subset(held_out)


def own_secret(folder: Path) -> bytes:
    """The site's secret, for noise: 32 bytes in a file that its owner alone can read."""
    path = folder / "secret"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, secrets.token_hex(32), mode=0o600)
    return bytes.fromhex(path.read_text())


def own_examples(
    own: OwnData, place: Path, recipe: Recipe, invited: Invitation
) -> tuple[Any, AnyDataset, AnyDataset]:
    """The model, the site's training data, and its own test data. Raises DataError."""
    session = Session()
    if recipe.images:
        pictures, test_pictures = own_images(own, place, invited, augment=False)
        network = chosen_network(recipe, pictures.shape, len(invited.label_names))
        return network, pictures, test_pictures
    if own.share:
        data: TextData | ChoiceData = load_texts(recipe.data)
        model, train, test, _ = language_model(recipe, data, session)
        return model, train.subset(parts_of(recipe, data)[invited.client]), test
    data = load_texts(named_data(own, invited)) if own.name else own_texts(own, place, invited)
    if tuple(data.label_names) != invited.label_names:
        raise InputError(
            f"the data's classes are {', '.join(data.label_names)[:200]}; the run's are "
            f"{', '.join(invited.label_names)[:200]}"
        )
    model, train, test, _ = language_model(recipe, data, session)
    return model, train, test


def own_texts(own: OwnData, place: Path, invited: Invitation) -> TextData:
    """Texts of the site's file, all for training without `test_path`.

    Raises:
        DataError, InputError: see `load_own`, `OwnData.taken`.
    """
    from sluiceway.data import load_own

    assert own.path is not None
    path = within(place, own.path)
    found = load_own(
        path,
        text_column=own.text_column,
        label_column=own.label_column,
        test_path=within(place, own.test_path) if own.test_path else path,
        label_names=invited.label_names,
        encoding=own.encoding,
        classes=own.taken(invited),
    )
    train, test = capped(found.train, found.test, Data(path="-", alpha=1, limit=own.limit))
    return found.with_tables(train, test if own.test_path else test.take([]))
