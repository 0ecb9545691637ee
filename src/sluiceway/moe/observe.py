"""Measure routing in the forward passes that training makes anyway: one forward hook per router.

The symbols (load c, routing distribution r, margin m, region mu) and their [paper]/[ours] marks
are in docs/methods.md. Shapes: B sequences of S tokens, T = B * S, E experts, k per token, width d.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sluiceway.errors import InputError
from sluiceway.fedalign.routing import routing_statistics
from sluiceway.moe.families import RouterOutput, combine_weights
from sluiceway.moe.layout import Block, MoELayout
from sluiceway.moe.received import Call, hidden_of


@dataclass(frozen=True)
class BlockRouting:
    """What a client measured of one block since the last reset. CPU, float64, without graph.

    Attributes:
        load: [E], c(e): tokens that entered expert e  [ours]. Where the family drops tokens above
            an expert's capacity (Switch, NLLB), dropped tokens are not in it; elsewhere it sums to
            k * tokens.
        routing: [E], r(e): mean of p(e|x) over tokens  [paper; soft mean ours]. In [0, 1], sums to
            1; all zero if no token was observed.
        margin: [E], m(e): mean of p(1st) - p(2nd) over tokens whose first choice is e
            [paper: name; form ours], in [0, 1]; 0 where there is none. Dropped tokens count by
            their choice.
        region: [E, d], mu(e): mean hidden state that entered e  [paper]; a zero row if none did.
            None if regions are off.
        tokens: number of tokens observed, padding excluded.
    """

    load: Tensor
    routing: Tensor
    margin: Tensor
    region: Tensor | None
    tokens: int


@dataclass
class BlockStep:
    """One block in the forward that just ran, for a regulariser on the routing.

    Attributes:
        hidden: [T, d], what entered the router, with graph.
        logits: [T, E], raw, with graph.
        selected: [T, k] int64, in the router's order. For Switch and NLLB the choice before
            dropping.
        mask: [T] bool, True for tokens that count; None if all do.
        call: positional and keyword arguments that the router was called with.
    """

    hidden: Tensor
    logits: Tensor
    selected: Tensor
    mask: Tensor | None
    call: Call | None = None


@dataclass(frozen=True)
class TokenSample:
    """Tokens that a block saw since the last reset, evenly spread over all; they never leave.

    Attributes:
        hidden: [n, d], what entered the router, without graph, in the model's type.
        weights: [n, E] float32, what each expert's output was multiplied by; 0 where the token did
            not enter it, and for padding.
        counted: [n] bool, False for padding.
    """

    hidden: Tensor
    weights: Tensor
    counted: Tensor


class _Sampler:
    """Keeps every s-th token of a block; s doubles whenever there are more than `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.stride = 1
        self.seen = 0
        self.held = 0
        self.parts: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def add(self, hidden: Tensor, weights: Tensor, mask: Tensor | None) -> None:
        rows = None
        if mask is not None and not hidden.is_cuda:  # a GPU would wait to count them
            rows = mask.nonzero().flatten()
            if len(rows) == len(mask):
                rows = None
        count = len(hidden) if rows is None else len(rows)
        some = slice(-self.seen % self.stride, None, self.stride)
        self.seen += count
        if rows is None:
            counted = weights.new_ones(count, dtype=torch.bool) if mask is None else mask
            part = (hidden[some].detach().clone(), weights[some], counted[some])
            if hidden.is_cuda and mask is not None:
                keep = part[2].unsqueeze(1)
                # Padding may hold NaN, which a product with 0 would not remove.
                part = (part[0].masked_fill(~keep, 0), part[1].masked_fill(~keep, 0), part[2])
        else:
            rows = rows[some]
            part = (
                hidden.detach().index_select(0, rows),
                weights.index_select(0, rows),
                weights.new_ones(len(rows), dtype=torch.bool),
            )
        self.parts.append(part)
        self.held += len(part[0])
        while self.held > self.most:
            joined = self.joined()
            self.stride *= 2
            self.parts = [tuple(tensor[::2] for tensor in joined)]
            self.held = len(self.parts[0][0])

    def joined(self) -> tuple[Tensor, ...]:
        return tuple(torch.cat(tensors) for tensors in zip(*self.parts, strict=True))


class _Sums:
    """Running sums of one block, on the model's device: no hook waits for the device."""

    def __init__(self, block: Block, regions: bool, device: torch.device) -> None:
        # Apple's device has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.per_expert = torch.zeros(4, block.num_experts, dtype=dtype, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.region = (
            torch.zeros(block.num_experts, block.hidden, dtype=dtype, device=device)
            if regions
            else None
        )

    @torch.no_grad()
    def add(self, hidden: Tensor, output: RouterOutput, mask: Tensor | None) -> None:
        load, routing, margin, first = routing_statistics(
            output.logits.detach(), output.selected, mask
        )
        dispatched = None
        if self.region is not None or output.dispatched is not None:
            dispatched = _dispatched(output, mask)
        if output.dispatched is not None and dispatched is not None:
            load = dispatched.sum(0)
        self.per_expert += torch.stack((load, routing, margin, first))
        self.tokens += hidden.shape[0] if mask is None else mask.sum()
        if self.region is not None and dispatched is not None:
            hidden = hidden.detach().float()
            if mask is not None:
                # Padding may hold NaN, which a product with 0 would not remove.
                hidden = hidden.masked_fill(~mask.unsqueeze(1), 0.0)
            # Autocast would make this product a half-precision one.
            with torch.autocast(hidden.device.type, enabled=False):
                self.region += dispatched.T @ hidden

    def means(self) -> BlockRouting:
        load, routing, margin, first = self.per_expert.cpu().double()
        total = routing.sum()
        region = None if self.region is None else self.region.cpu().double()
        return BlockRouting(
            load=load,
            routing=routing / total if total > 0 else routing,
            margin=(margin / first.clamp(min=1)).clamp(0, 1),
            region=None if region is None else region / load.clamp(min=1).unsqueeze(1),
            tokens=int(self.tokens),
        )


class Observer:
    """Counts routing in the forward passes that run inside ``observing()``, and in no others.

    The recompute of gradient checkpointing runs in the backward pass and is never counted.
    Use it as a context manager, or call ``close``: it holds one hook per block.

    Args:
        model: the model that ``layout`` describes.
        layout: its blocks.
        regions: measure the mean hidden state per expert too, [E, d] a block.
        sample: tokens of each block to keep, at most, for `samples`; 0 for none.

    Attributes:
        last: per block, the last observed forward, or None. Holds that forward's graph until the
            next ``observing()`` or ``reset()``.
    """

    last: list[BlockStep | None]

    def __init__(
        self, model: nn.Module, layout: MoELayout, regions: bool = True, sample: int = 0
    ) -> None:
        self._layout = layout
        self._regions = regions
        self._sample = sample
        self._active = False
        self._grad_at_entry = False
        self._masks: tuple[Tensor | None, Tensor | None] = (None, None)
        self._is_decoder = _decoder_blocks(model, layout)
        self._sums: list[_Sums | None] = []
        self.reset()
        self._handles: list[RemovableHandle] = [
            model.get_submodule(block.router).register_forward_hook(
                self._hook(block), with_kwargs=True
            )
            for block in layout.blocks
        ]

    @contextmanager
    def observing(
        self, mask: Tensor | None = None, decoder_mask: Tensor | None = None
    ) -> Iterator[Observer]:
        """Observe the forwards inside; ``last`` is emptied on entry.

        Args:
            mask: attention mask [B, S] of the batch, nonzero for tokens that count; None: all do.
            decoder_mask: the same for the decoder's blocks of an encoder-decoder model
                (``mask`` is then the encoder's).

        Raises:
            InputError: in the forward, if a mask does not have one entry per token.
            RuntimeError: in the forward, if it runs under reentrant gradient checkpointing, which
                detaches the logits; on entry, if the observer is closed or observing already.
        """
        if self._active or not self._handles:
            state = "observing already" if self._active else "closed"
            raise RuntimeError(f"the observer is {state}")
        self.last = [None] * len(self._layout.blocks)
        self._masks = (_flat(mask), _flat(decoder_mask))
        self._grad_at_entry = torch.is_grad_enabled()
        self._active = True
        try:
            yield self
        finally:
            self._active = False
            self._masks = (None, None)

    def routing(self) -> list[BlockRouting]:
        """Means over everything observed since the last reset, one per block."""
        return [
            (sums or _Sums(block, self._regions, torch.device("cpu"))).means()
            for sums, block in zip(self._sums, self._layout.blocks, strict=True)
        ]

    def samples(self) -> list[TokenSample | None]:
        """The tokens kept since the last reset, one sample per block; None if it saw none."""
        return [TokenSample(*kept.joined()) if kept.parts else None for kept in self._samplers]

    def reset(self) -> None:
        """Forget all sums, samples and the last forward."""
        self._sums = [None] * len(self._layout.blocks)
        self._samplers = [_Sampler(self._sample) for _ in self._layout.blocks]
        self.last = [None] * len(self._layout.blocks)

    def close(self) -> None:
        """Remove the hooks; sums stay readable. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _hook(self, block: Block) -> Any:
        def hook(
            router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            # A recompute belongs to a backward pass, even where that runs inside observing().
            if not self._active or torch._C._current_graph_task_id() != -1:
                return
            if self._grad_at_entry and router.training and not torch.is_grad_enabled():
                raise RuntimeError(
                    f"router {block.router} ran without gradients in a training step: {REENTRANT} "
                    "(or observe under torch.no_grad() if no gradient is wanted)"
                )
            read = block.family.read(output, block.top_k)
            hidden = hidden_of((args, kwargs), block.hidden).reshape(-1, block.hidden)
            self._observe(block, hidden, read, output, (args, kwargs))

        return hook

    def _observe(
        self,
        block: Block,
        hidden: Tensor,
        output: RouterOutput,
        whole: Any,
        call: Call | None,
    ) -> None:
        """Add a forward of a block.

        Args:
            hidden: what entered its router.
            output, whole: what came out, read and as it was.
            call: what the router was called with; None if it takes hidden states alone.
        """
        mask = self._masks[self._is_decoder[block.position]]
        if mask is not None:
            if mask.numel() != hidden.shape[0]:
                raise InputError(
                    f"mask: has {mask.numel()} entries, but {hidden.shape[0]} tokens reach router "
                    f"{block.router}; give the attention mask [B, S] of the batch in the forward, "
                    "or none where its tokens are others (pooled, unpadded, more of them): "
                    'train.routing_mask = "none"'
                )
            mask = mask.to(hidden.device)
        sums = self._sums[block.position]
        if sums is None:
            # A later forward outside inference mode has to be able to add to them.
            with torch.inference_mode(False):
                sums = self._sums[block.position] = _Sums(block, self._regions, hidden.device)
        sums.add(hidden, output, mask)
        self.last[block.position] = BlockStep(hidden, output.logits, output.selected, mask, call)
        if self._sample:
            self._samplers[block.position].add(hidden, combine_weights(whole, output), mask)


#: Why a model with experts must not be trained under reentrant checkpointing, and what to do.
REENTRANT = (
    "reentrant gradient checkpointing detaches the router logits, so that a loss on them would be "
    'silently ignored; enable it with gradient_checkpointing_kwargs={"use_reentrant": False}'
)


def _dispatched(output: RouterOutput, mask: Tensor | None) -> Tensor:
    """[T, E] float32: 1 where the token enters the expert and counts."""
    if output.dispatched is not None:
        entered = output.dispatched.float()
    else:
        entered = torch.zeros_like(output.logits, dtype=torch.float32, requires_grad=False)
        entered.scatter_(1, output.selected, 1.0)
    return entered if mask is None else entered.masked_fill(~mask.unsqueeze(1), 0.0)


def _flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.detach().reshape(-1) != 0


def _decoder_blocks(model: nn.Module, layout: MoELayout) -> tuple[bool, ...]:
    """Per block, whether it is in the decoder of an encoder-decoder model."""
    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    both = {"encoder", "decoder"} <= parts
    return tuple(both and "decoder" in block.name.split(".") for block in layout.blocks)
