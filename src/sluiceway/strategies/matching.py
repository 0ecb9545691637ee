"""A client's experts put into another order, with the gate's rows and the routing report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from sluiceway.moe import Block, BlockRouting
from sluiceway.strategies.base import Update


class Reordered(Mapping[str, Tensor]):
    """An update's tensors with the experts of one block in another order; read when asked for.

    Args:
        sent: by `ParamSlice.key`.
        block: whose experts.
        order: [E], the client's expert that takes the place of index e.
    """

    def __init__(self, sent: Mapping[str, Tensor], block: Block, order: Tensor) -> None:
        self.sent = sent
        self.order = order
        self.rows = set(block.gate)
        places = [
            (new.key, old.key)
            for e, from_e in enumerate(order.tolist())
            for new, old in zip(block.expert(e), block.expert(from_e), strict=True)
        ]
        held, moved = set(sent), dict(places)
        self.names = {key: key for key in held if key not in moved}
        self.names |= {new: old for new, old in places if old in held}

    def __getitem__(self, name: str) -> Tensor:
        value = self.sent[self.names[name]]
        return value[self.order.to(value.device)] if name in self.rows else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def reordered(update: Update, block: Block, order: Tensor) -> Update:
    """The update of a client whose expert `order[e]` has the role of index e."""
    routing = list(update.routing)
    routing[block.position] = reordered_report(routing[block.position], order)
    return replace(update, tensors=Reordered(update.tensors, block, order), routing=routing)


def reordered_report(report: BlockRouting, order: Tensor) -> BlockRouting:
    """A routing report by the new indices."""
    return BlockRouting(
        load=report.load[order],
        routing=report.routing[order],
        margin=report.margin[order],
        region=None if report.region is None else report.region[order],
        tokens=report.tokens,
    )
