"""Split training over rounds: send the layers out, train in one of the forms, average, evaluate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sluiceway.channels import ChannelChooser, merge_scores
from sluiceway.federated.batches import Batch, Examples, labels_of
from sluiceway.federated.client import Loss, Optimisation, exchanged, mix
from sluiceway.federated.evaluation import BATCH, Evaluation, widened
from sluiceway.federated.rounds import Record, Result, Rounds
from sluiceway.federated.wire import message_of, parts_of
from sluiceway.moe import Anatomy
from sluiceway.split.compress import Compressor
from sluiceway.split.cut import cut
from sluiceway.split.forms import FORMS, Traffic, generator_of, one_after_the_other, side_by_side
from sluiceway.split.header import BatchId
from sluiceway.split.methods import METHODS, ChannelChoice
from sluiceway.split.sides import ClientSide, ServerSide, client_layers
from sluiceway.strategies import Broadcast, FedAvg, Strategy, Update


@dataclass(frozen=True)
class SplitRecord(Record):
    """One round of split training.

    `accuracy` is that of the network as deployed: with the round's mask and rounding.
    `accuracy_full` is that of the same network with nothing dropped or rounded. `kept` channels
    cross in the mean over clients, of `channels`. `mask` and `scores` [C] are of the merged mask.
    """

    accuracy_full: float = 0.0
    kept: float = 0.0
    channels: int = 0
    mask: list[bool] | None = None
    scores: list[float] | None = None


@dataclass
class Split:
    """A split run: the layers, the sides, and what chooses channels.

    Args (of `build`): see `split_train`.
    """

    front: nn.Sequential
    back: nn.Sequential
    tail: nn.Sequential | None
    clients: list[ClientSide]
    servers: dict[int, ServerSide]
    method: Compressor
    choosers: dict[int, ChannelChooser]
    strategy: Strategy
    form: str
    channels: int
    test: Examples
    label_counts: Tensor
    loss: Loss
    device: torch.device
    merged_scores: Tensor | None = None
    own_scores: dict[int, Tensor] = field(default_factory=dict)

    # -- one round -----------------------------------------------------------------------------

    def play(self, number: int, chosen: Sequence[int], seed: int) -> SplitRecord:
        """Round `number` with the chosen clients."""
        began = time.perf_counter()
        traffic = Traffic()
        clients = [self.clients[i] for i in chosen]
        self.choose_masks(number, clients)
        if self.form == "sequential":
            self.in_sequence(number, clients, seed, traffic)
        else:
            self.in_parallel(number, clients, seed, traffic)
        deployed, full = self.judged(chosen)
        losses = [x for side in (*clients, *self.servers.values()) for x in side.losses]
        for side in (*clients, *self.servers.values()):
            side.losses = []
        masks = [c.mask for c in clients if c.mask is not None]
        kept = sum(float(m.sum()) for m in masks) / len(masks) if masks else float(self.channels)
        return SplitRecord(
            round=number,
            accuracy=deployed.accuracy,
            loss=deployed.mean_loss,
            train_loss=float(torch.stack(losses).mean()) if losses else float("nan"),
            bytes_up=traffic.up,
            bytes_down=traffic.down,
            seconds=time.perf_counter() - began,
            clients=list(chosen),
            refused={},
            accuracy_by_client=[
                deployed.weighted_accuracy(counts) if counts.sum() else None
                for counts in self.label_counts
            ],
            accuracy_full=full.accuracy,
            kept=kept,
            channels=self.channels,
            mask=masks[0].tolist() if masks and -1 in self.choosers else None,
            scores=self.merged_scores.tolist() if self.merged_scores is not None else None,
        )

    def choose_masks(self, number: int, clients: Sequence[ClientSide]) -> None:
        """The masks of this round, from the scores so far; before there are any, all is sent."""
        for client in clients:
            key = client.number if client.number in self.choosers else -1
            if key not in self.choosers:
                continue
            chooser = self.choosers[key]
            scores = self.merged_scores if key == -1 else self.own_scores.get(key)
            if key != -1 or client is clients[0]:
                known = torch.zeros(self.channels) if scores is None else scores
                chooser.choose(number, known)
            client.mask = chooser.mask

    def in_parallel(
        self, number: int, clients: Sequence[ClientSide], seed: int, traffic: Traffic
    ) -> None:
        """Every form in which each client has a front of its own, averaged at the end."""
        broadcast = self.strategy.broadcast(number)
        for client in clients:
            traffic.down += len(self.opening(broadcast, client))
            client.begin(self.strategy, broadcast)
        turns = {
            c.number: c.batches(number, generator_of(mix(seed, number, c.number))) for c in clients
        }
        if self.form == "copies":
            one_after_the_other(clients, turns, self.servers.__getitem__, traffic)
            average([self.servers[c.number].back for c in clients], [len(c.examples) for c in clients])
            for other in self.servers.values():
                other.back.load_state_dict(self.servers[clients[0].number].back.state_dict())
        else:
            side_by_side(clients, turns, self.servers[-1], traffic)
        updates = []
        for client in clients:
            message = self.closing(number, client)
            traffic.up += len(message)
            updates.append(self.read_closing(number, client, message))
        self.strategy.aggregate(updates)
        self.merge()

    def in_sequence(
        self, number: int, clients: Sequence[ClientSide], seed: int, traffic: Traffic
    ) -> None:
        """Clients in turn on one front, which is handed on through the server."""
        turns = {
            c.number: c.batches(number, generator_of(mix(seed, number, c.number))) for c in clients
        }

        def close(client: ClientSide) -> None:
            message = self.closing(number, client)
            traffic.up += len(message)
            update = self.read_closing(number, client, message)
            self.strategy.tensors |= {n: t.clone() for n, t in update.tensors.items()}

        for client in clients:
            broadcast = self.strategy.broadcast(number)
            traffic.down += len(self.opening(broadcast, client))
            client.begin(self.strategy, broadcast)
            one_after_the_other([client], turns, lambda _: self.servers[-1], traffic)
            close(client)
        self.merge()

    # -- messages between rounds ---------------------------------------------------------------

    def opening(self, broadcast: Broadcast, client: ClientSide) -> bytes:
        """What the server sends a client at the start of a round: layers, and a merged mask."""
        parts: dict[str, Any] = {"model": broadcast.tensors, "extra": broadcast.extra}
        if -1 in self.choosers and client.mask is not None and self.sends_scores:
            parts["mask"] = {"kept": client.mask.to(torch.uint8)}
        return message_of(parts, {"round": broadcast.round})

    def closing(self, number: int, client: ClientSide) -> bytes:
        """What a client sends at the end of a round: its layers, and its scores where asked."""
        scores = client.meter.scores() if client.meter is not None else None
        extra = dict(self.strategy.finish(client.role))
        parts: dict[str, Any] = {"model": client.owned, "extra": extra}
        if scores is not None and -1 in self.choosers and self.sends_scores:
            parts["scores"] = {"channels": scores.float()}
        elif scores is not None:
            self.own_scores[client.number] = scores
        facts = {"client": client.number, "round": number, "examples": len(client.examples)}
        return message_of(parts, facts)

    def read_closing(self, number: int, client: ClientSide, message: bytes) -> Update:
        """The server's reading of it."""
        parts = parts_of(message)
        if "scores" in parts:
            self.own_scores[client.number] = parts["scores"]["channels"]
        return Update(
            client.number,
            number,
            len(client.examples),
            parts.get("model", {}),
            extra=parts.get("extra", {}),
            nbytes=len(message),
        )

    @property
    def sends_scores(self) -> bool:
        """Whether merged masks need the clients' scores."""
        return isinstance(self.method, ChannelChoice) and self.method.sends_scores

    def merge(self) -> None:
        """Merge the newest scores of all clients that have any, weighted by their examples."""
        if -1 in self.choosers and self.own_scores:
            numbers = sorted(self.own_scores)
            sizes = [float(len(self.clients[i].examples)) for i in numbers]
            stack = torch.stack([self.own_scores[i].double() for i in numbers])
            self.merged_scores = merge_scores(stack, torch.tensor(sizes))

    # -- evaluation ----------------------------------------------------------------------------

    @torch.no_grad()
    def judged(self, chosen: Sequence[int]) -> tuple[Evaluation, Evaluation]:
        """The global network on the test set as deployed, and with nothing dropped or rounded.

        With a mask per client it is evaluated with each, weighted by the clients' examples.
        """
        layers = client_layers(self.front, self.tail)
        state = exchanged(layers)
        for name, value in self.strategy.tensors.items():
            state[name].copy_(value)
        middle = next(iter(self.servers.values())).back
        masks: list[Tensor | None] = [None]
        if self.choosers:
            masks = [self.clients[i].mask for i in (chosen if -1 not in self.choosers else chosen[:1])]
        full = self.run_test(layers, middle, None, whole=True)
        found = [self.run_test(layers, middle, mask, whole=False) for mask in masks]
        return sum(found, start=Evaluation.nothing()), full

    def run_test(
        self, layers: nn.ModuleDict, middle: nn.Module, mask: Tensor | None, *, whole: bool
    ) -> Evaluation:
        """Counts over the test set with one mask; `whole` passes by the compression."""
        layers.eval()
        middle.eval()
        classes = int(labels_of(self.test).max()) + 1
        correct, total = torch.zeros(2, classes, dtype=torch.int64)
        summed = 0.0
        for number, part in enumerate(torch.arange(len(self.test)).split(BATCH)):
            batch = Batch.of(self.test, part, self.device)
            values = batch.run(layers["front"])
            if not whole:
                message, _ = self.method.up(
                    values, BatchId(0, 0, number), mask=mask, training=False
                )
                values = self.method.open(message, device=self.device).values
            logits = middle(values)
            if "tail" in layers:
                logits = layers["tail"](logits)
            labels = batch.labels.cpu()
            correct += torch.bincount(labels[logits.argmax(-1).cpu() == labels], minlength=classes)
            total += torch.bincount(labels, minlength=classes)
            summed += float(self.loss(logits, batch.labels)) * len(part)
        return Evaluation(correct, total, summed)


