"""How a server combines updates: one strategy, one small file."""

from __future__ import annotations

from typing import Any

from sluiceway.strategies.base import (
    Broadcast,
    LocalContext,
    RunningMean,
    Strategy,
    Update,
    UpdateRule,
)
from sluiceway.strategies.central import Central
from sluiceway.strategies.class_means import ClassMeans
from sluiceway.strategies.fc_moe import FCMoE
from sluiceway.strategies.fedadam import FedAdam
from sluiceway.strategies.fedalign_moe import FedAlignMoE
from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.fedavgm import FedAvgM
from sluiceway.strategies.fedmoe import FedMoE
from sluiceway.strategies.fedprox import FedProx
from sluiceway.strategies.fedyogi import FedYogi
from sluiceway.strategies.frozen_gate import FrozenGate
from sluiceway.strategies.non_expert import NonExpert
from sluiceway.strategies.privacy import PRIVACY, Gaussian
from sluiceway.strategies.robust import (
    ROBUST,
    Agreement,
    GeometricMedian,
    Krum,
    Median,
    NormClipping,
    TrimmedMean,
)
from sluiceway.strategies.scaffold import Scaffold
from sluiceway.strategies.server import SERVER, Adam, Momentum, ServerOptimizer, Yogi
from sluiceway.strategies.usage import Usage

#: Every strategy by the name that `method.name` uses.
STRATEGIES: dict[str, type[Strategy]] = {
    cls.name: cls
    for cls in (
        FedAvg,
        FedProx,
        FedMoE,
        Usage,
        NonExpert,
        FrozenGate,
        Scaffold,
        FedAvgM,
        FedAdam,
        FedYogi,
        FCMoE,
        FedAlignMoE,
    )
}

#: What a recipe may name besides, to compare with: no strategies of a deployment.
BASELINES: dict[str, type[Strategy]] = {cls.name: cls for cls in (ClassMeans, Central)}


def strategy(name: str, **parameters: Any) -> Strategy:
    """The strategy of that name with the given parameters.

    Raises:
        ValueError: no such name.
        pydantic.ValidationError: an unknown parameter, or a value out of range.
    """
    if name not in STRATEGIES:
        raise ValueError(f"unknown method {name!r}; allowed: {', '.join(STRATEGIES)}")
    return STRATEGIES[name](**parameters)


__all__ = [
    "BASELINES",
    "PRIVACY",
    "ROBUST",
    "SERVER",
    "STRATEGIES",
    "Adam",
    "Agreement",
    "Broadcast",
    "Central",
    "ClassMeans",
    "FCMoE",
    "FedAdam",
    "FedAlignMoE",
    "FedAvg",
    "FedAvgM",
    "FedMoE",
    "FedProx",
    "FedYogi",
    "FrozenGate",
    "Gaussian",
    "GeometricMedian",
    "Krum",
    "LocalContext",
    "Median",
    "Momentum",
    "NonExpert",
    "NormClipping",
    "RunningMean",
    "Scaffold",
    "ServerOptimizer",
    "Strategy",
    "TrimmedMean",
    "Update",
    "UpdateRule",
    "Usage",
    "Yogi",
    "strategy",
]
