"""Experts by region, in least squares: average what experts do on their tokens  [ours].

The paper's region is the mean of the hidden states that enter an expert [paper];
"region-conditioned weights" are its words, their form is not public. Taking the second moment as
well gives them one (RegMean, arXiv 2212.09849, here per expert and weighted by routing): the
expert's linear map y = W [x; 1] becomes the one that minimises

    sum_i p_i / T_i sum_x v_i(x) |W [x; 1] - W_i [x; 1]|^2
    W = W_old + (sum_i Delta_i A_i) (sum_i A_i)^-1,     A_i = p_i / T_i sum_x v_i(x) [x; 1] [x; 1]^T

over the tokens x of client i that enter the expert: p_i its share of the examples, T_i its
tokens, v_i(x) the weight of the expert's output, Delta_i = W_i - W_old. So a client counts in the
directions of input space in which its own tokens lie. One client alone gets its own map back,
equal A_i give the mean, and only two sums are needed: one pass, and no pairs of clients.

Shapes: T tokens, n inputs of a map (its bias among them, as the last), m outputs, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Final

import torch
from torch import Tensor

from sluiceway.fedalign._shapes import require_shape

#: What off-diagonal entries are multiplied by before maps are combined, as in RegMean.
OFF_DIAGONAL: Final = 0.9
#: Weight of the plain mean in directions that no client's tokens have, relative to the mean
#: eigenvalue of the sum of moments.
RIDGE: Final = 1e-6
#: Columns more than its rank that a low-rank form is looked for in, and rounds of the search.
_OVERSAMPLING: Final = 8
_ROUNDS: Final = 2


@dataclass(frozen=True)
class Moment:
    """A symmetric positive semidefinite matrix [n, n]: F^T F + diag(d), or all of it.

    Attributes:
        factors: F, [r, n]; None where `dense` is given.
        diagonal: d, [n], at least 0; None where `dense` is given.
        dense: [n, n].
    """

    factors: Tensor | None = None
    diagonal: Tensor | None = None
    dense: Tensor | None = None

    def matrix(self) -> Tensor:
        """[n, n]."""
        if self.dense is not None:
            return self.dense
        assert self.factors is not None
        assert self.diagonal is not None
        return self.factors.T @ self.factors + self.diagonal.diag()

    def add_to(self, total: Tensor, weight: float) -> None:
        """Add weight times the matrix to `total`, [n, n]."""
        if self.dense is not None:
            total.add_(self.dense, alpha=weight)
            return
        assert self.factors is not None
        assert self.diagonal is not None
        if len(self.factors):
            total.addmm_(self.factors.T, self.factors, alpha=weight)
        total.diagonal().add_(self.diagonal, alpha=weight)

    def add_after(self, rows: Tensor, total: Tensor, weight: float) -> Tensor:
        """Add weight times rows [m, n] times the matrix to `total`, [m, n], and return it.

        With factors that are 4 m n r operations and a pass over the rows.
        """
        if self.dense is not None:
            return total.addmm_(rows, self.dense, alpha=weight)
        assert self.factors is not None
        assert self.diagonal is not None
        if len(self.factors):
            total.addmm_(rows @ self.factors.T, self.factors, alpha=weight)
        return total.addcmul_(rows, self.diagonal.expand_as(rows), value=weight)


def with_one(rows: Tensor) -> Tensor:
    """[T, n - 1] -> [T, n]: the input of the bias, 1, comes last."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


@torch.no_grad()
def second_moment(rows: Tensor, weights: Tensor, tokens: float) -> Tensor:
    """A = 1/tokens sum_x v(x) x x^T, [n, n], in the type of the rows.

    Args:
        rows: x, [T, n]; with `with_one` for a map that has a bias.
        weights: v(x), [T], at least 0.
        tokens: what the sum is divided by, > 0: the client's tokens, not this expert's alone.

    Raises:
        ValueError: a shape does not fit.
    """
    scaled = _scaled(rows, weights, tokens)
    return scaled.T @ scaled


