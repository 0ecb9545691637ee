"""Sluiceway: train on data that must not leave its owners.

The call that does what `sluiceway run` does, with your own model, data and strategy:

    import sluiceway
    result = sluiceway.federate(model, clients, test, sluiceway.FedAlignMoE(), rounds=10)
    result = sluiceway.split_train(network, "conv2", clients, test, "acp-sl", rounds=10)
"""

__version__ = "0.2.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sluiceway.core.checkpoints import Checkpoint
    from sluiceway.core.round_loop import Result
    from sluiceway.core.settings import Optimisation, Training
    from sluiceway.moe import NoExpertsError, moe_layout, upcycle
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
    from sluiceway.transport.local import federate

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
    "federate",
    "moe_layout",
    "split_train",
    "upcycle",
]

#: Where each name is, but for those of another name there. They are imported when they are asked
#: for: a process that only passes a message on need not wait for torch.
_PLACES = {
    "federate": "sluiceway.transport.local",
    "Checkpoint": "sluiceway.core.checkpoints",
    "Result": "sluiceway.core.round_loop",
    "Training": "sluiceway.core.settings",
    "Optimisation": "sluiceway.core.settings",
    "NoExpertsError": "sluiceway.moe",
    "moe_layout": "sluiceway.moe",
    "upcycle": "sluiceway.moe",
    "SPLIT_METHODS": "sluiceway.split.methods",
    "split_train": "sluiceway.split.training",
    "FedAdam": "sluiceway.strategies",
    "FedAlignMoE": "sluiceway.strategies",
    "FedAvg": "sluiceway.strategies",
    "FedMoE": "sluiceway.strategies",
    "FedProx": "sluiceway.strategies",
    "FrozenGate": "sluiceway.strategies",
    "Median": "sluiceway.strategies",
    "NonExpert": "sluiceway.strategies",
    "NormClipping": "sluiceway.strategies",
    "Scaffold": "sluiceway.strategies",
    "Strategy": "sluiceway.strategies",
    "TrimmedMean": "sluiceway.strategies",
    "Usage": "sluiceway.strategies",
}
_OTHER_NAMES = {"SPLIT_METHODS": "METHODS"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_PLACES[name]), _OTHER_NAMES.get(name, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
