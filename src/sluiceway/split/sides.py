"""The two sides of one step: what a client holds and does, and what the server holds and does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sluiceway.federated.batches import Batch, Examples
from sluiceway.federated.client import Loss, Optimisation, exchanged
from sluiceway.split.compress import Compressor
from sluiceway.split.header import BatchId
from sluiceway.split.methods import Meter
from sluiceway.split.packing import Smashed, Ticket
from sluiceway.strategies import Broadcast, Client, Strategy


class ClientSide:
    """One client: its data, its front, and in a U-shape its tail with the loss.

    Args:
        number: from 0.
        examples: its data; labels stay here in a U-shape.
        front: first layers, copied.
        tail: last layers, copied; None unless the split is U-shaped.
        training: how its layers train; their optimiser lives as long as the client.
        link: compression of smashed data.
        tail_link: compression of what the server hands to the tail.
        meter: rates channels, or None.
        loss: task loss; used here in a U-shape only.
        device: where the layers run.
    """

    def __init__(
        self,
        number: int,
        examples: Examples,
        front: nn.Module,
        tail: nn.Module | None,
        *,
        training: Optimisation,
        link: Compressor,
        tail_link: Compressor,
        meter: Meter | None,
        loss: Loss,
        device: torch.device,
    ) -> None:
        self.number = number
        self.examples = examples
        self.front = copy.deepcopy(front)
        self.tail = copy.deepcopy(tail)
        self.training = training
        self.link, self.tail_link = link, tail_link
        self.meter = meter
        self.loss = loss
        self.device = device
        self.mask: Tensor | None = None
        self.layers = client_layers(self.front, self.tail)
        trained = [p for p in self.layers.parameters() if p.requires_grad]
        self.optimiser = training.optimiser(trained) if trained else None
        self.waiting: dict[BatchId, tuple[Tensor, Ticket, Tensor]] = {}
        self.losses: list[Tensor] = []
        self.owned = exchanged(self.layers)
        self.state: dict[str, Tensor] = {}

    def begin(self, strategy: Strategy, broadcast: Broadcast) -> None:
        """Take the round's layers, and the strategy that they are averaged by."""
        self.load(broadcast.tensors)
        params = {n: p for n, p in self.owned.items() if isinstance(p, nn.Parameter)}
        self.strategy = strategy
        self.role = Client(
            model=self.layers,
            params=params,
            received={n: p.detach().clone() for n, p in params.items()},
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
        for _ in range(self.training.local_epochs):
            order = torch.randperm(len(self.examples), generator=generator)
            for part in order.split(self.training.batch_size):
                batch = Batch.of(self.examples, part, self.device, generator)
                yield BatchId(self.number, number, count), batch
                count += 1

    def send(self, name: BatchId, batch: Batch) -> bytes:
        """Run the front on a batch and pack its output; labels go along but for a U-shape."""
        self.front.train()
        smashed = batch.run(self.front)
        if self.meter is not None:
            self.meter.watch(smashed.detach(), batch.labels)
        labels = None if self.tail else batch.labels
        message, ticket = self.link.up(smashed, name, labels, self.mask)
        self.waiting[name] = smashed, ticket, batch.labels
        return message

    def receive(self, name: BatchId, message: bytes) -> None:
        """Unpack the gradient of that batch, go backward through the front, and step."""
        smashed, ticket, _ = self.waiting.pop(name)
        gradient = self.link.open_gradient(message, ticket, self.device)
        if self.meter is not None:
            self.meter.watch_gradient(gradient)
        if smashed.requires_grad:
            smashed.backward(gradient)
        if self.optimiser is not None:
            if (penalty := self.strategy.penalty(self.role)) is not None:
                penalty.backward()
            self.strategy.correct(self.role)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.role.steps += 1

    def finish(self, name: BatchId, message: bytes) -> bytes:
        """In a U-shape: run the tail on what the server made, and pack the gradient of the loss."""
        assert self.tail is not None
        opened = self.tail_link.open(message, batch=name, device=self.device)
        labels = self.waiting[name][2]
        self.tail.train()
        hidden = opened.values.requires_grad_()
        loss = self.loss(self.tail(hidden), labels)
        loss.backward()
        self.losses.append(loss.detach())
        assert hidden.grad is not None
        return self.tail_link.down(hidden.grad, opened.ticket)


def client_layers(front: nn.Module, tail: nn.Module | None) -> nn.ModuleDict:
    """What a client holds, as one module: "front" and, in a U-shape, "tail"."""
    return nn.ModuleDict({"front": front} | ({"tail": tail} if tail is not None else {}))


class ServerSide:
    """The server's layers and their optimiser, which lives as long as the run.

    Args:
        back: the layers behind the cut (in a U-shape, those before the tail), trained in place.
        training: how they train.
        link, tail_link, loss, device: as of `ClientSide`.
    """

    def __init__(
        self,
        back: nn.Module,
        *,
        training: Optimisation,
        link: Compressor,
        tail_link: Compressor,
        loss: Loss,
        device: torch.device,
    ) -> None:
        self.back = back
        trained = [p for p in back.parameters() if p.requires_grad]
        self.optimiser = training.optimiser(trained) if trained else None
        self.link, self.tail_link = link, tail_link
        self.loss = loss
        self.device = device
        self.losses: list[Tensor] = []

    def step(self, messages: Sequence[bytes]) -> list[bytes]:
        """One optimiser step on the mean loss over all the batches, as if they were one.

        Returns:
            For each message the packed gradient of its client's own mean loss.
        """
        opened = [self.link.open(m, labels=True, device=self.device) for m in messages]
        labels = torch.cat([o.labels for o in opened if o.labels is not None])
        return self._through(opened, lambda out: self._task_gradient(out, labels))

    def step_u(self, messages: Sequence[bytes], ask: Callable[[int, bytes], bytes]) -> list[bytes]:
        """The same in a U-shape: `ask(i, message)` hands message i's outcome to its client's tail.

        It returns the client's packed gradient. Labels are never seen here.
        """
        opened = [self.link.open(m, labels=False, device=self.device) for m in messages]

        def end(out: Tensor) -> Tensor:
            parts, total = out.detach().split([len(o.values) for o in opened]), len(out)
            gradients = []
            for i, (part, one) in enumerate(zip(parts, opened, strict=True)):
                message, ticket = self.tail_link.up(part, one.ticket.batch)
                answer = self.tail_link.open_gradient(ask(i, message), ticket, self.device)
                gradients.append(answer * (len(part) / total))
            return torch.cat(gradients)

        return self._through(opened, end)

    def _task_gradient(self, out: Tensor, labels: Tensor) -> Tensor:
        leaf = out.detach().requires_grad_()
        loss = self.loss(leaf, labels)
        loss.backward()
        self.losses.append(loss.detach())
        assert leaf.grad is not None
        return leaf.grad

    def _through(
        self, opened: Sequence[Smashed], end: Callable[[Tensor], Tensor]
    ) -> list[bytes]:
        """Forward, backward from the gradient that `end` gives, step, and the packed gradients."""
        self.back.train()
        leaves = [one.values.requires_grad_() for one in opened]
        out = self.back(torch.cat(leaves) if len(leaves) > 1 else leaves[0])
        out.backward(end(out))
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        total = sum(len(leaf) for leaf in leaves)
        replies = []
        for leaf, one in zip(leaves, opened, strict=True):
            assert leaf.grad is not None
            own = leaf.grad if len(leaf) == total else leaf.grad * (total / len(leaf))
            replies.append(self.link.down(own, one.ticket))
        return replies
