"""A lossless coder of small integers: a range coder with the frequencies of each batch.

Integers come in groups, such as the components of a batch. Groups whose integers are alike in size
share a table of frequencies, so that a table costs little: a group's class is 0 if all its integers
are 0, else by the half octave of their mean. In order, little-endian:

    classes    4 bits a group, two a byte, the first in the low half
    tables     for each class above 0 that has groups: its largest integer, uint8, then for each
               integer up to that a byte f, of which the frequency is 2^(-f / 8); 255 for never
    stream     uint32 words of the range coder, the integers class by class, group by group

Against zstd on the same integers the stream is a quarter to a half shorter, within 3 % of the
entropy of the groups (`benchmarks/channels.py`).
"""

from collections.abc import Iterator, Sequence
from typing import Final

import constriction
import numpy as np
import numpy.typing as npt

from sluiceway.core.messages import WireError

Integers = npt.NDArray[np.uint8]

CLASSES: Final = 16
_NEVER: Final = 255
_FEW: Final = 16
#: 2^(-f / 8) for f below 8, the float64 nearest to each; all else is exact scaling by powers of 2.
_EIGHTHS: Final = np.array(
    [
        1.0,
        0.9170040432046712,
        0.8408964152537145,
        0.7711054127039704,
        0.7071067811865476,
        0.6484197773255048,
        0.5946035575013605,
        0.5452538663326288,
    ]
)


def folded(numbers: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """Integers 0, 1, -1, 2, ... as 0, 1, 2, 3, ..."""
    return np.where(numbers > 0, 2 * numbers - 1, -2 * numbers)


def unfolded(numbers: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """The inverse of `folded`."""
    return np.where(numbers % 2, (numbers + 1) // 2, -(numbers // 2))


def in_halves(numbers: Integers) -> bytes:
    """Numbers below 16, two a byte, the first in the low half; an odd last one leaves a zero."""
    even = np.append(numbers, np.zeros(len(numbers) % 2, dtype=np.uint8))
    return (even[::2] | even[1::2] << 4).tobytes()


def from_halves(data: memoryview) -> Integers:
    """What `in_halves` gave, two a byte, with the zero that may be after them."""
    packed = np.frombuffer(data, dtype=np.uint8)
    return np.stack([packed & 15, packed >> 4], 1).ravel()


def classes_of(integers: Integers, ends: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """The class of each group, [G], in [0, 15]; groups of at least one integer end at `ends`."""
    starts = np.append(0, ends[:-1])
    means = np.add.reduceat(integers, starts, dtype=np.int64) / (ends - starts)
    # frexp is exact: the mean is m 2^e with m in [1/2, 1), a half octave above from sqrt(1/2) on.
    m, e = np.frexp(means)
    found = 2 * e.astype(np.int64) + (m >= _EIGHTHS[4]) + 10
    return np.where(means > 0, found.clip(1, CLASSES - 1), 0).astype(np.uint8)


def table_of(counts: npt.NDArray[np.int64]) -> Integers:
    """What is written of the frequencies of integers by how often they occur; the last one does."""
    seen = counts > 0
    logs = np.log2(counts.max() / np.where(seen, counts, 1))
    return np.where(seen, np.rint(8 * logs).clip(0, _NEVER - 1), _NEVER).astype(np.uint8)


def encode(integers: Integers, sizes: Sequence[int] | npt.NDArray[np.int64]) -> bytes:
    """Integers as bytes.

    Args:
        integers: in [0, 255], group after group.
        sizes: how many each group has, at least 1.
    """
    ends = np.cumsum(sizes)
    classes = classes_of(integers, ends)
    parts = [in_halves(classes)]
    encoder = constriction.stream.queue.RangeEncoder()
    for _, members in _members(classes, ends):
        symbols = np.concatenate([integers[a:b] for a, b in members])
        counts = np.bincount(symbols)
        table = table_of(counts)
        parts.append(bytes([len(table) - 1]) + table.tobytes())
        if int((counts > 0).sum()) > 1:
            encoder.encode(symbols.astype(np.int32), _model(table))
    words = encoder.get_compressed()
    return b"".join([*parts, words.astype("<u4").tobytes()])


def decode(data: memoryview, sizes: Sequence[int] | npt.NDArray[np.int64]) -> Integers:
    """The integers that `encode` wrote, group after group.

    Args:
        data: all of what it gave.
        sizes: how many integers each group has; the caller has checked that they can be allocated.

    Raises:
        WireError: not what `encode` writes.
    """
    header = (len(sizes) + 1) // 2
    classes = from_halves(_taken(data, 0, header))
    if classes[len(sizes) :].any():
        raise WireError("classes: expected zero in the unused half of the last byte")
    tables, at = dict[int, Integers](), header
    for number in sorted(set(classes.tolist()) - {0}):
        length = 1 + int(_taken(data, at, 1)[0])
        table = np.frombuffer(_taken(data, at + 1, length), dtype=np.uint8)
        if length == 1 or table[-1] == _NEVER or int(table.min()) != 0:
            raise WireError("frequencies: expected a largest one, and one of the largest integer")
        tables[number], at = table, at + 1 + length
    if (len(data) - at) % 4:
        raise WireError("stream: expected whole words of 4 bytes")
    words = np.frombuffer(data[at:], dtype="<u4").astype(np.uint32)
    decoder = constriction.stream.queue.RangeDecoder(words)
    encoder = constriction.stream.queue.RangeEncoder()
    ends = np.cumsum(sizes)
    integers = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    for number, members in _members(classes[: len(sizes)], ends):
        table, count = tables[number], sum(b - a for a, b in members)
        if int((table != _NEVER).sum()) > 1:
            try:
                symbols = decoder.decode(_model(table, len(table) <= _FEW), count)
                encoder.encode(symbols, _model(table))
            except (AssertionError, ValueError) as error:
                raise WireError("stream: not of these frequencies") from error
        else:
            symbols = np.full(count, len(table) - 1, dtype=np.uint8)
        done = 0
        for a, b in members:
            integers[a:b] = symbols[done : done + b - a]
            done += b - a
    # A decoder reads on in zeros, and past words that are not needed: only one stream is right.
    if not np.array_equal(encoder.get_compressed(), words):
        raise WireError("stream: longer or shorter than its integers")
    return integers


def _members(
    classes: Integers, ends: npt.NDArray[np.int64]
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Where the groups of each class above 0 begin and end, class by class."""
    starts = np.append(0, ends[:-1])
    for number in np.flatnonzero(np.bincount(classes, minlength=1)).tolist():
        if number:
            found = classes == number
            yield number, list(zip(starts[found].tolist(), ends[found].tolist(), strict=True))


def _model(table: Integers, lazy: bool = False) -> "constriction.stream.model.Categorical":
    """The coder's model; the same on every machine, for it takes exact operations alone.

    To read integers of few values a lazy model is faster; it has the same frequencies.
    """
    frequencies = np.ldexp(_EIGHTHS[table % 8], -(table // 8).astype(np.int64))
    frequencies[table == _NEVER] = 0
    return constriction.stream.model.Categorical(frequencies, perfect=False, lazy=lazy)


def _taken(data: memoryview, start: int, length: int) -> memoryview:
    """That many bytes. Raises WireError if there are not."""
    if start + length > len(data):
        raise WireError("message: ends within its frequencies")
    return data[start : start + length]
