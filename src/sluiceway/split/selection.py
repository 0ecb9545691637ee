"""Which values of smashed data cross: whole channels, or single elements of every example.

Both kinds take what is kept out of a dense tensor, and put it back with zeros elsewhere. On the
wire they are rows of kept indices: one row of the C channels, or for each of B examples a row of
its D = C x H x W elements. Bits and indices are little-endian, the lowest index first.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import ClassVar, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from sluiceway.core.messages import WireError

#: How a selection is encoded: not at all (everything is kept, or the other side knows), as a bit
#: for every channel or element, or as sorted indices.
NOTHING, BITS, INDEX16, INDEX32 = range(4)

_INDEX: Final = {INDEX16: "<u2", INDEX32: "<u4"}


class Selection(Protocol):
    """What is kept of smashed data [B, C, ...]."""

    #: Single elements rather than channels.
    elements: ClassVar[bool]

    @property
    def count(self) -> int:
        """Kept channels, or kept elements of one example."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether data of this shape can be selected from."""

    def take(self, A: Tensor) -> Tensor:
        """The kept values, [N, G, S] float32, detached, copied only if need be; see `quantise`."""

    def spread(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse: a dense tensor of `shape` with the values [N, G, S], zero elsewhere."""

    def rows(self) -> np.ndarray:
        """Kept indices, [1, kept] of channels or [B, kept] of elements, each row increasing."""


@dataclass(frozen=True, eq=False)
class KeptChannels:
    """Whole channels of a batch.

    Attributes:
        mask: [C] bool, on the CPU, at least one True.

    Raises:
        ValueError: the mask has another shape or type, or keeps nothing.
    """

    elements: ClassVar[bool] = False
    mask: Tensor

    def __post_init__(self) -> None:
        if self.mask.dim() != 1 or self.mask.dtype != torch.bool or not bool(self.mask.any()):
            raise ValueError("mask: expected shape [C], bool, with at least one channel kept")
        # A copy: it is needed until the gradient returns, whatever becomes of the caller's mask.
        object.__setattr__(self, "mask", self.mask.detach().cpu().clone())

    @cached_property
    def count(self) -> int:
        return len(self._index)

    @cached_property
    def _index(self) -> Tensor:
        return torch.from_numpy(np.flatnonzero(self.mask.numpy()))

    @cached_property
    def _source(self) -> Tensor:
        """Where each channel's values are among those kept; the others' are behind the last."""
        kept = self.mask.numpy()
        return torch.from_numpy(np.where(kept, np.cumsum(kept) - 1, self.count))

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(self.mask) == shape[1]

    def take(self, A: Tensor) -> Tensor:
        values = A.detach().flatten(2).float() if A.dim() > 2 else A.detach().float().unsqueeze(2)
        if self.count == len(self.mask):
            return values
        return values.index_select(1, self._index.to(A.device, non_blocking=True))

    def spread(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.count == len(self.mask):
            return values.view(shape)
        # Reading every channel from its source is twice as fast as writing the kept into zeros.
        padded = torch.cat([values, values.new_zeros(len(values), 1, values.shape[2])], 1)
        return padded.index_select(1, self._source.to(values.device, non_blocking=True)).view(shape)

    def rows(self) -> np.ndarray:
        return self._index.numpy()[None]


@cache
def every_channel(count: int) -> KeptChannels:
    """All of so many channels."""
    return KeptChannels(torch.ones(count, dtype=torch.bool))


@dataclass(frozen=True, eq=False)
class KeptElements:
    """The same number of elements of every example, each example's own.

    Attributes:
        indices: into the flattened example, [B, k] int64, on the CPU, strictly increasing in each
            row, k at least 1.

    Raises:
        ValueError: the indices have another shape or type, are negative or not increasing.
    """

    elements: ClassVar[bool] = True
    indices: Tensor

    def __post_init__(self) -> None:
        indices = self.indices
        if indices.dim() != 2 or indices.dtype != torch.int64 or indices.numel() == 0:
            raise ValueError("indices: expected shape [B, k], int64")
        if int(indices.min()) < 0 or not bool((indices.diff(dim=1) > 0).all()):
            raise ValueError("indices: expected each row strictly increasing from at least 0")
        object.__setattr__(self, "indices", indices.detach().cpu().clone())

    @property
    def count(self) -> int:
        return self.indices.shape[1]

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(self.indices) == shape[0] and int(self.indices.max()) < prod(shape[1:])

    def take(self, A: Tensor) -> Tensor:
        flat = A.detach().flatten(1)
        return flat.gather(1, self.indices.to(A.device)).float().unsqueeze(0)

    def spread(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        dense = values.new_zeros(shape[0], prod(shape[1:]))
        return dense.scatter_(1, self.indices.to(values.device), values[0]).view(shape)

    def rows(self) -> np.ndarray:
        return self.indices.numpy()


def grid(shape: tuple[int, ...], elements: bool) -> tuple[int, int]:
    """How many rows of how many indices data of this shape has: [1, C] or [B, D]."""
    return (shape[0], prod(shape[1:])) if elements else (1, shape[1])


def encoded_bytes(shape: tuple[int, ...], kept: int, elements: bool, code: int) -> int:
    """Bytes of a selection that is encoded as `code` says."""
    rows, size = grid(shape, elements)
    return rows * {NOTHING: 0, BITS: (size + 7) // 8, INDEX16: 2 * kept, INDEX32: 4 * kept}[code]


def cheapest(shape: tuple[int, ...], kept: int, elements: bool) -> int:
    """The encoding of fewest bytes: NOTHING, BITS, INDEX16 or INDEX32.

    Args:
        shape: [B, C, ...].
        kept: channels, or elements of one example.
        elements: single elements rather than channels.
    """
    _, size = grid(shape, elements)
    if kept == size:
        return NOTHING
    index = INDEX16 if size <= 1 << 16 else INDEX32
    codes = (BITS, index) if elements else (BITS,)
    return min(codes, key=lambda code: encoded_bytes(shape, kept, elements, code))


def to_bytes(selection: Selection, shape: tuple[int, ...], code: int) -> bytes:
    """The selection from data of this shape, encoded as `code` says."""
    if code == NOTHING:
        return b""
    rows = selection.rows()
    if code != BITS:
        return rows.astype(_INDEX[code]).tobytes()
    member = np.zeros(grid(shape, selection.elements), dtype=bool)
    np.put_along_axis(member, rows, True, axis=1)
    return np.packbits(member, axis=1, bitorder="little").tobytes()


def from_bytes(
    data: memoryview, shape: tuple[int, ...], kept: int, elements: bool, code: int
) -> KeptChannels | KeptElements:
    """The selection that `to_bytes` wrote.

    Raises:
        WireError: not `kept` channels, or elements of every example, or not in order.
    """
    rows, size = grid(shape, elements)
    if code == NOTHING:
        found = np.tile(np.arange(size), (rows, 1))
    elif code == BITS:
        found = np.nonzero(_bits(data, rows, size, kept))[1].reshape(rows, kept)
    else:
        found = np.frombuffer(data, dtype=_INDEX[code]).reshape(rows, kept).astype(np.int64)
        if int(found[:, -1].max()) >= size or bool((np.diff(found, axis=1) <= 0).any()):
            raise WireError(f"indices: expected each row strictly increasing and below {size}")
    indices = torch.from_numpy(found)
    if elements:
        return KeptElements(indices)
    return KeptChannels(torch.zeros(size, dtype=torch.bool).index_fill_(0, indices[0], True))


def _bits(data: memoryview, rows: int, size: int, kept: int) -> np.ndarray:
    """Rows of `size` bits of which `kept` are set, as zeros and ones [rows, size]."""
    packed = np.frombuffer(data, dtype=np.uint8).reshape(rows, -1)
    bits = np.unpackbits(packed, axis=1, bitorder="little")
    if bits[:, size:].any():
        raise WireError("mask: expected zeros after the last bit")
    if bool((bits.sum(axis=1, dtype=np.int64) != kept).any()):
        raise WireError(f"mask: expected {kept} bits set in each row of {size}")
    return bits[:, :size]
