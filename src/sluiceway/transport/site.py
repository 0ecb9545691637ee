"""A site in a federated run: it trains on its own data, and keeps its client state."""

from __future__ import annotations

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
from sluiceway.files import replacing
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
    """

    def __init__(self, worker: Worker, number: int, states: ClientStateStore) -> None:
        self.worker = worker
        self.number = number
        self.states = states

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
        personal = bool(facts.get("personal")) and len(self.worker.test) > 0
        update = self.worker.train(self.number, broadcast, state, personal=personal)
        path = folder / "update"
        write_update(path, update)
        if state:
            self.states.save(run, broadcast.round, state, keep, based)
        return Response({"kept": bool(state)}, path)

    def head_sums(self, request: Request, folder: Path) -> Response:
        """The client's sums for the head's closed-form start.

        Args:
            request: facts: "kind", "means" or "ridge".
            folder: for the message.

        Raises:
            SiteError: another kind, or the model has no linear head.
        """
        kind = request.facts.get("kind")
        if kind not in ("means", "ridge") or not self.worker.layout.head:
            raise SiteError("asked for sums that this client cannot give")
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
