"""The forms of split training: in which order batches of clients meet which server layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sluiceway.core.signals import check_stop
from sluiceway.split.client_proxy import Away, ClientProxy
from sluiceway.split.header import BatchId
from sluiceway.split.packing import Smashed
from sluiceway.split.server import SplitServer

#: "sequential": clients take turns on one front and one back. "parallel": every client has a
#: front, all share one back, which steps on their batches together (SFL-V2). "copies": every
#: client has a front and a back of its own on the server, averaged like the fronts (SFL-V1).
#: "u": parallel, with the last layers and the loss on the client, so that labels never leave.
SCHEDULES = ("sequential", "parallel", "copies", "u")

#: The names that SplitFed gave them (arXiv 2004.12088).
SCHEDULE_ALIASES = {"splitfed-v1": "copies", "splitfed-v2": "parallel"}


@dataclass
class Traffic:
    """Bytes of the messages so far."""

    up: int = 0
    down: int = 0


def side_by_side(
    parties: Sequence[ClientProxy],
    number: int,
    sizes: Mapping[int, Sequence[int]],
    server: SplitServer,
    traffic: Traffic,
    *,
    tails: bool,
) -> dict[int, str]:
    """In every step some clients send a batch each, and the server steps on all of them.

    A client that sends what cannot be trained on, or cannot be reached, sits out the rest of the
    round.

    Args:
        number: of the round.
        sizes: of each client's batches, by its number.
        tails: clients hold the last layers, and the labels stay there.

    Returns:
        By the number of such a client, why.
    """
    out: dict[int, str] = {}
    done = dict.fromkeys(sizes, 0)
    asking = TailExchange(parties, traffic, tails)
    for chosen in spread([len(sizes[party.number]) for party in parties]):
        check_stop()
        taking_part = [parties[i] for i in chosen if parties[i].number not in out]
        names = {p.number: BatchId(p.number, number, done[p.number]) for p in taking_part}
        enough = sum(sizes[c][name.batch] for c, name in names.items()) >= server.smallest
        done |= {client: name.batch + 1 for client, name in names.items()}
        for party in taking_part:
            with noting(out, names[party.number]):
                party.ask(names[party.number], enough)
        if not enough:
            continue
        opened = incoming([p for p in taking_part if p.number not in out], names, server, asking)
        out |= {client: found for client, found in opened.items() if isinstance(found, str)}
        ready = {c: found for c, found in opened.items() if not isinstance(found, str)}
        if sum(len(smashed.values) for smashed in ready.values()) < server.smallest:
            continue
        if tails:
            replies, refused = server.step_u(list(ready.values()), asking)
            out |= refused
        else:
            replies = server.step(list(ready.values()))
        traffic.down += sum(map(len, replies))
        answers = dict(zip(ready, replies, strict=True))
        for party in taking_part:
            if party.number in answers:
                with noting(out, names[party.number]):
                    party.receive(names[party.number], answers[party.number])
    return out


@contextlib.contextmanager
def noting(out: dict[int, str], name: BatchId) -> Iterator[None]:
    """Note why, if the client is away that has something to do with this batch."""
    try:
        yield
    except Away as error:
        out[name.client] = f"{error} (batch {name.batch})"


def incoming(
    parties: Sequence[ClientProxy],
    names: Mapping[int, BatchId],
    server: SplitServer,
    asking: TailExchange,
) -> dict[int, Smashed | str]:
    """What each client sent, or why it cannot be trained on."""
    found: dict[int, Smashed | str] = {}
    for party in parties:
        name = names[party.number]
        try:
            message = party.sent(name)
            asking.traffic.up += len(message)
            found[party.number] = server.open(message, labels=not asking.tails)
        except ValueError as error:
            found[party.number] = f"{error} (batch {name.batch})"
    return found


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


class TailExchange:
    """Carries what the server made of a batch to its client's tail, and the gradient back."""

    def __init__(self, parties: Sequence[ClientProxy], traffic: Traffic, tails: bool) -> None:
        self.parties = {party.number: party for party in parties}
        self.traffic = traffic
        self.tails = tails

    def __call__(self, name: BatchId, message: bytes) -> bytes:
        answer = self.parties[name.client].finish(name, message)
        self.traffic.down += len(message)
        self.traffic.up += len(answer)
        return answer
