"""Second moments and the least-squares combination, against loops in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sluiceway import fedalign

SEEDS = st.integers(0, 10_000)


def rows_of(seed: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Tokens [T, width] and their weights, some of them 0."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, generator=g).double() * (torch.rand(tokens, generator=g) > 0.2)
    return torch.randn(tokens, width, generator=g).double(), weights


def moment_by_loop(rows: Tensor, weights: Tensor, tokens: float) -> Tensor:
    found = torch.zeros(rows.shape[1], rows.shape[1]).double()
    for x, v in zip(rows, weights, strict=True):
        for a in range(len(x)):
            for b in range(len(x)):
                found[a, b] += v * x[a] * x[b] / tokens
    return found


def combined(
    changes: list[Tensor], moments: list[Tensor], shares: list[float], ridge: float = 1e-9
) -> Tensor:
    """`region_step` of clients' changes, their mean by shares."""
    total = sum(p * a for p, a in zip(shares, moments, strict=True))
    weighted = sum(p * c @ a for p, c, a in zip(shares, changes, moments, strict=True))
    mean = sum(p * c for p, c in zip(shares, changes, strict=True)) / sum(shares)
    assert isinstance(weighted, Tensor)
    assert isinstance(total, Tensor)
    assert isinstance(mean, Tensor)
    return fedalign.region_step(weighted, total, mean, ridge)


@given(SEEDS, st.integers(0, 6), st.integers(1, 4))
@settings(max_examples=25)
def test_the_moment_is_that_of_a_loop(seed: int, tokens: int, width: int) -> None:
    rows, weights = rows_of(seed, tokens, width)
    rows = fedalign.with_one(rows)
    expected = moment_by_loop(rows, weights, 7.0)
    torch.testing.assert_close(fedalign.second_moment(rows, weights, 7.0), expected)
    # So many factors as there are tokens are the matrix itself.
    packed = fedalign.low_rank_moment(rows, weights, 7.0, rank=max(tokens, 1))
    exact = fedalign.received_moment(packed, width + 1, factor=1.0)
    torch.testing.assert_close(exact.matrix(), expected)


def test_the_moment_by_hand() -> None:
    rows = fedalign.with_one(torch.tensor([[2.0], [4.0]]))
    found = fedalign.second_moment(rows, torch.tensor([1.0, 0.5]), tokens=4)
    assert found.tolist() == [[3.0, 1.0], [1.0, 0.375]]  # (4 + 8) / 4, (2 + 2) / 4, (1 + .5) / 4
    with pytest.raises(ValueError, match="weights"):
        fedalign.second_moment(rows, torch.ones(3), 1)


