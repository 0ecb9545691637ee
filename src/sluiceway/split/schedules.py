"""The schedules of split training: in which order batches of clients meet which server layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sluiceway.core.signals import check_stop
from sluiceway.core.waits import counted
from sluiceway.split.client_proxy import Away, ClientProxy
from sluiceway.split.packing import BatchId, Message, Smashed
from sluiceway.split.server import SplitServer

#: "sequential": clients take turns on one front and one back. "parallel": every client has a
#: front, all share one back, which steps on their batches together. "copies": every client has a
#: front and a back of its own on the server, averaged like the fronts. "u": parallel, with the last
#: layers and the loss on the client, so that labels never leave.
SCHEDULES = ("sequential", "parallel", "copies", "u")

#: The names that SplitFed gave them (arXiv 2004.12088).
SCHEDULE_ALIASES = {"splitfed-v1": "copies", "splitfed-v2": "parallel"}


@dataclass
class Traffic:
    """Bytes of the messages so far; of those up the smashed data's, and how many values they say.

    Smashed data are counted with all that their messages hold: scales, indices, labels.
    """

    up: int = 0
    down: int = 0
    smashed: int = 0
    values: int = 0

    @property
    def bits(self) -> float | None:
        """Bits a value of the smashed data, 32 where all cross exactly; None without any."""
        return 8 * self.smashed / self.values if self.values else None


def train_together(
    clients: Sequence[ClientProxy],
    round: int,
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
        sizes: of each client's batches, by its id.
        tails: clients hold the last layers, and the labels stay there.

    Returns:
        By the id of such a client, why.
    """
    rejected: dict[int, str] = {}
    done = dict.fromkeys(sizes, 0)
    by_id = {client.client_id: client for client in clients}

    def tail(batch_id: BatchId, message: Message) -> Message:
        answer = by_id[batch_id.client].tail_gradient(batch_id, message)
        traffic.down += len(message)
        traffic.up += len(answer)
        return answer

    @contextlib.contextmanager
    def rejecting(batch_id: BatchId, errors: type[ValueError] = Away) -> Iterator[None]:
        try:
            yield
        except errors as error:
            rejected[batch_id.client] = f"{error} (batch {batch_id.batch})"

    # Not held: how many examples they hold is what clients say.
    counts = [len(sizes[client.client_id]) for client in clients]
    for chosen in counted("training of a round, steps", spread(counts), max(counts, default=0)):
        check_stop()
        present = [clients[i].client_id for i in chosen if clients[i].client_id not in rejected]
        batch_ids = [BatchId(client_id, round, done[client_id]) for client_id in present]
        done |= {one.client: one.batch + 1 for one in batch_ids}
        # 1. Request the batches, so that all clients work at the same time.
        enough = sum(sizes[one.client][one.batch] for one in batch_ids) >= server.smallest
        for one in batch_ids:
            with rejecting(one):
                by_id[one.client].request(one, enough)
        if not enough:
            continue
        # 2. Take the smashed data.
        opened: dict[BatchId, Smashed] = {}
        for one in batch_ids:
            if one.client not in rejected:
                with rejecting(one, ValueError):
                    message = by_id[one.client].smashed_data(one)
                    traffic.up += len(message)
                    rows, size = sizes[one.client][one.batch], by_id[one.client].size
                    finer = server.config.finer(one.batch, len(sizes[one.client]))
                    opened[one] = server.open(
                        message, one, rows, size, labels=not tails, finer=finer
                    )
                    traffic.smashed += len(message)
                    traffic.values += opened[one].values.numel()
        if sum(len(smashed.values) for smashed in opened.values()) < server.smallest:
            continue
        # 3. Step on the server; in a U-shape by way of the clients' tails.
        if tails:
            replies, failed = server.step_u(list(opened.values()), tail)
            rejected |= failed
        else:
            replies = server.step(list(opened.values()))
        if not server.config.gradients:
            continue
        # 4. Return the gradients, on which the clients step.
        for one, reply in zip(opened, replies, strict=True):
            traffic.down += len(reply)
            with rejecting(one):
                by_id[one.client].receive(one, reply)
    return rejected


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
