"""What both sides of a split run know, and how either holds its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sluiceway.federated.client import Loss, Optimisation
from sluiceway.split.compress import Compressor


@dataclass(frozen=True)
class Terms:
    """What both sides know before the first step.

    Attributes:
        training: how layers train; optimisers live as long as the run.
        link: compression of smashed data.
        tail_link: in a U-shape, compression of what the server hands to the tail.
        loss: of (logits, labels), a mean over the batch.
        shape: of smashed data, without the batch.
        classes: labels are below it.
        device: where the layers run.
    """

    training: Optimisation
    link: Compressor
    tail_link: Compressor
    loss: Loss
    shape: tuple[int, ...]
    classes: int
    device: torch.device


def client_layers(front: nn.Module, tail: nn.Module | None) -> nn.ModuleDict:
    """What a client holds, as one module: "front" and, in a U-shape, "tail"."""
    return nn.ModuleDict({"front": front} | ({"tail": tail} if tail is not None else {}))


def optimiser_of(layers: nn.Module, training: Optimisation) -> torch.optim.Optimizer | None:
    """An optimiser of what is trained in the layers; None if nothing is."""
    trained = [p for p in layers.parameters() if p.requires_grad]
    return training.optimiser(trained) if trained else None


def training_mode(layers: nn.Module, still: Sequence[nn.Module]) -> None:
    """Training mode, but for modules that are wholly frozen."""
    layers.train()
    for module in still:
        module.eval()
