"""The client's half: takes asks from the server, hands them to the site, and answers."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare.collab import collab

from sluiceway.core.files import scratch_folder
from sluiceway.deploy.nvflare.chunks import Chunk, Inbox, chunks_of
from sluiceway.deploy.nvflare.names import KIT, PATIENCE, SITE, typed
from sluiceway.deploy.nvflare.worker_process import SiteProcess


@dataclass
class ClientTurn:
    """One ask at a site, from its first chunk to the last of the answer.

    Attributes:
        key: the server's name for it.
        folder: for its files.
        what, facts: see `Request`.
        inbox: where the message is put together; None if there is none.
        done: set once there is an answer.
        said: the answer, see `worker.answered`.
        chunks: what is left to take of the answer's message.
    """

    key: str
    folder: Path
    what: str
    facts: Any
    inbox: Inbox | None = None
    done: threading.Event = field(default_factory=threading.Event)
    said: dict[str, Any] = field(default_factory=dict)
    chunks: Iterator[Chunk] | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir()
        (self.folder / "answer").mkdir()

    @property
    def message(self) -> Path | None:
        return Path(self.said["message"]) if self.said.get("message") else None


class ClientExecutor:
    """Keeps one turn at a time; a new one ends what is left of the one before.

    Only str, int, float and bytes cross, in tables and lists; facts cross as JSON text.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._turn: ClientTurn | None = None

    @typed(collab.init)
    def open(self) -> None:
        """Called by NVFlare when the job starts."""
        self._home = SiteProcess(self.command())
        self._folder = self._stack.enter_context(scratch_folder())
        self._stack.callback(self._home.end)
        self._home.ready()

    def command(self) -> list[str]:
        """What starts the site's process; nothing that comes with a job has a say in it."""
        worker = [sys.executable, "-m", "sluiceway.deploy.nvflare.worker"]
        return [*worker, os.environ[SITE], os.environ[KIT]]

    @typed(collab.final)
    def close(self) -> None:
        """Called by NVFlare when the job ends."""
        self._stack.close()

    @typed(collab.publish)
    def give(self, key: str, what: str, facts: str, size: int, data: bytes, digest: bytes) -> None:
        """Begin a turn. `size` is that of the message, -1 for none; `data` its first chunk."""
        check_caller()
        with self._lock:
            self._drop()
            self._turn = turn = ClientTurn(key, self._folder / key, what, json.loads(facts))
            if size >= 0:
                turn.inbox = Inbox(turn.folder / "ask", size)
        self._more(turn, data, digest)

    @typed(collab.publish)
    def add(self, key: str, data: bytes, digest: bytes) -> None:
        """The next chunk of the message."""
        check_caller()
        self._more(self._current(key), data, digest)

    @typed(collab.publish)
    def wait(self, key: str) -> dict[str, Any]:
        """Whether the answer is there; says no after a while."""
        check_caller()
        turn = self._current(key)
        if not turn.done.wait(PATIENCE):
            return {"state": "busy"}
        if "lost" in turn.said:
            return {"state": "lost", "why": str(turn.said["lost"])}
        size = turn.message.stat().st_size if turn.message else -1
        return {"state": "done", "facts": json.dumps(turn.said["facts"]), "size": size}

    @typed(collab.publish)
    def take(self, key: str) -> dict[str, bytes]:
        """The next chunk of the answer's message."""
        check_caller()
        turn = self._current(key)
        assert turn.message is not None
        turn.chunks = turn.chunks or chunks_of(turn.message)
        return next(turn.chunks).packed()

    @typed(collab.publish)
    def drop(self, key: str) -> None:
        """The server needs no answer any more."""
        check_caller()
        with self._lock:
            if self._turn is not None and self._turn.key == key:
                self._drop()

    def _current(self, key: str) -> ClientTurn:
        turn = self._turn
        if turn is None or turn.key != key:
            raise ValueError("this site knows nothing of that turn")
        return turn

    def _drop(self) -> None:
        """Forget the turn; a site that is still at it is ended, for it could not be stopped."""
        turn, self._turn = self._turn, None
        if turn is None:
            return
        if not turn.done.is_set():
            self._home.end()
        shutil.rmtree(turn.folder, ignore_errors=True)

    def _more(self, turn: ClientTurn, data: bytes, digest: bytes) -> None:
        """Add a chunk; with the last one the site begins to work."""
        if turn.inbox is not None and data:
            turn.inbox.add(Chunk(data, digest))
        if turn.inbox is None or turn.inbox.complete:
            threading.Thread(target=self._work, args=(turn,), daemon=True).start()

    def _work(self, turn: ClientTurn) -> None:
        message = turn.inbox.path if turn.inbox else None
        turn.said = self._home.ask(turn.what, turn.facts, message, turn.folder / "answer")
        turn.done.set()


def check_caller() -> None:
    """Raise PermissionError unless the server calls: sites may reach each other too."""
    if collab.caller != "server":
        raise PermissionError("only the server may ask a site")
