"""Kept values as numbers of few bits, with a scale per group  [ours].

Values come as [N, G, S]: a group is a channel over all examples (N = B, G = kept channels,
S = positions) or the kept elements of one example (N = 1, G = B, S = k). Every group has its own
scale, since channels differ in size by orders of magnitude. With step the group's scale:

- none: float32, bit for bit.
- fp16: x / step with step a power of two that puts the largest magnitude near 2^15, so that small
  gradients do not vanish below the smallest half-precision number.
- int8, int4: round(x / step), step = max |x| / 127 or / 7. Zero stays exactly zero.
- int8-affine, int4-affine: round((x - low) / step), step = (max - low) / 255 or / 15, low = min:
  half the step of the symmetric form where values have one sign, as behind a ReLU.

- bits, step, dct, slfac: integers that fill a budget of bytes, see `bitted`, `stepped` and
  `slfac`.

The integers are within half a step of x, but for those of a budget. The gradient passes straight
through the rounding: what comes back for the rounded value is taken as the gradient of the
unrounded one.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sluiceway.core.messages import WireError
from sluiceway.split import coder
from sluiceway.split.bitted import Bitted, encode_bits
from sluiceway.split.slfac import Frequencies, encode_slfac
from sluiceway.split.stepped import Stepped, encode_step

# Values worked on at once: the temporaries of this many stay in a core's cache.
_CHUNK: Final = 1 << 18
_TINY: Final = torch.finfo(torch.float32).tiny
# Half precision is used up to this: x / step rounds to at most it.
_HALF_REACH: Final = 2.0**15


@dataclass(frozen=True)
class Codec:
    """How kept values are written.

    Attributes:
        name: as in `CODECS`.
        code: its number on the wire.
        bits: of one value; 0 where it varies, by a budget of bytes.
        parameters: float32 numbers that a group has beside its values: its step, and for affine
            codecs its low.
    """

    name: str
    code: int
    bits: int
    parameters: int

    @property
    def budgeted(self) -> bool:
        return self.bits == 0

    @property
    def integers(self) -> bool:
        """Its numbers are integers, which can be coded."""
        return self.bits <= 8

    @property
    def levels(self) -> int:
        """The largest integer: of |x| / step, or of (x - low) / step."""
        return (1 << self.bits) - 1 if self.affine else (1 << (self.bits - 1)) - 1

    @property
    def affine(self) -> bool:
        return self.parameters == 2

    @property
    def offset(self) -> int:
        """What is added to the integers before they are stored: int8 is signed, int4 is not."""
        if self.bits == 8:
            return -128 if self.affine else 0
        return 0 if self.affine else 8

    def nbytes(self, values: int, groups: int) -> int:
        """Bytes of so many values in so many groups, parameters included."""
        return 4 * self.parameters * groups + (self.bits * values + 7) // 8


#: Codecs that transform positions, which single elements do not have.
TRANSFORMING: Final = ("dct", "slfac")
#: Every codec by name.
CODECS: Final = {
    codec.name: codec
    for codec in (
        Codec("none", 0, 32, 0),
        Codec("fp16", 1, 16, 1),
        Codec("int8", 2, 8, 1),
        Codec("int4", 3, 4, 1),
        Codec("int8-affine", 4, 8, 2),
        Codec("int4-affine", 5, 4, 2),
        Codec("bits", 6, 0, 0),
        Codec("step", 7, 0, 0),
        Codec("dct", 8, 0, 0),
        Codec("slfac", 9, 0, 0),
    )
}
_STORED: Final = {32: torch.float32, 16: torch.float16, 8: torch.int8, 4: torch.uint8}


def codec_named(name: str) -> Codec:
    """The codec of that name. Raises ValueError if there is none."""
    if name not in CODECS:
        raise ValueError(f"codec: expected one of {', '.join(CODECS)}, got {name!r}")
    return CODECS[name]


@dataclass(frozen=True)
class Coding:
    """How the numbers of a codec are written.

    Attributes:
        coder: integers are coded by their frequencies (`coder`); of "step" and "dct" always.
        ratio: of codecs with a budget: all of the smashed data as float32, what is not kept
            included, over the bytes that the values may take.
        stochastic: of codecs with a budget: rounds up by chance, so that the mean has no error.
    """

    coder: bool = False
    ratio: float = 32.0
    stochastic: bool = False


PLAIN: Final = Coding()


def is_coded(codec: str, coding: Coding) -> bool:
    """Whether a message says that its integers are coded; those of "step" and "dct" always are."""
    return coding.coder and CODECS[codec].integers and codec not in ("step", "dct")


@dataclass(frozen=True, eq=False)
class Quantised:
    """Values as a codec writes them, on the device where they were made.

    Attributes:
        codec: by which they are written.
        numbers: [N, G, S] float32, float16 or, of integer codecs, int8 with its offset; of "none"
            the values themselves, in their own memory.
        parameters: step, and low of affine codecs, of every group: [parameters, G] float32.
        coded: the message has the integers coded by their frequencies.
    """

    codec: Codec
    numbers: Tensor
    parameters: Tensor
    coded: bool = False

    @torch.no_grad()
    def values(self) -> Tensor:
        """What the numbers stand for, [N, G, S] float32; of "none" not copied."""
        if self.codec.bits == 32:
            return self.numbers
        values = self.numbers.float()
        step = self.parameters[0]
        values *= step.unsqueeze(1)
        if self.codec.affine or (self.codec.bits < 16 and self.codec.offset):
            # One addition for both: the stored integer's offset and low.
            low = self.parameters[1] if self.codec.affine else torch.zeros_like(step)
            values += (low - self.codec.offset * step).unsqueeze(1)
        return values

    @cached_property
    def nbytes(self) -> int:
        """The length of `payload`, without coding."""
        if not self.coded:
            return self.codec.nbytes(self.numbers.numel(), self.numbers.shape[1])
        rows = self._rows
        counts = coder.counts_of(rows.ravel(), [rows.shape[1]] * len(rows))
        return 4 * self.parameters.numel() + coder.size(counts)

    @cached_property
    def payload(self) -> bytes:
        """What a message holds: `buffers`, or the parameters and the integers coded.

        Integers are coded group by group: of affine codecs as they are, of others folded, 0, 1, -1,
        2, ... as 0, 1, 2, 3, ...
        """
        if not self.coded:
            return b"".join(self.buffers())
        coded = coder.encode(self._rows.ravel(), [self._rows.shape[1]] * len(self._rows))
        return self.parameters.cpu().numpy().tobytes() + coded

    @cached_property
    def _rows(self) -> npt.NDArray[np.uint8]:
        """The integers of each group, as they are coded."""
        stored = self.numbers.transpose(0, 1).flatten(1).cpu().numpy().astype(np.int16)
        whole = stored - self.codec.offset
        if self.codec.affine:
            return whole.astype(np.uint8)
        return coder.folded(whole.astype(np.int8))

    def buffers(self) -> list[memoryview]:
        """The pieces that a message holds, in their order: parameters, then numbers row by row.

        Their bytes, one after another, have length `codec.nbytes(N * G * S, G)`. Of int4 the first
        number of each pair is the low half of its byte, and an odd last one leaves the high half
        zero.
        """
        numbers = self.numbers.contiguous()
        if self.codec.bits == 4:
            numbers = _to_nibbles(numbers)
        return [self.parameters.cpu().numpy().data, numbers.cpu().numpy().data]

    @classmethod
    def read(
        cls,
        data: memoryview,
        shape: tuple[int, int, int],
        codec: Codec,
        device: torch.device,
        coded: bool = False,
    ) -> "Quantised":
        """The inverse of `payload`, in memory of its own.

        Args:
            data: as many bytes as `codec.nbytes` says of `shape`, if they are not coded; the caller
                has checked.
            shape: N, G, S.
            codec: the one they were written by.
            device: where the numbers go.

        Raises:
            WireError: parameters that `encode` does not write.
        """
        split = 4 * codec.parameters * shape[1]
        if len(data) < split:
            raise WireError("message: ends before its values")
        parameters = _from_bytes(data[:split], torch.float32).view(codec.parameters, shape[1])
        if not _valid(parameters, codec):
            raise WireError("scales: expected finite numbers, steps above 0")
        if coded:
            numbers = _decoded(data[split:], shape, codec)
            return cls(codec, numbers.to(device), parameters.to(device), coded)
        numbers = _from_bytes(data[split:], _STORED[codec.bits])
        if codec.bits == 4:
            numbers = _from_nibbles(numbers, shape[0] * shape[1] * shape[2])
        return cls(codec, numbers.view(shape).to(device), parameters.to(device))


def _decoded(data: memoryview, shape: tuple[int, int, int], codec: Codec) -> Tensor:
    """The integers that `Quantised.payload` coded, [N, G, S] int8 with their offset."""
    n, g, s = shape
    found = coder.decode(data, [n * s] * g)
    if int(found.max()) > (codec.levels if codec.affine else 2 * codec.levels):
        raise WireError("integers: larger than the codec's")
    whole = (found if codec.affine else coder.unfolded(found)).astype(np.int16) + codec.offset
    numbers = torch.from_numpy(whole.astype(np.int8))
    return numbers.view(g, n, s).transpose(0, 1).contiguous()


#: What a message's values may be.
Values = Quantised | Stepped | Bitted | Frequencies


@torch.no_grad()
def encode(
    values: Tensor,
    codec: Codec,
    coding: Coding = PLAIN,
    sides: tuple[int, ...] = (),
    seed: tuple[int, ...] = (),
    total: int | None = None,
) -> Values:
    """Values as a codec writes them.

    Args:
        values: [N, G, S], float32, on any device; not changed.
        codec: any.
        coding: how its numbers are written.
        sides: of the positions, S = prod(sides), for "dct" and "slfac".
        seed: decides what is rounded up by chance.
        total: values of the smashed data, kept or not; None if these are all.

    Raises:
        ValueError: a value is not finite, or a group's range overflows float32 when rounded up
            (never for "none", which carries every bit).
    """
    if codec.bits == 32:
        return Quantised(codec, values, values.new_empty(0, values.shape[1]))
    values = values.contiguous()
    if codec.budgeted:
        budget = 4 * (total or values.numel()) / coding.ratio
        noise = _noise(values, seed) if coding.stochastic else None
        if codec.name == "bits":
            return encode_bits(values, budget, coding.coder, noise)
        if codec.name == "slfac":
            return encode_slfac(values, budget, coding.coder, sides, noise)
        return encode_step(values, budget, sides if codec.name == "dct" else None, noise)
    parameters = _parameters(values, codec)
    if not _valid(parameters, codec):
        raise ValueError("values: expected finite numbers whose range is finite in float32")
    if codec.bits == 16:
        numbers = (values / parameters[0].unsqueeze(1)).half()
    else:
        numbers = _integers(values, parameters, codec)
    return Quantised(codec, numbers, parameters, coding.coder and codec.integers)


def read(
    data: memoryview,
    shape: tuple[int, int, int],
    codec: Codec,
    coded: bool,
    sides: tuple[int, ...],
    device: torch.device,
) -> Values:
    """What `payload` gave of values that `encode` wrote. Raises WireError."""
    if codec.name == "bits":
        return Bitted.read(data, shape, coded, device)
    if codec.name == "slfac":
        return Frequencies.read(data, shape, coded, sides, device)
    if codec.budgeted:
        return Stepped.read(data, shape, sides if codec.name == "dct" else None, device)
    return Quantised.read(data, shape, codec, device, coded)


def _noise(values: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Uniform in [0, 1), as many as the values; the same on every device."""
    state = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(state))
    return noise.to(values.device)


