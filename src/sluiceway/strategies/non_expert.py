"""Only what is not an expert is averaged; experts stay with their clients (as in FLEx)."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.parameters import PARAMETERS


@dataclass(config=PARAMETERS, kw_only=True)
class NonExpert(FedAvg):
    """FedAvg over gates and all other parameters; each client keeps its own experts.

    The global model holds the experts it began with, so global accuracy is that of a model with
    untrained experts; personal accuracy is the one to read here.
    """

    name: ClassVar[str] = "non-expert"
    needs_experts: ClassVar[bool] = True

    def private(self, param: str) -> bool:
        return param in self.layout.expert_params
