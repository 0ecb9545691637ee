"""The forms of split training: in which order batches of clients meet which server layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sluiceway.federated.batches import Batch
from sluiceway.federated.stopping import check_stop
from sluiceway.split.client import ClientSide
from sluiceway.split.header import BatchId
from sluiceway.split.server import ServerSide

#: "sequential": clients take turns on one front and one back. "parallel": every client has a
#: front, all share one back, which steps on their batches together (SFL-V2). "copies": every
#: client has a front and a back of its own on the server, averaged like the fronts (SFL-V1).
#: "u": parallel, with the last layers and the loss on the client, so that labels never leave.
FORMS = ("sequential", "parallel", "copies", "u")

#: Batches of a round by the client's number.
Turns = Mapping[int, Iterator[tuple[BatchId, Batch]]]


@dataclass
class Traffic:
    """Bytes of the messages so far."""

    up: int = 0
    down: int = 0


def side_by_side(
    clients: Sequence[ClientSide], turns: Turns, server: ServerSide, traffic: Traffic
) -> dict[int, str]:
    """In every step some clients send a batch each, and the server steps on all of them.

    A client that sends what cannot be trained on sits out the rest of the round.

    Returns:
        By the number of such a client, why.
    """
    out: dict[int, str] = {}
    for chosen in spread([client.batch_count for client in clients]):
        check_stop()
        taking_part = [clients[i] for i in chosen if clients[i].number not in out]
        ready = [(client, *next(turns[client.number])) for client in taking_part]
        if sum(len(batch.labels) for _, _, batch in ready) < server.smallest:
            continue
        sent = {}
        for client, name, batch in ready:
            try:
                message = client.send(name, batch)
                traffic.up += len(message)
                sent[client.number] = name, server.open(message, labels=client.tail is None)
            except ValueError as error:
                out[client.number] = f"{error} (batch {name.batch})"
        opened = [smashed for _, smashed in sent.values()]
        if sum(len(smashed.values) for smashed in opened) < server.smallest:
            continue
        if clients[0].tail is None:
            replies = server.step(opened)
        else:
            replies, refused = server.step_u(opened, Asking(clients, traffic))
            out |= refused
        traffic.down += sum(map(len, replies))
        senders = [client for client in taking_part if client.number in sent]
        for client, reply in zip(senders, replies, strict=True):
            client.receive(sent[client.number][0], reply)
    return out


def spread(counts: Sequence[int]) -> Iterator[list[int]]:
    """Which clients take part in each step, so that each one's batches span the whole round.

    There are as many steps as the longest client has batches. Were all to begin together, the
    server would end every round on the largest client's labels alone  [ours].

    Args:
        counts: batches of each client, >= 0.
    """
    steps = max(counts, default=0)
    for step in range(steps):
        yield [
            i
            for i, count in enumerate(counts)
            if (step + 1) * count // steps > step * count // steps
        ]


class Asking:
    """Carries what the server made of a batch to its client's tail, and the gradient back."""

    def __init__(self, clients: Sequence[ClientSide], traffic: Traffic) -> None:
        self.clients = {client.number: client for client in clients}
        self.traffic = traffic

    def __call__(self, name: BatchId, message: bytes) -> bytes:
        answer = self.clients[name.client].finish(name, message)
        self.traffic.down += len(message)
        self.traffic.up += len(answer)
        return answer
