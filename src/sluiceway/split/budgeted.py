"""Codecs that fill a budget of bytes: whole bits a component, or one step for all of them  [ours].

Values come as [N, G, S] as in `quantise`; a component is a group g, and has N S values. The budget
is what the values take as float32, divided by a ratio.

- bits: reverse water-filling over the components' variances in this batch gives each 0 to 8 whole
  bits (`channels.water_filling`). Affine, round((x - low) / step), with the range clipped at a
  number of standard deviations that is the best of a few by squared error.
- step: one step for all components, the integers coded by their frequencies (`coder`). Where every
  error is alike that is reverse water-filling itself, but in fractions of a bit: a component below
  the water level has hardly any integer but 0. q = floor(|x| / step + 0.4) with the sign of x (the
  wide zone of 0 costs little error and saves bytes), read as (|q| + shift) step, shift the mean of
  what rounding cut off. The step is searched on a part of the values so that the bytes fit the
  budget, which they do to a few percent.
- dct: step after a cosine transform over positions (orthonormal, DCT-II), with frequencies of
  doubling bands as groups: neighbours are alike, so few coefficients hold what matters.

What a component's 0 bits, or integers of 0, leave out is read as its mean, or as 0.
"""

import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from math import cos, log, log2, pi, prod, sqrt
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sluiceway.channels import water_filling
from sluiceway.core.messages import WireError
from sluiceway.split import coder

#: |x| / step is rounded up from this far below the next integer.
_DEAD_ZONE: Final = 0.4
_LARGEST: Final = 127
_TINY: Final = torch.finfo(torch.float32).tiny
#: Positions of an example up to which the transform is one product.
_AT_ONCE: Final = 64


