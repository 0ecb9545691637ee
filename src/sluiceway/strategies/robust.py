"""Robust aggregation: rules on a round's updates, so that a few bad clients do little harm.

A rule is a function from a round's updates to those that are added up in their place (see
`UpdateRule`), and goes with every strategy: `FedAvg().with_rules(Median())`. Client halves, server
optimisers and what crosses stay the strategy's own. Only tensors are hardened: routing reports and
numbers of examples are taken as clients report them, and an update with NaN never gets here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from statistics import median

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway.strategies.base import Strategy, Update, UpdateRule
from sluiceway.strategies.parameters import PARAMETERS

#: Values that are worked on at a time: of one client, or of up to sixteen together.
SLICE = 1 << 16


@dataclass(config=PARAMETERS, kw_only=True)
class Median:
    """Coordinate-wise median [paper: Yin et al., arXiv 1803.01498, option I].

    Of an even number of values it is the mean of the two in the middle. Clients count alike. It
    stays within what the honest ones sent while they are more than half of a piece's senders.
    """

    def cut(self, count: int) -> int:
        """How many of `count` >= 1 values are dropped at each end."""
        return (count - 1) // 2

    def least(self) -> int:
        return 3

    def streams(self) -> bool:
        return False

    def __call__(self, updates: list[Update], strategy: Strategy) -> list[Update]:
        return centred(updates, self.cut)


@dataclass(config=PARAMETERS, kw_only=True)
class TrimmedMean:
    """Coordinate-wise trimmed mean [paper: Yin et al., arXiv 1803.01498, option II].

    Of N values of a coordinate the floor(share N) smallest and as many largest are dropped, and
    the plain mean of the rest is taken. It stays within what the honest clients sent while no
    more than floor(share N) others are among a piece's N senders.

    share: dropped at each end, in [0, 0.5); 0 is the unweighted mean.
    """

    share: float = Field(default=0.1, ge=0, lt=0.5)

    def cut(self, count: int) -> int:
        """How many of `count` >= 1 values are dropped at each end, in [0, count / 2)."""
        # 0.29 * 100 is a little less than 29 in floating point
        return min(int(self.share * count + 1e-9), (count - 1) // 2)

    def least(self) -> int:
        # Without a share it drops nobody, as it was asked to.
        return max(3, math.ceil(1 / self.share - 1e-9)) if self.share else 1

    def streams(self) -> bool:
        return False

    def __call__(self, updates: list[Update], strategy: Strategy) -> list[Update]:
        return centred(updates, self.cut)


def centred(updates: list[Update], cut: Callable[[int], int]) -> list[Update]:
    """The same values for every update: of each coordinate a centre of what the clients sent.

    The mean that the strategy takes is then the centre, whatever its weights, and its server step
    applies to it [ours]. A piece's centre is over the clients that sent it, and all updates carry
    it; a piece that nobody sent stays absent [ours]. So an expert that one client used alone is
    that client's. Extra tensors are centred by name, for the updates that have them; where their
    shapes differ, each update keeps its own [ours].

    Memory: the centres (one copy of what crosses), and one piece of every client at a time.

    Args:
        cut: how many of so many values are dropped at each end.
    """
    tensors = Centres([update.tensors for update in updates], cut)
    extra = Centres([update.extra for update in updates], cut)
    return [
        replace(
            update,
            tensors=tensors.instead_of(update.tensors, tensors.names),
            extra=extra.instead_of(update.extra, list(update.extra)),
        )
        for update in updates
    ]


@dataclass(config=PARAMETERS, kw_only=True)
class NormClipping:
    """Each update is clipped to an L2 norm [paper: Sun et al., arXiv 1911.07963].

    w_i' = old + min(1, limit / ||w_i - old||) (w_i - old). The norm is that of a client's whole
    change, over all floating-point pieces it sent. An update within the limit is handed on as
    it came. The strategy weighs clients as ever, by the numbers of examples that they report.

    Extra tensors are clipped only where there is no fixed limit, for theirs would be another: a
    client's as one change from zero, to the median of those norms [ours].

    limit: > 0; None takes the median of the round's norms, and then updates are held [ours].
    """

    limit: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    def streams(self) -> bool:
        return self.limit is not None

    def __call__(self, updates: list[Update], strategy: Strategy) -> list[Update]:
        pieces = {piece.key: piece for piece in strategy.shared_pieces}

        def received(name: str) -> Tensor | None:
            piece = pieces.get(name)
            known = piece is not None and not piece.is_statistic
            return piece.of(strategy.tensors) if piece and known else None

        tensors = [Change(update.tensors, received) for update in updates]
        if self.limit is not None:
            return [
                replace(update, tensors=change.within(self.limit))
                for update, change in zip(updates, tensors, strict=True)
            ]
        extra = [Change(update.extra, lambda name: torch.zeros(())) for update in updates]
        limits = [median([one.norm for one in part] or [0.0]) for part in (tensors, extra)]
        return [
            replace(update, tensors=sent.within(limits[0]), extra=besides.within(limits[1]))
            for update, sent, besides in zip(updates, tensors, extra, strict=True)
        ]


@dataclass(config=PARAMETERS, kw_only=True)
class Krum:
    """Whole updates that are close to most others [paper: Blanchard et al., NeurIPS 2017].

    The score of an update is the sum of its squared distances to the N - f - 2 updates closest to
    it. Of the N updates those with the `keep` smallest scores are added up by the strategy, as they
    came; the others are not (multi-Krum, and Krum with `keep = 1`). Distances are over all trained
    parameters; what an update left out is unchanged [ours].

    liars: f, how many clients of a round may lie, >= 1; N must be 2 f + 3 or more. Of a round with
        fewer updates f is as large as N allows [ours].
    keep: updates that are used, >= 1; None for N - f.
    """

    liars: int = Field(default=1, ge=1, le=100_000)
    keep: int | None = Field(default=None, ge=1, le=100_000)

    def least(self) -> int:
        return 2 * self.liars + 3

    def streams(self) -> bool:
        return False

    def __call__(self, updates: list[Update], strategy: Strategy) -> list[Update]:
        count = len(updates)
        liars = min(self.liars, max(0, (count - 3) // 2))
        scores = krum_scores(squared_distances(products(updates, strategy)), liars)
        best = scores.argsort(stable=True)[: self.keep or count - liars].tolist()
        return [updates[i] for i in sorted(best)]


@dataclass(config=PARAMETERS, kw_only=True)
class GeometricMedian:
    """The point with the least sum of distances to the updates [paper: RFA, arXiv 1912.13445].

    v = argmin sum_i ||v - w_i||, over whole updates, by Weiszfeld's steps
    v = sum_i b_i w_i / sum_i b_i, b_i = 1 / max(nu, ||v - w_i||), from the mean on. All updates
    carry v, as for `Median`, so that clients count alike [ours]. An expert that a client left out
    is unchanged for it; of extra tensors the same combination is taken, over those that sent them
    [ours]. It stays near the honest updates while they are more than half.

    nu: the smallest distance, as a share of the largest, in (0, 1) [ours].
    steps: of that iteration, in [1, 10^5].
    """

    nu: float = Field(default=1e-6, gt=0, lt=1)
    steps: int = Field(default=100, ge=1, le=100_000)

    def least(self) -> int:
        return 3

    def streams(self) -> bool:
        return False

    def __call__(self, updates: list[Update], strategy: Strategy) -> list[Update]:
        if len(updates) == 1:
            return updates
        weights = weiszfeld(products(updates, strategy), self.nu, self.steps).tolist()
        pieces = {piece.key: piece for piece in strategy.shared_pieces}

        def received(name: str) -> Tensor | None:
            return pieces[name].of(strategy.tensors) if name in pieces else None

        tensors = Combination([update.tensors for update in updates], weights, received)
        extra = Combination([update.extra for update in updates], weights, lambda name: None)
        return [
            replace(
                update,
                tensors=Lazily(tensors.names, tensors.of),
                extra=Lazily(list(update.extra), extra.of),
            )
            for update in updates
        ]


@dataclass(config=PARAMETERS, kw_only=True)
class Agreement:
    """Who goes against the others is left out, and nobody goes further or counts for much more.

    In turn, of a round's N updates: those whose direction u_i = w_i - old, taken to length one, has
    a cosine below `cosine` with the geometric median of all N directions are left out, (N - 1) // 2
    at most, the lowest first; what is left goes through `NormClipping`, extra tensors as well; and
    numbers of examples count up to `most` times their median. What is left is the strategy's to
    weigh. Directions are of all trained parameters; an update that changes nothing has none, and
    stays. [ours, from RFA, arXiv 1912.13445, and norm clipping, arXiv 1911.07963]

    cosine: in [-1, 1]; of clients of unlike data it is above zero, see docs/strategies.md.
    most: > 0; None believes every number of examples.
    """

    cosine: float = Field(default=0.0, ge=-1, le=1)
    most: float | None = Field(default=3.0, gt=0, allow_inf_nan=False)

    def least(self) -> int:
        return 3

    def streams(self) -> bool:
        return False

    def __call__(self, updates: list[Update], strategy: Strategy) -> list[Update]:
        if len(updates) < self.least():
            return updates
        against = opposed(products(updates, strategy), self.cosine)
        kept = [update for at, update in enumerate(updates) if at not in against]
        if self.most is not None:
            usual = max(1, int(self.most * median(update.examples for update in kept)))
            kept = [replace(update, examples=min(update.examples, usual)) for update in kept]
        return NormClipping()(kept, strategy)


def opposed(gram: Tensor, cosine: float) -> set[int]:
    """The rows of N points that go against the geometric median of their directions.

    Args:
        gram: inner products of the points, [N, N] float64.
        cosine: with that median, below which a point goes against it.

    Returns:
        (N - 1) // 2 rows at most, the lowest cosines first; none that is zero.
    """
    norms = gram.diagonal().sqrt()
    units = gram / (norms[:, None] * norms).clamp_min(1e-300)
    weights = weiszfeld(units, GeometricMedian.nu, GeometricMedian.steps)
    along = units @ weights
    found = along / (weights @ along).clamp_min(1e-300).sqrt()
    lowest = found.argsort(stable=True, dim=0)[: (len(gram) - 1) // 2].tolist()
    return {row for row in lowest if norms[row] > 0 and found[row] < cosine}


def products(updates: Sequence[Update], strategy: Strategy) -> Tensor:
    """The inner products of the updates' changes of the parameters, [N, N] float64.

    Memory: `SLICE` values of every client at a time.
    """
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for piece in strategy.shared_pieces:
        old = piece.of(strategy.tensors)
        values = [update.tensors.get(piece.key) for update in updates]
        counts = old.is_floating_point() and not piece.is_statistic
        if not counts or all(value is None for value in values):
            continue
        flat = [None if value is None else value.detach().cpu().reshape(-1) for value in values]
        for begin in range(0, old.numel(), SLICE):
            at = slice(begin, begin + SLICE)
            base = old.reshape(-1)[at]
            none = torch.zeros(len(base), dtype=torch.float64)
            rows = [none if value is None else value[at].double() - base for value in flat]
            changes = torch.stack(rows)
            gram += changes @ changes.T
    return gram


def squared_distances(gram: Tensor) -> Tensor:
    """||x_i - x_j||^2 from inner products, [N, N]."""
    squares = gram.diagonal()
    return (squares[:, None] + squares[None] - 2 * gram).clamp_min(0).fill_diagonal_(0)


def krum_scores(distances: Tensor, liars: int) -> Tensor:
    """The sum of each row's N - f - 2 smallest squared distances to others, at least one; [N]."""
    count = len(distances)
    if count < 2:
        return torch.zeros(count, dtype=distances.dtype)
    others = distances.clone().fill_diagonal_(math.inf).sort(1).values
    return others[:, : max(1, count - liars - 2)].sum(1)


