"""Sluiceway: train on data that must not leave its owners.

The call that does what `sluiceway run` does, with your own model, data and strategy:

    import sluiceway
    result = sluiceway.federate(model, clients, test, sluiceway.FedAlignMoE(), rounds=10)
    result = sluiceway.split_train(network, "conv2", clients, test, "acp-sl", rounds=10)
"""

__version__ = "0.1.0"

from sluiceway.engines.local import federate
from sluiceway.federated import Checkpoint, Result, Training
from sluiceway.federated.client import Optimisation
from sluiceway.moe import NoExpertsError, anatomy, upcycle
from sluiceway.split.methods import METHODS as SPLIT_METHODS
from sluiceway.split.training import split_train
from sluiceway.strategies import (
    FedAdam,
    FedAlignMoE,
    FedAvg,
    FedMoE,
    FedProx,
    FrozenGate,
    Median,
    NonExpert,
    NormClipping,
    Scaffold,
    Strategy,
    TrimmedMean,
    Usage,
)

__all__ = [
    "SPLIT_METHODS",
    "Checkpoint",
    "FedAdam",
    "FedAlignMoE",
    "FedAvg",
    "FedMoE",
    "FedProx",
    "FrozenGate",
    "Median",
    "NoExpertsError",
    "NonExpert",
    "NormClipping",
    "Optimisation",
    "Result",
    "Scaffold",
    "Strategy",
    "Training",
    "TrimmedMean",
    "Usage",
    "anatomy",
    "federate",
    "split_train",
    "upcycle",
]
