"""Moments, bases and bits, against float64 references, brute force and what must hold."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sluiceway.channels import (
    Basis,
    Moments,
    eigenbasis,
    gradient_basis,
    label_basis,
    label_weights,
    merge_moments,
    moments_size,
    water_filling,
)

some = settings(max_examples=50)
variances = st.lists(st.floats(0, 100), min_size=1, max_size=4)


def batch(seed: int, size: int = 7, sides: tuple[int, ...] = (3, 2)) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(5, 5, generator=g)
    A = torch.randn(size, 5, *sides, generator=g) + torch.arange(5.0).view(5, *[1] * len(sides))
    return torch.einsum("cd,nd...->nc...", mix, A), torch.randint(3, (size,), generator=g)


def rows(A: Tensor) -> np.ndarray:
    """Every position of every example, [n, C]."""
    flat: np.ndarray = A.double().flatten(2).transpose(1, 2).reshape(-1, A.shape[1]).numpy()
    return flat


class TestMoments:
    @pytest.mark.parametrize("sides", [(3, 2), (4,)])
    def test_are_those_of_all_data_together(self, sides: tuple[int, ...]) -> None:
        parts = [batch(seed, size, sides) for seed, size in ((1, 7), (2, 1), (3, 30))]
        merged = merge_moments([Moments.of(A, y, 3) for A, y in parts])
        v = np.concatenate([rows(A) for A, _ in parts])
        y = np.concatenate([np.repeat(y, np.prod(sides)) for _, y in parts])
        np.testing.assert_allclose(merged.mean, v.mean(0), rtol=1e-6)
        np.testing.assert_allclose(merged.covariance, np.cov(v.T, bias=True), rtol=1e-5, atol=1e-5)
        between = sum(
            (y == k).mean() * np.outer(d := v[y == k].mean(0) - v.mean(0), d) for k in range(3)
        )
        np.testing.assert_allclose(merged.between, between, rtol=1e-5, atol=1e-5)

    def test_of_vectors(self) -> None:
        A, y = batch(4)
        flat = Moments.of(A.flatten(2).mean(2), y, 3)
        np.testing.assert_allclose(flat.mean, A.flatten(2).mean(2).mean(0), rtol=1e-5)

    @given(st.permutations([1, 2, 3]))
    @some
    def test_order_of_clients_does_not_matter(self, order: list[int]) -> None:
        def merged(seeds: list[int]) -> Tensor:
            found = merge_moments([Moments.of(*batch(seed), 3) for seed in seeds])
            return found.to_vector()

        torch.testing.assert_close(merged(order), merged([1, 2, 3]))

    def test_vector_and_tensors_come_back(self) -> None:
        moments = Moments.of(*batch(5), 3)
        vector = moments.to_vector()
        assert len(vector) == moments_size(5, 3) == 3 + 15 + 15
        for again in (
            Moments.from_vector(vector, 5, 3),
            Moments.from_tensors(moments.to_tensors()),
        ):
            torch.testing.assert_close(again.to_vector(), vector)
            torch.testing.assert_close(again.products, moments.products)
        with pytest.raises(ValueError, match="counts"):
            Moments.from_vector(torch.zeros_like(vector), 5, 3)
        with pytest.raises(ValueError, match="moments"):
            Moments.from_vector(vector[1:], 5, 3)

    def test_diverged_values_do_not_poison(self) -> None:
        A, y = batch(6)
        A[0, 0, 0, 0] = float("nan")
        assert bool(Moments.of(A, y, 3).to_vector().isfinite().all())


class TestBases:
    def test_eigenbasis_is_the_covariance_s_with_signs_fixed(self) -> None:
        S = Moments.of(*batch(7), 3).covariance
        U, found = eigenbasis(S)
        torch.testing.assert_close(U @ torch.diag(found) @ U.T, S, atol=1e-4, rtol=1e-5)
        assert bool((found.diff() <= 0).all())
        for column in U.T:
            assert float(column[column.abs().argmax()]) > 0
        again, _ = eigenbasis(S.clone())
        assert torch.equal(again, U)
        with pytest.raises(ValueError, match="finite"):
            eigenbasis(S * float("nan"))

    def test_no_orthogonal_basis_leaves_less_out(self) -> None:
        A, y = batch(8, 40)
        S = Moments.of(A, y, 3).covariance
        U, _ = eigenbasis(S)
        g = torch.Generator().manual_seed(0)
        for _ in range(20):
            Q, _ = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))
            for kept in range(1, 5):
                mine, other = ((B.T @ S @ B).diagonal()[:kept].sum() for B in (U, Q))
                assert float(mine) >= float(other) - 1e-9

    @pytest.mark.parametrize("sides", [(3, 2), (4,), ()])
    def test_there_and_back(self, sides: tuple[int, ...]) -> None:
        A, y = batch(9, 6, sides or (1,))
        A = A if sides else A.squeeze(-1)
        moments = Moments.of(A, y, 3)
        U, scale = gradient_basis(moments.covariance, torch.rand(5))
        basis = Basis(U, moments.mean, scale, torch.ones(5)).to(torch.device("cpu"))
        z = basis.forward(A)
        torch.testing.assert_close(basis.inverse(z), A, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(basis.gradient_back(basis.gradient(A)), A, atol=1e-5, rtol=1e-5)
        centred = (A.flatten(2) if sides else A.unsqueeze(2)) - moments.mean.float().view(-1, 1)
        expected = torch.einsum("dc,d,bds->bcs", U.float(), scale.float(), centred)
        torch.testing.assert_close(z.flatten(2) if sides else z.unsqueeze(2), expected)

    def test_label_basis_by_hand(self) -> None:
        S = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
        B = torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))
        # With weight w the diagonal is [4, 1 + 5 w].
        for weight, first in ((0.0, 0), (0.5, 0), (0.7, 1)):
            assert int(label_basis(S, B, weight)[:, 0].argmax()) == first
        torch.testing.assert_close(label_basis(S, 0 * B, 1.0), eigenbasis(S)[0])

    def test_gradient_basis_by_hand(self) -> None:
        S = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
        U, scale = gradient_basis(S, torch.tensor([1.0, 9.0]))
        torch.testing.assert_close(scale, torch.tensor([0.2, 1.8], dtype=torch.float64).sqrt())
        assert int(U[:, 0].argmax()) == 1
        _, flat = gradient_basis(S, torch.zeros(2))
        assert flat.tolist() == [1, 1]


class TestBits:
    @given(variances, st.integers(0, 12))
    @some
    def test_greedy_is_optimal_among_whole_bits(self, found: list[float], total: int) -> None:
        v = torch.tensor(found, dtype=torch.float64)

        def error(bits: tuple[int, ...]) -> float:
            return sum(x * 4.0**-b for x, b in zip(found, bits, strict=True))

        most = 4
        bits = water_filling(v, total, most)
        assert int(bits.sum()) <= total
        assert bool((bits <= most).all())
        every = (b for b in product(range(most + 1), repeat=len(found)) if sum(b) <= total)
        best = min(error(b) for b in every)
        assert error(tuple(bits.tolist())) <= best * (1 + 1e-12)

    def test_by_hand(self) -> None:
        assert water_filling(torch.tensor([16.0, 4.0, 1.0, 0.0]), 3).tolist() == [2, 1, 0, 0]
        assert water_filling(torch.tensor([1.0, 1.0]), 1).tolist() == [1, 0]
        assert water_filling(torch.tensor([1.0, 0.0]), 99).tolist() == [8, 0]
        with pytest.raises(ValueError, match="at least 0"):
            water_filling(torch.tensor([-1.0]), 1)


class TestLabelWeights:
    def test_by_hand(self) -> None:
        # Of the variance of three components 0, 1/2 and 1/4 are between classes; the mean is 1/4.
        U = torch.eye(3).flip(0)
        S, between = torch.diag(torch.tensor([4.0, 2, 5])), torch.diag(torch.tensor([1.0, 1, 0]))
        found = label_weights(S, between, U, 3.0)
        np.testing.assert_allclose(found, np.sqrt([1, 1 + 3 * 2, 1 + 3 * 1]))

    def test_nothing_to_weigh(self) -> None:
        S = torch.eye(3)
        for between, amount in ((torch.zeros(3, 3), 2.0), (S / 2, 0.0)):
            assert torch.equal(label_weights(S, between, S, amount), torch.ones(3).double())
        assert bool((label_weights(torch.zeros(3, 3), S, S, 1.0) == 1).all())

    def test_are_undone(self) -> None:
        A, _ = batch(3)
        U = eigenbasis(Moments.of(A, torch.zeros(7).long(), 1).covariance)[0].float()
        ones = torch.ones(5)
        plain = Basis(U, ones, ones * 2, ones)
        weighed = Basis(U, ones, ones * 2, torch.arange(1.0, 6))
        torch.testing.assert_close(weighed.inverse(weighed.forward(A)), A, atol=1e-4, rtol=1e-4)
        times = torch.arange(1.0, 6).view(5, 1, 1)
        torch.testing.assert_close(weighed.forward(A), plain.forward(A) * times)
        assert torch.equal(weighed.gradient(A), plain.gradient(A))
