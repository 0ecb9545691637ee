"""The federated round, whatever engine carries it: sample, train, guard, aggregate, evaluate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from sluiceway.federated.evaluation import Evaluation
from sluiceway.strategies import Broadcast, Strategy, Update
from sluiceway.strategies.base import LARGEST_SEED, PARAMETERS


@checked(config=PARAMETERS, kw_only=True, frozen=True)
class Rounds:
    """How many rounds there are, and who takes part.

    rounds: in [1, 99999]. participation: share of the clients that train in a round, in (0, 1]; at
    least one does. seed: in [0, 2^63); everything random in the run comes from it.
    """

    rounds: int = Field(default=10, ge=1, le=99_999)
    participation: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)

    def chosen(self, number: int, holders: Sequence[int]) -> list[int]:
        """The clients of round `number`, in ascending order, of those that hold examples."""
        count = max(1, round(self.participation * len(holders)))
        rng = np.random.default_rng([self.seed, number])
        return sorted(rng.choice(np.asarray(holders), size=count, replace=False).tolist())


class Engine(Protocol):
    """What carries messages between the server's loop and its clients."""

    def train(
        self, broadcast: Broadcast, clients: Sequence[int], personal: set[int], *, keep: bool
    ) -> Iterator[Update]:
        """Updates in the order of `clients`, as they become ready.

        Args:
            personal: the clients that also evaluate their own model after training.
            keep: updates stay readable until the next call; else only until the next update.
        """
        ...

    def broadcast_bytes(self) -> int:
        """Packed length of the last broadcast, as one client gets it."""
        ...

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Evaluation:
        """The global model on the global test set."""
        ...


@dataclass(frozen=True)
class Record:
    """One round, as a line of metrics.jsonl.

    `accuracy_by_client` is the global model's, on each client's mix of labels (None for a client
    without examples). `refused` names the clients whose update was left out, and why.
    """

    round: int
    accuracy: float
    loss: float
    train_loss: float
    bytes_up: int
    bytes_down: int
    seconds: float
    clients: list[int]
    refused: dict[int, str]
    accuracy_by_client: list[float | None]
    report: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self) | {"refused": {str(k): v for k, v in self.refused.items()}}


@dataclass
class Result:
    """What a federated run came to.

    Attributes:
        records: one a round.
        tensors: the global trained tensors by name.
        personal_accuracy: by client number, of the client's own model after its last training on
            test examples weighted as it holds labels.
        empty: clients that hold no example.
        label_counts: [clients, classes], who holds what.
    """

    records: list[Record] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    personal_accuracy: dict[int, float] = field(default_factory=dict)
    empty: list[int] = field(default_factory=list)
    label_counts: list[list[int]] = field(default_factory=list)

    @property
    def accuracy_by_round(self) -> list[float]:
        return [record.accuracy for record in self.records]

    @property
    def accuracy(self) -> float:
        """Of the global model after the last round, on the global test set."""
        return self.records[-1].accuracy

    @property
    def best_accuracy(self) -> float:
        return max(self.accuracy_by_round)

    @property
    def bytes_up(self) -> int:
        """Clients to server, all rounds, as packed."""
        return sum(record.bytes_up for record in self.records)

    @property
    def bytes_down(self) -> int:
        """Server to clients, all rounds, as packed."""
        return sum(record.bytes_down for record in self.records)

    @property
    def seconds(self) -> float:
        """Wall time of the rounds, evaluation included."""
        return sum(record.seconds for record in self.records)

    @property
    def refused(self) -> int:
        """Updates that were left out, all rounds."""
        return sum(len(record.refused) for record in self.records)


