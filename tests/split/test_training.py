"""Split training by one call: equal to unsplit training, and told clearly what is wrong."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.split.small import (
    ADAMW,
    SGD,
    Mask,
    Pictures,
    accuracy_of,
    clients,
    flat_normed,
    normed,
    plain,
    records,
    same,
    set_up,
    train,
    unsplit,
)
from torch import nn
from torch.nn import functional

from sluiceway.core.settings import Optimisation
from sluiceway.split import (
    METHODS,
    SCHEDULES,
    Bottleneck,
    RandomChannels,
    cut,
    split_train,
)
from sluiceway.strategies import Scaffold

ROOT = Path(__file__).parents[2]
schedules = pytest.mark.parametrize("schedule", SCHEDULES)


# -- equal to unsplit training -----------------------------------------------------------------


@schedules
@pytest.mark.parametrize(("training", "network"), [(SGD, normed), (ADAMW, plain)])
def test_one_client_trains_the_unsplit_network(
    schedule: str, training: Optimisation, network: Callable[[], nn.Sequential]
) -> None:
    data, test = Pictures(37, 5), Pictures(40, 6)
    model = network()
    result = train(sets=[data], model=model, test=test, schedule=schedule, training=training)
    wanted = unsplit(network(), data, 3, training)
    assert same(model.state_dict(), wanted.state_dict())
    right = (wanted(test.tensors[0]).argmax(1) == test.labels).float().mean()
    last = records(result.records)[-1]
    assert last.accuracy == last.accuracy_full == pytest.approx(float(right))
    assert all(torch.equal(t, wanted.state_dict()[n]) for n, t in result.tensors.items())


@pytest.mark.parametrize("schedule", ["parallel", "u"])
def test_a_parallel_step_is_one_on_the_batches_together(schedule: str) -> None:
    sets = [Pictures(3, 1), Pictures(12, 2), Pictures(7, 3)]
    step = Optimisation(lr=0.1, batch_size=16, optimizer="sgd")
    model, wanted = plain(dropout=0), plain(dropout=0)
    train(sets=sets, model=model, schedule=schedule, rounds=1, training=step)
    optimiser = step.optimiser(list(wanted.parameters()))
    images, labels = (torch.cat(parts) for parts in zip(*(s.tensors for s in sets), strict=True))
    functional.cross_entropy(wanted(images), labels).backward()
    optimiser.step()
    for (name, got), want in zip(model.named_parameters(), wanted.parameters(), strict=True):
        # Of the front it is the average of three: each gradient is that of its own mean loss.
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6), name


def test_batch_norm_of_the_server_sees_all_batches_of_a_step_together() -> None:
    sets = [Pictures(3, 1), Pictures(12, 2), Pictures(7, 3)]
    model = normed()
    step = Optimisation(lr=0.1, batch_size=16, optimizer="sgd")
    train(sets=sets, model=model, rounds=1, training=step)
    front, back = cut(normed(), "conv1")
    smashed = torch.cat([front.train()(s.tensors[0]) for s in sets])
    back.train()(smashed)
    for name, buffer in back.named_buffers():
        assert torch.allclose(model.get_buffer(name), buffer, rtol=1e-4, atol=1e-6), name


def test_copies_of_clients_alone_are_averaged() -> None:
    sets = [Pictures(30, 1), Pictures(10, 2)]
    model = normed()
    train(sets=sets, model=model, schedule="copies", rounds=1, training=SGD)
    alone = []
    for number, data in enumerate(sets):
        only = normed()
        empty = [Pictures(0, 9)] * number
        train(sets=[*empty, data], model=only, rounds=1, training=SGD)
        alone.append(only.state_dict())
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            mean = 0.75 * alone[0][name] + 0.25 * alone[1][name]
            assert torch.allclose(value, mean, rtol=1e-4, atol=1e-6), name


def test_sequential_clients_hand_on_front_and_back() -> None:
    sets = [Pictures(30, 1), Pictures(10, 2)]
    step = Optimisation(lr=0.05, batch_size=8, optimizer="sgd")
    model = normed()
    train(sets=sets, model=model, schedule="sequential", rounds=1, training=step)
    second = normed()
    train(sets=sets[:1], model=second, rounds=1, training=step)
    train(sets=[Pictures(0, 1), sets[1]], model=second, rounds=1, training=step)
    assert same(
        {n: p.detach() for n, p in model.named_parameters()},
        {n: p.detach() for n, p in second.named_parameters()},
    )


@pytest.mark.parametrize(
    ("method", "schedule"), [*(("acp-sl", s) for s in SCHEDULES), ("random", "u"), ("taylor", "u")]
)
def test_a_pruned_run_trains_the_network_with_the_mask_in_it(method: str, schedule: str) -> None:
    # BatchNorm behind the cut sees the masked tensor, and gradients are those behind the mask.
    data, model = Pictures(37, 5), normed()
    chosen = METHODS[method](share=0.3, ramp_rounds=1)  # type: ignore[call-arg]
    result = train(chosen, [data], model=model, schedule=schedule, rounds=4, training=SGD)
    masks = [torch.tensor(record.mask) for record in records(result.records)]
    assert [int(mask.sum()) for mask in masks] == [8, 5, 2, 2]
    front, back = cut(normed(), "conv1")
    layer = Mask()
    wanted = nn.Sequential(front, layer, back)
    kept = iter(masks)
    unsplit(wanted, data, 4, SGD, before=lambda n: setattr(layer, "kept", next(kept).float()))
    trained = {n.split(".", 1)[1]: v for n, v in wanted.state_dict().items()}
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_another_seed_gives_other_numbers() -> None:
    assert not same(train(rounds=1, seed=1).tensors, train(rounds=1, seed=2).tensors)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    model, method = plain(), Bottleneck()
    before = torch.get_rng_state()
    train(method, model=model, rounds=2)
    assert torch.equal(before, torch.get_rng_state())


@schedules
def test_the_model_holds_the_global_network(schedule: str) -> None:
    model, test = normed(), Pictures(100, 9)
    result = train(model=model, test=test, schedule=schedule, rounds=2, training=SGD)
    assert result.accuracy == accuracy_of(model, test)
    names = {n for n, t in model.state_dict().items() if t.is_floating_point()}
    assert result.tensors.keys() == names
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in result.tensors.items())


def test_layers_of_the_bottleneck_are_in_the_result() -> None:
    method = Bottleneck(share=0.25)
    result = train(method, rounds=1)
    assert result.tensors["narrow.weight"].shape == (2, 8, 1, 1)
    last = records(result.records)[-1]
    assert (last.kept, last.channels) == (2, 8)


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"form": "ring"}, "schedule 'ring' is not known; allowed: sequential, parallel, copies"),
        ({"schedule": "u"}, "needs a second cut"),
        ({"tail_at": "conv4"}, "needs a second cut"),
        ({"method": "zip"}, "method 'zip' is not known; allowed: sl, acp-sl, random"),
        ({"cut_at": "conv9"}, "it can be cut at: conv1, conv2, conv3, conv4"),
        ({"clients": [Pictures(0, 1)]}, "no client holds any example"),
        ({"clients": []}, "no client holds any example"),
        ({"schedule": "sequential", "client_aggregation": Scaffold()}, "averages none"),
        ({"rounds": 0}, "rounds"),
        ({"participation": 0.0}, "participation"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], why: str) -> None:
    given = {"model": normed(), "cut_at": "conv1", "clients": clients(), "test": Pictures(9, 1)}
    with pytest.raises(ValueError, match=why):
        split_train(**given | changed)  # type: ignore[arg-type]


def test_batches_of_one_for_batch_norm_are_refused() -> None:
    ones = Optimisation(batch_size=1)
    with pytest.raises(ValueError, match="batch_size = 1: BatchNorm"):
        train(model=flat_normed(), cut_at="lin1", training=ones)
    train(model=plain(), rounds=1, training=ones)


def test_a_network_of_another_precision_is_refused() -> None:
    sets = [Pictures(9, 1)]
    sets[0].tensors = (sets[0].tensors[0].double(), sets[0].labels)
    with pytest.raises(ValueError, match=r"expected torch.float32"):
        train(sets=sets, model=normed().double())


@pytest.mark.parametrize(
    ("given", "inside"), [({}, 1), ({"threads": 3}, 3), ({"threads": None}, 2)]
)
def test_torch_has_the_threads_asked_for_and_then_those_of_before(
    given: dict[str, Any], inside: int
) -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(rounds=1, on_round=lambda record: seen.append(torch.get_num_threads()), **given)
        assert (seen, torch.get_num_threads()) == ([inside], 2)
        with pytest.raises(ValueError, match="cut"):
            train(cut_at="nowhere", **given)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_random_channels_need_no_rating() -> None:
    built = set_up(normed(), "conv1", clients(), RandomChannels(share=0.25, ramp_rounds=0))
    before = built.masks.merged_scores()
    assert before is not None
    for number in (1, 2, 3):
        record = built.run_round(number, [0, 1, 3])
    assert torch.equal(before, built.masks.merged_scores())  # type: ignore[arg-type]
    assert record.mask == (before >= before.topk(2).values[-1]).tolist()


@pytest.mark.slow
def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "own_split.py"))
    shown = capsys.readouterr().out
    assert re.search(r"^sl: 0\.\d+, .*MB\nacp-sl: 0\.\d+", shown, re.MULTILINE)
