"""How layers are trained, as settings."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as checked
from torch import nn

from sluiceway.strategies.parameters import PARAMETERS


@checked(config=PARAMETERS, kw_only=True, frozen=True)
class Optimisation:
    """How layers are trained.

    lr: learning rate, > 0. batch_size: examples a step, in [1, 10^6]. local_epochs: passes over the
    client's data in a round, in [1, 10^4]. optimizer: "adamw" or "sgd". momentum: of sgd, in
    [0, 1). weight_decay: >= 0.
    """

    lr: float = Field(default=1e-3, gt=0)
    batch_size: int = Field(default=16, ge=1, le=1_000_000)
    local_epochs: int = Field(default=1, ge=1, le=10_000)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)

    def optimiser(self, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimiser over the parameters."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                params, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
            )
        return torch.optim.AdamW(params, lr=self.lr, weight_decay=self.weight_decay, fused=True)


@checked(config=PARAMETERS, kw_only=True, frozen=True)
class SplitTraining(Optimisation):
    """How the layers of a cut network are trained.

    front: false freezes the layers that clients hold before the cut, as they are at the start. They
        run in evaluation mode, no gradient is computed or sent for them, and none is averaged. What
        a method adds before the cut, as `bottleneck` does, is trained all the same.
    nopeek: weight of the distance correlation between a batch's inputs and its smashed data, which
        the client adds to its loss (NoPeek, arXiv 2008.09161), >= 0: a defence against rebuilding
        inputs. Needs front = true.
    recalibrate: at the end of a round the server estimates the statistics of its BatchNorm anew,
        its layers being what they are by then, from the last so many batches of each client, in
        [0, 10^4]; these cross as in use (`method.deployed_...`). 0 leaves the running averages,
        which the last steps and their clients' labels decide.

    The rest is as of `Optimisation`.
    """

    front: bool = True
    nopeek: float = Field(default=0.0, ge=0)
    recalibrate: int = Field(default=0, ge=0, le=10_000)

    def __post_init__(self) -> None:
        if self.nopeek and not self.front:
            raise ValueError("nopeek trains the layers before the cut: it needs front = true")


@checked(config=PARAMETERS, kw_only=True, frozen=True)
class Training(Optimisation):
    """How a client trains a whole model; its optimiser is new in every round.

    local_steps: steps of the optimiser in a round, in [0, 10^9]: passes over the data go on or end
        as it takes; 0 for whole passes, `local_epochs` of them.
    max_grad_norm: clipping, > 0; 0 for none.
    accumulate: batches for each step of the optimiser, in [1, 10^6]. Every example of a step
        counts alike: k batches of b make the step that one batch of k * b would, up to rounding,
        where the loss is a mean over examples. What an epoch's last step lacks in batches it does
        without.
    aux_loss: weight of the auxiliary load-balancing loss, >= 0, of a model with experts: the mean
        over its trained MoE layers of E * sum_e f(e) P(e), 1 where tokens are spread evenly
        (Switch, arXiv 2101.03961, eq. 4 to 6; .01 there), is added to a client's loss, batch by
        batch.
    routing_mask: which tokens count in what a mixture of experts reports of its routing, and in
        losses on it: "attention", those that the batch's attention mask marks, or "none", all that
        enter a router, where its tokens are not those of the mask (behind pooling, with a CLS
        token before them, without padding).
    mixed: "bfloat16" or "float16" runs forward passes and losses in that type where PyTorch's
        autocast holds it to be safe, in training and in evaluation alike; "no" in the
        parameters' own.
    checkpointing: gradient checkpointing: layers keep their inputs only and run again in the
        backward pass. Wholly frozen layers are left as they are. The model must offer it, as
        those of Hugging Face do.

    Parameters in half precision are stepped through float32 copies, made anew in every round
    (4 bytes a trained value, besides what the optimiser holds); they cross in their own type.
    With float16 anywhere the loss is scaled, and a step whose gradients overflow is left out.
    The rest is as of `Optimisation`.
    """

    local_steps: int = Field(default=0, ge=0, le=10**9)
    max_grad_norm: float = Field(default=1.0, ge=0)
    accumulate: int = Field(default=1, ge=1, le=1_000_000)
    aux_loss: float = Field(default=0.0, ge=0)
    routing_mask: Literal["attention", "none"] = "attention"
    mixed: Literal["no", "bfloat16", "float16"] = "no"
    checkpointing: bool = False

    def steps(self, examples: int) -> int:
        """Steps of a round of a client that holds so many examples."""
        size = self.batch_size * self.accumulate
        return self.local_steps or self.local_epochs * -(-examples // size)

    def passes(self, examples: int) -> float:
        """How often each of a client's examples is trained on in a round."""
        size = self.batch_size * self.accumulate
        return self.local_steps * size / examples if self.local_steps else float(self.local_epochs)

    def precision(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """The context that a forward pass runs in; `mixed` "no" leaves everything as it is."""
        if self.mixed == "no":
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=getattr(torch, self.mixed))
