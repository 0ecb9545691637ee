"""The mixture-of-experts families that Sluiceway knows: one row each, the one place to edit.

A row says how a block is recognised (the class name of its router and the names of two children)
and how the router's output is read. Everything else (which tensors are gates, which belong to
which expert, the number of experts) follows from the shapes, see ``layout.py``.
Model classes are compared by name, so that no model code is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sluiceway.moe.adapters import unwrapped
from sluiceway.moe.nllb import repair_nllb


@dataclass(frozen=True)
class Family:
    """How one family of MoE blocks is recognised, and where its router's output has what.

    Attributes:
        name: the family's name, as reported by ``Block.family``.
        router_class: class name of the router module (a subclass matches too).
        router: attribute name of the router in the block.
        experts: attribute name of the experts container in the block; "" where the block itself
            holds the experts' parameters, next to the router.
        logits: position of the raw logits, [T, E] or [B, S, E], in the router's output; negative
            ones count from its end.
        selected: position of the chosen experts in the router's output; None where it has none:
            they are then the k greatest logits.
        one_hot: the chosen experts come as a mask or as weights [..., E], nonzero where the token
            enters the expert (a row is all zero when the token was dropped for lack of capacity),
            and not as indices [T, k].
        num_experts: attribute of the router that holds E, or E itself.
        top_k: attribute of the router that holds k, or k itself where the family fixes it.
        repair: repairs a block, given with the config nearest above it (or None), where the
            installed release computes something else than the family's definition. None: no such
            release is known.
    """

    name: str
    router_class: str
    router: str = "gate"
    experts: str = "experts"
    logits: int = 0
    selected: int | None = 2
    one_hot: bool = False
    num_experts: str | int = "num_experts"
    top_k: str | int = "top_k"
    repair: Callable[[nn.Module, Any], None] | None = None

    def matches(self, block: nn.Module) -> bool:
        """Whether ``block`` is a mixture-of-experts block of this family."""
        router = block._modules.get(self.router)
        if router is None or (self.experts and block._modules.get(self.experts) is None):
            return False
        kinds = type(unwrapped(router)).__mro__
        return any(kind.__name__ == self.router_class for kind in kinds)

    def sizes(self, router: nn.Module) -> tuple[int, int]:
        """(E, k) of a block with this router."""
        experts, top_k = (
            int(value if isinstance(value, int) else getattr(router, value))
            for value in (self.num_experts, self.top_k)
        )
        return experts, top_k

    def read_logits(self, output: Any) -> Tensor:
        """The raw logits [T, E] in a router's ``output``, graph kept."""
        logits: Tensor = output[self.logits]
        return logits.reshape(-1, logits.shape[-1])

    def read(self, output: Any, top_k: int) -> RouterOutput:
        """Read logits and chosen experts from a router's ``output``.

        Args:
            output: what the router's forward returned.
            top_k: k of the block.

        Returns:
            A ``RouterOutput`` with T = all tokens of the batch, padding included.
        """
        logits = self.read_logits(output)
        if self.selected is None:
            return RouterOutput(logits, greatest(logits, top_k), None)
        chosen: Tensor = output[self.selected]
        chosen = chosen.reshape(-1, chosen.shape[-1])
        if not self.one_hot:
            return RouterOutput(logits, chosen, None)
        # A dropped token's row is all zero, so the choice itself has to come from the logits.
        return RouterOutput(logits, greatest(logits, top_k), chosen.detach() != 0)


@dataclass(frozen=True)
class RouterOutput:
    """A router's output in one form for all families.

    Attributes:
        logits: [T, E], raw, with the graph they came with.
        selected: [T, k] int64, the chosen experts, in the router's order (most families put the
            first choice first, DeepSeek does not). Where the family drops tokens (Switch, NLLB),
            this is the choice before dropping.
        dispatched: [T, E] bool, the tokens that really enter each expert, where that differs
            from ``selected``: tokens are dropped, or an expert is named twice; else None.
    """

    logits: Tensor
    selected: Tensor
    dispatched: Tensor | None


def combine_weights(output: Any, read: RouterOutput) -> Tensor:
    """What each expert's output is multiplied by, [T, E] float32; 0 for a token it does not get.

    Taken from the router's output where that has them, [T, k] by choice or [T, 1] or [T, E]; else
    the softmax over the logits of the chosen experts.

    Args:
        output: what the router's forward returned.
        read: the same, read by its family.
    """
    logits, selected = read.logits.detach().float(), read.selected
    entered = torch.zeros_like(logits)
    if read.dispatched is None:
        entered.scatter_(1, selected, 1.0)
    else:
        entered += read.dispatched
    given = output[1] if isinstance(output, tuple) and len(output) == 3 else None
    if isinstance(given, Tensor) and given.is_floating_point() and given.ndim > 1:
        given = given.detach().float().reshape(-1, given.shape[-1])
        by_choice = read.dispatched is None or selected.shape[1] < logits.shape[1]
        if given.shape == selected.shape and by_choice:  # an expert may be named twice
            return torch.zeros_like(logits).scatter_add(1, selected, given) * entered
        if len(given) == len(logits) and given.shape[1] in (1, logits.shape[1]):
            return given * entered
    return logits.masked_fill(entered == 0, -torch.inf).softmax(-1).nan_to_num(0.0)


def greatest(logits: Tensor, top_k: int) -> Tensor:
    """[T, k] int64, the experts of the k greatest among the logits [T, E], greatest first."""
    if top_k == 1:  # In a tie arg max and topk may differ, and routers of one choice use arg max.
        return torch.argmax(logits.detach(), dim=-1, keepdim=True)
    return torch.topk(logits.detach(), top_k, dim=-1).indices


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("mixtral", "MixtralTopKRouter"),
        Family("olmoe", "OlmoeTopKRouter"),
        Family("qwen2_moe", "Qwen2MoeTopKRouter"),
        Family("qwen3_moe", "Qwen3MoeTopKRouter"),
        Family("deepseek_v2", "DeepseekV2TopkRouter"),
        Family("deepseek_v3", "DeepseekV3TopkRouter"),
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
        Family(
            "nllb_moe",
            "NllbMoeTop2Router",
            router="router",
            logits=2,
            selected=1,
            one_hot=True,
            top_k=2,
            repair=repair_nllb,
        ),
        # Its feed-forward and its attention blocks: both keep the experts next to the router.
        Family("jetmoe", "JetMoeTopKGating", router="router", experts="", logits=-1, selected=None),
        Family("sluiceway", "UpcycledRouter", router="router"),
    )
}


def family_of(block: nn.Module) -> Family | None:
    """The row that recognises ``block``, or None."""
    return next((family for family in FAMILIES.values() if family.matches(block)), None)
