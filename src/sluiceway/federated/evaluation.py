"""Accuracy by class, so that it can be read for the whole and for each client's mix of labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sluiceway.federated.batches import Batch, Examples, labels_of

#: Examples a forward pass; bigger than in training, for nothing is kept for a backward.
BATCH = 64


@dataclass(frozen=True)
class Evaluation:
    """Counts over some test examples; they add up.

    Attributes:
        correct: right answers by true class, [C] int64.
        total: examples by true class, [C] int64.
        loss: sum of the examples' losses.
    """

    correct: Tensor
    total: Tensor
    loss: float

    @staticmethod
    def nothing() -> Evaluation:
        """What a sum begins with."""
        return Evaluation(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 0.0)

    def __add__(self, other: Evaluation) -> Evaluation:
        classes = max(len(self.total), len(other.total))
        return Evaluation(
            widened(self.correct, classes) + widened(other.correct, classes),
            widened(self.total, classes) + widened(other.total, classes),
            self.loss + other.loss,
        )

    @property
    def accuracy(self) -> float:
        """Share of right answers, in [0, 1]; 0 if there was nothing to answer."""
        return int(self.correct.sum()) / max(int(self.total.sum()), 1)

    @property
    def mean_loss(self) -> float:
        """Mean loss per example."""
        return self.loss / max(int(self.total.sum()), 1)

    def weighted_accuracy(self, counts: Tensor) -> float:
        """sum_y share(y) * accuracy(y), share from label counts [<= C]; untested classes left out.

        NaN where none of the labels was tested.
        """
        counts = widened(counts.double(), len(self.total)) * (self.total > 0)
        by_class = self.correct.double() / self.total.clamp_min(1)
        return float((counts * by_class).sum() / counts.sum())


def widened(counts: Tensor, classes: int) -> Tensor:
    """Counts [C] with zeros behind them up to `classes` entries (cut if there are more)."""
    out = counts.new_zeros(classes)
    out[: len(counts)] = counts[:classes]
    return out


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Examples,
    indices: Sequence[int],
    loss: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> Evaluation:
    """The model as it stands on the examples at these positions; leaves it in evaluation mode."""
    model.eval()
    classes = int(labels_of(examples).max()) + 1 if len(examples) else 0
    correct, total = torch.zeros(2, classes, dtype=torch.int64)
    summed = 0.0
    for part in torch.as_tensor(indices, dtype=torch.int64).split(BATCH):
        if not len(part):
            continue
        batch = Batch.of(examples, part, device)
        logits = batch.run(model)
        labels = batch.labels.cpu()
        hits = labels[logits.argmax(-1).cpu() == labels]
        correct += torch.bincount(hits, minlength=classes)
        total += torch.bincount(labels, minlength=classes)
        summed += float(loss(logits, batch.labels)) * len(part)
    return Evaluation(correct, total, summed)
