"""Reading the router of a block that was found by its structure: no table says what is where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sluiceway.moe.families import Family, RouterOutput, greatest

STRUCTURAL = "structural"
"""The family name of blocks that were found by their structure."""

_SUM_TOLERANCE = 0.02  # of probabilities in half precision


@dataclass(frozen=True)
class StructuralFamily(Family):
    """The row of one block that no table knows; ``num_experts`` and ``top_k`` are numbers.

    The router's output may be a tensor of logits [..., E], or a tuple with one. An item whose rows
    are all probability distributions is taken for probabilities, and their log for the logits,
    if there are no others; other scores (sigmoids) are taken as they are. The choice is an integer
    item [..., k], or else the k greatest logits.

    Attributes:
        path: the router's module name in the model, for messages.
        linear: the router is a linear layer: its output is the logits, and needs no look.
    """

    path: str = ""
    linear: bool = False

    def read_logits(self, output: Any) -> Tensor:
        """The logits [T, E] in the router's ``output``, graph kept.

        Raises:
            ValueError: nothing in the output can be the logits.
        """
        experts, top_k = int(self.num_experts), int(self.top_k)
        if self.linear and isinstance(output, Tensor):
            return output.reshape(-1, experts)
        wide = [
            item.reshape(-1, experts)
            for item in _tensors(output)
            if item.is_floating_point() and item.ndim > 1 and item.shape[-1] == experts
        ]
        # Weights of the chosen experts say nothing of the others: those are 0 there.
        full = [item for item in wide if top_k == experts or not _are_sparse(item, top_k)]
        raw = [item for item in full if not _are_probabilities(item)]
        if raw:
            return raw[0]
        if full:  # softmax(log p) = p
            return full[0].clamp(min=torch.finfo(full[0].dtype).tiny).log()
        shapes = [f"{item.dtype} {list(item.shape)}" for item in _tensors(output)]
        raise ValueError(
            f"router {self.path}: its output has no logits or probabilities [..., {experts}]; it "
            f"holds {', '.join(shapes) or 'no tensor'}. Add the family to moe/families.py"
        )

    def read(self, output: Any, top_k: int) -> RouterOutput:
        """Logits and chosen experts; ValueError if the output has no logits."""
        logits = self.read_logits(output)
        for item in _tensors(output):
            if not item.is_floating_point() and item.dtype != torch.bool and _fits(item, top_k):
                chosen = item.reshape(-1, top_k).long()
                if len(chosen) == len(logits) and _in_range(chosen, logits.shape[1]):
                    if _distinct(chosen):
                        return RouterOutput(logits, chosen, None)
                    if top_k < logits.shape[1]:  # as of a table of token ids, new and all zero
                        return RouterOutput(logits, chosen, _entered(chosen, logits))
        return RouterOutput(logits, greatest(logits, top_k), None)


def _tensors(output: Any) -> list[Tensor]:
    items = [output] if isinstance(output, Tensor) else output
    if isinstance(items, dict):
        items = list(items.values())
    if not isinstance(items, list | tuple):
        return []
    return [item for item in items if isinstance(item, Tensor)]


def _fits(item: Tensor, top_k: int) -> bool:
    return item.ndim > 0 and item.shape[-1] == top_k


def _in_range(chosen: Tensor, experts: int) -> bool:
    """Whether these are numbers of experts."""
    return not chosen.numel() or (int(chosen.min()) >= 0 and int(chosen.max()) < experts)


def _distinct(chosen: Tensor) -> bool:
    """Whether every row names different experts (a one-hot mask with k = E does not)."""
    ordered = chosen.sort(dim=-1).values
    return bool((ordered[:, 1:] > ordered[:, :-1]).all())


def _entered(chosen: Tensor, logits: Tensor) -> Tensor:
    """[T, E] bool: the experts of each token, where one may be named twice."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, chosen, True)


def _are_probabilities(rows: Tensor) -> bool:
    values = rows.detach().float()
    sums = values.sum(-1)
    return bool((values >= 0).all() and ((sums - 1).abs() < _SUM_TOLERANCE).all())


def _are_sparse(rows: Tensor, top_k: int) -> bool:
    """Whether these are weights of the chosen alone: k of a row are held, none is negative.

    The others are 0, or -inf before a softmax; a row of zeros is a token that was dropped. Logits
    of a gate that began at zero may have zeros too, but in all rows, or beside negative values.
    """
    values = rows.detach()
    masked = values.isneginf()
    if bool(masked.any()):
        return bool(((~masked).sum(-1) <= top_k).all())
    held = (values != 0).sum(-1)
    whole = (held == top_k) | (held == 0)
    return bool(held.any() and whole.all() and (values >= 0).all())
