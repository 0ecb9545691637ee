"""A `Transport` over a Flower Grid."""

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
from sluiceway.deploy.chunks import Chunk, ChunkError, Transfer
from sluiceway.deploy.flower.records import (
    CHUNK,
    MESSAGE_TYPE,
    array_record,
    chunk_of,
    content_of,
)
from sluiceway.errors import InputError, line
from sluiceway.transport.protocol import Request, Response, TaskFailure

#: Seconds between two looks at whether replies arrived.
TICK: Final = 0.25
#: Messages under way to one site at once: the next is there when its node looks for it.
WINDOW: Final = 2


@dataclass(frozen=True)
class Node:
    """A SuperNode: the name that its key was registered by (else its id), and its id."""

    name: str
    number: int

    @classmethod
    def of(cls, info: NodeInfo) -> Node:
        return cls(info.name or str(info.node_id), info.node_id)


class GridTransport:
    """A `Transport` over Flower.

    Sites are the SuperNodes that are connected at the start, in the order of their names, digits in
    them as numbers: "site-2" before "site-10". A name is given where a node's key is registered, so
    that a node cannot choose it.

    Args:
        grid: of the ServerApp.
        sites: how many SuperNodes to wait for, >= 1.
        wait: seconds to wait for them.
        concurrent: sites that have requests at the same time, 0 for all.
        chunk: bytes of a file in one message; memory grows with it.

    Raises:
        InputError: another number of SuperNodes is connected.
    """

    def __init__(
        self,
        grid: Grid,
        sites: int,
        *,
        wait: float = 120.0,
        concurrent: int = 0,
        chunk: int = CHUNK,
    ) -> None:
        self.grid = grid
        self.concurrent = concurrent or sites
        self.chunk = chunk
        self.nodes = wait_for_nodes(grid, sites, wait)
        self.sites: Sequence[str] = [node.name for node in self.nodes]
        self._data: tuple[Path | None, int, ArrayRecord] | None = None

    def send(
        self, requests: Mapping[int, Request], folder: Path, timeout: float = 0
    ) -> Iterator[tuple[int, Response | TaskFailure]]:
        """See `Transport.send`."""
        deadline = time.monotonic() + timeout if timeout else float("inf")
        connected = set(self.grid.get_node_ids())
        pending: dict[int, Transfer] = {}
        under_way: dict[int, list[str]] = {}
        for client, request in requests.items():
            if self.nodes[client].number in connected:
                pending[client] = Transfer(request, folder, self.chunk)
                under_way[client] = []
            else:
                yield client, TaskFailure(f"SuperNode {self.sites[client]} is not connected")
        while pending:
            check_stop()
            now = dict(islice(pending.items(), self.concurrent))
            for client, transfer in now.items():
                self._push(client, transfer, under_way[client], timeout)
            self._data = None
            for client, transfer in now.items():
                self._pull(transfer, under_way[client])
                if transfer.result is not None:
                    del pending[client]
                    yield client, transfer.result
            if time.monotonic() > deadline:
                break
            time.sleep(TICK)
        for client, transfer in pending.items():
            transfer.fail(f"took longer than {timeout:g} s")
            assert transfer.result is not None
            yield client, transfer.result

    def _push(self, client: int, transfer: Transfer, keys: list[str], timeout: float) -> None:
        """Send the messages for which the window has room; one at a time, for the memory."""
        while len(keys) < WINDOW and (chunk := transfer.next()) is not None:
            content = content_of(chunk, self._shared(transfer.request.message, chunk))
            ttl = timeout + 60 if timeout else DEFAULT_TTL
            message = Message(content, self.nodes[client].number, MESSAGE_TYPE, ttl=ttl)
            pushed = [key for key in self.grid.push_messages([message]) if key]
            if not pushed:
                transfer.fail("the SuperLink did not take the message")
            keys += pushed

    def _shared(self, path: Path | None, chunk: Chunk) -> ArrayRecord | None:
        """A chunk's data as one record for all sites, so that Flower hashes it only once."""
        if not chunk.data:
            return None
        if self._data is None or self._data[:2] != (path, chunk.offset):
            self._data = (path, chunk.offset, array_record(chunk.data))
        return self._data[2]

    def _pull(self, transfer: Transfer, keys: list[str]) -> None:
        """Take the replies that arrived for one transfer."""
        for key in list(keys):
            for reply in self.grid.pull_messages([key]):
                keys.remove(key)
                try:
                    if transfer.result is None:
                        transfer.take(chunk_of(reply))
                except ChunkError as error:
                    transfer.fail(line(str(error)))


def wait_for_nodes(grid: Grid, count: int, wait: float) -> list[Node]:
    """SuperNodes in the order of their names, once `count` are connected. Raises InputError."""
    deadline = time.monotonic() + wait
    while True:
        check_stop()
        nodes = sorted(map(Node.of, grid.get_nodes()), key=lambda node: natural_order(node.name))
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


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key to sort names by, in which digits are numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]
