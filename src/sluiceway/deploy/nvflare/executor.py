"""The client's half of a job: takes chunks from the server, and has the site handle requests."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nvflare.collab import collab

from sluiceway.deploy.chunks import Chunk, ChunkError, ChunkHandler, replied
from sluiceway.deploy.nvflare.kits import read_kit
from sluiceway.deploy.nvflare.names import KIT, SITE, WAIT, typed
from sluiceway.deploy.site_process import SiteProcess, site_command
from sluiceway.files import scratch_folder


class ClientExecutor:
    """Handles one transfer at a time; a new one ends what is left of the one before.

    Only text, numbers and bytes cross.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._transfer = ""
        self._reply: Future[Chunk] | None = None

    @typed(collab.init)
    def open(self) -> None:
        """Called by NVFlare when the job starts."""
        folder = self._stack.enter_context(scratch_folder())
        log = Path(os.environ[SITE]).with_name("process.log")
        self._site = SiteProcess(self.command(folder), folder, log)
        self._stack.callback(self._site.end)
        self._handler = ChunkHandler(folder / "transfers", lambda: self._site)
        self._site.start()

    def command(self, folder: Path) -> list[str]:
        """What starts the site's process; a job cannot change it."""
        keys = read_kit(Path(os.environ[KIT])).keys
        return site_command(Path(os.environ[SITE]), folder, parent=os.getpid(), keys=keys)

    @typed(collab.final)
    def close(self) -> None:
        """Called by NVFlare when the job ends."""
        self._stack.close()

    @typed(collab.publish)
    def exchange(self, header: str, data: bytes) -> dict[str, Any]:
        """Take a chunk, and reply with one; see `Chunk.header`."""
        if collab.caller != "server":  # sites could call each other too
            raise PermissionError("only the server may call a site")
        reply = replied(header, data, self.handle)
        return {"header": reply.header(), "data": reply.data}

    def handle(self, chunk: Chunk) -> Chunk:
        """The reply to a chunk; "busy" while the site works. Raises what the site does."""
        with self._lock:
            if chunk.transfer != self._transfer:
                if chunk.kind != "send" or chunk.offset:
                    raise ChunkError("this site does not know that transfer")
                self._cancel()
                self._transfer = chunk.transfer
            if chunk.kind == "cancel":
                self._cancel()
                return Chunk(chunk.transfer, "received")
        if chunk.kind == "send" and chunk.last:
            reply: Future[Chunk] = Future()
            self._reply = reply
            threading.Thread(target=self._work, args=(chunk, reply), daemon=True).start()
        elif chunk.kind != "wait":
            return self._handler.handle(chunk)
        elif self._reply is not None:
            try:
                return self._reply.result(WAIT)
            except TimeoutError:
                pass
        return Chunk(chunk.transfer, "busy")

    def _work(self, chunk: Chunk, reply: Future[Chunk]) -> None:
        try:
            reply.set_result(self._handler.handle(chunk))
        except Exception as error:
            reply.set_exception(error)

    def _cancel(self) -> None:
        """Forget the transfer; a site that is still at work is killed, since it cannot be asked."""
        if self._reply is not None and not self._reply.done():
            self._site.end()
        shutil.rmtree(self._handler.folder, ignore_errors=True)
        self._transfer, self._reply = "", None
