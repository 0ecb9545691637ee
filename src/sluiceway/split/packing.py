"""Smashed data and the gradients that return, as messages: one message, one batch.

A message describes itself, has a version, and holds no code (never pickle). In order, all numbers
little-endian, nothing aligned:

    header   44 bytes
        0   4  magic, "SLWY"
        4   1  version, 2
        5   1  kind: 1 channels, 2 elements; + 2 for a gradient
        6   1  codec: 0 float32, 1 fp16, 2 int8, 3 int4, 4 int8-affine, 5 int4-affine, 6 bits,
               7 step, 8 dct, 9 slfac
        7   1  encoding of the selection: 0 none, 1 bits, 2 uint16 indices, 3 uint32 indices
        8   1  bytes of a label: 0 (no labels), 1, 2
        9   1  number of dimensions, 2 to 4
        10  1  1 if the integers are coded by their frequencies
       11  1  bytes of the number of an example: 0 (no numbers), 1, 2, 4
        12 12  client, round, batch: uint32 each
        24 16  shape [B, C, ...]: uint32 each, 0 for dimensions it has not
        40  4  kept: channels of the batch, or elements of each example
    labels     B x uint8 or uint16, the smallest that holds the largest label
    rows       B x uint8, uint16 or uint32, likewise: which examples of the client they are, all
               different. What crosses is then what changed of them, see `memory`
    selection  ceil(C / 8) bytes of channels; or of elements the cheapest of ceil(D / 8) bytes an
               example and k indices of uint16 or uint32, D = C x H x W; nothing if all are kept.
               A gradient has none: the batch it belongs to has told both sides
    scales     float32: a step per kept channel, or per example of elements; then, affine, the lows
    values     [B, kept, H, W] or [B, k], row by row; see `quantise`

Where integers are coded, or the codec has a budget, scales and values are as `coder`, `bitted`,
`stepped` and `slfac` say. Otherwise the length follows from the header (`message_bytes`), so that a
message is either exact or rejected.
Every rejection is a `WireError`, raised before anything is allocated from the message's numbers.

Where both sides are in one process a message stays tensors (`Encoded`), on the device where they
were made: rounded, checked and refused alike, of the same length, but not written as bytes. Both
sides keep a `BatchContext` per batch: it opens the gradient of that batch and no other.
"""

import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Final, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from sluiceway.core.messages import WireError
from sluiceway.split.quantise import (
    CODECS,
    PLAIN,
    TRANSFORMING,
    Codec,
    Coding,
    Values,
    codec_named,
    encode,
    is_coded,
    read,
)
from sluiceway.split.selection import (
    NOTHING,
    Selection,
    cheapest,
    encoded_bytes,
    from_bytes,
    to_bytes,
)

MAGIC: Final = b"SLWY"
VERSION: Final = 2
#: Default limit in bytes, of a message and of the dense float32 tensor that it opens to.
LIMIT: Final = 1 << 28

_HEADER: Final = struct.Struct("<4s8B3I4II")
_CODES: Final = {codec.code: codec for codec in CODECS.values()}
_UNSIGNED: Final = {1: "<u1", 2: "<u2", 4: "<u4"}
_KIND: Final = {None: None, False: "channels", True: "elements"}
_THERE: Final = {None: None, False: "none", True: "some"}
_CODED: Final = {None: None, False: "none", True: "range"}

HEADER_BYTES: Final = _HEADER.size


class BatchId(NamedTuple):
    """Whose batch it is; each number in [0, 2^32)."""

    client: int
    round: int
    batch: int


@dataclass(frozen=True, eq=False)
class BatchContext:
    """What both sides keep of a batch until its gradient has returned.

    Attributes:
        batch: whose it is.
        shape: of the smashed data, [B, C], [B, C, L] or [B, C, H, W].
        selection: what of it crossed, and so what of its gradient returns.
    """

    batch: BatchId
    shape: tuple[int, ...]
    selection: Selection


