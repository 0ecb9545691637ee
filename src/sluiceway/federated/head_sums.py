"""What one client sends for the closed-form start of the head; see `core.head_start`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sluiceway import fedalign
from sluiceway.core.batches import Batch, Examples
from sluiceway.core.evaluation import BATCH
from sluiceway.core.head_start import HeadStart, HeadSums
from sluiceway.core.privacy import feature_size
from sluiceway.core.signals import check_stop
from sluiceway.errors import InputError
from sluiceway.federated.client import Worker


def head_sums(worker: Worker, number: int, kind: HeadStart) -> HeadSums:
    """The sums of client `number` under the initial model, in evaluation mode.

    Raises:
        InputError: the logits are not what the model's last layer gives.
    """
    head = worker.model.get_submodule(worker.layout.head[0].rpartition(".")[0])
    assert isinstance(head, nn.Linear)
    size = head.in_features + 1
    labels = torch.zeros(head.out_features, size, dtype=torch.float64, device=worker.device)
    gram = torch.zeros(size, size, dtype=torch.float64, device=worker.device)
    for features, truth in head_inputs(worker, worker.clients[number], head):
        labels += fedalign.label_sums(features, truth, head.out_features)
        if kind == "ridge":
            gram += fedalign.gram(features)
    tensors = {"labels": labels.float().cpu()}
    if (privacy := worker.strategy.privacy) is not None:
        tensors["labels"] = privacy.head_sent(tensors["labels"], number)
    if kind == "ridge":
        tensors["gram"] = fedalign.packed_triangle(gram).float().cpu()
    return HeadSums(number, tensors)


def test_feature_size(worker: Worker) -> float:
    """The mean norm of what enters the head, over the first test examples."""
    head = worker.model.get_submodule(worker.layout.head[0].rpartition(".")[0])
    assert isinstance(head, nn.Linear)
    found = head_inputs(worker, worker.test, head, most=BATCH)
    return feature_size(features for features, _ in found)


@torch.no_grad()
def head_inputs(
    worker: Worker, examples: Examples, head: nn.Linear, most: int = 1 << 62
) -> Iterator[tuple[Tensor, Tensor]]:
    """What enters the head, [B, d], and the labels [B] of the first `most` examples, by batches."""
    worker.load(worker.strategy.tensors)
    worker.model.eval()
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    try:
        for rows in torch.arange(min(most, len(examples))).split(BATCH):
            check_stop()
            batch = Batch.of(examples, rows, worker.device)
            seen.clear()
            with worker.training.precision(worker.device):
                logits = batch.run(worker.model)
            if len(seen) != 1 or not torch.equal(seen[0][1].to(logits.dtype), logits):
                raise InputError(
                    "model.head_start: the model's logits are not what its last layer gives; "
                    "use 'random'"
                )
            yield seen[0][0], batch.labels
    finally:
        hook.remove()
