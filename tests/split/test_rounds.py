"""Rounds: who takes part, what is averaged, and what state stays where."""

from __future__ import annotations

from typing import Any

import pytest
from tests.split.small import (
    ADAMW,
    METHODS_AND_SCHEDULES,
    SGD,
    Pictures,
    flat_normed,
    local,
    normed,
    numbers,
    same,
    set_up,
    train,
)
from torch import Tensor

from sluiceway.core.settings import Optimisation
from sluiceway.split import (
    SCHEDULES,
    Compressor,
    Quantized,
)
from sluiceway.strategies import FedAdam, FedAvg, FedProx, Scaffold, Strategy

schedules = pytest.mark.parametrize("schedule", SCHEDULES)


@pytest.mark.parametrize(("name", "schedule"), METHODS_AND_SCHEDULES)
def test_every_method_in_every_schedule_repeats_itself(name: str, schedule: str) -> None:
    def run() -> list[dict[str, Any]]:
        result = train(name, schedule=schedule, participation=0.7, seed=3, training=ADAMW)
        assert result.empty == [2]
        assert all(value.isfinite().all() for value in result.tensors.values())
        return numbers(result.records)

    first = run()
    assert first == run()
    assert [len(record["clients"]) for record in first] == [2, 2, 2]
    assert all(record["accuracy_by_client"][2] is None for record in first)
    assert all(record["train_loss"] > 0 for record in first)


def test_error_feedback_of_one_run_is_not_in_the_next() -> None:
    method = Quantized(quantize="int4", error_feedback=True)
    runs = [train(method, rounds=2) for _ in range(2)]
    assert numbers(runs[0].records) == numbers(runs[1].records)
    assert same(runs[0].tensors, runs[1].tensors)
    assert method.state_dict() == {}


@pytest.mark.parametrize(
    ("schedule", "other"),
    [("parallel", FedAvg), ("copies", FedProx), ("u", Scaffold), ("copies", FedAdam)],
)
def test_fronts_are_averaged_by_a_strategy(schedule: str, other: type[Strategy]) -> None:
    def run(strategy: Strategy) -> dict[str, Tensor]:
        settings: dict[str, Any] = {"client_aggregation": strategy, "training": SGD}
        return train("acp-sl", schedule=schedule, participation=0.7, **settings).tensors

    plainly, found = run(FedAvg()), run(other())
    assert same(plainly, found) == (other is FedAvg)
    assert all(value.isfinite().all() for value in found.values())


def test_fedprox_holds_fronts_back() -> None:
    start = normed().state_dict()["conv1.conv.weight"]
    moved = []
    for mu in (0.0, 1.0):
        result = train(rounds=1, training=SGD, client_aggregation=FedProx(mu=mu))
        moved.append(float((result.tensors["conv1.conv.weight"] - start).norm()))
    assert moved[1] < moved[0]


@pytest.mark.parametrize(
    ("name", "schedule"), [*(("acp-sl", s) for s in SCHEDULES), ("sl", "u"), ("random", "copies")]
)
def test_a_batch_of_one_that_batch_norm_cannot_train_on_is_left_out(
    name: str, schedule: str
) -> None:
    # 9 and 17 leave one example over at batch size 8; client 2 has no more than one.
    sets = [Pictures(9, 1), Pictures(17, 2), Pictures(1, 3)]
    model = flat_normed()
    tail_at = "lin2" if schedule == "u" else None
    result = train(
        name, sets, model=model, schedule=schedule, training=SGD, cut_at="lin1", tail_at=tail_at
    )
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert [len(record.clients) for record in result.records] == [3, 3, 3]


def test_only_a_step_that_would_fail_is_left_out() -> None:
    layers = flat_normed(front=False)
    sets = [Pictures(9, 1)]
    built = set_up(layers, "lin1", sets, Compressor(), training=Optimisation(batch_size=8, lr=0.01))
    built.run_round(1, [0])
    assert local(built)[0].role.steps == 1  # the last example would be alone
    assert layers.get_buffer("bn2.num_batches_tracked") == 1
    layers = flat_normed(front=False)
    sets = [Pictures(9, 1), Pictures(17, 3)]
    built = set_up(layers, "lin1", sets, Compressor(), training=Optimisation(batch_size=8, lr=0.01))
    built.run_round(1, [0, 1])
    # 8; then 8 and 8; then 1 and 1, which are enough together.
    assert [client.role.steps for client in local(built)] == [2, 3]
    assert layers.get_buffer("bn2.num_batches_tracked") == 3


def test_frozen_layers_stay_as_they_are() -> None:
    for frozen in ("conv1", "conv4"):
        model = normed()
        model.get_submodule(frozen).requires_grad_(False)
        before = {n: v.clone() for n, v in model.get_submodule(frozen).state_dict().items()}
        result = train("acp-sl", model=model, rounds=2, training=SGD)
        assert same(before, dict(model.get_submodule(frozen).state_dict()))
        assert not any(name.startswith(frozen) for name in result.tensors)


@pytest.mark.parametrize("schedule", ["parallel", "copies", "sequential"])
def test_optimisers_keep_their_state(schedule: str) -> None:
    built = set_up(
        normed(), "conv1", [Pictures(16, 1), Pictures(8, 2)], Compressor(), schedule=schedule,
        training=ADAMW,
    )  # fmt: skip
    for number, chosen in ((1, [0, 1]), (2, [0]), (3, [0, 1])):
        built.run_round(number, chosen)

    def steps(side: Any) -> int:
        return int(next(iter(side.trained.optimiser.state.values()))["step"])

    assert [steps(client) for client in local(built)] == [6, 2]
    found = [steps(server) for server in built.servers.values()]
    assert found == {"copies": [6, 2], "parallel": [6], "sequential": [8]}[schedule]


def test_copies_begin_every_round_alike() -> None:
    built = set_up(
        normed(), "conv1", [Pictures(16, 1), Pictures(8, 2)], Compressor(), schedule="copies"
    )
    built.run_round(1, [0])
    states = [
        {n: p.detach() for n, p in server.back.named_parameters()}
        for server in built.servers.values()
    ]
    assert same(states[0], states[1])
    assert same(states[0], {n: p.detach() for n, p in built.model.back.named_parameters()})


def test_a_front_that_is_not_finite_is_left_out() -> None:
    sets = [Pictures(16, 1), Pictures(8, 2)]
    images = sets[1].tensors[0]
    images[3] = float("nan")
    result = train(sets=sets, schedule="copies", rounds=1, training=SGD)
    assert result.records[0].rejected == {1: "NaN or Inf in the smashed data (batch 0)"}
    assert all(v.isfinite().all() for n, v in result.tensors.items() if n.startswith("conv1"))
