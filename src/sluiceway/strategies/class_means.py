"""Class means: no training, the model and its head in closed form alone, to compare with."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.parameters import PARAMETERS


@dataclass(config=PARAMETERS, kw_only=True)
class ClassMeans(FedAvg):
    """The model as it starts, its head from the clients' sums; no client is asked to train.

    What would be trained is that of FedAvg, so that both start from the same model to the bit.
    """

    name: ClassVar[str] = "class-means"
    trains_clients: ClassVar[bool] = False
