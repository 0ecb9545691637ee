"""FedAdam: Adam on the server over the mean change (Reddi et al., arXiv 2003.00295)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway.moe import MoELayout
from sluiceway.strategies.base import PARAMETERS, unprefixed
from sluiceway.strategies.fedavg import FedAvg


@dataclass(config=PARAMETERS, kw_only=True)
class FedAdam(FedAvg):
    """d = mean - old; m = b1 m + (1 - b1) d; v = b2 v + (1 - b2) d^2; step = lr m / (sqrt v + tau).

    As in the paper's algorithm 2 there is no bias correction.

    lr: server learning rate, > 0. beta1: decay of the mean m, in [0, 1). beta2: decay of the mean
    square v, in [0, 1). tau: adaptivity, > 0.
    """

    name: ClassVar[str] = "fedadam"
    lr: float = Field(default=0.001, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=0.001, gt=0)

    def setup(self, tensors: Mapping[str, Tensor], layout: MoELayout, clients: int) -> None:
        super().setup(tensors, layout, clients)
        self.first = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in tensors.items()}
        self.second = {name: torch.zeros_like(t) for name, t in self.first.items()}

    def step(self, mean: dict[str, Tensor]) -> dict[str, Tensor]:
        new: dict[str, Tensor] = {}
        for name, value in mean.items():
            old = self.tensors[name]
            change = value.float() - old.float()
            self.first[name].lerp_(change, 1 - self.beta1)
            self.second[name].lerp_(change.square(), 1 - self.beta2)
            moved = self.lr * self.first[name] / (self.second[name].sqrt() + self.tau)
            new[name] = (old.float() + moved).to(old.dtype)
        return new

    def state_dict(self) -> dict[str, Tensor]:
        moments = {f"first/{n}": t for n, t in self.first.items()}
        moments |= {f"second/{n}": t for n, t in self.second.items()}
        return super().state_dict() | moments

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.first = unprefixed(state, "first/")
        self.second = unprefixed(state, "second/")
