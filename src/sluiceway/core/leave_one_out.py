"""Whether the model is better without one client: what finds lies of a usual length.

An update that goes against the others is a lie, or of a client whose data are unlike theirs. The
loss on the server's test set tells the two apart: without the client it falls, or it rises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Final

import torch
from torch import Tensor

from sluiceway.moe import ParamSlice
from sluiceway.strategies import Strategy, Update

#: Most bytes of a round's updates that are kept until all are there, to compare them.
HELD: Final = 2 << 30
#: By how much the loss must fall without a client, as a share of the loss: of one that went
#: against the others on the mean of its newest rounds, and of any other.
OFTEN_GAIN: Final = 0.005
ONCE_GAIN: Final = 0.25
#: And of the latter what may be left of the loss's rise.
ONCE_RISE: Final = 0.25
#: And of the former also as a share of the round's progress, for a run of one client.
PROGRESS: Final = 0.5


def harmful(before: float, with_it: float, without: float, clients: int, often: bool) -> bool:
    """Whether a client that goes against the others is to be left out of a round [ours].

    Who does so often: if the loss falls without it by `OFTEN_GAIN` of it and by `PROGRESS` / N of
    what the others change it by. Who did not before: if the loss falls without it by `ONCE_GAIN`
    of it, and what is left of its rise in the round is at most `ONCE_RISE` of it.

    Args:
        before: loss on the test set of the model before the round; `with_it`: of the new one;
            without: of the new one that lacks the client.
        clients: N >= 1 whose updates are used, with it.
        often: it went against the others on the mean of its newest rounds.
    """
    if not isfinite(without):
        return False
    if not often:
        healed = without - before <= ONCE_RISE * (with_it - before)
        return healed and not with_it - without <= ONCE_GAIN * with_it
    least = max(OFTEN_GAIN * with_it, PROGRESS / clients * abs(before - without))
    return not with_it - without <= least


def agreement(updates: Sequence[Update], strategy: Strategy) -> dict[int, float]:
    """How far each update goes the way of the others: the cosine between them, by client.

    cos(u_i, sum_{j != i} u_j), where u is an update's change of the parameters, of length one, so
    that a long one does not decide which way is right. [ours] An update that changes nothing is
    left out.

    Memory: one piece of every client at a time. It reads each update twice.

    Args:
        updates: readable ones, at least two.
        strategy: as it was before them.
    """
    pieces = [p for p in strategy.shared_pieces if not p.is_statistic]

    def changes(piece: ParamSlice) -> Iterator[tuple[int, Tensor]]:
        old = piece.of(strategy.tensors)
        for update in updates if old.is_floating_point() else ():
            if (new := update.tensors.get(piece.key)) is not None:
                yield update.client, (new.to(old.device) - old).float()

    squares: dict[int, Tensor | float] = {}
    for piece in pieces:
        for client, change in changes(piece):
            squares[client] = squares.get(client, 0.0) + change.square().sum()
    norms = {client: norm for client, x in squares.items() if (norm := float(x) ** 0.5) > 0}
    along: dict[int, Tensor | float] = dict.fromkeys(norms, 0.0)
    total: Tensor | float = 0.0
    for piece in pieces:
        units = {c: change / norms[c] for c, change in changes(piece) if c in norms}
        if units:
            way = torch.stack(list(units.values())).sum(0)
            total = total + way.square().sum()
            along = {
                c: dot + (units[c] * way).sum() if c in units else dot for c, dot in along.items()
            }
    dots, square = {client: float(dot) for client, dot in along.items()}, float(total)
    return {c: (dot - 1) / max(square - 2 * dot + 1, 1e-12) ** 0.5 for c, dot in dots.items()}