def _parameters(values: Tensor, codec: Codec) -> Tensor:
    """Step, and low of affine codecs, of every group: [parameters, G]."""
    # Over examples first: that runs along memory whatever the number of positions.
    by_example = values.flatten(1)
    high, low = (by(by(by_example, 0).view(values.shape[1:]), 1) for by in (torch.amax, torch.amin))
    # A tensor, since by a number a GPU does not divide but multiplies by its rounded inverse.
    levels = high.new_full((), codec.levels)
    if codec.affine:
        # A constant group has no range: any step does, but it must have an inverse.
        return torch.stack([((high - low) / levels).clamp(min=_TINY), low])
    largest = torch.maximum(high, -low)
    if codec.bits == 16:
        # largest < 2^exponent, and NaN and infinity must stay visible.
        exponent = torch.frexp(largest)[1].clamp(min=-111) - 15
        step = ((exponent + 127) << 23).view(torch.float32)  # 2^exponent, by its bits
        return torch.where(largest.isfinite(), step, largest).unsqueeze(0)
    return (largest / levels).clamp(min=_TINY).unsqueeze(0)


def _integers(values: Tensor, parameters: Tensor, codec: Codec) -> Tensor:
    """What is stored of each value, [N, G, S] int8."""
    inverse, low = parameters[0].reciprocal().unsqueeze(1), parameters[-1].unsqueeze(1)
    numbers = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    # A GPU has no small cache to stay in, and pays for every piece.
    rows = max(1, _CHUNK // values[0].numel()) if values.device.type == "cpu" else len(values)
    room = torch.empty_like(values[:rows])
    for first in range(0, len(values), rows):
        part = values[first : first + rows]
        scaled = room[: len(part)]
        if codec.affine:
            torch.sub(part, low, out=scaled).mul_(inverse)
        else:
            torch.mul(part, inverse, out=scaled)
        scaled.round_()
        if codec.offset:
            scaled += codec.offset
        numbers[first : first + rows].copy_(scaled)
    return numbers


def _to_nibbles(numbers: Tensor) -> Tensor:
    """Integers in [0, 15], two a byte."""
    flat = numbers.flatten()
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    # Two bytes seen as one little-endian number, high << 8 | low, become high << 4 | low.
    pairs = flat.view(torch.int16)
    return pairs.bitwise_or(pairs >> 4).to(torch.uint8)


def _from_nibbles(data: Tensor, count: int) -> Tensor:
    """The first `count` integers of [0, 15] that `_to_nibbles` put into bytes."""
    if count % 2 and int(data[-1]) > 15:
        raise WireError("values: expected zero in the unused half of the last byte")
    pairs = data.to(torch.int16)
    return pairs.bitwise_or(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)[:count]


def _valid(parameters: Tensor, codec: Codec) -> bool:
    """Whether every integer stands for a finite number. On a GPU this waits for the answer."""
    if not codec.parameters:
        return True
    step = parameters[0]
    span = step * (codec.levels if codec.bits < 16 else _HALF_REACH)
    end = parameters[1] + span if codec.affine else span
    return bool(((step > 0) & span.isfinite() & end.isfinite()).all())


def _from_bytes(data: memoryview, dtype: torch.dtype) -> Tensor:
    """A copy of the bytes as numbers: a message is read-only, and its parts are not aligned."""
    copy = torch.empty(len(data), dtype=torch.uint8)
    copy.numpy()[:] = np.frombuffer(data, dtype=np.uint8)
    return copy.view(dtype)
