"""Split runs that end early are continued to the very numbers of one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.split.small import ADAMW, SGD, Pictures, local, normed, plain, same, set_up, train
from torch import nn

from sluiceway.core.checkpoints import Checkpoint, CheckpointError
from sluiceway.core.guards import RunFailed
from sluiceway.core.round_loop import Record, Result
from sluiceway.core.settings import SplitTraining, Training
from sluiceway.split.methods import ACPSL, METHODS
from sluiceway.split.schedules import SCHEDULES
from sluiceway.strategies import Scaffold


class Ended(Exception):
    pass


def history(
    checkpoint: Checkpoint | None,
    stop: int | None = None,
    rounds: int = 4,
    model: nn.Module | None = None,
    **changed: Any,
) -> Result:
    def maybe_stop(record: Record) -> None:
        if record.round == stop:
            raise Ended

    settings: dict[str, Any] = {"method": "acp-sl", "training": SGD, "participation": 0.7}
    settings |= {"rounds": rounds, "checkpoint": checkpoint, "on_round": maybe_stop} | changed
    return train(test=Pictures(40, 99), model=model, **settings)


def require_equal(one: Result, other: Result) -> None:
    lines = [[r.as_dict() | {"seconds": 0} for r in result.records] for result in (one, other)]
    assert json.dumps(lines[0]) == json.dumps(lines[1])
    for key, tensor in one.tensors.items():
        assert torch.equal(other.tensors[key], tensor), key


def require_resumed(folder: Path, every: int = 1, **changed: Any) -> None:
    with pytest.raises(Ended):
        history(Checkpoint(folder, every=every), stop=3, **changed)
    again = history(Checkpoint(folder, resume=True, every=every), **changed)
    require_equal(history(None, **changed), again)


@pytest.mark.parametrize(
    ("schedule", "training"), [*((s, SGD) for s in SCHEDULES), ("copies", ADAMW), ("u", ADAMW)]
)
def test_every_schedule_and_optimiser(schedule: str, training: Training, tmp_path: Path) -> None:
    require_resumed(tmp_path, schedule=schedule, training=training)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method(name: str, tmp_path: Path) -> None:
    require_resumed(tmp_path, method=name)


@pytest.mark.parametrize("every", [2, 3])
def test_every_k_rounds(every: int, tmp_path: Path) -> None:
    require_resumed(tmp_path, every=every, training=ADAMW)


def test_error_feedback_masks_of_clients_and_a_strategy_with_state(tmp_path: Path) -> None:
    method = ACPSL(quantize="int4", error_feedback=True, masks="client", score="similarity")
    require_resumed(tmp_path, method=method, client_aggregation=Scaffold(), training=ADAMW)


def test_delta_coding_and_recalibration(tmp_path: Path) -> None:
    training = SplitTraining(lr=0.05, batch_size=8, optimizer="sgd", recalibrate=1)
    require_resumed(tmp_path, method=ACPSL(delta=True, ratio=64), training=training)


def test_dropout_and_layers_that_work_in_place(tmp_path: Path) -> None:
    with pytest.raises(Ended):
        history(Checkpoint(tmp_path), stop=2, model=plain(), method="sl")
    again = history(Checkpoint(tmp_path, resume=True), model=plain(), method="sl")
    require_equal(history(None, model=plain(), method="sl"), again)


def test_a_network_in_channels_last_stays_so_and_is_continued(tmp_path: Path) -> None:
    def model() -> nn.Module:
        built = normed()
        built.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return built

    # Components are coded, and as long only to a few bytes.
    settings: dict[str, Any] = {"training": ADAMW, "method": ACPSL(preset="paper")}
    with pytest.raises(Ended):
        history(Checkpoint(tmp_path), stop=2, model=model(), **settings)
    again = history(Checkpoint(tmp_path, resume=True), model=model(), **settings)
    trained = model()
    result = history(None, model=trained, **settings)
    require_equal(result, again)
    convolutions = [p for p in trained.parameters() if p.dim() == 4]
    assert len(convolutions) == 4
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    plainly = history(None, **settings)
    for one, other in zip(result.records, plainly.records, strict=True):
        assert (one.bytes_up, one.bytes_down) == (other.bytes_up, other.bytes_down)
        assert one.train_loss == pytest.approx(other.train_loss, rel=0.05)


def test_a_scorers_state_under_its_first_name_is_read() -> None:
    (client,) = local(set_up(normed(), "conv1", [Pictures(30, 1)], ACPSL(preset="paper")))
    assert client.scorer is not None
    client.scorer.watch(torch.randn(8, 8, 3, 3), torch.arange(8) % 3)
    state = client.state_dict()
    old = {name.replace("scorer/", "meter/"): tensor for name, tensor in state.items()}
    assert old.keys() != state.keys()
    (other,) = local(set_up(normed(), "conv1", [Pictures(30, 1)], ACPSL(preset="paper")))
    other.load_state_dict(old)
    assert same(other.state_dict(), state)


def test_another_network_is_refused(tmp_path: Path) -> None:
    history(Checkpoint(tmp_path), rounds=1)
    with pytest.raises(CheckpointError, match="of the network"):
        history(Checkpoint(tmp_path, resume=True), model=plain())


def test_another_method_is_refused(tmp_path: Path) -> None:
    history(Checkpoint(tmp_path), rounds=1, method="sl")
    with pytest.raises(CheckpointError, match="is of another run"):
        history(Checkpoint(tmp_path, resume=True), method="acp-sl")


def test_a_damaged_checkpoint_is_survived(tmp_path: Path) -> None:
    with pytest.raises(Ended):
        history(Checkpoint(tmp_path), stop=3)
    path = tmp_path / "round-00003" / "clients.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    said: list[str] = []
    again = history(Checkpoint(tmp_path, resume=True, say=said.append))
    assert "clients.safetensors has" in said[0]
    require_equal(history(None), again)


def test_a_run_whose_layers_diverge_ends_with_a_line(tmp_path: Path) -> None:
    for lr, line in (
        (1e5, r"round \d: the layers of 0 of 3 clients could be used"),
        (1e30, r"round 1: NaN or Inf in conv\d.* on the server"),
    ):
        wild = Training(lr=lr, batch_size=8, optimizer="sgd")
        with pytest.raises(RunFailed, match=line):
            history(Checkpoint(tmp_path), training=wild, method="sl", participation=1.0)
    assert not list(tmp_path.glob("round-*"))
