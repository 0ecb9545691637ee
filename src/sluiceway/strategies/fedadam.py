"""FedAdam: Adam on the server over the mean change (Reddi et al., arXiv 2003.00295)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.parameters import PARAMETERS
from sluiceway.strategies.server import Adam


@dataclass(config=PARAMETERS, kw_only=True)
class FedAdam(FedAvg):
    """FedAvg with the server optimiser `Adam`, whose parameters it takes.

    lr: server learning rate, > 0. beta1: decay of the mean change, in [0, 1). beta2: decay of its
    mean square, in [0, 1). tau: adaptivity, > 0.
    """

    name: ClassVar[str] = "fedadam"
    lr: float = Field(default=0.001, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=0.001, gt=0)

    def __post_init__(self) -> None:
        self.server = Adam(lr=self.lr, beta1=self.beta1, beta2=self.beta2, tau=self.tau)
