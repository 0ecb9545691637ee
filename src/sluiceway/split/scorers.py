"""Meters: how each method rates channels, on the client and before anything is dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from sluiceway import channels
from sluiceway.channels import ClassStatistics


class ChannelScorer(Protocol):
    """Rates channels on one client, which has the labels in every form of training."""

    def watch(self, A: Tensor, labels: Tensor) -> None:
        """See a training batch: smashed data [B, C, ...], labels [B]."""

    def watch_gradient(self, A: Tensor, gradient: Tensor) -> None:
        """See a batch again with the gradient that returned for it, the shape of A."""

    def scores(self) -> Tensor | None:
        """Scores [C], high is keep; None before anything was seen. Closes a round."""

    def state_dict(self) -> dict[str, Tensor]:
        """What outlives a round, as named tensors."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave, between rounds."""


class Forgetful:
    """A meter of which nothing outlives a round."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass


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
        # Cosines of raw activations behind a ReLU are all near one; those from the mean are not.
        centre = z.mean(0) if self.statistics is None else self.statistics.mean
        cosines = self.form is channels.similarity
        new = ClassStatistics.of(z, labels, self.classes, centre, cosines)
        known = self.statistics
        self.statistics = new if known is None else known.update(new, self.memory)

    def watch_gradient(self, A: Tensor, gradient: Tensor) -> None:
        pass

    def scores(self) -> Tensor | None:
        return None if self.statistics is None else self.form(self.statistics)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.statistics is None else self.statistics.to_tensors()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.statistics = ClassStatistics.from_tensors(state) if state else None


class MeanScore(Forgetful):
    """The mean over a round's batches of a score of one batch."""

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        self.score = score
        self.seen: list[Tensor] = []

    def watch(self, A: Tensor, labels: Tensor) -> None:
        self.seen.append(self.score(A))

    def watch_gradient(self, A: Tensor, gradient: Tensor) -> None:
        pass

    def scores(self) -> Tensor | None:
        return mean_and_clear(self.seen)


class MeanGradientScore(Forgetful):
    """The mean over a round's batches of a score of a batch and its gradient."""

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.score = score
        self.seen: list[Tensor] = []

    def watch(self, A: Tensor, labels: Tensor) -> None:
        pass

    def watch_gradient(self, A: Tensor, gradient: Tensor) -> None:
        self.seen.append(self.score(A, gradient))

    def scores(self) -> Tensor | None:
        return mean_and_clear(self.seen)


def mean_and_clear(seen: list[Tensor]) -> Tensor | None:
    """The mean of the tensors, of which the list is then emptied; None of none."""
    mean = torch.stack(seen).mean(0) if seen else None
    seen.clear()
    return mean


class Fixed(Forgetful):
    """Scores that are drawn once, known from the beginning, and never change."""

    def __init__(self, count: int, seed: int) -> None:
        self.drawn = channels.random_scores(count, torch.Generator().manual_seed(seed))

    def watch(self, A: Tensor, labels: Tensor) -> None:
        pass

    def watch_gradient(self, A: Tensor, gradient: Tensor) -> None:
        pass

    def scores(self) -> Tensor | None:
        return self.drawn
