"""Rounds of split training: send the layers out, train in one of the forms, average, evaluate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sluiceway.federated.client import exchanged, mix
from sluiceway.federated.guards import fault
from sluiceway.federated.rounds import Record
from sluiceway.federated.wire import WireError, message_of
from sluiceway.moe import Anatomy
from sluiceway.split.choosing import ALL, Masks
from sluiceway.split.client import ClientSide
from sluiceway.split.forms import Traffic, side_by_side
from sluiceway.split.judging import Judge
from sluiceway.split.messages import read_closing, read_rating
from sluiceway.split.server import ServerSide
from sluiceway.split.terms import client_layers
from sluiceway.strategies import FedAvg, Strategy, Update


@dataclass(frozen=True)
class SplitRecord(Record):
    """One round of split training.

    `accuracy`, `loss` and `accuracy_by_client` are those of the network as deployed: with the
    round's masks and rounding, and where clients have masks of their own the mean over clients by
    their examples. `accuracy_full` is that of the same network with nothing dropped or rounded.
    `kept` channels cross in the mean over the round's clients, of `channels` at the cut. `mask` [C]
    is the merged one, `scores` [C] are those merged at the end of the round, for the next mask;
    None where there are none.
    """

    accuracy_full: float = 0.0
    kept: float = 0.0
    channels: int = 0
    mask: list[bool] | None = None
    scores: list[float] | None = None


@dataclass
class Split:
    """A split run, as `setup.build` makes it.

    Attributes:
        front, back, tail: the global layers, which are the model's own; tail None but in a U-shape.
        clients: by number, those without examples included.
        servers: the server's side by client number, or of `ALL`.
        masks: of the channels.
        strategy: averages what clients hold.
        form: one of `FORMS`.
        judge: evaluates.
        label_counts: [clients, classes].
        channels: C at the cut.
        crossing: channels that cross without a mask.
        seed: of the whole run.
        traffic: of the round that is played.
        refused: of the round that is played, by client: why its layers were not averaged.
    """

    front: nn.Sequential
    back: nn.Sequential
    tail: nn.Sequential | None
    clients: list[ClientSide]
    servers: dict[int, ServerSide]
    masks: Masks
    strategy: Strategy
    form: str
    judge: Judge
    label_counts: Tensor
    channels: int
    crossing: int
    seed: int
    traffic: Traffic = field(default_factory=Traffic)
    refused: dict[int, str] = field(default_factory=dict)

    def play(self, number: int, chosen: Sequence[int]) -> SplitRecord:
        """Round `number` with the chosen clients."""
        began = time.perf_counter()
        self.traffic, self.refused = Traffic(), {}
        clients = [self.clients[i] for i in chosen]
        for client in self.masks.unrated(chosen):
            self.rate(self.clients[client])
        self.masks.choose(number, chosen)
        # In sequence each client is a group of its own, whose average is its front: handed on.
        for group in [[c] for c in clients] if self.form == "sequential" else [clients]:
            self.train(number, group)
        self.settle(clients)
        return self.recorded(number, chosen, began)

    def rate(self, client: ClientSide) -> None:
        """Take a client's scores before the first round; without masks of their own they cross."""
        message = client.rate()
        try:
            scores = read_rating(message, client.number, self.crossing)
            if scores is not None:
                self.masks.rate(client.number, scores)
        except WireError as error:
            self.refused[client.number] = str(error)
        if self.masks.crossing:
            self.traffic.up += len(message)

    def train(self, number: int, clients: Sequence[ClientSide]) -> None:
        """Clients train on the server's newest layers; then theirs are averaged."""
        opening = self.opening(number)
        for client in clients:
            mask = None if self.masks.crossing else self.masks.mask(client.number)
            client.begin(number, opening, self.strategy, mask)
            self.traffic.down += len(opening)
        turns = {c.number: c.batches(number, self.generator(number, c.number)) for c in clients}
        if self.form == "copies":
            for client in clients:
                server = self.servers[client.number]
                self.refused |= side_by_side([client], turns, server, self.traffic)
            self.average_copies([c for c in clients if c.number not in self.refused])
        else:
            self.refused |= side_by_side(clients, turns, self.servers[ALL], self.traffic)
        updates = []
        for client in clients:
            try:
                update = self.closed(number, client)
                why = fault(update, self.strategy, number, [client.number])
            except WireError as error:
                why = str(error)
            if why is not None:
                self.refused.setdefault(client.number, why)
            elif client.number not in self.refused:
                updates.append(update)
        self.strategy.aggregate(updates)

    def generator(self, number: int, client: int) -> torch.Generator:
        """What shuffles and augments a client's batches of a round."""
        return torch.Generator().manual_seed(mix(self.seed, number, client))

    def opening(self, number: int) -> bytes:
        """What the server sends each client at the start of a round: layers, and a merged mask."""
        broadcast = self.strategy.broadcast(number)
        parts = {"model": broadcast.tensors, "extra": broadcast.extra}
        if self.masks.crossing and (mask := self.masks.mask(ALL)) is not None:
            parts["mask"] = {"kept": mask}
        return message_of(parts, {"round": number})

    def closed(self, number: int, client: ClientSide) -> Update:
        """A client's layers at the end of its round, as the server reads them; scores are noted."""
        scores = client.meter.scores() if client.meter is not None else None
        message = client.end(number, scores if self.masks.crossing else None)
        self.traffic.up += len(message)
        parts = read_closing(message, client.number, number, self.crossing)
        if self.masks.crossing and "scores" in parts:
            scores = parts["scores"]["channels"]
        if scores is not None and client.number not in self.refused:
            self.masks.rate(client.number, scores)
        return Update(
            client.number,
            number,
            len(client.examples),
            parts.get("model", {}),
            extra=parts.get("extra", {}),
            nbytes=len(message),
        )

    @torch.no_grad()
    def average_copies(self, clients: Sequence[ClientSide]) -> None:
        """Average the server's copies that trained, by examples; every client's starts from it.

        Optimisers, and BatchNorm's counts of batches, stay with the copies.
        """
        averaged = exchanged(self.back)
        strategy = FedAvg()
        strategy.setup(averaged, Anatomy(()), len(clients))
        strategy.aggregate(
            Update(c.number, 0, len(c.examples), exchanged(self.servers[c.number].back))
            for c in clients
        )
        for layers in (self.back, *(server.back for server in self.servers.values())):
            write(exchanged(layers), strategy.tensors)

    def settle(self, clients: Sequence[ClientSide]) -> None:
        """Write what was averaged into the global layers, which are the model's own."""
        write(exchanged(client_layers(self.front, self.tail)), self.strategy.tensors)
        count(client_layers(self.front, self.tail), [c.layers for c in clients])
        if self.form == "copies":
            count(self.back, [self.servers[c.number].back for c in clients])

    def recorded(self, number: int, chosen: Sequence[int], began: float) -> SplitRecord:
        """Evaluate, and sum the round up."""
        sizes = self.label_counts.sum(1).tolist()
        per_client = self.masks.choosers and not self.masks.merged
        deployed = [i for i, size in enumerate(sizes) if size] if per_client else [ALL]
        masks = {key: self.masks.mask(key) for key in deployed}
        verdict = self.judge.judge(self.front, self.back, self.tail, masks)
        accuracy, loss = verdict.mean(sizes)
        kept = [self.crossing if (m := self.clients[i].mask) is None else m.sum() for i in chosen]
        merged = self.masks.merged_scores()
        mask = self.masks.mask(ALL) if self.masks.merged else None
        return SplitRecord(
            round=number,
            accuracy=accuracy,
            loss=loss,
            train_loss=self.train_loss(),
            bytes_up=self.traffic.up,
            bytes_down=self.traffic.down,
            seconds=time.perf_counter() - began,
            clients=list(chosen),
            refused=self.refused,
            accuracy_by_client=[
                verdict.of(i).weighted_accuracy(held) if held.sum() else None
                for i, held in enumerate(self.label_counts)
            ],
            report=self.strategy.report(),
            accuracy_full=verdict.full.accuracy,
            kept=float(sum(kept)) / len(kept),
            channels=self.channels,
            mask=None if mask is None else mask.tolist(),
            scores=None if merged is None else merged.tolist(),
        )

    def train_loss(self) -> float:
        """Mean loss over the round's training examples; NaN if there was no step."""
        losses: list[tuple[int, Tensor]] = []
        sides: list[ClientSide | ServerSide] = [*self.clients, *self.servers.values()]
        for side in sides:
            losses += side.losses
            side.losses = []
        total = sum(examples for examples, _ in losses)
        summed = sum(examples * float(loss) for examples, loss in losses)
        return summed / total if total else float("nan")


@torch.no_grad()
def write(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy values into the tensors of the same names."""
    for name, value in values.items():
        tensors[name].copy_(value)


def count(layers: nn.Module, trained: Sequence[nn.Module]) -> None:
    """Give BatchNorm's counts of batches, which are not averaged, the largest of those trained."""
    for name, buffer in layers.named_buffers():
        if buffer.dtype == torch.int64:
            found = torch.stack([dict(m.named_buffers())[name] for m in trained])
            buffer.copy_(found.amax(0))
