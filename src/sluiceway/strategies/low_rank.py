"""LoRA on the server: products of adapters are averaged, not their factors.

The mean of the clients' A and B is not the mean of what they do to the model: mean(B) mean(A)
differs from mean(B A). What is left over is the residual (FedEx-LoRA, arXiv 2410.09432).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sluiceway.moe import Adapter, ParamSlice
from sluiceway.strategies.base import RunningMean, Update


class RunningProducts:
    """The weighted mean of the clients' products B_i A_i, one update at a time.

    Memory: one copy of the adapted matrices in float32, however many updates.

    Args:
        old: the tensors that the round began with, A and B of every pair among them.
        pairs: the adapters to keep.
    """

    def __init__(self, old: Mapping[str, Tensor], pairs: Sequence[Adapter]) -> None:
        self.old = old
        self.pairs = pairs
        self.mean = RunningMean({pair.base.key: product(pair, old) for pair in pairs})

    def add(self, pair: Adapter, update: Update, weight: float | Tensor) -> None:
        """Count one client's product.

        Args:
            pair: which adapter.
            update: a factor that it lacks counts with its old value.
            weight: >= 0, a number or one for each row of B ([out], of a gate: [E]).
        """
        a, b = update.tensors.get(pair.a.key), update.tensors.get(pair.b.key)
        value = None
        if a is not None or b is not None:
            a = pair.a.of(self.old) if a is None else a
            value = multiplied(a, pair.b.of(self.old) if b is None else b)
        self.mean.add(ParamSlice.whole(pair.base.key), value, weight)

    def folded(self, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapted parameters with the residuals added, so that nothing of the mean is lost.

        W' = W + scale (mean_i(B_i A_i) - B' A'), A' and B' the new factors.

        Args:
            new: the new factors by name; what it lacks is unchanged.
        """
        factors = {**self.old, **new}
        means = self.mean.result()
        bases = {name: self.old[name] for name in {pair.base.param for pair in self.pairs}}
        wide = {
            name: old.to(torch.promote_types(old.dtype, torch.float32), copy=True)
            for name, old in bases.items()
        }
        for pair in self.pairs:
            residual = pair.scale * (means[pair.base.key] - product(pair, factors))
            pair.base.of(wide).add_(residual.T if pair.transposed else residual)
        return {name: base.to(bases[name].dtype) for name, base in wide.items()}


def product(pair: Adapter, tensors: Mapping[str, Tensor]) -> Tensor:
    """B A of one adapter, [out, in], float32 or wider."""
    return multiplied(pair.a.of(tensors), pair.b.of(tensors))


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    """B A, [out, in], of A [r, in] and B [out, r], in float32 or wider.

    Contiguous first: the same values give the same product, whatever they are a part of.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    return b.to(wide).contiguous() @ a.to(wide).contiguous()
