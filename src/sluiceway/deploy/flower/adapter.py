"""Any of our strategies in Flower's own loop."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from pydantic import TypeAdapter
from torch import nn

from sluiceway import strategies as rules
from sluiceway.core.aggregation import Aggregation
from sluiceway.core.guards import Failure, UpdateFilter
from sluiceway.core.messages import take_values
from sluiceway.core.round_loop import Rounds
from sluiceway.core.settings import Training
from sluiceway.deploy.chunks import CHUNK_LIMIT, Chunk, ChunkError
from sluiceway.deploy.flower.records import (
    MESSAGE_TYPE,
    bytes_of,
    chunk_of,
    content_of,
    packed,
    unpacked,
)
from sluiceway.deploy.flower.transport import Node, wait_for_nodes
from sluiceway.errors import InputError, line
from sluiceway.experiment.methods import parameters_of
from sluiceway.federated.client import prepare
from sluiceway.files import scratch_folder
from sluiceway.strategies import Broadcast, Update
from sluiceway.transport.local import report_of

log = getLogger("flwr").log


class Adapter(FlowerStrategy):
    """Any strategy of `sluiceway.strategies`, robust ones too, in Flower's loop.

    SuperNodes are the clients, numbered in the order of their names (or ids) when the first round
    begins. A client that does not reply, or whose update fails a check, is left out and logged.

    Args:
        rule: the strategy.
        model: as the clients have it; parameters with `requires_grad` are trained.
        clients: how many there are; the first round waits for them.
        training: how clients train, unless they have settings of their own.
        participation, min_clients, seed: see `Rounds`.
        evaluate: share of the clients that evaluate the global model after a round, in [0, 1].
        wait: seconds to wait for SuperNodes at first.

    Raises:
        ValueError, NoExpertsError: see `federated.client.prepare`.
        InputError: the strategy needs to know who holds what, which Flower's loop does not ask.
    """

    def __init__(
        self,
        rule: rules.Strategy,
        model: nn.Module,
        *,
        clients: int,
        training: Training | None = None,
        participation: float = 1.0,
        min_clients: int = 1,
        seed: int = 0,
        evaluate: float = 0.0,
        wait: float = 300.0,
    ) -> None:
        if rule.wants_label_counts():
            raise InputError(
                f"method {rule.name} with these parameters needs each client's label counts, which "
                "Flower's own loop does not ask for"
            )
        if rule.privacy is not None:
            raise InputError(
                "Flower's own loop has its own mods for differential privacy; use those"
            )
        self.rule = rule
        self.clients = clients
        self.training = training or Training()
        self.plan = Rounds(participation=participation, min_clients=min_clients, seed=seed)
        self.evaluated = Rounds(participation=evaluate, seed=seed) if evaluate else None
        self.wait = wait
        prepare(model, rule, clients)
        self.run = uuid.uuid4().hex
        self.nodes: list[Node] = []
        self.based: dict[int, int] = {}
        self.checks: UpdateFilter | None = None
        self._held = self.arrays()

    def arrays(self) -> ArrayRecord:
        """The global values in the form of Flower's loop; see `load_arrays`."""
        return packed(Broadcast(0, self.rule.tensors))

    def start(
        self, grid: Grid, initial_arrays: ArrayRecord | None = None, *args: Any, **more: Any
    ) -> Result:
        """Flower's loop; without `initial_arrays` from the model's own values.

        Raises:
            TooFewUpdates: a round had fewer usable updates than `min_clients`.
        """
        return super().start(grid, initial_arrays or self._held, *args, **more)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message with the broadcast to each chosen client that is connected."""
        self.follow(arrays)
        if not self.nodes:
            self.nodes = wait_for_nodes(grid, self.clients, self.wait)
        chosen = self.plan.chosen(server_round, range(self.clients))
        self.checks = UpdateFilter(self.rule, server_round, chosen, self.plan.min_clients)
        content = packed(self.rule.broadcast(server_round))
        return [self.message("train", number, content) for number in self.connected(chosen, grid)]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the usable updates.

        Raises:
            TooFewUpdates: there are fewer than `min_clients`.
        """
        checks = self.checks
        if checks is None or checks.round != server_round:
            raise ValueError(f"round {server_round} was not configured")
        kept: set[int] = set()
        with scratch_folder() as folder:
            aggregation = Aggregation(self.rule, server_round)
            for answer in self.updates(replies, folder, kept):
                if (update := checks.accept(answer)) is not None:
                    aggregation.add(update)
            if error := checks.too_few():
                raise error
            aggregation.finish()
        self.based |= dict.fromkeys(kept & set(checks.used), server_round)
        for word, faults in (("rejected", checks.rejected), ("failed", checks.failed)):
            for number, why in faults.items():
                log(WARNING, "client %s (%s) %s: %s", number, self.nodes[number].name, word, why)
        metrics: dict[str, int | float | list[int] | list[float]] = {
            "train_loss": checks.mean_loss(),
            "used": len(checks.used),
            "rejected": len(checks.rejected),
            "refused": len(checks.rejected),  # its name in 0.1
            "failed": len(checks.failed),
            **self.rule.report(),
        }
        self._held = self.arrays()
        return self._held, MetricRecord(metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message with the global model to a share of the clients, if there is one."""
        if self.evaluated is None:
            return []
        chosen = self.evaluated.chosen(server_round, range(self.clients))
        content = packed(Broadcast(server_round, self.rule.tensors))
        return [
            self.message("evaluate", number, content) for number in self.connected(chosen, grid)
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The global model's accuracy and loss on the clients' test examples, example-weighted."""
        sums = {"accuracy": 0.0, "loss": 0.0}
        examples = 0.0
        for reply in replies:
            try:
                facts = whole_response(reply).facts
                weight = float(facts["examples"])
                sums = {name: sums[name] + weight * float(facts[name]) for name in sums}
                examples += weight
            except (ChunkError, KeyError, TypeError, ValueError) as error:
                log(WARNING, "node %s did not evaluate: %s", reply.metadata.src_node_id, error)
        if not examples:
            return None
        return MetricRecord({name: value / examples for name, value in sums.items()})

    def summary(self) -> None:
        """Log what the strategy is."""
        size = sum(tensor.nbytes for tensor in self.rule.tensors.values())
        log(INFO, "\t├──> %s %s", self.rule.name, parameters_of(self.rule))
        log(INFO, "\t└──> %s clients, %.1f MB are exchanged", self.clients, size / 1e6)

    def follow(self, arrays: ArrayRecord) -> None:
        """Take the global values from Flower's loop, unless they are those given to it."""
        if arrays is self._held:
            return
        tensors = {name: tensor.clone() for name, tensor in self.rule.tensors.items()}
        take_values(tensors, unpacked(arrays), needed=tensors)
        self.rule.tensors = tensors
        self._held = arrays

    def connected(self, chosen: Sequence[int], grid: Grid) -> list[int]:
        """Those of the chosen clients whose SuperNode is connected."""
        here = set(grid.get_node_ids())
        return [number for number in chosen if self.nodes[number].number in here]

    def message(self, what: str, number: int, content: ArrayRecord) -> Message:
        """A request to one client."""
        facts = {
            "client": number,
            "clients": self.clients,
            "method": {"name": self.rule.name, **parameters_of(self.rule)},
            "train": TypeAdapter(Training).dump_python(self.training),
            "seed": self.plan.seed,
            "run": self.run,
            "based": self.based.get(number, 0),
            "personal": False,
            "keep": 2,
        }
        data = bytes_of(content)
        transfer = uuid.uuid4().hex
        chunk = Chunk(transfer, "send", what, facts, len(data), data=data, most=CHUNK_LIMIT)
        return Message(content_of(chunk, content), self.nodes[number].number, MESSAGE_TYPE)

    def updates(
        self, replies: Iterable[Message], folder: Path, kept: set[int]
    ) -> Iterator[Update | Failure]:
        """The updates in the order of the clients, and a failure for each without one."""
        assert self.checks is not None
        numbers = {node.number: number for number, node in enumerate(self.nodes)}
        coming = {numbers.get(reply.metadata.src_node_id, -1): reply for reply in replies}
        for number in self.checks.asked:
            reply = coming.get(number)
            if reply is None:
                yield Failure(number, "no answer")
                continue
            path = folder / f"{number}"
            try:
                chunk = whole_response(reply)
            except ChunkError as error:
                yield Failure(number, line(str(error)), error=error)
                continue
            path.write_bytes(chunk.data)
            found = report_of(number, path)
            if isinstance(found, Update) and chunk.facts.get("kept") is True:
                kept.add(number)
            yield found


def whole_response(reply: Message) -> Chunk:
    """A response in one message. Raises ChunkError for anything else."""
    chunk = chunk_of(reply)
    if chunk.kind == "error":
        raise ChunkError(line(str(chunk.facts.get("why"))))
    if chunk.kind != "response":
        raise ChunkError("not a response")
    if not chunk.last:
        raise ChunkError(f"an update of {chunk.size} bytes; use GridTransport for such a model")
    return chunk
