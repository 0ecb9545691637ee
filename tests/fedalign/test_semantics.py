"""Semantic-aware aggregation against loops written from the equations."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fedalign.loops import close, cos, few, seeds
from torch import Tensor

from sluiceway.fedalign import (
    DirectionGram,
    centred_regions,
    expert_weights,
    region_similarity,
    region_weights,
    semantic_weights,
    smoothed_weights,
)

Layer = tuple[Tensor, Tensor, Tensor]
betas = st.sampled_from([0.0, 0.5, 1.0, 2.0])


def layer(seed: int, clients: int, experts: int) -> Layer:
    """regions [N, E, d] about a centre per expert, load [N, E] with zeros, D [E, N, N].

    Clients agree well enough that many products S * D are positive, so that tau decides."""
    torch.manual_seed(seed)
    regions = 3 + 2 * torch.randn(1, experts, 4, dtype=torch.float64)
    regions = regions + torch.randn(clients, experts, 4, dtype=torch.float64)
    load = torch.randint(0, 20, (clients, experts))
    load = load * (torch.rand(clients, experts) > 0.25)
    updates = 0.8 + torch.randn(experts, clients, 6, dtype=torch.float64)
    grams = [DirectionGram(clients) for _ in range(experts)]
    for gram, update in zip(grams, updates, strict=True):
        gram.add(update)
    return regions, load, torch.stack([gram.cosine() for gram in grams])


layers = st.builds(layer, seeds, st.integers(1, 5), st.integers(1, 4))


def loop_centred(regions: Tensor, load: Tensor) -> Tensor:
    clients, experts, d = regions.shape
    total, mean = 0.0, torch.zeros(d, dtype=torch.float64)
    for i in range(clients):
        for e in range(experts):
            if load[i, e] > 0:
                total += load[i, e].item()
                mean += load[i, e].item() * regions[i, e].double()
    out = torch.zeros(clients, experts, d, dtype=torch.float64)
    for i in range(clients):
        for e in range(experts):
            if load[i, e] > 0:
                out[i, e] = regions[i, e].double() - mean / total
                if out[i, e].abs().max() < 1e-10:
                    out[i, e] = 0
    return out


def loop_weights(regions: Tensor, load: Tensor, D: Tensor, beta: float) -> Tensor:
    clients, experts, _ = regions.shape
    centred = loop_centred(regions, load).tolist()
    out = torch.zeros(clients, experts, dtype=torch.float64)
    for e in range(experts):
        active = [i for i in range(clients) if load[i, e] > 0]
        gamma = {(i, i): 1.0 for i in active}
        value = {
            (i, j): max(cos(centred[i][e], centred[j][e]), 0) * max(D[e, i, j].item(), 0)
            for i in active
            for j in active
        }
        pairs = [value[i, j] for i in active for j in active if i < j]
        tau = 0.0
        if pairs:
            mean = sum(pairs) / len(pairs)
            tau = mean - beta * math.sqrt(sum((v - mean) ** 2 for v in pairs) / len(pairs))
        for i in active:
            for j in active:
                if i != j:
                    gamma[i, j] = value[i, j] if value[i, j] >= tau - 1e-9 else 0.0
        count = sum(load[i, e].item() for i in active)
        q = {i: load[i, e].item() / count for i in active}
        raw = {i: q[i] * sum(gamma[i, j] * q[j] for j in active) for i in active}
        for i in active:
            out[i, e] = raw[i] / sum(raw.values())
    return out


def loop_smoothed(gamma: Tensor, load: Tensor) -> list[float]:
    """Every client's update averaged with its like, then all by their tokens: written as that."""
    clients, total = len(load), float(load.sum())
    q = [float(c) / total if total else 0.0 for c in load]
    weights = [0.0] * clients
    for i in range(clients):
        heard = sum(float(gamma[i, j]) * q[j] for j in range(clients))
        for j in range(clients):
            if q[i] > 0:
                weights[j] += q[i] * float(gamma[i, j]) * q[j] / heard
    return weights


def test_centred_regions_by_hand() -> None:
    regions = torch.tensor([[[4.0, 0.0], [0.0, 4.0]], [[8.0, 8.0], [float("nan"), 99.0]]])
    load = torch.tensor([[1, 2], [1, 0]])
    # mu = (1*(4,0) + 2*(0,4) + 1*(8,8)) / 4 = (3, 4)
    got = centred_regions(regions, load)
    assert got.tolist() == [[[1.0, -4.0], [-3.0, 0.0]], [[5.0, 4.0], [0.0, 0.0]]]


@few
@given(layers)
def test_regions_equal_the_loops(given_layer: Layer) -> None:
    regions, load, _ = given_layer
    centred = loop_centred(regions, load)
    close(centred_regions(regions, load), centred)
    S = region_similarity(regions, load)
    for e in range(regions.shape[1]):
        for i in range(len(regions)):
            for j in range(len(regions)):
                want = cos(centred[i, e].tolist(), centred[j, e].tolist())
                if i == j:
                    want = float(load[i, e] > 0)
                assert S[e, i, j].item() == pytest.approx(want, abs=1e-9)
    assert torch.equal(S, S.mT)


def test_no_load_at_all_gives_zeros() -> None:
    regions = torch.full((2, 3, 4), float("nan"))
    load = torch.zeros(2, 3)
    assert torch.equal(centred_regions(regions, load), torch.zeros(2, 3, 4).double())
    assert torch.equal(region_similarity(regions, load), torch.zeros(3, 2, 2).double())


