"""The coder of magnitudes that fall off: lossless, of the length that three sums say."""

from math import ceil, log2
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluiceway.core.messages import WireError
from sluiceway.split import geometric

some = settings(max_examples=60, deadline=None)
Numbers = np.ndarray[Any, np.dtype[np.int8]]


def sums(groups: list[Numbers]) -> Any:
    """How many, how many are not 0, and their sum of magnitudes."""
    each = [(len(one), np.count_nonzero(one), np.abs(one.astype(int)).sum()) for one in groups]
    return np.array(each, dtype=float).T[None]


def length(groups: list[Numbers]) -> int:
    """By loops and by each integer's probability."""
    means = [sum(abs(int(q)) for q in one) / len(one) for one in groups]
    if not any(means):
        return (len(groups) + 1) // 2
    octaves = [2 * log2(mean) // 1 if mean else None for mean in means]
    top = max(octave for octave in octaves if octave is not None)
    classes = [None if octave is None else max(1, octave - top + 15) for octave in octaves]
    bits, integers = 0.0, 0
    found = sorted({number for number in classes if number is not None})
    for number in found:
        members = [one for one, its in zip(groups, classes, strict=True) if its == number]
        magnitudes = [abs(int(q)) for one in members for q in one]
        z, s, n = sum(q > 0 for q in magnitudes), sum(magnitudes), len(magnitudes)
        o = 2.0**15.875 if z == n else 2 ** (round(8 * log2(z / (n - z))) / 8)
        m = 2.0**-16 if s == z else 2 ** (round(8 * log2((s - z) / z)) / 8)
        for q in magnitudes:
            p = 1 / (1 + o)
            if q:
                p = o / (1 + o) / 2 / (1 + m) * (m / (1 + m)) ** (q - 1)
            bits -= log2(p)
        integers += n
    return (len(groups) + 1) // 2 + 3 * len(found) + 4 * (ceil(bits / 32 + integers / 2**16) + 1)


class TestGeometric:
    @given(
        st.lists(st.lists(st.integers(-127, 127), min_size=1, max_size=40), min_size=1, max_size=9)
        | st.lists(st.lists(st.integers(-2, 2), min_size=1, max_size=40), min_size=1, max_size=30)
    )
    @some
    def test_without_loss(self, lists: list[list[int]]) -> None:
        groups = [np.array(one, dtype=np.int8) for one in lists]
        sizes = [len(one) for one in groups]
        data = geometric.encode(np.concatenate(groups), sizes)
        assert len(data) == geometric.lengths(sums(groups))[0] == length(groups)
        again = geometric.decode(memoryview(data), sizes)
        assert np.array_equal(again, np.concatenate(groups))

    @pytest.mark.parametrize("scale", [0.1, 0.5, 3.0, 20.0])
    def test_near_the_entropy_of_what_falls_off(self, scale: float) -> None:
        drawn = np.random.default_rng(0).laplace(0, scale, (8, 5000))
        groups = list(np.rint(drawn).clip(-127, 127).astype(np.int8))
        counts = np.unique(groups, return_counts=True)[1] / 40_000
        entropy = -(counts * np.log2(counts)).sum() * 40_000 / 8
        data = geometric.encode(np.concatenate(groups), [5000] * 8)
        assert len(data) < 1.02 * entropy + 40

    def test_rows_are_apart(self) -> None:
        rng = np.random.default_rng(1)
        each = [
            sums([rng.integers(-k, k + 1, 30).astype(np.int8) for k in (0, 1, 9)]) for _ in range(3)
        ]
        together = geometric.lengths(np.concatenate(each))
        assert together.tolist() == [int(geometric.lengths(one)[0]) for one in each]

    def test_refusals(self) -> None:
        numbers = np.random.default_rng(0).integers(-3, 4, 50).astype(np.int8)
        data = geometric.encode(numbers, [20, 30])
        assert data[0] == 15 + 16 * 15
        for broken, why in (
            (data[:-1], "whole words"),
            (data + b"\1\0\0\0", "longer"),
            (data + b"\0\0\0\0" * 2, "longer"),
            (data[:-12], "shorter"),
            (data[:3], "ends within"),
            (data[:1] + b"\0" + data[2:], "1 to 127"),
            (data[:1] + b"\x80" + data[2:], "1 to 127"),
        ):
            with pytest.raises(WireError, match=why):
                geometric.decode(memoryview(broken), [20, 30])
        odd = geometric.encode(numbers, [50])
        with pytest.raises(WireError, match="unused half"):
            geometric.decode(memoryview(bytes([odd[0] | 16]) + odd[1:]), [50])
