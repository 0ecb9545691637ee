"""FedAvg: the example-weighted mean of the clients' models (McMahan et al., arXiv 1602.05629)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway.moe import Piece
from sluiceway.strategies.base import PARAMETERS, RunningMean, Strategy, Update


@dataclass(config=PARAMETERS, kw_only=True)
class FedAvg(Strategy):
    """new = sum_i n_i w_i / sum_i n_i, over every trained tensor; n_i examples of client i.

    An expert that a client left out counts with its old value: that client did not change it.
    """

    name: ClassVar[str] = "fedavg"

    def aggregate(self, updates: Iterable[Update]) -> None:
        mean, seen = RunningMean(self.tensors), False
        for update in updates:
            seen = True
            for piece in self.shared_pieces:
                mean.add(piece, update.tensors.get(piece.key), self.weight(update, piece))
        if seen:
            self.tensors = self.step(mean.result())

    def weight(self, update: Update, piece: Piece) -> float | Tensor:
        """How much this client's value of this piece counts, >= 0; need not be normalised."""
        return float(update.examples)

    def step(self, mean: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the mean of the clients to the new global tensors; FedAvg takes it as it is."""
        return mean
