"""The server's side of split training whose clients are at sites: one TLS connection each."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sluiceway.core.batches import Batch, Examples
from sluiceway.core.checkpoints import Checkpoint
from sluiceway.core.guards import RunFailed
from sluiceway.core.handshake import HandshakeError, ModelSignature
from sluiceway.core.messages import WireError
from sluiceway.core.round_loop import Result, Rounds
from sluiceway.core.trial import try_model
from sluiceway.errors import line
from sluiceway.split.client_proxy import Away
from sluiceway.split.packing import BatchId, Message
from sluiceway.split.rounds import SplitLoop, SplitRecord
from sluiceway.split.setup import SharedSetup, SplitSettings
from sluiceway.split.training import run_rounds
from sluiceway.transport.protocol import Transport
from sluiceway.transport.remote import check_signature, classes_of, joined, states_needed
from sluiceway.transport.tls import Connection, ConnectionBroken, Endpoint, TlsServer

#: Seconds to wait for a site's connection before the run begins, and at the start of a round.
FIRST_WAIT = 60.0
ROUND_WAIT = 2.0
#: Seconds for an answer where `run.timeout` does not say: a site that hangs stops a run so long.
ANSWER_TIMEOUT = 1800.0


@dataclass
class RemoteClient:
    """A client at a site; see `ClientProxy`.

    Attributes:
        client_id, size: see `ClientProxy`.
        site: its name.
        server: accepts its connection.
        facts: what it needs to build its layers, ready for JSON.
        signature: of the layers that it must have.
        keep: states that it keeps, enough to return to the oldest checkpoint.
        timeout: seconds for a message and for its answer, 0 for any.
        own_mask: it has a mask of its own, which the server keeps; so its scores must cross.
        run: the run's name.
        based: the round after which it has its newest valid state, 0 for none.
    """

    client_id: int
    size: int
    site: str
    server: TlsServer
    facts: Mapping[str, Any]
    signature: ModelSignature
    keep: int
    timeout: float
    own_mask: bool
    run: str
    based: int = 0
    _connection: Connection | None = field(default=None, init=False)
    _old: Connection | None = field(default=None, init=False)

    def connect(self, wait: float) -> None:
        """Take the site's connection, and on a new one check that it has the right layers.

        Raises:
            Away: it is not connected, or cannot build them. HandshakeError: it has others.
        """
        if self._connection is not None:
            return
        with self._connected():
            self._connection = self.server.connection(self.site, wait, self._old)
        facts, _ = self.exchange({"what": "open", **self.facts})
        try:
            check_signature(self.signature, facts, self.site)
        except HandshakeError:
            self.disconnect()
            raise

    def disconnect(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._old = None, self._connection or self._old

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Raise Away if the connection breaks in the block."""
        try:
            yield
        except ConnectionBroken as error:
            self.disconnect()
            raise Away(f"site {line(self.site, 80)}: {error}") from None

    def send(self, facts: Mapping[str, Any], body: bytes = b"") -> None:
        """Send a frame. Raises Away."""
        with self._connected():
            if self._connection is None:
                raise ConnectionBroken("the connection is down")
            self._connection.send(facts, body, self.timeout)

    def reply(self) -> tuple[dict[str, Any], bytes]:
        """The next frame. Raises Away; WireError with the site's own error."""
        with self._connected():
            if self._connection is None:
                raise ConnectionBroken("the connection is down")
            facts, body = self._connection.receive(self.timeout)
        if "error" in facts:
            raise WireError(f"site {line(self.site, 80)}: {line(str(facts['error']), 1000)}")
        return facts, body

    def exchange(self, facts: Mapping[str, Any], body: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """Send a frame and receive the reply. Raises Away, WireError."""
        self.send(facts, body)
        return self.reply()

    # What follows is the interface of `ClientProxy`.

    def rate(self) -> bytes:
        self.connect(ROUND_WAIT)
        return self.exchange({"what": "rate"})[1]

    def begin(self, round: int, opening: bytes, mask: Tensor | None, forget: bool = False) -> None:
        facts = {
            "what": "begin",
            "run": self.run,
            "round": round,
            "based": self.based,
            "keep": self.keep,
            "mask": None if mask is None else mask.tolist(),
            "forget": forget,
        }
        try:
            self.connect(ROUND_WAIT)
            self.exchange(facts, opening)
        except Away:
            raise
        except ValueError as error:  # connected, but unable to take part
            raise Away(str(error)) from None

    def request(self, batch_id: BatchId, crosses: bool) -> None:
        self.send({"what": "send" if crosses else "pass", "batch": batch_id.batch})

    def smashed_data(self, batch_id: BatchId) -> bytes:
        return self.reply()[1]

    def tail_gradient(self, batch_id: BatchId, message: Message) -> bytes:
        return self.exchange({"what": "finish", "batch": batch_id.batch}, bytes(message))[1]

    def receive(self, batch_id: BatchId, message: Message) -> None:
        self.send({"what": "receive", "batch": batch_id.batch}, bytes(message))

    def end(self, round: int, crossing: bool) -> tuple[bytes, Tensor | None]:
        _, message = self.exchange({"what": "end", "scores": crossing or self.own_mask})
        self.based = round
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
        with contextlib.suppress(Away):
            self.send({"what": "leave"})


def split_remote(
    model: nn.Module,
    transport: Transport,
    endpoint: Endpoint,
    facts: Mapping[str, Any],
    test: Examples,
    settings: SplitSettings,
    plan: Rounds,
    *,
    timeout: float = 0,
    on_start: Callable[[], None] = lambda: None,
    on_round: Callable[[SplitRecord], None] = lambda record: None,
    checkpoint: Checkpoint | None = None,
) -> Result:
    """Train a network that is cut between sites and this server; see `split_train`.

    Args:
        transport: reaches the sites, to have them join.
        endpoint: where they connect, for the messages of mini-batches.
        facts: what a site needs to join.
        timeout: seconds for an answer, 0 for `ANSWER_TIMEOUT`.

    Raises:
        RunFailed, HandshakeError: a site cannot join; and as `split_train`.
    """
    with TlsServer(endpoint.keys, transport.sites, endpoint.listen, endpoint.port) as server:
        address = {"host": endpoint.host, "port": server.port}
        try_model(model.to(settings.device), (), test, plan.metric, settings.device, own_loss=False)
        classes = classes_of(model, test, settings.device)
        counts = joined(transport, {**facts, "endpoint": address}, None, classes)
        if not counts.shape[1]:
            raise ValueError("no client holds any example")
        example = Batch.of(test, torch.tensor([0]), settings.device)
        setup = SharedSetup(model, settings, example, counts.shape[1], len(transport.sites))
        clients = [
            RemoteClient(
                number,
                int(counts[number].sum()),
                site,
                server,
                {"classes": counts.shape[1]},
                setup.signature(),
                states_needed(checkpoint),
                timeout or ANSWER_TIMEOUT,
                setup.choice is not None and setup.choice.masks == "client",
                uuid.uuid4().hex,
            )
            for number, site in enumerate(transport.sites)
        ]
        try:
            for client in clients:
                client.connect(FIRST_WAIT)
        except WireError as error:
            raise RunFailed(str(error)) from None
        loop = SplitLoop(setup, plan, test, counts, clients)
        try:
            devices = [settings.device] if settings.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                return run_rounds(loop, plan, on_start, on_round, checkpoint)
        finally:
            for client in clients:
                client.leave()
