"""Sluiceway: train on data that must not leave its owners.

The call that does what `sluiceway run` does, with your own model, data and strategy:

    import sluiceway
    result = sluiceway.federate(model, clients, test, sluiceway.FedAlignMoE(), rounds=10)
"""

__version__ = "0.1.0"

from sluiceway.engines.local import federate
from sluiceway.federated import Checkpoint, Result, Training
from sluiceway.moe import NoExpertsError, anatomy, upcycle
from sluiceway.strategies import (
    FedAdam,
    FedAlignMoE,
    FedAvg,
    FedMoE,
    FedProx,
    FrozenGate,
    NonExpert,
    Scaffold,
    Strategy,
    Usage,
)

__all__ = [
    "Checkpoint",
    "FedAdam",
    "FedAlignMoE",
    "FedAvg",
    "FedMoE",
    "FedProx",
    "FrozenGate",
    "NoExpertsError",
    "NonExpert",
    "Result",
    "Scaffold",
    "Strategy",
    "Training",
    "Usage",
    "anatomy",
    "federate",
    "upcycle",
]