def test_a_common_offset_is_removed() -> None:
    # Uncentred, the cosine of these two is .9998; about the mean they are opposite.
    regions = torch.tensor([[[100.0, 1.0]], [[100.0, -1.0]]])
    close(region_similarity(regions, torch.ones(2, 1))[0], [[1.0, -1.0], [-1.0, 1.0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rounding_is_no_direction(dtype: torch.dtype) -> None:
    # Three equal regions: their mean differs from them by rounding at most.
    torch.manual_seed(0)
    regions = torch.randn(50, dtype=torch.float64).to(dtype).expand(3, 1, 50)
    load = torch.tensor([[1.0], [3.0], [7.0]])
    assert torch.equal(centred_regions(regions, load), torch.zeros(3, 1, 50).double())
    assert torch.equal(region_similarity(regions, load)[0], torch.eye(3).double())


@few
@given(layers, betas)
def test_layer_equals_the_loops(given_layer: Layer, beta: float) -> None:
    regions, load, D = given_layer
    weights = semantic_weights(*given_layer, beta)
    close(weights, loop_weights(*given_layer, beta))
    if beta == 1.0:  # the default
        assert torch.equal(semantic_weights(*given_layer), weights)
    assert (weights >= 0).all()
    close(weights.sum(0), (load.sum(0) > 0).double())
    assert (weights[load == 0] == 0).all()
    alone = (load > 0) & ((load > 0).sum(0) == 1)
    assert (weights[alone] == 1).all()
    S = region_similarity(regions, load)
    for e in range(load.shape[1]):
        gamma = region_weights(S[e], D[e], load[:, e] > 0, beta)
        assert torch.equal(gamma, gamma.T)
        assert torch.equal(gamma.diagonal(), torch.ones(len(load)).double())
        assert ((gamma >= 0) & (gamma <= 1)).all()
        idle = gamma[load[:, e] == 0]
        close(idle.sum(1), torch.ones(len(idle)))


@few
@given(layers, betas)
def test_the_order_of_clients_and_experts_does_not_matter(given_layer: Layer, beta: float) -> None:
    regions, load, D = given_layer
    weights = semantic_weights(regions, load, D, beta)
    order = torch.randperm(len(load))
    moved = semantic_weights(regions[order], load[order], D[:, order][:, :, order], beta)
    close(moved, weights[order])
    order = torch.randperm(load.shape[1])
    close(semantic_weights(regions[:, order], load[:, order], D[order], beta), weights[:, order])


@few
@given(layers, betas)
def test_smoothed_weights_equal_the_loops(given_layer: Layer, beta: float) -> None:
    regions, load, D = given_layer
    S = region_similarity(regions, load)
    whole = semantic_weights(*given_layer, beta, "smooth")
    for e in range(load.shape[1]):
        gamma = region_weights(S[e], D[e], load[:, e] > 0, beta)
        close(smoothed_weights(gamma, load[:, e]), loop_smoothed(gamma, load[:, e]))
        close(whole[:, e], loop_smoothed(gamma, load[:, e]))
    close(whole.sum(0), (load.sum(0) > 0).double())
    assert (whole[load == 0] == 0).all()


def test_smoothed_groups_and_strangers_keep_their_share() -> None:
    # Clients 0 and 1 are alike, 2 is alone.
    gamma = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    load = torch.tensor([2, 2, 1])
    close(smoothed_weights(gamma, load), [0.4, 0.4, 0.2])
    # Two of four tokens of one mind outweigh: 2*4, 2*4 against 1*1.
    close(expert_weights(gamma, load), [8 / 17, 8 / 17, 1 / 17])


@few
@given(seeds, st.integers(1, 5), betas)
def test_identical_clients_weigh_alike(seed: int, clients: int, beta: float) -> None:
    regions, load, _ = layer(seed, 1, 3)
    load = load + 1
    D = torch.ones(3, clients, clients)
    regions, load = regions.expand(clients, -1, -1), load.expand(clients, -1)
    weights = semantic_weights(regions, load, D, beta)
    close(weights, torch.full((clients, 3), 1.0).double() / clients)


def test_like_minded_clients_outweigh_a_stranger() -> None:
    # Expert 0 means the same to clients 0 and 1, and something else to client 2.
    regions = torch.tensor([[[2.0, 0], [-2, 0]], [[2.0, 0.1], [-2, 0]], [[0, 5.0], [-2, 0]]])
    D = torch.ones(2, 3, 3)
    D[0, 2, :2] = D[0, :2, 2] = -0.5
    weights = semantic_weights(regions, torch.ones(3, 2), D)
    assert weights[0, 0] == pytest.approx(0.4, abs=0.01)
    assert weights[2, 0] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("form", ["select", "smooth"])
def test_without_regions_clients_weigh_by_their_load(form: Literal["select", "smooth"]) -> None:
    """Experts: nobody tells a region; one of three does not; all do."""
    regions, load, D = layer_of_three()
    regions[:, 0] = 0
    regions[2, 1] = 0
    found = semantic_weights(regions, load, D, 1.0, form)
    torch.testing.assert_close(found[:, 0], load[:, 0].double() / load[:, 0].sum())
    # The silent one agrees with the two others, which are opposed to each other.
    gamma = torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 1]]).double()
    weigh = expert_weights if form == "select" else smoothed_weights
    torch.testing.assert_close(found[:, 1], weigh(gamma, load[:, 1]))
    torch.testing.assert_close(found.sum(0), torch.ones(3).double())


def layer_of_three() -> tuple[Tensor, Tensor, Tensor]:
    """Regions [3, 3, 2], load [3, 3] and directions [3, 3, 3]; clients 0 and 1 are opposed."""
    regions = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).unsqueeze(1).repeat(1, 3, 1)
    load = torch.tensor([[3.0, 4, 5], [1, 4, 5], [6, 2, 5]])
    return regions, load, torch.ones(3, 3, 3)
