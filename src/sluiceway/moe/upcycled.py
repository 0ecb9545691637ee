"""The mixture-of-experts block that upcycling puts in place of a dense feed-forward layer.

Shapes: T tokens, H hidden width, I expert width, E experts, k experts chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]

#: In bfloat16 on a CPU, products of so many rows, or a multiple, are faster than of any number.
ROWS = 32


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
        # Repeated first, each row moves to a place of its own: no gradient depends on the order of
        # additions, on any device.
        rows = hidden.unsqueeze(1).expand(tokens, k, -1).reshape(tokens * k, -1)
        flat = indices.reshape(-1)
        out = self.in_blocks(rows, flat) if rows.is_cuda else self.in_turn(rows, flat)
        out = out * weights.reshape(-1, 1).to(out.dtype)
        return out.view(tokens, k, -1).sum(dim=1).to(hidden.dtype)

    def in_turn(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """One expert after the other: row r of [N, H] through expert chosen[r], for CPUs.

        In bfloat16 each expert's rows are filled up with zeros to a multiple of `ROWS`.
        """
        ranks, counts = ranked(chosen, len(self.up_proj))
        if rows.dtype == torch.bfloat16:
            counts = (counts + ROWS - 1) // ROWS * ROWS
        places = (counts.cumsum(0) - counts)[chosen] + ranks
        sizes: list[int] = counts.tolist()
        moved = rows.new_zeros(sum(sizes), rows.shape[1]).index_copy(0, places, rows)
        return self._run(moved, sizes).index_select(0, places)

    def in_blocks(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """The same as one batched product, whose shapes are known beforehand, for GPUs.

        Rows are laid out in blocks that belong to one expert each, filled up with zeros. With N / E
        rows a block, at most 2 E blocks hold them however they are spread over the experts: nothing
        waits for the device to count them. Each expert's matrices are repeated for its blocks.
        """
        experts = len(self.up_proj)
        size = -(-len(rows) // (experts * 16)) * 16
        number = len(rows) // size + experts
        ranks, counts = ranked(chosen, experts)
        blocks = (counts + size - 1) // size
        ends = blocks.cumsum(0)
        places = (ends - blocks)[chosen] * size + ranks
        each = torch.arange(number, device=rows.device)
        owners = torch.searchsorted(ends, each, right=True).clamp(max=experts - 1)
        moved = rows.new_zeros(number * size, rows.shape[1]).index_copy(0, places, rows)
        moved = moved.view(number, size, -1)

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            weight = repeated(weight, owners).transpose(1, 2)
            if bias is None:
                return torch.bmm(x, weight)
            return torch.baddbmm(repeated(bias, owners).unsqueeze(1), x, weight)

        inner = linear(moved, self.up_proj, self.up_bias)
        if self.gate_proj is None:
            inner = self.activation(inner)
        else:
            inner = self.activation(linear(moved, self.gate_proj, None)) * inner
        out = linear(inner, self.down_proj, self.down_bias)
        return out.flatten(0, 1).index_select(0, places)

    def _run(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Experts on ``rows`` sorted by expert, counts[e] rows for expert e."""
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
        return (None,) * len(self.up_proj) if fused is None else tuple(fused.unbind(0))


class UpcycledMoE(nn.Module):
    """Router and experts in place of a dense feed-forward layer; no residual, no norm.

    Forward takes and returns [..., H]. The router is ``router``, the experts are ``experts``.

    Attributes:
        mask: [T] bool, False for padding of the batch in hand, which then gets zeros from no
            expert (on a CPU; a GPU would wait to count it); None: every token is real. Set by
            `skip_padding`.
    """

    def __init__(self, router: UpcycledRouter, experts: UpcycledExperts) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.mask: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]. Raises ValueError if there is a mask of another batch's size."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, indices = self.router(flat)
        if self.mask is None or flat.is_cuda:
            out: Tensor = self.experts(flat, indices, weights)
            return out.reshape(hidden.shape)
        if len(self.mask) != len(flat):
            raise ValueError(f"mask: has {len(self.mask)} entries for {len(flat)} tokens")
        real = self.mask.nonzero().flatten()
        out = self.experts(*(tensor.index_select(0, real) for tensor in (flat, indices, weights)))
        return torch.zeros_like(flat).index_copy(0, real, out).reshape(hidden.shape)


def skip_padding(model: nn.Module) -> None:
    """Make padding pass by the experts of `UpcycledMoE` blocks, in all later calls of ``model``.

    The mask is the ``attention_mask`` that the model is called with, by keyword, one entry per
    token. It stays in the blocks after the call, for gradient checkpointing runs them again. Equal
    up to rounding: gradients of weights are sums over fewer rows, in another order.

    Raises:
        ValueError: the model has no such block.
    """
    if not any(isinstance(module, UpcycledMoE) for module in model.modules()):
        raise ValueError("padding can be skipped by upcycled experts only, and there are none")
    model.register_forward_pre_hook(_share_mask, with_kwargs=True)


def _share_mask(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask: Tensor | None = kwargs.get("attention_mask")
    for module in model.modules():
        if isinstance(module, UpcycledMoE):
            module.mask = None if mask is None else mask.reshape(-1) != 0


def ranked(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Each row's number among those of its expert, [N], and the rows of each expert, [E].

    Nothing here waits for a device.
    """
    sorted_, order = chosen.sort(stable=True)
    each = torch.arange(experts, device=chosen.device)
    begins = torch.searchsorted(sorted_, each)
    counts = torch.searchsorted(sorted_, each, right=True) - begins
    position = torch.arange(len(order), device=chosen.device)
    return torch.empty_like(order).scatter(0, order, position) - begins[chosen], counts


def repeated(weight: Tensor, owners: Tensor) -> Tensor:
    """weight[owners], whose gradient is added up in a fixed order on any device."""
    out: Tensor = _Repeated.apply(weight, owners)  # type: ignore[no-untyped-call]
    return out


class _Repeated(torch.autograd.Function):
    """The gradient as a product with zeros and ones: index_add on a GPU has no fixed order."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, owners: Tensor) -> Tensor:
        ctx.save_for_backward(owners)
        ctx.experts = len(weight)
        return weight.index_select(0, owners)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (owners,) = ctx.saved_tensors
        each = torch.arange(ctx.experts, device=owners.device).unsqueeze(1)
        total = (owners == each).to(grad.dtype) @ grad.flatten(1)
        return total.view(ctx.experts, *grad.shape[1:]), None


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor)


def _required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
