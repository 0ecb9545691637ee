"""The global network on the test set: as deployed, and with nothing dropped or rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sluiceway.core.batches import Batch, Examples, labels_of
from sluiceway.core.evaluation import BATCH, Evaluation
from sluiceway.split.config import SplitConfig
from sluiceway.split.header import BatchId
from sluiceway.split.mask_selector import ALL


@dataclass(frozen=True)
class SplitEvaluation:
    """What the test set says.

    Attributes:
        deployed: with the mask and the rounding of training, by client, or of `ALL` if all clients
            have the same mask.
        full: with nothing dropped or rounded.
    """

    deployed: Mapping[int, Evaluation]
    full: Evaluation

    def of(self, client: int) -> Evaluation:
        """As deployed with the client's mask."""
        return self.deployed[client if client in self.deployed else ALL]

    def mean(self, sizes: Sequence[int]) -> tuple[float, float]:
        """Accuracy and loss as deployed, the mean over clients by how many examples they hold."""
        if ALL in self.deployed:
            return self.deployed[ALL].accuracy, self.deployed[ALL].mean_loss
        weights = {client: sizes[client] / sum(sizes) for client in self.deployed}
        return (
            sum(weights[c] * found.accuracy for c, found in self.deployed.items()),
            sum(weights[c] * found.mean_loss for c, found in self.deployed.items()),
        )


class Evaluator:
    """Evaluates on the global test set.

    Args:
        test: the test set.
        terms: what both sides know.
    """

    def __init__(self, test: Examples, terms: SplitConfig) -> None:
        self.test, self.terms = test, terms
        self.classes = int(labels_of(test).max()) + 1 if len(test) else 0

    @torch.no_grad()
    def judge(
        self,
        front: nn.Module,
        middle: nn.Module,
        tail: nn.Module | None,
        masks: Mapping[int, Tensor | None],
    ) -> SplitEvaluation:
        """The verdict with these masks, [C] bool or None, by client or for `ALL`.

        The front runs once for all masks, and equal masks are evaluated once. Leaves the layers in
        evaluation mode.
        """
        for layers in (front, middle, tail):
            if layers is not None:
                layers.eval()
        distinct = {key_of(mask): mask for mask in masks.values()}
        whole = {key for key, mask in distinct.items() if not self._loses(mask)}
        nothing = Evaluation.nothing()
        found, full = dict.fromkeys(distinct, nothing), nothing
        for number, part in enumerate(torch.arange(len(self.test)).split(BATCH)):
            if not len(part):
                continue
            batch = Batch.of(self.test, part, self.terms.device)
            values = batch.run(front)
            for key in distinct.keys() - whole:
                logits = self._deployed(values, number, distinct[key], middle, tail)
                found[key] += self._counts(logits, batch.labels)
            # Last, since layers that work in place may change the values.
            logits = middle(values)
            full += self._counts(logits if tail is None else tail(logits), batch.labels)
        found |= dict.fromkeys(whole, full)
        return SplitEvaluation(
            {client: found[key_of(mask)] for client, mask in masks.items()}, full
        )

    def _loses(self, mask: Tensor | None) -> bool:
        """Whether anything is dropped or rounded on its way."""
        links = self.terms.link, self.terms.tail_link
        exact = all(link.codec == "none" and not link.elements for link in links)
        return not exact or (mask is not None and not bool(mask.all()))

    def _deployed(
        self,
        values: Tensor,
        number: int,
        mask: Tensor | None,
        middle: nn.Module,
        tail: nn.Module | None,
    ) -> Tensor:
        """Logits by way of the messages that training sends, but without chance in the choice."""
        link, tail_link = self.terms.link, self.terms.tail_link
        name = BatchId(0, 0, number)
        message, _ = link.up(values, name, mask=mask, training=False)
        out: Tensor = middle(link.open(message, device=self.terms.device).values)
        if tail is not None:
            message, _ = tail_link.up(out, name, training=False)
            out = tail(tail_link.open(message, device=self.terms.device).values)
        return out

    def _counts(self, logits: Tensor, labels: Tensor) -> Evaluation:
        return Evaluation.of(logits, labels, self.terms.loss, self.classes)


def key_of(mask: Tensor | None) -> bytes:
    """Equal for equal masks."""
    return b"" if mask is None else mask.cpu().numpy().tobytes()
