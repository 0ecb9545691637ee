"""Carries requests to sites over a Flower Grid."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from flwr.app import ArrayRecord, Message
from flwr.app.constants import DEFAULT_TTL
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from sluiceway.core.signals import check_stop
from sluiceway.deploy.flower.chunks import DATA, PIECE, Chunk, ChunkError, array_record
from sluiceway.deploy.flower.transfer import Transfer
from sluiceway.errors import InputError, line
from sluiceway.transport.protocol import Request, Response
from sluiceway.transport.worker_pool import TaskFailure

#: The type of our messages, which a ClientApp has a function for.
MESSAGE_TYPE: Final = "query.sluiceway"
#: Seconds between two looks at whether answers came.
TICK: Final = 0.25
#: Messages on the way to one site at once: the next is there when its node looks for it.
WINDOW: Final = 2


@dataclass(frozen=True)
class Node:
    """A SuperNode: the name it was registered by (else its id), and its id."""

    name: str
    number: int

    @classmethod
    def of(cls, info: NodeInfo) -> Node:
        return cls(info.name or str(info.node_id), info.node_id)


class GridTransport:
    """A `Transport` over Flower.

    Sites are the SuperNodes that are there at the start, in the order of their names, digits in
    them as numbers: "site-2" before "site-10". A name is given where a node's key is registered, so
    that a node cannot choose it.

    Args:
        grid: of the ServerApp.
        sites: how many SuperNodes to wait for, >= 1.
        patience: seconds to wait for them.
        at_once: sites that are asked at the same time, 0 for all.
        piece: bytes of a file in one message; memory grows with it.

    Raises:
        InputError: other SuperNodes are there than were asked for.
    """

    def __init__(
        self,
        grid: Grid,
        sites: int,
        *,
        patience: float = 120.0,
        at_once: int = 0,
        piece: int = PIECE,
    ) -> None:
        self.grid = grid
        self.at_once = at_once or sites
        self.piece = piece
        self.nodes = waited_for(grid, sites, patience)
        self.sites: Sequence[str] = [node.name for node in self.nodes]
        self._data: tuple[Path | None, int, ArrayRecord] | None = None

    def ask(
        self, asks: Mapping[int, Request], folder: Path, timeout: float = 0
    ) -> Iterator[tuple[int, Response | TaskFailure]]:
        deadline = time.monotonic() + timeout if timeout else float("inf")
        here = self._here()
        open_ones: dict[int, Transfer] = {}
        for number, ask in asks.items():
            node = here.get(self.nodes[number].number)
            if node is None:
                yield number, TaskFailure(f"SuperNode {self.sites[number]} is not connected")
            else:
                open_ones[number] = Transfer(ask, node.number, folder, self.piece)
        while open_ones:
            check_stop()
            now = dict(islice(open_ones.items(), self.at_once))
            self._send(now, timeout)
            for number, exchange in now.items():
                found = self._collect(exchange)
                if found is not None:
                    del open_ones[number]
                    yield number, found
            if time.monotonic() > deadline:
                break
            time.sleep(TICK)
        for number, exchange in open_ones.items():
            exchange.drop()
            yield number, TaskFailure(f"took longer than {timeout:g} s")

    def _send(self, exchanges: Mapping[int, Transfer], timeout: float) -> None:
        """Whatever there is room for on the way; one message at a time, for the memory."""
        for exchange in exchanges.values():
            while len(exchange.going) < WINDOW and (chunk := exchange.next()) is not None:
                content = chunk.packed()
                if chunk.piece:
                    content[DATA] = self._shared(exchange.ask.message, chunk)
                ttl = timeout + 60 if timeout else DEFAULT_TTL
                message = Message(content, exchange.node, MESSAGE_TYPE, ttl=ttl)
                keys = [key for key in self.grid.push_messages([message]) if key]
                if not keys:
                    exchange.fail("the SuperLink did not take the message")
                    break
                exchange.going += keys
        self._data = None

    def _shared(self, path: Path | None, chunk: Chunk) -> ArrayRecord:
        """A piece as one record for all that are sent it, so that it is taken apart only once."""
        if self._data is None or self._data[:2] != (path, chunk.offset):
            self._data = (path, chunk.offset, array_record(chunk.piece))
        return self._data[2]

    def _collect(self, exchange: Transfer) -> Response | TaskFailure | None:
        """Take what came for one exchange; its end, once it is there."""
        for key in list(exchange.going):
            for reply in self.grid.pull_messages([key]):
                exchange.going.remove(key)
                if reply.has_error():
                    exchange.fail(reason(reply))
                    break
                try:
                    exchange.take(Chunk.read(reply.content))
                except ChunkError as error:
                    exchange.fail(line(str(error)))
            if exchange.done is not None:
                return exchange.done
        return exchange.done

    def _here(self) -> dict[int, Node]:
        """The SuperNodes that are connected, by id."""
        return {info.node_id: Node.of(info) for info in self.grid.get_nodes()}


def waited_for(grid: Grid, count: int, patience: float) -> list[Node]:
    """SuperNodes in the order of their names, once `count` are there. Raises InputError."""
    deadline = time.monotonic() + patience
    while True:
        check_stop()
        nodes = sorted(map(Node.of, grid.get_nodes()), key=lambda node: in_order(node.name))
        if len(nodes) >= count or time.monotonic() > deadline:
            break
        time.sleep(TICK)
    names = [node.name for node in nodes]
    if len(nodes) != count:
        raise InputError(
            f"{len(nodes)} SuperNodes are connected ({line(', '.join(names))}); "
            f"data.clients = {count}"
        )
    if len(set(names)) < len(names):
        raise InputError(f"two SuperNodes have the same name: {line(', '.join(names))}")
    return nodes


def in_order(name: str) -> list[tuple[int, int, str]]:
    """A key to sort names by, in which digits are numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def reason(reply: Message) -> str:
    """Why a message has no answer, in one line."""
    return line(f"Flower: {reply.error.reason or f'error {reply.error.code}'}")
