"""The global network on the test set: as deployed, and with nothing dropped or rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sluiceway.channels import Basis
from sluiceway.core.batches import Batch, Examples, labels_of
from sluiceway.core.evaluation import BATCH, SCORES_LIMIT, Evaluation, Metric
from sluiceway.core.metrics import METRICS, metrics_of, name_of
from sluiceway.split.config import SplitConfig, SplitModel
from sluiceway.split.deployed import DeployedNetwork
from sluiceway.split.mask_selector import ALL


@dataclass(frozen=True)
class SplitEvaluation:
    """The global network's evaluation on the test set.

    Attributes:
        deployed: with the mask and the rounding of training, by client, or of `ALL` if all clients
            have the same mask.
        full: with nothing dropped or rounded.
        nbytes: that cross for a prediction, by client or of `ALL`, in batches as the test set's
            first.
    """

    deployed: Mapping[int, Evaluation]
    full: Evaluation
    nbytes: Mapping[int, float]

    def of(self, client: int) -> Evaluation:
        """As deployed with the client's mask."""
        return self.deployed[client if client in self.deployed else ALL]

    def mean(self, sizes: Sequence[int]) -> tuple[float, float]:
        """Accuracy and loss as deployed, the mean over clients by how many examples they hold."""
        return (
            over_clients({c: found.accuracy for c, found in self.deployed.items()}, sizes),
            over_clients({c: found.mean_loss for c, found in self.deployed.items()}, sizes),
        )

    def metrics(self, sizes: Sequence[int], metric: str | Metric = "accuracy") -> dict[str, float]:
        """`metrics_of` as deployed, the mean over clients as in `mean`."""
        measured = {client: metrics_of(found, metric) for client, found in self.deployed.items()}
        names = set.intersection(*(set(values) for values in measured.values()))
        return {
            name: over_clients({c: values[name] for c, values in measured.items()}, sizes)
            for name in (*METRICS, name_of(metric))
            if name in names
        }

    def confusion(self) -> Tensor:
        """Examples by true and predicted class, [K, K], as deployed with every client's mask."""
        return sum(self.deployed.values(), Evaluation.nothing()).confusion


class Evaluator:
    """Evaluates on the global test set.

    Args:
        test: the test set.
        config: what both sides know.
    """

    def __init__(self, test: Examples, config: SplitConfig) -> None:
        self.test, self.config = test, config
        self.classes = int(labels_of(test).max()) + 1 if len(test) else 0

    @torch.no_grad()
    def evaluate(
        self, model: SplitModel, masks: Mapping[int, Tensor | None], basis: Basis | None = None
    ) -> SplitEvaluation:
        """Evaluate with these masks, [C] bool or None, by client or for `ALL`, and in this basis.

        The front runs once for all masks, and equal masks are evaluated once. Leaves the layers in
        evaluation mode.
        """
        for layers in model.parts():
            layers.eval()
        keys = {client: key_of(mask) for client, mask in masks.items()}
        distinct = {keys[client]: mask for client, mask in masks.items()}
        exact = {key for key, mask in distinct.items() if self._is_exact(mask)}
        inexact = distinct.keys() - exact
        found, full = dict.fromkeys(distinct, Evaluation.nothing()), Evaluation.nothing()
        deployed = {
            key: DeployedNetwork.of(model, self.config, mask, basis)
            for key, mask in distinct.items()
        }
        nbytes = dict.fromkeys(distinct, 0.0)
        for part in torch.arange(len(self.test)).split(BATCH):
            if not len(part):
                continue
            batch = Batch.of(self.test, part, self.config.device)
            values = batch.run(model.front)
            if not part[0]:
                sizes = {key: network.nbytes(values) for key, network in deployed.items()}
                nbytes = {key: size / len(part) for key, size in sizes.items()}
            for key in inexact:
                found[key] += self._evaluation(deployed[key].onward(values), batch.labels)
            # Last, since layers that work in place may change the values.
            logits = model.back(values)
            full += self._evaluation(
                logits if model.tail is None else model.tail(logits), batch.labels
            )
        found |= dict.fromkeys(exact, full)
        by_client = {client: found[key] for client, key in keys.items()}
        return SplitEvaluation(by_client, full, {c: nbytes[key] for c, key in keys.items()})

    def _is_exact(self, mask: Tensor | None) -> bool:
        """Whether nothing is dropped or rounded on its way."""
        links = self.config.link.deployed, self.config.tail_link
        exact = all(link.codec == "none" and not link.elements and not link.noise for link in links)
        return exact and (mask is None or bool(mask.all()))

    def _evaluation(self, logits: Tensor, labels: Tensor) -> Evaluation:
        kept = len(self.test) * logits.shape[-1] <= SCORES_LIMIT
        return Evaluation.of(logits, labels, self.config.loss, self.classes, scores=kept)


def over_clients(values: Mapping[int, float], sizes: Sequence[int]) -> float:
    """The mean over clients by how many examples they hold; of `ALL` its own value."""
    if ALL in values:
        return values[ALL]
    return sum(sizes[client] / sum(sizes) * value for client, value in values.items())


def key_of(mask: Tensor | None) -> bytes:
    """Equal for equal masks."""
    return b"" if mask is None else mask.cpu().numpy().tobytes()