def weiszfeld(gram: Tensor, nu: float, steps: int) -> Tensor:
    """Weights of the geometric median of N points, [N], >= 0 and summing to one.

    Args:
        gram: inner products of the points, [N, N] float64.
        nu: smallest distance, as a share of the largest of the first step.
        steps: of Weiszfeld's iteration.
    """
    weights = torch.full((len(gram),), 1 / len(gram), dtype=gram.dtype)
    least = None
    for _ in range(steps):
        mixed = gram @ weights
        squares = gram.diagonal() - 2 * mixed + weights @ mixed
        distances = squares.clamp_min(0).sqrt()
        if least is None:
            least = nu * distances.max()
            if not least:  # all are alike
                return weights
        weights = 1 / distances.clamp_min(least)
        weights = weights / weights.sum()
    return weights


class Combination:
    """Named tensors added up with a weight for each client, made once, when asked for.

    Args:
        sent: what each client sent, by name.
        weights: of the clients, summing to one.
        before: what counts for a client that did not send a name; None leaves it out, and the
            others' weights are scaled up.
    """

    def __init__(
        self,
        sent: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        before: Callable[[str], Tensor | None],
    ) -> None:
        self.sent, self.weights, self.before = sent, weights, before
        self.names = dict.fromkeys(name for one in sent for name in one)
        self.made: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor:
        """The combined tensor, in the type of the first that was sent."""
        if name not in self.made:
            like = next(one[name] for one in self.sent if name in one)
            total, summed = torch.zeros_like(like, dtype=torch.float64), 0.0
            for one, weight in zip(self.sent, self.weights, strict=True):
                value = one[name] if name in one else self.before(name)
                if value is not None:
                    total.add_(value.to(total), alpha=weight)
                    summed += weight
            self.made[name] = (total / summed).to(like.dtype) if summed else like
        return self.made[name]


