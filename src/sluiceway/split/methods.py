"""Every way to compress what crosses the cut, by `method.name`.

Methods that choose channels differ in their score alone: each has a meter that runs on the client,
before anything is dropped, and the same rule, schedule and hysteresis turn scores into masks. So
rivals at the same settings send the same number of bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal, Protocol

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway import channels
from sluiceway.channels import ChannelChooser, ClassStatistics
from sluiceway.split.bottleneck import Bottleneck
from sluiceway.split.compress import Channels, Compressor, Quantized
from sluiceway.split.elements import RandTopK, TopK
from sluiceway.strategies.base import PARAMETERS


class Meter(Protocol):
    """Rates channels on one client, from smashed data before anything is dropped."""

    def watch(self, A: Tensor, labels: Tensor) -> None:
        """See a training batch: smashed data [B, C, ...], labels [B]."""

    def watch_gradient(self, gradient: Tensor) -> None:
        """See the gradient that returned for the last batch, the shape of its smashed data."""

    def scores(self) -> Tensor | None:
        """Scores [C], high is keep; None before anything was seen."""


class LabelAware:
    """LCIS: scores from running class statistics, which outlive a round.

    Args:
        form: from class statistics to scores [C].
        classes: K.
        grid: see `channels.pooled`.
        memory: see `ClassStatistics.update`.
    """

    def __init__(
        self, form: Callable[[ClassStatistics], Tensor], classes: int, grid: int, memory: float
    ) -> None:
        self.form, self.classes, self.grid, self.memory = form, classes, grid, memory
        self.statistics: ClassStatistics | None = None

    def watch(self, A: Tensor, labels: Tensor) -> None:
        z = channels.pooled(A, self.grid)
        if self.statistics is None:
            self.statistics = ClassStatistics.of(z, labels, self.classes)
        else:
            # Cosines of raw activations behind a ReLU are all near one; those from the mean are not.
            new = ClassStatistics.of(z, labels, self.classes, centre=self.statistics.mean)
            self.statistics = self.statistics.update(new, self.memory)

    def watch_gradient(self, gradient: Tensor) -> None:
        pass

    def scores(self) -> Tensor | None:
        return None if self.statistics is None else self.form(self.statistics)


class MeanScore:
    """The mean over batches since the last call of a score of one batch."""

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        self.score = score
        self.seen: list[Tensor] = []

    def watch(self, A: Tensor, labels: Tensor) -> None:
        self.seen.append(self.score(A))

    def watch_gradient(self, gradient: Tensor) -> None:
        pass

    def scores(self) -> Tensor | None:
        found = torch.stack(self.seen).mean(0) if self.seen else None
        self.seen = []
        return found


class GradientScore(MeanScore):
    """The mean over batches of activation times gradient; zero for a channel that did not cross."""

    def __init__(self) -> None:
        super().__init__(channels.l1)
        self.last: Tensor | None = None

    def watch(self, A: Tensor, labels: Tensor) -> None:
        self.last = A

    def watch_gradient(self, gradient: Tensor) -> None:
        assert self.last is not None
        self.seen.append(channels.taylor(self.last, gradient))


class Fixed:
    """Scores that are drawn once and never change."""

    def __init__(self, count: int, seed: int) -> None:
        self.drawn = channels.random_scores(count, torch.Generator().manual_seed(seed))

    def watch(self, A: Tensor, labels: Tensor) -> None:
        pass

    def watch_gradient(self, gradient: Tensor) -> None:
        pass

    def scores(self) -> Tensor | None:
        return self.drawn


@dataclass(config=PARAMETERS, kw_only=True)
class ChannelChoice(Channels):
    """Channels are rated by a score, and a mask is chosen from the scores in every round.

    rule: how many channels are kept in the end: "fraction" (`share` of them), "cumulative" (the
        smallest set with share `tau` of the score mass), "threshold" (mean - `kappa` * std),
        "budget" (`budget_mb` megabytes a round for all clients, both directions).
    warmup: rounds that send everything, >= 1 (nothing is rated before). ramp_rounds: rounds over
        which the share falls to its end. every, growth: re-choices, and how they become rarer.
    margin: a channel is swapped only for one that is better by this share. decay: of scores.
    masks: "merged" for one mask of all clients' merged scores, "client" for one each.
    """

    rule: Literal["fraction", "cumulative", "threshold", "budget"] = "fraction"
    share: float = Field(default=0.125, gt=0, le=1)
    tau: float = Field(default=0.9, gt=0, le=1)
    kappa: float = Field(default=0.0)
    budget_mb: float = Field(default=1.0, gt=0)
    warmup: int = Field(default=1, ge=1)
    ramp_rounds: int = Field(default=4, ge=0)
    every: int = Field(default=1, ge=1)
    growth: float = Field(default=1.5, ge=1)
    margin: float = Field(default=0.2, ge=0)
    decay: float = Field(default=0.5, ge=0, lt=1)
    masks: Literal["merged", "client"] = "merged"

    #: Whether clients must send their scores for a merged mask.
    sends_scores: ClassVar[bool] = True

    def meter(self, count: int, classes: int, seed: int) -> Meter:
        """A client's meter for `count` channels and `classes` labels."""
        raise NotImplementedError

    def chooser(self, count: int, channel_bytes: Callable[[int], int]) -> ChannelChooser:
        """What turns scores into masks.

        Args:
            count: C.
            channel_bytes: bytes a round, both directions, all clients, if that many are kept.
        """
        rules: dict[str, Callable[[Tensor], Tensor]] = {
            "fraction": partial(channels.fraction, share=self.share),
            "cumulative": partial(channels.cumulative, tau=self.tau),
            "threshold": partial(channels.threshold, kappa=self.kappa),
            "budget": partial(affordable, budget=self.budget_mb * 1e6, nbytes=channel_bytes),
        }
        return ChannelChooser(
            count,
            rules[self.rule],
            warmup=self.warmup,
            ramp_rounds=self.ramp_rounds,
            every=self.every,
            growth=self.growth,
            margin=self.margin,
            decay=self.decay,
        )


