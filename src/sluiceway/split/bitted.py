"""Integers of whole bits a component, that fill a budget of bytes  [ours].

Values come as [N, G, S] as in `quantise`; a component is a group g, and has N S values. Reverse
water-filling over the components' variances in this batch gives each 0 to 8 whole bits
(`channels.water_filling`). Affine, round((x - low) / step), with the range clipped at a number of
standard deviations that is the best of a few by squared error. A component of 0 bits is read as its
mean.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sluiceway.channels import water_filling
from sluiceway.core.messages import WireError
from sluiceway.split import coder

_TINY: Final = torch.finfo(torch.float32).tiny
#: The search for a range looks at about so many values.
_SEARCHED: Final = 1 << 13
#: Half the range in standard deviations by bits: of the best uniform quantiser of a Gaussian (Max,
#: 1960), plus half a step; and by which factors of it a range is tried.
_HALF_RANGES: Final = torch.tensor([0.0, 0.798, 1.49, 2.05, 2.51, 2.92, 3.28, 3.61, 3.93])
_FACTORS: Final = (0.75, 1.0, 1.25, 1.6)


@dataclass(frozen=True, eq=False)
class Bitted:
    """Integers of whole bits a component.

    Attributes:
        numbers: [N, G, S] uint8, below 2^bits of their component.
        bits: [G] int64 in [0, 8], on the CPU.
        low, step: [G] float32, of few digits; of a component of 0 bits `low` is its mean.
        coded: whether the integers are coded by their frequencies, or packed.
    """

    numbers: Tensor
    bits: Tensor
    low: Tensor
    step: Tensor
    coded: bool

    @torch.no_grad()
    def values(self) -> Tensor:
        """[N, G, S] float32."""
        return self.numbers.float() * self.step.unsqueeze(1) + self.low.unsqueeze(1)

    @cached_property
    def nbytes(self) -> int:
        """The length of `payload`, without coding."""
        if not self.coded:
            return _packed_bytes(self.bits, self.numbers[:, 0].numel())
        head, rows = self._rows
        sizes = [rows.shape[1]] * len(rows)
        return len(head) + (coder.size(coder.counts_of(rows.ravel(), sizes)) if sizes else 0)

    @cached_property
    def payload(self) -> bytes:
        """Bits, 4 a component; as bfloat16 every low, and every step above 0 bits; the integers.

        Packed integers take their component's bits each, the lowest bit first, and every component
        begins at a byte. Coded ones come after a byte for each component above 0 bits, its central
        integer c: coded is q - c, modulo 2^bits and folded, 0, 1, -1, 2, ... as 0, 1, 2, 3, ...
        """
        head, rows = self._rows
        if self.coded:
            return head + (
                coder.encode(rows.ravel(), [rows.shape[1]] * len(rows)) if len(rows) else b""
            )
        pairs = zip(rows, self.bits[self.bits > 0].tolist(), strict=True)
        return b"".join([head, *(pack_bits(row, bits) for row, bits in pairs)])

    @cached_property
    def _rows(self) -> tuple[bytes, npt.NDArray[np.uint8]]:
        """What comes before the integers of components above 0 bits; those, as they are written."""
        live = self.bits > 0
        rows = self.numbers.transpose(0, 1).flatten(1).cpu().numpy()[live.numpy()]
        head = coder.in_halves(self.bits.numpy().astype(np.uint8))
        head += to_short(self.low.cpu()) + to_short(self.step.cpu()[live])
        if not self.coded:
            return head, rows
        centre = np.rint(rows.mean(1)).astype(np.uint8)
        return head + centre.tobytes(), fold(rows, centre, self.bits[live].numpy())

    @classmethod
    def read(
        cls, data: memoryview, shape: tuple[int, int, int], coded: bool, to: torch.device
    ) -> "Bitted":
        """The inverse of `payload`. Raises WireError."""
        n, g, s = shape
        head = (g + 1) // 2
        if len(data) < head + 2 * g:
            raise WireError("message: ends before its values")
        bits = coder.from_halves(data[:head]).astype(np.int64)
        if bits[g:].any() or int(bits.max()) > 8:
            raise WireError("bits: expected 0 to 8 a component")
        bits = bits[:g]
        live = np.flatnonzero(bits)
        at = head + 2 * g + 2 * len(live)
        if len(data) < at:
            raise WireError("message: ends before its values")
        low = from_short(data[head : head + 2 * g])
        step = torch.zeros(g)
        step[torch.from_numpy(live)] = from_short(data[head + 2 * g : at])
        if not usable(low, step, torch.from_numpy(bits)):
            raise WireError("scales: expected finite numbers, steps above 0")
        rows = np.zeros((g, n * s), dtype=np.uint8)
        if coded and len(live):
            if len(data) < at + len(live):
                raise WireError("message: ends before its values")
            centre = np.frombuffer(data[at : at + len(live)], dtype=np.uint8)
            found = coder.decode(data[at + len(live) :], [n * s] * len(live)).reshape(-1, n * s)
            if (found >> np.minimum(bits[live], 8)[:, None].astype(np.uint16)).any():
                raise WireError("integers: expected below 2^bits")
            rows[live] = unfold(found, centre, bits[live])
        else:
            lengths = (n * s * bits[live] + 7) // 8
            if len(data) != at + int(lengths.sum()):
                raise WireError(f"message: expected {at + int(lengths.sum())} bytes of values")
            for index, length in zip(live, lengths.tolist(), strict=True):
                rows[index], at = (
                    unpack_bits(data[at : at + length], n * s, bits[index]),
                    at + length,
                )
        numbers = torch.from_numpy(rows).view(g, n, s).transpose(0, 1)
        return cls(numbers.to(to), torch.from_numpy(bits), low.to(to), step.to(to), coded)


@torch.no_grad()
def encode_bits(values: Tensor, budget: float, coded: bool, noise: Tensor | None = None) -> Bitted:
    """Values as integers of whole bits a component, at most `budget` bytes if they are packed.

    Args:
        values: [N, G, S] float32, finite.
        budget: bytes of the payload; without a bit that fits no component has any.
        coded: see `Bitted`.
        noise: see `encode_step`.

    Raises:
        ValueError: a value is not finite.
    """
    n, g, s = values.shape
    x = values.transpose(0, 1).reshape(g, n * s)
    mean, std = x.mean(1), x.std(1, correction=0)
    if not bool(std.isfinite().all()):
        raise ValueError("values: expected finite numbers whose squares are finite")
    total = int(max(0.0, budget - g / 2 - 2 * g) * 8) // (n * s)
    bits = water_filling(std.square(), total)
    while int(bits.sum()) and _packed_bytes(bits, n * s) > budget:
        total -= 1
        bits = water_filling(std.square(), total)
    if noise is not None:
        noise = noise.view(n, g, s).transpose(0, 1).reshape(g, n * s)
    numbers, low, step = affine(x, bits, noise, mean, std)
    return Bitted(numbers.view(g, n, s).transpose(0, 1), bits, low, step, coded)


def affine(
    x: Tensor,
    bits: Tensor,
    noise: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as integers of so many bits each, q = round((x - low) / step), of a clipped range.

    Args:
        x: [G, M] float32, finite.
        bits: [G] int64 in [0, 8], on the CPU.
        noise: [G, M] uniform in [0, 1) rounds up by chance; None to the nearest.
        mean, std: of the rows, [G], where they are known.

    Returns:
        q [G, M] uint8; low and step [G] float32 of few digits. A row of 0 bits has its mean as low.
    """
    mean = x.mean(1) if mean is None else mean
    std = x.std(1, correction=0) if std is None else std
    bits = bits.to(x.device)
    most = ((1 << bits) - 1).float().unsqueeze(1)
    ends = x.amin(1), x.amax(1)
    sample = x[:, :: max(1, x.numel() // _SEARCHED)]
    best = low = step = torch.zeros_like(mean)
    for factor in _FACTORS:
        half = _HALF_RANGES.to(x.device)[bits] * std * factor
        a = torch.maximum(mean - half, ends[0])
        b = torch.minimum(mean + half, ends[1])
        # What crosses are these few digits, so that they are what is rounded by.
        a = a.bfloat16().float()
        size = ((b - a) / most.squeeze(1).clamp(min=1)).clamp(min=_TINY).bfloat16().float()
        q = ((sample - a.unsqueeze(1)) / size.unsqueeze(1)).round().clamp(min=0).minimum(most)
        error = (q * size.unsqueeze(1) + a.unsqueeze(1) - sample).square().sum(1)
        better = (error < best) if factor != _FACTORS[0] else torch.ones_like(best).bool()
        best, low, step = (
            torch.where(better, new, old) for new, old in ((error, best), (a, low), (size, step))
        )
    low = torch.where(bits > 0, low, mean.bfloat16().float())
    step = torch.where(bits > 0, step, torch.zeros_like(step))
    scaled = (x - low.unsqueeze(1)) / step.clamp(min=_TINY).unsqueeze(1)
    scaled = scaled.round_() if noise is None else scaled.add_(noise).floor_()
    return scaled.clamp_(min=0).minimum(most).to(torch.uint8), low, step


def fold(
    rows: npt.NDArray[np.uint8], centre: npt.NDArray[np.uint8], bits: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    """Integers about their row's centre, modulo 2^bits, those near it as small numbers."""
    size = (1 << bits)[:, None].astype(np.int16)
    apart = (rows.astype(np.int16) - centre[:, None]) % size
    folded: npt.NDArray[np.int16] = np.where(
        apart <= size // 2, 2 * apart - (apart > 0), 2 * (size - apart)
    )
    return folded.astype(np.uint8)


def unfold(
    folded: npt.NDArray[np.uint8], centre: npt.NDArray[np.uint8], bits: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    """The inverse of `fold`."""
    size = (1 << bits)[:, None].astype(np.int16)
    found: npt.NDArray[np.int16] = (
        coder.unfolded(folded).astype(np.int16) + centre[:, None]
    ) % size
    return found.astype(np.uint8)


def _packed_bytes(bits: Tensor, count: int) -> int:
    """Bytes of a payload whose integers are packed."""
    live = int((bits > 0).sum())
    values = int(((bits * count + 7) // 8).sum())
    return (len(bits) + 1) // 2 + 2 * len(bits) + 2 * live + values


def to_short(numbers: Tensor) -> bytes:
    """As bfloat16."""
    return numbers.bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()


def from_short(data: memoryview) -> Tensor:
    """From bfloat16 to float32."""
    shorts = np.frombuffer(data, dtype="<i2").astype(np.int16)
    return torch.from_numpy(shorts).view(torch.bfloat16).float()


def usable(low: Tensor, step: Tensor, bits: Tensor) -> bool:
    """Whether every integer stands for a finite number."""
    end = low + step * 255
    return bool((low.isfinite() & end.isfinite() & ((step > 0) | (bits == 0))).all())


def pack_bits(numbers: npt.NDArray[np.uint8], bits: int) -> bytes:
    """Integers of so many bits one after another, the lowest bit first, up to a whole byte."""
    each = np.unpackbits(numbers[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(each, bitorder="little").tobytes()


def unpack_bits(data: memoryview, count: int, bits: int) -> npt.NDArray[np.uint8]:
    """So many integers of so many bits. Raises WireError if the last byte has more."""
    each = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
    if each[count * bits :].any():
        raise WireError("values: expected zero in the unused bits of the last byte")
    padded = np.zeros((count, 8), dtype=np.uint8)
    padded[:, :bits] = each[: count * bits].reshape(count, bits)
    found: npt.NDArray[np.uint8] = np.packbits(padded, axis=1, bitorder="little")[:, 0]
    return found
