"""The server's side of federated rounds whose clients are at sites, reached by a `Transport`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sluiceway.core.batches import Batch, Examples, Loss
from sluiceway.core.checkpoints import Checkpoint
from sluiceway.core.device import chosen_device
from sluiceway.core.evaluation import Evaluation, widened
from sluiceway.core.guards import Failure, RunFailed
from sluiceway.core.handshake import HandshakeError, ModelSignature, check_joining
from sluiceway.core.head_start import HeadStart, HeadSums, require_head
from sluiceway.core.privacy import arrange_privacy, told
from sluiceway.core.round_loop import Loop, Record, Result, Rounds
from sluiceway.core.settings import Training
from sluiceway.core.trial import try_model
from sluiceway.errors import line
from sluiceway.federated.client import Worker, prepare
from sluiceway.files import scratch_folder, write_atomically
from sluiceway.strategies import Broadcast, Strategy, Update
from sluiceway.transport.local import (
    EngineFolder,
    report_of,
    run_loop,
    standing,
    sums_in,
    test_parts,
)
from sluiceway.transport.protocol import Request, Response, TaskFailure, Transport

#: Largest count of examples of a class, and most classes, that a site may claim.
COUNT_LIMIT = 10**9
CLASSES_LIMIT = 1 << 16
#: Seconds for a round's training where `run.timeout` does not say.
ROUND_TIMEOUT = 86_400.0


class RemoteEngine(EngineFolder):
    """Clients at sites; the global model is evaluated here.

    Client states stay at the sites. Here is a file for each client with the round of its newest
    valid state, so that a checkpoint knows which one to request after a restart.

    Args:
        transport: reaches the sites.
        worker: model and test set; its clients are empty.
        keep: states that a site keeps, enough to return to the oldest checkpoint.
        timeout: seconds for a round's training, 0 for `ROUND_TIMEOUT`.
    """

    def __init__(
        self, transport: Transport, worker: Worker, *, keep: int, timeout: float = 0
    ) -> None:
        super().__init__(worker)
        self.transport = transport
        self.keep = keep
        self.timeout = timeout
        self._kept: dict[int, int] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        (self.states / "run").write_text(uuid.uuid4().hex)
        return self

    def head_sums(self, kind: HeadStart, clients: Sequence[int]) -> Iterator[HeadSums | Failure]:
        facts = {"kind": kind, "run": (self.states / "run").read_text()}
        requests = {number: Request("head-sums", facts) for number in clients}
        folder = self.folder / "sums"
        folder.mkdir()
        incoming = self.transport.send(requests, folder, self.timeout or ROUND_TIMEOUT)
        for number, done in in_order(incoming, clients):
            path = done if isinstance(done, TaskFailure) else done.message
            yield sums_in(number, path or TaskFailure("the response has no sums"))

    def train(
        self, broadcast: Broadcast, clients: Sequence[int], personal: set[int], *, keep: bool
    ) -> Iterator[Update | Failure]:
        down = self.packed(broadcast)
        self._kept = {}
        requests = {
            number: Request(
                "train",
                {
                    "run": (self.states / "run").read_text(),
                    "based": self.based(number),
                    "personal": number in personal,
                    "keep": self.keep,
                },
                down,
            )
            for number in clients
        }
        incoming = self.transport.send(requests, down.parent, self.timeout or ROUND_TIMEOUT)
        for number, done in in_order(incoming, clients):
            path = done if isinstance(done, TaskFailure) else done.message
            if isinstance(done, Response) and done.facts.get("kept") is True:
                self._kept[number] = broadcast.round
            yield report_of(number, path or TaskFailure("the response has no update"))
            if not keep and isinstance(path, Path):
                path.unlink()

    def based(self, number: int) -> int:
        """The round after which a client has its newest valid state; 0 for none."""
        noted = self.states / f"{number}"
        return int(noted.read_text()) if noted.exists() else 0

    def commit(self, clients: Sequence[int]) -> None:
        for number in clients:
            if number in self._kept:
                write_atomically(self.states / f"{number}", f"{self._kept[number]}")

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Evaluation:
        total = Evaluation.nothing()
        for part in test_parts(self.worker):
            total += self.worker.evaluate(tensors, part)
        return total


def in_order(
    arriving: Iterator[tuple[int, Response | TaskFailure]], clients: Sequence[int]
) -> Iterator[tuple[int, Response | TaskFailure]]:
    """Responses in the order of `clients`, whatever the order in which they arrive."""
    early: dict[int, Response | TaskFailure] = {}
    for number in clients:
        while number not in early:
            found = next(arriving, None)
            if found is None:
                early[number] = TaskFailure("no answer")
                break
            early.setdefault(*found)
        yield number, early.pop(number)


def joined(
    transport: Transport,
    facts: Mapping[str, Any],
    signature: ModelSignature | None,
    classes: int = CLASSES_LIMIT,
    timeout: float = 0,
) -> Tensor:
    """Have every site join, and check that all exchange the server's tensors.

    Args:
        facts: what a site needs to prepare its model; ready for JSON.
        signature: the server's; None where the sites send none.
        classes: that the model tells apart; nobody may claim examples of more.
        timeout: seconds for all of them, 0 for any.

    Returns:
        Examples by client and class, [sites, classes] int64.

    Raises:
        RunFailed: a site is not connected or cannot join.
        HandshakeError: a site exchanges other tensors, or reports impossible label counts.
    """
    requests = {i: Request("join", {**facts, "client": i}) for i in range(len(transport.sites))}
    counts: dict[int, list[int]] = {}
    with scratch_folder() as folder:
        for number, found in transport.send(requests, folder, timeout):
            name = transport.sites[number]
            if isinstance(found, TaskFailure):
                raise RunFailed(f"site {line(name, 80)} did not join: {line(found.why, 1000)}")
            if signature is not None:
                check_signature(signature, found.facts, name)
            counts[number] = counts_of(found, name, classes)
    if missing := [transport.sites[i] for i in requests if i not in counts]:
        raise RunFailed(f"site {line(missing[0], 80)} did not join: no answer")
    width = max(map(len, counts.values()))
    return torch.stack([widened(torch.tensor(counts[i]).long(), width) for i in requests])


def check_signature(own: ModelSignature, facts: Mapping[str, Any], site: str) -> None:
    """Raise HandshakeError unless a site reports the server's model signature."""
    try:
        check_joining(own, ModelSignature.from_json(str(facts.get("signature"))))
    except HandshakeError as error:
        raise HandshakeError(f"site {line(site, 80)}: {error}") from None


