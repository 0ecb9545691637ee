"""The wire format of smashed data and of the gradients that return: one message, one batch.

A message describes itself, has a version, and holds no code (never pickle). In order, all numbers
little-endian, nothing aligned:

    header   44 bytes
        0   4  magic, "SLWY"
        4   1  version, 1
        5   1  kind: 1 channels, 2 elements; + 2 for a gradient
        6   1  codec: 0 float32, 1 fp16, 2 int8, 3 int4, 4 int8-affine, 5 int4-affine
        7   1  places: 0 none, 1 bits, 2 uint16 indices, 3 uint32 indices
        8   1  bytes of a label: 0 (no labels), 1, 2
        9   1  number of dimensions, 2 to 4
        10  2  zero
        12 12  client, round, batch: uint32 each
        24 16  shape [B, C, ...]: uint32 each, 0 for dimensions it has not
        40  4  kept: channels of the batch, or elements of each example
    labels   B x uint8 or uint16, the smallest that holds the largest label
    places   ceil(C / 8) bytes of channels; or of elements the cheapest of ceil(D / 8) bytes an
             example and k indices of uint16 or uint32, D = C x H x W; nothing if all are kept.
             A gradient has none: the batch it belongs to has told both sides
    scales   float32: a step per kept channel, or per example of elements; then, affine, the lows
    values   [B, kept, H, W] or [B, k], row by row; see `quantise`

The length follows from the header (`message_bytes`), so that a message is either exact or refused.
Every refusal is a `WireError`, raised before anything is allocated from the message's numbers.
"""

import struct
from dataclasses import dataclass
from math import prod
from typing import Final, NamedTuple, Self

from sluiceway.split.errors import WireError
from sluiceway.split.quantise import CODECS, Codec, codec_named
from sluiceway.split.selection import NOTHING, places_bytes, writing

MAGIC: Final = b"SLWY"
VERSION: Final = 1
#: Default limit in bytes, of a message and of the dense float32 tensor that it opens to.
LIMIT: Final = 1 << 28

_HEADER: Final = struct.Struct("<4s6BH3I4II")
_CODES: Final = {codec.code: codec for codec in CODECS.values()}

HEADER_BYTES: Final = _HEADER.size


class BatchId(NamedTuple):
    """Whose batch it is; each number in [0, 2^32)."""

    client: int
    round: int
    batch: int


@dataclass(frozen=True)
class Expected:
    """What the receiver knows already; None leaves a thing open.

    Attributes:
        shape: of the smashed data; a size of None is open (the last batch is smaller).
        batch: the batch that must come.
        codec: its name.
        elements: True for elements, False for channels.
        labels: whether labels must come.
        classes: labels must be below it.
    """

    shape: tuple[int | None, ...] | None = None
    batch: BatchId | None = None
    codec: str | None = None
    elements: bool | None = None
    labels: bool | None = None
    classes: int | None = None


