"""What makes it harder to rebuild an input from its smashed data: noise, distance correlation."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

#: Keeps the seeds of noise apart from all others of a batch.
NOISE: Final = 7


@torch.no_grad()
def noisy(values: Tensor, share: float, seed: int) -> Tensor:
    """Smashed data with Gaussian noise, values + share * std(values) * n, n of N(0, 1)  [ours].

    Args:
        values: [B, C, ...]; not changed.
        share: of the standard deviation of all the values of the batch, >= 0; 0 gives them back.
        seed: of the draw, which differs between a CPU and a GPU.
    """
    if not share:
        return values
    generator = torch.Generator(values.device).manual_seed(seed)
    noise = torch.randn(values.shape, generator=generator, device=values.device)
    return values + noise * (share * values.std(correction=0))


def distance_correlation(x: Tensor, z: Tensor) -> Tensor:
    """How much of the inputs' distances the smashed data keep, in [0, 1].

    Squared distance correlation of a batch (Szekely, Rizzo and Bakirov, Ann. Statist. 35, 2007):
    with a_ij = |x_i - x_j| and A_ij = a_ij - mean_j a - mean_i a + mean a, and B likewise of z,
    R2 = sum AB / sqrt(sum AA * sum BB). As a penalty on the client's layers it is NoPeek's
    (Vepakomma et al., arXiv 2008.09161)  [paper]; the square without a root, and 0 of a batch whose
    inputs or smashed data are all alike, is ours.

    Args:
        x: inputs, [B, ...], without gradient.
        z: smashed data, [B, ...].

    Returns:
        A scalar, differentiable by z.
    """
    A, B = (_centred(_distances(t.flatten(1).float())) for t in (x, z))
    scale = (A.square().sum() * B.square().sum()).clamp(min=torch.finfo(torch.float32).tiny)
    return (A * B).sum() / scale.sqrt()


def _distances(rows: Tensor) -> Tensor:
    """Euclidean distances of rows, [B, B]; their gradient is zero where rows are equal."""
    squares = rows.square().sum(1)
    products = torch.addmm(squares[:, None] + squares, rows, rows.T, alpha=-2)
    # Rounding leaves about 1e-7 of the squares on the diagonal, whose root would not be small.
    apart = (products > 1e-6 * (squares[:, None] + squares)) & ~torch.eye(
        len(rows), dtype=torch.bool, device=rows.device
    )
    return torch.where(apart, products, 1.0).sqrt() * apart


def _centred(distances: Tensor) -> Tensor:
    """Rows and columns with mean zero."""
    means = distances.mean(0)
    return distances - means[:, None] - means + means.mean()
