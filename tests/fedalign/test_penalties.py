"""The regulariser: values against loops, gradients against autograd of the loops."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fedalign.loops import close, few, seeds
from torch import Tensor

from sluiceway.fedalign import (
    REFERENCE_FLOOR,
    adaptive_strength,
    conditional_penalty,
    marginal_penalty,
)


def rows_counted(tokens: int, mask: Tensor | None) -> list[int]:
    return [t for t in range(tokens) if mask is None or bool(mask[t])]


def loop_marginal(
    logits: Tensor, selected: Tensor, r_g: Tensor, alpha: Tensor | None, mask: Tensor | None
) -> Tensor:
    total, rows = logits.new_zeros(()), rows_counted(len(logits), mask)
    for t in rows:
        p = logits[t].exp() / logits[t].exp().sum()
        for e in selected[t].tolist():
            strength = 1.0 if alpha is None else alpha[e].item()
            total = total + strength * p[e] * (p[e] / max(r_g[e].item(), REFERENCE_FLOOR)).log()
    return total / len(rows)


def loop_conditional(
    logits: Tensor, received: Tensor, alpha: Tensor | None, mask: Tensor | None
) -> Tensor:
    total, rows = logits.new_zeros(()), rows_counted(len(logits), mask)
    for t in rows:
        p = logits[t].exp() / logits[t].exp().sum()
        q = received[t].exp() / received[t].exp().sum()
        for e in range(logits.shape[1]):
            total = total + (1.0 if alpha is None else alpha[e].item()) * p[e] * (p[e] / q[e]).log()
    return total / len(rows)


class Case:
    def __init__(self, seed: int, adaptive: bool = True, masked: bool = True) -> None:
        g = torch.Generator().manual_seed(seed)
        self.tokens, self.experts = 6, 2 + seed % 4
        shape = (self.tokens, self.experts)
        self.logits = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
        self.received = torch.randn(shape, generator=g, dtype=torch.float64)
        self.selected = self.logits.detach().topk(2).indices
        self.r_g = torch.rand(self.experts, generator=g, dtype=torch.float64)
        self.r_g = self.r_g / self.r_g.sum()
        alpha = torch.rand(self.experts, generator=g, dtype=torch.float64)
        mask = torch.rand(self.tokens, generator=g) > 0.5
        mask[0] = True
        self.alpha = alpha if adaptive else None
        self.mask = mask if masked else None

    def marginal(self, of: Callable[..., Tensor] = marginal_penalty) -> Tensor:
        return of(self.logits, self.selected, self.r_g, self.alpha, self.mask)

    def conditional(self, of: Callable[..., Tensor] = conditional_penalty) -> Tensor:
        return of(self.logits, self.received, self.alpha, self.mask)


cases = st.builds(Case, seeds, st.booleans(), st.booleans())


@few
@given(cases)
def test_values_and_gradients_equal_the_loops(case: Case) -> None:
    for got, want in (
        (case.marginal(), case.marginal(loop_marginal)),
        (case.conditional(), case.conditional(loop_conditional)),
    ):
        torch.testing.assert_close(got, want)
        gradients = [torch.autograd.grad(loss, case.logits)[0] for loss in (got, want)]
        torch.testing.assert_close(*gradients)


def test_marginal_by_hand() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]], dtype=torch.float64).log()
    selected = torch.tensor([[0, 1], [1, 2]])
    r_g = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    alpha = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    first = 0.7 * math.log(1.4) + 0.2 * math.log(0.8)
    second = 0.5 * math.log(2) + 0.3 * math.log(1.2)
    assert marginal_penalty(logits, selected, r_g).item() == pytest.approx((first + second) / 2)
    weighted = 0.7 * math.log(1.4) + 0.5 * 0.2 * math.log(0.8) + 0.5 * 0.5 * math.log(2)
    got = marginal_penalty(logits, selected, r_g, alpha)
    assert got.item() == pytest.approx(weighted / 2)


def test_conditional_by_hand() -> None:
    logits = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    received = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert conditional_penalty(logits, received).item() == pytest.approx(want)
    got = conditional_penalty(logits, received, torch.tensor([1.0, 0.0]))
    assert got.item() == pytest.approx(0.75 * math.log(1.5))


@few
@given(seeds)
def test_marginal_is_zero_at_the_reference(seed: int) -> None:
    r_g = Case(seed).r_g
    everyone = torch.arange(len(r_g)).expand(5, -1)
    logits = (r_g.log() + 3.0).expand(5, -1)
    assert marginal_penalty(logits, everyone, r_g).item() == pytest.approx(0, abs=1e-12)
    # With every expert chosen it is a divergence, so positive elsewhere.
    assert marginal_penalty(Case(seed).logits[:5], everyone, r_g).item() > 0


@few
@given(seeds)
def test_conditional_is_zero_only_at_equal_routing(seed: int) -> None:
    c = Case(seed, adaptive=False, masked=False)
    assert c.conditional().item() > 0
    assert conditional_penalty(c.logits, c.logits).item() == 0
    # A shift of all logits is the same routing.
    assert conditional_penalty(c.logits, c.logits + 2).item() == pytest.approx(0, abs=1e-12)


@few
@given(seeds)
def test_permuting_experts_changes_nothing(seed: int) -> None:
    c = Case(seed)
    assert c.alpha is not None
    order = torch.randperm(c.experts, generator=torch.Generator().manual_seed(seed))
    logits, alpha = c.logits[:, order], c.alpha[order]
    moved = marginal_penalty(logits, order.argsort()[c.selected], c.r_g[order], alpha, c.mask)
    torch.testing.assert_close(moved, c.marginal())
    moved = conditional_penalty(logits, c.received[:, order], alpha, c.mask)
    torch.testing.assert_close(moved, c.conditional())


def test_padding_changes_nothing_even_if_it_is_nan() -> None:
    c = Case(7, masked=False)
    mask = torch.tensor([True, True, True, False, False, False])
    bad = c.logits.detach().clone()
    bad[3], bad[4], bad[5] = float("nan"), float("inf"), -1e30
    bad.requires_grad_()
    received = c.received.clone()
    received[3:] = float("nan")
    short = c.logits.detach()[:3].requires_grad_()
    for got, want in (
        (
            marginal_penalty(bad, c.selected, c.r_g, c.alpha, mask),
            marginal_penalty(short, c.selected[:3], c.r_g, c.alpha),
        ),
        (
            conditional_penalty(bad, received, c.alpha, mask),
            conditional_penalty(short, c.received[:3], c.alpha),
        ),
    ):
        torch.testing.assert_close(got, want)
        gradient = torch.autograd.grad(got, bad)[0]
        torch.testing.assert_close(gradient[:3], torch.autograd.grad(want, short)[0])
        assert torch.equal(gradient[3:], torch.zeros_like(gradient[3:]))


@pytest.mark.parametrize(("tokens", "masked"), [(0, True), (0, False), (3, True)])
def test_no_counted_token_gives_zero_with_a_graph(tokens: int, masked: bool) -> None:
    logits = torch.randn(tokens, 4, requires_grad=True)
    mask = torch.zeros(tokens, dtype=torch.bool) if masked else None
    selected = torch.zeros(tokens, 2, dtype=torch.long)
    for loss in (
        marginal_penalty(logits, selected, torch.full((4,), 0.25), None, mask),
        conditional_penalty(logits, torch.randn(tokens, 4), None, mask),
    ):
        assert loss.item() == 0
        assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros(tokens, 4))


def test_no_gradient_into_the_references() -> None:
    c = Case(5)
    assert c.alpha is not None
    fixed = [value.clone().requires_grad_() for value in (c.r_g, c.alpha, c.received)]
    marginal_penalty(c.logits, c.selected, fixed[0], fixed[1], c.mask).backward()
    conditional_penalty(c.logits, fixed[2], fixed[1], c.mask).backward()
    assert [value.grad for value in fixed] == [None, None, None]


def test_a_reference_of_zero_is_floored() -> None:
    logits, selected = torch.zeros(1, 2, requires_grad=True), torch.tensor([[0]])
    loss = marginal_penalty(logits, selected, torch.tensor([0.0, 1.0]))
    assert loss.item() == pytest.approx(0.5 * math.log(0.5 / REFERENCE_FLOOR), rel=1e-5)
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    for loss in (
        marginal_penalty(logits, torch.tensor([[0, 1]]), torch.full((3,), 1 / 3)),
        conditional_penalty(logits, -logits),
    ):
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_precision_is_that_of_the_logits_but_at_least_float32(dtype: torch.dtype) -> None:
    c = Case(9)
    logits = c.logits.detach().to(dtype)
    received = c.received.to(dtype)
    for got, want in (
        (
            marginal_penalty(logits, c.selected, c.r_g, c.alpha, c.mask),
            loop_marginal(logits.double(), c.selected, c.r_g, c.alpha, c.mask),
        ),
        (
            conditional_penalty(logits, received, c.alpha, c.mask),
            loop_conditional(logits.double(), received.double(), c.alpha, c.mask),
        ),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_adaptive_strength_by_hand() -> None:
    local = torch.tensor([0.1, 0.3, 0.2, 0.0, 0.0])
    shared = torch.tensor([0.3, 0.1, 0.2, 0.4, 0.0])
    got = adaptive_strength(local, shared)
    torch.testing.assert_close(got, torch.tensor([0.5, 0.5, 1.0, 0.0, 1.0]))


@few
@given(seeds, st.integers(1, 6))
def test_adaptive_strength_equals_the_loops(seed: int, experts: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(4, experts, generator=g) * (torch.rand(4, experts, generator=g) > 0.3)
    r_i, r_g = values[:3], values[3]
    got = adaptive_strength(r_i, r_g)
    assert ((got >= 0) & (got <= 1)).all()
    for row, wanted_of in zip(got, r_i.tolist(), strict=True):
        pairs = zip(wanted_of, r_g.tolist(), strict=True)
        close(row, [1.0 if a + b == 0 else 1 - abs(a - b) / (a + b) for a, b in pairs], 1e-6)
