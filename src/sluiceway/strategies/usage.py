"""Usage-weighted experts: a client counts for an expert by the tokens it routed there."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway.moe import ParamSlice
from sluiceway.strategies.base import Update
from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.parameters import PARAMETERS


@dataclass(config=PARAMETERS, kw_only=True)
class Usage(FedAvg):
    """new expert e = sum_i c_i(e) w_i(e) / sum_i c_i(e), c_i(e) tokens routed to e; rest FedAvg."""

    name: ClassVar[str] = "usage"
    needs_experts: ClassVar[bool] = True
    reads_routing: ClassVar[bool] = True

    def weight(self, update: Update, piece: ParamSlice) -> float | Tensor:
        owner = self.layout.owner(piece.key)
        if owner is None:
            return float(update.examples)
        block, expert = owner
        return float(update.routing[block].load[expert])
