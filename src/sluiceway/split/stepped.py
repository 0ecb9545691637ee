"""Integers of one step for all components, that fill a budget of bytes  [ours].

Values come as [N, G, S] as in `quantise`; a component is a group g, and has N S values. The budget
is what the values take as float32, divided by a ratio.

- step: one step for all components, the integers coded by how they are spread (`geometric`). Where
  every error is alike that is reverse water-filling itself, but in fractions of a bit: a component
  below the water level has hardly any integer but 0. q = floor(|x| / step + 0.4) with the sign of x
  (the wide zone of 0 costs little error and saves bytes), read as (|q| + shift) step, shift the
  mean of what rounding cut off. The step is searched on a part of the values so that the bytes fit
  the budget, which they do to a few percent.
- dct: step after a cosine transform over positions (orthonormal, DCT-II), with frequencies of
  doubling bands as groups.
"""

import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import log, log2
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import softshrink

from sluiceway.core.messages import WireError
from sluiceway.split import geometric
from sluiceway.split.cosines import Sides, frequency_order, frequency_sums, transformed
from sluiceway.split.geometric import LARGEST

#: |x| / step is rounded up from this far below the next integer.
_DEAD_ZONE: Final = 0.4
_TINY: Final = torch.finfo(torch.float32).tiny
#: A payload of more than so many budgets is rounded again, with a larger step, so many times.
_OVER: Final = 1.05
_TRIES: Final = 3
#: The search for a step looks at about so many values, begins as if each integer but 0 took so many
#: bits, tries steps so many octaves from there, and goes on so often at most, in shorter strides
#: while bytes differ by so many octaves between neighbours; where a step is twice as large bytes
#: are taken to fall by so many octaves at least.
_SEARCHED: Final = 1 << 13
_BITS: Final = 5.0
_APART: Final = np.array([-0.35, 0.0, 0.35])
_CORRECTIONS: Final = 6
_STEEP: Final = 0.75
_SLOPE: Final = -0.3
#: Bytes by which the entropy of few values comes out too small for each number that is taken from
#: them (Miller, 1955).
_MISSED: Final = 1 / (2 * log(2)) / 8
_HEAD: Final = struct.Struct("<fb")

Floats = npt.NDArray[np.float32]


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
        """The length of `payload`, without coding: from sums."""
        n, g, s = self.numbers.shape
        magnitudes = self.numbers.flatten(1).abs()
        # By products of float32, which are exact below 2^24 and far faster than sums of integers.
        ones = torch.ones(1, n, device=magnitudes.device)
        parts = [ones @ part.float() for part in (magnitudes.clamp(max=1), magnitudes)]
        each = torch.cat(parts).cpu().numpy().astype(np.float64).reshape(2, g, s)
        sizes = _sizes(self.sides, (n, g, s))
        sums = np.vstack([sizes, (each @ _bands(self.sides, s)).reshape(2, -1)])
        return _HEAD.size + int(geometric.lengths(sums[None])[0])

    @cached_property
    def payload(self) -> bytes:
        """The step as float32, the shift as int8, then the integers as `geometric` writes them.

        The groups are the components, or bands of the components' frequencies, the lowest first.
        """
        n, g, s = self.numbers.shape
        ordered = self.numbers.permute(1, 2, 0).contiguous().cpu().numpy()
        if self.sides:
            ordered = ordered[:, frequency_order(self.sides, s)]
        sizes = _sizes(self.sides, (n, g, s))
        return _HEAD.pack(self.step, self.shift) + geometric.encode(ordered.ravel(), sizes)

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
        numbers = geometric.decode(data[_HEAD.size :], _sizes(sides, shape)).reshape(g, s, n)
        if sides:
            numbers = numbers[:, np.argsort(frequency_order(sides, s))]
        # Laid out as those that were sent: products of other layouts round otherwise.
        ordered = torch.from_numpy(numbers).permute(2, 0, 1).contiguous()
        return cls(ordered.to(to), step, shift, sides)


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
    low, high = torch.aminmax(x)
    largest = float(torch.maximum(high, -low))
    if not largest < float("inf"):
        raise ValueError("values: expected finite numbers")
    some = _some(sides, tuple(x.shape))
    sample = x.reshape(-1)[:: some.skip].abs().cpu().numpy().take(some.order)
    step = max(_step(sample, some, largest, budget), _TINY) if largest > 0 else 1.0
    found = _rounded(x, step, sample, sides, noise)
    for _ in range(_TRIES):
        if found.nbytes <= _OVER * budget:
            break
        # Where the sample said too little.
        step = float(np.float32(step * min(2.0, found.nbytes / budget)))
        found = _rounded(x, step, sample, sides, noise)
    return found


def _rounded(
    x: Tensor, step: float, sample: Floats, sides: Sides | None, noise: Tensor | None
) -> Stepped:
    """Values, or their transform, as integers of this step; some of their magnitudes."""
    if noise is None:
        # Towards 0 by what the zone of 0 is wider than half a step.
        scaled = softshrink(x, (0.5 - _DEAD_ZONE) * step).mul_(1 / step).round_()
        shift = _shift(sample, step)
    else:
        scaled, shift = (x * (1 / step)).add_(noise.view(x.shape)).floor_(), 0
    numbers = scaled.clamp_(-LARGEST, LARGEST).to(torch.int8)
    return Stepped(numbers, step, shift, sides)