@dataclass(frozen=True)
class Header:
    """The first 44 bytes of a message; every length follows from them."""

    gradient: bool
    elements: bool
    codec: Codec
    places: int
    label_bytes: int
    batch: BatchId
    shape: tuple[int, ...]
    kept: int

    @property
    def groups(self) -> tuple[int, int, int]:
        """[N, G, S] of the values."""
        if self.elements:
            return 1, self.shape[0], self.kept
        return self.shape[0], self.kept, prod(self.shape[2:])

    @property
    def sections(self) -> tuple[int, int, int]:
        """Bytes of labels, of places, and of scales and values."""
        n, g, s = self.groups
        return (
            self.shape[0] * self.label_bytes,
            places_bytes(self.shape, self.kept, self.elements, self.places),
            self.codec.nbytes(n * g * s, g),
        )

    @property
    def length(self) -> int:
        return HEADER_BYTES + sum(self.sections)

    def to_bytes(self) -> bytes:
        kind = 1 + self.elements + 2 * self.gradient
        codes = (VERSION, kind, self.codec.code, self.places, self.label_bytes, len(self.shape))
        sizes = (*self.shape, 0, 0)[:4]
        return _HEADER.pack(MAGIC, *codes, 0, *self.batch, *sizes, self.kept)

    @classmethod
    def parse(cls, message: memoryview, limit: int) -> Self:
        """The header of a message that is as long as it says, and within the limit."""
        if len(message) > limit:
            raise WireError(f"message: {len(message)} bytes, the limit is {limit}")
        if len(message) < HEADER_BYTES:
            raise WireError(f"message: {len(message)} bytes are less than a header")
        magic, version, *codes, zero = (fields := _HEADER.unpack_from(message))[:8]
        numbers = fields[8:]
        if magic != MAGIC:
            raise WireError("message: not smashed data, nor a gradient (wrong magic)")
        if version != VERSION:
            raise WireError(f"message: version {version}, this side reads {VERSION}")
        kind, codec, places, label_bytes, dims = codes
        if zero or not 1 <= kind <= 4 or codec not in _CODES or label_bytes > 2:
            raise WireError("header: unknown kind, codec or label size")
        if not 2 <= dims <= 4 or 0 in numbers[3 : 3 + dims] or any(numbers[3 + dims : 7]):
            raise WireError(f"header: expected 2 to 4 sizes of at least 1, got {numbers[3:7]}")
        gradient, elements = kind > 2, kind % 2 == 0
        batch, shape, kept = BatchId(*numbers[:3]), numbers[3 : 3 + dims], numbers[7]
        made = cls(gradient, elements, _CODES[codec], places, label_bytes, batch, shape, kept)
        made._check(len(message), limit)
        return made

    def _check(self, length: int, limit: int) -> None:
        """Sizes that fit each other, the message and the limit; Python's integers do not wrap."""
        if 4 * prod(self.shape) > limit:
            raise WireError(f"header: {list(self.shape)} float32 numbers exceed {limit} bytes")
        most = prod(self.shape[1:]) if self.elements else self.shape[1]
        if not 1 <= self.kept <= most:
            raise WireError(f"header: expected 1 to {most} kept, got {self.kept}")
        if self.gradient and self.label_bytes:
            raise WireError("header: a gradient has no labels")
        cheapest = NOTHING if self.gradient else writing(self.shape, self.kept, self.elements)
        if self.places != cheapest:
            raise WireError(f"header: expected places code {cheapest}, got {self.places}")
        if length != self.length:
            raise WireError(f"message: {length} bytes, its header asks for {self.length}")


def message_bytes(
    shape: tuple[int, ...],
    kept: int,
    codec: str = "none",
    *,
    elements: bool = False,
    gradient: bool = False,
    label_bytes: int = 0,
) -> int:
    """The exact length of a message::

        44 + B label_bytes + places + 4 parameters groups + ceil(bits values / 8)

    Args:
        shape: of the smashed data, [B, C, ...].
        kept: channels, or with `elements` those of each example.
        codec: its name.
        elements: single elements rather than channels.
        gradient: the message that returns.
        label_bytes: of one label: 0, 1 (largest label below 256) or 2.

    Raises:
        ValueError: there is no such codec.
    """
    code = NOTHING if gradient else writing(shape, kept, elements)
    batch = BatchId(0, 0, 0)
    made = Header(gradient, elements, codec_named(codec), code, label_bytes, batch, shape, kept)
    return made.length


def compare(header: Header, expected: Expected) -> None:
    """Raise WireError unless the header says what is expected."""
    if expected.shape is not None and (
        len(expected.shape) != len(header.shape)
        or any(w not in (None, n) for w, n in zip(expected.shape, header.shape, strict=True))
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in expected.shape)
        raise WireError(f"shape: expected [{wanted}], got {list(header.shape)}")
    if expected.batch is not None and header.batch != expected.batch:
        raise WireError(
            f"batch: expected {tuple(expected.batch)}, got {tuple(header.batch)} "
            "(client, round, batch)"
        )
    if expected.codec is not None and header.codec.name != expected.codec:
        raise WireError(f"codec: expected {expected.codec}, got {header.codec.name}")
    if expected.elements is not None and header.elements != expected.elements:
        raise WireError(f"kind: expected {('channels', 'elements')[expected.elements]}")
    if expected.labels is not None and bool(header.label_bytes) != expected.labels:
        raise WireError(f"labels: expected {'some' if expected.labels else 'none'}")
