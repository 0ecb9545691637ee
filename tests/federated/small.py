"""One round of one client on a tiny classifier."""

from __future__ import annotations

from typing import Any

import torch
from tests.worlds import TinyClassifier, TinyText
from torch import Tensor, nn

from sluiceway.core.settings import Training
from sluiceway.federated.client import Worker, prepare
from sluiceway.strategies import Strategy, Update


def tiny(dtype: torch.dtype = torch.float32, dropout: float = 0.1) -> TinyClassifier:
    model = TinyClassifier()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model.to(dtype)


def one_round(
    model: nn.Module, strategy: Strategy, training: Training, **kwargs: Any
) -> tuple[Worker, Update]:
    """One client's first round."""
    prepare(model, strategy, 1)
    worker = Worker(model, [TinyText(30, 1)], TinyText(9, 2), strategy, training, seed=3, **kwargs)
    return worker, worker.train(0, strategy.broadcast(1), {}, personal=False)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}
