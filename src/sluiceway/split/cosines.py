"""The cosine transform of positions: neighbours are alike, so few coefficients hold most."""

from functools import lru_cache, reduce
from math import cos, pi, prod, sqrt
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Positions of an example up to which the transform is one product.
_AT_ONCE: Final = 64

Sides = tuple[int, ...]


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
    # One product for all axes of a small map: many tiny ones take longer.
    axes = [sides] if prod(sides) <= _AT_ONCE else [(side,) for side in sides]
    inner = prod(sides)
    for axis in axes:
        side = prod(axis)
        inner //= side
        matrix = _matrix(axis, inverse, values.device, values.dtype)
        if inner == 1:
            values = values.reshape(-1, side) @ matrix.T
        else:
            values = matrix @ values.reshape(-1, side, inner)
    return values.reshape(shape)


@lru_cache(maxsize=64)
def _matrix(axes: Sides, inverse: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What the positions of these axes together are multiplied by."""
    matrix = reduce(torch.kron, (_cosines(side) for side in axes)).to(device, dtype)
    return matrix.T.contiguous() if inverse else matrix


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
    return np.argsort(frequency_sums(sides, count), kind="stable")


def frequency_sums(sides: Sides | None, count: int) -> npt.NDArray[np.int64]:
    """Of each position the sum of its frequencies, [S]; 0 without a transform."""
    return np.indices(sides).sum(0).ravel() if sides else np.zeros(count, dtype=np.int64)
