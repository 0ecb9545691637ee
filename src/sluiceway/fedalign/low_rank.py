"""Direction consensus of LoRA updates: of the products B A, never of A and B apart  [ours].

Two clients may reach one change of the model by different factors, and different changes by factors
that look alike. Shapes: N clients, W [out, in], B [out, r], A [r, in].
"""

import torch
from torch import Tensor

from sluiceway.fedalign._shapes import require_shape


def product_change(
    old_a: Tensor, old_b: Tensor, a: Tensor | None, b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The change of B A as a product of two factors, without forming it::

        B' A' - B A = [B' - B, B] [A'; A' - A]

    Differences are taken before products: small changes lose no digits.

    Args:
        old_a, old_b: A [r, in] and B [out, r] before.
        a, b: A' and B' after, of the same shapes; None for unchanged.

    Returns:
        Left [out, 2 r] and right [2 r, in] factors, float64.

    Raises:
        ValueError: a shape does not fit.
    """
    old_a, old_b = old_a.double(), old_b.double()
    require_shape("old_b", old_b, "out", old_a.shape[0])
    new_a = old_a if a is None else a.to(old_a)
    new_b = old_b if b is None else b.to(old_b)
    require_shape("a", new_a, *old_a.shape)
    require_shape("b", new_b, *old_b.shape)
    return torch.cat([new_b - old_b, old_b], dim=1), torch.cat([new_a, new_a - old_a])


def product_gram(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of matrices given by their factors::

        G_ij = <L_i R_i, L_j R_j> = sum((L_i^T L_j) * (R_i R_j^T))

    O(N^2 r^2 (out + in)) operations; the N matrices [out, in] are never formed.

    Args:
        left: L, [N, out, r].
        right: R, [N, r, in].

    Returns:
        G, [N, N], symmetric up to rounding, float64.

    Raises:
        ValueError: a shape does not fit.
    """
    require_shape("left", left, "N", "out", "r")
    require_shape("right", right, left.shape[0], left.shape[2], "in")
    clients, _, rank = left.shape
    left = left.double().permute(1, 0, 2).reshape(-1, clients * rank)
    right = right.double().reshape(clients * rank, -1)
    products = (left.T @ left) * (right @ right.T)
    return products.view(clients, rank, clients, rank).sum(dim=(1, 3))
