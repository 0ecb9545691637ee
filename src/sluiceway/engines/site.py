"""What a site does in a federated run: it trains on its own data and keeps what is its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from sluiceway.engines.carrying import Answer, Ask
from sluiceway.federated.client import Worker
from sluiceway.federated.wire import read_broadcast, write_update

#: Runs of which a site keeps its states, beside the newest.
OTHER_RUNS = 3


class SiteError(ValueError):
    """What a site was asked for cannot be done; the message is one line."""


class Trainer:
    """Trains as one client; what it keeps from round to round lies in files, by run and round.

    A round that the server did not use, or that it forgot when it was restarted, leaves no trace:
    each request says from which round on the client's states stand.

    Args:
        worker: model and data; its clients but this one may be empty.
        number: this client's.
        states: folder for what is kept.
    """

    def __init__(self, worker: Worker, number: int, states: Path) -> None:
        self.worker = worker
        self.number = number
        self.states = states

    def train(self, ask: Ask, folder: Path) -> Answer:
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
        kept = self.states / safe_name(ask.facts)
        based, keep = whole(ask.facts, "based"), whole(ask.facts, "keep")
        state = {}
        if based:
            before = kept / f"{based}"
            if not before.is_file():
                raise SiteError(f"what this site kept of round {based} is gone")
            state = load_file(before)
        broadcast = read_broadcast(ask.message)
        personal = bool(ask.facts.get("personal")) and len(self.worker.test) > 0
        update = self.worker.train(self.number, broadcast, state, personal=personal)
        path = folder / "update"
        write_update(path, update)
        if state:
            kept.mkdir(parents=True, exist_ok=True)
            fresh = kept / "fresh"
            save_file({name: t.contiguous() for name, t in state.items()}, fresh)
            os.replace(fresh, kept / f"{broadcast.round}")
            self.tidy(kept, keep, {based, broadcast.round})
        return Answer({"kept": bool(state)}, path)

    def tidy(self, kept: Path, keep: int, needed: set[int]) -> None:
        """Remove the oldest states of this run, and all of runs that are long gone."""
        rounds = sorted((int(p.name) for p in kept.iterdir() if p.name.isdigit()), reverse=True)
        for old in rounds[max(keep, 1) :]:
            if old not in needed:
                (kept / f"{old}").unlink()
        others = sorted(
            (p for p in self.states.iterdir() if p != kept), key=lambda p: p.stat().st_mtime
        )
        for other in others[:-OTHER_RUNS]:
            shutil.rmtree(other, ignore_errors=True)


def safe_name(facts: Mapping[str, Any]) -> str:
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
