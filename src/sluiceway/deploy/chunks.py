"""Files of any length in messages of bounded length: the protocol that every engine carries.

For each request to a site the server has a `Transfer`, and the site a `ChunkHandler`. The request's
file is sent in chunks; with the last one the site handles the request; then the server fetches the
response's file in chunks. An engine carries the two parts of a chunk, a JSON header and bytes, and
whatever it carries, memory stays that of a chunk. NVFlare's own file streaming is not used: its
receiver takes any number of bytes from the sender, and Flower would still need chunks of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from sluiceway.errors import described, line, quoted
from sluiceway.transport.framing import FrameError, parse
from sluiceway.transport.protocol import ClientHandler, Request, Response, TaskFailure

#: Version of the header; a reader rejects any other.
LAYOUT: Final = 1
#: Longest file (1 TiB) and longest chunk (1 GiB), in bytes.
FILE_LIMIT: Final = 1 << 40
CHUNK_LIMIT: Final = 1 << 30
#: Seconds after which files of an interrupted transfer are removed.
STALE: Final = 86_400
TRANSFER: Final = re.compile(r"[0-9a-f]{32}")


class ChunkError(ValueError):
    """A message that is not the expected chunk; one line."""


class SiteFailure(Exception):
    """A site's error in place of a response, in one line."""


@dataclass(frozen=True)
class Chunk:
    """One message of a transfer.

    Attributes:
        transfer: its id, 32 hexadecimal digits.
        kind: of the server: "send" a chunk of the request, "fetch" one of the response, "wait" for
            the response, "cancel". Of the site: "received", "busy", "response", "error".
        what: the request's name.
        facts: of the request or the response; of an error, "why".
        size: bytes of the whole file; -1 where there is none.
        offset: in the file, of `data`.
        data: bytes of the file.
        most: bytes of the file that a reply may have, in [0, CHUNK_LIMIT].
    """

    transfer: str
    kind: str = "send"
    what: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    size: int = -1
    offset: int = 0
    data: bytes = b""
    most: int = 0

    @property
    def last(self) -> bool:
        """Whether the file ends with this chunk."""
        return self.offset + len(self.data) >= self.size

    def header(self) -> str:
        """All but the data, as a JSON object with a checksum of the data."""
        fields = {name: getattr(self, name) for name in FIELDS if name != "digest"}
        return json.dumps({**fields, "layout": LAYOUT, "digest": digest(self.data)})

    @classmethod
    def read(cls, header: str, data: bytes) -> Self:
        """The inverse of `header`. Raises ChunkError."""
        try:
            fields = parse(header)
        except FrameError as error:
            raise ChunkError(f"a header that is {error}") from None
        if (layout := fields.pop("layout", None)) != LAYOUT:
            raise ChunkError(
                f"messages of layout {quoted(layout)}, this side reads {LAYOUT}: "
                "install the same release of Sluiceway on both"
            )
        if {name: type(value) for name, value in fields.items()} != FIELDS:
            raise ChunkError("a header with other fields")
        if fields.pop("digest") != digest(data):
            raise ChunkError(f"data damaged after byte {fields['offset']}")
        chunk = cls(**fields, data=data)
        if not TRANSFER.fullmatch(chunk.transfer):
            raise ChunkError(f"transfer {quoted(chunk.transfer)} is not an id")
        if not 0 <= chunk.most <= CHUNK_LIMIT:
            raise ChunkError(f"chunks of {chunk.most} bytes; at most {CHUNK_LIMIT}")
        return chunk


#: Types of a header's fields.
FIELDS: Final = {
    "transfer": str,
    "kind": str,
    "what": str,
    "facts": dict,
    "size": int,
    "offset": int,
    "most": int,
    "digest": str,
}


