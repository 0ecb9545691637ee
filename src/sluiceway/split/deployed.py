"""The network that split training measures, as one module: front, what crosses, back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor, nn

from sluiceway.channels import Basis
from sluiceway.core.seeds import LARGEST_SEED
from sluiceway.split.compress import Compressor
from sluiceway.split.config import SplitConfig, SplitModel
from sluiceway.split.defence import noisy
from sluiceway.split.mask_selector import ALL
from sluiceway.split.memory import crossed, to_cross
from sluiceway.split.packing import BatchId, Encoded

#: What a basis is made of.
PARTS = tuple(field.name for field in fields(Basis))


class Link(nn.Module):
    """What crosses a cut at evaluation, as a layer: noise, selection, rounding, packing, and back.

    Rounding to integers takes its scales from the batch, so that an example's values depend,
    within a step of rounding, on those beside it. No gradient passes.

    Args:
        compressor: of the cut.
        mask: keep mask, [C] bool; None if the method chooses no channels.
        basis: of the components that cross; None if channels do.
    """

    mask: Tensor | None
    rotation: Tensor | None
    mean: Tensor | None
    scale: Tensor | None
    weight: Tensor | None

    def __init__(
        self, compressor: Compressor, mask: Tensor | None = None, basis: Basis | None = None
    ) -> None:
        super().__init__()
        self.compressor = compressor
        self.register_buffer("mask", mask)
        for name in PARTS:
            self.register_buffer(name, None if basis is None else getattr(basis, name))

    @property
    def basis(self) -> Basis | None:
        parts = {name: getattr(self, name) for name in PARTS}
        return None if parts["rotation"] is None else Basis(**parts)

    @torch.no_grad()
    def message(self, values: Tensor, before: Tensor | None = None) -> Encoded:
        """What crosses of [B, C, ...], or of what changed since it was read as `before`."""
        if self.compressor.noise:
            # Drawn by what crosses: the same inputs give the same outputs.
            seed = int(values.double().sum().view(torch.int64)) & LARGEST_SEED
            values = noisy(values, self.compressor.noise, seed)
        sent = to_cross(values, self.basis, before)
        return self.compressor.up(sent, BatchId(0, 0, 0), mask=self.mask, training=False)[0]

    @torch.no_grad()
    def forward(self, values: Tensor, before: Tensor | None = None) -> Tensor:
        """[B, C, ...] -> the same shape, float32, zero where nothing crossed."""
        opened = self.compressor.open(self.message(values, before), device=values.device).values
        return crossed(opened, self.basis, before)


class DeployedNetwork(nn.Module):
    """The whole network as it is deployed and was evaluated; shares the layers it is made of.

    Args:
        model: the cut network.
        link, tail_link: compression at its cuts, in training; as `deployed` says of them in use.
        masks: keep masks, [C] bool or None, by client, or of `ALL` if all have the same.
        basis: of the components that cross; None if channels do.

    Attributes:
        client: whose mask is used; of several masks the first client's until another is set.
    """

    def __init__(
        self,
        model: SplitModel,
        link: Compressor,
        tail_link: Compressor,
        masks: Mapping[int, Tensor | None],
        basis: Basis | None = None,
    ) -> None:
        super().__init__()
        self.front, self.back = model.front, model.back
        self.links = nn.ModuleDict(
            {str(key): Link(link.deployed, m, basis) for key, m in masks.items()}
        )
        self.tail = None if model.tail is None else nn.Sequential(Link(tail_link), model.tail)
        self.client: int = next(iter(masks))
        self.eval()

    @staticmethod
    def of(
        model: SplitModel, config: SplitConfig, mask: Tensor | None, basis: Basis | None
    ) -> DeployedNetwork:
        """The network with one mask, or a basis."""
        return DeployedNetwork(model, config.link, config.tail_link, {ALL: mask}, basis)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [B, classes]."""
        return self.onward(self.front(inputs))

    def onward(self, values: Tensor) -> Tensor:
        """Logits from what the front gives, [B, C, ...]."""
        out: Tensor = self.back(self.links[str(self.client)](values))
        return out if self.tail is None else self.tail(out)

    def nbytes(self, values: Tensor) -> int:
        """Bytes of the messages by which a batch is predicted, to the back and in a U-shape on.

        Args:
            values: what the front gives, [B, C, ...].
        """
        link = self.links[str(self.client)]
        assert isinstance(link, Link)
        total = len(link.message(values))
        if self.tail is None:
            return total
        tail_link = self.tail[0]
        assert isinstance(tail_link, Link)
        return total + len(tail_link.message(self.back(link(values.clone()))))
