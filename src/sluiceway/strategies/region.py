"""Maps averaged in least squares over the tokens that they see: the server's sums of a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sluiceway import fedalign
from sluiceway.moe import BlockRouting, LinearMap
from sluiceway.strategies.base import Update


class RegionSums:
    """sum_i Delta_i A_i and sum_i A_i of each map, one update at a time.

    A_i is what the client sent, `moment/<source>` in its extra tensors, or estimated from Delta_i.
    A map of which one client sends a change and no moment is left as the clients' mean.

    Memory: two copies of the maps, and a matrix [n, n] of each source in float32, however many
    updates.

    Args:
        old: the tensors that the round began with, by name.
        maps: those to combine.
        estimated: where given, A_i is estimated from the change itself, at this rank; no
            moments are sent then.
    """

    def __init__(
        self, old: Mapping[str, Tensor], maps: Sequence[LinearMap], estimated: int | None
    ) -> None:
        self.maps = maps
        self.estimated = estimated
        self.old = {piece.key: piece.of(old).float() for one in maps for piece in one.pieces}
        self.weighted: dict[str, Tensor] = {}
        self.total: dict[str, Tensor] = {}
        self.clients: dict[str, int] = {}
        self.silent: set[str] = set()

    def add(self, update: Update) -> None:
        """Count one client, by its share of the examples; maps that it lacks are left out."""
        moments: dict[str, fedalign.Moment] = {}
        for one in self.maps:
            packed = update.extra.get(f"moment/{one.source}")
            sent = packed is not None or self.estimated is not None
            if one.weight.key not in update.tensors:
                continue
            if not sent:
                self.silent.add(one.weight.key)
                continue
            change = one.change(update.tensors, self.old)
            matrix = self.matrix_of(one)
            if matrix not in moments:
                if packed is not None:
                    moments[matrix] = fedalign.received_moment(packed.cpu(), one.inputs)
                else:
                    whole = one.expert is None  # of the head or a gate, which meet all tokens
                    share = 1.0 if whole else usage(update.routing[one.block], one.expert)
                    moments[matrix] = fedalign.update_moment(change, share, self.estimated or 0)
                moments[matrix].add_to(
                    self.sum_of(self.total, matrix, one.inputs, one.inputs), update.examples
                )
            sums = self.sum_of(self.weighted, one.weight.key, len(change), one.inputs)
            moments[matrix].add_after(change, sums, update.examples)
            self.clients[one.weight.key] = self.clients.get(one.weight.key, 0) + 1

    def matrix_of(self, one: LinearMap) -> str:
        """Names the sum of moments that a map is solved with."""
        return one.weight.key if self.estimated is not None else f"{one.source}/{one.inputs}"

    def sum_of(self, sums: dict[str, Tensor], key: str, rows: int, columns: int) -> Tensor:
        """A sum that may not have begun, [rows, columns] float32."""
        if key not in sums:
            sums[key] = torch.zeros(rows, columns)
        return sums[key]

    def fold(self, new: Mapping[str, Tensor]) -> None:
        """Turn the clients' mean of each map, in place, into the least-squares combination.

        One client alone is left as it is: the mean holds it exactly.
        """
        for one in self.maps:
            if self.clients.get(one.weight.key, 0) < 2 or one.weight.key in self.silent:
                continue
            mean = {p.key: p.of(new).float() for p in one.pieces}
            old = one.of(self.old)
            step = fedalign.region_step(
                self.weighted[one.weight.key], self.total[self.matrix_of(one)], one.of(mean) - old
            )
            combined = old.double() + step
            matrix = combined[:, : one.width]
            one.weight.of(new).copy_(matrix.T if one.transposed else matrix)
            if one.bias is not None:
                one.bias.of(new).copy_(combined[:, -1])


def usage(report: BlockRouting, expert: int | None) -> float:
    """Tokens that an expert got, as a share of all the client's; 1 for the gate."""
    return 1.0 if expert is None else float(report.load[expert]) / max(report.tokens, 1)
