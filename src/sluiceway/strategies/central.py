"""Central: training in one place, on all clients' examples with as many steps, to compare with."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.parameters import PARAMETERS


@dataclass(config=PARAMETERS, kw_only=True)
class Central(FedAvg):
    """FedAvg of one client that holds everybody's examples: what federation costs is left out.

    A recipe with this method pools the examples; in a round it takes as many steps as the clients
    of a federated round take together, the mean over rounds where they are sampled.
    """

    name: ClassVar[str] = "central"
