"""Compressors that send single elements: the largest, or mostly the largest (RandTopk)."""

from math import prod
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway.channels import share_count
from sluiceway.core.seeds import LARGEST_SEED
from sluiceway.split.compress import Compressor
from sluiceway.split.packing import BatchId
from sluiceway.split.selection import KeptElements, Selection
from sluiceway.strategies.parameters import PARAMETERS


@dataclass(config=PARAMETERS, kw_only=True)
class TopK(Compressor):
    """The largest magnitudes of each example cross, with their indices.

    Args:
        share: of the elements of an example, in (0, 1]; at least one is kept.
        deployed_share: of the trained model's use; None is as in training.
    """

    name: ClassVar[str] = "topk"
    elements: ClassVar[bool] = True
    share: float = Field(default=0.1, gt=0, le=1)
    deployed_share: float | None = Field(default=None, gt=0, le=1)

    def kept(self, shape: tuple[int, ...]) -> int:
        return share_count(self.share, prod(shape[1:]))

    def select(self, A: Tensor, batch: BatchId, mask: Tensor | None, training: bool) -> Selection:
        if mask is not None:
            raise ValueError(f"mask: {self.name} chooses no channels")
        return KeptElements(top_elements(A, self.kept(tuple(A.shape))))


@dataclass(config=PARAMETERS, kw_only=True)
class RandTopK(TopK):
    """Top-k that picks outside the top now and then, in training (arXiv 2305.18469).

    Args:
        alpha: chance of each pick to fall outside the top k, in [0, 1]; 0 is `TopK`.
        seed: with the batch it decides what is picked: no order of clients changes it.
    """

    name: ClassVar[str] = "randtopk"
    alpha: float = Field(default=0.1, ge=0, le=1)
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)

    def select(self, A: Tensor, batch: BatchId, mask: Tensor | None, training: bool) -> Selection:
        if not training or mask is not None:
            return super().select(A, batch, mask, training)
        picked = with_outsiders(A, self.kept(tuple(A.shape)), self.alpha, (self.seed, *batch))
        return KeptElements(picked)


@torch.no_grad()
def top_elements(A: Tensor, count: int) -> Tensor:
    """The elements of largest magnitude of each example.

    Args:
        A: smashed data, [B, C, ...].
        count: k, in [1, C x ...].

    Returns:
        Indices into the flattened example, [B, k] int64, each row increasing, on the CPU.
    """
    top = A.detach().flatten(1).abs().topk(count, sorted=False).indices
    return top.sort(dim=1).values.cpu()


@torch.no_grad()
def with_outsiders(A: Tensor, count: int, alpha: float, seed: tuple[int, ...]) -> Tensor:
    """RandTopk (arXiv 2305.18469): each of k picks is outside the top k with chance alpha [paper].

    Picks are without replacement, and equally likely on the same side of the border. The number of
    outsiders of an example is drawn first, Binomial(k, alpha), at most what there is outside [ours;
    equal to drawing one after another while neither side runs out].

    Args:
        A: smashed data, [B, C, ...].
        count: k, in [1, D] with D = C x ....
        alpha: in [0, 1].
        seed: non-negative integers that decide everything, whatever the device.

    Returns:
        Indices into the flattened example, [B, k] int64, each row increasing, on the CPU.
    """
    top = top_elements(A, count)
    rows, size = len(top), A[0].numel()
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    )
    chance = torch.full((rows, count), alpha)
    outside = torch.bernoulli(chance, generator=generator).sum(1).clamp(max=size - count)
    most = int(outside.max())
    # The highest keys are a uniform choice; those of the top are below all others.
    keys = torch.rand(rows, size, generator=generator).scatter_(1, top, -1.0)
    outsiders = keys.topk(most, dim=1).indices
    order = torch.rand(rows, count, generator=generator).argsort(dim=1)
    insiders = top.gather(1, order)
    stay = torch.arange(count) < (count - outside).unsqueeze(1)
    come = torch.arange(most) < outside.unsqueeze(1)
    picked = torch.cat([insiders, outsiders], 1)[torch.cat([stay, come], 1)]
    return picked.view(rows, count).sort(dim=1).values
