"""The federated round, whatever engine carries it: sample, train, guard, aggregate, evaluate."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any, Protocol, Self

import numpy as np
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass as checked
from torch import Tensor, nn

from sluiceway.core.aggregation import Aggregation
from sluiceway.core.checkpoints import (
    Checkpoint,
    CheckpointError,
    Saved,
    Snapshot,
    require_same,
    rounds_without_gain,
)
from sluiceway.core.evaluation import Evaluation, Metric
from sluiceway.core.guards import (
    KINDS,
    Diverged,
    Failure,
    TooFewUpdates,
    UpdateFilter,
    Usual,
    norm,
)
from sluiceway.core.head_start import HeadStart, HeadSums, StartingHead
from sluiceway.core.leave_one_out import HELD, agreement, harmful
from sluiceway.core.metrics import metrics_of, name_of
from sluiceway.core.privacy import spent
from sluiceway.core.routing_log import routing_record
from sluiceway.core.seeds import LARGEST_SEED
from sluiceway.core.signals import check_stop
from sluiceway.core.waits import counted
from sluiceway.errors import InputError, line
from sluiceway.moe import BlockRouting, ParamSlice
from sluiceway.strategies import Broadcast, Strategy, Update
from sluiceway.strategies.parameters import PARAMETERS

#: Clients of a run from which on what each got is kept of the newest rounds alone: a list of so
#: many numbers for each of a thousand rounds would fill the memory.
MANY = 1000
#: Default of `run.max_step`.
MAX_STEP = 10.0


@checked(config=PARAMETERS, kw_only=True, frozen=True)
class Rounds:
    """How many rounds there are, and who takes part.

    rounds: in [1, 99999]. participation: share of the clients that train in a round, in (0, 1]; at
    least one does. seed: in [0, 2^63); everything random in the run comes from it. min_clients:
    usable updates that a round needs, in [1, 10^5]. max_retries: how often a round that has fewer
    is tried again, in [0, 1000], with clients drawn anew; then the run ends. evaluate_every:
    rounds from one evaluation of the global model to the next, in [1, 99999]; the last round
    always has one. patience: evaluations without a better value of `metric` after which the run
    ends early, 0 for never. max_step: how many times the usual norm an update's change,
    and the global model's step, may have, see `Usual` and `Loop.fault`; 0 for any. leave_one_out:
    a client that goes against the others is left out of a round if the loss on the test set is
    lower without it, see `Loop.better_without`. metric: the measure by which rounds are compared,
    of `core.metrics.METRICS`, or a function of your own, of (labels [N], probabilities [N, C]),
    numpy arrays, whose value more is better of and which records then have among their `metrics`
    by the function's name.
    """

    rounds: int = Field(default=10, ge=1, le=99_999)
    participation: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    min_clients: int = Field(default=1, ge=1, le=100_000)
    max_retries: int = Field(default=1, ge=0, le=1000)
    evaluate_every: int = Field(default=1, ge=1, le=99_999)
    max_step: float = Field(default=MAX_STEP, ge=0, le=1e9)
    leave_one_out: bool = False
    patience: int = Field(default=0, ge=0, le=99_999)
    metric: str | Metric = "accuracy"

    def over(self, records: Sequence[Record]) -> bool:
        """Whether the run ends with the newest of these rounds."""
        idle = rounds_without_gain(records, name_of(self.metric))
        return len(records) >= self.rounds or 0 < self.patience <= idle

    def chosen(self, number: int, eligible: Sequence[int], retry: int = 0) -> list[int]:
        """The clients of round `number`, in ascending order, of those that hold examples.

        Args:
            number: from 1.
            holders: at least one.
            retry: 0 when the round is first tried.
        """
        count = self.count(eligible)
        rng = np.random.default_rng([self.seed, number, *([retry] if retry else [])])
        return sorted(rng.choice(np.asarray(eligible), size=count, replace=False).tolist())

    def evaluated(self, number: int) -> bool:
        """Whether the global model is evaluated after round `number`."""
        return number % self.evaluate_every == 0 or number == self.rounds

    def count(self, eligible: Sequence[int]) -> int:
        """How many clients take part in a round, of those that hold examples."""
        return max(1, round(self.participation * len(eligible)))

    def check(self, eligible: Sequence[int]) -> None:
        """Raise ValueError if no client holds examples, or fewer than `min_clients` take part."""
        if not eligible:
            raise ValueError("no client holds any example")
        if self.min_clients > self.count(eligible):
            raise ValueError(
                f"run.min_clients = {self.min_clients}: {self.count(eligible)} clients take part "
                "in a round"
            )


class Engine(Protocol):
    """What carries messages between the server's loop and its clients."""

    def head_sums(self, kind: HeadStart, clients: Sequence[int]) -> Iterator[HeadSums | Failure]:
        """What each client sends for the closed-form start of the head, in their order.

        Raises:
            InputError: the model has no such head.
        """
        ...

    def train(
        self, broadcast: Broadcast, clients: Sequence[int], personal: set[int], *, keep: bool
    ) -> Iterator[Update | Failure]:
        """What each client answers, in the order of `clients`, as answers become ready.

        Args:
            personal: the clients that also evaluate their own model after training.
            keep: updates stay readable until the next call; else only until the next update.
        """
        ...

    def commit(self, clients: Sequence[int]) -> None:
        """The round is final: keep the new states of these clients, and drop all others."""
        ...

    def feature_size(self) -> float:
        """The mean norm of what enters the head, on test examples."""
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

    Where the global model was not evaluated, `accuracy` and `loss` are None and
    `accuracy_by_client` is empty.
    Round 1 has the bytes of the head's closed-form start, and the clients that failed there.
    `train_loss` is None where no client trains (method class-means).
    `accuracy_by_client` is the global model's, on each client's mix of labels (None for a client
    without examples). `rejected` names the clients whose update was left out, and why; `failed`
    those that gave none. `retries` says how often the round was tried again, for want of usable
    updates or without outliers: bytes, rejected and failed are of all its attempts, clients those
    that were last drawn.
    `metrics` are the global model's by name (see `metrics_of`), on the global test set.
    `routing` is by mixture what the used updates report, see `routing_record`.
    """

    round: int
    accuracy: float | None
    loss: float | None
    train_loss: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
    clients: list[int]
    rejected: dict[int, str]
    accuracy_by_client: list[float | None]
    report: dict[str, float] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    retries: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    routing: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self) | {
            key: {str(client): why for client, why in getattr(self, key).items()}
            for key in ("rejected", "failed")
        }

    def score(self, metric: str) -> float | None:
        """The global model's value of a metric, of which more is better.

        None where it was not evaluated.
        """
        return self.accuracy if metric == "accuracy" else self.metrics.get(metric)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`, by the names of version 0.1 too. Raises ValueError."""
        older = {"refused": "rejected", "repeats": "retries"}
        return TypeAdapter(cls).validate_python({older.get(k, k): v for k, v in plain.items()})


