"""Clients that go against the others, and whether the model is better without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.worlds import TinyClassifier, TinyText
from torch import Tensor

from sluiceway.core.guards import Usual
from sluiceway.core.leave_one_out import agreement, harmful
from sluiceway.core.settings import Training
from sluiceway.moe import MoELayout
from sluiceway.strategies import FedAvg, Scaffold, Update
from sluiceway.transport.local import LocalEngine, federate


def rule(tensors: dict[str, Tensor]) -> FedAvg:
    strategy = FedAvg()
    strategy.setup(tensors, MoELayout(()), 3)
    return strategy


def updates(strategy: FedAvg, changes: Sequence[Tensor]) -> list[Update]:
    """One for each change, over two tensors."""
    return [
        Update(
            i, 1, 1, {"a": strategy.tensors["a"] + c[:2], "b": strategy.tensors["b"] + c[2:]}, []
        )
        for i, c in enumerate(changes)
    ]


def test_agreement_is_the_cosine_with_the_others() -> None:
    strategy = rule({"a": torch.randn(2), "b": torch.randn(3)})
    changes = [torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    changes[2] *= 1000  # length says nothing
    units = [c / c.norm() for c in changes]
    found = agreement(updates(strategy, changes), strategy)
    for i, unit in enumerate(units):
        rest = sum((u for j, u in enumerate(units) if j != i), torch.zeros(5))
        assert found[i] == pytest.approx(float(unit @ rest / rest.norm()), abs=1e-3)
    nothing = updates(strategy, [changes[0], changes[1], torch.zeros(5)])
    assert agreement(nothing, strategy).keys() == {0, 1}


def test_what_is_harmful() -> None:
    # Of a client that went against the others before: 5 of them, loss 1 to 0.9, 0.8 without it.
    assert harmful(1.0, 0.9, 0.8, 5, often=True)
    assert not harmful(1.0, 0.81, 0.8, 5, often=True)  # a tenth of 0.2 is asked for
    assert not harmful(1.0, 0.8, 0.9, 5, often=True)
    assert not harmful(1.0, 0.9, float("nan"), 5, often=True)
    # Of another: the loss must have risen because of it.
    assert harmful(0.5, 2.0, 0.5, 5, often=False)
    assert not harmful(0.5, 2.0, 1.5, 5, often=False)
    assert not harmful(1.0, 0.9, 0.8, 5, often=False)


def test_who_goes_against_the_others_often() -> None:
    usual = Usual(10)
    assert usual.opposes(1, -0.1)
    for _ in range(9):
        usual.note("agreement 1", [0.3])
    assert not usual.opposes(1, -0.4)
    again = Usual(10)
    again.take(usual.facts())
    assert again.past == usual.past
    assert len(usual.past["agreement 1"]) == 4


@pytest.mark.parametrize("looked_for", [True, False])
def test_a_lie_of_usual_length_is_found(monkeypatch: pytest.MonkeyPatch, looked_for: bool) -> None:
    """Client 0 turns round what it learned, nine times as long, in the fourth round alone."""
    plain = LocalEngine.answers

    def answers(self: LocalEngine, broadcast: Any, *rest: Any) -> Iterator[Any]:
        for update in plain(self, broadcast, *rest):
            if update.client == 0 and update.round == 4:
                old = {k: v.clone() for k, v in self.worker.strategy.tensors.items()}
                pieces = self.worker.strategy.shared_pieces
                told = {
                    p.key: p.of(old) - 9 * (update.tensors[p.key] - p.of(old))
                    for p in pieces
                    if p.key in update.tensors
                }
                yield replace(update, tensors=told)
            else:
                yield update

    monkeypatch.setattr(LocalEngine, "answers", answers)
    result = federate(
        TinyClassifier(experts=0),
        [TinyText(24, seed) for seed in range(5)],
        TinyText(40, 99),
        FedAvg(),
        rounds=4,
        training=Training(lr=0.02, batch_size=8),
        device="cpu",
        personal_examples=0,
        leave_one_out=looked_for,
    )
    losses = [record.loss or 0.0 for record in result.records]
    if looked_for:
        assert list(result.records[3].rejected) == [0]
        assert "goes against the others" in result.records[3].rejected[0]
        assert losses[3] <= losses[2]
    else:  # what the guard is for
        assert not result.rejected
        assert losses[3] > losses[2]


def test_controls_that_contradict_a_change_are_found() -> None:
    """A step of 0.1 against the mean gradient less the server's control, by hand."""
    strategy = Scaffold()
    strategy.setup({"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(3)}, MoELayout(()), 3)
    strategy.control = {"a": torch.tensor([0.5, 0.0]), "b": torch.zeros(3)}
    gradient = {"a": torch.tensor([2.0, -1.0]), "b": torch.tensor([0.0, 1.0, -1.0])}
    moved = {k: strategy.tensors[k] - 0.1 * gradient[k] for k in gradient}

    def of(sign: float, tensors: dict[str, Tensor]) -> Update:
        extra = {
            f"control/{k}": sign * (g - strategy.control[k].to(g)) for k, g in gradient.items()
        }
        return Update(0, 1, 1, tensors, extra=extra)

    assert strategy.fault(of(1.0, moved)) is None
    assert strategy.fault(of(1.0, dict(strategy.tensors))) is None  # it did not move
    assert "contradict" in str(strategy.fault(of(-1.0, moved)))
