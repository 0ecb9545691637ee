"""A site in a split run: its front and its data stay here, frames cross a TLS connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sluiceway.core.batches import Examples
from sluiceway.core.seeds import derive_seed
from sluiceway.split.client import SplitClient
from sluiceway.split.config import joined
from sluiceway.split.packing import BatchId
from sluiceway.split.setup import SharedSetup
from sluiceway.strategies.base import unprefixed
from sluiceway.transport.site import ClientStateStore, SiteError, run_name, whole

#: Facts and body of a reply.
Reply = tuple[dict[str, Any], bytes]

#: Frames without a reply: an error in them is sent with the next reply.
WITHOUT_REPLY = ("pass", "receive")


class SplitTrainer:
    """A client at the other end of a connection; see `remote_split.RemoteClient`.

    Args:
        number: this client's.
        examples: its data.
        setup: from the number of classes to what both sides construct alike, constructed anew.
        states: of the client.
        seed: of the whole run.
    """

    def __init__(
        self,
        number: int,
        examples: Examples,
        setup: Callable[[int], SharedSetup],
        states: ClientStateStore,
        seed: int,
    ) -> None:
        self.number, self.examples, self.setup = number, examples, setup
        self.states, self.seed = states, seed
        self.classes = 0
        self.fault: Exception | None = None
        self.between_rounds = True
        #: The run and the round after which the client has its current state.
        self.current: tuple[str, int] = ("", 0)

    def answer(self, facts: dict[str, Any], body: bytes) -> Reply | None:
        """Handle a frame.

        Raises:
            Exception: of this frame, or of an earlier one that had no reply.
        """
        what = facts.get("what")
        actions: dict[Any, Callable[[dict[str, Any], bytes], Reply]] = {
            "open": self.open,
            "rate": self.rate,
            "begin": self.begin,
            "send": self.send,
            "pass": self.pass_over,
            "finish": self.finish,
            "receive": self.receive,
            "end": self.end,
        }
        if what not in actions:
            raise SiteError(f"a split run has no {what!r}")
        if what in WITHOUT_REPLY:
            try:
                actions[what](facts, body)
            except Exception as error:
                self.fault = self.fault or error
            return None
        if what == "begin":
            self.fault = None
        elif self.fault is not None:
            raise self.fault
        return actions[what](facts, body)

    def open(self, facts: dict[str, Any], _: bytes) -> Reply:
        """Build the layers, and report their signature."""
        self.fault = None
        self.classes = whole(facts, "classes")
        self.reset()
        return {"signature": self.both.signature().to_json()}, b""

    def reset(self) -> None:
        """The client as it was before the first round."""
        self.both = self.setup(self.classes)
        self.side: SplitClient = self.both.client(self.number, self.examples)
        self.current, self.between_rounds = ("", 0), True

    def rate(self, _: dict[str, Any], __: bytes) -> Reply:
        """Rate channels before the first round."""
        return {}, self.side.rate()

    def begin(self, facts: dict[str, Any], opening: bytes) -> Reply:
        """Begin a round, from the state after the round that the server names."""
        run, based = run_name(facts), whole(facts, "based")
        self.keep, self.round = whole(facts, "keep"), whole(facts, "round")
        if not self.between_rounds or (based and self.current != (run, based)):
            self.reset()
        if based and self.current != (run, based):
            self.load(self.states.load(run, based))
        self.current, self.between_rounds = (run, based), False
        given = facts.get("mask")
        mask = None if given is None else torch.tensor(given, dtype=torch.bool)
        self.side.begin(self.round, opening, mask, facts.get("forget") is True)
        # For random layers such as dropout; data and channels have seeds of their own.
        torch.manual_seed(derive_seed(self.seed, self.round, self.number))
        return {}, b""

    def send(self, facts: dict[str, Any], _: bytes) -> Reply:
        """The next batch, packed."""
        return {}, bytes(self.side.smashed_data(self.name_of(facts)))

    def pass_over(self, facts: dict[str, Any], _: bytes) -> Reply:
        """Leave the next batch out."""
        self.side.request(self.name_of(facts), False)
        return {}, b""

    def name_of(self, facts: dict[str, Any]) -> BatchId:
        """The batch of the round that a frame is about."""
        return BatchId(self.number, self.round, whole(facts, "batch"))

    def finish(self, facts: dict[str, Any], message: bytes) -> Reply:
        """Run the tail, and send its gradient."""
        return {}, bytes(self.side.tail_gradient(self.name_of(facts), message))

    def receive(self, facts: dict[str, Any], message: bytes) -> Reply:
        """Step on the gradient of a batch."""
        self.side.receive(self.name_of(facts), message)
        return {}, b""

    def end(self, facts: dict[str, Any], _: bytes) -> Reply:
        """Close the round, and save the client's state."""
        message = self.side.end(self.round, facts.get("scores") is True)[0]
        run, based = self.current
        self.states.save(run, self.round, self.state(), self.keep, based)
        self.current, self.between_rounds = (run, self.round), True
        return {}, message

    def state(self) -> dict[str, torch.Tensor]:
        """The client's state between rounds, with the error feedback of compression."""
        config = self.both.config
        return joined(
            {
                "client": self.side.state_dict(),
                "cut": config.link.state_dict(),
                "tail": config.tail_link.state_dict(),
            }
        )

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from what `state` gave."""
        self.side.load_state_dict(unprefixed(state, "client/"))
        self.both.config.link.load_state_dict(unprefixed(state, "cut/"))
        self.both.config.tail_link.load_state_dict(unprefixed(state, "tail/"))
