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
from sluiceway.strategies.fedadam import FedAdam
from sluiceway.strategies.fedalign_moe import FedAlignMoE
from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.fedmoe import FedMoE
from sluiceway.strategies.fedprox import FedProx
from sluiceway.strategies.frozen_gate import FrozenGate
from sluiceway.strategies.non_expert import NonExpert
from sluiceway.strategies.robust import ROBUST, Median, NormClipping, TrimmedMean
from sluiceway.strategies.scaffold import Scaffold
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
        FedAdam,
        FedAlignMoE,
    )
}


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
    "ROBUST",
    "STRATEGIES",
    "Broadcast",
    "FedAdam",
    "FedAlignMoE",
    "FedAvg",
    "FedMoE",
    "FedProx",
    "FrozenGate",
    "LocalContext",
    "Median",
    "NonExpert",
    "NormClipping",
    "RunningMean",
    "Scaffold",
    "Strategy",
    "TrimmedMean",
    "Update",
    "UpdateRule",
    "Usage",
    "strategy",
]
