"""Experts matched by the regions that they serve."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sluiceway.fedalign import match_experts


def regions_of(experts: int, noise: float, clients: int, seed: int) -> Tensor:
    """Distant centres, one an expert, as each client measures them: [N, E, d]."""
    g = torch.Generator().manual_seed(seed)
    centres = 5 * torch.eye(experts, experts + 3)
    return centres + noise * torch.randn(clients, experts, experts + 3, generator=g)


def test_by_hand() -> None:
    a, b, c = torch.tensor([3.0, 0, 0]), torch.tensor([0, 3.0, 0]), torch.tensor([0, 0, 3.0])
    regions = torch.stack([torch.stack(rows) for rows in ((a, b, c), (a, b, c), (b, c, a))])
    order = match_experts(regions, torch.ones(3, 3))
    # Client 2 holds the first role at index 2, the second at 0, the third at 1.
    assert order.tolist() == [[0, 1, 2], [0, 1, 2], [2, 0, 1]]


@settings(max_examples=40)
@given(st.integers(2, 6), st.integers(3, 7), st.integers(0, 1000), st.data())
def test_what_was_put_in_another_order_is_put_back(
    experts: int, clients: int, seed: int, data: st.DataObject
) -> None:
    """Whatever the permutations of fewer than half of the clients."""
    regions, load = regions_of(experts, 0.3, clients, seed), torch.ones(clients, experts)
    given_orders = [torch.arange(experts)] * clients
    for client in range((clients - 1) // 2):
        given_orders[client] = torch.tensor(data.draw(st.permutations(range(experts))))
    mixed = torch.stack([r[order] for r, order in zip(regions, given_orders, strict=True)])
    found = match_experts(mixed, load)
    for order, back in zip(given_orders, found, strict=True):
        assert order[back].tolist() == list(range(experts))


@settings(max_examples=40)
@given(st.integers(2, 5), st.integers(0, 1000))
def test_it_is_the_best_of_all_permutations(experts: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    regions = torch.randn(2, experts, 4, generator=g).double()
    load = torch.tensor([[2.0] * experts, [1.0] * experts])  # so that client 0 sets the order
    (_, order) = match_experts(regions, load, least_gain=0)
    mean = (regions * load.unsqueeze(-1)).sum((0, 1)) / load.sum()
    units = torch.nn.functional.normalize(regions - mean, dim=-1)

    def gain(permutation: tuple[int, ...]) -> float:
        return float((units[0] * units[1][list(permutation)]).sum())

    best = max(gain(p) for p in itertools.permutations(range(experts)))
    assert abs(gain(tuple(order.tolist())) - best) < 1e-9


@settings(max_examples=30)
@given(st.permutations(range(5)), st.integers(0, 100))
def test_the_order_of_clients_changes_nothing(shuffle: list[int], seed: int) -> None:
    regions = regions_of(4, 0.3, 5, seed)
    regions[1] = regions[1].roll(1, 0)
    load = torch.rand(5, 4, generator=torch.Generator().manual_seed(seed)) + 0.5
    assert torch.equal(
        match_experts(regions[shuffle], load[shuffle]), match_experts(regions, load)[shuffle]
    )


def test_experts_without_a_token_and_regions_by_chance_move_nothing() -> None:
    kept = [0, 1, 2, 3]
    regions = regions_of(4, 0.1, 4, 0)
    load = torch.ones(4, 4)
    load[3, 1:] = 0
    assert match_experts(regions, load).tolist() == [kept] * 4
    assert match_experts(torch.zeros(2, 4, 8), torch.ones(2, 4)).tolist() == [kept] * 2
    close = torch.ones(3, 4, 8) + 0.01 * regions_of(4, 0.0, 3, 0)[..., :7].repeat(1, 1, 2)[..., :8]
    assert match_experts(close, torch.ones(3, 4)).tolist() == [kept] * 3
