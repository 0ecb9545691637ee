"""A Grid in this process, whose messages are bytes on the way there and back, as Flower's own are.

Each message is taken apart into the objects that cross the wire and put together again, and its
ClientApp is given a context of its own, so that nothing but bytes and files goes across.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

#: As Flower's limit on what an object may hold on the wire: a chunk of 5 MB and its head.
OBJECT_LIMIT = 6_000_000


@dataclass
class Node:
    """A SuperNode: its ClientApp, node config, and what is wrong with it."""

    name: str
    app: ClientApp
    config: dict[str, Any] = field(default_factory=dict)
    online: bool = True
    deaf: bool = False  # takes messages and never replies
    gone: bool = False  # Flower replies in its place


@dataclass
class TestGrid(Grid):
    """Nodes by id; a message is handled when its reply is pulled."""

    __test__ = False

    nodes: Mapping[int, Node]
    waiting: dict[str, bytes] = field(default_factory=dict)
    crossed: int = 0
    largest: int = 0
    asked: int = 0

    def __post_init__(self) -> None:
        # A Message takes its run and task from the process that it is made in.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 7, 7, 1

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return Run.create_empty(7)

    def create_message(self, *args: Any, **more: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return [number for number, node in self.nodes.items() if node.online]

    def get_nodes(self) -> list[NodeInfo]:
        return [
            NodeInfo(node_id=number, name=node.name)
            for number, node in self.nodes.items()
            if node.online
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self.push(message) for message in messages]

    def push(self, message: Message) -> str:
        key = message.object_id
        message.metadata.__dict__["_message_id"] = key
        self.asked += 1
        self.waiting[key] = self.carried(message)
        return key

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [reply for key in message_ids if key in self.waiting and (reply := self.answer(key))]

    def answer(self, key: str) -> Message | None:
        message = inflated(self.waiting[key])
        node = self.nodes[message.metadata.dst_node_id]
        if node.deaf:
            return None
        del self.waiting[key]
        if node.gone:
            return replied(message, Error(5, "Destination Node is not available."))
        context = Context(7, message.metadata.dst_node_id, node.config, RecordDict(), {}, 7)
        return inflated(self.carried(node.app(message, context)))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def carried(self, message: Message) -> bytes:
        """A message as bytes: its proto, and every object in it."""
        parts = {key: found.deflate() for key, found in get_all_nested_objects(message).items()}
        self.largest = max(self.largest, *(len(part) for part in parts.values()))
        assert self.largest <= OBJECT_LIMIT
        self.crossed += sum(len(part) for part in parts.values())
        return flat(message, parts)


def flat(message: Message, parts: Mapping[str, bytes]) -> bytes:
    head = message_to_proto(make_message(message.metadata, RecordDict())).SerializeToString()
    pieces = [head, message.object_id.encode()]
    for key, part in parts.items():
        pieces += [key.encode(), part]
    return b"".join(len(piece).to_bytes(8, "big") + piece for piece in pieces)


def inflated(data: bytes) -> Message:
    from flwr.proto.message_pb2 import Message as Proto

    pieces = []
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "big")
        pieces.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    head, key, *rest = pieces
    parts = {rest[i].decode(): rest[i + 1] for i in range(0, len(rest), 2)}
    message = cast(Message, inflate_object_from_contents(key.decode(), parts))
    proto = Proto.FromString(head)
    found = message_from_proto(proto)
    message.metadata.__dict__["_message_id"] = key.decode()
    assert found.metadata.dst_node_id == message.metadata.dst_node_id
    return message


def replied(message: Message, error: Error) -> Message:
    return Message(error, reply_to=message)
