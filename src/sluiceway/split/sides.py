"""The two sides of one step: what a client holds and does, and what the server holds and does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sluiceway.federated.batches import Batch, Examples
from sluiceway.federated.client import Loss, Optimisation, exchanged, frozen_modules
from sluiceway.federated.wire import message_of, parts_of
from sluiceway.split.compress import Compressor
from sluiceway.split.header import BatchId
from sluiceway.split.meters import Meter
from sluiceway.split.packing import Smashed, Ticket
from sluiceway.strategies import Broadcast, Client, Strategy


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


@dataclass(frozen=True)
class Sent:
    """What a client remembers of a batch until its gradient has returned."""

    smashed: Tensor
    ticket: Ticket
    labels: Tensor


class ClientSide:
    """One client: its data, its front, and in a U-shape its tail with the loss.

    Args:
        number: from 0.
        examples: its data; labels stay here in a U-shape.
        front: first layers, copied.
        tail: last layers, copied; None unless the split is U-shaped.
        terms: what both sides know.
        meter: rates channels, or None.
        smallest: batches below this size are left out, 1 for none.
    """

    def __init__(
        self,
        number: int,
        examples: Examples,
        front: nn.Module,
        tail: nn.Module | None,
        terms: Terms,
        meter: Meter | None,
        smallest: int = 1,
    ) -> None:
        self.number = number
        self.examples = examples
        self.front = copy.deepcopy(front)
        self.tail = copy.deepcopy(tail)
        self.terms = terms
        self.meter = meter
        self.smallest = smallest
        self.mask: Tensor | None = None
        self.layers = client_layers(self.front, self.tail)
        self.still = frozen_modules(self.layers)
        self.owned = exchanged(self.layers)
        self.params = {n: p for n, p in self.owned.items() if isinstance(p, nn.Parameter)}
        self.optimiser = optimiser_of(self.layers, terms.training)
        self.waiting: dict[BatchId, Sent] = {}
        self.losses: list[tuple[int, Tensor]] = []
        self.state: dict[str, Tensor] = {}

    # -- a round -------------------------------------------------------------------------------

    def begin(
        self, number: int, message: bytes, strategy: Strategy, mask: Tensor | None = None
    ) -> None:
        """Take the layers of round `number`, and the strategy that they are averaged by.

        Args:
            message: the server's: layers, what the strategy sends beside them, a merged mask.
            mask: where it does not cross, because the client knows it by itself.
        """
        parts = parts_of(message)
        broadcast = Broadcast(number, parts.get("model", {}), parts.get("extra", {}))
        self.mask = parts["mask"]["kept"] if "mask" in parts else mask
        self.load(broadcast.tensors)
        self.strategy = strategy
        self.role = Client(
            model=self.layers,
            params=self.params,
            received={n: p.detach().clone() for n, p in self.params.items()},
            broadcast=broadcast,
            anatomy=strategy.anatomy,
            observer=None,
            state=self.state,
        )
        strategy.start(self.role)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the named values into the client's layers."""
        for name, value in tensors.items():
            self.owned[name].copy_(value)

    def batches(self, number: int, generator: torch.Generator) -> Iterator[tuple[BatchId, Batch]]:
        """The client's batches of round `number`, shuffled and augmented by the generator."""
        count = 0
        for _ in range(self.terms.training.local_epochs):
            order = torch.randperm(len(self.examples), generator=generator)
            for part in order.split(self.terms.training.batch_size):
                if len(part) >= self.smallest:
                    batch = Batch.of(self.examples, part, self.terms.device, generator)
                    yield BatchId(self.number, number, count), batch
                    count += 1

    def end(self, number: int, scores: Tensor | None) -> bytes:
        """The message that closes a round: layers, the strategy's extra, and scores if they cross.

        Args:
            scores: [C]; None sends none.
        """
        extra = dict(self.strategy.finish(self.role))
        model = {
            piece.key: piece.of(self.owned)
            for piece in self.strategy.shared_pieces
            if self.strategy.sends(piece, ())
        }
        parts = {"model": model, "extra": extra}
        if scores is not None:
            parts["scores"] = {"channels": scores.float()}
        facts = {"client": self.number, "round": number, "examples": len(self.examples)}
        return message_of(parts, facts)

    # -- a step --------------------------------------------------------------------------------

    def send(self, name: BatchId, batch: Batch) -> bytes:
        """Run the front on a batch and pack its output; labels go along but for a U-shape."""
        training_mode(self.layers, self.still)
        smashed = batch.run(self.front)
        if self.meter is not None:
            self.meter.watch(smashed.detach(), batch.labels)
        labels = None if self.tail else batch.labels
        message, ticket = self.terms.link.up(smashed, name, labels, self.mask)
        self.waiting[name] = Sent(smashed, ticket, batch.labels)
        return message

    def finish(self, name: BatchId, message: bytes) -> bytes:
        """In a U-shape: run the tail on what the server made, and pack the gradient of the loss."""
        assert self.tail is not None
        link, labels = self.terms.tail_link, self.waiting[name].labels
        opened = link.open(message, batch=name, labels=False, device=self.terms.device)
        hidden = opened.values.requires_grad_()
        # A copy, since the tail's first layer may work in place, which a leaf does not allow.
        loss = self.terms.loss(self.tail(hidden.clone()), labels)
        loss.backward()
        self.losses.append((len(labels), loss.detach()))
        assert hidden.grad is not None
        return link.down(hidden.grad, opened.ticket)

    def receive(self, name: BatchId, message: bytes) -> None:
        """Unpack the gradient of that batch, go backward through the front, and step."""
        sent = self.waiting.pop(name)
        gradient = self.terms.link.open_gradient(message, sent.ticket, self.terms.device)
        if self.meter is not None:
            self.meter.watch_gradient(sent.smashed.detach(), gradient)
        if sent.smashed.requires_grad:
            sent.smashed.backward(gradient)
        if self.optimiser is None:
            return
        if (penalty := self.strategy.penalty(self.role)) is not None:
            penalty.backward()
        self.strategy.correct(self.role)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.role.steps += 1


