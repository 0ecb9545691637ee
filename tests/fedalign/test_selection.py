"""Directions and the choice of like-minded pairs: small cases by hand, and loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sluiceway.fedalign import (
    DirectionGram,
    direction_consensus,
    expert_weights,
    region_weights,
    selection_threshold,
)

few = settings(max_examples=25, deadline=None)


def close(got: Tensor, want: Tensor | list[float] | list[list[float]]) -> None:
    wanted = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


def cos(a: list[float], b: list[float]) -> float:
    scale = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / scale if scale else 0.0


# Directions


def test_directions_by_hand() -> None:
    updates = torch.tensor([[3.0, 0.0], [3.0, 4.0], [-1.0, 0.0], [0.0, 0.0]])
    want = [
        [1.0, 0.6, -1.0, 0.0],
        [0.6, 1.0, -0.6, 0.0],
        [-1.0, -0.6, 1.0, 0.0],
        [0.0, 0.0, 0.0, 1],
    ]
    close(direction_consensus(updates), want)


@few
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 20), st.integers(1, 25))
def test_pieces_and_chunks_do_not_matter(seed: int, clients: int, columns: int, chunk: int) -> None:
    x = torch.randn(clients, columns, generator=torch.Generator().manual_seed(seed))
    cut = seed % columns
    gram = DirectionGram(clients, chunk=chunk)
    for piece in (x[:, :cut], x[:, cut:]):
        if piece.shape[1]:
            gram.add(piece)
    close(gram.gram, x.double() @ x.double().T)
    want = [[cos(a, b) for b in x.tolist()] for a in x.tolist()]
    close(gram.cosine(), want)
    close(direction_consensus(x), want)
    assert torch.equal(gram.cosine().diagonal(), torch.ones(clients).double())
    assert torch.equal(gram.cosine(), gram.cosine().T)


@few
@given(st.integers(0, 10**6), st.lists(st.floats(1e-30, 1e6), min_size=3, max_size=3))
def test_positive_factors_do_not_change_directions(seed: int, factors: list[float]) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 8, generator=g, dtype=torch.float64)
    close(direction_consensus(x * torch.tensor(factors).unsqueeze(1)), direction_consensus(x))
    # In float32 the squares of such updates would underflow.
    close(direction_consensus(x.float() * 2.0**-100), direction_consensus(x.float()))


def test_gram_takes_parameters_and_keeps_its_own_copy() -> None:
    gram = DirectionGram(2)
    gram.add(torch.nn.Parameter(torch.eye(2)))
    gram.gram.zero_()
    assert torch.equal(gram.gram, torch.eye(2).double())
    assert not gram.gram.requires_grad


# Selection


def test_threshold_by_hand() -> None:
    values = torch.tensor([[9.0, 0.1, 0.3, 8], [0.1, 9, 0.5, 8], [0.3, 0.5, 9, 8], [8, 8, 8, 9.0]])
    active = torch.tensor([True, True, True, False])
    # Pairs .1, .3, .5: mean .3, population deviation sqrt(.08 / 3).
    want = 0.3 - 2 * math.sqrt(0.08 / 3)
    assert selection_threshold(values, active, 2.0).item() == pytest.approx(want)
    assert selection_threshold(values, active, 0.0).item() == pytest.approx(0.3)


@pytest.mark.parametrize("active", [[False, False], [True, False]])
def test_threshold_of_fewer_than_two_is_zero(active: list[bool]) -> None:
    got = selection_threshold(torch.ones(2, 2), torch.tensor(active))
    assert got.item() == 0
    assert got.shape == ()


def test_region_weights_by_hand() -> None:
    S = torch.tensor([[1.0, 0.5, 0.8, 1], [0.5, 1, -0.5, 1], [0.8, -0.5, 1, 1], [1.0, 1, 1, 0]])
    D = torch.tensor([[1.0, 0.4, 0.5, 1], [0.4, 1, -0.9, 1], [0.5, -0.9, 1, 1], [1.0, 1, 1, 1]])
    active = torch.tensor([True, True, True, False])
    # Products .2, .4, and 0 (two negatives make no likeness): mean .2, deviation .163.
    got = region_weights(S.double(), D.double(), active, 1.0)
    want = [[1, 0.2, 0.4, 0], [0.2, 1, 0, 0], [0.4, 0, 1, 0], [0, 0, 0, 1.0]]
    torch.testing.assert_close(got, torch.tensor(want).double(), rtol=1e-6, atol=1e-7)
    got = region_weights(S.double(), D.double(), active, -0.5)
    want = [[1, 0, 0.4, 0], [0, 1, 0, 0], [0.4, 0, 1, 0], [0, 0, 0, 1.0]]
    torch.testing.assert_close(got, torch.tensor(want).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("clients", [2, 3, 4, 12])
@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 0.7, 1.0])
def test_equal_pairs_all_stand_together(beta: float, clients: int, value: float) -> None:
    # The mean of three values of 0.1 is above 0.1.
    S = torch.full((clients, clients), value, dtype=torch.float64)
    gamma = region_weights(S, torch.ones_like(S), torch.ones(clients).bool(), beta)
    close(gamma, S.clone().fill_diagonal_(1.0))


def test_expert_weights_by_hand() -> None:
    gamma = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    # q = .5, .25, .25: q * (gamma q) = .5*.625, .25*.5, .25*.25 = .3125, .125, .0625
    close(expert_weights(gamma, torch.tensor([4, 2, 2])), [0.625, 0.25, 0.125])


def test_expert_weights_at_the_edges() -> None:
    gamma = torch.rand(3, 3).fill_diagonal_(1.0)
    assert expert_weights(gamma, torch.zeros(3)).tolist() == [0, 0, 0]
    assert expert_weights(gamma, torch.tensor([0.0, 0.3, 0.0])).tolist() == [0, 1.0, 0]
    assert expert_weights(torch.ones(1, 1), torch.tensor([13])).tolist() == [1.0]