def _shift(sample: Floats, step: float) -> int:
    """What rounding cuts off of a magnitude that stays above 0, in 1/256 of a step."""
    whole = _magnitudes(sample, step)
    live = np.minimum(whole, 1)
    lost = (sample @ live / step - whole.sum()) / max(1.0, live.sum())
    return max(-128, min(127, round(float(256 * lost))))


def _magnitudes(sample: Floats, step: float | npt.NDArray[np.float64]) -> Floats:
    """The magnitudes of integers."""
    scaled: Floats = sample * np.float32(1 / step)
    scaled += np.float32(_DEAD_ZONE)
    return np.minimum(np.floor(scaled, out=scaled), LARGEST, out=scaled)


@dataclass(frozen=True, eq=False)
class _Some:
    """The values that a search looks at.

    Attributes:
        skip: one of so many, odd so that all groups are met alike.
        order: of these, group by group, [M].
        starts: where groups begin in them, those of which no value is there left out, [G].
        sizes: of these groups, [G].
        shares: how many values each one of a group stands for, [G].
        missing: how many groups are left out.
        total: of all values.
    """

    skip: int
    order: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    shares: npt.NDArray[np.float64]
    missing: int
    total: int


@lru_cache(maxsize=64)
def _some(sides: Sides | None, shape: tuple[int, int, int]) -> _Some:
    """About `_SEARCHED` of the values [N, G, S]."""
    n, g, s = shape
    total, bands = n * g * s, _bands(sides, s)
    skip = max(1, total // _SEARCHED) | 1
    places = np.arange(0, total, skip) % (g * s)
    group = places // s * bands.shape[1] + bands.argmax(1)[places % s]
    met, starts, counts = np.unique(np.sort(group), return_index=True, return_counts=True)
    sizes = _sizes(sides, shape)
    missing, sizes = len(sizes) - len(met), sizes[met]
    order = np.argsort(group, kind="stable")
    return _Some(skip, order, starts, sizes, sizes / counts, missing, total)


def _step(sample: Floats, some: _Some, largest: float, budget: float) -> float:
    """The step by which the values take about `budget` bytes; a float32 number.

    What they take is estimated at a few steps together, and read between them; first about the step
    that leaves as many integers other than 0 as the budget may have, then about what is nearer.

    Args:
        sample: magnitudes of some of the values, [M].
        some: which they are.
        largest: of all values.
        budget: bytes.
    """
    target = max(budget - _HEAD.size - some.missing / 2, 1.0)
    ends = log2(largest / LARGEST), log2(largest / (1 - _DEAD_ZONE))
    part = sample[::4]
    others = int(len(part) * min(0.9, 8 * target / some.total / _BITS))
    guess = float(np.partition(part, -1 - others)[-1 - others]) / (1 - _DEAD_ZONE)
    log, apart = log2(max(guess, 2 ** ends[0])), _APART
    for _ in range(_CORRECTIONS):
        logs = np.minimum(np.maximum(log + apart, ends[0]), ends[1])
        q = _magnitudes(sample, np.exp2(logs)[:, None])
        sums = np.empty((len(logs), 3, len(some.sizes)))
        sums[:, 0] = some.sizes
        for at, of in ((1, np.minimum(q, 1)), (2, q)):
            sums[:, at] = some.shares * np.add.reduceat(of, some.starts, axis=1)
        missed = _MISSED * (some.skip - 1) * (sums[:, 2] > 0).sum(1)  # a number a group
        over = np.log2((geometric.lengths(sums) + missed) / target)
        off = max(0.0, over[-1]) + min(0.0, over[0])
        if logs[0] == logs[-1]:
            break
        if not off:
            # What was rounded before, as in delta coding, has many values of one magnitude.
            at = int((over > 0).sum())
            if at in (0, len(over)) or over[at - 1] - over[at] < _STEEP:
                break
            log, apart = float(np.interp(0, -over, logs)), apart / 4
            continue
        slope = (over[-1] - over[0]) / (logs[-1] - logs[0])
        log = float(logs[-1 if off > 0 else 0]) - off / min(_SLOPE, slope)
    return float(np.float32(np.exp2(np.interp(0, -over, logs))))


@lru_cache(maxsize=64)
def _bands(sides: Sides | None, s: int) -> npt.NDArray[np.float64]:
    """1 where a position is in a band, [S, bands].

    Bands are sums of frequencies of 0, 1 to 2, 3 to 6, 7 to 14, ..., or all positions.
    """
    found = np.floor(np.log2(frequency_sums(sides, s) + 1)).astype(np.int64)
    return np.eye(1 + int(found.max()))[found]


@lru_cache(maxsize=64)
def _sizes(sides: Sides | None, shape: tuple[int, int, int]) -> npt.NDArray[np.int64]:
    """How many of the values [N, G, S] are in each group, component by component, band by band."""
    n, g, s = shape
    return np.tile(n * _bands(sides, s).sum(0).astype(np.int64), g)
