"""Directions and the choice of like-minded pairs: small cases by hand, and loops."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tests.fedalign.loops import close, cos, few, seeds
from torch import Tensor

from sluiceway.fedalign import DirectionGram, expert_weights, region_weights, selection_threshold


def directions(*pieces: Tensor, chunk: int = 16384) -> DirectionGram:
    gram = DirectionGram(len(pieces[0]), chunk=chunk)
    for piece in pieces:
        gram.add(piece)
    return gram


def test_directions_by_hand() -> None:
    updates = torch.tensor([[3.0, 0.0], [3.0, 4.0], [-1.0, 0.0], [0.0, 0.0]])
    want = [[1, 0.6, -1, 0], [0.6, 1, -0.6, 0], [-1, -0.6, 1, 0], [0, 0, 0, 1]]
    close(directions(updates).cosine(), want)
    assert not directions(torch.nn.Parameter(updates)).gram.requires_grad


@few
@given(seeds, st.integers(1, 5), st.integers(2, 20), st.integers(1, 25))
def test_pieces_and_chunks_do_not_matter(seed: int, clients: int, columns: int, chunk: int) -> None:
    x = torch.randn(clients, columns, generator=torch.Generator().manual_seed(seed))
    cut = 1 + seed % (columns - 1)
    gram = directions(x[:, :cut], x[:, cut:], chunk=chunk)
    close(gram.gram, x.double() @ x.double().T)
    close(gram.cosine(), [[cos(a, b) for b in x.tolist()] for a in x.tolist()])
    assert torch.equal(gram.cosine().diagonal(), torch.ones(clients).double())
    assert torch.equal(gram.cosine(), gram.cosine().T)


@few
@given(seeds, st.lists(st.floats(1e-30, 1e6), min_size=3, max_size=3))
def test_positive_factors_do_not_change_directions(seed: int, factors: list[float]) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 8, generator=g, dtype=torch.float64)
    want = directions(x).cosine()
    close(directions(x * torch.tensor(factors).unsqueeze(1)).cosine(), want)
    # In float32 the squares of such updates would underflow.
    close(directions(x.float() * 2.0**-100).cosine(), directions(x.float()).cosine())


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


@few
@given(st.sampled_from([0.0, 1.0]), st.integers(2, 12), st.floats(0.01, 1.0))
@example(0.0, 3, 0.1)  # the mean of three values of 0.1 is above 0.1
def test_equal_pairs_all_stand_together(beta: float, clients: int, value: float) -> None:
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
