"""FedAvg: the example-weighted mean of the clients' models (McMahan et al., arXiv 1602.05629)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway.errors import InputError
from sluiceway.moe import Adapter, MoELayout, ParamSlice, head_map
from sluiceway.strategies.base import RunningMean, Strategy, Update
from sluiceway.strategies.low_rank import RunningProducts
from sluiceway.strategies.parameters import PARAMETERS
from sluiceway.strategies.region import RegionSums


@dataclass(config=PARAMETERS, kw_only=True)
class FedAvg(Strategy):
    """new = sum_i n_i w_i / sum_i n_i, over every trained tensor; n_i examples of client i.

    An expert that a client left out counts with its old value: that client did not change it.

    lora: how LoRA adapters are combined, W + B A being what the model computes with. "frozen-a":
        A keeps its first values, so that the mean of the B is the mean of the products (FFA-LoRA,
        arXiv 2403.12313). "residual": A and B are averaged, and what the product of the means
        lacks is added to W, which then crosses downward too (FedEx-LoRA, arXiv 2410.09432).
        "average": A and B are averaged, inexactly (FedIT, arXiv 2305.05644). Without LoRA it does
        nothing. All strategies take it.
    head: what a client counts by for a row of the linear head, and for its bias. "examples": as for
        all else. "counts": row k by n_ik, the client's examples of class k [ours]; a row of a
        class that no client of the round holds stays. "region": in least squares over the features
        that enter the head, their second moment estimated from the head's own update [ours]. All
        strategies take it.
    """

    name: ClassVar[str] = "fedavg"
    lora: Literal["frozen-a", "residual", "average"] = "frozen-a"
    head: Literal["examples", "counts", "region"] = "examples"

    def setup(self, tensors: Mapping[str, Tensor], layout: MoELayout, clients: int) -> None:
        super().setup(tensors, layout, clients)
        if self.head != "examples" and not layout.head:
            raise InputError(
                f"method.head = {self.head!r} needs a model whose last layer is linear, trained, "
                "and gives a logit for each class"
            )
        self.head_maps = (head_map(layout, tensors),) if self.head == "region" else ()

    def begin(self, number: int, updates: Sequence[Update] = ()) -> None:
        shared = {piece.param for piece in self.shared_pieces}
        self.mean = RunningMean({name: t for name, t in self.tensors.items() if name in shared})
        pairs = self.pairs if self.lora == "residual" else ()
        self.products = RunningProducts(self.tensors, pairs)
        self.head_regions = RegionSums(self.tensors, self.head_maps, 0)

    def accumulate(self, update: Update) -> None:
        for piece in self.shared_pieces:
            self.mean.add(piece, update.tensors.get(piece.key), self.share(update, piece))
        for pair in self.products.pairs:
            self.products.add(pair, update, self.weight(update, pair.b))
        self.head_regions.add(update)

    def finish(self) -> None:
        if self.mean.total:
            new = self.mean.result()
            self.head_regions.fold(new)
            self.tensors = {**self.tensors, **self.step(new | self.products.folded(new))}
        del self.mean, self.products, self.head_regions

    def share(self, update: Update, piece: ParamSlice) -> float | Tensor:
        """What a client counts for a piece: `weight`, but for the head as `head` says."""
        if self.head == "counts" and piece.param in self.layout.head:
            return self.class_counts(update.client, len(self.tensors[piece.param]))
        return self.weight(update, piece)

    def wants_label_counts(self) -> bool:
        return self.head == "counts"

    def class_counts(self, client: int, classes: int) -> Tensor:
        """How many examples of each class a client holds, [classes] float64."""
        assert self.label_counts is not None
        held = self.label_counts[client].double()
        return F.pad(held, (0, classes - len(held)))

    def needs_sums_alone(self) -> bool:
        own, kept = type(self), ("accumulate", "share", "weight", "step", "finish_training")
        alike = all(getattr(own, name) is getattr(FedAvg, name) for name in kept)
        return alike and self.head == "examples" and self.lora != "residual"

    def weight(self, update: Update, piece: ParamSlice) -> float | Tensor:
        """How much this client's value of this piece counts, >= 0; need not be normalised."""
        return float(update.examples)

    def step(self, mean: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the mean of the clients to the new global tensors; FedAvg takes it as it is."""
        return mean

    @property
    def pairs(self) -> tuple[Adapter, ...]:
        """The LoRA pairs that are combined here: those whose B crosses."""
        return tuple(
            pair
            for pair in self.layout.adapters
            if pair.b.param in self.tensors and not self.private(pair.b.param)
        )

    def trains(self, param: str, layout: MoELayout) -> bool:
        return self.lora != "frozen-a" or param not in layout.low_rank_a

    def server_owned(self, layout: MoELayout) -> frozenset[str]:
        if self.lora == "frozen-a":
            return layout.low_rank_a
        if self.lora == "residual":
            return frozenset(pair.base.param for pair in layout.adapters)
        return frozenset()
