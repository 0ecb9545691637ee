"""What a site does in a federated run: it trains on its own data and keeps what is its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from sluiceway.core.messages import read_broadcast, write_update
from sluiceway.federated.client import Worker
from sluiceway.transport.protocol import Request, Response

#: Runs of which a site keeps its states, beside the newest.
OTHER_RUNS = 3


class SiteError(ValueError):
    """What a site was asked for cannot be done; the message is one line."""


class ClientStateStore:
    """What a site keeps from round to round, in files by run and round.

    A round that the server did not use, or that it forgot when it was restarted, leaves no trace:
    each request says from which round on the site's state stands.

    Args:
        folder: for the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, run: str, number: int) -> dict[str, Tensor]:
        """The state as it was after round `number`. Raises SiteError."""
        path = self.folder / run / f"{number}"
        if not path.is_file():
            raise SiteError(f"what this site kept of round {number} is gone")
        return load_file(path)

    def save(
        self, run: str, number: int, state: Mapping[str, Tensor], keep: int, needed: int
    ) -> None:
        """Keep the state after round `number`.

        Args:
            keep: how many of this run stay, >= 1; of other runs the newest stay whole.
            needed: a round that stays in any case.
        """
        room = self.folder / run
        room.mkdir(parents=True, exist_ok=True)
        fresh = room / "fresh"
        save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, fresh)
        os.replace(fresh, room / f"{number}")
        rounds = sorted((int(p.name) for p in room.iterdir() if p.name.isdigit()), reverse=True)
        for old in rounds[max(keep, 1) :]:
            if old not in (number, needed):
                (room / f"{old}").unlink()
        others = [other for other in self.folder.iterdir() if other != room]
        for other in sorted(others, key=lambda p: p.stat().st_mtime)[:-OTHER_RUNS]:
            shutil.rmtree(other, ignore_errors=True)


class Trainer:
    """Trains as one client.

    Args:
        worker: model and data; its clients but this one may be empty.
        number: this client's.
        kept: what it keeps from round to round.
    """

    def __init__(self, worker: Worker, number: int, kept: ClientStateStore) -> None:
        self.worker = worker
        self.number = number
        self.kept = kept

    def train(self, ask: Request, folder: Path) -> Response:
        """Train from the packed broadcast to a packed update.

        Args:
            ask: facts: "run", a name; "based", the round whose state stands, 0 for none;
                "personal", whether to judge the client's own model; "keep", states to keep.
            folder: for the update.

        Raises:
            SiteError: the state is not here. WireError: see `read_broadcast`.
        """
        if ask.message is None:
            raise SiteError("asked to train without a model")
        run, based, keep = (
            name_of_run(ask.facts),
            whole(ask.facts, "based"),
            whole(ask.facts, "keep"),
        )
        state = self.kept.load(run, based) if based else {}
        broadcast = read_broadcast(ask.message)
        personal = bool(ask.facts.get("personal")) and len(self.worker.test) > 0
        update = self.worker.train(self.number, broadcast, state, personal=personal)
        path = folder / "update"
        write_update(path, update)
        if state:
            self.kept.save(run, broadcast.round, state, keep, based)
        return Response({"kept": bool(state)}, path)


def name_of_run(facts: Mapping[str, Any]) -> str:
    """The run's name, which becomes a folder's. Raises SiteError."""
    name = facts.get("run")
    if not isinstance(name, str) or not name.isalnum() or len(name) > 64:
        raise SiteError("the run has no name of letters and digits")
    return name


def whole(facts: Mapping[str, Any], name: str) -> int:
    """A fact that is a whole number from 0. Raises SiteError."""
    value = facts.get(name)
    if type(value) is not int or value < 0:
        raise SiteError(f"{name} must be a whole number from 0")
    return value
