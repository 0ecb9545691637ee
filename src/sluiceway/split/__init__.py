"""Split learning: a network cut in two, and what crosses the cut as bytes.

Read in the order of a step: `cut` a network from `networks` (or your own), compress what its front
gives (`Compressor` and its kinds) into a message, open it on the server, and send the gradient back
(`packing`, whose format `header` tells). Marks, as in docs/methods.md: [paper], [ours].
"""

from sluiceway.split.bottleneck import Bottleneck
from sluiceway.split.compress import Channels, Compressor, Quantized
from sluiceway.split.cut import CutPoint, cut, cut_points
from sluiceway.split.elements import RandTopK, TopK
from sluiceway.split.errors import WireError
from sluiceway.split.header import LIMIT, BatchId, Expected, message_bytes
from sluiceway.split.networks import Conv4, resnet18, vgg11
from sluiceway.split.packing import (
    Smashed,
    Ticket,
    pack_gradient,
    pack_smashed,
    unpack_gradient,
    unpack_smashed,
)
from sluiceway.split.places import KeptChannels, KeptElements

__all__ = [
    "LIMIT",
    "BatchId",
    "Bottleneck",
    "Channels",
    "Compressor",
    "Conv4",
    "CutPoint",
    "Expected",
    "KeptChannels",
    "KeptElements",
    "Quantized",
    "RandTopK",
    "Smashed",
    "Ticket",
    "TopK",
    "WireError",
    "cut",
    "cut_points",
    "message_bytes",
    "pack_gradient",
    "pack_smashed",
    "resnet18",
    "unpack_gradient",
    "unpack_smashed",
    "vgg11",
]