def digest(data: bytes) -> str:
    """A checksum (BLAKE2b)."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def length(path: Path | None) -> int:
    """Bytes of a file, 0 if it does not exist; -1 for None."""
    if path is None:
        return -1
    return path.stat().st_size if path.exists() else 0


def read_at(path: Path | None, offset: int, most: int) -> bytes:
    """Up to `most` bytes of a file from `offset` on; none for None."""
    if path is None:
        return b""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(most)


def append(path: Path, chunk: Chunk, size: int) -> None:
    """Append a chunk to its file.

    Args:
        path: has what came before; need not exist yet.
        size: bytes of the whole file, as the first chunk said.

    Raises:
        ChunkError: the chunk is not the next one, or the file is too long.
    """
    held = length(path)
    end = chunk.offset + len(chunk.data)
    if not 0 <= size <= FILE_LIMIT or chunk.size != size:
        raise ChunkError(f"a file of {chunk.size} bytes, where {size} were announced")
    if chunk.offset != held or end > size or (not chunk.data and size > held):
        raise ChunkError(f"bytes {chunk.offset} to {end} of a file of {size}, {held} are here")
    if not held and size > shutil.disk_usage(path.parent).free:
        raise ChunkError(f"not enough disk space for a file of {size} bytes")
    with path.open("ab") as file:
        file.write(chunk.data)


class Transfer:
    """A request to one site and its response, at the server.

    Args:
        request: what is sent.
        folder: for the file of the response.
        chunk: bytes of a chunk, at most.
        first: of the first chunk, so that a site that does not answer is noticed early.
        eager: the response comes with its first chunk; else that is fetched like the others.

    Attributes:
        id: of the transfer.
        result: None until it has ended.
    """

    def __init__(
        self,
        request: Request,
        folder: Path,
        chunk: int,
        *,
        first: int | None = None,
        eager: bool = True,
    ) -> None:
        self.request, self.chunk, self.eager = request, chunk, eager
        self.id = uuid.uuid4().hex
        self.result: Response | TaskFailure | None = None
        self._size = length(request.message)
        self._path = folder / self.id
        self._first = min(first or chunk, chunk)
        self._sent: int | None = None
        self._response: Chunk | None = None
        self._fetched = 0
        self._early: dict[int, Chunk] = {}

    def next(self) -> Chunk | None:
        """The next message to the site; None while there is none to send."""
        if self.result is not None:
            return None
        if self._response is not None:
            if self._fetched >= self._response.size:
                return None
            offset, self._fetched = self._fetched, self._fetched + self.chunk
            size = self._response.size
            return Chunk(self.id, "fetch", size=size, offset=offset, most=self.chunk)
        if self._sent is not None and self._sent >= self._size:
            return None
        offset = self._sent or 0
        data = read_at(self.request.message, offset, self.chunk if offset else self._first)
        self._sent = offset + len(data)
        if not data and self._sent < self._size:
            self.fail(f"{self.request.message} became shorter while it was sent")
            return None
        what, facts = self.request.what, self.request.facts
        most = self.chunk if self.eager else 0
        return Chunk(self.id, "send", what, facts, self._size, offset, data, most)

    def take(self, reply: Chunk) -> None:
        """Take a reply of the site. Raises ChunkError."""
        if reply.transfer != self.id:
            raise ChunkError("a reply of another transfer")
        if reply.kind == "error":
            self.fail(line(str(reply.facts.get("why"))))
        elif reply.kind == "response" and self._response is None:
            self._response, self._fetched = reply, len(reply.data)
            if reply.size < 0:
                self.result = Response(reply.facts)
            elif reply.data or not reply.size:
                self._append(reply)
        elif reply.kind == "response":
            self._early[reply.offset] = reply
            while following := self._early.pop(length(self._path), None):
                self._append(following)

    def _append(self, chunk: Chunk) -> None:
        assert self._response is not None
        append(self._path, chunk, self._response.size)
        if chunk.last:
            self.result = Response(self._response.facts, self._path)

    def fail(self, why: str) -> None:
        """End it without a response."""
        self._path.unlink(missing_ok=True)
        self.result = TaskFailure(why)


class ChunkHandler:
    """The site's side of transfers; what it has of one is in files.

    Args:
        folder: for files of transfers; several runs may share it.
        opened: opens the site, once a request has arrived whole.
    """

    def __init__(self, folder: Path, opened: Callable[[], ClientHandler]) -> None:
        self.folder = folder
        self.opened = opened

    def handle(self, chunk: Chunk) -> Chunk:
        """The reply to a chunk.

        Raises:
            ChunkError: it does not fit what is here.
            Exception: of the site.
        """
        folder = self.folder / chunk.transfer
        if chunk.kind == "fetch":
            return self._fetch(chunk, folder)
        if chunk.kind != "send":
            raise ChunkError(f"a message of kind {quoted(chunk.kind)}")
        path = folder / "request" if chunk.size >= 0 else None
        if chunk.offset == 0:
            remove_stale(self.folder)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        if path is not None:
            append(path, chunk, chunk.size)
            if not chunk.last:
                return Chunk(chunk.transfer, "received")
        kept = False
        try:
            reply = self._respond(chunk, path, folder)
            kept = not reply.last
        finally:
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)
        return reply

    def _respond(self, chunk: Chunk, path: Path | None, folder: Path) -> Chunk:
        """Have the site handle the request; what the reply cannot hold stays in `folder`."""
        made = folder / "response"
        made.mkdir()
        response = self.opened().handle(Request(chunk.what, chunk.facts, path), made)
        if path is not None:
            path.unlink()
        size, data = length(response.message), read_at(response.message, 0, chunk.most)
        if response.message is not None and size > len(data):
            response.message.rename(folder / "rest")
        return Chunk(chunk.transfer, "response", facts=response.facts, size=size, data=data)

    def _fetch(self, chunk: Chunk, folder: Path) -> Chunk:
        """A further chunk of a response; after the last one its file is removed."""
        path = folder / "rest"
        if not path.is_file() or not 0 <= chunk.offset < chunk.size == length(path):
            raise ChunkError("a chunk of a file that is not here")
        data = read_at(path, chunk.offset, chunk.most)
        reply = Chunk(chunk.transfer, "response", size=chunk.size, offset=chunk.offset, data=data)
        if reply.last:
            shutil.rmtree(folder, ignore_errors=True)
        return reply


def replied(header: str, data: bytes, handle: Callable[[Chunk], Chunk]) -> Chunk:
    """The reply of `handle` to a message; of an error only its one line."""
    transfer = "0" * 32
    try:
        chunk = Chunk.read(header, data)
        transfer = chunk.transfer
        return handle(chunk)
    except Exception as error:
        why = str(error) if isinstance(error, SiteFailure) else described(error)
        return Chunk(transfer, "error", facts={"why": why})


def remove_stale(folder: Path) -> None:
    """Remove what interrupted runs have left."""
    for left in folder.glob("*"):
        if TRANSFER.fullmatch(left.name) and time.time() - left.stat().st_mtime > STALE:
            shutil.rmtree(left, ignore_errors=True)
