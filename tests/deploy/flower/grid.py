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
from flwr.proto.message_pb2 import Message as Proto
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
    waiting: dict[str, PackedMessage] = field(default_factory=dict)
    crossed: int = 0
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
        return [NodeInfo(node_id=n, name=self.nodes[n].name) for n in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self.push(message) for message in messages]

    def push(self, message: Message) -> str:
        key = message.object_id
        message.metadata.__dict__["_message_id"] = key
        self.asked += 1
        self.waiting[key] = self.packed(message)
        return key

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [reply for key in message_ids if key in self.waiting and (reply := self.reply(key))]

    def reply(self, key: str) -> Message | None:
        message = self.waiting[key].unpacked()
        node = self.nodes[message.metadata.dst_node_id]
        if node.deaf:
            return None
        del self.waiting[key]
        if node.gone:
            return Message(Error(5, "Destination Node is not available."), reply_to=message)
        context = Context(7, message.metadata.dst_node_id, node.config, RecordDict(), {}, 7)
        return self.packed(node.app(message, context)).unpacked()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def packed(self, message: Message) -> PackedMessage:
        """A message as bytes: its proto, and every object in it."""
        parts = {key: found.deflate() for key, found in get_all_nested_objects(message).items()}
        assert max(map(len, parts.values())) <= OBJECT_LIMIT
        self.crossed += sum(map(len, parts.values()))
        head = message_to_proto(make_message(message.metadata, RecordDict())).SerializeToString()
        return PackedMessage(head, message.object_id, parts)


@dataclass
class PackedMessage:
    """A message as it crosses."""

    head: bytes
    key: str
    parts: dict[str, bytes]

    def unpacked(self) -> Message:
        message = cast(Message, inflate_object_from_contents(self.key, dict(self.parts)))
        message.metadata.__dict__["_message_id"] = self.key
        sent = message_from_proto(Proto.FromString(self.head)).metadata
        assert sent.dst_node_id == message.metadata.dst_node_id
        return message
