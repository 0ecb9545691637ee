"""One request to one site, file by file in pieces, and its answer."""

from __future__ import annotations

import uuid
from pathlib import Path

from sluiceway.deploy.flower.chunks import Chunk, ChunkError, cut, length, put
from sluiceway.errors import line
from sluiceway.transport.protocol import Request, Response
from sluiceway.transport.worker_pool import TaskFailure


class Transfer:
    """What one site is asked, as far as it has come.

    First the request's file goes out in pieces; with the last of them the site does what it is
    asked, and answers with the first piece of its own file; the rest of that is then asked for.

    Args:
        ask: what is sent.
        node: Flower's id of the SuperNode.
        folder: for the file of the answer.
        piece: bytes of the request's file in one message, at most.

    Attributes:
        going: Flower's ids of messages that have no answer yet.
        done: how it ended, None before.
    """

    def __init__(self, ask: Request, node: int, folder: Path, piece: int) -> None:
        self.ask, self.node, self.piece = ask, node, piece
        self.size = length(ask.message)
        self.target = folder / uuid.uuid4().hex
        self.transfer = uuid.uuid4().hex
        self.going: list[str] = []
        self.done: Response | TaskFailure | None = None
        self.sent: int | None = None
        self.first: Chunk | None = None
        self.wanted = 0
        self.early: dict[int, Chunk] = {}

    def next(self) -> Chunk | None:
        """What is to be sent now; None while there is nothing."""
        if self.first is not None:
            return self._next_wanted(self.first)
        if self.sent is not None and self.sent >= self.size:
            return None
        offset = self.sent or 0
        data = cut(self.ask.message, offset, self.piece)
        self.sent = offset + len(data)
        chunk = Chunk(
            self.transfer, self.ask.what, self.ask.facts, self.size, offset, data, self.piece
        )
        if not data and not chunk.ends:
            self.fail(f"{self.ask.message} became shorter while it was sent")
            return None
        return chunk

    def _next_wanted(self, first: Chunk) -> Chunk | None:
        if self.wanted >= first.size:
            return None
        offset, self.wanted = self.wanted, self.wanted + len(first.piece)
        return Chunk(self.transfer, size=first.size, offset=offset, most=self.piece, more=True)

    def take(self, reply: Chunk) -> None:
        """Take one answer of the site. Raises ParcelError."""
        if reply.transfer != self.transfer:
            raise ChunkError("an answer to another request")
        if reply.fault:
            self.fail(line(reply.fault))
        elif reply.more and self.first is None:
            return  # a piece of ours has arrived, and is not the last
        elif self.first is None:
            self.first = reply
            self.wanted = len(reply.piece)
            self._keep(reply, reply)
        else:
            self.early[reply.offset] = reply
            while (following := self.early.pop(self.held(), None)) is not None:
                self._keep(self.first, following)

    def _keep(self, first: Chunk, reply: Chunk) -> None:
        """Put a piece behind the others, and end with the last."""
        if first.size < 0:
            self.done = Response(first.facts)
            return
        put(self.target, reply, first.size)
        if reply.ends:
            self.done = Response(first.facts, self.target)

    def held(self) -> int:
        """Bytes of the answer's file that are here."""
        return self.target.stat().st_size if self.target.exists() else 0

    def fail(self, why: str) -> None:
        """End it without an answer."""
        self.drop()
        self.done = TaskFailure(why)

    def drop(self) -> None:
        """Forget what came of the answer's file."""
        self.target.unlink(missing_ok=True)
