"""The ClientApp: hands what a ServerApp asks to the site on this machine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from sluiceway.deploy.flower.chunks import (
    NAME,
    PIECE_LIMIT,
    Chunk,
    ChunkError,
    cut,
    length,
    put,
)
from sluiceway.deploy.flower.site_daemon import in_a_line
from sluiceway.transport.protocol import ClientHandler, Request

#: Seconds after which what a broken-off run left behind is removed.
STALE: Final = 86_400


def site_app(
    opened: Callable[[Context], ClientHandler], room: Callable[[Context], Path]
) -> ClientApp:
    """A ClientApp in front of a site.

    Flower starts a process for every message, so the site is opened anew each time, and only when
    a request has wholly arrived. What must outlive a message is in files, or with a `SiteDaemon`.

    Args:
        opened: opens the site of a node.
        room: a folder of this node, for files that are on their way; made if it is not there.
    """
    app = ClientApp()

    @app.query("sluiceway")
    def answer(message: Message, context: Context) -> Message:
        chunk: Chunk | None = None
        try:
            chunk = Chunk.read(message.content)
            reply = ChunkHandler(room(context), lambda: opened(context)).handle(chunk)
        except Exception as error:
            # Not left to Flower, which would send the whole error to the server.
            transfer = chunk.transfer if chunk else "0" * 32
            reply = Chunk(transfer, fault=in_a_line(error))
        return Message(reply.packed(), reply_to=message)

    return app


class ChunkHandler:
    """Takes pieces in and gives pieces out.

    Args:
        room: folder for files that are on their way; several runs may share it.
        opened: opens the site.
    """

    def __init__(self, room: Path, opened: Callable[[], ClientHandler]) -> None:
        self.room = room
        self.opened = opened

    def handle(self, chunk: Chunk) -> Chunk:
        """Answer one message.

        Raises:
            ParcelError: it makes no sense here.
            Exception: the site cannot do what it is asked.
        """
        if not NAME.fullmatch(chunk.transfer):
            raise ChunkError("a transfer of another name")
        folder = self.room / chunk.transfer
        if chunk.more:
            return self.give(chunk, folder)
        coming = folder / "request"
        if chunk.offset == 0:
            sweep(self.room)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        if chunk.size >= 0:
            put(coming, chunk, chunk.size)
            if not chunk.ends:
                return Chunk(chunk.transfer, more=True)
        done = False
        try:
            reply = self.ask(chunk, coming if chunk.size >= 0 else None, folder)
            done = reply.size > len(reply.piece)
        finally:
            if not done:
                shutil.rmtree(folder, ignore_errors=True)
        return reply

    def ask(self, chunk: Chunk, message: Path | None, folder: Path) -> Chunk:
        """Let the site do it; its answer with the first piece of its file, the rest stays here."""
        home = folder / "answer"
        home.mkdir()
        answer = self.opened().answer(Request(chunk.what, chunk.facts, message), home)
        if message is not None:
            message.unlink()
        size = length(answer.message)
        first = cut(answer.message, 0, room_of(chunk))
        if answer.message is not None and size > len(first):
            answer.message.rename(folder / "rest")
        return Chunk(chunk.transfer, facts=answer.facts, size=size, piece=first)

    def give(self, chunk: Chunk, folder: Path) -> Chunk:
        """A further piece of an answer; after the last, nothing stays. Raises ParcelError."""
        path = folder / "rest"
        if not path.is_file() or not 0 < chunk.offset < chunk.size == length(path):
            raise ChunkError("a piece of a file that is not here")
        piece = cut(path, chunk.offset, room_of(chunk))
        reply = Chunk(chunk.transfer, size=chunk.size, offset=chunk.offset, piece=piece)
        if reply.ends:
            shutil.rmtree(folder, ignore_errors=True)
        return reply


def room_of(chunk: Chunk) -> int:
    """Bytes of a file that the answer may hold. Raises ParcelError."""
    if not 0 < chunk.most <= PIECE_LIMIT:
        raise ChunkError(f"pieces of {chunk.most} bytes; at most {PIECE_LIMIT}")
    return chunk.most


def sweep(room: Path) -> None:
    """Remove what was left behind by runs that broke off."""
    for left in room.glob("*") if room.is_dir() else ():
        if NAME.fullmatch(left.name) and time.time() - left.stat().st_mtime > STALE:
            shutil.rmtree(left, ignore_errors=True)
