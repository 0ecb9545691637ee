"""FedAvgM: momentum on the server over the mean change (Hsu et al., arXiv 1909.06335)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.parameters import PARAMETERS
from sluiceway.strategies.server import Momentum


@dataclass(config=PARAMETERS, kw_only=True)
class FedAvgM(FedAvg):
    """FedAvg with the server optimiser `Momentum`, whose parameters it takes.

    beta: decay of the momentum, in [0, 1); 0 is FedAvg where lr is 1. lr: server learning rate,
    > 0.
    """

    name: ClassVar[str] = "fedavgm"
    beta: float = Field(default=0.9, ge=0, lt=1)
    lr: float = Field(default=1.0, gt=0)

    def __post_init__(self) -> None:
        self.server = Momentum(beta=self.beta, lr=self.lr)
