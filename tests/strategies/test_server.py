"""Server optimisers: loops in float64, any strategy, half precision, resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.strategies.test_aggregation import LAYOUT, TENSORS, several, update
from tests.worlds import TinyClassifier, TinyText
from torch import Tensor

from sluiceway import federate
from sluiceway.core.aggregation import aggregate
from sluiceway.core.checkpoints import Checkpoint
from sluiceway.core.guards import Diverged
from sluiceway.core.settings import Training
from sluiceway.strategies import (
    SERVER,
    STRATEGIES,
    Adam,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    Momentum,
    ServerOptimizer,
    Strategy,
    Yogi,
)


def ready(strategy: Strategy, dtype: torch.dtype = torch.float32) -> Strategy:
    strategy.setup({n: t.to(dtype) for n, t in TENSORS.items()}, LAYOUT, 5)
    return strategy


def by_loop(server: ServerOptimizer, changes: list[float]) -> float:
    """Where a number ends that begins with 0 and changes by these, written down anew."""
    m, x = 0.0, 0.0
    v = server.tau**2 if isinstance(server, Yogi) else 0.0
    for d in changes:
        if isinstance(server, Momentum):
            m = server.beta * m + d
            x += server.lr * m
        else:
            assert isinstance(server, Adam)
            m = server.beta1 * m + (1 - server.beta1) * d
            if isinstance(server, Yogi):
                sign = (v > d * d) - (v < d * d)
                v = v - (1 - server.beta2) * d * d * sign
            else:
                v = server.beta2 * v + (1 - server.beta2) * d * d
            x += server.lr * m / (v**0.5 + server.tau)
    return x


class Moves(FedAvg):
    """Everything moves by the next of some numbers."""

    changes: list[float]

    def step(self, mean: dict[str, Tensor]) -> dict[str, Tensor]:
        change = self.changes.pop(0)
        return {name: self.tensors[name] + change for name in mean}


@pytest.mark.parametrize(
    "server",
    [
        Momentum(beta=0.7, lr=0.5),
        Adam(lr=0.1, beta1=0.5, beta2=0.75, tau=0.01),
        Yogi(lr=0.1, beta1=0.5, beta2=0.75, tau=0.01),
        Yogi(),
    ],
)
def test_a_number_moves_as_in_a_loop(server: ServerOptimizer) -> None:
    made = Moves().with_server(server)
    changes = [0.5, -0.25, 1e-3, 0.125, -2.0, 0.03]
    made.changes = list(changes)
    made.setup({"w": torch.zeros(3, dtype=torch.float64)}, LAYOUT.__class__(()), 2)
    for _ in changes:
        aggregate(made, [update(0)])
    wanted = torch.full((3,), by_loop(server, changes), dtype=torch.float64)
    torch.testing.assert_close(made.tensors["w"], wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", sorted({*STRATEGIES} - {"fedadam", "fedyogi", "fedavgm"}))
def test_momentum_without_decay_is_the_strategy(name: str) -> None:
    plain, made = (
        ready(STRATEGIES[name]()),
        ready(STRATEGIES[name]().with_server(Momentum(beta=0))),
    )
    for seed in (0, 1):
        aggregate(plain, several(seed))
        aggregate(made, several(seed))
        for key, tensor in plain.tensors.items():
            torch.testing.assert_close(made.tensors[key], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("server", sorted(SERVER))
def test_an_expert_that_nobody_used_stays_with_its_states(server: str) -> None:
    made = ready(FedAvg().with_server(SERVER[server]()))
    aggregate(made, [update(0), update(1)])
    before, states = made.tensors, {k: t.clone() for k, t in made.state_dict().items()}
    aggregate(made, [update(0, absent=[3], seed=1), update(1, absent=[3], seed=1)])
    after = made.state_dict()
    slots = {key.split("/")[0] for key in after}
    for e in range(4):
        for piece in LAYOUT.expert(0, e):
            assert torch.equal(piece.of(before), piece.of(made.tensors)) == (e == 3)
            for slot in slots - {"tensors"}:
                one, other = (
                    piece.of({piece.param: held[f"{slot}/{piece.param}"]})
                    for held in (states, after)
                )
                assert torch.equal(one, other) == (e == 3)


@pytest.mark.parametrize("name", ["non-expert", "frozen-gate", "scaffold"])
def test_what_a_strategy_does_not_change_stays(name: str) -> None:
    plain, made = ready(STRATEGIES[name]()), ready(STRATEGIES[name]().with_server(Momentum()))
    for seed in (0, 1):
        aggregate(plain, several(seed))
        aggregate(made, several(seed))
    for key, tensor in plain.tensors.items():
        if torch.equal(tensor, TENSORS[key]):
            assert torch.equal(made.tensors[key], tensor)


def test_the_named_methods_are_fedavg_with_their_optimiser() -> None:
    for named, server in (
        (FedAvgM(beta=0.7, lr=0.5), Momentum(beta=0.7, lr=0.5)),
        (FedAdam(lr=0.02), Adam(lr=0.02)),
        (FedYogi(beta1=0.5), Yogi(beta1=0.5)),
    ):
        made, other = ready(named), ready(FedAvg().with_server(server))
        for seed in (0, 1):
            aggregate(made, several(seed))
            aggregate(other, several(seed))
        for key, tensor in made.state_dict().items():
            assert torch.equal(other.state_dict()[key], tensor), key
        with pytest.raises(ValueError, match=f"{named.name} has a server optimiser of its own"):
            named.with_server(Momentum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("server", sorted(SERVER))
def test_states_of_half_precision_are_float32(server: str, dtype: torch.dtype) -> None:
    made = ready(FedAvg().with_server(SERVER[server]()), dtype)
    sent = update(0)
    half = {key: value.to(dtype) for key, value in sent.tensors.items()}
    aggregate(made, [type(sent)(0, 1, 10, half, sent.routing)])
    for key, tensor in made.state_dict().items():
        assert tensor.dtype == (dtype if key.startswith("tensors/") else torch.float32)
        assert bool(tensor.isfinite().all())


def test_a_step_that_overflows_ends_the_run_in_one_line() -> None:
    made = ready(FedAvg().with_server(Momentum(lr=1e38)))
    before = made.tensors
    with pytest.raises(Diverged, match=r"^round 1: .* is not finite after the server optimiser"):
        aggregate(made, [update(client, 10) for client in range(2)] + [huge()])
    assert all(bool(tensor.isfinite().all()) for tensor in before.values())


def huge() -> object:
    sent = update(2)
    return type(sent)(2, 1, 10, {k: 1e6 * v for k, v in sent.tensors.items()}, sent.routing)


@pytest.mark.parametrize("server", ["momentum", "yogi"])
def test_a_resumed_run_is_the_whole_run(server: str, tmp_path: Path) -> None:
    def run(rounds: int, folder: Path, resume: bool = False) -> object:
        return federate(
            TinyClassifier(),
            [TinyText(12, 1), TinyText(9, 2), TinyText(5, 3)],
            TinyText(20, 9),
            STRATEGIES["fedalign-moe"]().with_server(SERVER[server]()),
            rounds=rounds,
            training=Training(lr=0.02),
            device="cpu",
            checkpoint=Checkpoint(folder, resume=resume),
        )

    whole = run(4, tmp_path / "whole")
    run(2, tmp_path / "parts")
    parts = run(4, tmp_path / "parts", resume=True)
    for key, tensor in whole.tensors.items():
        assert torch.equal(parts.tensors[key], tensor), key
