"""Forms of inputs and outputs that a user's own data and model may have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.worlds import TinyText
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sluiceway
from sluiceway.core.settings import Training
from sluiceway.errors import InputError
from sluiceway.federated.client import Worker, prepare
from sluiceway.strategies import Broadcast, FedAvg

A, B = (torch.randn(24, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
Y = (A[:, 0] + B[:, 0] > 0).long()
SGD = Training(lr=0.1, batch_size=8, optimizer="sgd")


class Linear(nn.Module):
    """Logits of one tensor, of two side by side, or with the weights' size beside them."""

    def __init__(self, own: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 2)
        self.own = own

    def forward(self, *parts: Tensor) -> Any:
        logits = self.head(torch.cat(parts, 1))
        return (logits, self.own * self.head.weight.square().sum()) if self.own else logits


def federated(model: nn.Module, *inputs: Tensor, **how: Any) -> dict[str, Tensor]:
    held = [TensorDataset(*(t[rows] for t in (*inputs, Y))) for rows in (slice(10), slice(10, 24))]
    pairs = [Pairs(one) if len(inputs) > 1 else one for one in held]
    found = sluiceway.federate(model, pairs, pairs[0], training=SGD, rounds=2, device="cpu", **how)
    assert [record.failed for record in found.records] == [{}, {}]
    return found.tensors


class Pairs:
    """Examples of ((a, b), label)."""

    def __init__(self, held: TensorDataset) -> None:
        self.held = held

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> Any:
        *inputs, label = self.held[index]
        return tuple(inputs), label


@pytest.mark.parametrize("stacked", [1, 2])
def test_tuples_are_arguments(stacked: int) -> None:
    joined = federated(Linear(), torch.cat([A, B], 1), stacked=stacked)
    paired = federated(Linear(), A, B, stacked=stacked)
    assert all(torch.equal(value, paired[name]) for name, value in joined.items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_models_own_loss_is_trained(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(lr=0.1, batch_size=8 // accumulate, accumulate=accumulate, optimizer="sgd")
    monkeypatch.setitem(globals(), "SGD", training)
    model = Linear()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) + 0.3 * model.head.weight.square().sum()

    wanted = federated(model, torch.cat([A, B], 1), loss=loss, stacked=1)
    found = federated(Linear(own=0.3), torch.cat([A, B], 1))
    plain = federated(Linear(), torch.cat([A, B], 1))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
        assert not torch.allclose(plain[name], value, atol=1e-3)


def test_where_an_own_loss_is_refused() -> None:
    with pytest.raises(InputError, match="logits, auxiliary loss"):
        federated(Linear(own=0.3), torch.cat([A, B], 1), stacked=2)
    held = [TensorDataset(torch.cat([A, B], 1), Y)]
    with pytest.raises(InputError, match="split training not at all"):
        sluiceway.split_train(Linear(own=0.3), "head", held, held[0], rounds=1)


class Answers(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.head(x))


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (lambda z: (z, z), r"returns a tuple of 2 \(\[2, 2\], \[2, 2\]\): expected logits"),
        (lambda z: {"logits": z}, "returns a dict: expected logits"),
        (lambda z: z[:, None], r"logits \[2, 1, 2\] for 2 examples; expected \[B, C\]"),
    ],
)
def test_other_outputs_are_refused_at_the_start(answer: Any, line: str) -> None:
    with pytest.raises(InputError, match=line):
        federated(Answers(answer), A)


class Ragged:
    """Rows of 3 to 6 values, whose sum tells the label."""

    def __init__(self) -> None:
        self.rows = [A.flatten()[n : n + 3 + n % 4] for n in range(12)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.rows[index], int(self.rows[index].sum() > 0)


class Padded(Ragged):
    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        rows = [self[int(i)] for i in indices]
        inputs = nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True)
        return F.pad(inputs, (0, 8 - inputs.shape[1])), torch.tensor([label for _, label in rows])


def test_rows_of_different_lengths() -> None:
    with pytest.raises(InputError, match=r"\(\[3\] and \[4\]\) make no batch: pad them, or give"):
        sluiceway.federate(Linear(), [Ragged()], Ragged(), rounds=1, device="cpu")
    found = sluiceway.federate(Linear(), [Padded()], Padded(), rounds=1, device="cpu")
    assert found.records[0].failed == {}


class Pooled(nn.Module):
    """A mixture of experts behind the mean over a text's tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16)
        self.mixture = Mixture()
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(-1)
        pooled = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.head(self.mixture(pooled))
        return logits


class Mixture(nn.Module):
    """Two of four linear experts a row."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.router = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        picked = outputs.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 16))
        return (weights.unsqueeze(-1) * picked).sum(1)


@pytest.mark.parametrize("method", ["fedavg", "fedalign-moe"])
def test_a_mixture_of_other_tokens_than_the_masks(method: str) -> None:
    clients = [TinyText(12, seed) for seed in (1, 2)]
    with pytest.raises(InputError, match=r"16 entries, but 2 tokens reach router mixture\.router"):
        sluiceway.federate(Pooled(), clients, TinyText(9, 3), method, rounds=1, device="cpu")
    training = Training(routing_mask="none", aux_loss=0.01)
    found = sluiceway.federate(
        Pooled(), clients, TinyText(9, 3), method, rounds=1, training=training, device="cpu"
    )
    assert found.records[0].failed == found.records[0].rejected == {}


def test_every_pooled_text_counts() -> None:
    """12 texts, k = 2: 24 choices, which a loop over the texts gives expert by expert."""
    model, strategy, data = Pooled(), FedAvg(), TinyText(12, 1)
    prepare(model, strategy, 1)
    training = Training(routing_mask="none", lr=1e-12, batch_size=5, optimizer="sgd")
    worker = Worker(model, [data], TinyText(4, 2), strategy, training)
    update = worker.train(0, Broadcast(1, strategy.tensors), {}, personal=False)
    wanted = [0] * 4
    for inputs, _ in (data[i] for i in range(12)):
        ids = inputs["input_ids"][inputs["attention_mask"].bool()]
        for e in model.mixture.router(model.embedding(ids).mean(0)).topk(2).indices.tolist():
            wanted[e] += 1
    assert update.routing[0].load.tolist() == wanted


def test_no_mask_of_a_dense_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"routing_mask .* has no effect here"):
        sluiceway.federate(
            Linear(),
            [TensorDataset(torch.cat([A, B], 1), Y)],
            TensorDataset(torch.cat([A, B], 1), Y),
            training=Training(routing_mask="none"),
            device="cpu",
        )
