"""Rounds of split training: send the layers out, train by a schedule, average, evaluate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from sluiceway.channels import Basis
from sluiceway.core.aggregation import aggregate
from sluiceway.core.batches import Examples
from sluiceway.core.guards import fault
from sluiceway.core.messages import WireError, message_of
from sluiceway.core.parameters import exchanged
from sluiceway.core.round_loop import Record, Rounds
from sluiceway.errors import quoted
from sluiceway.moe import MoELayout
from sluiceway.split.client_proxy import Away, ClientProxy
from sluiceway.split.config import batch_counts, summed_losses
from sluiceway.split.deployed import DeployedNetwork
from sluiceway.split.evaluation import Evaluator, over_clients
from sluiceway.split.mask_selector import ALL, MaskSelector
from sluiceway.split.memory import ExampleMemory, require_room
from sluiceway.split.messages import read_initial_scores, read_round_end
from sluiceway.split.mixer import BasisSelector, measured_size, start_learned
from sluiceway.split.schedules import Traffic, train_together
from sluiceway.split.setup import SharedSetup
from sluiceway.strategies import FedAvg, Update


@dataclass(frozen=True)
class SplitRecord(Record):
    """One round of split training.

    `accuracy`, `loss` and `accuracy_by_client` are those of the network as deployed: with the
    round's masks and rounding, and where clients have masks of their own the mean over clients by
    their examples. `accuracy_full` is that of the same network with nothing dropped or rounded.
    `bytes_per_prediction` cross for a test example, in a U-shape both ways; training's bytes have
    none of them. `bits` cross up for each value of the smashed data, see `Traffic`; None where
    nothing did. `kept` channels cross in the mean over the round's clients, of `channels` at the
    cut. `mask` [C] is the merged one, `scores` [C] are those merged at the end of the round, for
    the next mask; None where there are none.
    """

    accuracy_full: float = 0.0
    kept: float = 0.0
    channels: int = 0
    mask: list[bool] | None = None
    scores: list[float] | None = None
    bits: float | None = None
    bytes_per_prediction: float = 0.0


class SplitLoop:
    """The server of a split run, round by round.

    Args:
        setup: what both sides made alike; its layers are the global ones, and the network's own.
        plan: how many rounds there are, and who takes part.
        test: the global test set.
        label_counts: who holds what, [clients, classes].
        clients: in order of their ids, those without examples included.

    Attributes:
        servers: the server's side by client, or of `ALL`.
        masks: of the channels.
        mixer: of a method that sends components of a basis, or None.
        memory: the server's end of delta coding, or None.
        unsure: clients whose end may be another one by now.
        confusion: of the newest evaluation, see `Result`.
        traffic, rejected, losses, counts: of the current round: bytes; by client why its layers
            were not averaged; examples and summed losses at clients' tails; by name the largest of
            the clients' counts of batches.
    """

    def __init__(
        self,
        setup: SharedSetup,
        plan: Rounds,
        test: Examples,
        label_counts: Tensor,
        clients: Sequence[ClientProxy],
    ) -> None:
        self.setup, self.clients, self.label_counts = setup, clients, label_counts
        self.model, self.strategy = setup.model, setup.strategy
        self.sizes: list[int] = label_counts.sum(1).tolist()
        self.eligible = [client_id for client_id, size in enumerate(self.sizes) if size]
        self.memory, self.unsure = None, set[int]()
        if setup.config.link.delta:
            require_room(self.sizes, setup.config.shape, setup.config.device)
            self.memory = ExampleMemory()
        self.servers = setup.servers(self.memory)
        self.confusion: list[list[int]] = []
        self.evaluator, self.metric = Evaluator(test, setup.config), plan.metric
        largest = sorted(self.sizes, reverse=True)[: len(plan.chosen(1, self.eligible))]
        nbytes, crossing = setup.round_bytes(largest), setup.model.shape[0]
        self.masks = MaskSelector(setup.choice, crossing, self.sizes, nbytes, plan.seed)
        self.mixer, self.measures = None, crossing
        if setup.mixing is not None:
            classes = setup.config.classes
            self.mixer = BasisSelector(setup.mixing, crossing, classes)
            self.measures, _ = measured_size(setup.mixing, crossing, classes)
        for client_id in range(len(clients)):  # scores that are known from the beginning
            scorer = setup.scorer(client_id)
            if scorer is not None and (scores := scorer.scores()) is not None:
                self.masks.rate(client_id, scores)

    def run_round(self, round: int, chosen: Sequence[int]) -> SplitRecord:
        """One round with the chosen clients."""
        began = time.perf_counter()
        self.traffic, self.rejected = Traffic(), dict[int, str]()
        self.losses, self.counts = list[tuple[int, float]](), dict[str, int]()
        for server in self.servers.values():
            server.newest.clear()
        # 1. Choose the channels, or a basis of them; clients whose scores are needed already rate
        # theirs first.
        for client_id in self.selector.unrated(chosen):
            self.collect_initial_scores(self.clients[client_id])
        self.masks.choose(round, chosen)
        if self.mixer is not None:
            self.choose_basis(round, self.mixer)
        clients = [self.clients[client_id] for client_id in chosen]
        # In sequence each client is a group of its own, whose average is its front: handed on.
        for group in [[c] for c in clients] if self.setup.schedule == "sequential" else [clients]:
            # 2. Send the layers.
            present = self.send_layers(round, group)
            # 3. Train: smashed data up and gradients down, batch by batch.
            self.train(round, present)
            # 4. Average the layers that clients trained.
            aggregate(self.strategy, self.collect_updates(round, present), round)
        # 5. Write the averages into the global layers.
        self.commit(chosen)
        # 6. Evaluate.
        return self.evaluate(round, chosen, began)

    def choose_basis(self, round: int, mixer: BasisSelector) -> None:
        """Have both sides use the basis of a round; layers that learn theirs begin at it."""
        changed = mixer.choose(round)
        if mixer.method.basis != "learned":
            for server in self.servers.values():
                server.basis = self.basis
        elif changed and mixer.basis is not None:
            own = [self.model.back, *(server.back for server in self.servers.values())]
            backs = list({id(back): back for back in own}.values())
            for name, value in start_learned(self.model, backs, mixer.basis).items():
                self.strategy.tensors[name].copy_(value)

    def collect_initial_scores(self, client: ClientProxy) -> None:
        """Take a client's scores before the first round; for masks of their own none cross."""
        try:
            message = client.rate()
            if self.scores_cross:
                self.traffic.up += len(message)
            scores = read_initial_scores(message, client.client_id, self.measures)
            if scores is not None:
                self.selector.rate(client.client_id, scores)
        except WireError as error:
            self.rejected[client.client_id] = str(error)

    @property
    def selector(self) -> MaskSelector | BasisSelector:
        """What takes the clients' scores."""
        return self.mixer or self.masks

    @property
    def basis(self) -> Basis | None:
        """In which smashed data cross; None for channels."""
        return None if self.mixer is None else self.mixer.on(self.setup.config.device)

    @property
    def scores_cross(self) -> bool:
        """Whether clients send what they measure."""
        choice = self.setup.choice
        rated_here = choice is not None and choice.at_server
        return (self.masks.crossing and not rated_here) or self.mixer is not None

    def send_layers(self, round: int, clients: Sequence[ClientProxy]) -> list[ClientProxy]:
        """Start the round at the clients; returns those that could be reached."""
        message, present = self.round_start(round), []
        for client in clients:
            try:
                mask = None if self.masks.crossing else self.masks.mask(client.client_id)
                client.begin(round, message, mask, client.client_id in self.unsure)
                self.unsure.discard(client.client_id)
                self.traffic.down += len(message)
                present.append(client)
            except Away as error:
                self.rejected[client.client_id] = str(error)
        return present

    def round_start(self, round: int) -> bytes:
        """What the server sends each client at the start of a round: layers, and a merged mask."""
        broadcast = self.strategy.broadcast(round)
        parts = {"model": broadcast.tensors, "extra": broadcast.extra}
        if self.masks.crossing and (mask := self.masks.mask(ALL)) is not None:
            parts["mask"] = {"kept": mask}
        if self.mixer is not None and (basis := self.mixer.to_send()):
            parts["basis"] = basis
        return message_of(parts, {"round": round})

    def train(self, round: int, clients: Sequence[ClientProxy]) -> None:
        """Clients train with the server's layers, or each with the server's copy for it."""
        config, smallest = self.setup.config, self.model.smallest[0]
        sizes = {
            c.client_id: config.epoch_batches(c.size, smallest, config.training.local_epochs)
            for c in clients
        }
        copies = self.setup.schedule == "copies"
        for group in [[c] for c in clients] if copies else [clients]:
            if group:
                self.rejected |= train_together(
                    group,
                    round,
                    {c.client_id: sizes[c.client_id] for c in group},
                    self.servers[group[0].client_id if copies else ALL],
                    self.traffic,
                    tails=self.model.tail is not None,
                )
        for key, server in self.servers.items():
            if config.recalibrate:
                server.recalibrate()
            if server.scorer is not None and (scores := server.scorer.scores()) is not None:
                self.masks.rate(key, scores)
        if copies:
            self.average_copies([c for c in clients if c.client_id not in self.rejected])

    def collect_updates(self, round: int, clients: Sequence[ClientProxy]) -> list[Update]:
        """The layers at the end of the round of the clients that were not rejected."""
        updates = []
        for client in clients:
            try:
                update = self.update_of(round, client)
                why = fault(update, self.strategy, round, [client.client_id])
            except WireError as error:
                why = str(error)
            if why is not None:
                self.rejected.setdefault(client.client_id, why)
            elif client.client_id not in self.rejected:
                updates.append(update)
        if self.memory is not None:
            for client_id in {client.client_id for client in clients} & self.rejected.keys():
                self.memory.forget(client_id)
                self.unsure.add(client_id)
        return updates

    def update_of(self, round: int, client: ClientProxy) -> Update:
        """A client's layers at the end of its round; scores, losses and counts are noted."""
        message, scores = client.end(round, self.scores_cross)
        self.traffic.up += len(message)
        found = read_round_end(message, client.client_id, round, self.measures)
        if found.scores is not None:
            scores = found.scores
        counted = batch_counts(self.model.client_layers())
        if strange := sorted(set(found.counts) - set(counted)):
            raise WireError(f"round-end message: {quoted(f'counts/{strange[0]}')} is not expected")
        epochs, (examples, loss) = self.setup.config.training.local_epochs, found.loss
        if not 0 <= examples <= epochs * client.size or not isfinite(loss):
            raise WireError(
                f"round-end message: a loss of {loss:.3g} over {examples} examples; expected a "
                f"finite one over at most {epochs * client.size}"
            )
        for name, value in found.counts.items():
            self.counts[name] = max(value, self.counts.get(name, 0))
        self.losses.append(found.loss)
        if scores is not None and client.client_id not in self.rejected:
            self.selector.rate(client.client_id, scores)
        client_id, size, nbytes = client.client_id, client.size, len(message)
        return Update(client_id, round, size, found.model, extra=found.extra, nbytes=nbytes)

    @torch.no_grad()
    def average_copies(self, clients: Sequence[ClientProxy]) -> None:
        """Average the server's copies that trained, by examples; every client's starts from it.

        Optimisers, and BatchNorm's counts of batches, stay with the copies.
        """
        back, strategy = exchanged(self.model.back), FedAvg()
        strategy.setup(back, MoELayout(()), len(clients))
        updates = [
            Update(c.client_id, 0, c.size, exchanged(self.servers[c.client_id].back))
            for c in clients
        ]
        aggregate(strategy, updates)
        for layers in (back, *(exchanged(server.back) for server in self.servers.values())):
            for name, value in strategy.tensors.items():
                layers[name].copy_(value)

    @torch.no_grad()
    def commit(self, chosen: Sequence[int]) -> None:
        """Write what was averaged into the global layers, which are the network's own."""
        layers = self.model.client_layers()
        tensors = exchanged(layers)
        for name, value in self.strategy.tensors.items():
            tensors[name].copy_(value)
        for name, buffer in batch_counts(layers).items():
            buffer.fill_(self.counts.get(name, int(buffer)))
        if self.setup.schedule == "copies":
            held = [batch_counts(self.servers[i].back) for i in chosen]
            for name, buffer in batch_counts(self.model.back).items():
                buffer.fill_(max(int(found[name]) for found in held))

    def evaluate(self, round: int, chosen: Sequence[int], began: float) -> SplitRecord:
        """Evaluate the global network, and sum the round up."""
        masks, crossing = self.masks, self.model.shape[0]
        found = self.evaluator.evaluate(self.model, self.deployed_masks(), self.basis)
        accuracy, loss = found.mean(self.sizes)
        self.confusion = found.confusion().tolist()
        kept = [crossing if (m := masks.mask(i)) is None else int(m.sum()) for i in chosen]
        scores = masks.merged_scores()
        mask = masks.mask(ALL) if masks.merged else None
        return SplitRecord(
            round=round,
            accuracy=accuracy,
            loss=loss,
            train_loss=self.train_loss(),
            bytes_up=self.traffic.up,
            bytes_down=self.traffic.down,
            seconds=time.perf_counter() - began,
            clients=list(chosen),
            rejected=self.rejected,
            accuracy_by_client=[
                found.of(i).weighted_accuracy(held) if held.sum() else None
                for i, held in enumerate(self.label_counts)
            ],
            report=self.strategy.report(),
            metrics=found.metrics(self.sizes, self.metric),
            accuracy_full=found.full.accuracy,
            kept=sum(kept) / len(kept),
            channels=self.model.channels,
            mask=None if mask is None else mask.tolist(),
            scores=None if scores is None else scores.tolist(),
            bits=self.traffic.bits,
            bytes_per_prediction=over_clients(found.nbytes, self.sizes),
        )

    def deployed_masks(self) -> dict[int, Tensor | None]:
        """The newest masks, by client that holds examples, or of `ALL` if all have the same."""
        masks = self.masks
        keys = self.eligible if masks.choosers and not masks.merged else [ALL]
        return {key: masks.mask(key) for key in keys}

    def deployed(self) -> DeployedNetwork:
        """The network that is evaluated."""
        config, masks = self.setup.config, self.deployed_masks()
        return DeployedNetwork(self.model, config.link, config.tail_link, masks, self.basis)

    def train_loss(self) -> float:
        """Mean loss over the round's training examples; NaN if there was no step."""
        losses = list(self.losses)
        for server in self.servers.values():
            sizes = [examples for examples, _ in server.losses]
            losses += zip(sizes, summed_losses(server.losses), strict=True)
            server.losses = []
        total = sum(examples for examples, _ in losses)
        return sum(summed for _, summed in losses) / total if total else float("nan")
