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
        fp16 = any(param.dtype == torch.float16 for param in client.params.values())
        self.scaler: torch.amp.GradScaler | None = None
        if fp16 or training.mixed == "float16":
            self.scaler = torch.amp.GradScaler(device.type, init_scale=SCALE)
        self.alike = len({(param.dtype, param.device) for param in master_params}) == 1
        self.optimiser: SGD | torch.optim.Optimizer
        if training.optimizer == "sgd" and self.alike and self.scaler is None:
            self.optimiser = SGD(master_params, training)
        else:
            self.optimiser = training.optimiser(master_params)
        self.skipped = 0
        for param in (*client.params.values(), *master_params):
            param.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss to the masters' (float32 sums of it, if need be)."""
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        for param, master in self.copies:
            if param.grad is not None:
                grad = param.grad.float()
                # A penalty on the masters may have put a gradient there already.
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                param.grad = None

    def step(self, correct: Callable[[LocalContext], None]) -> None:
        """Correct the gradients, clip, and step; in float16 not at all where they overflowed."""
        if self.scaler is None:
            self.corrected(correct)
            self.optimiser.step()
            self.taken()
        else:
            assert isinstance(self.optimiser, torch.optim.Optimizer)
            self.scaler.unscale_(self.optimiser)
            if self.overflowed():
                self.skipped += 1
            else:
                self.corrected(correct)
                self.scaler.step(self.optimiser)
                self.taken()
            self.scaler.update()
        self.optimiser.zero_grad()

    def corrected(self, correct: Callable[[LocalContext], None]) -> None:
        """Correct and clip the gradients."""
        correct(self.client)
        if self.max_grad_norm > 0:
            params = self.client.master_params.values()
            if self.alike:
                clip([p.grad for p in params if p.grad is not None], self.max_grad_norm)
            else:
                nn.utils.clip_grad_norm_(params, self.max_grad_norm)

    def taken(self) -> None:
        """A step was taken: half-precision parameters follow it."""
        for param, master in self.copies:
            param.data.copy_(master.data)
        self.client.steps += 1

    def overflowed(self) -> bool:
        """Whether some gradient of a scaled loss is infinite or NaN."""
        finite = [
            m.grad.isfinite().all()
            for m in self.client.master_params.values()
            if m.grad is not None
        ]
        return not bool(torch.stack(finite).all())


class SGD:
    """`torch.optim.SGD` to the bit, without what that does in every step besides.

    Args:
        params: of one type, on one device.
        training: lr, momentum and weight_decay.
    """

    def __init__(self, params: list[nn.Parameter], training: Training) -> None:
        self.params = params
        self.training = training
        self.buffers: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        """One step, of the parameters that have a gradient."""
        some: list[Tensor] = [param for param in self.params if param.grad is not None]
        grads = [param.grad for param in some if param.grad is not None]
        if not some:
            return
        if self.training.weight_decay:
            grads = list(torch._foreach_add(grads, some, alpha=self.training.weight_decay))
        if self.training.momentum:
            for param, grad in zip(some, grads, strict=True):
                if param in self.buffers:
                    self.buffers[param].mul_(self.training.momentum).add_(grad)
                else:
                    self.buffers[param] = grad.clone()
            grads = [self.buffers[param] for param in some]
        torch._foreach_add_(some, grads, alpha=-self.training.lr)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for param in self.params:
            param.grad = None


@torch.no_grad()
def clip(grads: list[Tensor], largest: float) -> None:
    """`nn.utils.clip_grad_norm_` to the bit, of gradients of one type on one device, in place."""
    if not grads:
        return
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    share = torch.clamp(largest / (norm + 1e-6), max=1.0)
    # a product with 1 changes nothing; elsewhere than on a CPU, asking would be waiting
    if share.device.type != "cpu" or share.item() != 1:
        torch._foreach_mul_(grads, share)


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
