"""What both sides of a split run know, and how either holds its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sluiceway.core.batches import Loss
from sluiceway.core.settings import Optimisation
from sluiceway.split.compress import Compressor


@dataclass(frozen=True)
class SplitConfig:
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


def counts_in(layers: nn.Module) -> dict[str, Tensor]:
    """BatchNorm's counts of batches by name, which are not averaged; not copied."""
    return {name: b for name, b in layers.named_buffers() if b.dtype == torch.int64}


def batch_sizes(examples: int, training: Optimisation, smallest: int) -> list[int]:
    """Sizes of a client's batches of a round; a last one that is too small is left out.

    Args:
        examples: how many it holds.
        smallest: see `SplitModel`.
    """
    whole, rest = divmod(examples, training.batch_size)
    last = [rest] if rest >= max(smallest, 1) else []
    return ([training.batch_size] * whole + last) * training.local_epochs


def optimiser_of(layers: nn.Module, training: Optimisation) -> torch.optim.Optimizer | None:
    """An optimiser of what is trained in the layers; None if nothing is."""
    trained = [p for p in layers.parameters() if p.requires_grad]
    return training.optimiser(trained) if trained else None


def training_mode(layers: nn.Module, still: Sequence[nn.Module]) -> None:
    """Training mode, but for modules that are wholly frozen."""
    layers.train()
    for module in still:
        module.eval()


def optimiser_state(optimiser: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """What an optimiser remembers of each parameter, as `index/name`; not copied."""
    if optimiser is None:
        return {}
    return {
        f"{index}/{name}": value
        for index, held in optimiser.state_dict()["state"].items()
        for name, value in held.items()
        if value is not None
    }


def load_optimiser(optimiser: torch.optim.Optimizer | None, state: Mapping[str, Tensor]) -> None:
    """Continue from what `optimiser_state` gave; the settings stay as they are."""
    if optimiser is None:
        return
    held: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        index, name = key.split("/")
        held.setdefault(int(index), {})[name] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": held, "param_groups": groups})


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Several sets of named tensors as one, as `part/name`."""
    return {f"{part}/{name}": t for part, held in parts.items() for name, t in held.items()}
