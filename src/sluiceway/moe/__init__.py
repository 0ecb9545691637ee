"""Mixture-of-experts models: where routers and experts live, what routing does, dense to MoE."""

from sluiceway.moe.adapters import Adapter, add_lora, find_adapters
from sluiceway.moe.families import FAMILIES, Family
from sluiceway.moe.layout import Anatomy, Block, NoExpertsError, anatomy, find_anatomy
from sluiceway.moe.observe import BlockRouting, BlockStep, Observer
from sluiceway.moe.param_slice import Piece
from sluiceway.moe.received import received_logits
from sluiceway.moe.repair import repair
from sluiceway.moe.summary import BlockRow, Layout, TensorRow, layout
from sluiceway.moe.upcycle import upcycle
from sluiceway.moe.upcycled import UpcycledExperts, UpcycledMoE, UpcycledRouter

__all__ = [
    "FAMILIES",
    "Adapter",
    "Anatomy",
    "Block",
    "BlockRouting",
    "BlockRow",
    "BlockStep",
    "Family",
    "Layout",
    "NoExpertsError",
    "Observer",
    "Piece",
    "TensorRow",
    "UpcycledExperts",
    "UpcycledMoE",
    "UpcycledRouter",
    "add_lora",
    "anatomy",
    "find_adapters",
    "find_anatomy",
    "layout",
    "received_logits",
    "repair",
    "upcycle",
]