def states_needed(checkpoint: Checkpoint | None) -> int:
    """States that a site must keep, enough to return to the oldest checkpoint."""
    return 2 + (checkpoint.every * checkpoint.keep if checkpoint else 0)


def counts_of(found: Response, name: str, classes: int = CLASSES_LIMIT) -> list[int]:
    """Examples of each class that a site reports. Raises HandshakeError."""
    counts = found.facts.get("label_counts")
    if not isinstance(counts, list) or len(counts) > classes:
        what = f"{len(counts)}" if isinstance(counts, list) else "no list"
        raise HandshakeError(
            f"site {line(name, 80)}: its label counts are {what}; expected a list of at most "
            f"{classes}, one for each class of the model"
        )
    if not all(type(n) is int and 0 <= n <= COUNT_LIMIT for n in counts):
        raise HandshakeError(
            f"site {line(name, 80)}: its label counts are not integers from 0 to {COUNT_LIMIT}"
        )
    return counts


def classes_of(model: nn.Module, test: Examples, device: torch.device) -> int:
    """How many classes the model tells apart: as many as it has logits, and at least two."""
    if not len(test):
        return CLASSES_LIMIT
    with torch.no_grad():
        logits = Batch.of(test, torch.tensor([0]), device).run(model.eval())
    return max(2, logits.shape[-1])


def federate_remote(
    model: nn.Module,
    transport: Transport,
    facts: Mapping[str, Any],
    test: Examples,
    strategy: Strategy,
    plan: Rounds,
    training: Training,
    *,
    loss: Loss = F.cross_entropy,
    device: str = "auto",
    head_start: HeadStart = "random",
    timeout: float = 0,
    on_start: Callable[[], None] = lambda: None,
    on_round: Callable[[Record], None] = lambda record: None,
    on_update: Callable[[int, int], None] = lambda done, of: None,
    checkpoint: Checkpoint | None = None,
) -> Result:
    """Train a model across sites; the server's side of `sluiceway.federate`.

    Args:
        model: prepared as the sites prepare theirs; has the global values at the end.
        transport: reaches the sites.
        facts: what a site needs to join.
        test: the global test set.
        plan, training, loss, device, head_start: as of `federate`.
        on_start, on_round, on_update, checkpoint: likewise.
        timeout: seconds for the training of a round, 0 for `ROUND_TIMEOUT`; a client that takes
            longer has failed.

    Raises:
        RunFailed, HandshakeError: see `joined`; and as `federate`.
    """
    place = torch.device(chosen_device(device))
    model.to(place)
    prepare(model, strategy, len(transport.sites))
    require_head(head_start, strategy)
    signature = ModelSignature.of(strategy.tensors)
    try_model(
        model,
        (),
        test,
        plan.metric,
        place,
        layout=strategy.layout,
        training=training,
    )
    arrange_privacy(strategy, model, plan.rounds, head_start)
    counts = joined(transport, facts, signature, classes_of(model, test, place))
    counts = told(counts, strategy)
    keep = states_needed(checkpoint)
    with ExitStack() as stack:
        worker = stack.enter_context(
            standing(model, [], test, strategy, training, loss=loss, device=place, seed=plan.seed)
        )
        engine = stack.enter_context(RemoteEngine(transport, worker, keep=keep, timeout=timeout))
        loop = Loop(
            strategy,
            engine,
            plan,
            counts,
            on_round=on_round,
            on_update=on_update,
            checkpoint=checkpoint,
            states=engine.states,
            head_start=head_start,
        )
        return run_loop(loop, worker, on_start)
