"""Many clients at once: the numbers of one after the other, up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from sluiceway.core.checkpoints import Checkpoint
from sluiceway.core.round_loop import Record, Result
from sluiceway.core.settings import Training
from sluiceway.errors import InputError
from sluiceway.strategies import FedProx
from sluiceway.transport.local import federate

#: What docs/performance.md states: absolute and relative differences of float32 values.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
SIZES = (7, 1, 20, 0, 13, 4, 16)


def examples(count: int, seed: int) -> TensorDataset:
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 1, 4, 4, generator=rng)
    return TensorDataset(inputs, torch.randint(0, 3, (count,), generator=rng))


class Items(Dataset[tuple[Tensor, int]]):
    """One example at a time, with noise that is drawn anew whenever it is read."""

    def __init__(self, whole: TensorDataset, bad: bool = False) -> None:
        self.whole, self.bad, self.labels = whole, bad, whole.tensors[1]

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.bad:
            raise OSError("disk on fire")
        image, label = self.whole[index]
        return image + 0.1 * torch.randn(image.shape), int(label)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )


def trained(
    stacked: int,
    make: Callable[[], nn.Module] = mlp,
    clients: list[Any] | None = None,
    test: Any = None,
    **kwargs: Any,
) -> tuple[Result, nn.Module]:
    model = make()
    kwargs.setdefault("training", Training(lr=0.1, batch_size=5, optimizer="sgd"))
    result = federate(
        model,
        clients or [examples(n, i) for i, n in enumerate(SIZES)],
        test or examples(30, 99),
        **({"rounds": 3, "device": "cpu", "seed": 5} | kwargs),
        stacked=stacked,
    )
    return result, model


def check_same(one: Result, other: Result) -> None:
    """All but the digits of the losses, of which messages carry a few more or less."""
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(other.tensors[name], tensor, **TOLERANCE)
    for a, b in zip(one.records, other.records, strict=True):
        assert (b.clients, b.failed, b.bytes_down) == (a.clients, a.failed, a.bytes_down)
        assert abs(b.bytes_up - a.bytes_up) <= 8 * len(a.clients)
        assert b.train_loss == pytest.approx(a.train_loss, rel=1e-4)
    assert other.personal_accuracy == pytest.approx(one.personal_accuracy, abs=0.04)


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "local_epochs": 2},
        {"optimizer": "adamw", "weight_decay": 0.1, "lr": 0.01, "local_epochs": 2},
        {"optimizer": "sgd", "max_grad_norm": 0, "accumulate": 3, "batch_size": 2},
        {"optimizer": "sgd", "local_steps": 3},
    ],
    ids=["sgd", "momentum", "adamw", "accumulate", "steps"],
)
@pytest.mark.parametrize("make", [mlp, cnn])
def test_equal_to_one_after_the_other(
    make: Callable[[], nn.Module], training: dict[str, Any]
) -> None:
    settings = Training(**({"lr": 0.1, "batch_size": 5} | training))
    exact, first = trained(0, make, training=settings)
    assert any(not torch.equal(t, make().state_dict()[n]) for n, t in exact.tensors.items())
    for size in (3, 100):
        stacked, model = trained(size, make, training=settings)
        check_same(exact, stacked)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, first.state_dict()[name], **TOLERANCE)


@pytest.mark.parametrize(
    "setting",
    [
        {"participation": 0.5, "rounds": 4},
        {"clients": [examples(7, 1)]},
        {"clients": [examples(1, n) for n in range(3)]},
        {"clients": [Items(examples(n, n)) for n in (6, 9, 2)]},
        {
            "clients": [Items(examples(n, n)) for n in (6, 9, 2)],
            "training": Training(lr=0.1, batch_size=5, optimizer="sgd", local_steps=3),
        },
        {"strategy": FedProx(mu=1.0)},
        {"strategy": "fedadam"},
        {"loss": lambda z, y: F.nll_loss(F.log_softmax(2 * z, 1), y)},
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
    ],
    ids=[
        "participation",
        "alone",
        "one-each",
        "items",
        "item-steps",
        "fedprox",
        "fedadam",
        "nll",
        "smooth",
    ],
)
def test_equal_in_other_settings(setting: dict[str, Any]) -> None:
    exact, stacked = (trained(size, **setting)[0] for size in (0, 4))
    check_same(exact, stacked)


def test_more_rounds_to_the_same_end(tmp_path: Path) -> None:
    """Stopped after two rounds of four and continued, every value is that of the whole run."""
    training = Training(lr=0.01, batch_size=5, local_epochs=2)
    whole, _ = trained(4, rounds=4, training=training, participation=0.7)

    def stop(record: Record) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    folder = tmp_path / "checkpoints"
    with pytest.raises(KeyboardInterrupt):
        trained(
            4,
            rounds=4,
            training=training,
            participation=0.7,
            on_round=stop,
            checkpoint=Checkpoint(folder, False),
        )
    resumed, _ = trained(
        4, rounds=4, training=training, participation=0.7, checkpoint=Checkpoint(folder, True)
    )
    assert [r.bytes_up for r in resumed.records] == [r.bytes_up for r in whole.records]
    for name, tensor in whole.tensors.items():
        assert torch.equal(resumed.tensors[name], tensor), name


def test_parameters_without_a_gradient_stay() -> None:
    """Weight decay does not reach what a forward pass does not use, as in torch.optim."""

    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = mlp(), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    training = Training(lr=0.1, batch_size=5, optimizer="sgd", weight_decay=0.5)
    exact, stacked = (trained(size, Spare, training=training)[0] for size in (0, 4))
    assert torch.equal(stacked.tensors["spare"], torch.ones(3))
    check_same(exact, stacked)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (Items(examples(6, 1), bad=True), "disk on fire"),
        (TensorDataset(torch.randn(4, 1, 5, 5), torch.zeros(4).long()), "Expected size"),
    ],
    ids=["unreadable", "shape"],
)
def test_a_client_fails_alone(broken: Any, why: str) -> None:
    clients = [examples(n, n) for n in (6, 11, 0, 9)]
    exact, _ = trained(0, clients=[*clients[:2], broken, clients[3]])
    stacked, _ = trained(8, clients=[*clients[:2], broken, clients[3]])
    for record in stacked.records:
        assert record.failed.keys() == {2}
        assert why in record.failed[2]
        assert record.clients == [0, 1, 2, 3]
    for name, tensor in exact.tensors.items():
        torch.testing.assert_close(stacked.tensors[name], tensor, **TOLERANCE)


def test_nan_of_one_client_stays_with_it() -> None:
    clients = [examples(n, n) for n in (6, 11, 9)]
    broken = TensorDataset(torch.full((8, 1, 4, 4), torch.nan), torch.zeros(8).long())
    without, _ = trained(8, clients=[*clients, examples(0, 0)], seed=5)
    among, _ = trained(8, clients=[*clients, broken])
    assert {why[:3] for record in among.records for why in record.rejected.values()} == {"NaN"}
    for name, tensor in without.tensors.items():
        torch.testing.assert_close(among.tensors[name], tensor, **TOLERANCE)


class Summed(nn.Module):
    """Each example is seen relative to its batch, without any statistics kept."""

    def __init__(self) -> None:
        super().__init__()
        self.head = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x - x.mean(0))


class Counting(Summed):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(x)


class Branching(Summed):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x if float(x.sum()) > 0 else 2 * x)


def with_layer(layer: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(1, 2, 3), layer, nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"make": with_layer(nn.BatchNorm2d(2))}, r"1 \(BatchNorm2d\) takes statistics of its"),
        ({"make": with_layer(nn.Dropout(0.2))}, r"1 \(Dropout\) is random"),
        ({"make": Summed}, "depends on the others of its batch"),
        ({"make": Counting}, "training changes the buffer calls"),
        ({"make": Branching}, "this model or loss cannot be stacked"),
        ({"training": Training(mixed="bfloat16")}, "mixed = 'bfloat16'"),
        ({"make": lambda: mlp().bfloat16()}, "1.weight is of half precision"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "not the mean of the examples'"),
        ({"loss": nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3]))}, "not the mean of the exam"),
        ({"workers": 2}, "cannot be used with several workers"),
        ({"timeout": 9.0}, "cannot be used with a timeout"),
    ],
)
def test_refused_with_a_reason(setting: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=f"^run.stacked.*{why}") as caught:
        trained(2, **setting)
    assert "\n" not in str(caught.value)


def test_a_model_is_left_as_it_was_when_it_is_refused() -> None:
    model = Counting()
    with pytest.raises(InputError):
        trained(2, lambda: model)
    assert model.calls == 0
