"""LCIS, label-aware channel importance scoring (arXiv 2603.09792): a score per channel  [paper].

The score of a channel is the class separation of its pooled activations, in two forms behind one
switch, both in closed form from class sums [ours]: no formula of the paper is public. Score on the
client and before pruning: it has the labels, and a channel that is never sent would otherwise never
be rated again [ours]. Marks: docs/methods.md.
"""

from typing import Final

import torch
from torch import Tensor

from sluiceway.channels._shapes import as_scores, require_shape
from sluiceway.channels.statistics import ClassStatistics

FISHER_FLOOR: Final = 1e-6
"""Within-class scatter counts as at least this share of the total in `fisher`, whose largest value
is therefore its inverse: a channel constant within its classes must not become infinite."""

# Scatter below this share of the uncentred second moment is rounding of the sums, not data.
_SCATTER_ROUNDING: Final = 1e-12
# Weights of pairs below this share of the squared count come from rounding, not from pairs.
_PAIR_ROUNDING: Final = 1e-9


@torch.no_grad()
def fisher(stats: ClassStatistics) -> Tensor:
    """Between-class over within-class scatter of z  [ours]::

        score(c) = B / W
        B = sum_k n_k ||m_k - m||^2,    W = sum_k sum_{b in k} v_b ||z_b - m_k||^2

    with n_k the count of class k, m_k its mean and m the mean of all, and W taken as at least
    `FISHER_FLOOR` * (B + W) [ours]. Scaling or shifting a channel does not change its score.

    Args:
        stats: class statistics of K classes and C channels.

    Returns:
        Scores, [C], in [0, 1 / FISHER_FLOOR], float64, always finite, on the device of `stats`. A
        constant channel has 0. All are 0 where nothing can be known: fewer than two classes, or no
        class with two examples.
    """
    count = stats.count.unsqueeze(1)
    means_squared = stats.sums.square().sum(-1) / count.clamp(min=_tiny(count))
    within = (stats.squares - means_squared).clamp(min=0).sum(0)
    between_sum = _between_sum(stats)
    total = between_sum + within
    ratio = between_sum / torch.maximum(within, FISHER_FLOOR * total).clamp(min=_tiny(total))
    known = (total > _SCATTER_ROUNDING * stats.squares.sum(0)) & (_same_pairs(stats).sum() > 0)
    return _finite_or_zero(torch.where(known, ratio, torch.zeros_like(ratio)))


@torch.no_grad()
def between(stats: ClassStatistics) -> Tensor:
    """Between-class scatter alone, per example and cell  [ours]::

        score(c) = sum_k n_k ||m_k - m||^2 / (g sum_k n_k)

    Grows with the square of a channel's scale, as what reaches the next layer does.

    Args:
        stats: class statistics of K classes and C channels.

    Returns:
        Scores, [C], at least 0, float64, always finite, on the device of `stats`; all 0 with fewer
        than two classes.
    """
    scale = stats.count.sum().clamp(min=_tiny(stats.count)) * stats.sums.shape[-1]
    scatter = _between_sum(stats)
    known = scatter > _SCATTER_ROUNDING * stats.squares.sum(0)
    return _finite_or_zero(torch.where(known, scatter / scale, torch.zeros_like(scatter)))


@torch.no_grad()
def distinct(stats: ClassStatistics) -> Tensor:
    """Between-class scatter that the better channels do not show already  [ours].

    Channels that tell the same classes apart in the same places say the same thing. With the class
    pattern of a channel, p_c = (sqrt(n_k) (m_kc - m_c))_k of length K g, channels are taken one by
    one, each time the one whose pattern has the most left beside the patterns taken before::

        score(c) = ||p_c - projection of p_c on the span of those before||^2 / (g sum_k n_k)

    The first has its `between` score; one whose pattern is a sum of others' has 0.

    Args:
        stats: class statistics of K classes and C channels.

    Returns:
        Scores, [C], at least 0, not above those of `between`, float64, always finite, on the
        device of `stats`; all 0 with fewer than two classes.
    """
    bound = between(stats)
    count = stats.count.clamp(min=_tiny(stats.count)).view(-1, 1, 1)
    patterns = (stats.count.sqrt().view(-1, 1, 1) * (stats.sums / count - stats.mean)).transpose(
        0, 1
    )
    size = stats.count.sum().clamp(min=_tiny(stats.count)) * stats.sums.shape[-1]
    left = torch.where(bound.unsqueeze(1) > 0, patterns.flatten(1) / size.sqrt(), 0.0)
    scores = torch.zeros_like(bound)
    free = torch.ones_like(bound, dtype=torch.bool)
    for _ in range(len(scores)):
        lengths = left.square().sum(1).masked_fill(~free, -1.0)
        best = int(lengths.argmax())
        scores[best] = lengths[best]
        free[best] = False
        axis = left[best] / lengths[best].sqrt().clamp(min=_tiny(scores))
        left = left - (left @ axis).unsqueeze(1) * axis
    return torch.minimum(_finite_or_zero(scores), bound)


