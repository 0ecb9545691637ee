"""ACP, adaptive channel pruning (arXiv 2603.09792): which channels are sent  [paper].

Rules turn scores [C] into a keep mask [C] bool; `schedule` and `rechoose` say how much and when,
`hysteresis` which swaps are worth it. All rules and forms are [ours]; only the name and the purpose
are the paper's. Marks: docs/methods.md.

Every mask keeps at least one channel. Equal scores go by index, the lower one kept. Rounds are
counted from 1. Masks lie on the device of the scores.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sluiceway.channels._shapes import as_scores, require_shape, shifted

# Slack of sums and products that reach a bound exactly but for rounding.
_SLACK = 1e-9


def top(scores: Tensor, count: int) -> Tensor:
    """The `count` highest scores.

    Args:
        scores: [C], finite.
        count: in [1, C].

    Returns:
        Keep mask, [C] bool, with exactly `count` channels.
    """
    scores = as_scores(scores, "C")
    _require_count(count, len(scores))
    mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    mask[_descending(scores)[:count]] = True
    return mask


def share_count(share: float, channels: int) -> int:
    """The number of channels that a share allows: max(1, floor(share * C)).

    Args:
        share: in [0, 1].
        channels: C, at least 1.
    """
    _require_share("share", share)
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")
    return max(1, math.floor(share * channels + _SLACK))


def fraction(scores: Tensor, share: float) -> Tensor:
    """ACP rule `fraction`: the best share of the channels, floor(share * C) of them  [ours].

    Args:
        scores: [C], finite.
        share: in [0, 1].

    Returns:
        Keep mask, [C] bool.
    """
    return top(scores, share_count(share, len(as_scores(scores, "C"))))


def cumulative(scores: Tensor, tau: float) -> Tensor:
    """ACP rule `cumulative` = the smallest set that holds a share tau of the score mass  [ours]::

        mass(c) = s(c) - min(min s, 0);    keep the fewest with  sum of mass >= tau * sum of all

    If all mass is 0 the channels count alike.

    Args:
        scores: [C], finite.
        tau: in [0, 1].

    Returns:
        Keep mask, [C] bool.
    """
    scores = as_scores(scores, "C")
    _require_share("tau", tau)
    # Halved before the shift, and scaled to at most 1 after: neither can overflow.
    mass = shifted(scores / 2)
    largest = mass.max()
    mass = mass / largest if largest > 0 else torch.ones_like(mass)
    # On the CPU: sums along a GPU tensor may differ from run to run.
    reached = mass.cpu().sort(descending=True).values.cumsum(0)
    count = 1 + int((reached < (tau - _SLACK) * reached[-1]).sum())
    return top(scores, min(count, len(scores)))


def threshold(scores: Tensor, kappa: float) -> Tensor:
    """ACP rule `threshold` = mean - kappa * std: keep the channels that reach it  [ours].

    Args:
        scores: [C], finite.
        kappa: any finite number; larger keeps more, negative values ask for more than the mean. The
            standard deviation is the population's.

    Returns:
        Keep mask, [C] bool; the best channel alone if none reaches the threshold.
    """
    scores = as_scores(scores, "C")
    if not math.isfinite(kappa):
        raise ValueError(f"kappa: expected a finite number, got {kappa}")
    scores = scores / scores.abs().max().clamp(min=torch.finfo(scores.dtype).tiny)
    least = scores.mean() - kappa * scores.std(correction=0)
    return top(scores, max(1, int((scores >= least - _SLACK).sum())))


def budget(scores: Tensor, bytes_available: float, round_bytes: Callable[[int], int]) -> Tensor:
    """ACP rule `budget` = the best channels, as many as a round's bytes pay for  [ours]::

        count = largest k with  round_bytes(k) <= bytes_available,  at least 1

    Args:
        scores: [C], finite.
        bytes_available: for a round.
        round_bytes: from a number of kept channels to the bytes of a round.

    Returns:
        Keep mask, [C] bool.
    """
    counts = range(1, len(scores) + 1)
    return top(scores, max((k for k in counts if round_bytes(k) <= bytes_available), default=1))


def schedule(round: int, warmup: int, final_share: float, ramp_rounds: int) -> float:
    """Share of the channels kept in a round: all in the warm-up, then ever fewer  [ours]::

        t = (round - warmup) / (ramp_rounds + 1), clipped to [0, 1]
        share = final + (1 - final) * (1 + cos(pi t)) / 2

    Rounds 1 to `warmup` keep all, the next `ramp_rounds` lie between, all later ones keep the final
    share. The cosine slows down at the end, where each channel dropped is a larger part of what is
    left.

    Args:
        round: at least 1.
        warmup: rounds that send everything, at least 0.
        final_share: in [0, 1].
        ramp_rounds: rounds of gradual pruning, at least 0; 0 prunes at once.

    Returns:
        The share, in [final_share, 1]; never rises from round to round.
    """
    _require_share("final_share", final_share)
    for name, value, least in (
        ("round", round, 1),
        ("warmup", warmup, 0),
        ("ramp_rounds", ramp_rounds, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    t = (round - warmup) / (ramp_rounds + 1)
    if t <= 0:
        return 1.0
    if t >= 1:
        return float(final_share)
    return final_share + (1 - final_share) * (1 + math.cos(math.pi * t)) / 2


def rechoose(round: int, every: int = 1, growth: float = 1.0) -> bool:
    """Whether channels are chosen anew in a round: ever more rarely as training goes on  [ours].

    The first choice is in round 1; the gap after it is `every` rounds, each further gap `growth`
    times the one before, rounded down.

    Args:
        round: counted from 1, at the end of the warm-up; below 1 there is no choice.
        every: first gap, at least 1.
        growth: at least 1; 1 means a choice every `every` rounds, for ever.
    """
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    if not growth >= 1 or math.isinf(growth):
        raise ValueError(f"growth: expected a finite number of at least 1, got {growth}")
    chosen, gap = 1, float(every)
    while chosen < round:
        chosen += math.floor(gap + _SLACK)
        # No gap beyond `round` matters, and growing on would overflow.
        gap = min(gap * growth, float(round))
    return chosen == round


def hysteresis(previous: Tensor, scores: Tensor, count: int, margin: float) -> Tensor:
    """The next mask, in which a channel is swapped only for a clearly better one  [ours].

    First the size: too many channels lose the lowest-scored, too few gain the best outside. Then
    the best outside is swapped for the worst kept, and so on, while::

        s'(outside) > (1 + margin) * s'(kept),    s' = s - min(min s, 0)

    Margin 0 gives the highest `count` scores, but for ties, where the kept one stays; an infinite
    margin never swaps.

    Args:
        previous: the mask so far, [C] bool; may be empty of channels, or full.
        scores: [C], finite.
        count: channels in the new mask, in [1, C].
        margin: at least 0, may be infinite.

    Returns:
        Keep mask, [C] bool, with exactly `count` channels.
    """
    scores = as_scores(scores, "C")
    require_shape("previous", previous, len(scores))
    _require_count(count, len(scores))
    if not margin >= 0:
        raise ValueError(f"margin: expected at least 0, got {margin}")
    order = _descending(scores)
    previous = previous.to(scores.device, torch.bool)
    inside, outside = order[previous[order]], order[~previous[order]]
    room = max(0, count - len(inside))
    kept = torch.cat([inside[:count], outside[:room]])
    outside = outside[room:]
    if not math.isinf(margin):
        # Halved, so that the shift cannot overflow; worst kept against best outside, pairwise.
        values = shifted(scores / 2)
        worst = kept[_descending(values[kept])].flip(0)
        pairs = min(len(worst), len(outside))
        better = values[outside[:pairs]] > (1 + margin) * values[worst[:pairs]]
        swaps = int(better.sum())
        kept = torch.cat([worst[swaps:], outside[:swaps]])
    mask = torch.zeros_like(previous)
    mask[kept] = True
    return mask


def _descending(scores: Tensor) -> Tensor:
    """Indices from the highest score to the lowest, equal ones by index."""
    return scores.argsort(descending=True, stable=True)


def _require_count(count: int, channels: int) -> None:
    if not 1 <= count <= channels:
        raise ValueError(f"count: expected a number in [1, {channels}], got {count}")


def _require_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {share}")
