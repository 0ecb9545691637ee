"""Scores of the rivals, which read no labels: each rates channels of A [B, C, ...], high is keep.

A is the smashed data of one batch, [B, C], [B, C, L] or [B, C, H, W], of any floating type. A value
that is not finite counts as 0, so that every score is finite. The ideas are of the papers named,
the forms [ours].
"""

import math

import torch
from torch import Tensor


def random_scores(channels: int, generator: torch.Generator) -> Tensor:
    """Uniform scores that mean nothing. Drawn once, they make a fixed random mask.

    Args:
        channels: C, at least 1.
        generator: of the CPU; it decides the scores.

    Returns:
        Scores, [C], in [0, 1), float64, on the CPU.
    """
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")
    return torch.rand(channels, generator=generator, dtype=torch.float64)


@torch.no_grad()
def l1(A: Tensor) -> Tensor:
    """Mean magnitude: score(c) = mean over examples and positions of |A|.

    Returns:
        Scores, [C], at least 0, float64, on the device of A.
    """
    return _mean(_by_example(_values(A).abs()))


@torch.no_grad()
def std(A: Tensor) -> Tensor:
    """Spread, as in SplitFC: score(c) = standard deviation of A over examples and positions.

    The population's, without Bessel's correction.

    Returns:
        Scores, [C], at least 0, float64, on the device of A.
    """
    values = _values(A)
    if values.numel() == 0:
        return _mean(_by_example(values))
    # In float64 the squares of large values cannot overflow.
    return values.double().std([0, *range(2, A.dim())], correction=0)


@torch.no_grad()
def entropy(A: Tensor, bins: int = 64) -> Tensor:
    """Shannon entropy of the channel's values, as SL-ACC (arXiv 2508.12984) rates channels::

        score(c) = -sum_j p_j log p_j

    p_j is the share of the channel's values, over examples and positions, in bin j of a histogram
    of equal bins from its smallest to its largest value. A histogram and no softmax: the softmax
    over thousands of values is nearly uniform in every channel, and changes with scale.

    Args:
        A: smashed data of one batch.
        bins: at least 2.

    Returns:
        Scores in nats, [C], in [0, log bins], float64, on the device of A; a constant channel has 0
        entropy.
    """
    if bins < 2:
        raise ValueError(f"bins: expected at least 2, got {bins}")
    values = _values(A).transpose(0, 1).flatten(1)
    if values.numel() == 0:
        return torch.zeros(values.shape[0], dtype=torch.float64, device=A.device)
    low = values.amin(1, keepdim=True)
    span = values.amax(1, keepdim=True) - low
    # An infinite span (of the largest floats) gives NaN, and so does a constant channel's 0; what
    # integer NaN becomes differs between devices.
    position = torch.nan_to_num((values - low) / span, nan=0.0, posinf=0.0)
    index = (position * bins).long().clamp(0, bins - 1)
    index += bins * torch.arange(len(values), device=A.device).unsqueeze(1)
    counts = torch.bincount(index.flatten(), minlength=bins * len(values)).view(-1, bins)
    shares = counts.double() / values.shape[1]
    terms = torch.where(shares > 0, -shares * shares.log(), shares)
    return terms.sum(1).clamp(0, math.log(bins))


@torch.no_grad()
def taylor(A: Tensor, grad: Tensor) -> Tensor:
    """First-order change of the loss if the channel were zero (arXiv 1611.06440)::

        score(c) = mean over examples of |mean over positions of A * dL/dA|

    Args:
        A: smashed data of one batch, [B, C, ...].
        grad: gradient of the loss by A, the shape of A.

    Returns:
        Scores, [C], at least 0, float64, on the device of A. They scale with the gradient: compare
        channels of one batch only, or merge by `merge_scores`.
    """
    if A.shape != grad.shape:
        raise ValueError(f"grad: expected shape {list(A.shape)}, got {list(grad.shape)}")
    return _mean(_by_example(_values(A) * _values(grad)).abs())


@torch.no_grad()
def class_gradients(grad: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sums from which ICS (arXiv 2609.39194) rates channels: by class, of gradients' sizes  [ours].

    Args:
        grad: gradient of the loss by smashed data, [B, C, ...].
        labels: [B], any integer type, in [0, classes), on any device.
        classes: K.

    Returns:
        sum over the examples of each class of the mean over positions of |g|, [K, C] float64, and
        the examples of each class, [K] float64; on the device of grad.
    """
    sizes = _by_example(_values(grad).abs()).double()
    numbers = torch.arange(classes, device=labels.device).unsqueeze(1)
    member = (labels == numbers).double().to(grad.device)
    return member @ sizes, member.sum(1)


@torch.no_grad()
def class_balanced(sums: Tensor, counts: Tensor) -> Tensor:
    """ICS's score: every class counts alike, however many its examples or steep its loss::

        score(c) = mean over classes k seen of  s_kc / sum_c' s_kc',    s_kc = sums_kc / counts_k

    Args:
        sums, counts: as `class_gradients` gives them, added up over batches, [K, C] and [K].

    Returns:
        Scores, [C], at least 0, float64; 1/C for all where there is no gradient.
    """
    seen = (counts > 0) & (sums.sum(1) > 0)
    if not bool(seen.any()):
        return torch.full_like(sums[0], 1 / sums.shape[1])
    shares = sums[seen] / sums[seen].sum(1, keepdim=True)
    return shares.mean(0)


def _values(A: Tensor) -> Tensor:
    """A in float32 or better, detached, with 0 for what is not finite."""
    if A.dim() < 2:
        raise ValueError(f"A: expected shape [B, C, ...], got {list(A.shape)}")
    A = A.detach().to(torch.promote_types(A.dtype, torch.float32))
    return torch.nan_to_num(A, nan=0.0, posinf=0.0, neginf=0.0)


def _by_example(values: Tensor) -> Tensor:
    """Mean over positions, [B, C], in the precision of `values`."""
    return values.flatten(2).mean(2) if values.dim() > 2 else values


def _mean(values: Tensor) -> Tensor:
    """Mean over examples of [B, C], in float64, made finite: 0 of an empty batch."""
    return torch.nan_to_num(values.double().mean(0), nan=0.0)
