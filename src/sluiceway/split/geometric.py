"""A lossless coder of integers about 0 whose magnitudes fall off: two numbers a class  [ours].

Integers in [-127, 127] come in groups. Groups alike in their mean magnitude form a class: 0 if all
of a group is 0, else 15 for the largest mean, 14 for a half octave below it, ..., 1 for all below
that. Of a class

    P(0) = 1 / (1 + o),    P(q) = P(-q) = o / (1 + o) / 2 / (1 + m) (m / (1 + m))^(|q| - 1)

with o the odds of another integer than 0, and m what the magnitudes of those are above 1 in the
mean. So what the integers take follows from how many a group has, how many of them are not 0, and
their sum of magnitudes: three sums where a table of frequencies needs a histogram. On cosine
transforms of smashed data and gradients it is within 1 % of each class's entropy, and the tables of
`coder` took more than that. In order, little-endian:

    classes    4 bits a group, two a byte, the first in the low half
    tables     for each class above 0 that has groups: its largest magnitude, uint8; o and m, a
               byte each, of which the number is 2^((byte - 128) / 8)
    stream     as in `coder`, of integers 0, 1, -1, 2, ... as 0, 1, 2, 3, ...; it ends in zeros up
               to the length that o and m say
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sluiceway.core.messages import WireError
from sluiceway.split import coder
from sluiceway.split.coder import Frequencies, Integers, Sizes

LARGEST: Final = 127
#: Bytes of a class.
_EACH: Final = 3
#: In place of 0 where a logarithm is taken.
_NONE: Final = 1e-300
_CLASSES: Final = np.arange(1, coder.CLASSES)
#: From how many integers, how many are not 0 and their magnitudes, to what each has of its own.
_SPLIT: Final = np.array([[1.0, -1, 0], [0, 1, 0], [0, -1, 1]])
Sums = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Plan:
    """Of each row: its groups' classes, log2 of o and m of each class above 0, and its stream.

    Attributes:
        classes: [R, G].
        live: which classes above 0 have groups, [R, 15].
        logs: of o and m, eighths in [-16, 16), [2, R, 15].
        words: [R].
    """

    classes: npt.NDArray[np.float64]
    live: npt.NDArray[np.bool_]
    logs: Frequencies
    words: npt.NDArray[np.float64]


def _planned(sums: Sums) -> _Plan:
    """See `lengths`."""
    levels = np.floor(2 * np.log2(np.maximum(sums[:, 2], _NONE) / sums[:, 0]))
    nearest = np.maximum(levels - levels.max(1, keepdims=True) + _CLASSES[-1], 1)
    classes = np.where(sums[:, 2] > 0, nearest, 0)
    parts = _parts(classes, sums)
    sizes = np.log2(np.maximum(parts, _NONE))
    logs = np.minimum(np.maximum(np.rint(8 * (sizes[1:] - sizes[:2])), -128), 127) / 8
    return _Plan(classes, parts[1] > 0, logs, _words(parts, logs))


def _parts(classes: npt.NDArray[np.float64], sums: Sums) -> Sums:
    """Of each class above 0: zeros, other integers, and what their magnitudes are above 1."""
    added: Sums = _SPLIT @ sums @ (classes[:, :, None] == _CLASSES)
    return added.transpose(1, 0, 2)


def _words(parts: Sums, logs: Frequencies) -> npt.NDArray[np.float64]:
    """Of the streams of classes with these parts, [3, R, 15], if o and m are 2^logs."""
    zeros, others, above = parts
    plus = np.logaddexp2(0, logs)  # log2(1 + o), log2(1 + m)
    minus = plus - logs  # log2(1 + 1 / o), log2(1 + 1 / m)
    bits = zeros * plus[0] + others * (1 + minus[0] + plus[1]) + above * minus[1]
    total = (zeros + others).sum(1)
    words: Sums = np.ceil(bits.sum(1) / 32 + total * coder.LOST) + (total > 0)
    return words


def lengths(sums: Sums) -> npt.NDArray[np.int64]:
    """The lengths in bytes of what `encode` gives of groups with these sums, row by row, [R].

    Args:
        sums: how many integers each group has, at least 1, how many of them are not 0, and their
            sum of magnitudes, [R, 3, G]; they may be estimates.
    """
    plan = _planned(sums)
    heads: npt.NDArray[np.int64] = (sums.shape[2] + 1) // 2 + _EACH * plan.live.sum(1)
    return heads + 4 * plan.words.astype(np.int64)


def encode(numbers: npt.NDArray[np.int8], sizes: Sizes) -> bytes:
    """Integers as bytes.

    Args:
        numbers: in [-127, 127], group after group.
        sizes: how many each group has, at least 1.
    """
    starts = _starts(sizes)
    plan = _planned(_sums(numbers, sizes))
    classes, live = plan.classes[0].astype(np.uint8), plan.live[0]
    largest = np.maximum.reduceat(np.abs(numbers), starts).astype(np.uint8)
    most = (largest * (classes == _CLASSES[live, None])).max(1, initial=0)
    parameters = (8 * plan.logs[:, 0, live] + 128).astype(np.uint8)
    tables = np.stack([most, *parameters], 1).astype(np.uint8)
    of_classes = _of_classes(classes, tables)
    stream = coder.to_stream(coder.folded(numbers), sizes, classes, of_classes, int(plan.words[0]))
    return coder.in_halves(classes) + tables.tobytes() + stream


def decode(data: memoryview, sizes: Sizes) -> npt.NDArray[np.int8]:
    """The integers that `encode` wrote, group after group.

    Args:
        data: all of what it gave.
        sizes: how many integers each group has; the caller has checked that they can be allocated.

    Raises:
        WireError: not what `encode` writes.
    """
    classes, at = coder.read_classes(data, len(sizes))
    present = np.flatnonzero(np.bincount(classes, minlength=coder.CLASSES)[1:])
    end = at + _EACH * len(present)
    tables = np.frombuffer(coder.taken(data, at, end - at), dtype=np.uint8).reshape(-1, _EACH)
    if ((tables[:, 0] == 0) | (tables[:, 0] > LARGEST)).any():
        raise WireError(f"integers: expected 1 to {LARGEST} as the largest magnitude of a class")
    of_classes = _of_classes(classes, tables)
    numbers = coder.unfolded(coder.from_stream(data[end:], sizes, classes, of_classes)[0])
    logs = np.zeros((2, 1, len(_CLASSES)))
    logs[:, 0, present] = (tables[:, 1:].T - 128.0) / 8
    words = _words(_parts(classes[None].astype(float), _sums(numbers, sizes)), logs)
    # A machine's logarithms may have another last digit.
    if abs(4 * int(words[0]) - len(data) + end) > 4:
        raise WireError("stream: longer or shorter than its integers")
    return numbers


def _starts(sizes: Sizes) -> npt.NDArray[np.int64]:
    """Where groups begin."""
    return np.append(0, np.cumsum(sizes)[:-1])


def _sums(numbers: npt.NDArray[np.int8], sizes: Sizes) -> Sums:
    """See `lengths`, [1, 3, G]."""
    magnitudes = np.abs(numbers).astype(np.float64)
    parts = np.stack([np.minimum(magnitudes, 1), magnitudes])
    return np.vstack([sizes, np.add.reduceat(parts, _starts(sizes), axis=1)])[None]


def _of_classes(classes: Integers, tables: Integers) -> dict[int, Frequencies]:
    """The frequencies of integers 0, 1, -1, 2, ... by class, of exact operations alone."""
    frequencies = dict[int, Frequencies]()
    odds = coder.power(128 - tables[:, 1:].astype(np.int64))
    present = np.flatnonzero(np.bincount(classes, minlength=1)[1:]) + 1
    for number, largest, (o, m) in zip(present.tolist(), tables[:, 0].tolist(), odds, strict=True):
        falling = np.multiply.accumulate(np.full(largest, m / (1 + m)))
        frequencies[number] = np.append(1.0, np.repeat(falling * (o / (2 * m)), 2))
    return frequencies
