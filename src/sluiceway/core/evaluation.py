"""Accuracy by class, so that it can be read for the whole and for each client's mix of labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sluiceway.core.batches import Batch, Examples, labels_of, without_ignored
from sluiceway.core.waits import counted

#: Of (labels [N], probabilities [N, K]), numpy arrays, to a number of which more is better.
Metric = Callable[[Any, Any], float]
#: Examples a forward pass; bigger than in training, for nothing is kept for a backward.
BATCH = 64
#: Probabilities that are kept of an evaluation, at most (80 MB): beyond, there is no AUC.
SCORES_LIMIT = 20_000_000


@dataclass(frozen=True)
class Evaluation:
    """Counts over some test examples; they add up.

    Attributes:
        correct: right answers by true class, [C] int64.
        total: examples by true class, [C] int64.
        loss: sum of the examples' losses.
        confusion: examples by true and predicted class, [K, K] int64 with K >= C.
        scores: of each batch labels [B] int64 and probabilities [B, K] float32; () where they are
            not kept.
    """

    correct: Tensor
    total: Tensor
    loss: float
    confusion: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    scores: tuple[tuple[Tensor, Tensor], ...] = ()

    @staticmethod
    def nothing() -> Evaluation:
        """What a sum begins with."""
        return Evaluation(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 0.0)

    @staticmethod
    def of(
        logits: Tensor,
        labels: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        classes: int,
        *,
        scores: bool = False,
    ) -> Evaluation:
        """Counts of one batch: logits [B, K], labels [B] below `classes`, on one device.

        A single logit z is read as that of class 1: p = sigmoid(z), class 1 where z > 0.
        """
        summed = float(loss(logits, labels)) * len(labels)
        if logits.shape[-1] == 1:
            logits = torch.cat((torch.zeros_like(logits), logits), -1)
        guessed, labels = logits.argmax(-1).cpu(), labels.cpu()
        correct = torch.bincount(labels[guessed == labels], minlength=classes)
        size = max(classes, logits.shape[-1])
        confusion = torch.bincount(labels * size + guessed, minlength=size * size)
        return Evaluation(
            correct,
            torch.bincount(labels, minlength=classes),
            summed,
            confusion.view(size, size),
            ((labels, logits.float().softmax(-1).cpu()),) if scores else (),
        )

    def __add__(self, other: Evaluation) -> Evaluation:
        classes = max(len(self.total), len(other.total))
        return Evaluation(
            widened(self.correct, classes) + widened(other.correct, classes),
            widened(self.total, classes) + widened(other.total, classes),
            self.loss + other.loss,
            squared(self.confusion, other.confusion),
            self.scores + other.scores,
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


def squared(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two square matrices of counts, the smaller one with zeros after it."""
    size = max(len(a), len(b))
    return widened(widened(a.T, size).T, size) + widened(widened(b.T, size).T, size)


def label_counts(clients: Sequence[Examples]) -> Tensor:
    """Who holds what, [clients, classes] int64."""
    found = [torch.bincount(labels_of(c)) if len(c) else torch.zeros(0).long() for c in clients]
    width = max((len(counts) for counts in found), default=0)
    return torch.stack([widened(c, width) for c in found]) if found else torch.zeros(0, 0).long()


def usable_examples(
    clients: Sequence[Examples], test: Examples, local_tests: Sequence[Examples] = ()
) -> tuple[list[Examples], Examples, list[Examples]]:
    """The data sets without examples of the label -100, checked before anything is trained.

    Whether the model has so many outputs `require_outputs` checks.

    Raises:
        ValueError: the test set is empty, or a label is no class number (the message names the data
            set).
    """
    found: list[Examples] = []
    for what, held in named_sets(clients, test, local_tests):
        try:
            kept = without_ignored(held)
            low = int(labels_of(kept).min()) if len(kept) else 0
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        if low < 0:
            raise ValueError(f"{what} has the label {low}: labels must be class numbers from 0")
        found.append(kept)
    *held_sets, test = found
    if not len(test):
        raise ValueError("the test set is empty: there is nothing to evaluate on")
    return held_sets[: len(clients)], test, held_sets[len(clients) :]


def named_sets(
    clients: Sequence[Examples], test: Examples, local_tests: Sequence[Examples] = ()
) -> list[tuple[str, Examples]]:
    """The clients' data sets, their test parts and the test set with what an error calls them."""
    parts = [(f"client {number}", held) for number, held in enumerate(clients)]
    own = [(f"the test part of client {number}", held) for number, held in enumerate(local_tests)]
    return [*parts, *own, ("the test set", test)]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Examples,
    indices: Sequence[int],
    loss: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> Evaluation:
    """The model, as it is, on the examples at these positions; leaves it in evaluation mode.

    Raises:
        ValueError: the model's logits do not tell the test set's classes.
    """
    model.eval()
    classes = int(labels_of(examples).max()) + 1 if len(examples) else 0
    none = torch.zeros(classes, dtype=torch.int64)
    found = Evaluation(none, none, 0.0)
    parts = torch.as_tensor(indices, dtype=torch.int64).split(BATCH)
    for part in counted("evaluation", parts, len(parts)):
        if len(part):
            batch = Batch.of(examples, part, device)
            logits = batch.run(model)
            require_outputs(logits.shape[-1], classes - 1, "the test set")
            kept = len(examples) * logits.shape[-1] <= SCORES_LIMIT
            found += Evaluation.of(logits, batch.labels, loss, classes, scores=kept)
    return found


def require_outputs(outputs: int, label: int, what: str) -> None:
    """Raise ValueError where a label is beyond those that the model's logits tell apart.

    Args:
        outputs: logits of an example; one tells two classes.
        label: the greatest of the data set.
        what: the data set, as "client 3".
    """
    classes = max(outputs, 2)
    if label >= classes:
        logits = "1 logit" if outputs == 1 else f"{outputs} logits"
        raise ValueError(
            f"{what} has the label {label}, and the model gives {logits}: labels must be in "
            f"0..{classes - 1}"
        )


def require_fitting(
    logits: Tensor,
    clients: Sequence[Examples],
    test: Examples,
    metric: str | Metric,
    local_tests: Sequence[Examples] = (),
) -> None:
    """Check before training that a model's logits of a few examples fit every label.

    Args:
        logits: what the model gives.
        metric: by which rounds are compared. With one of the user's own a single logit z is
            allowed: class 1 is where z > 0.
        local_tests: test parts of clients.

    Raises:
        ValueError: these are no logits [B, C]; a label is beyond them (the message names the data
            set, the label and the range); a single logit without a metric that says so.
    """
    if logits.ndim != 2:
        raise ValueError(
            f"the model gives logits {list(logits.shape)} for {len(logits)} examples; expected "
            "[B, C], a row for each example and a number for each class"
        )
    if logits.shape[1] < 2 and isinstance(metric, str):
        raise ValueError(
            "the model gives one logit for an example; accuracy needs one for each class, two for "
            "yes and no. If its loss takes one, say so by a metric of your own: metric=function "
            "of (labels, probabilities); class 1 is then where the logit is above 0"
        )
    for what, held in named_sets(clients, test, local_tests):
        if len(held):
            require_outputs(logits.shape[1], int(labels_of(held).max()), what)
