"""Several clients in one batch: what is trained runs with each client's own values.

Shapes: K clients, B examples of each, K B in a batch, client after client; E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sluiceway.core.batches import Batch
from sluiceway.moe import Observer
from sluiceway.moe.families import RouterOutput
from sluiceway.moe.layout import Block
from sluiceway.moe.received import Call
from sluiceway.moe.upcycled import UpcycledMoE

Forward = Callable[..., Any]


class _Original(nn.Module):
    """A module under its forward from before the folding, past its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.run: Forward = module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


class Folding:
    """Runs a model on the batches of K clients as on one.

    Frozen layers see K B examples. A module with trained parameters of its own runs by
    `torch.func.vmap`, each client's part with that client's values. Upcycled experts of all clients
    are one layer of K E experts, among which the router's choices are counted from k E on.

    Args:
        model: its parameters lend their names and shapes, and stay as they are.
        names: of the trained parameters.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self.model = model
        self.names = set(names)
        self.values: Mapping[str, Tensor] = {}
        self.clients = self.examples = 0
        self.running = False

    def run(self, batch: Batch, values: Mapping[str, Tensor], clients: int) -> Tensor:
        """Logits [K B, C] of a batch of K B examples under values [K, ...], inside `installed`."""
        self.values, self.clients, self.examples = values, clients, len(batch.labels)
        self.running = True
        try:
            return batch.run(self.model)
        finally:
            self.running = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the model's modules run folded while `run` runs; elsewhere as ever."""
        forwards = self.forwards()
        before = {m: m.__dict__["forward"] for m, _ in forwards if "forward" in m.__dict__}
        try:
            for module, forward in forwards:
                module.forward = forward
            yield
        finally:
            for module, _ in forwards:
                module.__dict__.pop("forward", None)
                if module in before:
                    module.forward = before[module]

    def forwards(self) -> list[tuple[nn.Module, Forward]]:
        """The modules that run folded, and how."""
        found: list[tuple[nn.Module, Forward]] = []
        done: list[str] = []
        for name, module in self.model.named_modules():
            prefix = f"{name}." if name else ""
            if any(prefix.startswith(above) for above in done):
                continue
            if isinstance(module, UpcycledMoE) and self.within(f"{prefix}experts.", module.experts):
                done.append(prefix)
                experts, router = _Original(module.experts), _Original(module.router)
                found.append((module.experts, partial(self.experts, experts, f"{prefix}experts.")))
                chosen = partial(self.chosen, router, f"{prefix}router.", module.router.num_experts)
                found.append((module.router, chosen))
            elif any(
                f"{prefix}{own}" in self.names for own, _ in module.named_parameters("", False)
            ):
                done.append(prefix)
                found.append((module, partial(self.each, _Original(module), prefix)))
        return found

    def within(self, prefix: str, module: nn.Module) -> list[str]:
        """Names of a module's trained parameters, without the prefix."""
        return [own for own, _ in module.named_parameters() if f"{prefix}{own}" in self.names]

    def each(self, original: _Original, prefix: str, *args: Any, **kwargs: Any) -> Any:
        """A module on each client's part of its arguments, with that client's values.

        A part is what a tensor whose leading size is a multiple of K B has of it; any other is
        given to all. Of arguments that are one for all examples, as positions [1, S] are, each
        client's output is repeated for its examples.
        """
        own = self.within(prefix, original.module)
        if not self.running or not own:
            return original(*args, **kwargs)
        leaves, form = tree_flatten((args, kwargs))
        parts = {
            place: leaf.unflatten(0, (self.clients, -1))
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.ndim and not len(leaf) % self.examples
        }

        def one(values: dict[str, Tensor], held: dict[int, Tensor]) -> Any:
            mine = [held.get(place, leaf) for place, leaf in enumerate(leaves)]
            args, kwargs = tree_unflatten(mine, form)
            return functional_call(original, values, args, kwargs)

        values = {f"module.{name}": self.values[f"{prefix}{name}"] for name in own}
        found = vmap(one)(values, parts)
        if not parts:
            each = self.examples // self.clients
            found = tree_map(lambda out: out.expand(-1, each, *out.shape[2:]), found)
        return tree_map(lambda out: out.flatten(0, 1), found)

    def chosen(
        self, original: _Original, prefix: str, experts: int, *args: Any, **kwargs: Any
    ) -> Any:
        """A router whose choices, [K T, k], are among the K E experts of all clients."""
        logits, weights, indices = self.each(original, prefix, *args, **kwargs)
        if self.running:
            first = torch.arange(self.clients, device=indices.device) * experts
            indices = (indices.unflatten(0, (self.clients, -1)) + first[:, None, None]).flatten(
                0, 1
            )
        return logits, weights, indices

    def experts(self, original: _Original, prefix: str, *args: Any, **kwargs: Any) -> Any:
        """The experts of all clients as those of one layer."""
        if not self.running:
            return original(*args, **kwargs)
        values = {
            f"module.{name}": self.values[f"{prefix}{name}"].flatten(0, 1)
            if f"{prefix}{name}" in self.names
            else param.repeat(self.clients, *[1] * (param.ndim - 1))
            for name, param in original.module.named_parameters()
        }
        return functional_call(original, values, args, kwargs)


class FoldedObserver(Observer):
    """Hands each client's part of a folded forward to that client's observer.

    Args:
        observers: of the clients, in order; this one has the hooks and theirs are removed.
        model, layout: see `Observer`.
    """

    def __init__(self, observers: list[Observer], model: nn.Module, layout: Any) -> None:
        super().__init__(model, layout, regions=False)
        self.observers = observers
        for observer in observers:
            observer.close()

    @contextmanager
    def watching(self, clients: int, real: Tensor | None, batch: Batch) -> Iterator[None]:
        """Observe a folded batch of the first clients; `last` of theirs is emptied.

        Args:
            clients: K.
            real: [K, B] bool, which examples count; None if all do.
            batch: of K B examples.
        """
        self.clients, self.real = clients, real
        for observer in self.observers:
            observer.last = [None] * len(observer.last)
        with self.observing(batch.mask, batch.decoder_mask):
            yield

    def _observe(
        self,
        block: Block,
        hidden: Tensor,
        output: RouterOutput,
        whole: Any,
        call: Call | None,
    ) -> None:
        mask = self._masks[self._is_decoder[block.position]]
        if self.real is not None:
            real = self.real.flatten().repeat_interleave(len(hidden) // self.real.numel())
            mask = real if mask is None else mask & real

        def parts(tensor: Tensor) -> tuple[Tensor, ...]:
            return torch.unbind(tensor.unflatten(0, (self.clients, -1)))

        logits, selected = parts(output.logits), parts(output.selected % block.num_experts)
        weights = parts(whole[1])
        masks = [None] * self.clients if mask is None else parts(mask)
        for place, own in enumerate(parts(hidden)):
            observer = self.observers[place]
            observer._masks = (masks[place], masks[place])
            read = RouterOutput(logits[place], selected[place], None)
            again = (read.logits, weights[place], read.selected)
            observer._observe(block, own, read, again, None)
