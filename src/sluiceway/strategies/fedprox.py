"""FedProx: FedAvg with clients held near the received model (Li et al., arXiv 1812.06127)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway.strategies.base import LocalContext
from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.parameters import PARAMETERS


@dataclass(config=PARAMETERS, kw_only=True)
class FedProx(FedAvg):
    """Adds mu / 2 * ||w - w_received||^2 to each client's loss, over all trained parameters.

    mu: strength of the proximal term, >= 0; 0 is FedAvg.
    """

    name: ClassVar[str] = "fedprox"
    mu: float = Field(default=0.01, ge=0)

    def penalty(self, client: LocalContext) -> Tensor | None:
        if self.mu == 0:
            return None
        # The float32 copies: half-precision parameters cannot represent small distances.
        distances = [
            torch.sum((value - client.received[name]) ** 2)
            for name, value in client.master_params.items()
        ]
        return 0.5 * self.mu * torch.stack(distances).sum()
