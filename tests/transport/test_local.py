"""The embedded engine: the same numbers with one worker and with several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.worlds import TinyClassifier, TinyText

from sluiceway.core.messages import write_broadcast, write_update
from sluiceway.core.round_loop import Result
from sluiceway.core.settings import Training
from sluiceway.strategies import STRATEGIES
from sluiceway.transport import local, worker_pool
from sluiceway.transport.local import LocalEngine, federate

DEFAULTS = LocalEngine.__init__.__kwdefaults__


def trained(name: str, workers: int, seed: int = 0) -> Result:
    return federate(
        TinyClassifier(),
        [TinyText(18, 1), TinyText(5, 2), TinyText(0, 3), TinyText(11, 4)],
        TinyText(300, 9),
        name,
        rounds=2,
        seed=seed,
        training=Training(lr=0.02, batch_size=8),
        workers=workers,
        threads=1,
        device="cpu",
    )


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_workers_change_nothing(name: str) -> None:
    one, three = trained(name, 1), trained(name, 3)
    assert one.accuracy_by_round == three.accuracy_by_round
    assert [r.loss for r in one.records] == [r.loss for r in three.records]
    assert (one.bytes_up, one.bytes_down) == (three.bytes_up, three.bytes_down)
    assert one.personal_accuracy == three.personal_accuracy
    for key, tensor in one.tensors.items():
        assert torch.equal(three.tensors[key], tensor), key


def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    one, again, other = (
        trained("fedalign-moe", 1),
        trained("fedalign-moe", 1),
        trained("fedalign-moe", 1, seed=1),
    )
    assert one.accuracy_by_round == again.accuracy_by_round
    assert any(not torch.equal(one.tensors[k], other.tensors[k]) for k in one.tensors)


def test_the_generator_outside_is_left_alone() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    model = TinyClassifier()
    torch.manual_seed(7)
    federate(model, [TinyText(8, 1)], TinyText(8, 2), rounds=1, device="cpu")
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_bytes_are_the_lengths_of_what_is_packed(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packed = {"up": 0, "down": 0}
    train = LocalEngine.train

    def weighed(self, broadcast, clients, personal, *, keep):  # type: ignore[no-untyped-def]
        packed["down"] += len(clients) * write_broadcast(tmp_path / "down", broadcast)
        for update in train(self, broadcast, clients, personal, keep=keep):
            packed["up"] += write_update(tmp_path / "up", update)
            yield update

    monkeypatch.setattr(LocalEngine, "train", weighed)
    clients = [TinyText(8, 1), TinyText(9, 2)]
    result = federate(TinyClassifier(), clients, TinyText(8, 2), name, rounds=2, device="cpu")
    assert (result.bytes_up, result.bytes_down) == (packed["up"], packed["down"])


@pytest.mark.parametrize("name", ["scaffold", "non-expert", "fedalign-moe"])
def test_what_is_in_memory_and_what_is_in_files_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = trained(name, 1)
    monkeypatch.setattr(local.LocalEngine.__init__, "__kwdefaults__", {**DEFAULTS, "memory": 0})
    in_files = trained(name, 1)
    assert in_memory.accuracy_by_round == in_files.accuracy_by_round
    for key, tensor in in_memory.tensors.items():
        assert torch.equal(in_files.tensors[key], tensor), key


@pytest.mark.slow
def test_workers_that_begin_anew_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do where CUDA is visible and the run is on the CPU."""
    one = trained("fedalign-moe", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert worker_pool.start_method() == "spawn"
    two = trained("fedalign-moe", 2)
    assert one.accuracy_by_round == two.accuracy_by_round
    for key, tensor in one.tensors.items():
        assert torch.equal(two.tensors[key], tensor), key
