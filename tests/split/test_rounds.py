"""Rounds: who takes part, what is averaged, and what state stays where."""

from __future__ import annotations

from typing import Any

import pytest
from tests.split.small import (
    ADAMW,
    SGD,
    Pictures,
    clients,
    flat_normed,
    normed,
    numbers,
    same,
    set_up,
    sides,
    tail_of,
)
from torch import Tensor

from sluiceway.core.settings import Optimisation
from sluiceway.split import (
    METHODS,
    SCHEDULES,
    Compressor,
    Quantized,
    split_train,
)
from sluiceway.strategies import FedAdam, FedAvg, FedProx, Scaffold, Strategy

forms = pytest.mark.parametrize("form", SCHEDULES)


@forms
@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_every_form_repeats_itself(name: str, form: str) -> None:
    def run() -> list[dict[str, Any]]:
        result = split_train(
            normed(),
            "conv1",
            clients(),
            Pictures(40, 9),
            name,
            form=form,
            tail_at=tail_of(form),
            rounds=3,
            participation=0.7,
            seed=3,
            training=ADAMW,
        )
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
    runs = [
        split_train(normed(), "conv1", clients(), Pictures(9, 1), method, rounds=2)
        for _ in range(2)
    ]
    assert numbers(runs[0].records) == numbers(runs[1].records)
    assert same(runs[0].tensors, runs[1].tensors)
    assert method.state_dict() == {}


@pytest.mark.parametrize("form", ["parallel", "copies", "u"])
@pytest.mark.parametrize("fronts", [FedAvg, FedProx, Scaffold, FedAdam])
def test_fronts_are_averaged_by_a_strategy(form: str, fronts: type[Strategy]) -> None:
    def run(strategy: Strategy) -> dict[str, Tensor]:
        return split_train(
            normed(),
            "conv1",
            clients(),
            Pictures(9, 1),
            "acp-sl",
            form=form,
            tail_at=tail_of(form),
            fronts=strategy,
            rounds=3,
            participation=0.7,
            training=SGD,
        ).tensors

    plainly, found = run(FedAvg()), run(fronts())
    assert same(plainly, found) == (fronts is FedAvg)
    assert all(value.isfinite().all() for value in found.values())


def test_fedprox_holds_fronts_back() -> None:
    start = normed().state_dict()["conv1.conv.weight"]
    moved = []
    for mu in (0.0, 1.0):
        result = split_train(
            normed(), "conv1", clients(), Pictures(9, 1), fronts=FedProx(mu=mu), rounds=1,
            training=SGD,
        )  # fmt: skip
        moved.append(float((result.tensors["conv1.conv.weight"] - start).norm()))
    assert moved[1] < moved[0]


@pytest.mark.parametrize("form", SCHEDULES)
@pytest.mark.parametrize("name", ["sl", "acp-sl", "random"])
def test_a_batch_of_one_that_batch_norm_cannot_train_on_is_left_out(name: str, form: str) -> None:
    # 9 and 17 leave one example over at batch size 8; client 2 has no more than one.
    sets = [Pictures(9, 1), Pictures(17, 2), Pictures(1, 3)]
    model = flat_normed()
    result = split_train(
        model, "lin1", sets, Pictures(20, 4), name, form=form, rounds=3, training=SGD,
        tail_at="lin2" if form == "u" else None,
    )  # fmt: skip
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert [len(record.clients) for record in result.records] == [3, 3, 3]


def test_only_a_step_that_would_fail_is_left_out() -> None:
    layers = flat_normed(front=False)
    sets = [Pictures(9, 1)]
    built = set_up(layers, "lin1", sets, Compressor(), training=Optimisation(batch_size=8, lr=0.01))
    built.run_round(1, [0])
    assert sides(built)[0].role.steps == 1  # the last example would be alone
    assert layers.get_buffer("bn2.num_batches_tracked") == 1
    layers = flat_normed(front=False)
    sets = [Pictures(9, 1), Pictures(17, 3)]
    built = set_up(layers, "lin1", sets, Compressor(), training=Optimisation(batch_size=8, lr=0.01))
    built.run_round(1, [0, 1])
    # 8; then 8 and 8; then 1 and 1, which are enough together.
    assert [client.role.steps for client in sides(built)] == [2, 3]
    assert layers.get_buffer("bn2.num_batches_tracked") == 3


def test_frozen_layers_stay_as_they_are() -> None:
    for frozen in ("conv1", "conv4"):
        model = normed()
        model.get_submodule(frozen).requires_grad_(False)
        before = {n: v.clone() for n, v in model.get_submodule(frozen).state_dict().items()}
        result = split_train(
            model, "conv1", clients(), Pictures(9, 1), "acp-sl", rounds=2, training=SGD
        )
        assert same(before, dict(model.get_submodule(frozen).state_dict()))
        assert not any(name.startswith(frozen) for name in result.tensors)


@pytest.mark.parametrize("form", ["parallel", "copies", "sequential"])
def test_optimisers_keep_their_state(form: str) -> None:
    built = set_up(
        normed(), "conv1", [Pictures(16, 1), Pictures(8, 2)], Compressor(), form=form,
        training=ADAMW,
    )  # fmt: skip
    for number, chosen in ((1, [0, 1]), (2, [0]), (3, [0, 1])):
        built.run_round(number, chosen)

    def steps(side: Any) -> int:
        return int(next(iter(side.optimiser.state.values()))["step"])

    assert [steps(client) for client in sides(built)] == [6, 2]
    found = [steps(server) for server in built.servers.values()]
    assert found == {"copies": [6, 2], "parallel": [6], "sequential": [8]}[form]


def test_copies_begin_every_round_alike() -> None:
    built = set_up(
        normed(), "conv1", [Pictures(16, 1), Pictures(8, 2)], Compressor(), form="copies"
    )
    built.run_round(1, [0])
    states = [
        {n: p.detach() for n, p in server.back.named_parameters()}
        for server in built.servers.values()
    ]
    assert same(states[0], states[1])
    assert same(states[0], {n: p.detach() for n, p in built.back.named_parameters()})


def test_a_front_that_is_not_finite_is_left_out() -> None:
    sets = [Pictures(16, 1), Pictures(8, 2)]
    images = sets[1].tensors[0]
    images[3] = float("nan")
    result = split_train(
        normed(), "conv1", sets, Pictures(9, 1), form="copies", rounds=1, training=SGD
    )
    assert result.records[0].refused == {1: "NaN or Inf in the smashed data (batch 0)"}
    assert all(v.isfinite().all() for n, v in result.tensors.items() if n.startswith("conv1"))
