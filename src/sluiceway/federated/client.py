"""How one client trains and what it sends; how a model is evaluated on the test set.

A `Worker` holds one model and plays every client in turn: the received values are written into
it, it trains in place, and the trained values go out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass as checked
from torch import Tensor, nn

from sluiceway.federated.batches import Batch, Examples, labels_of
from sluiceway.federated.evaluation import Evaluation, evaluate
from sluiceway.moe import Anatomy, Observer, find_adapters, find_anatomy
from sluiceway.strategies import Broadcast, Client, Strategy, Update
from sluiceway.strategies.base import PARAMETERS

#: Test examples that a client's own model is judged by, about.
PERSONAL = 500

#: From (logits [B, C], labels [B]) to a scalar.
Loss = Callable[[Tensor, Tensor], Tensor]


@checked(config=PARAMETERS, kw_only=True, frozen=True)
class Optimisation:
    """How layers are trained.

    lr: learning rate, > 0. batch_size: examples a step, >= 1. local_epochs: passes over the
    client's data in a round, >= 1. optimizer: "adamw" or "sgd". momentum: of sgd, in [0, 1).
    weight_decay: >= 0.
    """

    lr: float = Field(default=1e-3, gt=0)
    batch_size: int = Field(default=16, ge=1)
    local_epochs: int = Field(default=1, ge=1)
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
class Training(Optimisation):
    """How a client trains a whole model; its optimiser is new in every round.

    max_grad_norm: clipping, > 0; 0 for none. The rest is as of `Optimisation`.
    """

    max_grad_norm: float = Field(default=1.0, ge=0)


def prepare(model: nn.Module, strategy: Strategy, clients: int) -> None:
    """Settle what is trained, and hand the strategy the initial values.

    Parameters that the strategy does not train are frozen in the model, in place. Trained tensors
    are what crosses: parameters, and floating-point buffers of the modules around them. So is what
    only the server changes (`Strategy.server_owned`).

    Raises:
        NoExpertsError: the strategy needs experts and the model has none.
        ValueError: nothing is left to train.
    """
    anatomy = find_anatomy(model) or Anatomy((), find_adapters(model))
    for name, param in model.named_parameters():
        param.requires_grad_(param.requires_grad and strategy.trains(name, anatomy))
    if not any(param.requires_grad for param in model.parameters()):
        raise ValueError("nothing to train: every parameter of the model is frozen")
    tensors = exchanged(model)
    anatomy = trained_anatomy(anatomy, set(tensors))
    tensors |= {name: model.get_parameter(name) for name in sorted(strategy.server_owned(anatomy))}
    held = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    strategy.setup(held, anatomy, clients)


def exchanged(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and the float buffers that training changes, by name (no copies)."""
    tensors: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    still = {module for top in frozen_modules(model) for module in top.modules()}
    kept = set(model.state_dict())
    for prefix, module in model.named_modules():
        if module in still:
            continue
        own = module.named_buffers(prefix, recurse=False)
        tensors |= {n: b for n, b in own if n in kept and b.is_floating_point()}
    return tensors


