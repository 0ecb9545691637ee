"""Labels are checked before anything is trained, and what a batch of BatchNorm needs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sluiceway
from sluiceway.core.batches import Batch, Rows, without_ignored
from sluiceway.errors import InputError
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


def split(model: nn.Module, held: Any, test: Any, **how: Any) -> Any:
    how.setdefault("rounds", 1)
    return sluiceway.split_train(model, "0", held, test, "sl", **how)


def labelled(change: Callable[[Tensor], Tensor]) -> list[TensorDataset]:
    first, second = clients()
    return [first, TensorDataset(second.tensors[0], change(second.tensors[1]))]


FAULTS = {
    "halves": (labelled(lambda y: y + 0.5), TEST, r"client 1: a label is [01]\.5; expected class"),
    "below": (labelled(lambda y: y - 1), TEST, "client 1 has the label -1: labels must be class"),
    "empty": (clients(), TensorDataset(X[:0], Y[:0]), "the test set is empty"),
}


@pytest.mark.parametrize("run", [federated, split])
@pytest.mark.parametrize(("held", "test", "line"), FAULTS.values(), ids=FAULTS)
def test_labels_are_checked_at_the_start(run: Any, held: Any, test: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        run(network(), held, test)


@pytest.mark.parametrize("run", [federated, split])
def test_labels_beyond_the_head_are_said_before_training(run: Any) -> None:
    wrong = TensorDataset(TEST.tensors[0], TEST.tensors[1] + 1)
    with pytest.raises(InputError, match=r"test set has the label 2, .* 2 logits.* in 0\.\.1"):
        run(network(), clients(), wrong)
    with pytest.raises(InputError, match=r"client 1 has the label 3, .* must be in 0\.\.1"):
        run(network(), labelled(lambda y: y + 2), TEST)


@pytest.mark.parametrize("run", [federated, split])
def test_ignored_examples_change_nothing(run: Any) -> None:
    """Examples of the label -100 among the others: the same run as without them."""
    first, second = clients()
    more = torch.cat([second.tensors[0], 9 + X[:7]])
    labels = torch.cat([second.tensors[1], torch.full((7,), -100)])
    tested = torch.cat([torch.full((3,), -100), TEST.tensors[1]])
    with_test = TensorDataset(torch.cat([X[:3], TEST.tensors[0]]), tested)
    plain = run(network(), [first, second], TEST)
    found = run(network(), [first, TensorDataset(more, labels)], with_test)
    assert found.label_counts == plain.label_counts
    assert found.records[-1].loss == plain.records[-1].loss
    assert all(torch.equal(value, found.tensors[name]) for name, value in plain.tensors.items())


class Gathered(TensorDataset):
    """Gives whole batches."""

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.tensors[0][indices], self.tensors[1][indices]


def test_ignored_rows_of_any_data_set() -> None:
    labels = torch.tensor([0, -100, 1, -100, 1])
    inputs = torch.arange(5.0)[:, None]
    listed = list(zip(inputs, labels, strict=True))
    gathered = Rows(Gathered(inputs, labels), torch.tensor([0, 2, 4]))
    for held in (without_ignored(TensorDataset(inputs, labels)), without_ignored(listed), gathered):
        batch = Batch.of(held, torch.tensor([2, 1]), torch.device("cpu"))
        assert len(held) == 3
        assert isinstance(batch.inputs, Tensor)
        assert batch.inputs.flatten().tolist() == [4, 2]
        assert batch.labels.tolist() == [1, 1]
    assert without_ignored(TEST) is TEST


def yes_or_no(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels.float())


def hits(labels: Any, probabilities: Any) -> float:
    """Twice the share of right answers."""
    return 2 * float(((probabilities[:, 1] > 0.5) == (labels == 1)).mean())


@pytest.mark.parametrize("run", [federated, split])
def test_one_logit_needs_a_metric(run: Any) -> None:
    with pytest.raises(InputError, match=r"one logit for an example.*metric=function"):
        run(network(outputs=1), clients(), TEST, loss=yes_or_no)
    model = network(outputs=1)
    found = run(model, clients(), TEST, loss=yes_or_no, metric=hits, rounds=3)
    with torch.no_grad():
        right = (found.model(TEST.tensors[0])[:, 0] > 0).long() == TEST.tensors[1]
    assert found.accuracy == pytest.approx(float(right.float().mean()))
    assert found.records[-1].metrics["hits"] == pytest.approx(2 * found.accuracy)
    with pytest.raises(InputError, match=r"client 1 has the label 2, .* 1 logit: .* in 0\.\.1"):
        run(network(outputs=1), labelled(lambda y: y * 2), TEST, loss=yes_or_no, metric=hits)


def test_an_own_metric_says_which_round_is_best() -> None:
    """Values that fall: with patience 1 the run ends after the second round."""
    values = iter([0.5, 0.4, 0.9])

    def falling(labels: Any, probabilities: Any) -> float:
        assert probabilities.shape == (len(labels), 2)
        return next(values)

    found = federated(network(), clients(), TEST, rounds=3, metric=falling, patience=1)
    assert [record.metrics["falling"] for record in found.records] == [0.5, 0.4]


@pytest.mark.parametrize(
    ("value", "line"),
    [(float("nan"), "metric bad gives nan"), ("three", "metric bad: ValueError: could not")],
)
def test_an_own_metric_that_fails_is_named(value: Any, line: str) -> None:
    def bad(labels: Any, probabilities: Any) -> Any:
        return value

    with pytest.raises(InputError, match=line):
        federated(network(), clients(), TEST, rounds=1, metric=bad)

    def auc(labels: Any, probabilities: Any) -> float:
        return 0.0

    with pytest.raises(InputError, match="not called auc"):
        federated(network(), clients(), TEST, rounds=1, metric=auc)


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
