"""Frozen layers before the cut: nothing flows back to them, and they never change."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict
from typing import Any

import pytest
import torch
from tests.split.small import (
    CLASSES,
    SGD,
    Pictures,
    normed,
    numbers,
    plain,
    records,
    same,
    train,
    unsplit,
)

from sluiceway import SplitTraining
from sluiceway.core.checkpoints import Checkpoint
from sluiceway.core.parameters import exchanged
from sluiceway.split import ACPSL, SCHEDULES, Bottleneck, Conv4
from sluiceway.split.compress import Compressor
from sluiceway.split.packing import message_bytes
from sluiceway.strategies import STRATEGIES

FROZEN = SplitTraining(**asdict(SGD) | {"front": False})


@pytest.fixture
def downward(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the gradients that are sent for the cut."""
    lengths: list[int] = []
    down = Compressor.down

    def noted(self: Compressor, *given: Any) -> Any:
        message = down(self, *given)
        lengths.append(len(message))
        return message

    monkeypatch.setattr(Compressor, "down", noted)
    return lengths


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_client_trains_the_unsplit_network_with_those_layers_frozen(schedule: str) -> None:
    data, whole, model = Pictures(30, 1), normed(), normed()
    whole.conv1.requires_grad_(False)

    class Whole(torch.nn.Sequential):
        def train(self, mode: bool = True) -> Whole:
            super().train(mode)
            whole.conv1.eval()
            return self

    unsplit(Whole(OrderedDict(whole.named_children())), data, 3, SGD)
    train("sl", [data], model=model, schedule=schedule, training=FROZEN)
    assert same(exchanged(model), exchanged(whole))
    assert torch.equal(model.conv1.bn.running_mean, torch.zeros(8))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["sl", "acp-sl", "topk"])
def test_no_gradient_crosses_and_the_bytes_are_counted_so(
    name: str, schedule: str, downward: list[int]
) -> None:
    free = records(train(name, schedule=schedule, training=SGD).records)
    assert downward
    downward.clear()
    frozen = records(train(name, schedule=schedule, training=FROZEN).records)
    # In a U-shape the gradient of the tail still goes to the server, by this method too.
    assert bool(downward) == (schedule == "u")
    for one, other in zip(free, frozen, strict=True):
        assert other.bytes_up < one.bytes_up  # no layers at the end of a round
        # The basis of `acp-sl` is most of what is left.
        less = 1.5 if schedule == "u" else 3 if name == "acp-sl" else 10
        assert other.bytes_down < one.bytes_down / less


def test_bytes_of_a_round_by_hand() -> None:
    """Up: 24 examples in batches of 8. Down: nothing but the start of the round."""
    sets = [Pictures(24, 1)]
    training = SplitTraining(batch_size=8, front=False)
    (record,) = train("sl", sets, rounds=1, training=training, model=plain()).records
    batches = 3 * message_bytes((8, 8, 6, 6), 8, "none", label_bytes=1)
    assert 0 < record.bytes_up - batches < 200
    assert 0 < record.bytes_down < 200


def test_a_frozen_front_is_one_for_all_clients_and_stays_as_it_is() -> None:
    model = normed()
    before = {name: value.clone() for name, value in model.conv1.state_dict().items()}
    train("acp-sl", model=model, training=FROZEN)
    assert same(model.conv1.state_dict(), before)


def test_layers_that_a_method_adds_are_trained(downward: list[int]) -> None:
    model = normed()
    before = {name: value.clone() for name, value in model.conv1.state_dict().items()}
    result = train(Bottleneck(share=0.5), model=model, training=FROZEN)
    assert same(model.conv1.state_dict(), before)
    assert {"narrow.weight", "narrow.bias"} <= set(result.tensors)
    assert not any(name.startswith("conv1") for name in result.tensors)
    assert downward


@pytest.mark.parametrize("basis", ["eigen", "label", "gradient", "learned"])
def test_a_basis_needs_gradients_only_where_it_learns_from_them(
    basis: Any, downward: list[int]
) -> None:
    model = normed()
    before = {name: value.clone() for name, value in model.conv1.state_dict().items()}
    train(ACPSL(basis=basis), model=model, training=FROZEN)
    assert same(model.conv1.state_dict(), before)
    assert bool(downward) == (basis in ("gradient", "learned"))


def test_channels_rated_by_the_gradient_need_it(downward: list[int]) -> None:
    train("taylor", training=FROZEN)
    assert downward


@pytest.mark.parametrize("name", ["fedprox", "scaffold", "fedadam"])
def test_every_strategy_has_nothing_to_average(name: str) -> None:
    first = train("sl", training=FROZEN)
    other = train("sl", training=FROZEN, client_aggregation=STRATEGIES[name]())
    assert same(first.tensors, other.tensors)


@pytest.mark.parametrize("name", ["sl", "acp-sl", "bottleneck"])
@pytest.mark.parametrize("schedule", ["parallel", "u"])
def test_a_frozen_run_is_continued_exactly(name: str, schedule: str, tmp_path: Any) -> None:
    whole = train(name, schedule=schedule, training=FROZEN)
    train(name, schedule=schedule, training=FROZEN, rounds=2, checkpoint=Checkpoint(tmp_path))
    again = train(
        name, schedule=schedule, training=FROZEN, checkpoint=Checkpoint(tmp_path, resume=True)
    )
    assert numbers(again.records) == numbers(whole.records)
    assert same(again.tensors, whole.tensors)


def test_a_network_without_anything_to_train_is_refused() -> None:
    model = Conv4(1, CLASSES, width=8).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train("sl", model=model)
