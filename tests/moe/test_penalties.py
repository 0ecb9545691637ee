"""The regulariser's gradient reaches every family's gates, and is the one worked out by hand."""

from collections.abc import Callable

import pytest
import torch
from tests.moe.test_observe import batches, run
from torch import Tensor, nn

from sluiceway.fedalign import conditional_penalty, marginal_penalty
from sluiceway.moe import Observer, moe_layout, received_logits

Make = Callable[[str], nn.Module]
REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1])
ALPHA = torch.tensor([1.0, 0.25, 0.5, 0.75])


def by_hand(logits: Tensor, ratio: Tensor, strength: Tensor, mask: Tensor | None) -> Tensor:
    """dL/dlogits [T, E] of L = mean over t of sum over e of strength p (log p - ratio)."""
    p = logits.softmax(-1)
    slope = strength * (p.log() - ratio + 1)
    gradient = p * (slope - (p * slope).sum(-1, keepdim=True))
    counted = torch.ones(len(logits)) if mask is None else mask.double()
    return gradient * counted[:, None] / counted.sum()


@pytest.mark.parametrize("kind", ["marginal", "conditional"])
def test_gradients_of_the_gates(make: Make, family: str, kind: str) -> None:
    model = make(family).train()
    found = moe_layout(model)
    ids, mask = batches()[0]
    with Observer(model, found) as observer, observer.observing(mask):
        run(model, ids, mask)
    for block, step in zip(found.blocks, observer.last, strict=True):
        assert step is not None
        logits = step.logits.detach().double()
        gate = [model.get_parameter(name) for name in block.gate]
        if kind == "marginal":
            loss = marginal_penalty(step.logits, step.selected, REFERENCE, ALPHA, step.mask)
            chosen = torch.zeros(len(logits), 4, dtype=torch.float64).scatter(1, step.selected, 1)
            expected = by_hand(logits, REFERENCE.double().log(), ALPHA * chosen, step.mask)
        else:
            values = {n: torch.randn(p.shape) for n, p in zip(block.gate, gate, strict=True)}
            theirs = received_logits(block, model.get_submodule(block.router), values, step.hidden)
            loss = conditional_penalty(step.logits, theirs, ALPHA, step.mask)
            ratio = theirs.detach().double().log_softmax(-1)
            expected = by_hand(logits, ratio, ALPHA.double(), step.mask)
        gradients = torch.autograd.grad(loss, gate, retain_graph=True)
        wanted = [expected.T @ step.hidden.detach().double(), expected.sum(0)]
        for got, want in zip(gradients, wanted, strict=False):
            assert got.abs().sum() > 0
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
