"""FedAvg with the gates left as they are: no client trains a router."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from sluiceway.moe import MoELayout
from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.parameters import PARAMETERS


@dataclass(config=PARAMETERS, kw_only=True)
class FrozenGate(FedAvg):
    """FedAvg over all but the routers, which keep their first values and never cross."""

    name: ClassVar[str] = "frozen-gate"
    needs_experts: ClassVar[bool] = True

    def trains(self, param: str, layout: MoELayout) -> bool:
        return param not in layout.gate_params and super().trains(param, layout)
