"""The mixture-of-experts block that upcycling puts in place of a dense feed-forward layer.

Shapes: T tokens, H hidden width, I expert width, E experts, k experts chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


class UpcycledRouter(nn.Module):
    """Linear router, ``weight`` [E, H], that keeps the k most probable experts of a token.

    Args:
        weight: [E, H].
        top_k: k, in [1, E].
        scale: False: the k weights are renormalised to sum to 1. True: they are the plain softmax
            probabilities, so that they scale the output (as Switch does); their sum is below 1.

    Raises:
        ValueError: k outside [1, E], or k = 1 without ``scale``: a renormalised single weight is
            the constant 1, and the router would get no gradient from the task.
    """

    def __init__(self, weight: Tensor, top_k: int, scale: bool = False) -> None:
        super().__init__()
        if not 1 <= top_k <= weight.shape[0]:
            raise ValueError(f"top_k={top_k}: must be in [1, {weight.shape[0]}], experts at most")
        if top_k == 1 and not scale:
            raise ValueError(
                "top_k=1 with renormalised weights gives the router no gradient: "
                "set scale=True or top_k >= 2"
            )
        self.weight = nn.Parameter(weight)
        self.num_experts = weight.shape[0]
        self.top_k = top_k
        self.scale = scale

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route ``hidden`` [..., H], flattened to T tokens.

        Returns:
            (logits [T, E], weights [T, k] float32 or wider, indices [T, k] int64, best first).
        """
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
        # Half precision is too coarse for probabilities; float64 models keep their own.
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights, indices = logits.softmax(dim=-1, dtype=wide).topk(self.top_k, dim=-1)
        if not self.scale:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights, indices

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"experts={self.num_experts}, top_k={self.top_k}, scale={self.scale}"


class UpcycledExperts(nn.Module):
    """E feed-forward networks in fused parameters, leading axis E.

    Plain (BERT): down(act(up(x))). Gated (Llama): down(act(gate(x)) * up(x)).
    An expert that no token chose gets a zero gradient in its slice of every parameter (the whole
    gradient is None only where the batch has no token at all), and costs no computation.

    Args:
        up: [E, I, H].
        down: [E, H, I].
        activation: applied elementwise.
        up_bias: [E, I] or None.
        down_bias: [E, H] or None.
        gate: [E, I, H] for the gated form, or None.
    """

    gate_proj: nn.Parameter | None
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        up: Tensor,
        down: Tensor,
        activation: Activation,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = up.shape[0]
        self.activation = activation
        self.register_parameter("gate_proj", _parameter(gate))
        self.up_proj = nn.Parameter(up)
        self.register_parameter("up_bias", _parameter(up_bias))
        self.down_proj = nn.Parameter(down)
        self.register_parameter("down_bias", _parameter(down_bias))

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs; no token is dropped.

        Args:
            hidden: [T, H].
            indices: [T, k] int64, the chosen experts.
            weights: [T, k], their weights.

        Returns:
            [T, H] in the dtype of ``hidden``.
        """
        tokens, k = indices.shape
        if tokens == 0:
            return torch.zeros_like(hidden)
        flat = indices.reshape(-1)
        order = flat.argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        counts: list[int] = torch.bincount(flat, minlength=self.num_experts).tolist()
        # Repeating first makes both gathers permutations, whose backward adds each row once: the
        # result does not depend on the order of additions, on any device.
        rows = hidden.unsqueeze(1).expand(tokens, k, -1).reshape(tokens * k, -1)
        out = self._run(rows.index_select(0, order), counts)
        out = out * weights.reshape(-1).index_select(0, order).unsqueeze(1).to(out.dtype)
        return out.index_select(0, back).view(tokens, k, -1).sum(dim=1).to(hidden.dtype)

    def _run(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Experts on ``rows`` [T * k, H] sorted by expert, counts[e] rows for expert e."""
        # unbind, not indexing: its backward writes each fused gradient once, where E separate
        # slices would each write a full [E, I, H] of zeros.
        gates, ups, up_biases, downs, down_biases = (
            self._slices(p)
            for p in (self.gate_proj, self.up_proj, self.up_bias, self.down_proj, self.down_bias)
        )
        outputs: list[Tensor] = []
        for e, chunk in enumerate(torch.split(rows, counts)):
            if counts[e] == 0:
                continue
            up = F.linear(chunk, _required(ups[e]), up_biases[e])
            gate = gates[e]
            inner = (
                self.activation(up) if gate is None else self.activation(F.linear(chunk, gate)) * up
            )
            outputs.append(F.linear(inner, _required(downs[e]), down_biases[e]))
        return torch.cat(outputs)

    def _slices(self, fused: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None,) * self.num_experts if fused is None else tuple(fused.unbind(0))


class UpcycledMoE(nn.Module):
    """Router and experts in place of a dense feed-forward layer; no residual, no norm.

    Forward takes and returns [..., H]. The router is ``router``, the experts are ``experts``.
    """

    def __init__(self, router: UpcycledRouter, experts: UpcycledExperts) -> None:
        super().__init__()
        self.router = router
        self.experts = experts

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, indices = self.router(flat)
        out: Tensor = self.experts(flat, indices, weights)
        return out.reshape(hidden.shape)


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor)


def _required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
