"""Scorers: how each method rates channels, on the client and before anything is dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from sluiceway import channels
from sluiceway.channels import ClassStatistics, Moments


class ChannelScorer:
    """Rates channels on one client, which has the labels in every schedule of training.

    Attributes:
        every: it sees one batch in so many, the first of a round included.
    """

    every: ClassVar[int] = 1

    def begin(self, round: int) -> None:
        """A round begins; before the first one channels may be rated too."""

    def watch(self, A: Tensor, labels: Tensor) -> None:
        """See a training batch: smashed data [B, C, ...], labels [B]."""

    def watch_gradient(self, A: Tensor, gradient: Tensor) -> None:
        """See a batch again with the gradient that returned for it, the shape of A."""

    def scores(self) -> Tensor | None:
        """Scores [C], high is keep; None before anything was seen. Ends a round."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept from round to round, as named tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave, between rounds."""


class LabelAware(ChannelScorer):
    """LCIS: scores from running class statistics, which are kept from round to round.

    Args:
        score: from class statistics to scores [C].
        classes: K.
        grid: see `channels.pooled`.
        memory: see `ClassStatistics.update`.
    """

    def __init__(
        self, score: Callable[[ClassStatistics], Tensor], classes: int, grid: int, memory: float
    ) -> None:
        self.score, self.classes, self.grid, self.memory = score, classes, grid, memory
        self.statistics: ClassStatistics | None = None

    def watch(self, A: Tensor, labels: Tensor) -> None:
        z = channels.pooled(A, self.grid)
        # Cosines of raw activations behind a ReLU are all near one; those from the mean are not.
        centre = z.mean(0) if self.statistics is None else self.statistics.mean
        cosines = self.score is channels.similarity
        new = ClassStatistics.of(z, labels, self.classes, centre, cosines)
        known = self.statistics
        self.statistics = new if known is None else known.update(new, self.memory)

    def scores(self) -> Tensor | None:
        return None if self.statistics is None else self.score(self.statistics)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.statistics is None else self.statistics.to_tensors()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.statistics = ClassStatistics.from_tensors(state) if state else None


class MeanScore(ChannelScorer):
    """The mean over a round's batches of a score of one batch.

    Args:
        score: from smashed data to scores [C], or from smashed data and its gradient.
        of_gradient: the score takes the gradient too.
    """

    def __init__(self, score: Callable[..., Tensor], of_gradient: bool = False) -> None:
        self.score, self.of_gradient = score, of_gradient
        self.seen: list[Tensor] = []

    def watch(self, A: Tensor, labels: Tensor) -> None:
        if not self.of_gradient:
            self.seen.append(self.score(A))

    def watch_gradient(self, A: Tensor, gradient: Tensor) -> None:
        if self.of_gradient:
            self.seen.append(self.score(A, gradient))

    def scores(self) -> Tensor | None:
        mean = torch.stack(self.seen).mean(0) if self.seen else None
        self.seen = []
        return mean


class ClassGradients(ChannelScorer):
    """ICS on the server: a round's gradients by class; see `channels.class_balanced`.

    Args:
        classes: K.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.sums: tuple[Tensor, Tensor] | None = None

    def watch(self, A: Tensor, labels: Tensor) -> None:
        """See gradients [B, C, ...] in the place of smashed data."""
        sums, counts = channels.class_gradients(A, labels, self.classes)
        if self.sums is not None:
            sums, counts = sums + self.sums[0], counts + self.sums[1]
        self.sums = sums, counts

    def scores(self) -> Tensor | None:
        sums, self.sums = self.sums, None
        return None if sums is None else channels.class_balanced(*sums)


class FixedScores(ChannelScorer):
    """Scores that are drawn once from a seed, known from the beginning, and never change."""

    def __init__(self, count: int, seed: int) -> None:
        self.drawn = channels.random_scores(count, torch.Generator().manual_seed(seed))

    def scores(self) -> Tensor | None:
        return self.drawn


class MomentScorer(ChannelScorer):
    """Measures the moments of a round's channels, as one vector; see `Moments.to_vector`.

    Args:
        classes: K; 1 takes them over all classes.
        gradients: the vector ends with E[g^2] of each channel.
        due: whether what is measured in a round is used after it; nothing is measured otherwise.
    """

    every: ClassVar[int] = 4

    def __init__(self, classes: int, gradients: bool, due: Callable[[int], bool]) -> None:
        self.classes, self.gradients, self.due = classes, gradients, due
        self.measuring = True
        self.moments: Moments | None = None
        self.squares: list[Tensor] = []

    def begin(self, round: int) -> None:
        self.measuring = self.due(round)

    def watch(self, A: Tensor, labels: Tensor) -> None:
        if not self.measuring:
            return
        labels = labels if self.classes > 1 else torch.zeros_like(labels)
        new = Moments.of(A, labels, self.classes)
        self.moments = new if self.moments is None else self.moments.add(new)

    def watch_gradient(self, A: Tensor, gradient: Tensor) -> None:
        if self.gradients and self.measuring:
            self.squares.append(gradient.double().square().flatten(2).mean((0, 2)))

    def scores(self) -> Tensor | None:
        moments, squares = self.moments, self.squares
        self.moments, self.squares = None, []
        if moments is None:
            return None
        if not self.gradients:
            return moments.to_vector()
        flat = torch.ones_like(moments.mean)  # before the first step there is no gradient
        mean = torch.stack(squares).mean(0) if squares else flat
        return torch.cat([moments.to_vector(), mean])
