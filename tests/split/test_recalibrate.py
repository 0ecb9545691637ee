"""BatchNorm's statistics behind the cut, estimated anew at the end of a round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.split.small import Pictures, local, normed, records, same, set_up, tail_of, train
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sluiceway.core.settings import SplitTraining
from sluiceway.split import ACPSL, Compressor
from sluiceway.split.rounds import SplitLoop

SETS = [Pictures(20, 1), Pictures(13, 2)]


def training(recalibrate: int, **changed: Any) -> SplitTraining:
    given = {"lr": 0.05, "batch_size": 8, "optimizer": "sgd", "momentum": 0.9}
    return SplitTraining(**given | changed, recalibrate=recalibrate)


def one_round(recalibrate: int, schedule: str = "parallel", method: Any = None) -> SplitLoop:
    loop = set_up(
        normed(),
        "conv1",
        SETS,
        method or Compressor(),
        training=training(recalibrate),
        schedule=schedule,
        tail_at=tail_of(schedule),
    )
    torch.manual_seed(5)
    loop.run_round(1, [0, 1])
    return loop


def norms_of(layers: nn.Module) -> list[_BatchNorm]:
    return [module for module in layers.modules() if isinstance(module, _BatchNorm)]


@pytest.mark.parametrize("schedule", ["parallel", "sequential"])
def test_statistics_are_those_of_the_last_batches_in_the_layers_as_they_are(schedule: str) -> None:
    loop = one_round(2, schedule)
    newest = loop.servers[-1].newest
    # 20 examples are batches of 8, 8, 4; 13 of 8, 5: the last two of each.
    assert [[len(one) for one in newest[client]] for client in (0, 1)] == [[8, 4], [8, 5]]
    # By their definition, layer after layer: the mean over steps of means and unbiased variances.
    steps = [torch.cat(pair) for pair in zip(newest[0], newest[1], strict=True)]
    for layer in loop.model.back:
        if isinstance(layer, _BatchNorm):
            means = [step.double().mean((0, 2, 3)) for step in steps]
            spreads = [step.double().var((0, 2, 3)) for step in steps]
            for mine, right in ((layer.running_mean, means), (layer.running_var, spreads)):
                assert mine is not None
                torch.testing.assert_close(mine.double(), sum(right) / 2, rtol=1e-4, atol=1e-5)
            layer.train()
        steps = [layer(step).detach() for step in steps]


@pytest.mark.parametrize("schedule", ["parallel", "sequential", "copies", "u"])
def test_nothing_else_changes(schedule: str) -> None:
    plain, again = one_round(0, schedule), one_round(2, schedule)
    one, other = (dict(loop.model.back.named_parameters()) for loop in (plain, again))
    assert same({n: p.detach() for n, p in one.items()}, {n: p.detach() for n, p in other.items()})
    for mine, theirs in zip(norms_of(again.model.back), norms_of(plain.model.back), strict=True):
        assert mine.momentum == theirs.momentum
        assert mine.num_batches_tracked == theirs.num_batches_tracked
        assert not torch.equal(*(n.running_var for n in (mine, theirs)))  # type: ignore[arg-type]
    for mine, theirs in zip(local(again), local(plain), strict=True):
        assert same(mine.state_dict(), theirs.state_dict())
    # Uncompressed it costs no byte.
    assert again.traffic == plain.traffic


def test_the_last_batches_cross_as_in_use() -> None:
    found = dict[int, list[int]]()
    for recalibrate in (0, 1):
        found[recalibrate] = lengths = []
        method = ACPSL(ratio=64, warmup=0, deployed_ratio=8)
        loop = set_up(normed(), "conv1", SETS, method, training=training(recalibrate))
        for client in local(loop):
            sending = client.send

            def send(*given: Any, sending: Any = sending, lengths: list[int] = lengths) -> Any:
                message = sending(*given)
                lengths.append(len(message))
                return message

            client.send = send  # type: ignore[method-assign]
        record = loop.run_round(1, [0, 1])
        assert not record.rejected
        link = loop.setup.config.link
        shape = (8, *loop.setup.config.shape)
        assert link.deployed.bytes_up(shape) > 2 * link.bytes_up(shape)
    longer = [after > 1.5 * before for before, after in zip(found[0], found[1], strict=True)]
    assert sum(longer) == 2
    assert longer[-1]


def test_statistics_of_frozen_layers_stay() -> None:
    model = normed()
    for norm in norms_of(model)[1:2]:
        norm.requires_grad_(False)
    frozen, trained = norms_of(model)[1:3]
    assert frozen.running_mean is not None
    assert trained.running_mean is not None
    before = frozen.running_mean.clone(), trained.running_mean.clone()
    result = train("sl", SETS, model=model, training=training(1), rounds=2)
    assert torch.equal(before[0], frozen.running_mean)
    assert not torch.equal(before[1], trained.running_mean)
    assert not records(result.records)[-1].rejected
