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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

import constriction
import numpy as np
import numpy.typing as npt

from sluiceway.core.messages import WireError

Integers = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
Frequencies = npt.NDArray[np.float64]
Sizes = Sequence[int] | npt.NDArray[np.int64]

CLASSES: Final = 16
_NEVER: Final = 255
_FEW: Final = 16
#: The coder's frequencies are multiples of 2^-24.
_PRECISION: Final = 24
#: Words of the stream an integer beyond its information, with some room; and words of zeros behind
#: it, at most, but for these.
LOST: Final = 2.0**-16
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


def folded(numbers: npt.NDArray[np.int8]) -> Integers:
    """Integers 0, 1, -1, 2, ... above -128 as 0, 1, 2, 3, ..."""
    negative = -numbers
    return (negative << 1 ^ negative >> 7).view(np.uint8)


def unfolded(numbers: Integers) -> npt.NDArray[np.int8]:
    """The inverse of `folded`; 255, which it does not give, as -128."""
    return -(numbers >> 1 ^ -(numbers & 1)).view(np.int8)


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


def counts_of(integers: Integers, sizes: Sizes) -> Counts:
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
    words = ceil(bits / 32 + coded * LOST) + 1 if tables else 0
    return _Plan(b"".join(parts), classes, tables, words)


def size(counts: Counts) -> int:
    """The length in bytes of what `encode` gives of groups that have each integer so often."""
    plan = _planned(counts)
    return len(plan.head) + 4 * plan.words


def encode(integers: Integers, sizes: Sizes) -> bytes:
    """Integers as bytes.

    Args:
        integers: in [0, 255], group after group.
        sizes: how many each group has, at least 1.
    """
    plan = _planned(counts_of(integers, sizes))
    frequencies = {number: _frequencies(table) for number, table in plan.tables.items()}
    return plan.head + to_stream(integers, sizes, plan.classes, frequencies, plan.words)


def decode(data: memoryview, sizes: Sizes) -> Integers:
    """The integers that `encode` wrote, group after group.

    Args:
        data: all of what it gave.
        sizes: how many integers each group has; the caller has checked that they can be allocated.

    Raises:
        WireError: not what `encode` writes.
    """
    classes, at = read_classes(data, len(sizes))
    frequencies, alone = dict[int, Frequencies](), dict[int, int]()
    for number in sorted(set(classes.tolist()) - {0}):
        length = 1 + int(taken(data, at, 1)[0])
        table = np.frombuffer(taken(data, at + 1, length), dtype=np.uint8)
        if length == 1 or table[-1] == _NEVER or int(table.min()) != 0:
            raise WireError("frequencies: expected a largest one, and one of the largest integer")
        if int((table != _NEVER).sum()) > 1:
            frequencies[number] = _frequencies(table)
        else:
            alone[number] = length - 1
        at += 1 + length
    integers, zeros = from_stream(data[at:], sizes, classes, frequencies)
    if zeros > _PADDING + 2 * LOST * len(integers):
        raise WireError("stream: longer than its integers")
    for number, largest in alone.items():
        integers[np.repeat(classes == number, sizes)] = largest
    return integers


def read_classes(data: memoryview, groups: int) -> tuple[Integers, int]:
    """The class of each group, [G], and where they end. Raises WireError."""
    end = (groups + 1) // 2
    classes = from_halves(taken(data, 0, end))
    if classes[groups:].any():
        raise WireError("classes: expected zero in the unused half of the last byte")
    return classes[:groups], end


def to_stream(
    integers: Integers,
    sizes: Sizes,
    classes: Integers,
    frequencies: Mapping[int, Frequencies],
    words: int,
) -> bytes:
    """The range coder's words, with zeros behind them.

    Args:
        integers: group after group.
        sizes: how many each group has.
        classes: of each group, [G].
        frequencies: of 0, 1, ... by class; integers of a class without any are not in the stream.
        words: at least as many as are needed.
    """
    encoder = constriction.stream.queue.RangeEncoder()
    for number, members in _members(classes, np.cumsum(sizes)):
        if number in frequencies:
            symbols = np.concatenate([integers[a:b] for a, b in members])
            encoder.encode(symbols.astype(np.int32), _model(frequencies[number]))
    stream: bytes = encoder.get_compressed().astype("<u4").tobytes()
    return stream.ljust(4 * words, b"\0")


def from_stream(
    data: memoryview, sizes: Sizes, classes: Integers, frequencies: Mapping[int, Frequencies]
) -> tuple[Integers, int]:
    """What `to_stream` wrote: the integers, 0 where they are not in it; and words of zeros.

    Raises:
        WireError: not of these frequencies, or something else behind it.
    """
    if len(data) % 4:
        raise WireError("stream: expected whole words of 4 bytes")
    words = np.frombuffer(data, dtype="<u4").astype(np.uint32)
    decoder = constriction.stream.queue.RangeDecoder(words)
    encoder = constriction.stream.queue.RangeEncoder()
    ends = np.cumsum(sizes)
    integers = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    for number, members in _members(classes, ends):
        if number not in frequencies:
            continue
        found, count = frequencies[number], sum(b - a for a, b in members)
        try:
            symbols = decoder.decode(_model(found, len(found) <= _FEW), count)
            encoder.encode(symbols, _model(found))
        except (AssertionError, ValueError) as error:
            raise WireError("stream: not of these frequencies") from error
        done = 0
        for a, b in members:
            integers[a:b] = symbols[done : done + b - a]
            done += b - a
    # A decoder reads on in zeros, and past words that are not needed: only one stream is right, and
    # zeros behind it.
    again = encoder.get_compressed()
    rest = words[len(again) :]
    if not np.array_equal(again, words[: len(again)]) or rest.any():
        raise WireError("stream: longer or shorter than its integers")
    return integers, len(rest)


def _members(
    classes: Integers, ends: npt.NDArray[np.int64]
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Where the groups of each class above 0 begin and end, class by class."""
    starts = np.append(0, ends[:-1])
    for number in np.flatnonzero(np.bincount(classes, minlength=1)).tolist():
        if number:
            found = classes == number
            yield number, list(zip(starts[found].tolist(), ends[found].tolist(), strict=True))


def _model(frequencies: Frequencies, lazy: bool = False) -> "constriction.stream.model.Categorical":
    """The coder's model; the same on every machine, for it takes exact operations alone.

    To read integers of few values a lazy model is faster; it has the same frequencies.
    """
    return constriction.stream.model.Categorical(frequencies, perfect=False, lazy=lazy)


def _frequencies(table: Integers) -> Frequencies:
    """What a table says: 2^(-f / 8), or 0."""
    return np.where(table == _NEVER, 0.0, power(table.astype(np.int64)))


def power(eighths: npt.NDArray[np.int64]) -> Frequencies:
    """2^(-f / 8), the same on every machine."""
    powers: Frequencies = np.ldexp(_EIGHTHS[eighths % 8], -(eighths // 8))
    return powers


def taken(data: memoryview, start: int, length: int) -> memoryview:
    """That many bytes. Raises WireError if there are not."""
    if start + length > len(data):
        raise WireError("message: ends within its frequencies")
    return data[start : start + length]
