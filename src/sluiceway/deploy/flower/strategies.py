"""Each strategy of `sluiceway.strategies.STRATEGIES` as a Flower strategy, for your own ServerApp.

    strategy = FedAlignMoE(model, clients=10, training=Training(lr=1e-3))
    result = strategy.start(grid=grid, num_rounds=5)
    load_arrays(model, result.arrays)

With `client_app` on the other side. Flower's loop holds the global model as one array of bytes,
because its own arrays have no bfloat16. A round is one Flower message each way for a client; models
of some GB are better sent by `GridTransport`, which cuts them into chunks.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from torch import nn

from sluiceway import strategies as rules
from sluiceway.deploy.flower.adapter import Adapter

#: Parameters of Flower's loop; all others are the strategy's own.
LOOP: Final = {"training", "participation", "min_clients", "seed", "evaluate", "wait"}


class FlowerStrategy(Adapter):
    """A strategy in Flower's loop.

    Args:
        model, clients: see `Adapter`.
        parameters: those of `Adapter`, and the strategy's own.
    """

    kind: ClassVar[type[rules.Strategy]]

    def __init__(self, model: nn.Module, *, clients: int, **parameters: Any) -> None:
        loop = {name: parameters.pop(name) for name in LOOP & parameters.keys()}
        super().__init__(self.kind(**parameters), model, clients=clients, **loop)


#: Every strategy by the name that `method.name` uses.
STRATEGIES: Final[dict[str, type[FlowerStrategy]]] = {
    name: type(kind.__name__, (FlowerStrategy,), {"kind": kind, "__doc__": kind.__doc__})
    for name, kind in rules.STRATEGIES.items()
}
#: The same by the name of the class.
CLASSES: Final = {made.__name__: made for made in STRATEGIES.values()}