def average(modules: Sequence[nn.Module], weights: Sequence[int]) -> None:
    """Give the first module the weighted mean of all their trained tensors, in place."""
    strategy = FedAvg()
    tensors = [{n: t.detach() for n, t in exchanged(m).items()} for m in modules]
    strategy.setup(tensors[0], Anatomy(()), len(modules))
    strategy.aggregate(
        Update(i, 0, weight, t) for i, (t, weight) in enumerate(zip(tensors, weights, strict=True))
    )
    for name, value in strategy.tensors.items():
        tensors[0][name].copy_(value)


def split_train(
    model: nn.Module,
    cut_at: str,
    clients: Sequence[Examples],
    test: Examples,
    method: Compressor | str = "sl",
    *,
    form: str = "parallel",
    tail_at: str | None = None,
    fronts: Strategy | None = None,
    rounds: int = 10,
    participation: float = 1.0,
    seed: int = 0,
    training: Optimisation | None = None,
    loss: Loss = F.cross_entropy,
    device: torch.device | str = "cpu",
    on_start: Callable[[], None] = lambda: None,
    on_round: Callable[[SplitRecord], None] = lambda record: None,
) -> Result:
    """Train a network that is cut between clients and a server, on this machine.

    Args:
        model: a chain of layers (see `sluiceway.split.cut`); trained in place.
        cut_at: name of the last layer that clients hold.
        clients: each client's data set of (input tensor, label); may be empty for some.
        test: the global test set.
        method: what crosses the cut: an object from `sluiceway.split.METHODS`, or its name.
        form: "sequential", "parallel", "copies" or "u"; see `forms`.
        tail_at: in a U-shape, name of the last layer that the server holds.
        fronts: how the clients' layers are averaged after a round; FedAvg if None. Sequential
            training hands one front on and averages nothing.
        rounds, participation, seed: as of `sluiceway.federate`.
        training: of all layers; optimisers live as long as the run.
        loss: of (logits, labels).
        device: where everything runs.
        on_start, on_round: called before the first round, and after each with its record.

    Raises:
        ValueError: a cut that is not there, a form that is not known, no client with examples.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is not known; allowed: {', '.join(FORMS)}")
    if (form == "u") != (tail_at is not None):
        raise ValueError("a U-shape, and it alone, needs a second cut: form = 'u' with tail_at")
    built = build(
        model.to(device),
        cut_at,
        tail_at,
        clients,
        test,
        METHODS[method]() if isinstance(method, str) else method,
        form=form,
        strategy=fronts or FedAvg(),
        training=training or Optimisation(lr=0.01, batch_size=64),
        loss=loss,
        device=torch.device(device),
        seed=seed,
    )
    plan = Rounds(rounds=rounds, participation=participation, seed=seed)
    holders = built.label_counts.sum(1).nonzero().flatten().tolist()
    if not holders:
        raise ValueError("no client holds any example")
    result = Result(
        empty=(built.label_counts.sum(1) == 0).nonzero().flatten().tolist(),
        label_counts=built.label_counts.tolist(),
    )
    on_start()
    with torch.random.fork_rng(devices=[]):
        for number in range(1, rounds + 1):
            torch.manual_seed(mix(seed, number))
            record = built.play(number, plan.chosen(number, holders), seed)
            result.records.append(record)
            on_round(record)
    result.tensors = built.strategy.tensors
    return result


def build(
    model: nn.Module,
    cut_at: str,
    tail_at: str | None,
    sets: Sequence[Examples],
    test: Examples,
    method: Compressor,
    *,
    form: str,
    strategy: Strategy,
    training: Optimisation,
    loss: Loss,
    device: torch.device,
    seed: int,
) -> Split:
    """Cut the model and set up both sides."""
    front, back = cut(model, cut_at)
    tail = None
    if tail_at is not None:
        back, tail = cut(back, tail_at)
    shape = crossing(front, next(s for s in sets if len(s)), device)
    front, back = method.attach(front, back, shape[0], len(shape) + 1)
    counts = [torch.bincount(labels_of(s)) if len(s) else torch.zeros(0).long() for s in sets]
    classes = max(len(c) for c in counts)
    tail_link = Compressor(quantize=method.quantize, quantize_gradient=method.quantize_gradient)
    common: dict[str, Any] = {
        "training": training,
        "link": method,
        "tail_link": tail_link,
        "loss": loss,
        "device": device,
    }
    choice = method if isinstance(method, ChannelChoice) else None
    sides = [
        ClientSide(
            number,
            examples,
            front,
            tail,
            meter=choice.meter(shape[0], classes, seed) if choice else None,
            **common,
        )
        for number, examples in enumerate(sets)
    ]
    numbers = range(len(sets)) if form == "copies" else [-1]
    servers = {
        n: ServerSide(copy_of(back) if form == "copies" else back, **common) for n in numbers
    }
    choosers = {}
    if choice:
        per_client = choice.masks == "client"
        keys = range(len(sets)) if per_client else [-1]
        examples = sum(map(len, sets)) * training.local_epochs
        batch = training.batch_size
        choosers = {
            key: choice.chooser(
                shape[0],
                lambda kept: round(
                    examples
                    / batch
                    * (
                        method.bytes_up((batch, *shape), kept, 1)
                        + method.bytes_down((batch, *shape), kept)
                    )
                ),
            )
            for key in keys
        }
    layers = client_layers(front, tail)
    strategy.setup({n: t.detach().cpu() for n, t in exchanged(layers).items()}, Anatomy(()), len(sets))
    return Split(
        front,
        back,
        tail,
        sides,
        servers,
        method,
        choosers,
        strategy,
        form,
        shape[0],
        test,
        torch.stack([widened(c, classes) for c in counts]),
        loss,
        device,
    )


def copy_of(module: nn.Module) -> nn.Module:
    """A module of its own with the same values."""
    import copy

    return copy.deepcopy(module)


@torch.no_grad()
def crossing(front: nn.Module, examples: Examples, device: torch.device) -> tuple[int, ...]:
    """Shape of what the front gives for one example."""
    was = front.training
    front.eval()
    shape = tuple(Batch.of(examples, torch.tensor([0]), device).run(front).shape[1:])
    front.train(was)
    return shape
