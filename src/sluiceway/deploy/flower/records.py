"""Chunks and named tensors as contents of Flower messages.

A chunk's header is a text in a `ConfigRecord`, its data are one `uint8` array: `ArrayRecord` has no
bfloat16, and Flower's strategies want the same names from every client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from sluiceway.deploy.chunks import Chunk, ChunkError, replied
from sluiceway.errors import line
from sluiceway.files import scratch_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sluiceway.strategies import Broadcast

#: Type of our messages; a ClientApp has a function for it.
MESSAGE_TYPE: Final = "query.sluiceway"
#: Bytes of a file in one message, of which each process holds about three copies.
CHUNK: Final = 256 << 20
HEADER, DATA = "sluiceway", "file"
#: How the array's bytes are to be read, for Flower's own tools.
STYPE: Final = "sluiceway.bytes"


def content_of(chunk: Chunk, data: ArrayRecord | None = None) -> RecordDict:
    """A chunk as a message's content; `data` are the chunk's, if there is a record of them."""
    content = RecordDict({HEADER: ConfigRecord({"header": chunk.header()})})
    if chunk.data:
        content[DATA] = data or array_record(chunk.data)
    return content


def header_and_data(content: RecordDict) -> tuple[str, bytes]:
    """The two parts of a chunk. Raises ChunkError."""
    record = content.get(HEADER)
    header = record.get("header") if isinstance(record, ConfigRecord) else None
    if not isinstance(header, str):
        raise ChunkError("a message without a header of Sluiceway")
    return header, bytes_of(content[DATA]) if DATA in content else b""


def chunk_of(reply: Message) -> Chunk:
    """The chunk that a site replied. Raises ChunkError, also for an error of Flower."""
    if reply.has_error():
        raise ChunkError(line(f"Flower: {reply.error.reason or f'error {reply.error.code}'}"))
    return Chunk.read(*header_and_data(reply.content))


def reply_to(message: Message, handle: Callable[[Chunk], Chunk]) -> Message:
    """A site's reply. An error is not left to Flower, which would send all of it to the server."""
    try:
        header, data = header_and_data(message.content)
    except ChunkError:
        header, data = "", b""  # which is no header either
    return Message(content_of(replied(header, data, handle)), reply_to=message)


def array_record(data: bytes) -> ArrayRecord:
    """Bytes as one array, which is not copied."""
    return ArrayRecord({"bytes": Array("uint8", (len(data),), STYPE, data)})


def bytes_of(record: Any) -> bytes:
    """The inverse of `array_record`. Raises ChunkError."""
    array = record.get("bytes") if isinstance(record, ArrayRecord) else None
    if array is None or len(record) != 1 or array.stype != STYPE:
        raise ChunkError("an array record that is not one of bytes")
    return bytes(array.data)


def packed(broadcast: Broadcast) -> ArrayRecord:
    """Named tensors of any type as one array of bytes."""
    from sluiceway.core.messages import write_broadcast

    with scratch_folder() as folder:
        write_broadcast(folder / "broadcast", broadcast)
        return array_record((folder / "broadcast").read_bytes())


def unpacked(arrays: ArrayRecord) -> dict[str, Tensor]:
    """The inverse of `Adapter.arrays`: tensors by name. Raises ChunkError, WireError."""
    from sluiceway.core.messages import read_broadcast

    with scratch_folder() as folder:
        path = folder / "global"
        path.write_bytes(bytes_of(arrays))
        return {name: t.clone() for name, t in read_broadcast(path).tensors.items()}


def load_arrays(model: nn.Module, arrays: ArrayRecord) -> None:
    """Write the global values of Flower's loop into a model. Raises ChunkError, WireError."""
    from sluiceway.core.messages import take_values
    from sluiceway.core.parameters import exchanged

    take_values(exchanged(model) | dict(model.named_parameters()), unpacked(arrays))
