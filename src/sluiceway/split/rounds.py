"""Rounds of split training: send the layers out, train in one of the forms, average, evaluate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sluiceway.core.guards import fault
from sluiceway.core.messages import WireError, message_of
from sluiceway.core.parameters import exchanged
from sluiceway.core.round_loop import Record
from sluiceway.errors import line
from sluiceway.moe import MoELayout
from sluiceway.split.client_proxy import Away, ClientProxy
from sluiceway.split.config import batch_sizes, client_layers, counts_in
from sluiceway.split.evaluation import Evaluator
from sluiceway.split.mask_selector import ALL, MaskSelector
from sluiceway.split.messages import read_initial_scores, read_round_end
from sluiceway.split.schedules import Traffic, side_by_side
from sluiceway.split.server import SplitServer
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
class SplitLoop:
    """A split run, as `setup.build` makes it.

    Attributes:
        front, back, tail: the global layers, which are the model's own; tail None but in a U-shape.
        parties: the clients by number, those without examples included.
        servers: the server's side by client number, or of `ALL`.
        masks: of the channels.
        strategy: averages what clients hold.
        form: one of `SCHEDULES`.
        judge: evaluates.
        label_counts: [clients, classes].
        channels: C at the cut.
        crossing: channels that cross without a mask.
        smallest: examples of a client's smallest batch.
        traffic: of the round that is played.
        refused: of the round that is played, by client: why its layers were not averaged.
        losses: of the round that is played, at the clients' tails: examples, and their sum.
        counts: of the round that is played, the largest of the clients' counts of batches by name.
    """

    front: nn.Sequential
    back: nn.Sequential
    tail: nn.Sequential | None
    parties: Sequence[ClientProxy]
    servers: dict[int, SplitServer]
    masks: MaskSelector
    strategy: Strategy
    form: str
    judge: Evaluator
    label_counts: Tensor
    channels: int
    crossing: int
    smallest: int
    traffic: Traffic = field(default_factory=Traffic)
    refused: dict[int, str] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def run_round(self, number: int, chosen: Sequence[int]) -> SplitRecord:
        """Round `number` with the chosen clients."""
        began = time.perf_counter()
        self.traffic, self.refused, self.losses, self.counts = Traffic(), {}, [], {}
        parties = [self.parties[i] for i in chosen]
        for client in self.masks.unrated(chosen):
            self.rate(self.parties[client])
        self.masks.choose(number, chosen)
        # In sequence each client is a group of its own, whose average is its front: handed on.
        for group in [[p] for p in parties] if self.form == "sequential" else [parties]:
            self.train(number, group)
        self.commit(chosen)
        return self.recorded(number, chosen, began)

    def rate(self, party: ClientProxy) -> None:
        """Take a client's scores before the first round; without masks of their own they cross."""
        try:
            message = party.rate()
            if self.masks.crossing:
                self.traffic.up += len(message)
            scores = read_initial_scores(message, party.number, self.crossing)
            if scores is not None:
                self.masks.rate(party.number, scores)
        except WireError as error:
            self.refused[party.number] = str(error)

    def train(self, number: int, parties: Sequence[ClientProxy]) -> None:
        """Clients train on the server's newest layers; then theirs are averaged."""
        there = self.begun(number, parties)
        sizes = {
            p.number: batch_sizes(p.size, self.judge.terms.training, self.smallest) for p in there
        }
        tails = self.tail is not None
        groups = [[p] for p in there] if self.form == "copies" else [there]
        for group in groups:
            if group:
                server = self.servers[group[0].number if self.form == "copies" else ALL]
                of_these = {p.number: sizes[p.number] for p in group}
                self.refused |= side_by_side(
                    group, number, of_these, server, self.traffic, tails=tails
                )
        if self.form == "copies":
            self.average_copies([p for p in there if p.number not in self.refused])
        self.strategy.aggregate(self.closed(number, there))

    def begun(self, number: int, parties: Sequence[ClientProxy]) -> list[ClientProxy]:
        """Those of the clients that could be sent the layers."""
        opening, there = self.opening(number), []
        for party in parties:
            try:
                mask = None if self.masks.crossing else self.masks.mask(party.number)
                party.begin(number, opening, mask)
                self.traffic.down += len(opening)
                there.append(party)
            except Away as error:
                self.refused[party.number] = str(error)
        return there

    def opening(self, number: int) -> bytes:
        """What the server sends each client at the start of a round: layers, and a merged mask."""
        broadcast = self.strategy.broadcast(number)
        parts = {"model": broadcast.tensors, "extra": broadcast.extra}
        if self.masks.crossing and (mask := self.masks.mask(ALL)) is not None:
            parts["mask"] = {"kept": mask}
        return message_of(parts, {"round": number})

    def closed(self, number: int, parties: Sequence[ClientProxy]) -> list[Update]:
        """The layers of the clients whose round stands, at its end."""
        updates = []
        for party in parties:
            try:
                update = self.update_of(number, party)
                why = fault(update, self.strategy, number, [party.number])
            except WireError as error:
                why = str(error)
            if why is not None:
                self.refused.setdefault(party.number, why)
            elif party.number not in self.refused:
                updates.append(update)
        return updates

    def update_of(self, number: int, party: ClientProxy) -> Update:
        """A client's layers at the end of its round; scores, losses and counts are noted."""
        message, scores = party.end(number, self.masks.crossing)
        self.traffic.up += len(message)
        found = read_round_end(message, party.number, number, self.crossing)
        if found.scores is not None:
            scores = found.scores
        if strange := sorted(set(found.counts) - set(self.counted())):
            raise WireError(f"closing message: counts/{line(strange[0], 80)} was not to be sent")
        for name, value in found.counts.items():
            self.counts[name] = max(value, self.counts.get(name, 0))
        self.losses.append(found.loss)
        if scores is not None and party.number not in self.refused:
            self.masks.rate(party.number, scores)
        return Update(
            party.number, number, party.size, found.model, extra=found.extra, nbytes=len(message)
        )

    def counted(self) -> dict[str, Tensor]:
        """Counts of batches in the global layers that clients hold, by name."""
        return counts_in(client_layers(self.front, self.tail))

    @torch.no_grad()
    def average_copies(self, parties: Sequence[ClientProxy]) -> None:
        """Average the server's copies that trained, by examples; every client's starts from it.

        Optimisers, and BatchNorm's counts of batches, stay with the copies.
        """
        averaged = exchanged(self.back)
        strategy = FedAvg()
        strategy.setup(averaged, MoELayout(()), len(parties))
        strategy.aggregate(
            Update(p.number, 0, p.size, exchanged(self.servers[p.number].back)) for p in parties
        )
        for layers in (self.back, *(server.back for server in self.servers.values())):
            write(exchanged(layers), strategy.tensors)

    def commit(self, chosen: Sequence[int]) -> None:
        """Write what was averaged into the global layers, which are the model's own."""
        write(exchanged(client_layers(self.front, self.tail)), self.strategy.tensors)
        for name, buffer in self.counted().items():
            buffer.fill_(self.counts.get(name, int(buffer)))
        if self.form == "copies":
            held = [counts_in(self.servers[i].back) for i in chosen]
            for name, buffer in counts_in(self.back).items():
                buffer.fill_(max(int(found[name]) for found in held))

    def recorded(self, number: int, chosen: Sequence[int], began: float) -> SplitRecord:
        """Evaluate, and sum the round up."""
        sizes = self.label_counts.sum(1).tolist()
        per_client = self.masks.choosers and not self.masks.merged
        deployed = [i for i, size in enumerate(sizes) if size] if per_client else [ALL]
        masks = {key: self.masks.mask(key) for key in deployed}
        verdict = self.judge.judge(self.front, self.back, self.tail, masks)
        accuracy, loss = verdict.mean(sizes)
        kept = [self.crossing if (m := self.masks.mask(i)) is None else m.sum() for i in chosen]
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
        losses = list(self.losses)
        for server in self.servers.values():
            losses += [(examples, examples * float(loss)) for examples, loss in server.losses]
            server.losses = []
        total = sum(examples for examples, _ in losses)
        return sum(summed for _, summed in losses) / total if total else float("nan")


@torch.no_grad()
def write(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy values into the tensors of the same names."""
    for name, value in values.items():
        tensors[name].copy_(value)