@dataclass(frozen=True, eq=False)
class Smashed:
    """An opened message of smashed data.

    Attributes:
        values: dense, the shape of the context, float32, zero where nothing crossed; a leaf without
            gradient yet. From bytes its memory is its own; of an `Encoded` message in which nothing
            was dropped or rounded it is the sender's, and must not be changed.
        labels: [B] int64 on the device of the values, or None if none crossed.
        context: for the gradient.
        rows: [B] int64 on the CPU, of which examples the values say what changed; None if they are
            the smashed data themselves.
    """

    values: Tensor
    labels: Tensor | None
    context: BatchContext
    rows: Tensor | None = None


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
        coded: whether integers must be coded.
        examples: numbers of examples must come, below it; 0: none may come.
    """

    shape: tuple[int | None, ...] | None = None
    batch: BatchId | None = None
    codec: str | None = None
    elements: bool | None = None
    labels: bool | None = None
    classes: int | None = None
    coded: bool | None = None
    examples: int | None = None


@dataclass(frozen=True)
class Header:
    """The first 44 bytes of a message; every length follows from them."""

    gradient: bool
    elements: bool
    codec: Codec
    encoding: int
    label_bytes: int
    batch: BatchId
    shape: tuple[int, ...]
    kept: int
    coded: bool = False
    row_bytes: int = 0

    @property
    def exact(self) -> bool:
        """The length follows from the header."""
        return not self.coded and not self.codec.budgeted

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the positions of a group."""
        return () if self.elements else self.shape[2:]

    @cached_property
    def groups(self) -> tuple[int, int, int]:
        """[N, G, S] of the values."""
        if self.elements:
            return 1, self.shape[0], self.kept
        return self.shape[0], self.kept, prod(self.shape[2:])

    @cached_property
    def sections(self) -> tuple[int, int, int]:
        """Where the selection and the scales begin, and where the message ends, at least."""
        n, g, s = self.groups
        selection = HEADER_BYTES + self.shape[0] * (self.label_bytes + self.row_bytes)
        scales = selection + encoded_bytes(self.shape, self.kept, self.elements, self.encoding)
        return selection, scales, scales + (self.codec.nbytes(n * g * s, g) if self.exact else 0)

    def to_bytes(self) -> bytes:
        kind = 1 + self.elements + 2 * self.gradient
        codes = (VERSION, kind, self.codec.code, self.encoding, self.label_bytes, len(self.shape))
        sizes = (*self.shape, 0, 0)[:4]
        return _HEADER.pack(
            MAGIC, *codes, self.coded, self.row_bytes, *self.batch, *sizes, self.kept
        )

    @classmethod
    def read(cls, message: memoryview, limit: int, gradient: bool, expected: Expected) -> Self:
        """The header of a message that is as long as it says, within the limit and as expected."""
        if len(message) > limit:
            raise WireError(f"message: {len(message)} bytes, the limit is {limit}")
        if len(message) < HEADER_BYTES:
            raise WireError(f"message: {len(message)} bytes are less than a header")
        magic, version, *codes, coded, row_bytes = (fields := _HEADER.unpack_from(message))[:9]
        numbers = fields[9:]
        if magic != MAGIC:
            raise WireError("message: not smashed data, nor a gradient (wrong magic)")
        if version != VERSION:
            raise WireError(f"message: version {version}, this side reads {VERSION}")
        kind, codec, encoding, label_bytes, dims = codes
        if coded > 1 or not 1 <= kind <= 4 or codec not in _CODES or label_bytes > 2:
            raise WireError("header: unknown kind, codec or label size")
        if row_bytes and row_bytes not in _UNSIGNED:
            raise WireError(f"header: numbers of examples of {row_bytes} bytes")
        if not 2 <= dims <= 4 or 0 in numbers[3 : 3 + dims] or any(numbers[3 + dims : 7]):
            raise WireError(f"header: expected 2 to 4 sizes of at least 1, got {numbers[3:7]}")
        batch, shape, kept = BatchId(*numbers[:3]), numbers[3 : 3 + dims], numbers[7]
        of_elements, codec = kind % 2 == 0, _CODES[codec]
        known = (kind > 2, of_elements, codec, encoding, label_bytes, batch, shape, kept)
        found = cls(*known, coded == 1, row_bytes)
        found.require(len(message), limit, gradient, expected)
        return found

    def require(self, length: int, limit: int, gradient: bool, expected: Expected) -> None:
        """Raise WireError unless a message of that length is within the limit and as expected."""
        if length > limit:
            raise WireError(f"message: {length} bytes, the limit is {limit}")
        self._require_consistent(length, limit)
        self._require_expected(gradient, expected)

    def _require_consistent(self, length: int, limit: int) -> None:
        """Sizes that fit each other, the message and the limit; Python's integers do not wrap."""
        if 4 * prod(self.shape) > limit:
            raise WireError(f"header: {list(self.shape)} float32 numbers exceed {limit} bytes")
        most = prod(self.shape[1:]) if self.elements else self.shape[1]
        if not 1 <= self.kept <= most:
            raise WireError(f"header: expected 1 to {most} kept, got {self.kept}")
        if self.gradient and (self.label_bytes or self.row_bytes):
            raise WireError("header: a gradient has no labels and no numbers of examples")
        code = NOTHING if self.gradient else cheapest(self.shape, self.kept, self.elements)
        if self.encoding != code:
            raise WireError(f"header: expected selection code {code}, got {self.encoding}")
        if self.coded and not is_coded(self.codec.name, Coding(coder=True)):
            raise WireError(f"header: {self.codec.name} is not coded, or always")
        if self.codec.name in TRANSFORMING and self.elements:
            raise WireError("header: elements have no positions to transform")
        if length != self.sections[-1] if self.exact else length < self.sections[-1]:
            raise WireError(f"message: {length} bytes, its header asks for {self.sections[-1]}")

    def _require_expected(self, gradient: bool, expected: Expected) -> None:
        """What the receiver knows already."""
        if self.gradient != gradient:
            kinds = ("smashed data", "a gradient")
            raise WireError(f"message: expected {kinds[gradient]}, got {kinds[self.gradient]}")
        if expected.shape is not None and (
            len(expected.shape) != len(self.shape)
            or any(w not in (None, n) for w, n in zip(expected.shape, self.shape, strict=True))
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in expected.shape)
            raise WireError(f"shape: expected [{wanted}], got {list(self.shape)}")
        for what, want, got in (
            ("batch", expected.batch, self.batch),
            ("codec", expected.codec, self.codec.name),
            ("kind", _KIND[expected.elements], _KIND[self.elements]),
            ("labels", _THERE[expected.labels], _THERE[bool(self.label_bytes)]),
            ("coder", _CODED[expected.coded], _CODED[self.coded]),
            (
                "numbers of examples",
                None if expected.examples is None else _THERE[expected.examples > 0],
                _THERE[bool(self.row_bytes)],
            ),
        ):
            if want is not None and got != want:
                raise WireError(f"{what}: expected {want}, got {got}")


