"""FC-MoE against the definition in loops: every client's component taken out one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies.test_aggregation import LAYOUT, TENSORS, E, several, update
from tests.worlds import TinyClassifier, TinyText
from torch import Tensor

from sluiceway import federate
from sluiceway.core.aggregation import aggregate
from sluiceway.core.settings import Training
from sluiceway.federated.client import Worker, prepare
from sluiceway.strategies import FCMoE, FedAvg, Update


def ready(made: FedAvg) -> FedAvg:
    made.setup(TENSORS, LAYOUT, 5)
    return made


def flat(tensors: dict[str, Tensor], e: int) -> Tensor:
    """An expert as one vector in float64; what is not there is as it was."""
    return torch.cat(
        [tensors.get(p.key, p.of(TENSORS)).double().flatten() for p in LAYOUT.expert(0, e)]
    )


def by_loop(updates: list[Update], e: int) -> Tensor:
    """The new expert as the definition says it, D_i' formed for every client."""
    old = flat({}, e)
    changes = [flat(dict(u.tensors), e) - old for u in updates]
    shares = [
        float(u.routing[0].routing[e] * d.norm()) for u, d in zip(updates, changes, strict=True)
    ]
    if sum(shares) == 0:
        return old
    common = sum(c * d for c, d in zip(shares, changes, strict=True))
    left = [d - min(float(d @ common / (common @ common)), 0.0) * common for d in changes]
    return old + sum(c * d for c, d in zip(shares, left, strict=True)) / sum(shares)


def conflicting(seed: int) -> list[Update]:
    """Updates of which some go against the others in some experts."""
    found = several(seed)
    against = {
        p.key: 2 * p.of(TENSORS) - found[2].tensors[p.key]
        for e in (1, 3)
        for p in LAYOUT.expert(0, e)
    }
    return [*found, replace(found[0], client=4, tensors={**found[0].tensors, **against})]


@pytest.mark.parametrize("seed", range(3))
def test_experts_are_those_of_a_loop_and_the_rest_is_fedavgs(seed: int) -> None:
    updates = conflicting(seed)
    made, plain = ready(FCMoE()), ready(FedAvg())
    aggregate(made, updates)
    aggregate(plain, updates)
    for e in range(E):
        found = torch.cat([p.of(made.tensors).double().flatten() for p in LAYOUT.expert(0, e)])
        torch.testing.assert_close(found, by_loop(updates, e), atol=1e-6, rtol=1e-5)
    for name in set(TENSORS) - LAYOUT.expert_params:
        assert torch.equal(made.tensors[name], plain.tensors[name])
    assert any(
        float((flat(dict(u.tensors), 1) - flat({}, 1)) @ (by_loop(updates, 1) - flat({}, 1))) < 0
        for u in updates
    )


def test_one_client_alone_gets_its_own_model_back() -> None:
    made, alone = ready(FCMoE()), update(0)
    aggregate(made, [alone])
    for piece in LAYOUT.pieces(TENSORS):
        assert torch.equal(piece.of(made.tensors), alone.tensors[piece.key])


@given(order=st.permutations(range(5)))
@settings(max_examples=10)
def test_the_order_of_clients_changes_nothing(order: list[int]) -> None:
    updates = conflicting(0)
    one, other = ready(FCMoE()), ready(FCMoE())
    aggregate(one, updates)
    aggregate(other, [updates[i] for i in order])
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(other.tensors[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_client_adds_half_of_what_it_held_back_to_its_next_update() -> None:
    model, strategy = TinyClassifier(), FCMoE()
    prepare(model, strategy, 2)
    worker = Worker(model, [TinyText(24, 1)], TinyText(9, 2), strategy, Training(lr=0.02))
    state: dict[str, Tensor] = {}
    worker.train(0, strategy.broadcast(1), state, personal=False)
    first = {key: tensor.clone() for key, tensor in state.items()}
    # The others moved expert 0 against this client, and all others with it.
    for e in range(E):
        for p in strategy.layout.expert(0, e):
            own = first[f"sent/{p.key}"] - first[f"received/{p.key}"]
            p.of(strategy.tensors).add_((-0.5 if e == 0 else 0.5) * own)
    second = strategy.broadcast(2)
    kept = {key: tensor.clone() for key, tensor in state.items()}
    made = worker.train(0, second, kept, personal=False)
    sent = {key: tensor.clone() for key, tensor in made.tensors.items()}
    plain = worker.train(0, second, {}, personal=False)
    for key, tensor in plain.tensors.items():
        owner = strategy.layout.owner(key)
        wanted = tensor
        if owner is not None and owner[1] == 0:
            # D = own, d = -own / 2: <D, d> / |d|^2 d = own, which is held back; half comes back.
            wanted = tensor + 0.5 * (first[f"sent/{key}"] - first[f"received/{key}"])
        torch.testing.assert_close(sent[key], wanted, atol=1e-6, rtol=1e-5)


def test_rounds_with_some_clients_absent() -> None:
    clients = [TinyText(20, 1), TinyText(12, 2), TinyText(9, 3), TinyText(3, 4)]
    found = [
        federate(
            TinyClassifier(),
            clients,
            TinyText(30, 9),
            FCMoE(),
            rounds=4,
            participation=0.5,
            training=Training(lr=0.02),
            device="cpu",
            workers=workers,
            threads=1,
        )
        for workers in (1, 2)
    ]
    assert found[0].rejected == 0
    for key, tensor in found[0].tensors.items():
        assert torch.equal(found[1].tensors[key], tensor), key
