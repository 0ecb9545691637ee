"""The learned bottleneck around a cut: fewer channels cross, mixed and unmixed by 1x1 layers."""

from collections import OrderedDict
from typing import ClassVar, Final

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from sluiceway.channels import share_count
from sluiceway.core.seeds import LARGEST_SEED
from sluiceway.split.compress import Compressor
from sluiceway.strategies.parameters import PARAMETERS

_LAYERS: Final = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}


@dataclass(config=PARAMETERS, kw_only=True)
class Bottleneck(Compressor):
    """A learned 1x1 convolution narrows the channels on the client, another widens them  [ours].

    `narrow` becomes the front's last layer, `widen` the back's first, and they train with them. The
    second begins as the transpose of the first, an orthogonal projection.

    Args:
        share: of the channels that cross, in (0, 1]; at least one does.
        seed: decides the projection.
    """

    name: ClassVar[str] = "bottleneck"
    share: float = Field(default=0.25, gt=0, le=1)
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)

    @property
    def narrowed(self) -> float:
        return self.share

    def attach(
        self, front: nn.Sequential, back: nn.Sequential, channels: int, dims: int
    ) -> tuple[nn.Sequential, nn.Sequential]:
        narrow, widen = projection(channels, share_count(self.share, channels), dims, self.seed)
        return (
            nn.Sequential(OrderedDict([*front._modules.items(), ("narrow", narrow)])),
            nn.Sequential(OrderedDict([("widen", widen), *back._modules.items()])),
        )


def projection(channels: int, kept: int, dims: int, seed: int) -> tuple[nn.Module, nn.Module]:
    """Two layers that narrow C channels to `kept` and widen them again  [ours].

    The first has orthonormal rows, the second is its transpose and both have zero biases, so that
    training begins at an orthogonal projection, and at the identity if all are kept.

    Args:
        channels: C, at least 1.
        kept: in [1, C].
        dims: of the smashed data, the batch included: 2 for [B, C] (linear layers), 3 for
            [B, C, L], 4 for [B, C, H, W] (1x1 convolutions).
        seed: decides the rows; torch's global generator is left alone.
    """
    if dims not in _LAYERS:
        raise ValueError(f"dims: expected 2, 3 or 4, got {dims}")
    if not 1 <= kept <= channels:
        raise ValueError(f"kept: expected 1 to {channels}, got {kept}")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(kept, channels)
    nn.init.orthogonal_(rows, generator=generator)
    return one_by_one(rows, dims), one_by_one(rows.T, dims)


def one_by_one(weight: Tensor, dims: int) -> nn.Module:
    """The 1x1 layer with this weight, [out, in], and no bias yet, for [B, C, ...] of `dims`."""
    out, wide = weight.shape
    values = weight.reshape(out, wide, *[1] * (dims - 2)).clone()
    # On the meta device nothing is drawn from the global generator.
    with torch.device("meta"):
        layer = nn.Linear(wide, out) if dims == 2 else _LAYERS[dims](wide, out, 1)
    layer.load_state_dict({"weight": values, "bias": torch.zeros(out)}, assign=True)
    return layer