@dataclass(frozen=True, eq=False)
class Encoded:
    """A message as tensors; `len` is its exact length, and `bytes` packs it.

    Attributes:
        header: of the message.
        labels: [B] int64 on the CPU, or None.
        selection: what of the values is in it.
        values: of what is kept, [N, G, S], as the codec writes them.
        rows: [B] int64 on the CPU, or None.
    """

    header: Header
    labels: Tensor | None
    selection: Selection
    values: Values
    rows: Tensor | None = None

    def __len__(self) -> int:
        end = self.header.sections[-1]
        return end if self.header.exact else end + self.values.nbytes

    def __bytes__(self) -> bytes:
        header = self.header
        labels = _to_unsigned(self.labels, header.label_bytes)
        rows = _to_unsigned(self.rows, header.row_bytes)
        selection = to_bytes(self.selection, header.shape, header.encoding)
        return b"".join([header.to_bytes(), labels, rows, selection, self.values.payload])


#: What crosses: bytes between processes, tensors within one.
Message = bytes | memoryview | Encoded


def message_bytes(
    shape: tuple[int, ...],
    kept: int,
    codec: str = "none",
    *,
    elements: bool = False,
    gradient: bool = False,
    label_bytes: int = 0,
    row_bytes: int = 0,
    ratio: float = PLAIN.ratio,
) -> int:
    """The length of a message, exact if neither coded nor budgeted, else what is aimed at::

        44 + B (label_bytes + row_bytes) + selection + 4 parameters groups + ceil(bits values / 8)
        44 + B (label_bytes + row_bytes) + selection + 4 B C ... / ratio        with a budget

    Args:
        shape: of the smashed data, [B, C, ...].
        kept: channels, or with `elements` those of each example.
        codec: its name.
        elements: single elements rather than channels.
        gradient: the message that returns.
        label_bytes: of one label: 0, 1 (largest label below 256) or 2.
        row_bytes: of the number of an example, likewise: 0, 1, 2 or 4.
        ratio: see `Coding`.

    Raises:
        ValueError: there is no such codec.
    """
    code = NOTHING if gradient else cheapest(shape, kept, elements)
    known = (gradient, elements, codec_named(codec), code, label_bytes, BatchId(0, 0, 0))
    header = Header(*known, shape, kept, row_bytes=row_bytes)
    budget = int(4 * prod(shape) / ratio) if header.codec.budgeted else 0
    return header.sections[-1] + budget


