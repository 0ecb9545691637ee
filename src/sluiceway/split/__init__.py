"""Split learning: a network cut in two, and what crosses the cut as bytes.

Read in the order of a step: `cut` a network from `networks` (or your own), compress what its front
gives (`Compressor` and its kinds) into a message, open it on the server, and send the gradient back
(`packing`). `split_train` does so over rounds: `methods` has every way to compress by its name,
`client` and `server` the two parts of a step, `schedules` their order, `rounds` what happens around
them. Marks, as in docs/methods.md: [paper], [ours].
"""

from sluiceway.core.messages import WireError
from sluiceway.split.bottleneck import Bottleneck
from sluiceway.split.compress import Channels, Compressor, Quantized
from sluiceway.split.cut import CutPoint, cut, cut_points
from sluiceway.split.elements import RandTopK, TopK
from sluiceway.split.methods import (
    ACPSL,
    METHODS,
    SLFAC,
    ChannelChoice,
    Delta,
    EntropyChannels,
    ICSChannels,
    L1Channels,
    RandomChannels,
    RedrawnChannels,
    StdChannels,
    TaylorChannels,
)
from sluiceway.split.networks import Conv4, resnet18, vgg11
from sluiceway.split.packing import (
    LIMIT,
    BatchContext,
    BatchId,
    Expected,
    Smashed,
    message_bytes,
    pack_gradient,
    pack_smashed,
    unpack_gradient,
    unpack_smashed,
)
from sluiceway.split.schedules import SCHEDULES
from sluiceway.split.selection import KeptChannels, KeptElements
from sluiceway.split.traced import chained
from sluiceway.split.training import SplitRecord, split_train

__all__ = [
    "ACPSL",
    "LIMIT",
    "METHODS",
    "SCHEDULES",
    "SLFAC",
    "BatchContext",
    "BatchId",
    "Bottleneck",
    "ChannelChoice",
    "Channels",
    "Compressor",
    "Conv4",
    "CutPoint",
    "Delta",
    "EntropyChannels",
    "Expected",
    "ICSChannels",
    "KeptChannels",
    "KeptElements",
    "L1Channels",
    "Quantized",
    "RandTopK",
    "RandomChannels",
    "RedrawnChannels",
    "Smashed",
    "SplitRecord",
    "StdChannels",
    "TaylorChannels",
    "TopK",
    "WireError",
    "chained",
    "cut",
    "cut_points",
    "message_bytes",
    "pack_gradient",
    "pack_smashed",
    "resnet18",
    "split_train",
    "unpack_gradient",
    "unpack_smashed",
    "vgg11",
]
