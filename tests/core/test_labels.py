"""Labels are checked before anything is trained, and what a batch of BatchNorm needs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sluiceway
from sluiceway.core.guards import TooFewUpdates
from sluiceway.strategies import NormClipping

X = torch.randn(120, 8, generator=torch.Generator().manual_seed(0)) * 0.01
Y = (X[:, 0] > 0).long()
TEST = TensorDataset(X[80:], Y[80:])


def clients(size: int = 40) -> list[TensorDataset]:
    return [TensorDataset(X[i : i + size], Y[i : i + size]) for i in (0, 40)]


def network(momentum: float | None = 0.1, outputs: int = 2) -> nn.Sequential:
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(16, momentum=momentum)
    return nn.Sequential(nn.Linear(8, 16), norm, nn.ReLU(), nn.Linear(16, outputs))


def federated(model: nn.Module, held: Any, test: Any, **how: Any) -> Any:
    how.setdefault("training", sluiceway.Training(lr=0.01, batch_size=16))
    return sluiceway.federate(model, held, test, how.pop("strategy", sluiceway.FedAvg()), **how)


def split(model: nn.Module, held: Any, test: Any) -> Any:
    return sluiceway.split_train(model, "0", held, test, "sl", rounds=1)


def labelled(change: Callable[[Tensor], Tensor]) -> list[TensorDataset]:
    first, second = clients()
    return [first, TensorDataset(second.tensors[0], change(second.tensors[1]))]


FAULTS = {
    "halves": (labelled(lambda y: y + 0.5), TEST, r"client 1: a label is [01]\.5; expected class"),
    "below": (labelled(lambda y: y - 1), TEST, "client 1 has the label -1: labels must be class"),
    "ignored": (labelled(lambda y: y * -100), TEST, "client 1 has the label -100"),
    "empty": (clients(), TensorDataset(X[:0], Y[:0]), "the test set is empty"),
}


@pytest.mark.parametrize("run", [federated, split])
@pytest.mark.parametrize(("held", "test", "line"), FAULTS.values(), ids=FAULTS)
def test_labels_are_checked_at_the_start(run: Any, held: Any, test: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        run(network(), held, test)


def test_a_test_label_beyond_the_head_is_said() -> None:
    wrong = TensorDataset(TEST.tensors[0], TEST.tensors[1] + 1)
    with pytest.raises(TooFewUpdates, match=r"test set has the label 2, .* must be in 0\.\.1"):
        federated(network(), clients(), wrong, rounds=1)


def test_one_logit_has_no_accuracy() -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels.float())

    with pytest.raises(TooFewUpdates, match="one logit for an example"):
        federated(network(outputs=1), clients(), TEST, rounds=1, loss=loss)


def test_whole_floats_are_labels() -> None:
    held = labelled(lambda y: y.float())
    found = federated(network(), held, TEST, rounds=1)
    assert found.label_counts == federated(network(), clients(), TEST, rounds=1).label_counts


def test_a_last_batch_of_one_is_left_out() -> None:
    """33 examples in batches of 16: as with 32 of them, when the one that is alone is left out."""
    found = federated(network(), clients(33), TEST, rounds=2)
    assert (found.failed, found.rejected) == (0, 0)
    with pytest.raises(Exception, match="more than 1 value per channel"):
        federated(network(), clients(1), TEST, rounds=1)


@pytest.mark.parametrize("name", ["momentum", "adam", "yogi"])
def test_server_optimisers_average_statistics(name: str) -> None:
    from sluiceway.strategies import SERVER

    plain = federated(network(), clients(), TEST, rounds=1).tensors
    strategy = sluiceway.FedAvg().with_server(SERVER[name](lr=0.5))
    stepped = federated(network(), clients(), TEST, rounds=1, strategy=strategy).tensors
    for statistic in ("1.running_mean", "1.running_var"):
        assert torch.equal(stepped[statistic], plain[statistic])
    assert not torch.equal(stepped["0.weight"], plain["0.weight"])


def test_clipping_leaves_statistics() -> None:
    plain = federated(network(), clients(), TEST, rounds=1).tensors
    strategy = sluiceway.FedAvg().with_rules(NormClipping(limit=1e-3))
    clipped = federated(network(), clients(), TEST, rounds=1, strategy=strategy).tensors
    assert torch.allclose(clipped["1.running_var"], plain["1.running_var"])
    began = network().state_dict()
    moved = [
        torch.linalg.vector_norm(clipped[name] - began[name])
        for name in clipped
        if "running" not in name
    ]
    assert float(torch.stack(moved).norm()) == pytest.approx(1e-3, rel=0.5)
    assert float(torch.stack(moved).norm()) <= 1e-3 * 1.001


class Remembers(nn.Module):
    """Adds what an earlier batch left in a buffer that is not in the state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 2)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.seen
        if self.training:
            self.seen += x.abs().mean()
        return out


@pytest.mark.parametrize("make", [lambda: network(None), Remembers])
def test_nothing_passes_from_client_to_client(make: Callable[[], nn.Module]) -> None:
    """Clients one after another give what they give in workers of their own."""
    found = []
    for workers in (1, 2):
        torch.manual_seed(1)
        found.append(federated(make(), clients(), TEST, rounds=2, workers=workers).tensors)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