def encode_smashed(
    A: Tensor,
    selection: Selection,
    batch: BatchId,
    codec: str = "none",
    labels: Tensor | None = None,
    coding: Coding = PLAIN,
    rows: Tensor | None = None,
) -> tuple[Encoded, BatchContext]:
    """What is kept of smashed data, as a message.

    Args:
        A: smashed data, [B, C, ...], any floating type, on any device; sent as float32. Finite
            unless `codec` is "none". Its values must not change while the message is in use.
        selection: what is kept of it.
        batch: whose it is.
        codec: name of one of `CODECS`.
        labels: [B], any integer type, in [0, 65535]; None sends none. On the CPU they are checked
            without waiting for a GPU.
        coding: how the codec's numbers are written.
        rows: [B], integers in [0, 2^32): the values are what changed of these examples.

    Returns:
        The message, and the context that opens its gradient.

    Raises:
        ValueError: a shape does not fit, a number is out of range, or there is no such codec.
    """
    context = BatchContext(batch, tuple(A.shape), selection)
    return _encoded(A, context, codec, False, labels, coding, rows), context


def encode_gradient(
    grad: Tensor, context: BatchContext, codec: str = "none", coding: Coding = PLAIN
) -> Encoded:
    """The gradient by smashed data, of what was kept alone, as a message.

    Args:
        grad: the shape of the context, any floating type, on any device.
        context: of the batch.
        codec: name of one of `CODECS`.
        coding: how its numbers are written.

    Raises:
        ValueError: the shape does not fit, a value is not finite, or there is no such codec.
    """
    if tuple(grad.shape) != context.shape:
        raise ValueError(f"grad: expected shape {list(context.shape)}, got {list(grad.shape)}")
    return _encoded(grad, context, codec, True, None, coding, None)


def pack_smashed(
    A: Tensor,
    selection: Selection,
    batch: BatchId,
    codec: str = "none",
    labels: Tensor | None = None,
) -> tuple[bytes, BatchContext]:
    """The message of `encode_smashed` as bytes, and the context that opens its gradient."""
    message, context = encode_smashed(A, selection, batch, codec, labels)
    return bytes(message), context


def pack_gradient(grad: Tensor, context: BatchContext, codec: str = "none") -> bytes:
    """The message of `encode_gradient` as bytes."""
    return bytes(encode_gradient(grad, context, codec))


def unpack_smashed(
    message: Message,
    limit: int = LIMIT,
    expected: Expected | None = None,
    device: str | torch.device = "cpu",
) -> Smashed:
    """Open a message of smashed data.

    Args:
        message: as packed, or as encoded.
        limit: in bytes, of the message and of the dense float32 tensor that it opens to.
        expected: what the receiver knows already.
        device: of the values and labels.

    Raises:
        WireError: it is no such message, or not the one expected.
    """
    found = _read(message, None, limit, False, expected or Expected(), torch.device(device))
    shape, labels = found.header.shape, found.labels
    values = found.selection.spread(found.values.values(), shape).to(device)
    if labels is not None:
        labels = labels.to(device, non_blocking=True)
    context = BatchContext(found.header.batch, shape, found.selection)
    return Smashed(values, labels, context, found.rows)


def unpack_gradient(
    message: Message,
    context: BatchContext,
    limit: int = LIMIT,
    codec: str | None = None,
    device: str | torch.device = "cpu",
    coded: bool | None = None,
) -> Tensor:
    """Open the gradient of the batch that the context is of.

    Args:
        message: as packed, or as encoded.
        context: of the batch.
        limit: in bytes, of the message and of the dense float32 gradient.
        codec: the one expected; None takes any.
        device: of the gradient.
        coded: whether its integers must be coded; None takes both.

    Returns:
        The gradient, the shape of the context, float32, zero where nothing crossed; see `Smashed`
        for whose memory it is.

    Raises:
        WireError: it is no such message, or a gradient of another batch.
    """
    selection = context.selection
    expected = Expected(context.shape, context.batch, codec, selection.elements, coded=coded)
    found = _read(message, selection, limit, True, expected, torch.device(device))
    return selection.spread(found.values.values(), context.shape).to(device)