def _laplace_bits() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Where |x| is exponential with mean u steps: 0 by chance 1 - z, else geometric, and a sign."""
    logs = np.arange(-8.0, 8.01, 0.25)
    u = np.exp2(logs)
    z, r = np.exp(-(1 - _DEAD_ZONE) / u), np.exp(-1 / u)

    def binary(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return -p * np.log2(np.maximum(p, 1e-300)) - (1 - p) * np.log2(np.maximum(1 - p, 1e-300))

    return logs, binary(z) + z * (1 + binary(r) / (1 - r))


#: The search aims at so many budgets, and a payload of more than so many is rounded again, with a
#: larger step, so many times.
_AIMED: Final = 0.98
_OVER: Final = 1.05
_TRIES: Final = 3
#: The search for a step looks at about so many values, at so many steps, and is corrected so often
#: or until it is so near.
_SEARCHED: Final = 1 << 13
_GRID: Final = 33
_CORRECTIONS: Final = 6
_NEAR: Final = 0.02
#: Half the range in standard deviations by bits: of the best uniform quantiser of a Gaussian (Max,
#: 1960), plus half a step; and by which factors of it a range is tried.
_HALF_RANGES: Final = torch.tensor([0.0, 0.798, 1.49, 2.05, 2.51, 2.92, 3.28, 3.61, 3.93])
_FACTORS: Final = (0.75, 1.0, 1.25, 1.6)
#: Bits of an integer by log2 of a Laplace distribution's mean magnitude over the step.
_LAPLACE: Final = _laplace_bits()
_HEAD: Final = struct.Struct("<fb")

Sides = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Stepped:
    """Integers of one step, [N, G, S] int8 in [-127, 127], of values or of their transform.

    Attributes:
        shift: in 1/256 of a step, in [-128, 127].
        sides: of the positions if they were transformed, else None.
    """

    numbers: Tensor
    step: float
    shift: int
    sides: Sides | None

    @torch.no_grad()
    def values(self) -> Tensor:
        """[N, G, S] float32."""
        numbers = self.numbers.float()
        values = numbers.add_(numbers.sign(), alpha=self.shift / 256).mul_(self.step)
        return values if self.sides is None else transformed(values, self.sides, inverse=True)

    @cached_property
    def nbytes(self) -> int:
        """The length of `payload`, without coding: from how often integers other than 0 occur."""
        n, g, s = self.numbers.shape
        flat = self.numbers.contiguous().cpu().numpy().ravel()
        sizes = _sizes(self.sides, (n, g, s))
        at = np.flatnonzero(flat != 0)
        folded, top = _folded(flat[at]), 1
        if len(folded):
            top += int(folded.max())
        keys = _groups(self.sides, g, s)[at % (g * s)] * top + folded
        counts = np.bincount(keys, minlength=len(sizes) * top).reshape(-1, top)
        counts[:, 0] = sizes - counts[:, 1:].sum(1)
        return _HEAD.size + coder.size(counts)

    @cached_property
    def payload(self) -> bytes:
        """The step as float32, the shift as int8, then the integers as `coder.encode` writes them.

        Integers 0, -1, 1, -2, ... are coded as 0, 1, 2, 3, ...; the groups are the components, or
        bands of the components' frequencies, the lowest first.
        """
        n, g, s = self.numbers.shape
        ordered = self.numbers.permute(1, 2, 0).contiguous().cpu().numpy()
        if self.sides:
            ordered = ordered[:, frequency_order(self.sides, s)]
        sizes = _sizes(self.sides, (n, g, s))
        folded = _folded(ordered).ravel()
        return _HEAD.pack(self.step, self.shift) + coder.encode(folded, sizes)

    @classmethod
    def read(
        cls, data: memoryview, shape: tuple[int, int, int], sides: Sides | None, to: torch.device
    ) -> "Stepped":
        """The inverse of `payload`. Raises WireError."""
        if len(data) < _HEAD.size:
            raise WireError("message: ends before its step")
        step, shift = _HEAD.unpack_from(data)
        if not 0 < step < float("inf") or not np.isfinite(np.float32(step) * np.float32(128)):
            raise WireError("step: expected a finite number above 0")
        n, g, s = shape
        folded = coder.decode(data[_HEAD.size :], _sizes(sides, shape))
        if int(folded.max()) > 2 * _LARGEST:
            raise WireError(f"integers: expected at most {_LARGEST} in magnitude")
        numbers = (folded >> 1 ^ -(folded & 1)).view(np.int8).reshape(g, s, n)
        if sides:
            numbers = numbers[:, np.argsort(frequency_order(sides, s))]
        return cls(torch.from_numpy(numbers).permute(2, 0, 1).to(to), step, shift, sides)


@torch.no_grad()
def encode_step(
    values: Tensor, budget: float, sides: Sides | None, noise: Tensor | None = None
) -> Stepped:
    """Values as integers of the step that fills the budget.

    Args:
        values: [N, G, S] float32, finite.
        budget: bytes of the payload.
        sides: of the positions, to transform them; None leaves them as they are.
        noise: uniform in [0, 1), as many as the values: rounds up by chance, without bias; None
            rounds to the nearest, but for the zone of 0.

    Raises:
        ValueError: a value is not finite.
    """
    x = values if sides is None else transformed(values, sides)
    largest = float(x.abs().max())
    if not largest < float("inf"):
        raise ValueError("values: expected finite numbers")
    step = max(_step(x, largest, budget, sides), _TINY) if largest > 0 else 1.0
    found = _rounded(x, step, sides, noise)
    for _ in range(_TRIES):
        if found.nbytes <= _OVER * budget:
            break
        # Where the sample said too little.
        step = float(np.float32(step * min(2.0, found.nbytes / budget)))
        found = _rounded(x, step, sides, noise)
    return found


def _rounded(x: Tensor, step: float, sides: Sides | None, noise: Tensor | None) -> Stepped:
    """Values, or their transform, as integers of this step."""
    scaled = x * (1 / step)
    if noise is not None:
        numbers = scaled.add_(noise.view(x.shape)).floor_().clamp_(-_LARGEST, _LARGEST)
        return Stepped(numbers.to(torch.int8), step, 0, sides)
    some = _sample(scaled)[0].abs()
    whole = some.add(_DEAD_ZONE).floor_().clamp_(max=_LARGEST)
    live = whole > 0
    lost = ((some - whole) * live).sum() / live.sum().clamp(min=1)
    shift = int((256 * lost).round().clamp(-128, 127))
    # |x| and its sign apart; towards 0 is down.
    numbers = scaled.add_(torch.full_like(x, _DEAD_ZONE).copysign_(x))
    return Stepped(numbers.clamp_(-_LARGEST, _LARGEST).to(torch.int8), step, shift, sides)


def _sample(x: Tensor) -> tuple[Tensor, int]:
    """One of every so many values, and how many that is: odd, so that all groups are met alike."""
    skip = max(1, x.numel() // _SEARCHED) | 1
    return x.reshape(-1)[::skip], skip


def _step(x: Tensor, largest: float, budget: float, sides: Sides | None) -> float:
    """The step by which the values take about `budget` bytes; a float32 number.

    Found on some of the values, as if every group were Laplace distributed, then corrected by what
    they really take.
    """
    n, g, s = x.shape
    sizes = _sizes(sides, (n, g, s))
    groups = len(sizes)
    target = max(8 * (_AIMED * budget - _HEAD.size) - 4 * groups, 2 * budget)
    some, skip = _sample(x)
    values = some.abs().cpu().numpy()
    group = _group(sides, (n, g, s), skip)
    met = np.maximum(np.bincount(group, minlength=groups), 1)
    means = np.bincount(group, weights=values, minlength=groups) / met
    logs = np.log2(np.maximum(means, 1e-9 * largest))
    # Bits a value by the step, which only fall: on a grid of steps, read between its points.
    grid = np.linspace(log2(largest / _LARGEST), log2(largest / (1 - _DEAD_ZONE)), _GRID)
    rates = np.interp(logs - grid[:, None], *_LAPLACE) @ (sizes / x.numel())
    asked = target / x.numel()
    for _ in range(_CORRECTIONS):
        step = float(np.exp2(np.interp(-asked, -rates, grid)))
        rate, tables = _rate(values, group, groups, step)
        off = (target - tables) / (rate * x.numel() + 1)
        if abs(off - 1) < _NEAR:
            return float(np.float32(step))
        asked *= min(4.0, max(0.25, off))
    return float(np.float32(np.exp2(np.interp(-asked, -rates, grid))))


@lru_cache(maxsize=64)
def _group(sides: Sides | None, shape: tuple[int, int, int], skip: int) -> npt.NDArray[np.int64]:
    """Of each value that `_sample` takes of [N, G, S], its group; see `_sizes`."""
    n, g, s = shape
    return _groups(sides, g, s)[np.arange(0, n * g * s, skip) % (g * s)]


@lru_cache(maxsize=64)
def _groups(sides: Sides | None, g: int, s: int) -> npt.NDArray[np.int64]:
    """The group of each of an example's values, [G S]; see `_sizes`."""
    bands = _sizes(sides, (1, 1, s))
    places = np.empty(s, dtype=np.int64)
    places[frequency_order(sides, s)] = np.repeat(np.arange(len(bands)), bands)
    return (len(bands) * np.arange(g)[:, None] + places).ravel()


