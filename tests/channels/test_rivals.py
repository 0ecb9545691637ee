"""The rivals' scores: by hand, against numpy-like loops, and never NaN."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sluiceway.channels import (
    class_balanced,
    class_gradients,
    entropy,
    l1,
    random_scores,
    std,
    taylor,
)

Score = Callable[[Tensor], Tensor]

few = settings(max_examples=25)
seeds = st.integers(0, 10**6)
unlabelled = pytest.mark.parametrize("score", [l1, std, entropy, lambda A: taylor(A, A.flip(0))])


def test_random_scores() -> None:
    first = random_scores(6, torch.Generator().manual_seed(1))
    assert torch.equal(first, random_scores(6, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, random_scores(6, torch.Generator().manual_seed(2)))
    with pytest.raises(ValueError, match="channels"):
        random_scores(0, torch.Generator())


@given(seeds)
@few
def test_against_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(3, 2, 2, 2, generator=generator, dtype=torch.float64)
    grad = torch.randn(3, 2, 2, 2, generator=generator, dtype=torch.float64)
    for c in range(2):
        values = A[:, c].flatten().tolist()
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        effect = sum(abs(float((A[b, c] * grad[b, c]).mean())) for b in range(3)) / 3
        shares = [0] * 5
        for v in values:
            span = max(values) - min(values)
            shares[min(4, int((v - min(values)) / span * 5))] += 1
        bits = -sum(n / len(values) * math.log(n / len(values)) for n in shares if n)
        assert l1(A)[c].item() == pytest.approx(sum(map(abs, values)) / len(values))
        assert std(A)[c].item() == pytest.approx(spread)
        assert taylor(A, grad)[c].item() == pytest.approx(effect)
        assert entropy(A, bins=5)[c].item() == pytest.approx(bits)


def test_entropy_by_hand() -> None:
    """A constant channel, one of two equal halves, one spread evenly."""
    A = torch.stack([torch.zeros(8), torch.tensor([0.0, 9.0] * 4), torch.arange(8.0)], 1)
    expected = torch.tensor([0.0, math.log(2), math.log(8)]).double()
    torch.testing.assert_close(entropy(A, bins=8), expected)
    torch.testing.assert_close(entropy(100 * A - 7, bins=8), expected)


def test_taylor_estimates_the_change_of_the_loss() -> None:
    """For a linear loss of one example the estimate is exact, but for the mean over positions."""
    A = torch.randn(1, 3, 4, requires_grad=True)
    weight = torch.randn(1, 3, 4)
    loss = (A * weight).sum()
    (grad,) = torch.autograd.grad(loss, A)
    change = [(A * weight)[:, c].sum().abs().item() / 4 for c in range(3)]
    scores = taylor(A, grad)
    assert scores.tolist() == pytest.approx(change, rel=1e-5)
    assert not scores.requires_grad


@unlabelled
@given(seed=seeds)
@few
def test_channels_and_examples_permute(score: Score, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(4, 5, 3, generator=generator)
    order = torch.randperm(5, generator=generator)
    torch.testing.assert_close(score(A[:, order]), score(A)[order])
    torch.testing.assert_close(score(A.flip(0)), score(A))


@unlabelled
@pytest.mark.parametrize(
    "shape", [(0, 3), (0, 3, 2, 2), (1, 3), (2, 3, 0), (2, 3, 2), (2, 3, 2, 2)]
)
@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf, -3e38, 3e38, 1e-45])
def test_always_finite(score: Score, shape: tuple[int, ...], value: float) -> None:
    A = torch.randn(shape)
    A[:1] = value
    scores = score(A)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float64
    assert scores.isfinite().all()
    assert scores.ge(0).all()


@unlabelled
def test_low_precision_and_bad_shape(score: Score) -> None:
    A = torch.randn(4, 2, 3).bfloat16()
    torch.testing.assert_close(score(A), score(A.float()))
    with pytest.raises(ValueError, match="A: expected"):
        score(torch.ones(4))


def test_errors() -> None:
    with pytest.raises(ValueError, match="grad"):
        taylor(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="bins"):
        entropy(torch.ones(2, 3), bins=1)


def test_every_class_counts_alike_in_gradients() -> None:
    # Two examples of class 0, one of class 1 whose gradients are a hundred times as large.
    grad = torch.tensor([[[1.0, -1], [3, 3]], [[-1, 1], [0, 0]], [[300, 300], [100, -100]]])
    sums, counts = class_gradients(grad, torch.tensor([0, 0, 1]), 3)
    assert sums.tolist() == [[2, 3], [300, 100], [0, 0]]
    assert counts.tolist() == [2, 1, 0]
    assert class_balanced(sums, counts).tolist() == [(0.4 + 0.75) / 2, (0.6 + 0.25) / 2]
    assert class_balanced(torch.zeros(3, 2), counts).tolist() == [0.5, 0.5]