def affordable(scores: Tensor, budget: float, nbytes: Callable[[int], int]) -> Tensor:
    """The best channels of as many as `budget` bytes pay for, at least one; mask [C] bool."""
    count = max((k for k in range(1, len(scores) + 1) if nbytes(k) <= budget), default=1)
    return channels.top(scores, count)


@dataclass(config=PARAMETERS, kw_only=True)
class ACPSL(ChannelChoice):
    """ACP-SL (arXiv 2603.09792): label-aware scores decide which channels cross.

    score: "fisher", "between" or "similarity" [ours]. grid: cells a side that channels are pooled
    to. memory: how much of earlier batches' class statistics stays, in [0, 1].
    """

    name: ClassVar[str] = "acp-sl"
    score: Literal["fisher", "between", "similarity"] = "fisher"
    grid: int = Field(default=4, ge=1)
    memory: float = Field(default=0.9, ge=0, le=1)

    def meter(self, count: int, classes: int, seed: int) -> Meter:
        forms = {
            "fisher": channels.fisher,
            "between": channels.between,
            "similarity": channels.similarity,
        }
        return LabelAware(forms[self.score], classes, self.grid, self.memory)


@dataclass(config=PARAMETERS, kw_only=True)
class RandomChannels(ChannelChoice):
    """Channels drawn once; both sides know the seed, so no scores cross."""

    name: ClassVar[str] = "random"
    sends_scores: ClassVar[bool] = False

    def meter(self, count: int, classes: int, seed: int) -> Meter:
        return Fixed(count, seed)


@dataclass(config=PARAMETERS, kw_only=True)
class L1Channels(ChannelChoice):
    """Channels of the largest mean absolute value."""

    name: ClassVar[str] = "l1"

    def meter(self, count: int, classes: int, seed: int) -> Meter:
        return MeanScore(channels.l1)


@dataclass(config=PARAMETERS, kw_only=True)
class StdChannels(ChannelChoice):
    """Channels of the largest standard deviation (SplitFC-like)."""

    name: ClassVar[str] = "std"

    def meter(self, count: int, classes: int, seed: int) -> Meter:
        return MeanScore(channels.std)


@dataclass(config=PARAMETERS, kw_only=True)
class EntropyChannels(ChannelChoice):
    """Channels of the largest entropy of values (SL-ACC-like)."""

    name: ClassVar[str] = "entropy"

    def meter(self, count: int, classes: int, seed: int) -> Meter:
        return MeanScore(channels.entropy)


@dataclass(config=PARAMETERS, kw_only=True)
class TaylorChannels(ChannelChoice):
    """Channels of the largest activation times gradient; one that is not sent gets no gradient."""

    name: ClassVar[str] = "taylor"

    def meter(self, count: int, classes: int, seed: int) -> Meter:
        return GradientScore()


#: Every method by the name that `method.name` uses in a split recipe.
METHODS: dict[str, type[Compressor]] = {
    cls.name: cls
    for cls in (
        Compressor,
        ACPSL,
        RandomChannels,
        L1Channels,
        StdChannels,
        EntropyChannels,
        TaylorChannels,
        TopK,
        RandTopK,
        Quantized,
        Bottleneck,
    )
}