class Lazily(Mapping[str, Tensor]):
    """Named tensors that are made when asked for, and not kept."""

    def __init__(self, names: Collection[str], make: Callable[[str], Tensor]) -> None:
        self.names = names
        self.make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Centres:
    """The centre of each named tensor over the clients that sent it, made once, when asked for.

    Args:
        sent: what each client sent, by name.
        cut: how many values to drop at each end, of so many.
    """

    def __init__(self, sent: Sequence[Mapping[str, Tensor]], cut: Callable[[int], int]) -> None:
        self.sent = sent
        self.cut = cut
        self.names = dict.fromkeys(name for one in sent for name in one)
        self.made: dict[str, Tensor | None] = {}

    def of(self, name: str) -> Tensor | None:
        """The centre, or None where shapes differ."""
        if name not in self.made:
            values = [value for one in self.sent if (value := one.get(name)) is not None]
            alike = len({value.shape for value in values}) == 1
            self.made[name] = trimmed_mean(values, self.cut(len(values))) if alike else None
        return self.made[name]

    def instead_of(self, own: Mapping[str, Tensor], names: Collection[str]) -> Lazily:
        """The centres of these names; a client's own tensor where there is no centre."""

        def make(name: str) -> Tensor:
            centre = self.of(name)
            return own[name] if centre is None else centre

        return Lazily(names, make)


