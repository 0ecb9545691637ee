"""A client as the server sees it, wherever it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from sluiceway.core.batches import Batch
from sluiceway.core.seeds import derive_seed
from sluiceway.split.client import SplitClient
from sluiceway.split.errors import WireError
from sluiceway.split.header import BatchId
from sluiceway.strategies import Strategy


class Away(WireError):
    """A client that cannot be reached; the round goes on without it."""


class ClientProxy(Protocol):
    """A client of the run; every method may raise `Away`.

    Attributes:
        number: from 0.
        size: examples that it holds.
    """

    number: int
    size: int

    def rate(self) -> bytes:
        """Its message of scores before the first round; see `SplitClient.rate`."""
        ...

    def begin(self, number: int, opening: bytes, mask: Tensor | None) -> None:
        """Take the message that opens round `number`, and a mask [C] that is not in it."""
        ...

    def ask(self, name: BatchId, crosses: bool) -> None:
        """The next batch shall be sent under that name, or is passed over."""
        ...

    def sent(self, name: BatchId) -> bytes:
        """The packed batch that was asked for."""
        ...

    def finish(self, name: BatchId, message: bytes) -> bytes:
        """In a U-shape: the gradient of its tail for what the server made of a batch."""
        ...

    def receive(self, name: BatchId, message: bytes) -> None:
        """Take the packed gradient of a batch, and step."""
        ...

    def end(self, number: int, crossing: bool) -> tuple[bytes, Tensor | None]:
        """The message that closes the round, and scores that are not in it.

        Args:
            crossing: scores are to be in it.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What outlives a round, or where that is to be had; not copied."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
        ...


class LocalClient:
    """A client of this process.

    Args:
        side: the client.
        strategy: averages its layers.
        seed: of the whole run.
    """

    def __init__(self, side: SplitClient, strategy: Strategy, seed: int) -> None:
        self.side, self.strategy, self.seed = side, strategy, seed
        self.number = side.number
        self.size = len(side.examples)
        self._turns: Iterator[tuple[BatchId, Batch]] = iter(())

    def rate(self) -> bytes:
        return self.side.rate()

    def begin(self, number: int, opening: bytes, mask: Tensor | None) -> None:
        self.side.begin(number, opening, self.strategy, mask)
        self._turns = self.side.batches(number, generator(self.seed, number, self.number))

    def ask(self, name: BatchId, crosses: bool) -> None:
        if not crosses:
            next(self._turns)

    def sent(self, name: BatchId) -> bytes:
        own, batch = next(self._turns)
        assert own == name
        return self.side.send(name, batch)

    def finish(self, name: BatchId, message: bytes) -> bytes:
        return self.side.finish(name, message)

    def receive(self, name: BatchId, message: bytes) -> None:
        self.side.receive(name, message)

    def end(self, number: int, crossing: bool) -> tuple[bytes, Tensor | None]:
        scores = self.side.meter.scores() if self.side.meter is not None else None
        return self.side.end(number, scores if crossing else None), scores

    def state_dict(self) -> dict[str, Tensor]:
        return self.side.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.side.load_state_dict(state)


def generator(seed: int, number: int, client: int) -> torch.Generator:
    """What shuffles and augments a client's batches of round `number`."""
    return torch.Generator().manual_seed(derive_seed(seed, number, client))
