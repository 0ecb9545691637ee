"""The bits of SL-FAC (arXiv 2604.07316): low frequencies with most of the energy, bits by energy.

Known of the paper to us: a cosine transform of smashed data, the smallest set of low frequencies
with 90 % of the energy, and bits from the logarithm of energy in [2, 8]; all else is [ours]. Each
channel is transformed over its positions (DCT-II, orthonormal), frequencies in order of their sum.
Its first k cross, the fewest that hold a share of its energy in this batch; the others are read as
0. With e_c the mean energy of what crosses of a channel, its bits are

    b_c = round(2 + 6 (log e_c - min log e) / (max log e - min log e))

as affine integers, ranges clipped as in `bitted`. The share is 0.9, or the largest below it with
which the packed integers fit the budget of bytes; then channels of the least energy are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sluiceway.core.messages import WireError
from sluiceway.split import coder
from sluiceway.split.bitted import (
    affine,
    fold,
    from_short,
    pack_bits,
    to_short,
    unfold,
    unpack_bits,
    usable,
)
from sluiceway.split.cosines import Sides, frequency_order, transformed

SHARE: Final = 0.9
FEWEST, MOST = 2, 8
_SEARCH: Final = 12
_POSITIONS: Final = 65535

Integers = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Frequencies:
    """The first frequencies of each channel, as integers.

    Attributes:
        shape: N, G, S of all values.
        sides: of the positions.
        counts: k, frequencies of each channel, [G] in [0, S].
        bits: [G] in [2, 8]; 0 where nothing crosses.
        numbers: of each channel that crosses [N k], an example's together.
        low, step: [G] float32 of few digits, on the CPU; 0 and 1 where nothing crosses.
        coded: whether the integers are coded by their frequencies, or packed.
        device: of the values.
    """

    shape: tuple[int, int, int]
    sides: Sides
    counts: npt.NDArray[np.int64]
    bits: npt.NDArray[np.int64]
    numbers: list[Integers]
    low: Tensor
    step: Tensor
    coded: bool
    device: torch.device

    @torch.no_grad()
    def values(self) -> Tensor:
        """[N, G, S] float32."""
        n, g, s = self.shape
        found = torch.zeros(n, g, s)
        for channel, numbers in zip(self.live, self.numbers, strict=True):
            k = int(self.counts[channel])
            read = torch.from_numpy(numbers).view(n, k).float()
            found[:, channel, :k] = read * self.step[channel] + self.low[channel]
        back = np.argsort(frequency_order(self.sides, s))
        return transformed(found[:, :, back].to(self.device), self.sides, inverse=True)

    @property
    def live(self) -> npt.NDArray[np.int64]:
        """Channels that cross."""
        return np.flatnonzero(self.counts)

    @property
    def nbytes(self) -> int:
        """The length of `payload`."""
        return len(self.payload)

    @cached_property
    def payload(self) -> bytes:
        """Counts as uint16, bits as 4 each, of channels that cross low and step as bfloat16.

        Then their integers, a channel's from a byte on; or coded about the channel's central one,
        as those of `bitted.Bitted` are.
        """
        live = torch.from_numpy(self.live)
        parts = [self.counts.astype("<u2").tobytes(), coder.in_halves(self.bits.astype(np.uint8))]
        parts += [to_short(self.low[live]), to_short(self.step[live])]
        if self.coded and self.numbers:
            centre = np.rint([one.mean() for one in self.numbers]).astype(np.uint8)
            folded = [
                fold(one[None], centre[i : i + 1], self.bits[self.live[i : i + 1]])[0]
                for i, one in enumerate(self.numbers)
            ]
            sizes = [len(one) for one in folded]
            return b"".join([*parts, centre.tobytes(), coder.encode(np.concatenate(folded), sizes)])
        pairs = zip(self.numbers, self.bits[self.live].tolist(), strict=True)
        return b"".join([*parts, *(pack_bits(one, bits) for one, bits in pairs)])

    @classmethod
    def read(
        cls,
        data: memoryview,
        shape: tuple[int, int, int],
        coded: bool,
        sides: Sides,
        to: torch.device,
    ) -> Frequencies:
        """The inverse of `payload`. Raises WireError."""
        n, g, s = shape
        at = 2 * g + (g + 1) // 2
        if len(data) < at:
            raise WireError("message: ends before its values")
        counts = np.frombuffer(data[: 2 * g], dtype="<u2").astype(np.int64)
        bits = coder.from_halves(data[2 * g : at]).astype(np.int64)
        if int(counts.max()) > s or bits[g:].any():
            raise WireError(f"frequencies: expected at most {s} a channel")
        bits = bits[:g]
        live = np.flatnonzero(counts)
        fits = (bits[live] >= FEWEST) & (bits[live] <= MOST)
        if not fits.all() or bits[counts == 0].any():
            raise WireError("bits: expected 2 to 8 a channel that crosses")
        if len(data) < at + 4 * len(live):
            raise WireError("message: ends before its values")
        low, step = torch.zeros(g), torch.ones(g)
        middle, end = at + 2 * len(live), at + 4 * len(live)
        low[torch.from_numpy(live)] = from_short(data[at:middle])
        step[torch.from_numpy(live)] = from_short(data[middle:end])
        if not usable(low, step, torch.from_numpy(bits)):
            raise WireError("scales: expected finite numbers, steps above 0")
        sizes = (n * counts[live]).tolist()
        if coded and sizes:
            if len(data) < end + len(live):
                raise WireError("message: ends before its values")
            centre = np.frombuffer(data[end : end + len(live)], dtype=np.uint8)
            folded = np.split(coder.decode(data[end + len(live) :], sizes), np.cumsum(sizes)[:-1])
            pairs = zip(folded, bits[live].tolist(), strict=True)
            if any(b < MOST and (one >> b).any() for one, b in pairs):
                raise WireError("integers: expected below 2^bits")
            numbers = [
                unfold(one[None], centre[i : i + 1], bits[live[i : i + 1]])[0]
                for i, one in enumerate(folded)
            ]
        else:
            numbers = list(_unpacked(data, end, sizes, bits[live].tolist()))
        return cls(shape, sides, counts, bits, numbers, low, step, coded, to)


def _unpacked(data: memoryview, at: int, sizes: list[int], bits: list[int]) -> Iterator[Integers]:
    """Packed integers, channel by channel. Raises WireError."""
    lengths = [(size * b + 7) // 8 for size, b in zip(sizes, bits, strict=True)]
    if len(data) != at + sum(lengths):
        raise WireError(f"message: expected {at + sum(lengths)} bytes of values")
    for size, b, length in zip(sizes, bits, lengths, strict=True):
        yield unpack_bits(data[at : at + length], size, b)
        at += length


@torch.no_grad()
def encode_slfac(
    values: Tensor, budget: float, coded: bool, sides: Sides, noise: Tensor | None = None
) -> Frequencies:
    """Values as integers of SL-FAC's bits.

    Args:
        values: [N, G, S] float32, finite.
        budget: bytes of the payload if it is packed.
        coded: see `Frequencies`.
        sides: of the positions.
        noise: uniform in [0, 1), as many as the values: rounds up by chance; None to the nearest.

    Raises:
        ValueError: a value is not finite, or there are too many positions.
    """
    n, g, s = values.shape
    if s > _POSITIONS:
        raise ValueError(f"slfac: expected at most {_POSITIONS} positions, got {s}")
    x = transformed(values, sides)[:, :, frequency_order(sides, s)]
    energy = x.double().square().mean(0).cpu().numpy()
    if not np.isfinite(energy).all():
        raise ValueError("values: expected finite numbers whose squares are finite")
    counts, bits = allocation(energy, n, budget)
    low, step, numbers = torch.zeros(g), torch.ones(g), list[Integers]()
    for channel in np.flatnonzero(counts).tolist():
        k = int(counts[channel])
        row = x[:, channel, :k].reshape(1, -1)
        some = None if noise is None else noise.view(n, g, s)[:, channel, :k].reshape(1, -1)
        each, a, size = affine(row, torch.tensor([int(bits[channel])]), some)
        low[channel], step[channel] = a[0], size[0]
        numbers.append(each[0].cpu().numpy())
    return Frequencies(
        (n, g, s), sides, counts, bits, numbers, low, step, coded, torch.device(values.device)
    )


def allocation(
    energy: npt.NDArray[np.float64], examples: int, budget: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """How many frequencies of each channel cross, and with how many bits.

    Args:
        energy: mean over examples of the squared coefficients, [G, S], lowest frequency first.
        examples: N.
        budget: bytes that header and packed integers may take.

    Returns:
        counts [G] in [0, S], bits [G] in [2, 8], or 0 where nothing crosses.
    """
    groups = len(energy)
    total = energy.sum(1)
    parts = energy.cumsum(1) / np.maximum(total, 1e-300)[:, None]

    def of(share: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
        # The last part is 1 but for rounding.
        counts = np.minimum((parts < share).sum(1) + 1, energy.shape[1]) * (total > 0)
        return sized(counts)

    def sized(
        counts: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
        live = counts > 0
        inside = np.where(np.arange(energy.shape[1]) < counts[:, None], energy, 0).sum(1)
        logs = np.log(np.maximum(inside / np.maximum(counts, 1), 1e-300))[live]
        bits = np.zeros(groups, dtype=np.int64)
        if live.any():
            spread = max(float(logs.max() - logs.min()), 1e-12)
            bits[live] = np.rint(FEWEST + (MOST - FEWEST) * (logs - logs.min()) / spread)
        nbytes = 2 * groups + (groups + 1) // 2 + 4 * int(live.sum())
        return counts, bits, nbytes + int(((examples * counts * bits + 7) // 8).sum())

    found = of(SHARE)
    if found[2] <= budget:
        return found[:2]
    low, high = 0.0, SHARE
    for _ in range(_SEARCH):
        middle = (low + high) / 2
        low, high = (middle, high) if of(middle)[2] <= budget else (low, middle)
    found = of(low)
    while found[2] > budget and found[0].any():
        fewer = found[0].copy()
        fewer[np.where(fewer > 0, total, np.inf).argmin()] = 0
        found = sized(fewer)
    return found[:2]
