"""FedYogi: Yogi on the server over the mean change (Reddi et al., arXiv 2003.00295)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.parameters import PARAMETERS
from sluiceway.strategies.server import Yogi


@dataclass(config=PARAMETERS, kw_only=True)
class FedYogi(FedAvg):
    """FedAvg with the server optimiser `Yogi`, whose parameters it takes.

    lr: server learning rate, > 0. beta1: decay of the mean change, in [0, 1). beta2: how fast its
    mean square moves, in [0, 1). tau: adaptivity, > 0.
    """

    name: ClassVar[str] = "fedyogi"
    lr: float = Field(default=0.01, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=0.001, gt=0)

    def __post_init__(self) -> None:
        self.server = Yogi(lr=self.lr, beta1=self.beta1, beta2=self.beta2, tau=self.tau)
