"""FC-MoE: what clients' experts disagree on is held back by the client (arXiv 2606.15625)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway.moe import ParamSlice
from sluiceway.strategies.base import LocalContext, Update
from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.parameters import PARAMETERS


@dataclass(config=PARAMETERS, kw_only=True)
class FCMoE(FedAvg):
    """Experts are averaged by contribution, without what opposes the common direction.

    Known second-hand alone. Client i changed expert e by D_i, over all its tensors:

    - its contribution is c_i = r_i(e) |D_i|, r_i(e) the routing it measured, and the common
      direction is d = sum_i c_i D_i [paper, second-hand];
    - where cos(D_i, d) < 0 the component along d is taken out, D_i' = D_i - a_i d with
      a_i = <D_i, d> / |d|^2 < 0 [paper, second-hand]; the new expert is
      old + sum_i c_i D_i' / sum_i c_i [ours];
    - the client keeps a_i d, and adds half of it to what it sends in the next round
      [paper, second-hand].

    Since every a_i d is along d, the new expert is old + (1 + s) d / sum_j c_j with
    s = sum over the clients in conflict of c_i |a_i| [ours: the same, written so that the server
    keeps no tensor of a client]. Only the direction of d matters to the client, so it takes the
    expert's own change from the broadcast it trained on to the one it now has: d itself where it
    takes part in every round, else what happened in all rounds since [ours]. So nothing more
    crosses than in FedAvg. Updates are read twice, since d is known only once all are in. All other
    parameters, and what a client weighs in them, as in FedAvg [ours].

    give_back: share of what was held back that the client adds to its next update, in [0, 1].
    """

    name: ClassVar[str] = "fc-moe"
    needs_experts: ClassVar[bool] = True
    reads_routing: ClassVar[bool] = True
    give_back: float = Field(default=0.5, ge=0, le=1)

    # -- the server's half ---------------------------------------------------------------------

    def streams(self) -> bool:
        return False

    def begin(self, number: int, updates: Sequence[Update] = ()) -> None:
        super().begin(number, updates)
        self.updates = updates
        self.contributions: dict[int, list[list[float]]] = {}

    def accumulate(self, update: Update) -> None:
        self.contributions[update.client] = [
            [
                float(report.routing[e]) * norm(self.change(update, block.expert(e)))
                for e in range(block.num_experts)
            ]
            for block, report in zip(self.layout.blocks, update.routing, strict=True)
        ]
        super().accumulate(update)

    def finish(self) -> None:
        super().finish()
        self.updates = ()

    def weight(self, update: Update, piece: ParamSlice) -> float | Tensor:
        owner = self.layout.owner(piece.key)
        if owner is None:
            return float(update.examples)
        block, expert = owner
        return self.contributions[update.client][block][expert]

    def step(self, mean: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean is old + d / sum_i c_i; here its experts' changes are lengthened by 1 + s."""
        for block in self.layout.blocks:
            for e, pieces in enumerate(block.pieces):
                pieces = tuple(p for p in pieces if p.param in mean)
                d = differences({p.key: p.of(mean) for p in pieces}, pieces, self.tensors)
                if (held := self.held_back(d, block.position, e)) > 0:
                    for piece in pieces:
                        piece.of(mean).copy_(piece.of(self.tensors) + (1 + held) * d[piece.key])
        return mean

    def held_back(self, d: Mapping[str, Tensor], block: int, expert: int) -> float:
        """s of an expert, >= 0: what the clients in conflict would take from the mean, in d."""
        if (square := inner(d, d)) == 0:
            return 0.0
        taken = total = 0.0
        for update in self.updates:
            c = self.contributions[update.client][block][expert]
            along = inner(self.change(update, self.layout.expert(block, expert)), d) / square
            total += c
            taken += c * max(-along, 0.0)
        return taken / total

    def change(self, update: Update, pieces: Sequence[ParamSlice]) -> dict[str, Tensor]:
        """D_i of an expert, by piece."""
        return differences(update.tensors, pieces, self.tensors)

    # -- the client's half ---------------------------------------------------------------------

    def finish_training(self, client: LocalContext) -> Mapping[str, Tensor]:
        assert client.observer is not None
        routing = client.observer.routing()
        for block in client.layout.blocks:
            for expert in block.pieces:
                used = [p for p in expert if p.param in client.params and self.sends(p, routing)]
                self.give(client, used)
        return {}

    @torch.no_grad()
    def give(self, client: LocalContext, pieces: Sequence[ParamSlice]) -> None:
        """Add what was held back of an expert to what is sent, in the model; keep what is sent.

        An expert that is not sent in this round keeps what it has for a later one.
        """
        kept = client.state
        now = {p.key: p.of(client.received).cpu() for p in pieces}
        if all(f"received/{key}" in kept for key in now):
            then = {key: kept[f"received/{key}"] for key in now}
            own = {key: kept[f"sent/{key}"].float() - then[key] for key in now}
            moved = {key: value.float() - then[key] for key, value in now.items()}
            square = inner(moved, moved)
            if square > 0 and (along := inner(own, moved) / square) < 0:
                for piece in pieces:
                    value = piece.of(client.params)
                    value.add_(self.give_back * along * moved[piece.key].to(value.device))
        for piece in pieces:
            kept[f"received/{piece.key}"] = now[piece.key].clone()
            kept[f"sent/{piece.key}"] = piece.of(client.params).detach().cpu().clone()


def differences(
    new: Mapping[str, Tensor], pieces: Sequence[ParamSlice], old: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """new - old by piece, float32 or wider; a piece that `new` lacks did not change."""
    return {
        piece.key: value.to(torch.promote_types(value.dtype, torch.float32)) - piece.of(old)
        for piece in pieces
        if (value := new.get(piece.key)) is not None
    }


def inner(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The inner product over all pieces that both have."""
    return sum(
        float(torch.dot(value.flatten(), other[key].flatten()))
        for key, value in one.items()
        if key in other
    )


def norm(change: Mapping[str, Tensor]) -> float:
    """The L2 norm over all pieces."""
    return math.sqrt(inner(change, change))
