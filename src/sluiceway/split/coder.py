"""A lossless coder of small integers: a range coder with the frequencies of each batch.

Integers come in groups, such as the components of a batch. Groups whose integers are alike in size
share a table of frequencies, so that a table costs little: a group's class is 0 if all its integers
are 0, else by the half octave of their mean. In order, little-endian:

    classes    4 bits a group, two a byte, the first in the low half
    tables     for each class above 0 that has groups: its largest integer, uint8, then for each
               integer up to that a byte f, of which the frequency is 2^(-f / 8); 255 for never
    stream     uint32 words of the range coder, the integers class by class, group by group, then
               zeros up to the length that the frequencies say: where a message is not written, its
               length needs no coding (`size`)

Against zstd on the same integers the stream is a quarter to a half shorter, within 3 % of the
entropy of the groups (`benchmarks/channels.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

import constriction
import numpy as np
import numpy.typing as npt

from sluiceway.core.messages import WireError

Integers = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]

CLASSES: Final = 16
_NEVER: Final = 255
_FEW: Final = 16
#: The coder's frequencies are multiples of 2^-24.
_PRECISION: Final = 24
#: Words of the stream an integer beyond its information, with some room; and words of zeros behind
#: it, at most, but for these.
_LOST: Final = 2.0**-16
_PADDING: Final = 3
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


def classes_of(counts: Counts) -> Integers:
    """The class of each group, [G], in [0, 15], by how often it has each integer, [G, L]."""
    means = counts @ np.arange(counts.shape[1]) / counts.sum(1)
    # frexp is exact: the mean is m 2^e with m in [1/2, 1), a half octave above from sqrt(1/2) on.
    m, e = np.frexp(means)
    found = 2 * e.astype(np.int64) + (m >= _EIGHTHS[4]) + 10
    return np.where(means > 0, found.clip(1, CLASSES - 1), 0).astype(np.uint8)


def tables_of(counts: Counts) -> Integers:
    """What is written of the frequencies of integers by how often they occur, [..., L]."""
    seen = counts > 0
    logs = np.log2(counts.max(-1, keepdims=True) / np.where(seen, counts, 1))
    return np.where(seen, np.rint(8 * logs).clip(0, _NEVER - 1), _NEVER).astype(np.uint8)


def counts_of(integers: Integers, sizes: Sequence[int] | npt.NDArray[np.int64]) -> Counts:
    """How often each of the groups, one after another, has each integer, [G, L]."""
    groups, top = len(sizes), 1 + int(integers.max(initial=0))
    keys = np.repeat(top * np.arange(groups), sizes) + integers
    return np.bincount(keys, minlength=groups * top).reshape(groups, top)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What comes before the stream, as bytes; the tables of what is in it, by class; its length.

    The range coder takes -log2 of each integer's frequency and hardly more: in trials at most 1.02
    words of 32 bits, and 1.3e-4 bits an integer.
    """

    head: bytes
    classes: Integers
    tables: dict[int, Integers]
    words: int


def _planned(counts: Counts) -> _Plan:
    classes = classes_of(counts)
    of_class = np.arange(1, CLASSES)[:, None] == classes
    # Of each class above 0 that has groups; whole numbers below 2^53 are exact.
    sums = (of_class[of_class.any(1)].astype(np.float64) @ counts).astype(np.int64)
    numbers = 1 + np.flatnonzero(of_class.any(1))
    written, seen = tables_of(sums), sums > 0
    parts, tables = [in_halves(classes)], dict[int, Integers]()
    for number, table, found in zip(numbers.tolist(), written, seen, strict=True):
        table = table[: 1 + int(np.flatnonzero(found)[-1])]
        parts.append(bytes([len(table) - 1]) + table.tobytes())
        if int(found.sum()) > 1:
            tables[number] = table
    frequencies = _frequencies(written)
    shares = frequencies / frequencies.sum(1, keepdims=True)
    # A class of one integer alone takes nothing, and log2(1) is 0.
    bits = float((sums * -np.log2(np.where(seen, shares, 1)).clip(min=-_PRECISION)).sum())
    coded = int(sums[seen.sum(1) > 1].sum())
    words = ceil(bits / 32 + coded * _LOST) + 1 if tables else 0
    return _Plan(b"".join(parts), classes, tables, words)


def size(counts: Counts) -> int:
    """The length in bytes of what `encode` gives of groups that have each integer so often."""
    plan = _planned(counts)
    return len(plan.head) + 4 * plan.words


def encode(integers: Integers, sizes: Sequence[int] | npt.NDArray[np.int64]) -> bytes:
    """Integers as bytes.

    Args:
        integers: in [0, 255], group after group.
        sizes: how many each group has, at least 1.
    """
    plan = _planned(counts_of(integers, sizes))
    encoder = constriction.stream.queue.RangeEncoder()
    for number, members in _members(plan.classes, np.cumsum(sizes)):
        if number in plan.tables:
            symbols = np.concatenate([integers[a:b] for a, b in members])
            encoder.encode(symbols.astype(np.int32), _model(plan.tables[number]))
    stream: bytes = encoder.get_compressed().astype("<u4").tobytes()
    return plan.head + stream.ljust(4 * plan.words, b"\0")


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
    # A decoder reads on in zeros, and past words that are not needed: only one stream is right, and
    # zeros, few, behind it.
    again = encoder.get_compressed()
    rest = words[len(again) :]
    few = _PADDING + 2 * _LOST * len(integers)
    if not np.array_equal(again, words[: len(again)]) or rest.any() or len(rest) > few:
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
    frequencies = _frequencies(table)
    return constriction.stream.model.Categorical(frequencies, perfect=False, lazy=lazy)


def _frequencies(table: Integers) -> npt.NDArray[np.float64]:
    """What a table says: 2^(-f / 8), or 0."""
    powers: npt.NDArray[np.float64] = np.ldexp(_EIGHTHS[table % 8], -(table // 8).astype(np.int64))
    return np.where(table == _NEVER, 0.0, powers)


def _taken(data: memoryview, start: int, length: int) -> memoryview:
    """That many bytes. Raises WireError if there are not."""
    if start + length > len(data):
        raise WireError("message: ends within its frequencies")
    return data[start : start + length]
