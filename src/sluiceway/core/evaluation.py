"""Accuracy by class, so that it can be read for the whole and for each client's mix of labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sluiceway.core.batches import Batch, Examples, labels_of

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

    @staticmethod
    def of(
        logits: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor], classes: int
    ) -> Evaluation:
        """Counts of one batch: logits [B, C], labels [B] below `classes`, on one device."""
        summed = float(loss(logits, labels)) * len(labels)
        guessed, labels = logits.argmax(-1).cpu(), labels.cpu()
        correct = torch.bincount(labels[guessed == labels], minlength=classes)
        return Evaluation(correct, torch.bincount(labels, minlength=classes), summed)

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
        return self.weighted_accuracies(counts[None])[0]

    def accuracy_by_client(self, label_counts: Tensor) -> list[float | None]:
        """`weighted_accuracy` of each client, from [clients, C]; None of one without examples."""
        sizes = label_counts.sum(1).tolist()
        found = self.weighted_accuracies(label_counts)
        return [value if size else None for value, size in zip(found, sizes, strict=True)]

    def weighted_accuracies(self, label_counts: Tensor) -> list[float]:
        """`weighted_accuracy` of each row of [N, C]."""
        tested = widened(label_counts.double(), len(self.total)) * (self.total > 0)
        by_class = self.correct.double() / self.total.clamp_min(1)
        found: list[float] = ((tested * by_class).sum(1) / tested.sum(1)).tolist()
        return found


def widened(counts: Tensor, classes: int) -> Tensor:
    """Counts [..., C] with zeros after them up to `classes` entries (cut if there are more)."""
    out = counts.new_zeros(*counts.shape[:-1], classes)
    out[..., : counts.shape[-1]] = counts[..., :classes]
    return out


def label_counts(clients: Sequence[Examples]) -> Tensor:
    """Who holds what, [clients, classes] int64."""
    found = [torch.bincount(labels_of(c)) if len(c) else torch.zeros(0).long() for c in clients]
    width = max((len(counts) for counts in found), default=0)
    return torch.stack([widened(c, width) for c in found]) if found else torch.zeros(0, 0).long()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Examples,
    indices: Sequence[int],
    loss: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> Evaluation:
    """The model, as it is, on the examples at these positions; leaves it in evaluation mode."""
    model.eval()
    classes = int(labels_of(examples).max()) + 1 if len(examples) else 0
    none = torch.zeros(classes, dtype=torch.int64)
    found = Evaluation(none, none, 0.0)
    for part in torch.as_tensor(indices, dtype=torch.int64).split(BATCH):
        if len(part):
            batch = Batch.of(examples, part, device)
            found += Evaluation.of(batch.run(model), batch.labels, loss, classes)
    return found
