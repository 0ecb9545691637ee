"""Flower: our strategies and client for its users, and whole recipes over its SuperLink.

Needs the extra `[flower]`. Names are imported when they are asked for, because Flower starts a
process for every message, and what only passes pieces on need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sluiceway.deploy.flower.adapter import Adapter
    from sluiceway.deploy.flower.arrays import load_arrays, unpacked
    from sluiceway.deploy.flower.client import site_app
    from sluiceway.deploy.flower.own import ClientSetup, client_app
    from sluiceway.deploy.flower.strategies import (
        STRATEGIES,
        FedAdam,
        FedAlignMoE,
        FedAvg,
        FedMoE,
        FedProx,
        FrozenGate,
        NonExpert,
        Scaffold,
        Usage,
    )
    from sluiceway.deploy.flower.transport import GridTransport

__all__ = [
    "STRATEGIES",
    "Adapter",
    "ClientSetup",
    "FedAdam",
    "FedAlignMoE",
    "FedAvg",
    "FedMoE",
    "FedProx",
    "FrozenGate",
    "GridTransport",
    "NonExpert",
    "Scaffold",
    "Usage",
    "client_app",
    "load_arrays",
    "site_app",
    "unpacked",
]

#: Modules of the names that are not in `strategies`.
_PLACES = {
    "Adapter": "adapter",
    "load_arrays": "arrays",
    "unpacked": "arrays",
    "GridTransport": "transport",
    "site_app": "client",
    "ClientSetup": "own",
    "client_app": "own",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_PLACES.get(name, 'strategies')}")
    found = globals()[name] = getattr(module, name)
    return found
