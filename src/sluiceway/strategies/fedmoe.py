"""FedMoE: modular aggregation of the experts that clients hold (arXiv 2408.11304)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway.moe import BlockRouting, ParamSlice
from sluiceway.strategies.base import Update
from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.parameters import PARAMETERS


@dataclass(config=PARAMETERS, kw_only=True)
class FedMoE(FedAvg):
    """An expert nobody holds is unchanged, one holder's is copied, several are averaged.

    Gate rows follow: row e is averaged over the holders of expert e. A client holds e when it
    routed at least `hold / E` of its routed tokens there, E experts in the block [ours]. Averages
    are example-weighted [ours]; all other parameters as in FedAvg.

    hold: share of the uniform load that makes a holder, in [0, E]; 0 means any token.
    """

    name: ClassVar[str] = "fedmoe"
    needs_experts: ClassVar[bool] = True
    reads_routing: ClassVar[bool] = True
    hold: float = Field(default=0.5, ge=0)

    def weight(self, update: Update, piece: ParamSlice) -> float | Tensor:
        owner = self.layout.owner(piece.key)
        if owner is not None:
            block, expert = owner
            return update.examples * float(self.holds(update.routing[block])[expert])
        block_of_gate = self.layout.gate_block(piece.param)
        if block_of_gate is not None:
            return update.examples * self.holds(update.routing[block_of_gate])
        return float(update.examples)

    def sends(self, piece: ParamSlice, routing: Sequence[BlockRouting]) -> bool:
        owner = self.layout.owner(piece.key)
        return owner is None or bool(self.holds(routing[owner[0]])[owner[1]])

    def holds(self, routing: BlockRouting) -> Tensor:
        """1.0 for each expert that the client holds, else 0.0; [E] float64."""
        load = routing.load.to(torch.float64)
        least = self.hold * load.sum() / load.numel()
        return ((load > 0) & (load >= least)).to(torch.float64)