def trained_anatomy(anatomy: Anatomy, names: set[str]) -> Anatomy:
    """The blocks and LoRA pairs of which a parameter is among `names`, blocks numbered anew."""
    blocks = [
        block
        for block in anatomy.blocks
        if names & {*block.gate, *(p.param for expert in block.pieces for p in expert)}
    ]
    pairs = tuple(pair for pair in anatomy.adapters if pair.b.param in names)
    return Anatomy(tuple(replace(block, position=i) for i, block in enumerate(blocks)), pairs)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that have parameters of which none is trained.

    They run in evaluation mode always, so that what they compute for an example never changes.
    """
    params = list(model.parameters())
    if not params or any(p.requires_grad for p in params):
        return [m for child in model.children() for m in frozen_modules(child)]
    return [model]


def mix(*numbers: int) -> int:
    """One seed from several numbers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Worker:
    """One model that plays any client, and evaluates.

    Args:
        model: trained in place.
        clients: each client's examples.
        test: the global test set; labels are class numbers.
        strategy: already set up with this model (see `prepare`).
        training: how a client trains.
        loss: task loss.
        device: where the model runs.
        seed: of the whole run.
    """

    def __init__(
        self,
        model: nn.Module,
        clients: Sequence[Examples],
        test: Examples,
        strategy: Strategy,
        training: Training,
        *,
        loss: Loss = F.cross_entropy,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.model = model.to(device)
        self.clients = clients
        self.test = test
        self.strategy = strategy
        self.training = training
        self.loss = loss
        self.device = torch.device(device)
        self.seed = seed
        self.anatomy = strategy.anatomy
        owned = sorted(strategy.server_owned(self.anatomy))
        self.exchanged = exchanged(model) | {name: model.get_parameter(name) for name in owned}
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.initial = {n: t.clone() for n, t in strategy.tensors.items() if strategy.private(n)}
        self.still = frozen_modules(model)

    def train(
        self, number: int, broadcast: Broadcast, state: dict[str, Tensor], *, personal: bool
    ) -> Update:
        """Play client `number` for one round.

        Args:
            number: of the client, from 0; it must hold at least one example.
            broadcast: the server's message.
            state: what the client keeps; changed in place.
            personal: also evaluate the client's own model after training, on the test examples
                of the classes it holds, weighted as it holds them.
        """
        examples = self.clients[number]
        self.load(broadcast.tensors)
        self.load({n: state.get(f"private/{n}", t) for n, t in self.initial.items()})
        with self.randomness(mix(self.seed, broadcast.round, number)), self.observation() as seen:
            client = Client(
                model=self.model,
                params=self.params,
                received={n: p.detach().clone() for n, p in self.params.items()},
                broadcast=broadcast,
                anatomy=self.anatomy,
                observer=seen,
                state=state,
            )
            self.strategy.start(client)
            metrics = self.fit(client, examples)
            routing = seen.routing() if seen else []
            extra = dict(self.strategy.finish(client))
        state |= {f"private/{n}": self.exchanged[n].detach().cpu().clone() for n in self.initial}
        if personal:
            metrics["personal_accuracy"] = self.personal_accuracy(examples)
        tensors = {
            piece.key: piece.of(self.exchanged).detach()
            for piece in self.strategy.shared_pieces
            if self.strategy.sends(piece, routing)
        }
        return Update(
            number, broadcast.round, len(examples), tensors, routing, extra=extra, metrics=metrics
        )

    def fit(self, client: Client, examples: Examples) -> dict[str, float]:
        """Local training, in place; returns its mean loss and penalty."""
        training = self.training
        optimiser = training.optimiser(list(self.params.values()))
        self.training_mode()
        losses, penalties = [], []
        for batch in self.batches(examples):
            optimiser.zero_grad(set_to_none=True)
            observing = client.observer.observing(batch.mask) if client.observer else None
            with observing or contextlib.nullcontext():
                logits = batch.run(self.model)
            loss = self.loss(logits, batch.labels)
            penalty = self.strategy.penalty(client)
            (loss if penalty is None else loss + penalty).backward()
            self.strategy.correct(client)
            if training.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(self.params.values(), training.max_grad_norm)
            optimiser.step()
            client.steps += 1
            losses.append(loss.detach())
            if penalty is not None:
                penalties.append(penalty.detach())
        metrics = {"loss": float(torch.stack(losses).mean())}
        if penalties:
            metrics["penalty"] = float(torch.stack(penalties).mean())
        return metrics

    def batches(self, examples: Examples) -> Iterator[Batch]:
        """The client's batches of one round, shuffled anew in every epoch."""
        for _ in range(self.training.local_epochs):
            order = torch.randperm(len(examples))
            for part in order.split(self.training.batch_size):
                yield Batch.of(examples, part, self.device)

    def training_mode(self) -> None:
        """Training mode, but for modules that are wholly frozen."""
        self.model.train()
        for module in self.still:
            module.eval()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the named values into the model."""
        for name, value in tensors.items():
            self.exchanged[name].copy_(value)

    def evaluate(self, tensors: Mapping[str, Tensor], indices: Sequence[int]) -> Evaluation:
        """The model with these values on some of the test set."""
        self.load(tensors)
        return evaluate(self.model, self.test, indices, self.loss, self.device)

    def personal_accuracy(self, examples: Examples) -> float:
        """Accuracy of the model as it stands, classes weighted as the client holds them.

        Of each class it holds, the first test examples are taken, `PERSONAL` in all at most.
        """
        counts = torch.bincount(labels_of(examples))
        held = counts.nonzero().flatten()
        labels = labels_of(self.test)
        each = -(-PERSONAL // len(held))
        indices = torch.cat([(labels == y).nonzero().flatten()[:each] for y in held]).tolist()
        found = evaluate(self.model, self.test, indices, self.loss, self.device)
        return found.weighted_accuracy(counts)

    @contextlib.contextmanager
    def observation(self) -> Iterator[Observer | None]:
        """An observer of this round's routing, or None for a dense model."""
        if not self.anatomy.blocks:
            yield None
            return
        observer = Observer(self.model, self.anatomy, regions=self.strategy.wants_regions())
        try:
            yield observer
        finally:
            observer.close()

    @contextlib.contextmanager
    def randomness(self, seed: int) -> Iterator[None]:
        """All random choices inside come from the seed; the generators outside are untouched."""
        devices: list[Any] = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
