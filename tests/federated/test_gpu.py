"""No step of a client waits for a GPU: each waiting raises in CUDA's debug mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.federated.test_folded import upcycled
from tests.worlds import TinyText

from sluiceway.core.settings import Training
from sluiceway.federated.client import Worker, prepare
from sluiceway.federated.folded import Folding
from sluiceway.federated.stacked import StackedTrainer
from sluiceway.federated.stepping import Stepper
from sluiceway.moe.upcycled import UpcycledExperts, UpcycledMoE, UpcycledRouter
from sluiceway.strategies import strategy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
METHODS = ("fedavg", "fedprox", "scaffold", "fedalign-moe")


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def strict(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Let nothing wait in these calls; returns a list that grows by one with each."""
    call, seen = getattr(owner, name), []

    def called(*args: Any, **named: Any) -> Any:
        seen.append(name)
        with no_waiting():
            return call(*args, **named)

    monkeypatch.setattr(owner, name, called)
    return seen


def worker(method: str) -> tuple[Worker, Any]:
    model, chosen = upcycled(), strategy(method)
    clients = [TinyText(9, n) for n in range(3)]
    prepare(model, chosen, 3)
    training = Training(lr=0.01, batch_size=4, local_epochs=2)
    found = Worker(model, clients, clients[0], chosen, training, device="cuda")
    return found, chosen.broadcast(1)


@pytest.mark.parametrize("method", METHODS)
def test_a_step(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, sent = worker(method)
    one.train(0, sent, {}, personal=False)  # libraries are loaded in the first steps
    seen = [strict(monkeypatch, Worker, "descend"), strict(monkeypatch, Stepper, "step")]
    one.train(1, sent, {}, personal=False)
    assert all(seen)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_many_clients(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, sent = worker(method)
    trainer = StackedTrainer(one)
    states: dict[int, dict[str, torch.Tensor]] = {n: {} for n in range(3)}
    trainer.train(sent, range(3), set(), states)
    seen = [
        strict(monkeypatch, StackedTrainer, "backward"),
        strict(monkeypatch, StackedTrainer, "correct"),
        strict(monkeypatch, Folding, "run"),
    ]
    updates = trainer.train(sent, range(3), set(), states)
    assert all(seen)
    on_cpu, _ = worker(method)
    on_cpu.move("cpu")
    for found, number in zip(updates, range(3), strict=True):
        expected = on_cpu.train(number, sent, {}, personal=False)
        assert expected.metrics["loss"] == pytest.approx(found.metrics["loss"], rel=0.05)  # type: ignore[union-attr]


def test_a_layer_of_64_experts() -> None:
    router = UpcycledRouter(torch.randn(64, 32), 2)
    layer = UpcycledMoE(
        router, UpcycledExperts(torch.randn(64, 48, 32), torch.randn(64, 32, 48), torch.tanh)
    ).cuda()
    x = torch.randn(512, 32, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    with no_waiting():
        layer(x).sum().backward()