@dataclass
class Loop:
    """The server's side of a federated run.

    Attributes:
        strategy: set up with the initial tensors.
        engine: carries messages.
        rounds: how many, and who takes part.
        label_counts: [clients, classes] int64; a client without examples never takes part.
        result: grows round by round; give an earlier one to continue it.
        on_round: called after every round with the newest record.
        on_update: called after every update with (done, of).
    """

    strategy: Strategy
    engine: Engine
    rounds: Rounds
    label_counts: Tensor
    result: Result = field(default_factory=Result)
    on_round: Callable[[Record], None] = lambda record: None
    on_update: Callable[[int, int], None] = lambda done, of: None

    def run(self) -> Result:
        """Play the rounds that are left."""
        sizes = self.label_counts.sum(1)
        holders = sizes.nonzero().flatten().tolist()
        if not holders:
            raise ValueError("no client holds any example")
        self.result.empty = (sizes == 0).nonzero().flatten().tolist()
        self.result.label_counts = self.label_counts.tolist()
        plan = [self.rounds.chosen(n + 1, holders) for n in range(self.rounds.rounds)]
        last = {client: n + 1 for n, chosen in enumerate(plan) for client in chosen}
        for number in range(len(self.result.records) + 1, self.rounds.rounds + 1):
            chosen = plan[number - 1]
            personal = {client for client in chosen if last[client] == number}
            record = self.play(number, chosen, personal)
            self.result.records.append(record)
            self.result.tensors = self.strategy.tensors
            self.on_round(record)
        return self.result

    def play(self, number: int, chosen: list[int], personal: set[int]) -> Record:
        """One round."""
        began = time.perf_counter()
        keep = not self.strategy.streams()
        coming = self.engine.train(self.strategy.broadcast(number), chosen, personal, keep=keep)
        tally = Tally(self.strategy, len(chosen), self.on_update)
        self.strategy.aggregate(tally.usable(coming))
        self.result.personal_accuracy |= tally.personal
        found = self.engine.evaluate(self.strategy.tensors)
        return Record(
            round=number,
            accuracy=found.accuracy,
            loss=found.mean_loss,
            train_loss=tally.mean_loss(),
            bytes_up=tally.nbytes,
            bytes_down=self.engine.broadcast_bytes() * len(chosen),
            seconds=time.perf_counter() - began,
            clients=chosen,
            refused=tally.refused,
            accuracy_by_client=[
                found.weighted_accuracy(counts) if counts.sum() else None
                for counts in self.label_counts
            ],
            report=self.strategy.report(),
        )


@dataclass
class Tally:
    """Counts updates on their way to the strategy and leaves out those that would harm it."""

    strategy: Strategy
    of: int
    on_update: Callable[[int, int], None]
    done: int = 0
    nbytes: int = 0
    refused: dict[int, str] = field(default_factory=dict)
    personal: dict[int, float] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)

    def usable(self, coming: Iterator[Update]) -> Iterator[Update]:
        """The updates that pass `fault`."""
        for update in coming:
            self.done += 1
            self.nbytes += update.nbytes
            if "personal_accuracy" in update.metrics:
                self.personal[update.client] = update.metrics["personal_accuracy"]
            if why := fault(update, self.strategy):
                self.refused[update.client] = why
            else:
                self.losses.append((update.examples, update.metrics.get("loss", float("nan"))))
                yield update
            self.on_update(self.done, self.of)

    def mean_loss(self) -> float:
        """The clients' mean training loss, example-weighted; NaN without a usable update."""
        weight = sum(n for n, _ in self.losses)
        return sum(n * x for n, x in self.losses) / weight if weight else float("nan")


def fault(update: Update, strategy: Strategy) -> str | None:
    """Why this update must not be aggregated, in a few words; None if nothing is wrong."""
    if update.examples <= 0:
        return f"{update.examples} examples"
    for piece in strategy.shared_pieces:
        value = update.tensors.get(piece.key)
        if value is not None and not finite(value):
            return f"NaN or Inf in {piece.key}"
    for name, value in update.extra.items():
        if not finite(value):
            return f"NaN or Inf in {name}"
    for block, routing in enumerate(update.routing):
        for part in (routing.load, routing.routing, routing.margin, routing.region):
            if part is not None and not finite(part):
                return f"NaN or Inf in the routing report of block {block}"
    return None


def finite(value: Tensor) -> bool:
    """Whether all values are finite. One sum tells unless it overflows, which is then checked."""
    if not value.is_floating_point():
        return True
    return bool(value.sum(dtype=torch.float32).isfinite()) or bool(value.isfinite().all())