@torch.no_grad()
def similarity(stats: ClassStatistics) -> Tensor:
    """Mean cosine of same-class pairs minus mean cosine of different-class pairs  [ours].

    In closed form from class sums U_k of unit vectors, with P_k = unit_squares and no pair loop::

        sum of same-class cosines      = sum_k (||U_k||^2 - P_k) / 2
        sum of different-class cosines = (||sum_k U_k||^2 - sum_k ||U_k||^2) / 2

    each over the weight of its pairs, of which none is of an example with itself. The cosine with a
    zero vector is 0, and its pairs count. Scaling a channel by a positive number does not change
    its score; shifting does, unless `ClassStatistics.of` was given a centre.

    Args:
        stats: class statistics of K classes and C channels.

    Returns:
        Scores, [C], in [-2, 2], float64, always finite, on the device of `stats`. All are 0 where
        there are no pairs of one kind: fewer than two classes, or no class with two examples.
    """
    count, units = stats.count, stats.unit_sums
    same_pairs = _same_pairs(stats)
    other_pairs = (count.sum().square() - count.square().sum()) / 2
    lengths = units.square().sum(-1)
    same = ((lengths - stats.unit_squares) / 2).sum(0)
    other = (units.sum(0).square().sum(-1) - lengths.sum(0)) / 2
    known = (same_pairs.sum() > 0) & ((count > 0).sum() > 1)
    least = _tiny(count)
    same_mean = (same / same_pairs.sum().clamp(min=least)).clamp(-1, 1)
    other_mean = (other / other_pairs.clamp(min=least)).clamp(-1, 1)
    difference = same_mean - other_mean
    return _finite_or_zero(torch.where(known, difference, torch.zeros_like(difference)))


@torch.no_grad()
def merge_scores(scores: Tensor, weights: Tensor) -> Tensor:
    """One score per channel from those of all clients  [ours]::

        merged(c) = sum_i weight_i t_i(c) / sum_i weight_i
        t_i(c)    = s_i(c) / mean over channels of |s_i|, 0 where all are 0

    so that no client's scale dominates.

    Args:
        scores: s, [N, C], finite, any scale.
        weights: [N], at least 0, not all 0, such as example counts.

    Returns:
        Merged scores, [C], float64, in [-C, C].
    """
    scores = as_scores(scores, "N", "C")
    weights = as_scores(weights, scores.shape[0], name="weights").to(scores.device)
    if bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise ValueError("weights: expected at least 0 and not all 0")
    # The largest first: the mean of numbers near the largest float would overflow.
    scores = scores / scores.abs().amax(1, keepdim=True).clamp(min=_tiny(scores))
    scores = scores / scores.abs().mean(1, keepdim=True).clamp(min=_tiny(scores))
    weights = weights / weights.max()
    return (weights / weights.sum()) @ scores


def _between_sum(stats: ClassStatistics) -> Tensor:
    """sum_k n_k ||m_k - m||^2, [C]."""
    require_shape("stats.count", stats.count, stats.sums.shape[0])
    count = stats.count.clamp(min=_tiny(stats.count)).view(-1, 1, 1)
    # From centred means: a difference of two sums of squares would lose small scatter.
    offsets = stats.sums / count - stats.mean
    return (stats.count.unsqueeze(1) * offsets.square().sum(-1)).sum(0)


def _same_pairs(stats: ClassStatistics) -> Tensor:
    """Weight of the pairs within each class, [K]: the sum of v_a v_b over a < b."""
    square = stats.count.square()
    pairs = square - stats.weight_squares
    return torch.where(pairs > _PAIR_ROUNDING * square, pairs / 2, torch.zeros_like(pairs))


def _finite_or_zero(scores: Tensor) -> Tensor:
    return torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0)


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