def _folded(numbers: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Integers 0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    return (numbers << 1 ^ numbers >> 7).view(np.uint8)


def _rate(
    values: npt.NDArray[np.float32], group: npt.NDArray[np.int64], groups: int, step: float
) -> tuple[float, float]:
    """Bits a value of magnitudes, by their groups' classes, and of signs; and bits of tables."""
    q = values * np.float32(1 / step) + np.float32(_DEAD_ZONE)
    q = np.minimum(q, _LARGEST).astype(np.int64)
    sums = np.bincount(group, weights=q, minlength=groups)
    means = sums / np.maximum(np.bincount(group, minlength=groups), 1)
    kinds = np.where(sums > 0, 2 * np.log2(np.maximum(means, 1e-9)) + 64, 0).astype(np.int64)
    counts = np.bincount(kinds[group] * 128 + q, minlength=128 * 128).reshape(128, 128)
    counts = counts[counts.any(1)]
    totals = counts.sum(1)
    bits = float(totals @ np.log2(totals)) - float((counts * np.log2(np.maximum(counts, 1))).sum())
    # Of so few values the entropy comes out too small (Miller, 1955).
    bits += (np.count_nonzero(counts) - len(counts)) / (2 * log(2))
    signs = int(counts[:, 1:].sum())
    largest = (counts > 0) @ np.ones(128)
    return (bits + signs) / len(q), 16.0 * float(largest.sum())


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

    @property
    def nbytes(self) -> int:
        """The length of `payload`."""
        return len(self.payload)

    @cached_property
    def payload(self) -> bytes:
        """Bits, 4 a component; as bfloat16 every low, and every step above 0 bits; the integers.

        Packed integers take their component's bits each, the lowest bit first, and every component
        begins at a byte. Coded ones come after a byte for each component above 0 bits, its central
        integer c: coded is q - c, modulo 2^bits and folded, 0, 1, -1, 2, ... as 0, 1, 2, 3, ...
        """
        n, g, s = self.numbers.shape
        rows = self.numbers.transpose(0, 1).reshape(g, n * s).cpu().numpy()
        live = self.bits > 0
        parts = [coder.in_halves(self.bits.numpy().astype(np.uint8))]
        parts += [to_short(self.low.cpu()), to_short(self.step.cpu()[live])]
        rows = rows[live.numpy()]
        if self.coded and len(rows):
            centre = np.rint(rows.mean(1)).astype(np.uint8)
            folded = fold(rows, centre, self.bits[live].numpy())
            return b"".join(
                [*parts, centre.tobytes(), coder.encode(folded.ravel(), [n * s] * len(rows))]
            )
        pairs = zip(rows, self.bits[live].tolist(), strict=True)
        return b"".join([*parts, *(pack_bits(row, bits) for row, bits in pairs)])

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
        coder.unfolded(folded.astype(np.int16)) + centre[:, None]
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


@torch.no_grad()
def transformed(values: Tensor, sides: Sides, inverse: bool = False) -> Tensor:
    """The orthonormal cosine transform (DCT-II) over the positions, or its inverse.

    Args:
        values: [N, G, S], S = prod(sides).
        sides: (), (L,) or (H, W).
    """
    if not sides:
        return values
    shape = values.shape
    if prod(sides) <= _AT_ONCE:
        # One product for all axes: many tiny ones take longer.
        matrix = reduce(torch.kron, (_cosines(side) for side in sides))
        matrix = matrix.to(values.device, values.dtype)
        return (values.reshape(-1, prod(sides)) @ (matrix if inverse else matrix.T)).view(shape)
    for axis, side in enumerate(sides):
        matrix = _cosines(side).to(values.device, values.dtype)
        matrix = matrix.T if inverse else matrix
        inner = prod(sides[axis + 1 :])
        if inner == 1:
            values = values.reshape(-1, side) @ matrix.T
        else:
            values = matrix @ values.reshape(-1, side, inner)
    return values.reshape(shape)


@lru_cache(maxsize=64)
def _cosines(side: int) -> Tensor:
    """The transform's matrix, [side, side], row k of frequency k."""
    rows = [
        [
            sqrt((1 if k == 0 else 2) / side) * cos(pi * (2 * i + 1) * k / (2 * side))
            for i in range(side)
        ]
        for k in range(side)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@lru_cache(maxsize=64)
def frequency_order(sides: Sides | None, count: int) -> npt.NDArray[np.int64]:
    """Positions by their sum of frequencies, [S]; as they are without a transform."""
    if not sides:
        return np.arange(count)
    sums = np.indices(sides).sum(0).ravel()
    return np.argsort(sums, kind="stable")


@lru_cache(maxsize=64)
def _sizes(sides: Sides | None, shape: tuple[int, int, int]) -> npt.NDArray[np.int64]:
    """How many of the values [N, G, S] are in each group, component by component.

    Groups are bands of frequencies, sums of 0, 1 to 2, 3 to 6, 7 to 14, ..., or all positions.
    """
    n, g, s = shape
    bands = np.array([s])
    if sides:
        sums = np.indices(sides).sum(0).ravel()
        bands = np.bincount(np.floor(np.log2(sums + 1)).astype(np.int64))
    return np.tile(bands * n, g)
