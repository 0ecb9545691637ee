"""A router's logits under the parameter values that were received this round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sluiceway.moe.layout import Block

#: Positional and keyword arguments of a router's forward.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Bare(nn.Module):
    """Calls a router's forward itself, past its hooks."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.router.forward(*args, **kwargs)


def hidden_of(call: Call, width: int) -> Tensor:
    """The hidden states among a router's arguments: the first of floating point and that width.

    Raises:
        ValueError: there is none.
    """
    args, kwargs = call
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == (width,):
            return value
    raise ValueError(f"the router was called with no hidden states [..., {width}]")


def received_logits(
    block: Block,
    router_module: nn.Module,
    received_params: Mapping[str, Tensor],
    hidden: Tensor,
    call: Call | None = None,
) -> Tensor:
    """The router's logits under other parameter values; no observer sees this forward.

    Args:
        block: the block that the router belongs to.
        router_module: its router, ``model.get_submodule(block.router)``. Runs in evaluation mode
            here, so without jitter, and is left as it was.
        received_params: the other values, by the names of the router's parameters in the model; a
            parameter that is not there keeps the value it has (it is not trained), and other names
            are ignored.
        hidden: [T, d] or [B, S, d], hidden states that enter the router.
        call: positional and keyword arguments that the router was called with, `hidden` among them;
            None where it takes nothing else.

    Returns:
        Raw logits [T, E]; their graph leads to ``hidden`` only.

    Raises:
        ValueError: a parameter has another shape.
    """
    values: dict[str, Tensor] = {}
    for name in (*block.gate, *block.gate_rest):
        own = router_module.get_parameter(name.removeprefix(f"{block.router}."))
        value = received_params.get(name)
        if value is None:
            continue
        if value.shape != own.shape:
            got = list(value.shape)
            raise ValueError(f"received {name}: expected shape {list(own.shape)}, got {got}")
        values[name.replace(block.router, "router", 1)] = value.detach().to(own)
    args, kwargs = call or ((hidden,), {})
    training = router_module.training
    router_module.eval()
    try:
        output = torch.func.functional_call(_Bare(router_module), values, args, kwargs)
    finally:
        router_module.train(training)
    return block.family.read_logits(output)
