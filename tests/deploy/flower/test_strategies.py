"""Our strategies in Flower's loop: the numbers of the local engine, and bad updates left out."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="the extra [flower] is not installed")

from flwr.app import Message
from tests.deploy.flower.grid import Node, TestGrid
from tests.worlds import TinyClassifier, TinyText

import sluiceway.deploy.flower as flower
import sluiceway.engines.flower
from sluiceway import strategies as rules
from sluiceway.core.guards import TooFewUpdates
from sluiceway.core.messages import read_update, write_update
from sluiceway.core.settings import Training
from sluiceway.deploy.flower import (
    STRATEGIES,
    Adapter,
    ClientSetup,
    client_app,
    load_arrays,
    unpacked,
)
from sluiceway.deploy.flower.records import chunk_of, content_of, packed
from sluiceway.transport.local import federate

TRAINING = Training(lr=0.02, batch_size=8)
SIZES = (24, 9, 16)
TEST = TinyText(60, 99)


def examples(number: int) -> TinyText:
    """Client 2 has one class only, so that experts of its model see no token."""
    found = TinyText(SIZES[number], number)
    if number == 2:
        found.ids[:, 1:] *= 0
        found.mask[:, 1:] *= 0
        found.labels[:] = 1
        found.ids[:, 0] = 2
    return found


def model(dtype: torch.dtype = torch.float32) -> TinyClassifier:
    return TinyClassifier().to(dtype)


def world(tmp_path: Path, dtype: torch.dtype = torch.float32, **more: Any) -> TestGrid:
    app = client_app(
        lambda context: ClientSetup(model(dtype), examples(int(context.node_config["part"])), TEST),
        device="cpu",
        folder=lambda context: tmp_path / f"node-{context.node_id}",
        **more,
    )
    return TestGrid({40 - i: Node(f"site-{i}", app, {"part": i}) for i in range(3)})


def local(rule: rules.Strategy, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    return federate(
        model(dtype),
        [examples(i) for i in range(3)],
        TEST,
        rule,
        rounds=3,
        training=TRAINING,
        device="cpu",
        **more,
    )


def same(arrays: Any, tensors: dict[str, torch.Tensor]) -> bool:
    found = unpacked(arrays)
    return found.keys() == tensors.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in tensors.items()
    )


def test_every_strategy_has_its_name() -> None:
    assert {name: made.kind for name, made in STRATEGIES.items()} == rules.STRATEGIES
    assert sluiceway.engines.flower.FedAlignMoE is flower.FedAlignMoE is STRATEGIES["fedalign-moe"]
    assert sluiceway.engines.flower.client_app is client_app
    with pytest.raises(AttributeError, match="no attribute 'FedNone'"):
        flower.FedNone  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(rules.STRATEGIES))
def test_the_local_numbers(tmp_path: Path, name: str) -> None:
    made = getattr(flower, rules.STRATEGIES[name].__name__)
    result = made(model(), clients=3, training=TRAINING).start(world(tmp_path), num_rounds=3)
    assert same(result.arrays, local(rules.STRATEGIES[name]()).tensors)


def test_the_local_numbers_in_bfloat16_with_a_share_of_the_clients(tmp_path: Path) -> None:
    share: dict[str, Any] = {"participation": 0.5, "seed": 4}
    found = STRATEGIES["fedalign-moe"](
        model(torch.bfloat16), clients=3, training=TRAINING, lambda_=0.3, **share
    )
    result = found.start(world(tmp_path, torch.bfloat16), num_rounds=3)
    here = local(rules.FedAlignMoE(lambda_=0.3), torch.bfloat16, **share)
    assert torch.bfloat16 in {t.dtype for t in here.tensors.values()}
    assert same(result.arrays, here.tensors)


def test_the_local_numbers_of_a_robust_rule(tmp_path: Path) -> None:
    found = Adapter(
        rules.FedAvg().with_rules(rules.Median()), model(), clients=3, training=TRAINING
    )
    result = found.start(world(tmp_path), num_rounds=3)
    assert same(result.arrays, local(rules.FedAvg().with_rules(rules.Median())).tensors)


def test_clients_judge_and_the_loop_evaluates(tmp_path: Path) -> None:
    strategy = STRATEGIES["fedavg"](model(), clients=3, training=TRAINING, evaluate=1.0)
    seen = []

    def evaluate(number: int, arrays: Any) -> None:
        fresh = model()
        load_arrays(fresh, arrays)
        inputs = {"input_ids": TEST.ids, "attention_mask": TEST.mask}
        guessed = fresh.eval()(**inputs).argmax(-1)
        seen.append(float((guessed == TEST.labels).float().mean()))

    result = strategy.start(world(tmp_path), num_rounds=2, evaluate_fn=evaluate)
    here = local(rules.FedAvg())
    assert seen[1:] == pytest.approx(here.accuracy_by_round[:2])
    told = result.evaluate_metrics_clientapp
    assert [told[i]["accuracy"] for i in (1, 2)] == pytest.approx(seen[1:])
    assert result.train_metrics_clientapp[1]["train_loss"] == here.records[0].train_loss


def spoiled(grid: TestGrid, number: int, change: Any) -> None:
    """What a node answers is changed on its way, if it is an update."""
    node = grid.nodes[number]
    plain = node.app

    def app(message: Message, context: Any) -> Message:
        reply = plain(message, context)
        chunk = chunk_of(reply)
        if chunk.data:
            return Message(content_of(replace(chunk, data=change(chunk.data))), reply_to=message)
        return reply

    node.app = app  # type: ignore[assignment]


def test_nan_is_rejected_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid = world(tmp_path)

    def poison(data: bytes) -> bytes:
        path = tmp_path / "poison"
        path.write_bytes(data)
        update = read_update(path)
        tensors = {name: t * float("nan") for name, t in update.tensors.items()}
        write_update(path, type(update)(**{**update.__dict__, "tensors": tensors}))
        return path.read_bytes()

    spoiled(grid, 39, poison)
    logging.getLogger("flwr").propagate = True
    with caplog.at_level("WARNING", "flwr"):
        result = STRATEGIES["fedavg"](model(), clients=3, training=TRAINING).start(
            grid, num_rounds=1
        )
    assert "client 1 (site-1) rejected: NaN or Inf" in caplog.text
    assert dict(result.train_metrics_clientapp[1])["rejected"] == 1
    assert all(t.isfinite().all() for t in unpacked(result.arrays).values())


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda data: b"\xff" * 8 + data[8:], "header"),
        (lambda data: data[:8] + b"{" * (len(data) - 8), "failed: "),
        (lambda data: data[:-5], "an update of"),
        (lambda data: b"", "an update of"),
    ],
)
def test_what_is_no_update_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Any, why: str
) -> None:
    grid = world(tmp_path)
    spoiled(grid, 39, spoil)
    logging.getLogger("flwr").propagate = True
    with caplog.at_level("WARNING", "flwr"):
        result = STRATEGIES["fedavg"](model(), clients=3, training=TRAINING).start(
            grid, num_rounds=1
        )
    assert why in caplog.text
    assert dict(result.train_metrics_clientapp[1])["failed"] == 1


def test_a_client_of_other_shapes_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid = world(tmp_path)
    grid.nodes[40].app = client_app(
        lambda context: ClientSetup(TinyClassifier(classes=4), examples(0)),
        device="cpu",
        folder=lambda context: tmp_path / "other",
    )
    logging.getLogger("flwr").propagate = True
    with caplog.at_level("WARNING", "flwr"):
        STRATEGIES["fedavg"](model(), clients=3, training=TRAINING).start(grid, num_rounds=1)
    assert "client 0 (site-0) failed: WireError: received head." in caplog.text
    assert "expected float32 [4" in caplog.text


def test_a_client_whose_labels_do_not_fit_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = world(tmp_path)
    wrong = examples(0)
    wrong.labels[3] = 7
    grid.nodes[40].app = client_app(
        lambda context: ClientSetup(model(), wrong),
        device="cpu",
        folder=lambda context: tmp_path / "other",
    )
    logging.getLogger("flwr").propagate = True
    with caplog.at_level("WARNING", "flwr"):
        STRATEGIES["fedavg"](model(), clients=3, training=TRAINING).start(grid, num_rounds=1)
    why = "client 0 has the label 7, and the model gives 3 logits: labels must be in 0..2"
    assert f"client 0 (site-0) failed: InputError: {why}" in caplog.text


def test_lost_clients_are_done_without_until_too_few_are_left(tmp_path: Path) -> None:
    grid = world(tmp_path)
    strategy = STRATEGIES["fedavg"](model(), clients=3, training=TRAINING, min_clients=2)
    strategy.start(grid, num_rounds=1)
    grid.nodes[39].online = False
    result = strategy.start(grid, num_rounds=1)
    assert dict(result.train_metrics_clientapp[1])["failed"] == 1
    grid.nodes[40].deaf = True
    with pytest.raises(TooFewUpdates, match=r"1 of 3 updates could be used.*no answer"):
        strategy.start(grid, num_rounds=1)


def test_values_from_elsewhere_are_gone_on_from(tmp_path: Path) -> None:
    first = Adapter(
        rules.FedAvg().with_rules(rules.Median()), model(), clients=3, training=TRAINING
    )
    held = first.start(world(tmp_path / "a"), num_rounds=1).arrays
    fresh = Adapter(rules.FedAvg(), model(), clients=3, training=TRAINING)
    fresh.follow(held)
    assert same(fresh.arrays(), unpacked(held))
    robust = Adapter(
        rules.FedAvg().with_rules(rules.Median()), model(), clients=3, training=TRAINING
    )
    robust.follow(held)
    assert same(packed(robust.rule.broadcast(1)), unpacked(held))


def test_the_clients_own_training_wins(tmp_path: Path) -> None:
    found = STRATEGIES["fedavg"](model(), clients=3, training=Training(lr=5.0))
    result = found.start(world(tmp_path, training=TRAINING), num_rounds=3)
    assert same(result.arrays, local(rules.FedAvg()).tensors)
