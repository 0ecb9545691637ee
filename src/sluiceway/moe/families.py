"""The mixture-of-experts families that Sluiceway knows: one row each, the one place to edit.

A row says how a block is recognised (the class name of its router and the names of two children)
and how the router's output is read. Everything else (which tensors are gates, which belong to
which expert, the number of experts) follows from the shapes, see ``anatomy.py``.
Model classes are compared by name, so that no model code is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sluiceway.moe.adapters import unwrapped


@dataclass(frozen=True)
class Family:
    """How one family of MoE blocks is recognised, and where its router's output has what.

    Attributes:
        name: the family's name, as reported by ``Block.family``.
        router_class: class name of the router module (a subclass matches too).
        router: attribute name of the router in the block.
        experts: attribute name of the experts container in the block.
        logits: position of the raw logits, [T, E] or [B, S, E], in the router's output.
        selected: position of the chosen experts in the router's output.
        one_hot: the chosen experts come as a mask [..., E] (a row is all zero when the token was
            dropped for lack of capacity) and not as indices [T, k].
        num_experts: attribute of the router that holds E.
        top_k: attribute of the router that holds k, or k itself where the family fixes it.
    """

    name: str
    router_class: str
    router: str = "gate"
    experts: str = "experts"
    logits: int = 0
    selected: int = 2
    one_hot: bool = False
    num_experts: str = "num_experts"
    top_k: str | int = "top_k"

    def matches(self, block: nn.Module) -> bool:
        """Whether ``block`` is a mixture-of-experts block of this family."""
        router = block._modules.get(self.router)
        if router is None or block._modules.get(self.experts) is None:
            return False
        kinds = type(unwrapped(router)).__mro__
        return any(kind.__name__ == self.router_class for kind in kinds)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("mixtral", "MixtralTopKRouter"),
        Family("olmoe", "OlmoeTopKRouter"),
        Family("qwen2_moe", "Qwen2MoeTopKRouter"),
        Family("qwen3_moe", "Qwen3MoeTopKRouter"),
        Family("deepseek_v2", "DeepseekV2TopkRouter"),
        Family("granite_moe", "GraniteMoeTopKRouter", router="router"),
        Family("phimoe", "PhimoeTopKRouter", router="router"),
        Family("gpt_oss", "GptOssTopKRouter", router="router"),
        Family(
            "switch",
            "SwitchTransformersTop1Router",
            router="router",
            logits=2,
            selected=0,
            one_hot=True,
            top_k=1,
        ),
        Family("sluiceway", "UpcycledRouter", router="router"),
    )
}


@dataclass(frozen=True)
class RouterOutput:
    """What one run of a router said.

    Attributes:
        logits: [T, E], raw, with the graph they came with.
        selected: [T, k] int64, the chosen experts, in the router's order (most families put the
            first choice first, DeepSeek does not). Where the family drops tokens (Switch), this
            is the choice before dropping.
        dispatched: [T, E] mask of the tokens that really enter each expert, where that differs
            from ``selected``; None where nothing is dropped.
    """

    logits: Tensor
    selected: Tensor
    dispatched: Tensor | None


def family_of(block: nn.Module) -> Family | None:
    """The row that recognises ``block``, or None."""
    return next((family for family in FAMILIES.values() if family.matches(block)), None)


def read_logits(family: Family, output: Sequence[Any]) -> Tensor:
    """The raw logits [T, E] in a router's ``output``, graph kept."""
    logits: Tensor = output[family.logits]
    return logits.reshape(-1, logits.shape[-1])


def read_output(family: Family, output: Sequence[Any]) -> RouterOutput:
    """Read logits and chosen experts from a router's ``output`` by the family's row.

    Returns:
        A ``RouterOutput`` with T = all tokens of the batch, padding included.
    """
    logits = read_logits(family, output)
    chosen: Tensor = output[family.selected]
    if not family.one_hot:
        return RouterOutput(logits, chosen.reshape(-1, chosen.shape[-1]), None)
    # A dropped token's row is all zero, so the choice itself has to come from the logits.
    selected = torch.argmax(logits.detach(), dim=-1, keepdim=True)
    return RouterOutput(logits, selected, chosen.reshape(-1, chosen.shape[-1]))
