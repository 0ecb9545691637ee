"""How a client steps: half-precision parameters, accumulated batches, gradient checkpointing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sluiceway.core.settings import Training
from sluiceway.moe.observe import REENTRANT
from sluiceway.strategies import LocalContext

#: What a loss is multiplied with before a float16 backward pass, at the start of every round.
#: Lower than PyTorch's own 65536: a client may take too few steps to come down from there.
SCALE = 1024.0

#: Where transformers keeps the hooks of `enable_input_require_grads`.
HOOKS = "_require_grads_hooks"
#: All that transformers sets on a module when it turns checkpointing on.
SWITCHES = (
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    HOOKS,
    "_require_grads_hook",
)


def master_params_of(params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What the optimiser steps, by name.

    The parameter itself, or a float32 copy where it is of half precision: in bfloat16 a step of
    less than about 1 / 256 of a value would be rounded away.
    """
    return {
        name: nn.Parameter(param.detach().float()) if param.dtype.itemsize < 4 else param
        for name, param in params.items()
    }


class Stepper:
    """The optimiser steps of one client in one round: `backward` once or more, then `step`.

    Args:
        client: its `master_params` are stepped and `params` follow; gradients of both are cleared.
        training: how.
        device: where the parameters are.
    """

    def __init__(self, client: LocalContext, training: Training, device: torch.device) -> None:
        self.client = client
        self.max_grad_norm = training.max_grad_norm
        master_params = list(client.master_params.values())
        self.copies = [
            (param, client.master_params[name])
            for name, param in client.params.items()
            if client.master_params[name] is not param
        ]
        self.optimiser = training.optimiser(master_params)
        fp16 = any(param.dtype == torch.float16 for param in client.params.values())
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=SCALE, enabled=fp16 or training.mixed == "float16"
        )
        self.skipped = 0
        for param in (*client.params.values(), *master_params):
            param.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss to the masters' (float32 sums of it, if need be)."""
        self.scaler.scale(loss).backward()
        for param, master in self.copies:
            if param.grad is not None:
                grad = param.grad.float()
                # A penalty on the masters may have put a gradient there already.
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                param.grad = None

    def step(self, correct: Callable[[LocalContext], None]) -> None:
        """Correct the gradients, clip, and step; in float16 not at all where they overflowed."""
        self.scaler.unscale_(self.optimiser)
        if self.overflowed():
            self.skipped += 1
        else:
            correct(self.client)
            if self.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(self.client.master_params.values(), self.max_grad_norm)
            self.scaler.step(self.optimiser)
            for param, master in self.copies:
                param.data.copy_(master.data)
            self.client.steps += 1
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)

    def overflowed(self) -> bool:
        """Whether the loss is scaled and some gradient is infinite or NaN."""
        if not self.scaler.is_enabled():
            return False
        finite = [
            m.grad.isfinite().all()
            for m in self.client.master_params.values()
            if m.grad is not None
        ]
        return not bool(torch.stack(finite).all())


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Inside, the model's layers are recomputed in the backward pass; it is left as it was.

    Raises:
        ValueError: it offers no gradient checkpointing.
    """
    before = {
        module: {name: module.__dict__[name] for name in SWITCHES if name in module.__dict__}
        for module in model.modules()
    }
    try:
        for top in checkpointable(model):
            enable(top)
        for module, held in before.items():
            # Hugging Face makes the embeddings' output require a gradient, which only reentrant
            # checkpointing needs: frozen layers would run backward for nothing.
            hooks = module.__dict__.get(HOOKS, [])
            if hooks is not held.get(HOOKS):
                for hook in hooks:
                    hook.remove()
        yield
    finally:
        for module, held in before.items():
            for name in SWITCHES:
                module.__dict__.pop(name, None)
            module.__dict__.update(held)


def enable(module: Any) -> None:
    """Turn non-reentrant checkpointing on, by whichever name transformers has for it."""
    kwargs = {"use_reentrant": False}
    if hasattr(module, "activation_checkpointing_enable"):
        module.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def checkpointable(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that can turn gradient checkpointing on.

    Raises:
        ValueError: there is none.
    """

    def search(module: nn.Module) -> list[nn.Module]:
        offers = getattr(module, "supports_gradient_checkpointing", True)
        if offers and hasattr(module, "gradient_checkpointing_enable"):
            return [module]
        return [found for child in module.children() for found in search(child)]

    if found := search(model):
        return found
    raise ValueError(
        "checkpointing: no part of this model has gradient_checkpointing_enable(); "
        "set checkpointing = false"
    )


def refuse_reentrant(model: nn.Module) -> None:
    """Raise ValueError for a model with experts whose checkpointing would hide router logits."""
    for name, module in model.named_modules():
        func = getattr(module, "_gradient_checkpointing_func", None)
        keywords = getattr(func, "keywords", {"use_reentrant": False})
        # PyTorch takes an absent or None use_reentrant for True.
        reentrant = keywords.get("use_reentrant") is not False
        if getattr(module, "gradient_checkpointing", False) and reentrant:
            raise ValueError(
                f"{name or 'the model'}: {REENTRANT}, or turn it off and set checkpointing = true"
            )
