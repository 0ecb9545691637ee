"""Noise and distance correlation, and what training makes of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.split.small import SGD, Pictures, normed, numbers, records, same, set_up, train
from torch.nn import functional

from sluiceway import SplitTraining
from sluiceway.core.checkpoints import Checkpoint
from sluiceway.split import SCHEDULES
from sluiceway.split.compress import Compressor
from sluiceway.split.defence import distance_correlation, noisy

NOPEEK = SplitTraining(**asdict(SGD) | {"nopeek": 3.0})


def slow_correlation(x: torch.Tensor, z: torch.Tensor) -> float:
    """By the definition, with loops."""
    n = len(x)

    def centred(rows: torch.Tensor) -> list[list[float]]:
        rows = rows.flatten(1).double()
        a = [[float((rows[i] - rows[j]).norm()) for j in range(n)] for i in range(n)]
        row = [sum(line) / n for line in a]
        every = sum(row) / n
        return [[a[i][j] - row[i] - row[j] + every for j in range(n)] for i in range(n)]

    def product(p: list[list[float]], q: list[list[float]]) -> float:
        return sum(p[i][j] * q[i][j] for i in range(n) for j in range(n))

    A, B = centred(x), centred(z)
    bottom = (product(A, A) * product(B, B)) ** 0.5
    return product(A, B) / bottom if bottom > 0 else 0.0


@given(st.integers(2, 9), st.integers(0, 10_000), st.floats(0.01, 100))
def test_distance_correlation_is_its_definition(n: int, seed: int, size: float) -> None:
    g = torch.Generator().manual_seed(seed)
    x, z = torch.randn(n, 2, 3, generator=g), size * torch.randn(n, 4, generator=g)
    found = float(distance_correlation(x, z))
    assert found == pytest.approx(slow_correlation(x, z), abs=1e-4)
    assert -1e-5 <= found <= 1 + 1e-5
    order = torch.randperm(n, generator=g)
    assert float(distance_correlation(x[order], z[order])) == pytest.approx(found, abs=1e-4)


def test_distance_correlation_of_equal_and_of_constant_data() -> None:
    x = torch.randn(6, 5)
    assert float(distance_correlation(x, 3 * x + 1)) == pytest.approx(1, abs=1e-5)
    for z in (torch.ones(6, 4), torch.zeros(6, 4)):
        z.requires_grad_()
        found = distance_correlation(x, z)
        found.backward()
        assert (float(found.detach()), z.grad is not None and bool(z.grad.isfinite().all())) == (
            0.0,
            True,
        )
    one = torch.ones(1, 4, requires_grad=True)
    distance_correlation(x[:1], one).backward()
    assert one.grad is not None
    assert not one.grad.any()


def test_its_gradient_is_that_of_differences() -> None:
    g = torch.Generator().manual_seed(3)
    x, z = torch.randn(5, 4, generator=g), torch.randn(5, 3, generator=g).requires_grad_()
    distance_correlation(x, z).backward()
    assert z.grad is not None
    for i, j in ((0, 0), (3, 2)):
        step = torch.zeros(5, 3)
        step[i, j] = 1e-3
        up, down = (slow_correlation(x, z.detach() + s * step) for s in (1, -1))
        assert float(z.grad[i, j]) == pytest.approx((up - down) / 2e-3, abs=1e-3)


def test_noise_has_the_share_of_the_deviation() -> None:
    values = 5 + 2 * torch.randn(64, 8, 16, 16)
    noise = noisy(values, 0.3, 1) - values
    assert float(noise.std()) == pytest.approx(0.6, rel=0.02)
    assert abs(float(noise.mean())) < 0.01
    assert torch.equal(noisy(values, 0.3, 1), noise + values)
    assert not torch.equal(noisy(values, 0.3, 2), noise + values)
    assert noisy(values, 0.0, 1) is values


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_crosses_in_training_and_in_evaluation(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[tuple[bool, float]] = []
    up = Compressor.up

    def noted(self: Compressor, A: torch.Tensor, *given: object, **named: object) -> object:
        if self.noise:
            added.append((named.get("training", True) is True, float(A.min())))
        return up(self, A, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Compressor, "up", noted)
    (record,) = records(train(Compressor(noise=0.5), schedule=schedule, rounds=1).records)
    for training in (True, False):  # behind a ReLU only noise is below zero
        assert any(low < 0 for during, low in added if during == training)
    assert record.accuracy_full != record.accuracy or record.loss > 0
    again = train(Compressor(noise=0.5), schedule=schedule, rounds=1)
    assert numbers(again.records) == numbers([record])


def test_a_penalised_step_is_one_on_the_sum_of_both_losses() -> None:
    """One client, one batch: the split step equals an unsplit one with the penalty in its loss."""
    data, whole, model = Pictures(8, 1), normed(), normed()
    step = SplitTraining(lr=0.1, batch_size=8, optimizer="sgd", nopeek=3.0)
    loop = set_up(model, "conv1", [data], Compressor(), training=step)
    loop.run_round(1, [0])
    images, labels = data.tensors
    order = next(loop.clients[0].batches(1))[1]  # type: ignore[attr-defined]
    images, labels = order.inputs, order.labels
    whole.train()
    z = whole.conv1(images)
    rest = whole.head(whole.conv4(whole.conv3(whole.conv2(z))))
    loss = functional.cross_entropy(rest, labels) + 3.0 * distance_correlation(images, z)
    loss.backward()
    for name, param in whole.named_parameters():
        assert param.grad is not None
        after = dict(model.named_parameters())[name]
        assert torch.allclose(after, param - 0.1 * param.grad, atol=1e-6)


def test_the_penalty_lowers_the_correlation() -> None:
    data = Pictures(64, 1)

    def correlation(training: SplitTraining) -> float:
        model = normed()
        train("sl", [data], model=model, training=training, rounds=6)
        with torch.no_grad():
            return float(distance_correlation(data.tensors[0], model.conv1(data.tensors[0])))

    free = SplitTraining(**asdict(SGD))
    assert correlation(NOPEEK) < correlation(free) - 0.1


@pytest.mark.parametrize("schedule", ["parallel", "u"])
def test_defended_runs_are_continued_exactly(schedule: str, tmp_path: Path) -> None:
    how = {"schedule": schedule, "training": NOPEEK}
    whole = train(Compressor(noise=0.2), **how)
    train(Compressor(noise=0.2), rounds=2, checkpoint=Checkpoint(tmp_path), **how)
    again = train(Compressor(noise=0.2), checkpoint=Checkpoint(tmp_path, resume=True), **how)
    assert numbers(again.records) == numbers(whole.records)
    assert same(again.tensors, whole.tensors)


def test_a_penalty_of_frozen_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs front = true"):
        SplitTraining(front=False, nopeek=1.0)
    model = normed()
    model.conv1.requires_grad_(False)
    with pytest.raises(ValueError, match=r"train\.nopeek needs layers before the cut"):
        train("sl", model=model, training=NOPEEK)
