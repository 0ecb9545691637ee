"""A site in a federated run: it trains on its own data, and keeps its client state."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from sluiceway.core.head_start import write_sums
from sluiceway.core.messages import read_broadcast, write_update
from sluiceway.federated.client import Worker
from sluiceway.federated.head_sums import head_sums
from sluiceway.files import replacing, write_atomically
from sluiceway.transport.protocol import Request, Response

#: Runs besides the newest whose states a site keeps.
OTHER_RUNS = 3


class SiteError(ValueError):
    """A request that a site cannot fulfil; the message is one line."""


class ClientStateStore:
    """A client's state after each round, in files by run and round.

    A round that the server did not use, or that it forgot when it was restarted, has no effect:
    each request says after which round's state the client continues.

    Args:
        folder: for the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, run: str, number: int) -> dict[str, Tensor]:
        """The state after round `number`. Raises SiteError."""
        path = self.folder / run / f"{number}"
        if not path.is_file():
            raise SiteError(f"this site has no state of round {number} any more")
        return load_file(path)

    def save(
        self, run: str, number: int, state: Mapping[str, Tensor], keep: int, needed: int
    ) -> None:
        """Keep the state after round `number`.

        Args:
            keep: how many states of this run stay, >= 1; the newest other runs stay whole.
            needed: a round whose state stays in any case.
        """
        folder = self.folder / run
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{number}") as draft:
            save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, draft)
        rounds = sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)
        for old in rounds[max(keep, 1) :]:
            if old not in (number, needed):
                (folder / f"{old}").unlink()
        others = [other for other in self.folder.iterdir() if other != folder]
        for other in sorted(others, key=lambda p: p.stat().st_mtime)[:-OTHER_RUNS]:
            shutil.rmtree(other, ignore_errors=True)


class Trainer:
    """Trains as one client.

    Args:
        worker: model and data; the other clients' data may be empty.
        number: this client's.
        states: of this client.
        secret: from which the noise of a private run is drawn; b"" for what the recipe says.
        releases: answers with this client's data in one private run, at most.
    """

    def __init__(
        self,
        worker: Worker,
        number: int,
        states: ClientStateStore,
        secret: bytes = b"",
        releases: int = 0,
    ) -> None:
        self.worker = worker
        self.number = number
        self.states = states
        self.secret = secret
        self.releases = releases

    def draw_noise(self, run: str, what: bytes) -> None:
        """Draw the noise of an answer from the secret and all that was asked.

        So the same question is answered with the same noise, and no other is. A server that asks
        other questions than it needs gets no more of them answered than privacy was planned for.

        Raises:
            SiteError: there were too many.
        """
        private = self.worker.strategy.privacy
        if private is None or not self.secret or private.where != "client":
            return
        digest = hashlib.blake2b(what, key=self.secret, digest_size=32)
        path = self.states.folder / run / "answered"
        before = path.read_text().split() if path.exists() else []
        if digest.hexdigest() not in before:
            if len(before) >= self.releases:
                raise SiteError(
                    f"method.privacy: asked for more than the {self.releases} answers that the "
                    "recipe's epsilon is for"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "\n".join([*before, digest.hexdigest()]))
        private.key = digest.digest()

    def train(self, request: Request, folder: Path) -> Response:
        """Train from the packed broadcast to a packed update.

        Args:
            request: facts: "run", a name; "based", the round whose state to continue from, 0 for
                none; "personal", whether to evaluate the client's own model; "keep", states to
                keep.
            folder: for the update.

        Raises:
            SiteError: the state is not here. WireError: see `read_broadcast`.
        """
        if request.message is None:
            raise SiteError("asked to train without a model")
        facts = request.facts
        run, based, keep = run_name(facts), whole(facts, "based"), whole(facts, "keep")
        state = self.states.load(run, based) if based else {}
        broadcast = read_broadcast(request.message)
        with request.message.open("rb") as file:
            self.draw_noise(run, hashlib.file_digest(file, "sha256").digest())
        personal = bool(facts.get("personal"))
        update = self.worker.train(self.number, broadcast, state, personal=personal)
        path = folder / "update"
        write_update(path, update)
        if state:
            self.states.save(run, broadcast.round, state, keep, based)
        return Response({"kept": bool(state)}, path)

    def head_sums(self, request: Request, folder: Path) -> Response:
        """The client's sums for the head's closed-form start.

        Args:
            request: facts: "kind", "means" or "ridge"; "run", its name.
            folder: for the message.

        Raises:
            SiteError: another kind, or the model has no linear head.
        """
        kind = request.facts.get("kind")
        if kind not in ("means", "ridge") or not self.worker.layout.head:
            raise SiteError("asked for sums that this client cannot give")
        if self.secret:
            self.draw_noise(run_name(request.facts), kind.encode())
        path = folder / "sums"
        write_sums(path, head_sums(self.worker, self.number, kind))
        return Response(message=path)


def run_name(facts: Mapping[str, Any]) -> str:
    """The run's name, which becomes a folder's. Raises SiteError."""
    name = facts.get("run")
    if not isinstance(name, str) or not name.isalnum() or len(name) > 64:
        raise SiteError("the run has no name of letters and digits")
    return name


def whole(facts: Mapping[str, Any], name: str) -> int:
    """A fact that is an integer >= 0. Raises SiteError."""
    value = facts.get(name)
    if type(value) is not int or value < 0:
        raise SiteError(f"{name} must be an integer >= 0")
    return value
