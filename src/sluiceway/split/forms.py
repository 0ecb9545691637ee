"""The forms of split training: in which order batches of clients meet which server layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from sluiceway.federated.batches import Batch
from sluiceway.split.header import BatchId
from sluiceway.split.sides import ClientSide, ServerSide

#: "sequential": clients take turns on one front and one back. "parallel": every client has a
#: front, all share one back, which steps on their batches together (SFL-V2). "copies": every
#: client has a front and a back of its own on the server (SFL-V1). "u": parallel, with the last
#: layers and the loss on the client, so that labels never leave.
FORMS = ("sequential", "parallel", "copies", "u")

Turns = Mapping[int, Iterator[tuple[BatchId, Batch]]]


@dataclass
class Traffic:
    """Bytes of the messages so far."""

    up: int = 0
    down: int = 0


def one_after_the_other(
    clients: Sequence[ClientSide],
    turns: Turns,
    server_of: Callable[[int], ServerSide],
    traffic: Traffic,
    handover: Callable[[ClientSide], None] = lambda client: None,
) -> None:
    """Each client in turn sends all its batches, each answered at once.

    `handover` is called before a client's first batch: in sequential training it brings the front.
    """
    for client in clients:
        handover(client)
        server = server_of(client.number)
        for name, batch in turns[client.number]:
            message = client.send(name, batch)
            (reply,) = server.step([message])
            client.receive(name, reply)
            traffic.up += len(message)
            traffic.down += len(reply)


def side_by_side(
    clients: Sequence[ClientSide], turns: Turns, server: ServerSide, traffic: Traffic
) -> None:
    """In every step, each client that has a batch left sends it, and the server steps on all."""
    while True:
        ready = [(c, turn) for c in clients if (turn := next(turns[c.number], None)) is not None]
        if not ready:
            return
        messages = [client.send(*turn) for client, turn in ready]

        def ask(i: int, message: bytes) -> bytes:
            client, (name, _) = ready[i]  # noqa: B023 - used within this turn of the loop only
            answer = client.finish(name, message)
            traffic.down += len(message)
            traffic.up += len(answer)
            return answer

        u_shaped = ready[0][0].tail is not None
        replies = server.step_u(messages, ask) if u_shaped else server.step(messages)
        for (client, (name, _)), reply in zip(ready, replies, strict=True):
            client.receive(name, reply)
        traffic.up += sum(map(len, messages))
        traffic.down += sum(map(len, replies))


def generator_of(seed: int) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)
