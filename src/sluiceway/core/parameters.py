"""What of a model is trained and exchanged, and what is frozen."""

from __future__ import annotations

from torch import Tensor, nn


def exchanged(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and the float buffers that training changes, by name (no copies)."""
    tensors: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    still = {module for top in frozen_modules(model) for module in top.modules()}
    kept = set(model.state_dict())
    for prefix, module in model.named_modules():
        if module in still:
            continue
        own = module.named_buffers(prefix, recurse=False)
        tensors |= {n: b for n, b in own if n in kept and b.is_floating_point()}
    return tensors


def frozen_values(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and float buffers that never change, by name (no copies)."""
    changing = exchanged(model)
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.is_floating_point() and name not in changing
    }


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that have parameters of which none is trained.

    They run in evaluation mode always, so that what they compute for an example never changes.
    """
    params = list(model.parameters())
    if not params or any(p.requires_grad for p in params):
        return [m for child in model.children() for m in frozen_modules(child)]
    return [model]


def head_of(model: nn.Module) -> tuple[str, ...]:
    """Weight [C, d] and bias [C] (if it has one) of the linear layer that gives the logits.

    That is the model's last child where it is an nn.Linear with two outputs or more; into an
    nn.Sequential it is looked for. Empty where there is none.
    """
    name, module = "", model
    while not name or isinstance(module, nn.Sequential):
        children = list(module.named_children())
        if not children:
            break
        name, module = f"{name}{children[-1][0]}.", children[-1][1]
    if not isinstance(module, nn.Linear) or module.out_features < 2:
        return ()
    return tuple(name + own for own, _ in module.named_parameters(recurse=False))
