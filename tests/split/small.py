"""Small real networks and pictures, and the unsplit training that a split one is held against."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from sluiceway.core.batches import Batch
from sluiceway.core.evaluation import label_counts
from sluiceway.core.round_loop import Record, Result, Rounds
from sluiceway.core.seeds import derive_seed
from sluiceway.core.settings import Optimisation
from sluiceway.split import (
    METHODS,
    SCHEDULES,
    Compressor,
    Conv4,
    SplitRecord,
    split_train,
)
from sluiceway.split.client import SplitClient
from sluiceway.split.rounds import SplitLoop
from sluiceway.split.setup import SharedSetup, SplitSettings
from sluiceway.strategies import FedAvg

CLASSES = 3
#: Every method by its name with one schedule, and ACP-SL with every schedule.
METHODS_AND_SCHEDULES = [
    # In a U-shape the server, which would rate channels, has no labels.
    *(pair for pair in zip(METHODS, cycle(SCHEDULES), strict=False) if pair != ("ics", "u")),
    ("ics", "parallel"),
    *(("acp-sl", schedule) for schedule in SCHEDULES if schedule != SCHEDULES[1]),
]
SGD = Optimisation(lr=0.05, batch_size=8, optimizer="sgd", momentum=0.9, local_epochs=2)
ADAMW = Optimisation(lr=0.01, batch_size=8, weight_decay=0.01)


class Pictures(TensorDataset):
    """Noise of [1, 6, 6] around a class's own pattern."""

    def __init__(self, size: int, seed: int, classes: int = CLASSES) -> None:
        g = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(classes, (size,), generator=g)
        patterns = torch.randn(classes, 1, 6, 6, generator=torch.Generator().manual_seed(77))
        images = torch.randn(size, 1, 6, 6, generator=g) + patterns[self.labels]
        super().__init__(images, self.labels)


def normed() -> nn.Sequential:
    """Four convolutions with BatchNorm: cut at `conv1`, `conv4`."""
    torch.manual_seed(0)
    return Conv4(1, CLASSES, width=8)


def plain(dropout: float = 0.2) -> nn.Sequential:
    """Without BatchNorm; behind both cuts a layer works in place, and dropout draws."""
    torch.manual_seed(0)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(1, 8, 3, padding=1),
        relu1=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(8, 8, 3, stride=2),
        drop=nn.Dropout(dropout),
        conv4=nn.Conv2d(8, 4, 1),
        relu2=nn.ReLU(inplace=True),
        flat=nn.Flatten(),
        head=nn.Linear(16, CLASSES),
    )
    return nn.Sequential(layers)


def flat_normed(front: bool = True) -> nn.Sequential:
    """BatchNorm of [B, C] behind `lin1`, and in front of it: no batch of one can train it."""
    torch.manual_seed(0)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        flat=nn.Flatten(),
        bn1=nn.BatchNorm1d(36) if front else nn.Identity(),
        lin1=nn.Linear(36, 8),
        bn2=nn.BatchNorm1d(8),
        lin2=nn.Linear(8, 8),
        head=nn.Linear(8, CLASSES),
    )
    return nn.Sequential(layers)


def unsplit(
    model: nn.Module,
    data: TensorDataset,
    rounds: int,
    training: Optimisation,
    seed: int = 0,
    before: Callable[[int], None] = lambda number: None,
) -> nn.Module:
    """Plain training of a whole network on client 0's batches in the order of a split run."""
    optimiser = training.optimiser(list(model.parameters()))
    images, labels = data.tensors
    model.train()
    for number in range(1, rounds + 1):
        before(number)
        torch.manual_seed(derive_seed(seed, number))
        generator = torch.Generator().manual_seed(derive_seed(seed, number, 0))
        for _ in range(training.local_epochs):
            order = torch.randperm(len(data), generator=generator)
            for part in order.split(training.batch_size):
                optimiser.zero_grad()
                functional.cross_entropy(model(images[part]), labels[part]).backward()
                optimiser.step()
    return model.eval()


def train(
    method: Compressor | str = "sl",
    sets: Sequence[TensorDataset] | None = None,
    *,
    model: nn.Module | None = None,
    test: TensorDataset | None = None,
    schedule: str = "parallel",
    **changed: Any,
) -> Result:
    """`split_train` on small networks and pictures."""
    settings: dict[str, Any] = {"cut_at": "conv1", "tail_at": tail_of(schedule), "rounds": 3}
    return split_train(
        normed() if model is None else model,
        clients=clients() if sets is None else sets,
        test=test or Pictures(9, 1),
        method=method,
        schedule=schedule,
        **settings | changed,
    )


def set_up(
    model: nn.Module,
    cut_at: str,
    sets: Sequence[TensorDataset],
    method: Compressor,
    test: TensorDataset | None = None,
    *,
    schedule: str = "parallel",
    tail_at: str | None = None,
    training: Optimisation = SGD,
) -> SplitLoop:
    """A run whose rounds a test runs itself."""
    settings = SplitSettings(
        cut_at,
        method,
        schedule,
        tail_at,
        FedAvg(),
        training,
        functional.cross_entropy,
        torch.device("cpu"),
        seed=0,
    )
    counts = label_counts(sets)
    example = Batch.of(sets[0], torch.tensor([0]), settings.device)
    setup = SharedSetup(model, settings, example, counts.shape[1], len(sets))
    proxies = [setup.client(number, examples) for number, examples in enumerate(sets)]
    return SplitLoop(setup, Rounds(), test or Pictures(40, 99), counts, proxies)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal bit for bit, names included."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def tail_of(schedule: str) -> str | None:
    return "conv4" if schedule == "u" else None


def clients() -> list[Pictures]:
    """Unequal clients: one holds a single example, one none."""
    return [Pictures(30, 1), Pictures(1, 2), Pictures(0, 3), Pictures(17, 4)]


def records(found: list[Record]) -> list[SplitRecord]:
    return [record for record in found if isinstance(record, SplitRecord)]


def numbers(found: list[Record]) -> list[dict[str, Any]]:
    return [record.as_dict() | {"seconds": 0} for record in found]


class Mask(nn.Module):
    """Channels that are dropped, as a layer of an unsplit network."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept.view(-1, 1, 1)


def accuracy_of(model: nn.Module, test: Pictures) -> float:
    return float((model(test.tensors[0]).argmax(1) == test.labels).double().mean())


def masked(front: nn.Module, mask: Tensor, back: nn.Module) -> nn.Sequential:
    layer = Mask()
    layer.kept = mask.float()
    return nn.Sequential(front, layer, back).eval()


def local(loop: SplitLoop) -> list[SplitClient]:
    """The clients of a run of this process."""
    return [client for client in loop.clients if isinstance(client, SplitClient)]
