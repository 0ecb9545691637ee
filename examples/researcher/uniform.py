"""A strategy of one's own: every client counts alike, whatever its number of examples."""

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway.moe import ParamSlice
from sluiceway.strategies import FedAvg, Update
from sluiceway.strategies.parameters import PARAMETERS


@dataclass(config=PARAMETERS, kw_only=True)
class Uniform(FedAvg):
    """The mean of the clients' models.

    power: a client counts by its number of examples to this power; 0 is the uniform mean.
    """

    name: ClassVar[str] = "uniform"
    power: float = 0.0

    def weight(self, update: Update, piece: ParamSlice) -> float | Tensor:
        return float(update.examples**self.power)
