"""Maps averaged in least squares over the tokens that they see: the server's sums of a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sluiceway import fedalign
from sluiceway.moe import LinearMap
from sluiceway.strategies.base import Update


class RegionSums:
    """sum_i Delta_i A_i and sum_i A_i of each map, one update at a time.

    Memory: about two copies of the maps, and a matrix [n, n] of each source in float64, however
    many updates.

    Args:
        old: the tensors that the round began with, by name.
        maps: those to combine.
    """

    def __init__(self, old: Mapping[str, Tensor], maps: Sequence[LinearMap]) -> None:
        self.maps = maps
        self.old = {piece.key: piece.of(old).float() for one in maps for piece in one.pieces}
        self.weighted: dict[str, Tensor] = {}
        self.total: dict[str, Tensor] = {}
        self.clients: dict[str, int] = {}

    def add(self, update: Update) -> None:
        """Count one client, by its share of the examples; maps that it lacks are left out."""
        counted: dict[str, fedalign.Moment] = {}
        for one in self.maps:
            packed = update.extra.get(f"moment/{one.source}")
            if packed is None or one.weight.key not in update.tensors:
                continue
            key = f"{one.source}/{one.inputs}"
            if key not in counted:
                counted[key] = fedalign.received_moment(packed.cpu(), one.inputs)
                matrix = counted[key].matrix().double()
                self.total[key] = self.total.get(key, 0) + update.examples * matrix
            new = {p.key: update.tensors[p.key].to(self.old[p.key]) for p in one.pieces}
            change = one.of(new) - one.of(self.old)
            moved = update.examples * counted[key].after(change)
            name = one.weight.key
            self.weighted[name] = self.weighted.get(name, 0) + moved
            self.clients[name] = self.clients.get(name, 0) + 1

    def fold(self, new: Mapping[str, Tensor]) -> None:
        """Turn the clients' mean of each map, in place, into the least-squares combination.

        One client alone is left as it is: the mean holds it exactly.
        """
        for one in self.maps:
            if self.clients.get(one.weight.key, 0) < 2:
                continue
            mean = {p.key: p.of(new).float() for p in one.pieces}
            step = fedalign.region_step(
                self.weighted[one.weight.key],
                self.total[f"{one.source}/{one.inputs}"],
                one.of(mean) - one.of(self.old),
            )
            combined = one.of(self.old).double() + step
            weight = one.weight.of(new)
            matrix = combined[:, : one.width]
            weight.copy_(matrix.T if one.transposed else matrix)
            if one.bias is not None:
                one.bias.of(new).copy_(combined[:, -1])