def _encoded(
    A: Tensor,
    context: BatchContext,
    name: str,
    gradient: bool,
    labels: Tensor | None,
    coding: Coding,
    rows: Tensor | None,
) -> Encoded:
    """The message of one direction."""
    shape, selection, codec = context.shape, context.selection, codec_named(name)
    if not 2 <= len(shape) <= 4 or 0 in shape or not A.is_floating_point():
        raise ValueError(f"A: expected floats of shape [B, C, ...], got {list(shape)}, {A.dtype}")
    if not selection.fits(shape):
        raise ValueError(f"selection: does not fit smashed data of shape {list(shape)}")
    if any(not 0 <= number < 1 << 32 for number in context.batch):
        raise ValueError(f"batch: expected numbers in [0, 2^32), got {tuple(context.batch)}")
    labels, label_bytes = _checked(labels, "labels", len(A), 65535)
    rows, row_bytes = _checked(rows, "rows", len(A), (1 << 32) - 1)
    kept, elements = selection.count, selection.elements
    code = NOTHING if gradient else cheapest(shape, kept, elements)
    coded = is_coded(name, coding)
    known = (gradient, elements, codec, code, label_bytes, context.batch, shape, kept)
    header = Header(*known, coded, row_bytes)
    seed = (*context.batch, gradient)
    values = encode(selection.take(A), codec, coding, header.sides, seed, prod(shape))
    return Encoded(header, labels, selection, values, rows)


def _read(
    message: Message,
    selection: Selection | None,
    limit: int,
    gradient: bool,
    expected: Expected,
    device: torch.device,
) -> Encoded:
    """A message that is as expected; `selection` is that of a gradient. Raises WireError."""
    if isinstance(message, Encoded):
        header, labels, rows = message.header, message.labels, message.rows
        header.require(len(message), limit, gradient, expected)
    else:
        data = memoryview(message)
        header = Header.read(data, limit, gradient, expected)
        first, second, _ = header.sections
        middle = HEADER_BYTES + header.shape[0] * header.label_bytes
        labels = _from_unsigned(data[HEADER_BYTES:middle], "labels", header.label_bytes)
        rows = _from_unsigned(data[middle:first], "numbers of examples", header.row_bytes)
    if selection is not None and header.kept != selection.count:
        raise WireError(f"header: expected {selection.count} kept, got {header.kept}")
    high = -1 if labels is None or expected.classes is None else int(labels.max())
    if expected.classes is not None and high >= expected.classes:
        raise WireError(f"labels: expected below {expected.classes}, got {high}")
    if rows is not None:
        high = -1 if expected.examples is None else int(rows.max())
        if expected.examples is not None and high >= expected.examples:
            raise WireError(f"numbers of examples: expected below {expected.examples}, got {high}")
        if len(rows.unique()) < len(rows):
            raise WireError("numbers of examples: expected each once")
    if isinstance(message, Encoded):
        return message
    if selection is None:
        selection = from_bytes(
            data[first:second], header.shape, header.kept, header.elements, header.encoding
        )
    values = read(data[second:], header.groups, header.codec, header.coded, header.sides, device)
    return Encoded(header, labels, selection, values, rows)


def _checked(numbers: Tensor | None, what: str, batch: int, most: int) -> tuple[Tensor | None, int]:
    """Numbers [B] int64 on the CPU, in [0, most], and bytes of one: the fewest that hold them."""
    if numbers is None:
        return None, 0
    if tuple(numbers.shape) != (batch,) or numbers.is_floating_point() or numbers.is_complex():
        raise ValueError(f"{what}: expected integers of shape [{batch}], got {list(numbers.shape)}")
    numbers = numbers.detach().to("cpu", torch.int64)
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high > most:
        raise ValueError(f"{what}: expected numbers in [0, {most}], got {low} to {high}")
    return numbers, fewest_bytes(high)


def fewest_bytes(largest: int) -> int:
    """Of the unsigned integers that cross, 1, 2 or 4 bytes: of those that hold it."""
    return 1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4


def _to_unsigned(numbers: Tensor | None, size: int) -> bytes:
    """Numbers of so many bytes each."""
    return b"" if numbers is None else numbers.numpy().astype(_UNSIGNED[size]).tobytes()


def _from_unsigned(data: memoryview, what: str, size: int) -> Tensor | None:
    """Numbers, [B] int64; None if none crossed. Raises WireError."""
    if not size:
        return None
    numbers = np.frombuffer(data, dtype=_UNSIGNED[size]).astype(np.int64)
    if size != (fewest := fewest_bytes(int(numbers.max()))):
        raise WireError(f"{what}: expected {fewest} bytes each, which hold them, got {size}")
    return torch.from_numpy(numbers)