@dataclass
class Result:
    """What a federated run came to.

    Attributes:
        records: one a round. Of a run of `MANY` clients or more, `accuracy_by_client` is kept of
            the newest alone (saved every k rounds, of the newest k); metrics.jsonl has all.
        tensors: the global trained tensors by name.
        personal_accuracy: by client number, of the client's own model after its last training on
            test examples weighted as it holds labels.
        empty: clients that hold no example.
        label_counts: [clients, classes], who holds what.
        confusion: test examples by true and predicted class, [K, K], of the last evaluation.
        model: the function whose accuracy the last record reports, with its trained values.
        privacy: epsilon, delta and what they follow from, see `core.privacy.spent`; empty without.
    """

    records: list[Record] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    personal_accuracy: dict[int, float] = field(default_factory=dict)
    empty: list[int] = field(default_factory=list)
    label_counts: list[list[int]] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    model: nn.Module | None = None
    privacy: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy_by_round(self) -> list[float | None]:
        """Of the global model on the global test set; None where it was not evaluated."""
        return [record.accuracy for record in self.records]

    @property
    def accuracy(self) -> float:
        """Of the global model on the global test set, after the last round that evaluated it."""
        return [accuracy for accuracy in self.accuracy_by_round if accuracy is not None][-1]

    @property
    def best_accuracy(self) -> float:
        return max(accuracy for accuracy in self.accuracy_by_round if accuracy is not None)

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
    def rejected(self) -> int:
        """Updates that were left out, all rounds."""
        return sum(len(record.rejected) for record in self.records)

    @property
    def failed(self) -> int:
        """Updates that never came, all rounds."""
        return sum(len(record.failed) for record in self.records)

    def forget_clients(self, newest: int) -> None:
        """Drop `accuracy_by_client` of the records before the newest, where clients are `MANY`."""
        if len(self.label_counts) < MANY:
            return
        for at, record in enumerate(self.records[:-newest]):
            if record.accuracy_by_client:
                self.records[at] = replace(record, accuracy_by_client=[])

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, ready for JSON."""
        return {"personal_accuracy": self.personal_accuracy, "confusion": self.confusion}

    def take(self, saved: Saved, kind: type[Record]) -> None:
        """Continue from what `facts` gave. Raises CheckpointError."""
        try:
            records = [kind.of(record) for record in saved.records]
            personal = {int(k): float(v) for k, v in saved.facts["personal_accuracy"].items()}
            if [record.round for record in records] != list(range(1, saved.round + 1)):
                raise ValueError(f"its records are not of rounds 1 to {saved.round}")
        except Exception as error:
            why = line(str(error))
            raise CheckpointError(f"{saved.folder / 'run.json'} is not ours ({why})") from error
        self.confusion = saved.facts.get("confusion", [])
        self.records += records
        self.forget_clients(1)
        self.personal_accuracy |= personal


@dataclass(frozen=True)
class Attempt:
    """A round up to the point where its updates are added up.

    Attributes:
        filter: what was accepted and what was not.
        aggregation: the running sums.
        bytes_down: packed length of the broadcasts.
        routing: what each client whose update was taken reports of the mixtures.
    """

    filter: UpdateFilter
    aggregation: Aggregation
    bytes_down: int
    routing: dict[int, Sequence[BlockRouting]]

    @property
    def too_few(self) -> TooFewUpdates | None:
        """The error of a round without enough usable updates."""
        return self.filter.too_few()


@dataclass
class Loop:
    """The server's side of a federated run.

    Attributes:
        strategy: set up with the initial tensors.
        engine: carries messages.
        rounds: how many, and who takes part.
        label_counts: [clients, classes] int64; a client without examples never takes part.
        on_round: called after every round with the newest record.
        on_update: called after every answer of a client with (done, of).
        checkpoint: where the run is saved and continued from.
        states: the folder in which the engine holds what clients keep.
        head_start: how the head starts; in closed form, every client that holds examples is asked
            for its sums before the first round.
        result: grows round by round.
        loss: of the global model on the test set, where the newest round evaluated it.
    """

    strategy: Strategy
    engine: Engine
    rounds: Rounds
    label_counts: Tensor
    on_round: Callable[[Record], None] = lambda record: None
    on_update: Callable[[int, int], None] = lambda done, of: None
    checkpoint: Checkpoint | None = None
    states: Path | None = None
    head_start: HeadStart = "random"
    result: Result = field(default_factory=Result)
    loss: float | None = None

    def restore(self) -> None:
        """Continue from the newest checkpoint, if that is wanted and there is one.

        Raises:
            CheckpointError: none of those there are can be used.
        """
        saved = self.checkpoint.newest() if self.checkpoint else None
        if saved is None:
            return
        state = saved.tensors("strategy")
        require_same(state, self.strategy.state_dict(), f"method {self.strategy.name}")
        self.result.take(saved, Record)
        try:
            self.usual.take(saved.facts.get("usual", {}))
        except (AttributeError, TypeError, ValueError) as error:
            path = saved.folder / "run.json"
            raise CheckpointError(f"{path} is not ours ({line(str(error))})") from error
        self.strategy.load_state_dict(state)
        self.result.tensors = self.strategy.tensors
        if self.states is not None:
            shutil.copytree(saved.folder / "clients", self.states, dirs_exist_ok=True)

    def run(self) -> Result:
        """Run the rounds that are left.

        Raises:
            ValueError: too few clients hold examples; InputError, which is one: too few for a
                robust rule.
            RunFailed: no client gave sums for the head's start.
            TooFewUpdates: a round had too few usable updates, however often it was tried.
            StorageError: a checkpoint cannot be written.
            Stopped: the run was asked to stop.
        """
        sizes, eligible = self.label_counts.sum(1), self.eligible()
        self.rounds.check(eligible)
        self.require_help(self.rounds.count(eligible))
        self.result.empty = (sizes == 0).nonzero().flatten().tolist()
        self.result.label_counts = self.label_counts.tolist()
        self.strategy.label_counts = self.label_counts
        with self.checkpoint.guarding() if self.checkpoint else contextlib.nullcontext():
            while not self.rounds.over(self.result.records):
                check_stop()
                number = len(self.result.records) + 1
                began = time.perf_counter()
                start = self.start_head(eligible) if number == 1 else None
                record = self.run_round(number, eligible)
                if start:
                    record = replace(
                        record,
                        bytes_up=start.nbytes + record.bytes_up,
                        failed=start.failed | record.failed,
                        seconds=time.perf_counter() - began,
                    )
                self.result.records.append(self.accounted(record))
                record = self.result.records[-1]
                self.result.tensors = self.strategy.tensors
                if self.checkpoint:
                    self.checkpoint.after(
                        self.snapshot(), ends=self.rounds.over(self.result.records)
                    )
                self.on_round(record)
                self.result.forget_clients(self.checkpoint.every if self.checkpoint else 1)
        return self.result

    def accounted(self, record: Record) -> Record:
        """A round's record with what privacy has cost up to it, which the result has too."""
        private = self.strategy.privacy
        if private is None:
            return record
        rounds = [(one.clients, one.retries) for one in [*self.result.records, record]]
        self.result.privacy = spent(private, rounds, self.head_start)
        numbers = {name: float(self.result.privacy[name]) for name in ("epsilon", "clip", "noise")}
        return replace(record, report=record.report | numbers)

    def require_help(self, clients: int) -> None:
        """Raise InputError if a robust rule can do nothing for rounds of so many clients."""
        for rule in self.strategy.rules:
            least: int = getattr(rule, "least", lambda: 1)()
            if clients < least:
                raise InputError(
                    f"{type(rule).__name__} cannot help: {clients} clients take part in a round, "
                    f"and with its parameters it needs {least}"
                )

    def start_head(self, eligible: Sequence[int]) -> StartingHead | None:
        """Give the strategy a head in closed form, where that is asked for."""
        if self.head_start == "random":
            return None
        held = {name: self.strategy.tensors[name] for name in self.strategy.layout.head}
        start = StartingHead(
            self.head_start,
            held,
            self.label_counts,
            self.strategy.privacy,
            self.engine.feature_size,
        )
        sums = self.engine.head_sums(self.head_start, eligible)
        new = start.take(counted("start of the head, clients", sums, len(eligible)))
        self.strategy.tensors = self.strategy.tensors | new
        return start

    def run_round(self, number: int, eligible: Sequence[int]) -> Record:
        """One round, tried again with other clients while it has too few usable updates."""
        if not self.strategy.trains_clients:
            return self.idle_round(number)
        began = time.perf_counter()
        attempts: list[Attempt] = []
        draws = 0
        while True:
            # 1. Sample the clients.
            chosen = self.rounds.chosen(number, eligible, draws)
            # 2. They train on the broadcast; their updates are checked and added up.
            attempts.append(self.attempt(number, chosen))
            # 3. The strategy takes its new global values, which are evaluated, if they are sane.
            found = self.commit(attempts[-1])
            if found is None and not attempts[-1].too_few:
                # What was added up is forgotten, outliers among it; so once more, without them.
                without = attempts[-1].filter.outliers
                rest = [client for client in chosen if client not in without]
                attempts.append(self.attempt(number, rest, hold=True))
                found = self.commit(attempts[-1])
            if found is not None:
                break
            draws += 1
            if draws > self.rounds.max_retries and (error := attempts[-1].too_few):
                raise error
        # 4. Clients keep what they have to.
        final = attempts[-1].filter
        self.engine.commit(final.used)
        self.result.personal_accuracy |= final.personal
        # 5. Record.
        evaluation = found if self.rounds.evaluated(number) else None
        if evaluation:
            self.result.confusion = evaluation.confusion.tolist()
        filters = [attempt.filter for attempt in attempts]
        return Record(
            round=number,
            accuracy=evaluation.accuracy if evaluation else None,
            loss=evaluation.mean_loss if evaluation else None,
            train_loss=final.mean_loss(),
            bytes_up=sum(one.nbytes for one in filters),
            bytes_down=sum(attempt.bytes_down for attempt in attempts),
            seconds=time.perf_counter() - began,
            clients=chosen,
            rejected={client: why for one in filters for client, why in one.rejected.items()},
            accuracy_by_client=(
                evaluation.accuracy_by_client(self.label_counts) if evaluation else []
            ),
            report=self.strategy.report(),
            failed={client: why for one in filters for client, why in one.failed.items()},
            retries=len(attempts) - 1,
            metrics=metrics_of(evaluation, self.rounds.metric) if evaluation else {},
            routing=routing_record(
                {c: seen for c, seen in attempts[-1].routing.items() if c in final.used}
            ),
        )

    def idle_round(self, number: int) -> Record:
        """A round in which nothing changes: the model is evaluated once, and that is repeated."""
        began = time.perf_counter()
        accuracy, loss, by_client = None, None, list[float | None]()
        metrics: dict[str, float] = {}
        if self.rounds.evaluated(number):
            known = [record for record in self.result.records if record.accuracy is not None]
            if known:
                last = known[-1]
                accuracy, loss, by_client = last.accuracy, last.loss, last.accuracy_by_client
                metrics = last.metrics
            else:
                found = self.engine.evaluate(self.strategy.tensors)
                accuracy, loss = found.accuracy, found.mean_loss
                metrics = metrics_of(found, self.rounds.metric)
                self.result.confusion = found.confusion.tolist()
                by_client = found.accuracy_by_client(self.label_counts)
        seconds = time.perf_counter() - began
        return Record(
            number, accuracy, loss, None, 0, 0, seconds, [], {}, by_client, metrics=metrics
        )

    def attempt(self, number: int, chosen: Sequence[int], hold: bool = False) -> Attempt:
        """Broadcast, and push each usable update into the strategy as it arrives.

        Clients that take part in no later round also evaluate their own model.

        Args:
            hold: keep all updates until they are combined.
        """
        personal = {client for client in chosen if self.last_rounds.get(client, 0) <= number}
        broadcast = self.strategy.broadcast(number)
        if self.rounds.leave_one_out and len(chosen) > 2:
            # Held, they can be compared, and one left out.
            size = sum(tensor.nbytes for tensor in self.strategy.tensors.values())
            hold = hold or len(chosen) * size <= HELD
        aggregation = Aggregation(self.strategy, number, hold)
        checks = UpdateFilter(
            self.strategy,
            number,
            chosen,
            self.rounds.min_clients,
            self.on_update,
            examples=self.examples,
            usual=self.usual,
            at_once=not aggregation.holds,
        )
        routing: dict[int, Sequence[BlockRouting]] = {}
        for answer in self.engine.train(broadcast, chosen, personal, keep=aggregation.holds):
            if (update := checks.accept(answer)) is not None:
                aggregation.add(update)
                routing[update.client] = update.routing
        return Attempt(checks, aggregation, self.engine.broadcast_bytes() * len(chosen), routing)

    def commit(self, attempt: Attempt) -> Evaluation | None:
        """Combine the updates, and leave the strategy with the new values if they are sane.

        If they are not, the strategy is as it was before. Sane values that are better without a
        client are not kept either, see `better_without`. Where updates are held, their outliers
        are left out until what is left is sane: those with another norm, then those whose own
        model's loss on the test set stands out or is not finite, then the one with the largest
        change.

        Returns:
            The new model's evaluation, of no examples where this round has none; None if there are
            no new values.
        """
        checks, aggregation = attempt.filter, attempt.aggregation
        if not checks.settle() and not aggregation.holds:
            return None
        looked = False
        while not checks.too_few():
            before, state = self.strategy.tensors, self.copied_state()
            try:
                aggregation.finish(checks.outliers)
            except Diverged:
                self.strategy.load_state_dict(state)
                raise
            step = norm(
                (new, before[name])
                for name, new in self.strategy.tensors.items()
                if not ParamSlice.whole(name).is_statistic
            )
            found = self.evaluated(checks.round)
            why = self.fault(before, step, found, checks)
            if why is None:
                if self.better_without(attempt, before, state, found):
                    continue
                for client in aggregation.dropped:
                    checks.leave_out(client, "a robust rule left it out")
                self.note(step, checks)
                self.loss = found.mean_loss if len(found.total) else None
                return found
            self.strategy.load_state_dict(state)
            if not aggregation.holds:
                return None
            if not looked:
                looked = True
                self.measure_losses(attempt)
                if not checks.settle():
                    continue
            largest = max(checks.used, key=lambda client: checks.measures[client]["change"])
            checks.leave_out(largest, f"with it {why}")
        return None

    def better_without(
        self, attempt: Attempt, before: dict[str, Tensor], state: dict[str, Tensor], new: Evaluation
    ) -> bool:
        """Leave out the update that goes most against the others, if the model is better so.

        Asked of a round whose loss rose is any client against the others; of another round one that
        is so on the mean of its newest rounds. See `leave_one_out`.

        Args:
            before, state: the strategy's tensors and `state_dict` before the round.
            new: of the values that the strategy has now, and keeps if nothing is left out; else it
                is left as it was before the round.
        """
        checks, aggregation = attempt.filter, attempt.aggregation
        if not (self.rounds.leave_one_out and aggregation.holds and checks.may_lose_one()):
            return False
        after = self.strategy.tensors
        self.strategy.tensors = before
        used = [update for update in aggregation.held if update.client not in checks.outliers]
        checks.agreement |= (found := agreement(used, self.strategy))
        self.strategy.tensors = after
        if not (against := [client for client, way in found.items() if way < 0]):
            return False
        old = self.loss if self.loss is not None else self.engine.evaluate(before).mean_loss
        with_it = (new if len(new.total) else self.engine.evaluate(after)).mean_loss
        often = {client for client in against if self.usual.opposes(client, found[client])}
        if with_it <= old:
            against = [client for client in against if client in often]
        if not against:
            return False
        client = min(against, key=lambda one: found[one])
        self.strategy.load_state_dict(state)
        aggregation.finish({*checks.outliers, client})
        without = self.engine.evaluate(self.strategy.tensors).mean_loss
        self.strategy.load_state_dict(state)
        if not harmful(old, with_it, without, len(used), client in often):
            aggregation.finish(checks.outliers)
            return False
        why = f"it goes against the others, and the loss is {without:.3g} without it"
        checks.leave_out(client, f"{why}, {with_it:.3g} with it")
        return True

    def copied_state(self) -> dict[str, Tensor]:
        """What `state_dict` gives, of which only the model's tensors never change in place."""
        state = self.strategy.state_dict()
        return {n: t if n.startswith("tensors/") else t.clone() for n, t in state.items()}

    def evaluated(self, number: int) -> Evaluation:
        """The new model on the test set, if this round evaluates it."""
        if not self.rounds.evaluated(number):
            return Evaluation.nothing()
        return self.engine.evaluate(self.strategy.tensors)

    def fault(
        self,
        before: Mapping[str, Tensor],
        step: float,
        found: Evaluation,
        checks: UpdateFilter,
    ) -> str | None:
        """Why the new model and the strategy's other state must not be kept; None if nothing is.

        Every number must be finite; the step's norm, but the first, at most `max_step` times the
        larger of the median of the newest rounds' and the median of the round's updates; and the
        loss finite, unless that of the model before was not.
        """
        if not isfinite(step):
            return "the model is not finite"
        rest = {n: t for n, t in self.strategy.state_dict().items() if not n.startswith("tensors/")}
        if not isfinite(norm((tensor, None) for tensor in rest.values())):
            return "the state of the strategy is not finite"
        changes = [checks.measures[client]["change"] for client in checks.used]
        limit = self.usual.limit("step", [median(changes)])
        if "step" in self.usual.past and step > limit:
            return f"the norm of the model's step is {step:.3g}; expected at most {limit:.3g}"
        if isfinite(found.loss) or not isfinite(self.engine.evaluate(before).loss):
            return None
        return "the model's loss is not finite"

    def note(self, step: float, checks: UpdateFilter) -> None:
        """Remember the measures of a round that is kept."""
        for name in KINDS:
            found = [checks.measures[client] for client in checks.used]
            self.usual.note(name, [one[name] for one in found if name in one and name != "loss"])
        self.usual.note("step", [step])
        for client, way in checks.agreement.items():
            self.usual.note(f"agreement {client}", [way])

    def measure_losses(self, attempt: Attempt) -> None:
        """Measure each held update's own model on the test set as well."""
        for update in attempt.aggregation.held:
            tensors = {name: tensor.clone() for name, tensor in self.strategy.tensors.items()}
            for piece in self.strategy.shared_pieces:
                if (value := update.tensors.get(piece.key)) is not None:
                    piece.of(tensors).copy_(value)
            loss = self.engine.evaluate(tensors).mean_loss
            measures = attempt.filter.measures
            measures[update.client] = {**measures[update.client], "loss": loss}

    @cached_property
    def examples(self) -> list[int]:
        """How many examples each client holds, as it said when it joined."""
        found: list[int] = self.label_counts.sum(1).tolist()
        return found

    @cached_property
    def usual(self) -> Usual:
        """What is usual among the updates of this run."""
        # What is usual depends on all clients, and privacy at the server bounds what one may do.
        private = self.strategy.privacy
        return Usual(0 if private and private.where == "server" else self.rounds.max_step)

    @cached_property
    def last_rounds(self) -> dict[int, int]:
        """The last round that each client is first chosen for, by its number."""
        eligible = self.eligible()
        numbers = range(1, self.rounds.rounds + 1)
        return {client: n for n in numbers for client in self.rounds.chosen(n, eligible)}

    def eligible(self) -> list[int]:
        """The clients that hold examples."""
        found: list[int] = self.label_counts.sum(1).nonzero().flatten().tolist()
        return found

    def snapshot(self) -> Snapshot:
        """The run as it is after its newest round."""
        return Snapshot(
            len(self.result.records),
            {"strategy": self.strategy.state_dict()},
            self.result.facts() | {"usual": self.usual.facts()},
            {} if self.states is None else {"clients": self.states},
            self.result.records,
            self.strategy.tensors,
        )