@torch.no_grad()
def low_rank_moment(rows: Tensor, weights: Tensor, tokens: float, rank: int) -> Tensor:
    """`second_moment` as its leading eigenvectors and its diagonal, [rank + 1, n]  [ours].

    The last row is the diagonal of A. The rows F before it are eigenvectors times the root of their
    eigenvalue, A being about F^T F off the diagonal; found by subspace iteration from a fixed start
    at 4 T n (rank + 8) operations a step, so that A itself is never formed. Fewer tokens than
    `rank` give rows of zeros, and then F^T F is A.
    """
    scaled = _scaled(rows, weights, tokens)
    count, width = scaled.shape
    packed = scaled.new_zeros(rank + 1, width)
    packed[-1] = scaled.square().sum(0)
    if count <= rank:
        packed[:count] = scaled
        return packed
    if rank == 0:
        return packed
    columns = min(rank + _OVERSAMPLING, count, width)
    start = torch.Generator().manual_seed(0)
    basis = torch.randn(width, columns, generator=start).to(scaled)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(scaled.T @ (scaled @ basis)).Q
    inside = scaled @ basis
    values, vectors = torch.linalg.eigh(inside.T @ inside)
    kept = min(rank, columns)
    factors = (basis @ vectors[:, -kept:]) * values[-kept:].clamp_min(0).sqrt()
    packed[:kept] = factors.T
    return packed


def _scaled(rows: Tensor, weights: Tensor, tokens: float) -> Tensor:
    """sqrt(v / tokens) x, whose products are the moment's terms."""
    if weights.shape != rows.shape[:1]:
        raise ValueError(f"weights: expected shape [{len(rows)}], got {list(weights.shape)}")
    return rows * (weights / tokens).sqrt().unsqueeze(1)