class ServerSide:
    """The server's layers and their optimiser, which lives as long as the run.

    Args:
        back: the layers behind the cut (in a U-shape, those before the tail), trained in place.
        terms: what both sides know.
        smallest: steps on fewer examples are left out, 1 for none.
    """

    def __init__(self, back: nn.Module, terms: Terms, smallest: int = 1) -> None:
        self.back = back
        self.still = frozen_modules(back)
        self.terms = terms
        self.smallest = smallest
        self.optimiser = optimiser_of(back, terms.training)
        self.losses: list[tuple[int, Tensor]] = []

    def step(self, messages: Sequence[bytes]) -> list[bytes]:
        """One optimiser step on the mean loss over all the batches, as if they were one.

        Returns:
            For each message the packed gradient of its client's own mean loss: that of the mean
            over all examples, times all examples over the client's. So a front learns at the same
            pace whoever else takes part, and fronts averaged by their examples move as one front
            would on the batches together.

        Raises:
            WireError: a message is no smashed data of this cut, or has no labels.
        """
        opened = [self._opened(message, labels=True) for message in messages]
        labels = torch.cat([one.labels for one in opened if one.labels is not None])

        def end(out: Tensor) -> Tensor:
            leaf = out.detach().requires_grad_()
            loss = self.terms.loss(leaf, labels)
            loss.backward()
            self.losses.append((len(labels), loss.detach()))
            assert leaf.grad is not None
            return leaf.grad

        return self._through(opened, end)

    def step_u(
        self, messages: Sequence[bytes], ask: Callable[[BatchId, bytes], bytes]
    ) -> list[bytes]:
        """The same in a U-shape: `ask(name, message)` hands a batch's outcome to its client's tail.

        It returns the client's packed gradient. Labels are never seen here.

        Raises:
            WireError: a message is no smashed data of this cut, or carries labels.
        """
        opened = [self._opened(message, labels=False) for message in messages]
        link = self.terms.tail_link

        def end(out: Tensor) -> Tensor:
            gradients = []
            parts = out.detach().split([len(one.values) for one in opened])
            for part, one in zip(parts, opened, strict=True):
                message, ticket = link.up(part, one.ticket.batch)
                answer = ask(one.ticket.batch, message)
                gradient = link.open_gradient(answer, ticket, self.terms.device)
                gradients.append(gradient * (len(part) / len(out)))
            return torch.cat(gradients)

        return self._through(opened, end)

    def _opened(self, message: bytes, *, labels: bool) -> Smashed:
        terms, shape = self.terms, (None, *self.terms.shape)
        return terms.link.open(
            message, shape, labels=labels, classes=terms.classes, device=terms.device
        )

    def _through(self, opened: Sequence[Smashed], end: Callable[[Tensor], Tensor]) -> list[bytes]:
        """Forward, backward from the gradient that `end` gives, step, and the packed gradients."""
        training_mode(self.back, self.still)
        leaves = [one.values.requires_grad_() for one in opened]
        # Of one message too this makes a copy: the first layer may work in place, and a leaf not.
        out = self.back(torch.cat(leaves))
        out.backward(end(out))
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        total = sum(len(leaf) for leaf in leaves)
        replies = []
        for leaf, one in zip(leaves, opened, strict=True):
            assert leaf.grad is not None
            replies.append(self.terms.link.down(leaf.grad * (total / len(leaf)), one.ticket))
        return replies


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
