"""A client as the server sees it, in this process (`SplitClient`) or at a site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from sluiceway.core.messages import WireError
from sluiceway.split.packing import BatchId, Message


class Away(WireError):
    """A client that cannot be reached; the round goes on without it."""


class ClientProxy(Protocol):
    """A client of the run; every method may raise `Away`.

    Attributes:
        client_id: from 0.
        size: examples that it holds.
    """

    client_id: int
    size: int

    def rate(self) -> bytes:
        """Its message of scores before the first round."""

    def begin(self, round: int, message: bytes, mask: Tensor | None, forget: bool = False) -> None:
        """Start a round with the server's message, and with a mask [C] that is not in it.

        Args:
            forget: it begins its memory of delta coding anew, as the server does.
        """

    def request(self, batch_id: BatchId, crosses: bool) -> None:
        """Have it send its next batch, or leave that batch out."""

    def smashed_data(self, batch_id: BatchId) -> Message:
        """The message of smashed data that were asked for."""

    def tail_gradient(self, batch_id: BatchId, message: Message) -> Message:
        """In a U-shape: the gradient of its tail by what the server made of a batch."""

    def receive(self, batch_id: BatchId, message: Message) -> None:
        """Step on the gradient of a batch."""

    def end(self, round: int, crossing: bool) -> tuple[bytes, Tensor | None]:
        """Its message at the end of the round, and scores that are not in it.

        Args:
            crossing: scores are to be in it.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept from round to round, or where that is; not copied."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