def packed_triangle(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix [n, n], row by row, [n (n + 1) / 2]."""
    rows, columns = torch.triu_indices(len(matrix), len(matrix), device=matrix.device)
    return matrix[rows, columns]


def unpacked_triangle(packed: Tensor) -> Tensor:
    """The inverse of `packed_triangle`: [n, n] of n (n + 1) / 2 numbers.

    Raises:
        ValueError: no n has so many.
    """
    size = (isqrt(8 * packed.numel() + 1) - 1) // 2
    require_shape("packed", packed, size * (size + 1) // 2)
    rows, columns = torch.triu_indices(size, size, device=packed.device)
    matrix = packed.new_zeros(size, size)
    matrix[rows, columns] = packed
    matrix[columns, rows] = packed
    return matrix


def received_moment(packed: Tensor, size: int, factor: float = OFF_DIAGONAL) -> Moment:
    """A moment as it was sent, its off-diagonal entries multiplied by a factor in [0, 1].

    Args:
        packed: [n' (n' + 1) / 2] of `packed_triangle`, or [r + 1, n'] of `low_rank_moment`.
        size: n, how many of the n' inputs count: a map without a bias leaves the last one out.
        factor: 1 leaves the matrix as it is; 0 leaves its diagonal.

    Returns:
        Of [n, n], float32 or wider.
    """
    packed = packed.to(torch.promote_types(packed.dtype, torch.float32))
    if packed.ndim == 1:
        dense = unpacked_triangle(packed)[:size, :size]
        return Moment(dense=factor * dense + (1 - factor) * dense.diagonal().diag())
    packed = packed[:, :size]
    factors = packed[:-1] * factor**0.5
    # What is left of the diagonal; below zero only by rounding.
    diagonal = (packed[-1] - factors.square().sum(0)).clamp_min(0)
    return Moment(factors=factors, diagonal=diagonal)


def moment_fault(packed: Tensor) -> str | None:
    """Why a moment as it was sent is none: not finite, or not positive semidefinite; else None.

    What rounding to bfloat16 does is let pass: 2 % of a diagonal entry, and as much again of a
    whole matrix scaled to a diagonal of ones, its off-diagonals times `OFF_DIAGONAL`.
    """
    packed = packed.float()
    if not bool(packed.isfinite().all()):
        return "NaN or Inf"
    dense = unpacked_triangle(packed) if packed.ndim == 1 else None
    diagonal = packed[-1] if dense is None else dense.diagonal()
    if bool((diagonal < 0).any()):
        return "a mean square below zero"
    if dense is None:
        over = packed[:-1].square().sum(0) > 1.02 * diagonal + 1e-5 * diagonal.mean()
        return "factors above their diagonal" if bool(over.any()) else None
    scale = diagonal.sqrt().clamp_min(1e-20)
    unit = OFF_DIAGONAL * dense / scale / scale.unsqueeze(1)
    unit.diagonal().fill_(1.02)
    return "it is not positive semidefinite" if int(torch.linalg.cholesky_ex(unit).info) else None


def update_moment(
    change: Tensor, share: float, rank: int = 0, factor: float = OFF_DIAGONAL
) -> Moment:
    """A moment estimated from a client's change of the map alone, so that nothing more crosses::

        A = share Delta^T Delta / |Delta|^2                     (as ACE-Merging; here per expert)

    Gradients of a linear map are sums of outer products with its inputs, so that the rows of Delta
    lie where the inputs did. Without a change it is zero.

    With a rank below m it is F^T F off the diagonal, F [rank, n] being sums of the rows of Delta
    with random signs that never change, which is A in expectation [ours]: rank / m of the work.

    Args:
        change: Delta, [m, n].
        share: the trace of A, >= 0: of the client's tokens, those that the map saw.
        rank: >= 0; 0 for all of A.
        factor: of entries off the diagonal, in [0, 1].
    """
    change = change.to(torch.promote_types(change.dtype, torch.float32))
    squares = column_squares(change)
    scale = float(share / squares.sum().clamp_min(1e-30))
    factors = change
    if 0 < rank < len(change):
        factors = _signs(rank, len(change)).to(change) @ change / rank**0.5
    factors = factors * (factor * scale) ** 0.5
    squares *= scale
    # The diagonal of A as far as F^T F leaves room, and never less than what `factor` asks for.
    diagonal = (squares - column_squares(factors)).maximum((1 - factor) * squares)
    return Moment(factors=factors, diagonal=diagonal)


def column_squares(rows: Tensor) -> Tensor:
    """The sum of squares of each column, [n], of rows [m, n]."""
    return (rows * rows).sum(0)


@lru_cache(maxsize=64)
def _signs(rank: int, rows: int) -> Tensor:
    """Random signs, [rank, rows], the same at every call."""
    start = torch.Generator().manual_seed(0)
    return 2.0 * torch.randint(2, (rank, rows), generator=start) - 1.0


def region_step(weighted: Tensor, total: Tensor, mean: Tensor, ridge: float = RIDGE) -> Tensor:
    """The combined change of a map, from the two sums::

        step = D + (C - D S) (S + lambda I)^-1,   lambda = ridge tr(S) / n

    which is C S^-1, the least squares, where S is regular. In directions that no token of any
    client has, S and C are zero and it is D, the clients' weighted mean [ours].

    Args:
        weighted: C = sum_i Delta_i A_i, [m, n].
        total: S = sum_i A_i, [n, n], symmetric positive semidefinite.
        mean: D, [m, n].
        ridge: >= 0; greater than 0 where S may be singular.

    Returns:
        [m, n], float64.

    Raises:
        ValueError: a shape does not fit.
    """
    require_shape("weighted", weighted, "m", "n")
    require_shape("total", total, weighted.shape[1], weighted.shape[1])
    require_shape("mean", mean, *weighted.shape)
    total, mean = total.double(), mean.double()
    size = len(total)
    lift = ridge * total.diagonal().sum() / size
    if lift <= 0:  # no moment at all
        return mean
    regular = total + lift * torch.eye(size, dtype=total.dtype, device=total.device)
    left = weighted.double() - mean @ total
    lower, failed = torch.linalg.cholesky_ex(regular)
    if int(failed):  # rounding has made it indefinite
        solved: Tensor = torch.linalg.solve(regular, left, left=False)
    else:
        solved = torch.cholesky_solve(left.T, lower).T
    return mean + solved
