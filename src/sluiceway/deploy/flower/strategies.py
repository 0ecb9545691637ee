"""Our strategies as Flower's: for a ServerApp of one's own, with `client_app` on the other side.

    strategy = FedAlignMoE(model, clients=10, training=Training(lr=1e-3))
    result = strategy.start(grid=grid, num_rounds=5)
    load_arrays(model, result.arrays)

Flower's loop holds the global model as one array of bytes, because its own arrays know no bfloat16.
A round is one Flower message each way for a client; models of some GB are better carried by
`GridTransport`, which cuts them into pieces.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from sluiceway import strategies as rules
from sluiceway.core.settings import Training
from sluiceway.deploy.flower.adapter import Adapter


class Named(Adapter):
    """A strategy by its class; takes the strategy's own parameters beside those of `Adapter`."""

    kind: ClassVar[type[rules.Strategy]]

    def __init__(
        self,
        model: nn.Module,
        *,
        clients: int,
        training: Training | None = None,
        participation: float = 1.0,
        min_clients: int = 1,
        seed: int = 0,
        evaluate: float = 0.0,
        patience: float = 300.0,
        **parameters: Any,
    ) -> None:
        super().__init__(
            self.kind(**parameters),
            model,
            clients=clients,
            training=training,
            participation=participation,
            min_clients=min_clients,
            seed=seed,
            evaluate=evaluate,
            patience=patience,
        )


class FedAlignMoE(Named):
    """`sluiceway.strategies.FedAlignMoE` in Flower's loop."""

    kind = rules.FedAlignMoE


class FedAvg(Named):
    """`sluiceway.strategies.FedAvg` in Flower's loop."""

    kind = rules.FedAvg


class FedProx(Named):
    """`sluiceway.strategies.FedProx` in Flower's loop."""

    kind = rules.FedProx


class FedMoE(Named):
    """`sluiceway.strategies.FedMoE` in Flower's loop."""

    kind = rules.FedMoE


class Usage(Named):
    """`sluiceway.strategies.Usage` in Flower's loop."""

    kind = rules.Usage


class NonExpert(Named):
    """`sluiceway.strategies.NonExpert` in Flower's loop."""

    kind = rules.NonExpert


class FrozenGate(Named):
    """`sluiceway.strategies.FrozenGate` in Flower's loop."""

    kind = rules.FrozenGate


class Scaffold(Named):
    """`sluiceway.strategies.Scaffold` in Flower's loop."""

    kind = rules.Scaffold


class FedAdam(Named):
    """`sluiceway.strategies.FedAdam` in Flower's loop."""

    kind = rules.FedAdam


#: Every strategy by the name that `method.name` uses.
STRATEGIES: dict[str, type[Named]] = {
    made.kind.name: made
    for made in (
        FedAlignMoE,
        FedAvg,
        FedProx,
        FedMoE,
        Usage,
        NonExpert,
        FrozenGate,
        Scaffold,
        FedAdam,
    )
}
