"""Semantic-aware aggregation against loops written from the equations."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sluiceway.fedalign import (
    DirectionGram,
    centred_regions,
    direction_consensus,
    expert_weights,
    region_similarity,
    region_weights,
    selection_threshold,
    semantic_weights,
    smoothed_weights,
)

few = settings(max_examples=25, deadline=None)
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
    return regions, load, torch.stack([direction_consensus(u) for u in updates])


layers = st.builds(layer, st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4))


def close(got: Tensor, want: Tensor | list[float] | list[list[float]]) -> None:
    wanted = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cos(a: list[float], b: list[float]) -> float:
    scale = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / scale if scale else 0.0


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


# Regions


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


# The whole layer


@few
@given(layers, betas)
def test_layer_equals_the_loops(given_layer: Layer, beta: float) -> None:
    close(semantic_weights(*given_layer, beta), loop_weights(*given_layer, beta))


def test_beta_reaches_the_experts() -> None:
    given_layer = layer(5, 5, 3)
    strict, loose = (semantic_weights(*given_layer, beta) for beta in (0.0, 2.0))
    assert (strict - loose).abs().max() > 0.01
    assert not torch.equal(semantic_weights(*given_layer), loose)


@few
@given(layers, betas)
def test_invariants(given_layer: Layer, beta: float) -> None:
    regions, load, D = given_layer
    weights = semantic_weights(regions, load, D, beta)
    assert weights.shape == load.shape
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
        close(idle.sum(1), torch.ones(len(idle)).double())


@few
@given(layers, betas)
def test_permuting_clients_permutes_weights_only(given_layer: Layer, beta: float) -> None:
    regions, load, D = given_layer
    order = torch.randperm(len(load))
    weights = semantic_weights(regions, load, D, beta)
    moved = semantic_weights(regions[order], load[order], D[:, order][:, :, order], beta)
    close(moved, weights[order])
    updates = torch.randn(*load.shape, 3, dtype=torch.float64)
    total = (weights.unsqueeze(-1) * updates).sum(0)
    close((moved.unsqueeze(-1) * updates[order]).sum(0), total)


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
@given(layers)
def test_permuting_experts_permutes_weights(given_layer: Layer) -> None:
    regions, load, D = given_layer
    order = torch.randperm(load.shape[1])
    moved = semantic_weights(regions[:, order], load[:, order], D[order])
    close(moved, semantic_weights(regions, load, D)[:, order])


@few
@given(st.integers(0, 10**6), st.integers(1, 5), betas)
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


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda r, c: centred_regions(r, c.T), "load: expected shape [2, 3], got [3, 2]"),
        (lambda r, c: centred_regions(c, c), "regions: expected shape [N, E, d], got [2, 3]"),
        (lambda r, c: region_similarity(r, c[0]), "load: expected shape [2, 3], got [3]"),
        (lambda r, c: semantic_weights(r, c, r), "D: expected shape [3, 2, 2], got [2, 3, 4]"),
        (lambda r, c: direction_consensus(r), "updates: expected shape [N, P], got [2, 3, 4]"),
        (lambda r, c: DirectionGram(3).add(c), "updates: expected shape [3, P], got [2, 3]"),
        (lambda r, c: DirectionGram(0), "clients: expected at least 1, got 0"),
        (lambda r, c: DirectionGram(1, chunk=0), "chunk: expected at least 1, got 0"),
        (
            lambda r, c: selection_threshold(c, c[0] > 0),
            "values: expected shape [N, 2], got [2, 3]",
        ),
        (
            lambda r, c: region_weights(c @ c.T, c @ c.T, c[0] > 0),
            "active: expected shape [2], got [3]",
        ),
        (lambda r, c: expert_weights(c @ c.T, c[0]), "load: expected shape [2], got [3]"),
    ],
)
def test_wrong_shapes_are_named(call: Callable[[Tensor, Tensor], object], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        call(torch.rand(2, 3, 4), torch.rand(2, 3))
