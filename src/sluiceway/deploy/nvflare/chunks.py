"""Messages in chunks: files of any length cross in calls of a bounded one."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sluiceway.deploy.nvflare.names import CHUNK
from sluiceway.errors import quoted


class ChunkError(ValueError):
    """What came is not the next chunk of the message; one line."""


@dataclass(frozen=True)
class Chunk:
    """A part of a message, as it crosses.

    Attributes:
        data: at most `CHUNK` bytes.
        digest: BLAKE2b of the message from its beginning to the end of this chunk.
    """

    data: bytes
    digest: bytes

    def packed(self) -> dict[str, bytes]:
        """It as a table of bytes, which crosses without anything that could be executed."""
        return {"data": self.data, "digest": self.digest}


def chunks_of(path: Path, size: int = CHUNK) -> Iterator[Chunk]:
    """A file's chunks in order; an empty file has none."""
    running = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while data := file.read(size):
            running.update(data)
            yield Chunk(data, running.digest())


def chunk_from(found: Any) -> Chunk:
    """A chunk that came from elsewhere. Raises ChunkError."""
    if not isinstance(found, dict):
        raise ChunkError(f"{quoted(found)} is no chunk")
    data, digest = found.get("data"), found.get("digest")
    if not isinstance(data, bytes) or not isinstance(digest, bytes) or not data:
        raise ChunkError("a chunk must have data and a digest")
    return Chunk(data, digest)


@dataclass
class Inbox:
    """A file that chunks are put together in.

    Attributes:
        path: of the file; made anew.
        size: bytes of the whole message.
    """

    path: Path
    size: int
    arrived: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ChunkError(f"a message cannot have {self.size} bytes")
        if self.size > shutil.disk_usage(self.path.parent).free:
            raise ChunkError(f"there is no room for a message of {self.size} bytes")
        self._running = hashlib.blake2b(digest_size=32)
        self.path.write_bytes(b"")

    @property
    def complete(self) -> bool:
        return self.arrived == self.size

    def add(self, chunk: Chunk) -> None:
        """Append the next chunk. Raises ChunkError: it is not the next, damaged, or too much."""
        if self.arrived + len(chunk.data) > self.size:
            raise ChunkError(f"the message is longer than the {self.size} bytes it was to have")
        self._running.update(chunk.data)
        if self._running.digest() != chunk.digest:
            raise ChunkError(f"the message is damaged after byte {self.arrived}")
        with self.path.open("ab") as file:
            file.write(chunk.data)
        self.arrived += len(chunk.data)
