"""Smashed data and the gradients that return, as messages; the format is told in `header`.

The same packing runs wherever a run executes, so that bytes are counted from what would really
cross. Both sides remember a `BatchContext` per batch: it opens the gradient of that batch and no
other.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from sluiceway.split.errors import WireError
from sluiceway.split.header import HEADER_BYTES, LIMIT, BatchId, Expected, Header, compare
from sluiceway.split.quantise import codec_named, decode, encode
from sluiceway.split.selection import (
    NOTHING,
    KeptElements,
    Selection,
    channels_from,
    elements_from,
    to_bytes,
    writing,
)

_LABELS: Final = {1: "<u1", 2: "<u2"}
_UINT32: Final = 1 << 32


@dataclass(frozen=True, eq=False)
class BatchContext:
    """What both sides remember of a batch until its gradient has returned.

    Attributes:
        batch: whose it is.
        shape: of the smashed data, [B, C], [B, C, L] or [B, C, H, W].
        places: what of it crossed, and so what of its gradient returns.
    """

    batch: BatchId
    shape: tuple[int, ...]
    places: Selection


@dataclass(frozen=True, eq=False)
class Smashed:
    """An opened message of smashed data.

    Attributes:
        values: dense, the shape of the ticket, float32, zero where nothing crossed; a leaf without
            gradient yet, with memory of its own.
        labels: [B] int64 on the device of the values, or None if none crossed.
        ticket: for the gradient.
    """

    values: Tensor
    labels: Tensor | None
    ticket: BatchContext


def pack_smashed(
    A: Tensor, places: Selection, batch: BatchId, codec: str = "none", labels: Tensor | None = None
) -> tuple[bytes, BatchContext]:
    """Pack what is kept of smashed data.

    Args:
        A: smashed data, [B, C], [B, C, L] or [B, C, H, W], any floating type, on any device; sent
            as float32. Finite unless `codec` is "none".
        places: what is kept of it.
        batch: whose it is.
        codec: name of one of `CODECS`.
        labels: [B], any integer type, in [0, 65535]; None sends none.

    Returns:
        The message, and the ticket that opens its gradient.

    Raises:
        ValueError: a shape does not fit, a number is out of range, or there is no such codec.
    """
    ticket = BatchContext(batch, tuple(A.shape), places)
    written = None if labels is None else _labels(labels, len(A))
    return _pack(A, ticket, codec, False, written), ticket


def pack_gradient(grad: Tensor, ticket: BatchContext, codec: str = "none") -> bytes:
    """Pack the gradient by smashed data, of what was kept alone.

    Args:
        grad: the shape of the ticket, any floating type, on any device.
        ticket: of the batch.
        codec: name of one of `CODECS`.

    Raises:
        ValueError: the shape does not fit, a value is not finite, or there is no such codec.
    """
    if tuple(grad.shape) != ticket.shape:
        raise ValueError(f"grad: expected shape {list(ticket.shape)}, got {list(grad.shape)}")
    return _pack(grad, ticket, codec, True, None)


def unpack_smashed(
    message: bytes | memoryview,
    limit: int = LIMIT,
    expected: Expected | None = None,
    device: str | torch.device = "cpu",
) -> Smashed:
    """Open a message of smashed data.

    Args:
        message: as packed.
        limit: in bytes, of the message and of the dense float32 tensor that it opens to.
        expected: what the receiver knows already.
        device: of the values and labels.

    Raises:
        WireError: it is no such message, or not the one expected.
    """
    data = memoryview(message)
    header = Header.parse(data, limit)
    if header.gradient:
        raise WireError("message: expected smashed data, got a gradient")
    compare(header, expected or Expected())
    first, second, _ = header.sections
    first, second = HEADER_BYTES + first, HEADER_BYTES + first + second
    labels = _read_labels(data[HEADER_BYTES:first], header, expected)
    places: Selection
    if header.elements:
        places = elements_from(data[first:second], header.shape, header.kept, header.places)
    else:
        places = channels_from(data[first:second], header.shape[1], header.kept, header.places)
    device = torch.device(device)
    values = places.spread(decode(data[second:], header.groups, header.codec, device), header.shape)
    ticket = BatchContext(header.batch, header.shape, places)
    return Smashed(values, None if labels is None else labels.to(device), ticket)


def unpack_gradient(
    message: bytes | memoryview,
    ticket: BatchContext,
    limit: int = LIMIT,
    codec: str | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Open the gradient of the batch that the ticket is of.

    Args:
        message: as packed.
        ticket: of the batch.
        limit: in bytes, of the message and of the dense float32 gradient.
        codec: the one expected; None takes any.
        device: of the gradient.

    Returns:
        The gradient, the shape of the ticket, float32, zero where nothing crossed.

    Raises:
        WireError: it is no such message, or a gradient of another batch.
    """
    data = memoryview(message)
    header = Header.parse(data, limit)
    if not header.gradient:
        raise WireError("message: expected a gradient, got smashed data")
    elements = isinstance(ticket.places, KeptElements)
    compare(header, Expected(ticket.shape, ticket.batch, codec, elements))
    if header.kept != ticket.places.count:
        raise WireError(f"header: expected {ticket.places.count} kept, got {header.kept}")
    values = decode(data[HEADER_BYTES:], header.groups, header.codec, torch.device(device))
    return ticket.places.spread(values, ticket.shape)


def _pack(
    A: Tensor, ticket: BatchContext, codec: str, gradient: bool, labels: np.ndarray | None
) -> bytes:
    """The message of one direction."""
    shape, places = ticket.shape, ticket.places
    if not 2 <= len(shape) <= 4 or 0 in shape or not A.is_floating_point():
        raise ValueError(f"A: expected floats of shape [B, C, ...], got {list(shape)}, {A.dtype}")
    if not places.fits(shape):
        raise ValueError(f"places: do not fit smashed data of shape {list(shape)}")
    if any(not 0 <= number < _UINT32 for number in ticket.batch):
        raise ValueError(f"batch: expected numbers in [0, 2^32), got {tuple(ticket.batch)}")
    elements = isinstance(places, KeptElements)
    code = NOTHING if gradient else writing(shape, places.count, elements)
    made = codec_named(codec)
    width = 0 if labels is None else labels.itemsize
    header = Header(gradient, elements, made, code, width, ticket.batch, shape, places.count)
    pieces = encode(places.take(A), made)
    known = b"" if labels is None else labels.tobytes()
    return b"".join([header.to_bytes(), known, to_bytes(places, shape, code), *pieces])


def _labels(labels: Tensor, batch: int) -> np.ndarray:
    """Labels in the smallest type that holds the largest."""
    if tuple(labels.shape) != (batch,) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels: expected integers of shape [{batch}], got {list(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > 65535:
        raise ValueError(f"labels: expected numbers in [0, 65535], got {low} to {high}")
    return labels.cpu().numpy().astype(_LABELS[1 if high < 256 else 2])


def _read_labels(data: memoryview, header: Header, expected: Expected | None) -> Tensor | None:
    if not header.label_bytes:
        return None
    labels = np.frombuffer(data, dtype=_LABELS[header.label_bytes]).astype(np.int64)
    high = int(labels.max())
    if header.label_bytes == 2 and high < 256:
        raise WireError("labels: expected one byte each, since all are below 256")
    if expected and expected.classes is not None and high >= expected.classes:
        raise WireError(f"labels: expected below {expected.classes}, got {high}")
    return torch.from_numpy(labels)
