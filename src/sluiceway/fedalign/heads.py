"""A linear head in closed form, from sums that add up over clients.

z in R^d is what enters the head, y in {0, 1}^C a label, one-hot. Each client sends sums over its
examples once; the server adds them, so that the head is the one of all examples in one place,
however they are divided. Shapes: n examples, C classes, d features.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from sluiceway.fedalign.moments import with_one

#: Logits of the class means are this times log C times a cosine [ours]; see docs/methods.md.
MEANS_SCALE = 4.0
#: Outputs of the ridge regression, about 0 or 1, times this and log C are the logits [ours].
RIDGE_SCALE = 5.0
#: Regularisation of the ridge regression, relative to the mean eigenvalue of its matrix [ours].
RIDGE = 0.1


def label_sums(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """B = sum_x y [z; 1]^T: the features of each class, summed, and how many there are.

    Args:
        features: z, [n, d].
        labels: class numbers, [n] int64, below `classes`.
        classes: C.

    Returns:
        [C, d + 1], float64; the last column counts.
    """
    rows = with_one(features.double())
    return rows.new_zeros(classes, rows.shape[1]).index_add_(0, labels, rows)


def gram(features: Tensor) -> Tensor:
    """G = sum_x `[z; 1] [z; 1]^T` of features [n, d]: [d + 1, d + 1], float64."""
    rows = with_one(features.double())
    return rows.T @ rows


def means_head(sums: Tensor, scale: float = MEANS_SCALE) -> tuple[Tensor, Tensor]:
    """Class means: logit_k = scale log C / r * z . m_k / |m_k|, m_k the mean of class k's features.

    r is the mean over examples of |m_k| of their class, so that logits do not depend on the size
    of features [ours]. A class without examples has the logit 0.

    Args:
        sums: of all clients' `label_sums`, [C, d + 1], C >= 2.
        scale: > 0.

    Returns:
        Weight [C, d] and bias [C], float64; the bias is zero.
    """
    count = sums[:, -1]
    means = sums[:, :-1] / count.clamp_min(1).unsqueeze(1)
    size = means.norm(dim=1)
    typical = (count * size).sum() / count.sum().clamp_min(1)
    weight = scale * log(len(sums)) * means / (size.unsqueeze(1) * typical).clamp_min(1e-300)
    return weight, torch.zeros_like(count)


def ridge_head(
    gram: Tensor, sums: Tensor, ridge: float = RIDGE, scale: float = RIDGE_SCALE
) -> tuple[Tensor, Tensor]:
    """Ridge regression on one-hot labels: [W, b]^T = s (G + ridge trace(G) / (d + 1) I)^-1 B^T.

    The closed form is the field's (Fed3R, AFL); s = scale log C and the size of the regularisation
    are [ours].

    Args:
        gram: of all clients, [d + 1, d + 1].
        sums: of all clients' `label_sums`, [C, d + 1], C >= 2.
        ridge: >= 0, relative to the mean eigenvalue of G.
        scale: > 0.

    Returns:
        Weight [C, d] and bias [C], float64.
    """
    gram, sums = gram.double(), sums.double()
    size = len(gram)
    loaded = gram + ridge * gram.trace() / size * torch.eye(size, dtype=gram.dtype)
    solved = scale * log(len(sums)) * torch.linalg.solve(loaded, sums.T)
    return solved[:-1].T.contiguous(), solved[-1]
