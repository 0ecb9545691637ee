"""NLLB-MoE blocks that run every expert: what transformers gets wrong, and the repair.

Two faults of ``NllbMoeSparseMLP`` in transformers 5.23.0 (measured, see tests/moe/test_repair.py):

- ``NllbMoeExperts.forward`` takes the router's first choice, a one-hot mask [T, E], for expert
  numbers and applies one_hot to it again. The mask holds 0 and 1 only, so that only expert_0 and
  expert_1 ever run: expert_0 on all pairs (token, e) where e is not the first choice, expert_1 on
  the others, each weighted by e's weight. The other experts never run and never learn.
- ``NllbMoeTop2Router`` keeps its capacity in ``expert_capacity`` and overwrites it: a forward in
  evaluation mode, or the first forward where the config gives none, sets what later training
  uses. What a step computes then depends on which batches ran before it.

Repaired blocks compute y = sum over e of w(e) expert_e(x), where w is what the router returns, zero
where the token was dropped; token dropout stays as it is. Blocks are repaired by giving the two
instances a class derived from their own: the original classes stay as they are, and the repair goes
along with copies, pickles and forked processes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_CAPACITY = 64  # of the probe: more than its tokens


def repair_nllb(block: nn.Module, config: Any) -> None:
    """Repair an ``NllbMoeSparseMLP`` in place, if the installed release has the faults.

    Args:
        block: the block; one that is repaired or right already is left as it is.
        config: the model's config, whose ``expert_capacity`` is put back (a forward before the
            repair may have overwritten it); None: the router keeps the capacity that it has now.
    """
    experts: Any = block.get_submodule("experts")
    router: Any = block.get_submodule("router")
    kind: Any = type(block)
    wrong_dispatch, wrong_capacity = _faults(kind)
    if wrong_dispatch and not isinstance(experts, _Dispatch):
        experts.__class__ = _repaired(_Dispatch, experts.__class__)
    if wrong_capacity and not isinstance(router, _Capacity):
        router.__class__ = _repaired(_Capacity, router.__class__)
        if config is not None:
            router.expert_capacity = config.expert_capacity


class _Repaired:
    """A class made at run time has no name to be pickled by: its two parents have."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        mixin, original = type(self).__bases__
        return _new, (mixin, original), self.__dict__.copy()


class _Dispatch(_Repaired):
    """Experts that run on the tokens that the router sent them."""

    def forward(self: Any, hidden: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
        """hidden [T, H], weights router_probs [T, E], zero for tokens not sent -> [T, H]."""
        del router_mask
        output = torch.zeros_like(hidden)
        for e in range(self.num_experts):
            tokens = router_probs[:, e].nonzero().flatten()
            if not len(tokens):
                continue
            found = self[f"expert_{e}"](hidden[tokens]) * router_probs[tokens, e, None]
            if self.moe_token_dropout > 0:
                kept = self.token_dropout(found)
                found = kept if self.training else found * (1 - self.moe_token_dropout)
            output = output.index_add(0, tokens, found.to(hidden.dtype))
        return output


class _Capacity(_Repaired):
    """A router whose capacity is the configured one before and after every forward."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        configured = self.expert_capacity
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.expert_capacity = configured


@cache
def _repaired(mixin: type, original: type) -> type:
    return type(f"{mixin.__name__[1:]}{original.__name__}", (mixin, original), {})


def _new(mixin: type, original: type) -> Any:
    made: Any = _repaired(mixin, original)
    return made.__new__(made)


@cache
def _faults(kind: Any) -> tuple[bool, bool]:
    """(wrong dispatch, capacity overwritten) of a block class, by the behaviour of a tiny one."""
    from transformers import NllbMoeConfig

    config = NllbMoeConfig(
        d_model=3,
        num_experts=3,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        expert_capacity=_CAPACITY,
        activation_dropout=0.0,
        moe_token_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False):
        torch.manual_seed(0)
        block: Any = kind(config, 4).float().eval()
    # Every expert is the first choice of one token and the second of another.
    hidden = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 2.0]], device="cpu")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        block.router.classifier.weight.copy_(torch.eye(3))
        output = block(hidden[None])[0]
        overwritten = block.router.expert_capacity != _CAPACITY
        weights = block.router(hidden)[1]
        terms = [weights[:, e, None] * block.experts[f"expert_{e}"](hidden) for e in range(3)]
    return not torch.allclose(output, sum(terms[1:], terms[0]), atol=1e-5), overwritten
