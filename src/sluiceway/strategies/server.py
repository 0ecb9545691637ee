"""Server optimisers: the mean change of a round taken as a gradient, with any strategy.

A round changes a parameter from `old` to `new` by whatever the strategy is; d = new - old is what
the optimiser steps along (the pseudo-gradient, with its sign turned), and what it gives is the new
global value. [paper: Reddi et al., arXiv 2003.00295, algorithms 1 and 2; Hsu et al., 1909.06335]

A piece that the round left as it was (an expert that nobody used) stays, and so do its states
[ours]. States are float32 or wider, whatever the parameters are. Only tensors of floating-point
numbers are stepped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway.moe import ParamSlice
from sluiceway.strategies.parameters import PARAMETERS


class ServerOptimizer:
    """Base of all: a subclass says what it keeps of a parameter, and how that moves it."""

    #: What is kept of each parameter, and what it begins with.
    slots: ClassVar[tuple[str, ...]]

    def begins(self, slot: str) -> float:
        """The value that a slot has before the first round."""
        return 0.0

    def move(self, change: Tensor, *slots: Tensor) -> Tensor:
        """How far the parameter moves.

        Args:
            change: d, float32 or wider.
            slots: what is kept, of the same shape; changed in place.
        """
        raise NotImplementedError

    def setup(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin anew with the tensors that are trained, by name."""
        self.state: dict[str, dict[str, Tensor]] = {
            slot: {
                name: torch.full_like(t, self.begins(slot), dtype=wide(t))
                for name, t in tensors.items()
                if t.is_floating_point()
            }
            for slot in self.slots
        }

    def step(
        self, old: Mapping[str, Tensor], new: Mapping[str, Tensor], pieces: Sequence[ParamSlice]
    ) -> dict[str, Tensor]:
        """The new global tensors; `old` and `new` stay as they are.

        Args:
            old: by name, before the round.
            new: what the strategy made of them.
            pieces: of all tensors.
        """
        stepped = dict(new)
        for piece in pieces:
            before, after = piece.of(old), piece.of(new)
            moves = before.is_floating_point() and not piece.is_statistic
            if not moves or torch.equal(before, after):
                continue
            if stepped[piece.param] is new[piece.param]:
                stepped[piece.param] = new[piece.param].clone()
            base = before.to(wide(before))
            moved = self.move(after - base, *(piece.of(self.state[slot]) for slot in self.slots))
            piece.of(stepped).copy_(base + moved)
        return stepped

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        return {f"{slot}/{n}": t for slot, held in self.state.items() for n, t in held.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a dictionary that `state_dict` is a part of; call after `setup`."""
        for slot, held in self.state.items():
            self.state[slot] = {name: state[f"{slot}/{name}"].clone() for name in held}


def wide(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's type where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(config=PARAMETERS, kw_only=True)
class Momentum(ServerOptimizer):
    """Momentum over the rounds' changes [paper: Hsu et al., arXiv 1909.06335, FedAvgM].

    m = beta m + d; new = old + lr m, and m begins with zero.

    beta: decay of m, in [0, 1); 0 changes nothing where lr is 1. lr: server learning rate, > 0.
    """

    slots: ClassVar[tuple[str, ...]] = ("first",)
    beta: float = Field(default=0.9, ge=0, lt=1)
    lr: float = Field(default=1.0, gt=0)

    def move(self, change: Tensor, *slots: Tensor) -> Tensor:
        (first,) = slots
        return self.lr * first.mul_(self.beta).add_(change)


@dataclass(config=PARAMETERS, kw_only=True)
class Adam(ServerOptimizer):
    """Adam over the rounds' changes [paper: Reddi et al., arXiv 2003.00295, algorithm 2].

    m = b1 m + (1 - b1) d; v = b2 v + (1 - b2) d^2; new = old + lr m / (sqrt v + tau), without bias
    correction as there. v begins with zero [ours], where the paper has tau^2 or more.

    lr: server learning rate, > 0. beta1: decay of the mean m, in [0, 1). beta2: decay of the mean
    square v, in [0, 1). tau: adaptivity, > 0.
    """

    slots: ClassVar[tuple[str, ...]] = ("first", "second")
    lr: float = Field(default=0.001, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=0.001, gt=0)

    def move(self, change: Tensor, *slots: Tensor) -> Tensor:
        first, second = slots
        first.lerp_(change, 1 - self.beta1)
        self.square(second, change.square())
        return self.lr * first / (second.sqrt() + self.tau)

    def square(self, second: Tensor, squares: Tensor) -> None:
        """v of d^2, in place."""
        second.lerp_(squares, 1 - self.beta2)


@dataclass(config=PARAMETERS, kw_only=True)
class Yogi(Adam):
    """Yogi over the rounds' changes [paper: Reddi et al., arXiv 2003.00295, algorithm 2].

    Adam with v = v - (1 - b2) d^2 sign(v - d^2), and v begins with tau^2.
    """

    lr: float = Field(default=0.01, gt=0)

    def begins(self, slot: str) -> float:
        return self.tau**2 if slot == "second" else 0.0

    def square(self, second: Tensor, squares: Tensor) -> None:
        second.addcmul_(squares, torch.sign(second - squares), value=self.beta2 - 1)


#: Every server optimiser by the name that `method.server.name` uses.
SERVER: dict[str, type[ServerOptimizer]] = {"momentum": Momentum, "adam": Adam, "yogi": Yogi}
