"""An expert's inner activation, what its projection down reads, computed for given tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sluiceway.moe.adapters import unwrapped
from sluiceway.moe.layout import Block
from sluiceway.moe.linear_maps import LinearMap
from sluiceway.moe.upcycled import UpcycledExperts


@torch.no_grad()
def inner_activation(
    model: nn.Module, block: Block, down: LinearMap, rows: Tensor
) -> Tensor | None:
    """h(x) of one expert under the model's present weights, without dropout.

    Args:
        model: that the block is of.
        down: the map of the expert that reads h.
        rows: [T, d], hidden states that enter the expert.

    Returns:
        [T, f]; None where the block's experts are of a kind whose h is not known: fused parameters
        other than `UpcycledExperts` and the experts of transformers, or LoRA on fused parameters.
    """
    assert down.expert is not None
    experts: Any = unwrapped(model.get_submodule(block.experts))
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return _read_by(model, block, down, rows)
    if down.pair is not None:
        return None
    e = down.expert
    if isinstance(experts, UpcycledExperts):
        up_bias = None if experts.up_bias is None else experts.up_bias[e]
        up = F.linear(rows.to(experts.up_proj), experts.up_proj[e], up_bias)
        if experts.gate_proj is None:
            return experts.activation(up)
        return experts.activation(F.linear(rows.to(up), experts.gate_proj[e])) * up
    if getattr(experts, "has_gate", False) and hasattr(experts, "_apply_gate"):
        weight = experts.gate_up_proj[e]
        weight = weight.T if experts.is_transposed else weight
        bias = experts.gate_up_proj_bias[e] if experts.has_bias else None
        inner: Tensor = experts._apply_gate(F.linear(rows.to(weight), weight, bias))
        return inner
    return None


def _read_by(model: nn.Module, block: Block, down: LinearMap, rows: Tensor) -> Tensor | None:
    """What the module that holds `down` is given when its expert runs on the rows."""
    held = (down.weight if down.pair is None else down.pair.base).param
    name = held.rpartition(".")[0].replace(".base_layer", "")
    child = name.removeprefix(f"{block.experts}.").partition(".")[0]
    expert = model.get_submodule(f"{block.experts}.{child}")
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].detach())

    handle = model.get_submodule(name).register_forward_pre_hook(keep)
    modes = [(module, module.training) for module in expert.modules()]
    expert.eval()
    try:
        expert(rows.to(next(expert.parameters()).dtype))
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    return found[0] if found else None
