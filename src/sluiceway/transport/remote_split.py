"""Split training whose clients are elsewhere: a line for each, a frame for every message."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sluiceway.core.batches import Batch, Examples, Loss
from sluiceway.core.checkpoints import Checkpoint
from sluiceway.core.guards import RunFailed
from sluiceway.core.handshake import HandshakeError, ModelSignature, check_joining
from sluiceway.core.messages import WireError
from sluiceway.core.round_loop import Result, Rounds
from sluiceway.core.settings import Optimisation
from sluiceway.errors import line
from sluiceway.split.client_proxy import Away
from sluiceway.split.compress import Compressor
from sluiceway.split.packing import BatchId
from sluiceway.split.rounds import SplitLoop, SplitRecord
from sluiceway.split.setup import SharedSetup, SplitSettings
from sluiceway.split.training import run_rounds
from sluiceway.strategies import FedAvg, Strategy
from sluiceway.transport.protocol import Transport
from sluiceway.transport.remote import joined, states_needed
from sluiceway.transport.tls import Connection, ConnectionBroken, Endpoint, TlsServer

#: Seconds that a site has to dial before the run begins, and at the beginning of a round.
AT_FIRST = 60.0
LATER = 2.0


@dataclass
class RemoteClient:
    """A client at a site; see `ClientProxy`.

    Attributes:
        number, size: see `ClientProxy`.
        site: its name.
        gate: where its line ends.
        terms: what it must know to build its layers, ready for JSON.
        card: of the layers that it must have.
        keep: states that it keeps, so that it can go back as far as a checkpoint does.
        timeout: seconds for an answer, 0 for any.
        own: it has a mask of its own, which the server keeps; so its scores must cross.
        run: the run's name.
        based: the round after which its state stands, 0 for none.
    """

    number: int
    size: int
    site: str
    gate: TlsServer
    terms: Mapping[str, Any]
    card: ModelSignature
    keep: int
    timeout: float
    own: bool
    run: str
    based: int = 0
    _line: Connection | None = field(default=None, init=False)
    _old: Connection | None = field(default=None, init=False)

    # -- its line ------------------------------------------------------------------------------

    def open(self, patience: float) -> None:
        """Have a line, and on a new one see that the site has the layers that it must have.

        Raises:
            Away: it has not dialled, or cannot build them. HandshakeError: it has others.
        """
        if self._line is not None:
            return
        try:
            self._line = self.gate.line(self.site, patience, self._old)
        except ConnectionBroken as error:
            raise Away(f"site {self.site}: {error}") from None
        facts, _ = self.asked({"what": "open", **self.terms})
        try:
            check_joining(self.card, ModelSignature.from_json(str(facts.get("card"))))
        except HandshakeError as error:
            self.drop()
            raise HandshakeError(f"site {self.site}: {error}") from None

    def drop(self) -> None:
        """The line is of no use any more."""
        if self._line is not None:
            self._line.close()
        self._line, self._old = None, self._line or self._old

    def tell(self, facts: Mapping[str, Any], body: bytes = b"") -> None:
        """Send a frame. Raises Away."""
        if self._line is None:
            raise Away(f"site {self.site}: the line is down")
        try:
            self._line.send(facts, body)
        except ConnectionBroken as error:
            self.drop()
            raise Away(f"site {self.site}: {error}") from None

    def told(self) -> tuple[dict[str, Any], bytes]:
        """The next frame. Raises Away; WireError with what the site says went wrong there."""
        if self._line is None:
            raise Away(f"site {self.site}: the line is down")
        try:
            facts, body = self._line.receive(self.timeout)
        except ConnectionBroken as error:
            self.drop()
            raise Away(f"site {self.site}: {error}") from None
        if "error" in facts:
            raise WireError(f"site {self.site}: {line(str(facts['error']), 1000)}")
        return facts, body

    def asked(self, facts: Mapping[str, Any], body: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """Send a frame and take the answer. Raises Away, WireError."""
        self.tell(facts, body)
        return self.told()

    # -- a client ------------------------------------------------------------------------------

    def rate(self) -> bytes:
        self.open(LATER)
        return self.asked({"what": "rate"})[1]

    def begin(self, number: int, opening: bytes, mask: Tensor | None) -> None:
        facts = {
            "what": "begin",
            "run": self.run,
            "round": number,
            "based": self.based,
            "keep": self.keep,
            "mask": None if mask is None else mask.tolist(),
        }
        try:
            self.open(LATER)
            self.asked(facts, opening)
        except Away:
            raise
        except ValueError as error:  # it is there, and cannot take part
            raise Away(str(error)) from None

    def ask(self, name: BatchId, crosses: bool) -> None:
        self.tell({"what": "send" if crosses else "pass", "batch": name.batch})

    def sent(self, name: BatchId) -> bytes:
        return self.told()[1]

    def finish(self, name: BatchId, message: bytes) -> bytes:
        return self.asked({"what": "finish", "batch": name.batch}, message)[1]

    def receive(self, name: BatchId, message: bytes) -> None:
        self.tell({"what": "receive", "batch": name.batch}, message)

    def end(self, number: int, crossing: bool) -> tuple[bytes, Tensor | None]:
        _, message = self.asked({"what": "end", "scores": crossing or self.own})
        self.based = number
        return message, None

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "run": torch.frombuffer(bytearray(self.run.encode()), dtype=torch.uint8),
            "based": torch.tensor(self.based),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.run = bytes(state["run"].tolist()).decode()
        self.based = int(state["based"])

    def leave(self) -> None:
        """Tell the site that the run has ended."""
        if self._line is not None:
            try:
                self.tell({"what": "leave"})
            except Away:
                return


def split_remote(
    model: nn.Module,
    cut_at: str,
    transport: Transport,
    doorway: Endpoint,
    facts: Mapping[str, Any],
    test: Examples,
    method: Compressor,
    plan: Rounds,
    training: Optimisation,
    *,
    schedule: str = "parallel",
    tail_at: str | None = None,
    client_aggregation: Strategy | None = None,
    loss: Loss = F.cross_entropy,
    device: str = "cpu",
    timeout: float = 0,
    on_start: Callable[[], None] = lambda: None,
    on_round: Callable[[SplitRecord], None] = lambda record: None,
    checkpoint: Checkpoint | None = None,
) -> Result:
    """Train a network that is cut between sites and this server; see `split_train`.

    Args:
        carrier: reaches the sites, to ask them in.
        doorway: where they dial, to talk once a mini-batch.
        facts: what a site must know to join.
        timeout: seconds for an answer, 0 for any.

    Raises:
        RunFailed, HandshakeError: a site cannot join; and as `split_train`.
    """
    settings = SplitSettings(
        cut_at,
        method,
        schedule,
        tail_at,
        client_aggregation or FedAvg(),
        training,
        loss,
        torch.device(device),
        plan.seed,
    )
    with TlsServer(doorway.keys, transport.sites, doorway.listen, doorway.port) as gate:
        door = {"host": doorway.host, "port": gate.port}
        counts = joined(transport, {**facts, "gate": door}, None)
        if not counts.shape[1]:
            raise ValueError("no client holds any example")
        example = Batch.of(test, torch.tensor([0]), settings.device)
        setup = SharedSetup(model, settings, example, counts.shape[1], len(transport.sites))
        parties = [
            RemoteClient(
                number,
                int(counts[number].sum()),
                site,
                gate,
                {"classes": counts.shape[1]},
                ModelSignature.of(setup.exchanged()),
                states_needed(checkpoint),
                timeout,
                setup.choice is not None and setup.choice.masks == "client",
                uuid.uuid4().hex,
            )
            for number, site in enumerate(transport.sites)
        ]
        try:
            for party in parties:
                party.open(AT_FIRST)
        except WireError as error:
            raise RunFailed(str(error)) from None
        loop = SplitLoop(setup, plan, test, counts, parties)
        try:
            devices = [settings.device] if settings.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                return run_rounds(loop, plan, on_start, on_round, checkpoint)
        finally:
            for party in parties:
                party.leave()
