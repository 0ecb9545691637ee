"""The embedded engine: the same numbers with one worker and with several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.federated.small import tiny
from tests.worlds import TinyClassifier, TinyText

from sluiceway.core.messages import write_broadcast, write_update
from sluiceway.core.round_loop import Result
from sluiceway.core.settings import Training
from sluiceway.errors import InputError
from sluiceway.federated.client import Worker, prepare
from sluiceway.strategies import STRATEGIES, FedAvg, Update
from sluiceway.transport import local, worker_pool
from sluiceway.transport.local import LocalEngine, federate

DEFAULTS = LocalEngine.__init__.__kwdefaults__


def trained(name: str, workers: int, seed: int = 0, frozen: bool = False) -> Result:
    model = TinyClassifier()
    if frozen:
        model.backbone.embeddings.requires_grad_(False)
        model.backbone.encoder.layer[0].requires_grad_(False)
    return federate(
        model,
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
@pytest.mark.parametrize("frozen", [False, True])
def test_workers_that_begin_anew_change_nothing(
    frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do where CUDA is visible; a frozen prefix, whose outputs are kept, goes with them."""
    one = trained("fedalign-moe", 1, frozen=frozen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert worker_pool.start_method() == "spawn"
    two = trained("fedalign-moe", 2, frozen=frozen)
    assert not any(record.failed for record in two.records)
    assert one.accuracy_by_round == two.accuracy_by_round
    for key, tensor in one.tensors.items():
        assert torch.equal(two.tensors[key], tensor), key


def test_every_gpu_gets_one_worker() -> None:
    def names(device: str, workers: int, visible: int) -> list[str]:
        return [str(place) for place in local.pool_devices(torch.device(device), workers, visible)]

    assert names("cpu", 8, 2) == []
    assert names("cuda", 3, 4) == ["cuda:0", "cuda:1", "cuda:2"]
    assert names("cuda:2", 1, 4) == ["cuda:2"]
    for device, workers, visible in (("cuda", 3, 2), ("cuda:1", 2, 4), ("mps", 2, 0)):
        with pytest.raises(InputError, match=f"^run.workers = {workers}: on {device} there can be"):
            names(device, workers, visible)


def test_clients_at_once_fit_into_a_quarter_of_the_memory() -> None:
    params = [torch.zeros(1000), torch.zeros(250)]  # 5,000 bytes, 25,000 with all that goes along
    assert local.clients_at_once(params, 10, 0) == 1
    assert local.clients_at_once(params, 10, 4 * 75_000) == 3
    assert local.clients_at_once(params, 10, 4 * 74_999) == 2
    assert local.clients_at_once(params, 10, 1 << 34) == 10
    assert local.clients_at_once(params, 1000, 1 << 34) == 64


@pytest.mark.parametrize(
    ("dropout", "stacked", "memory", "found"),
    [
        (0.0, 0, 0, 1),
        (0.0, 0, 1 << 30, 3),
        (0.1, 0, 1 << 30, 1),
        (0.0, 1, 1 << 30, 1),
        (0.0, 2, 0, 2),
    ],
)
def test_many_clients_at_once_where_there_is_memory_and_it_can_be(
    dropout: float, stacked: int, memory: int, found: int
) -> None:
    model, method = tiny(dropout=dropout), FedAvg()
    clients = [TinyText(8, n) for n in range(4)]
    prepare(model, method, 4)
    worker = Worker(model, clients, TinyText(8, 9), method, Training())
    with local.in_process(worker, stacked, 3, memory) as engine:
        at_once = engine.stacked if isinstance(engine, local.StackedEngine) else 1
        assert at_once == found
        updates = list(engine.train(method.broadcast(1), [0, 1, 3], set(), keep=False))
    assert [update.client for update in updates if isinstance(update, Update)] == [0, 1, 3]