@given(SEEDS, st.integers(1, 8), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=25)
def test_a_triangle_is_unpacked_as_it_was(seed: int, size: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    half = torch.randn(size, size, generator=g)
    matrix = (half + half.T).to(dtype)
    packed = fedalign.packed_triangle(matrix)
    assert packed.shape == (size * (size + 1) // 2,)
    assert torch.equal(fedalign.unpacked_triangle(packed), matrix)
    with pytest.raises(ValueError, match="packed"):
        fedalign.unpacked_triangle(torch.zeros(5))


def test_leading_eigenvectors_and_the_whole_diagonal_are_kept() -> None:
    g = torch.Generator().manual_seed(0)
    scales = torch.tensor([10.0, 8.0, 6.0] + [0.1] * 37)
    rows = torch.randn(400, 40, generator=g) * scales
    turned = rows @ torch.linalg.qr(torch.randn(40, 40, generator=g)).Q
    weights = torch.rand(400, generator=g)
    exact = fedalign.second_moment(turned, weights, 400)
    values, vectors = torch.linalg.eigh(exact)
    best = (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T
    packed = fedalign.low_rank_moment(turned, weights, 400, rank=3)
    torch.testing.assert_close(packed[:-1].T @ packed[:-1], best, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(packed[-1], exact.diagonal())
    assert torch.equal(packed, fedalign.low_rank_moment(turned, weights, 400, rank=3))


@given(SEEDS, st.floats(0, 1))
@settings(max_examples=25)
def test_a_factor_scales_what_is_off_the_diagonal(seed: int, factor: float) -> None:
    rows, weights = rows_of(seed, 9, 5)
    exact = fedalign.second_moment(rows, weights, 9)
    expected = factor * exact + (1 - factor) * exact.diagonal().diag()
    change = torch.randn(3, 5).double()
    for packed in (
        fedalign.packed_triangle(exact),
        fedalign.low_rank_moment(rows, weights, 9, rank=9),
    ):
        found = fedalign.received_moment(packed, 5, factor)
        torch.testing.assert_close(found.matrix(), expected)
        torch.testing.assert_close(
            found.add_after(change, torch.zeros_like(change), 1.0), change @ expected
        )
        part = fedalign.received_moment(packed, 4, factor)  # a map without a bias
        torch.testing.assert_close(part.matrix(), expected[:4, :4])


@given(SEEDS)
@settings(max_examples=25)
def test_the_combination_minimises_the_error_on_the_clients_tokens(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    shares = [0.2, 0.3, 0.5]
    tokens = [rows_of(seed + i, 12, 4) for i in range(3)]
    tokens = [(x, v + 0.01) for x, v in tokens]
    changes = [torch.randn(2, 4, generator=g).double() for _ in shares]
    moments = [fedalign.second_moment(x, v, len(x)) for x, v in tokens]
    step = combined(changes, moments, shares)
    # A weighted least-squares problem in all clients' tokens, solved row by row.
    inputs = torch.cat(
        [x * (p * v / len(x)).sqrt()[:, None] for p, (x, v) in zip(shares, tokens, strict=True)]
    )
    wanted = torch.cat(
        [
            (x * (p * v / len(x)).sqrt()[:, None]) @ c.T
            for p, (x, v), c in zip(shares, tokens, changes, strict=True)
        ]
    )
    expected = torch.linalg.lstsq(inputs, wanted).solution.T
    torch.testing.assert_close(step, expected, atol=1e-5, rtol=1e-5)


@given(SEEDS, st.integers(0, 3))
@settings(max_examples=25)
def test_one_client_alone_keeps_its_change_whatever_its_moment(seed: int, tokens: int) -> None:
    change = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).double()
    moment = fedalign.second_moment(*rows_of(seed, tokens, 4), 5)  # singular
    found = combined([change], [moment], [0.7])
    torch.testing.assert_close(found, change, atol=1e-5, rtol=0)


@given(SEEDS)
@settings(max_examples=25)
def test_equal_moments_give_the_mean(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    shares = [0.2, 0.8]
    changes = [torch.randn(3, 4, generator=g).double() for _ in shares]
    moment = fedalign.second_moment(*rows_of(seed, 3, 4), 3)  # singular
    expected = 0.2 * changes[0] + 0.8 * changes[1]
    found = combined(changes, [moment] * 2, shares)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@given(SEEDS, st.permutations(range(4)))
@settings(max_examples=25)
def test_the_order_of_clients_changes_nothing(seed: int, order: list[int]) -> None:
    g = torch.Generator().manual_seed(seed)
    shares = [0.1, 0.2, 0.3, 0.4]
    changes = [torch.randn(3, 4, generator=g).double() for _ in shares]
    moments = [fedalign.second_moment(*rows_of(seed + i, 9, 4), 9) for i in range(4)]
    moved = combined(*([them[i] for i in order] for them in (changes, moments, shares)))
    torch.testing.assert_close(moved, combined(changes, moments, shares), atol=1e-6, rtol=1e-6)


def test_clients_in_different_directions_both_keep_theirs() -> None:
    first, second = torch.tensor([[1.0, 9.0, 4.0]]), torch.tensor([[7.0, 2.0, 6.0]])
    moments = [torch.diag(torch.tensor(d)) for d in ([5.0, 0.0, 0.0], [0.0, 0.1, 0.0])]
    found = combined([first, second], moments, [0.5, 0.5])
    # Input 0 is the first client's, 1 the second's; nobody has seen 2, where the mean stands.
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0, 5.0]]).double(), atol=1e-5, rtol=0)


def test_no_moment_at_all_is_the_mean() -> None:
    mean = torch.tensor([[1.0, 2.0]])
    found = fedalign.region_step(torch.zeros(1, 2), torch.zeros(2, 2), mean)
    assert torch.equal(found, mean.double())


@given(SEEDS)
@settings(max_examples=25)
def test_a_moment_as_it_is_sent_passes_and_a_wrong_one_does_not(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scales = 10 ** (2 * torch.rand(60, generator=g) - 1)
    rows = (torch.randn(90, 60, generator=g) + 2) * scales
    rows[:, 7] = 0
    weights = torch.rand(90, generator=g)
    whole = fedalign.packed_triangle(fedalign.second_moment(rows, weights, 90)).bfloat16()
    low = fedalign.low_rank_moment(rows, weights, 90, rank=20).bfloat16()
    assert fedalign.moment_fault(whole) is None
    assert fedalign.moment_fault(low) is None
    assert fedalign.moment_fault(torch.zeros_like(whole)) is None
    assert fedalign.moment_fault(low[-1:]) is None  # a diagonal alone
    swapped = whole.clone()
    swapped[1] = 3 * swapped[0].sqrt() * swapped[60].sqrt() + 1
    assert fedalign.moment_fault(swapped) == "it is not positive semidefinite"
    assert fedalign.moment_fault(-whole) == "a mean square below zero"
    assert fedalign.moment_fault(torch.cat([2 * low[:-1], low[-1:]])) is not None


@given(SEEDS, st.floats(0, 1))
@settings(max_examples=25)
def test_a_moment_from_the_update_itself(seed: int, factor: float) -> None:
    change = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    found = fedalign.update_moment(change, 0.25, factor=factor).matrix()
    exact = change.T @ change
    exact = 0.25 * exact / exact.trace()
    torch.testing.assert_close(found, factor * exact + (1 - factor) * exact.diagonal().diag())
    assert float(found.trace()) == pytest.approx(0.25)
    assert not fedalign.update_moment(torch.zeros(3, 5), 0.25).matrix().any()


@given(SEEDS, st.integers(1, 60))
@settings(max_examples=25)
def test_an_estimate_of_low_rank_keeps_directions_and_is_definite(seed: int, rank: int) -> None:
    g = torch.Generator().manual_seed(seed)
    direction = torch.randn(6, generator=g)
    changes = torch.randn(40, 1, generator=g) * direction  # of rank one: no sum of rows turns it
    found = fedalign.update_moment(changes, 1.0, rank).matrix()
    outer = torch.outer(direction, direction)
    ratio = (found / outer).masked_select(~torch.eye(6, dtype=torch.bool))
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), atol=1e-5, rtol=1e-3)
    noisy = fedalign.update_moment(torch.randn(40, 6, generator=g), 1.0, rank).matrix()
    assert float(torch.linalg.eigvalsh(noisy).min()) > 0
    if rank >= 40:
        exact = fedalign.update_moment(changes, 1.0).matrix()
        torch.testing.assert_close(found, exact)
