"""The client's side: its data, its front, and in a U-shape its tail with the loss."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sluiceway.core.batches import Batch, Examples
from sluiceway.core.messages import message_of, take_values
from sluiceway.core.parameters import exchanged, frozen_modules
from sluiceway.split.config import (
    SplitConfig,
    client_layers,
    counts_in,
    joined,
    load_optimiser,
    optimiser_of,
    optimiser_state,
    training_mode,
)
from sluiceway.split.header import BatchId
from sluiceway.split.messages import read_round_start
from sluiceway.split.packing import BatchContext
from sluiceway.split.scorers import ChannelScorer
from sluiceway.strategies import LocalContext, Strategy
from sluiceway.strategies.base import unprefixed


@dataclass(frozen=True)
class Sent:
    """What a client remembers of a batch until its gradient has returned."""

    smashed: Tensor
    ticket: BatchContext
    labels: Tensor


class SplitClient:
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
        terms: SplitConfig,
        meter: ChannelScorer | None,
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

    def state_dict(self) -> dict[str, Tensor]:
        """What outlives a round on this side, but the layers that the server sends; not copied."""
        counts = {n: b for n, b in self.layers.named_buffers() if n not in self.owned}
        meter = {} if self.meter is None else self.meter.state_dict()
        optimiser = optimiser_state(self.optimiser)
        return joined(
            {"counts": counts, "optimiser": optimiser, "meter": meter, "state": self.state}
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave, between rounds."""
        counts = dict(self.layers.named_buffers())
        for name, value in unprefixed(state, "counts/").items():
            counts[name].copy_(value)
        load_optimiser(self.optimiser, unprefixed(state, "optimiser/"))
        if self.meter is not None:
            self.meter.load_state_dict(unprefixed(state, "meter/"))
        self.state = unprefixed(state, "state/")

    # -- a round -------------------------------------------------------------------------------

    @torch.no_grad()
    def rate(self) -> bytes:
        """Rate channels before anything crosses: one pass of the front, as it is, over the data.

        Returns:
            The message with the scores, which crosses where masks are merged.
        """
        assert self.meter is not None
        front = copy.deepcopy(self.front)  # BatchNorm counts what it sees
        training_mode(front, frozen_modules(front))
        for part in torch.arange(len(self.examples)).split(self.terms.training.batch_size):
            if len(part) >= self.smallest:
                batch = Batch.of(self.examples, part, self.terms.device)
                self.meter.watch(batch.run(front), batch.labels)
        scores = self.meter.scores()
        parts = {} if scores is None else {"scores": {"channels": scores.float()}}
        return message_of(parts, {"client": self.number})

    def begin(
        self, number: int, message: bytes, strategy: Strategy, mask: Tensor | None = None
    ) -> None:
        """Take the layers of round `number`, and the strategy that they are averaged by.

        Args:
            message: the server's: layers, what the strategy sends beside them, a merged mask.
            mask: where it does not cross, because the client knows it by itself.

        Raises:
            WireError: it is no such message, of another round, or its tensors or mask do not fit
                the client's layers.
        """
        broadcast, merged = read_round_start(message, number, self.terms.shape[0])
        take_values(self.owned, broadcast.tensors, needed=self.owned)
        self.mask = mask if merged is None else merged
        self.strategy = strategy
        self.role = LocalContext(
            model=self.layers,
            params=self.params,
            received={n: p.detach().clone() for n, p in self.params.items()},
            broadcast=broadcast,
            layout=strategy.layout,
            observer=None,
            state=self.state,
        )
        strategy.start(self.role)

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
        """The message that closes a round; see `RoundEnd`.

        Args:
            scores: [C]; None sends none.
        """
        extra = dict(self.strategy.finish(self.role))
        model = {
            piece.key: piece.of(self.owned)
            for piece in self.strategy.shared_pieces
            if self.strategy.sends(piece, ())
        }
        parts = {"model": model, "extra": extra, "counts": counts_in(self.layers)}
        if scores is not None:
            parts["scores"] = {"channels": scores.float()}
        facts = {"client": self.number, "round": number, "examples": len(self.examples)}
        if self.tail is not None:
            parts["loss"] = self.losses_seen()
        return message_of(parts, facts)

    def losses_seen(self) -> dict[str, Tensor]:
        """Examples that the tail has seen in the round, and the sum of their losses."""
        summed = sum(examples * float(loss) for examples, loss in self.losses)
        seen = sum(examples for examples, _ in self.losses)
        self.losses = []
        return {
            "examples": torch.tensor(seen),
            "sum": torch.tensor(summed, dtype=torch.float64),
        }

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
