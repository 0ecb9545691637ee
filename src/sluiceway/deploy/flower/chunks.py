"""What a Flower message holds: a piece of one of our files, and the few facts beside it.

Flower takes a message apart into objects of 5 MB for the wire, but every process on the way holds a
message whole, two or three times over. So a long file crosses in several messages, and memory stays
that of a piece, whatever the model. The bytes cross as one `uint8` array: `ArrayRecord` itself
refuses bfloat16, and wants the same names from everyone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from sluiceway.errors import line, quoted

#: Of what is in a message; a reader refuses any other.
LAYOUT: Final = 1
#: Longest file in bytes, 1 TiB; as `federated.wire.MESSAGE_LIMIT`, which would import torch.
FILE_LIMIT: Final = 1 << 40
#: Longest JSON text of the facts, 1 MiB.
FACTS_LIMIT: Final = 1 << 20
#: Bytes of a file in one message. More takes memory: about three times as much in each process.
PIECE: Final = 256 << 20
PIECE_LIMIT: Final = 1 << 30

HEADER, DATA = "sluiceway", "file"
#: How the array's bytes are to be read, for whoever looks at it with Flower's own tools.
STYPE: Final = "sluiceway.bytes"
NAME: Final = re.compile(r"[0-9a-f]{32}")


class ChunkError(Exception):
    """A message that is none of ours; one line."""


@dataclass(frozen=True)
class Chunk:
    """One Flower message's content.

    Attributes:
        transfer: 32 hexadecimal digits, the same for all that belongs to one request.
        what: the request's name; "" in an answer.
        facts: small values, ready for JSON.
        size: bytes of the whole file; -1 where there is none.
        offset: where in the file this piece begins.
        piece: bytes of the file, at most as long as the sender's piece.
        most: bytes of a file that an answer may hold, at most `PIECE_LIMIT`.
        more: asks for the answer's file from `offset` on, of which a first piece came; in an
            answer, that the rest of the request's file is waited for.
        fault: why the site could not answer; "" if it could.
    """

    transfer: str
    what: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    size: int = -1
    offset: int = 0
    piece: bytes = b""
    most: int = PIECE
    more: bool = False
    fault: str = ""

    @property
    def ends(self) -> bool:
        """Whether nothing of the file is left to come after this."""
        return self.offset + len(self.piece) >= self.size

    def packed(self) -> RecordDict:
        """As a Flower message's content."""
        header = ConfigRecord(
            {
                "layout": LAYOUT,
                "transfer": self.transfer,
                "what": self.what,
                "facts": json.dumps(self.facts),
                "size": self.size,
                "offset": self.offset,
                "most": self.most,
                "more": self.more,
                "fault": self.fault,
            }
        )
        content = RecordDict({HEADER: header})
        if self.piece:
            content[DATA] = array_record(self.piece)
        return content

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """The inverse of `packed`. Raises ParcelError."""
        header = content.get(HEADER)
        if not isinstance(header, ConfigRecord):
            raise ChunkError("a message without a header of Sluiceway")
        if header.get("layout") != LAYOUT:
            raise ChunkError(
                f"messages of layout {quoted(header.get('layout'))}, this side reads {LAYOUT}: "
                "install the same release of Sluiceway on both"
            )
        kinds = {key: type(value) for key, value in header.items() if key != "layout"}
        if kinds != FIELDS:
            raise ChunkError("a header with other fields")
        found: dict[str, Any] = {key: header[key] for key in FIELDS}
        found |= {"facts": facts_of(found["facts"]), "piece": piece_of(content)}
        return cls(**found)


#: Types of a header's fields.
FIELDS: Final = {
    "transfer": str,
    "what": str,
    "facts": str,
    "size": int,
    "offset": int,
    "most": int,
    "more": bool,
    "fault": str,
}


def facts_of(text: str) -> dict[str, Any]:
    """Facts from JSON. Raises ParcelError."""
    if len(text) > FACTS_LIMIT:
        raise ChunkError(f"facts of {len(text)} characters; at most {FACTS_LIMIT}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ChunkError(f"facts that are no JSON ({line(str(error), 80)})") from None
    if not isinstance(found, dict):
        raise ChunkError("facts that are no table")
    return found


def array_record(data: bytes) -> ArrayRecord:
    """Bytes as one array, which is not copied."""
    return ArrayRecord({"bytes": Array("uint8", (len(data),), STYPE, data)})


def bytes_of(record: Any) -> bytes:
    """The inverse of `array_record`. Raises ParcelError."""
    array = record.get("bytes") if isinstance(record, ArrayRecord) else None
    if array is None or len(record) != 1 or array.stype != STYPE:
        raise ChunkError("an array record that is not one of bytes")
    return bytes(array.data)


def piece_of(content: RecordDict) -> bytes:
    """The piece in a message's content. Raises ParcelError."""
    return bytes_of(content[DATA]) if DATA in content else b""


def cut(path: Path | None, offset: int, most: int) -> bytes:
    """Up to `most` bytes of a file from an offset on; none of no file."""
    if path is None:
        return b""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(most)


def length(path: Path | None) -> int:
    """Bytes of a file; -1 for none."""
    return -1 if path is None else path.stat().st_size


def put(path: Path, chunk: Chunk, whole: int, limit: int = FILE_LIMIT) -> None:
    """Append a piece to the file that it belongs to.

    Args:
        path: holds what came before it; need not exist yet.
        whole: bytes of the whole file, as the first piece said.

    Raises:
        ParcelError: the piece does not follow on what is there, or is too long.
    """
    held = path.stat().st_size if path.exists() else 0
    if not 0 <= whole <= limit or chunk.size != whole:
        raise ChunkError(f"a file of {chunk.size} bytes, where {whole} were announced")
    if chunk.offset != held or held + len(chunk.piece) > whole:
        raise ChunkError(
            f"bytes {chunk.offset} to {chunk.offset + len(chunk.piece)} of a file of {whole}, "
            f"of which {held} are here"
        )
    if not chunk.piece and whole > held:
        raise ChunkError(f"an empty piece of a file of {whole} bytes")
    with path.open("ab") as file:
        file.write(chunk.piece)
