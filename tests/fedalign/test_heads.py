"""Heads in closed form against loops, and what adding sums up means."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from hypothesis import given
from tests.fedalign.loops import close, few, seeds
from torch import Tensor

from sluiceway.fedalign import gram, label_sums, means_head, ridge_head

CLASSES, WIDTH = 4, 5


def examples(seed: int, count: int = 30) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=g)
    return 3 * torch.randn(count, WIDTH, generator=g) + labels[:, None], labels


def test_sums_by_hand() -> None:
    z = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    y = torch.tensor([2, 0, 2])
    close(label_sums(z, y, 4), [[3, 4, 1], [0, 0, 0], [6, 8, 2], [0, 0, 0]])
    close(gram(z), [[35, 44, 9], [44, 56, 12], [9, 12, 3]])


def test_means_by_hand() -> None:
    """Means (3, 4) of two examples and (0, 10) of one: |m| = 5 and 10, r = 20 / 3."""
    z = torch.tensor([[2.0, 4.0], [4.0, 4.0], [0.0, 10.0]])
    weight, bias = means_head(label_sums(z, torch.tensor([0, 0, 2]), 3), scale=2.0)
    size = 2.0 * math.log(3) / (20 / 3)
    close(weight, [[0.6 * size, 0.8 * size], [0, 0], [0, size]])
    close(bias, [0, 0, 0])


@few
@given(seeds)
def test_ridge_is_the_minimum_of_its_loss(seed: int) -> None:
    """scale / 2 times the squared error plus the penalty has no slope where it was solved."""
    z, y = examples(seed)
    moments = gram(z)
    weight, bias = ridge_head(moments, label_sums(z, y, CLASSES), ridge=0.1, scale=1.0)
    theta = torch.cat([weight, bias[:, None]], 1) / math.log(CLASSES)
    rows = torch.cat([z.double(), torch.ones(len(z), 1, dtype=torch.float64)], 1)
    theta.requires_grad_()
    error = (rows @ theta.T - F.one_hot(y, CLASSES).double()).square().sum()
    loss = error + 0.1 * moments.trace() / (WIDTH + 1) * theta.square().sum()
    (slope,) = torch.autograd.grad(loss, theta)
    close(slope, torch.zeros_like(slope), 1e-8)


@few
@given(seeds)
def test_the_head_does_not_depend_on_who_holds_what(seed: int) -> None:
    z, y = examples(seed)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    parts = order.split([1, 12, 17])
    sums = sum(label_sums(z[p], y[p], CLASSES) for p in parts)
    moments = sum(gram(z[p]) for p in parts)
    assert isinstance(sums, Tensor)
    assert isinstance(moments, Tensor)
    for divided, pooled in (
        (means_head(sums), means_head(label_sums(z, y, CLASSES))),
        (ridge_head(moments, sums), ridge_head(gram(z), label_sums(z, y, CLASSES))),
    ):
        close(divided[0], pooled[0])
        close(divided[1], pooled[1])


@few
@given(seeds)
def test_the_size_of_features_changes_no_logit(seed: int) -> None:
    z, y = examples(seed)
    z = z.double()
    one = means_head(label_sums(z, y, CLASSES))[0]
    other = means_head(label_sums(10 * z, y, CLASSES))[0]
    close(z @ one.T, 10 * z @ other.T)


def test_fewer_examples_than_features_have_a_head_too() -> None:
    z, y = examples(0, count=2)
    weight, bias = ridge_head(gram(z), label_sums(z, y, CLASSES))
    assert weight.isfinite().all()
    assert bias.isfinite().all()
    assert ((z.double() @ weight.T + bias).argmax(1) == y).all()
