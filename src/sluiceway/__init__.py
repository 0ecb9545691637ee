"""Sluiceway: train on data that must not leave its owners.

The call that does what `sluiceway run` does, with your own model, data and strategy:

    import sluiceway
    result = sluiceway.federate(model, clients, test, sluiceway.FedAlignMoE(), rounds=10)
    result = sluiceway.split_train(network, "conv2", clients, test, "acp-sl", rounds=10)

Besides the names below, every class in the tables of methods is here: strategies and robust rules
(`sluiceway.FedProx`, `sluiceway.Median`) and compressors (`sluiceway.ACPSL`).
"""

__version__ = "0.2.0"

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sluiceway.core.checkpoints import Checkpoint as Checkpoint
    from sluiceway.core.round_loop import Result as Result
    from sluiceway.core.settings import Optimisation as Optimisation
    from sluiceway.core.settings import SplitTraining as SplitTraining
    from sluiceway.core.settings import Training as Training
    from sluiceway.experiment.trained import load as load
    from sluiceway.moe import NoExpertsError as NoExpertsError
    from sluiceway.moe import moe_layout as anatomy  # noqa: F401
    from sluiceway.moe import moe_layout as moe_layout
    from sluiceway.moe import upcycle as upcycle
    from sluiceway.split import *  # noqa: F403
    from sluiceway.split.methods import METHODS as SPLIT_METHODS  # noqa: F401
    from sluiceway.split.training import split_train as split_train
    from sluiceway.strategies import *  # noqa: F403
    from sluiceway.transport.local import federate as federate

#: Names that are no methods: module, and name there if it is another. All are imported when they
#: are asked for: a process that only passes a message on need not wait for torch.
_PLACES = {
    "federate": "sluiceway.transport.local",
    "split_train": "sluiceway.split.training",
    "chained": "sluiceway.split.traced",
    "load": "sluiceway.experiment.trained",
    "Checkpoint": "sluiceway.core.checkpoints",
    "Result": "sluiceway.core.round_loop",
    "Training": "sluiceway.core.settings",
    "Optimisation": "sluiceway.core.settings",
    "SplitTraining": "sluiceway.core.settings",
    "Strategy": "sluiceway.strategies",
    "NoExpertsError": "sluiceway.moe",
    "moe_layout": "sluiceway.moe",
    "anatomy": "sluiceway.moe:moe_layout",
    "upcycle": "sluiceway.moe",
    "SPLIT_METHODS": "sluiceway.split.methods:METHODS",
}


def _methods() -> dict[str, Any]:
    """Every class that a recipe can name as its method, by the name of the class."""
    from sluiceway.split.methods import METHODS
    from sluiceway.strategies import BASELINES, PRIVACY, ROBUST, SERVER, STRATEGIES

    tables: tuple[Mapping[str, type[Any]], ...]
    tables = (STRATEGIES, BASELINES, ROBUST, SERVER, PRIVACY, METHODS)
    return {cls.__name__: cls for table in tables for cls in table.values()}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        module, _, other = _PLACES[name].partition(":")
        found = getattr(import_module(module), other or name)
    elif name == "__all__":
        found = __dir__()
    elif not name[:1].isupper() or (found := _methods().get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*_PLACES, *_methods()})
