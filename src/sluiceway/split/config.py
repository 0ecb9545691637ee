"""What both sides of a split run know and hold: the cut network, its settings, optimiser state."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from sluiceway.core.batches import Loss
from sluiceway.core.parameters import frozen_modules
from sluiceway.core.settings import Optimisation, SplitTraining
from sluiceway.split.compress import Compressor


class SplitModel(NamedTuple):
    """A cut network, as the method trains it.

    Attributes:
        front, back, tail: its parts; tail None but in a U-shape.
        channels: C at the cut, before the method changed the parts.
        shape: of what crosses, without the batch.
        tail_shape: of what the server hands to the tail, without the batch; () without one.
        smallest: (client's, server's) smallest batch that its layers can train on.
    """

    front: nn.Sequential
    back: nn.Sequential
    tail: nn.Sequential | None
    channels: int
    shape: tuple[int, ...]
    tail_shape: tuple[int, ...]
    smallest: tuple[int, int]

    def client_layers(self) -> nn.ModuleDict:
        """What a client holds, as one module: "front" and, in a U-shape, "tail"."""
        parts = {"front": self.front, "tail": self.tail}
        return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})

    def parts(self) -> list[nn.Sequential]:
        """Front, back and tail, in the order in which they run."""
        return [part for part in (self.front, self.back, self.tail) if part is not None]


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
        gradients: clients train layers before the cut, or rate channels by the gradient: it is
            sent.
    """

    training: Optimisation
    link: Compressor
    tail_link: Compressor
    loss: Loss
    shape: tuple[int, ...]
    classes: int
    device: torch.device
    gradients: bool = True

    @property
    def recalibrate(self) -> int:
        """How many of a client's last batches in a round cross as in use."""
        return self.training.recalibrate if isinstance(self.training, SplitTraining) else 0

    def finer(self, batch: int, count: int) -> bool:
        """Whether a batch is one of these, of so many that a client has in a round."""
        return batch >= count - self.recalibrate

    @cached_property
    def finer_link(self) -> Compressor:
        """Compression of these."""
        return self.link.deployed

    def epoch_batches(self, examples: int, smallest: int = 1, epochs: int = 1) -> BatchSizes:
        """Sizes of the batches of so many epochs; a last one below `smallest` is left out."""
        whole, rest = divmod(examples, self.training.batch_size)
        return BatchSizes(
            self.training.batch_size, whole, rest if rest >= max(smallest, 1) else 0, epochs
        )


@dataclass(frozen=True)
class BatchSizes(Sequence[int]):
    """Sizes of a client's batches, which are not held: how many there are a client says itself.

    Attributes:
        size, whole: of an epoch's whole batches, and how many.
        rest: of its last batch, 0 for none.
        epochs: >= 1.
    """

    size: int
    whole: int
    rest: int
    epochs: int

    def __len__(self) -> int:
        return self.epochs * (self.whole + (self.rest > 0))

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[int, ...]: ...

    def __getitem__(self, at: int | slice) -> int | tuple[int, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        place = range(len(self))[at] % (self.whole + (self.rest > 0))
        return self.size if place < self.whole else self.rest

    def counts(self) -> dict[int, int]:
        """How many batches there are of each size."""
        found = {self.size: self.epochs * self.whole, self.rest: self.epochs}
        return {size: count for size, count in found.items() if size and count}


class TrainedLayers:
    """Layers with an optimiser of their own, which lives as long as the run."""

    def __init__(self, layers: nn.Module, training: Optimisation) -> None:
        self.layers = layers
        self.frozen = frozen_modules(layers)
        params = [p for p in layers.parameters() if p.requires_grad]
        self.optimiser = training.optimiser(params) if params else None
        layers.eval()  # from here on the outermost module's mode tells that of all

    def train(self) -> None:
        """Training mode, but for modules that are wholly frozen."""
        if self.layers.training:
            return
        self.layers.train()
        for module in self.frozen:
            module.eval()

    def step(self) -> None:
        """Step on the gradients, and clear them."""
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """What the optimiser holds of each parameter, as `index/name`; not copied."""
        if self.optimiser is None:
            return {}
        return {
            f"{index}/{name}": value
            for index, held in self.optimiser.state_dict()["state"].items()
            for name, value in held.items()
            if value is not None
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave; the settings stay as they are."""
        if self.optimiser is None:
            return
        held: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            index, name = key.split("/")
            held.setdefault(int(index), {})[name] = value
        params = [param for group in self.optimiser.param_groups for param in group["params"]]
        for number, values in held.items():
            for name, value in values.items():
                if value.shape == params[number].shape:  # a fused step needs one memory layout
                    values[name] = torch.empty_like(params[number].detach()).copy_(value)
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": held, "param_groups": groups})


def summed_losses(losses: Sequence[tuple[int, Tensor]]) -> list[float]:
    """From each step's examples and mean loss to its summed loss; a GPU is waited for once."""
    if not losses:
        return []
    means = torch.stack([loss for _, loss in losses]).tolist()
    return [examples * mean for (examples, _), mean in zip(losses, means, strict=True)]


def batch_counts(layers: nn.Module) -> dict[str, Tensor]:
    """BatchNorm's counts of batches by name, which are not averaged; not copied."""
    still = {id(b) for top in frozen_modules(layers) for b in top.buffers()}
    counts = {name: b for name, b in layers.named_buffers() if b.dtype == torch.int64}
    return {name: b for name, b in counts.items() if id(b) not in still}


def own_copy(layers: nn.Sequential) -> nn.Sequential:
    """A copy for one client; modules that are wholly frozen are shared, since nothing changes."""
    return copy.deepcopy(layers, {id(module): module for module in frozen_modules(layers)})


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Several sets of named tensors as one, as `part/name`."""
    return {f"{part}/{name}": t for part, held in parts.items() for name, t in held.items()}
