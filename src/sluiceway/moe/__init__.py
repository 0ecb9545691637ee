"""Mixture-of-experts models: where routers and experts live, what routing does, dense to MoE."""

from sluiceway.moe.adapters import Adapter, add_lora, find_adapters
from sluiceway.moe.families import FAMILIES, Family
from sluiceway.moe.inner import inner_activation
from sluiceway.moe.layout import Block, MoELayout, NoExpertsError, find_layout, moe_layout
from sluiceway.moe.linear_maps import LinearMap, head_map, linear_maps
from sluiceway.moe.observe import BlockRouting, BlockStep, Observer, TokenSample
from sluiceway.moe.param_slice import ParamSlice
from sluiceway.moe.received import received_logits
from sluiceway.moe.repair import repair
from sluiceway.moe.upcycle import upcycle
from sluiceway.moe.upcycled import UpcycledExperts, UpcycledMoE, UpcycledRouter, skip_padding

__all__ = [
    "FAMILIES",
    "Adapter",
    "Block",
    "BlockRouting",
    "BlockStep",
    "Family",
    "LinearMap",
    "MoELayout",
    "NoExpertsError",
    "Observer",
    "ParamSlice",
    "TokenSample",
    "UpcycledExperts",
    "UpcycledMoE",
    "UpcycledRouter",
    "add_lora",
    "find_adapters",
    "find_layout",
    "head_map",
    "inner_activation",
    "linear_maps",
    "moe_layout",
    "received_logits",
    "repair",
    "skip_padding",
    "upcycle",
]