def trimmed_mean(values: Sequence[Tensor], cut: int) -> Tensor:
    """The mean of each coordinate without the `cut` smallest and the `cut` largest values.

    It is never outside of the values that are left, and their order changes nothing.

    Args:
        values: N >= 1 tensors of one shape and type.
        cut: in [0, N / 2).

    Returns:
        The same shape and type; averaged in float64.
    """
    first, count = values[0], len(values)
    if count == 1:
        return first
    wide = torch.promote_types(first.dtype, torch.float32)
    flat = [value.detach().cpu().reshape(-1) for value in values]
    centre, step = torch.empty_like(flat[0]), max(1, SLICE // min(count, 16))
    for begin in range(0, first.numel(), step):
        at = slice(begin, begin + step)
        rows = torch.stack([value[at].to(wide) for value in flat], dim=1)
        # numpy's sort of short rows is several times as fast as torch's
        kept = torch.from_numpy(np.sort(rows.numpy(), axis=1))[:, cut : count - cut].double()
        centre[at] = kept.mean(1).clamp(kept[:, 0], kept[:, -1])
    return centre.reshape(first.shape).to(first.device)


class Change:
    """How far one client's tensors are from what they were.

    Args:
        sent: by name.
        before: the old value of a name, of a shape that broadcasts; None leaves a tensor out.
    """

    def __init__(self, sent: Mapping[str, Tensor], before: Callable[[str], Tensor | None]) -> None:
        self.sent = sent
        self.before = before

    @cached_property
    def norm(self) -> float:
        """The L2 norm of the change over all floating-point tensors, in float64."""
        return math.hypot(
            *(
                float(torch.linalg.vector_norm(new.double() - old))
                for name in self.sent
                for new, old in self.slices(name, self.sent[name])
            )
        )

    def within(self, limit: float) -> Mapping[str, Tensor]:
        """The tensors with the change shortened to `limit` >= 0 where it is longer."""
        if self.norm <= limit:
            return self.sent
        share = limit / self.norm

        def make(name: str) -> Tensor:
            made = self.sent[name].clone(memory_format=torch.contiguous_format)
            for new, old in self.slices(name, made):
                new.copy_(old + share * (new.double() - old))
            return made

        return Lazily(list(self.sent), make)

    def slices(self, name: str, new: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A tensor and its old value in flat slices; none of a tensor that is left out.

        In float64 a slice's change cannot overflow, and a small one stays in the cache.
        """
        old = self.before(name)
        if old is not None and new.is_floating_point():
            old = old.expand_as(new).reshape(-1)
            yield from zip(new.reshape(-1).split(SLICE), old.split(SLICE), strict=True)


#: Every robust rule by the name that `method.robust.name` uses.
ROBUST: dict[str, type[UpdateRule]] = {
    "median": Median,
    "trimmed-mean": TrimmedMean,
    "norm-clipping": NormClipping,
    "krum": Krum,
    "geometric-median": GeometricMedian,
    "agreement": Agreement,
}
