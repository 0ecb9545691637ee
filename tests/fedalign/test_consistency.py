"""The server's half of routing alignment: client weights and the global routing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fedalign.loops import close, few, seeds
from torch import Tensor

from sluiceway.fedalign import (
    consistency_score,
    consistency_weights,
    global_routing,
    overlap,
)

Layer = tuple[Tensor, Tensor, Tensor]


def layer(seed: int, clients: int, experts: int) -> Layer:
    """r [N, E], r_g [E], margin [N, E], with zeros among the margins and some dead experts."""
    torch.manual_seed(seed)
    r = torch.rand(clients, experts, dtype=torch.float64) + 0.01
    r_g = torch.rand(experts, dtype=torch.float64)
    r_g = r_g * (torch.rand(experts) > 0.2)
    margin = torch.rand(clients, experts, dtype=torch.float64)
    margin = margin * (torch.rand(clients, experts) > 0.4)
    return r / r.sum(1, keepdim=True), r_g, margin


layers = st.builds(layer, seeds, st.integers(1, 6), st.integers(1, 5))


def loop_weights(r: Tensor, r_g: Tensor, margin: Tensor) -> Tensor:
    clients, experts = r.shape
    w = torch.zeros(clients, experts, dtype=torch.float64)
    for e in range(experts):
        o = [r[i, e].item() * r_g[e].item() for i in range(clients)]
        s = [o[i] * margin[i, e].item() for i in range(clients)]
        if sum(s) == 0:
            s = o
        if sum(s) == 0:
            s = [1.0] * clients
        for i in range(clients):
            w[i, e] = s[i] / sum(s)
    return w


def loop_global(w: Tensor, r: Tensor) -> list[float]:
    clients, experts = r.shape
    mixed = [sum((w[i, e] * r[i, e]).item() for i in range(clients)) for e in range(experts)]
    return [value / sum(mixed) for value in mixed]


def test_weights_by_hand() -> None:
    r = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    r_g = torch.tensor([0.5, 0.5], dtype=torch.float64)
    margin = torch.tensor([[0.5, 0.3], [0.25, 0.1]], dtype=torch.float64)
    # s = .8*.5*.5, .4*.5*.25 = .2, .05;  .2*.5*.3, .6*.5*.1 = .03, .03
    w = consistency_weights(r, r_g, margin)
    close(w, [[0.8, 0.5], [0.2, 0.5]])
    # mixed = .8*.8 + .2*.4, .5*.2 + .5*.6 = .72, .4
    close(global_routing(w, r), [0.72 / 1.12, 0.4 / 1.12])


@few
@given(layers)
def test_equals_the_loops(given_layer: Layer) -> None:
    r, r_g, margin = given_layer
    w = consistency_weights(r, r_g, margin)
    close(w, loop_weights(r, r_g, margin))
    close(w.sum(0), torch.ones(r.shape[1]))
    shared = global_routing(w, r)
    close(shared, loop_global(w, r))
    assert shared.sum().item() == pytest.approx(1)
    close(overlap(r, r_g), [[(a * b).item() for a, b in zip(row, r_g, strict=True)] for row in r])


@few
@given(layers)
def test_the_order_of_clients_and_experts_does_not_matter(given_layer: Layer) -> None:
    r, r_g, margin = given_layer
    w = consistency_weights(r, r_g, margin)
    order = torch.randperm(len(r))
    moved = consistency_weights(r[order], r_g, margin[order])
    close(moved, w[order])
    close(global_routing(moved, r[order]), global_routing(w, r))
    order = torch.randperm(r.shape[1])
    moved = consistency_weights(r[:, order], r_g[order], margin[:, order])
    close(moved, w[:, order])
    close(global_routing(moved, r[:, order]), global_routing(w, r)[order])


@few
@given(seeds, st.integers(1, 6))
def test_identical_clients_weigh_alike_and_one_alone_exactly_one(seed: int, clients: int) -> None:
    r, r_g, margin = (value.float() for value in layer(seed, 1, 4))
    w = consistency_weights(r.expand(clients, -1), r_g, margin.expand(clients, -1))
    close(w, torch.ones(clients, 4).double() / clients)
    if clients == 1:
        assert torch.equal(w, torch.ones(1, 4, dtype=torch.float64))


def test_expert_that_nobody_chose_first_falls_back_to_overlap_then_to_uniform() -> None:
    r = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    nobody = torch.zeros(2, 2)
    close(consistency_weights(r, torch.tensor([0.5, 0.5]), nobody), [[0.75, 0.25], [0.25, 0.75]])
    close(consistency_weights(r, torch.tensor([1.0, 0.0]), nobody), [[0.75, 0.5], [0.25, 0.5]])
    # A dead reference is uniform too, whatever the margins.
    close(consistency_weights(r, torch.zeros(2), torch.rand(2, 2)), [[0.5, 0.5], [0.5, 0.5]])
    # A client without margin leaves the expert to the others.
    margin = torch.tensor([[0.0, 0.1], [0.2, 0.1]])
    assert consistency_weights(r, torch.ones(2), margin)[:, 0].tolist() == [0.0, 1.0]


@given(layers)
def test_scores_of_clients_alone_are_in_proportion_to_the_weights(layer: Layer) -> None:
    r, _, margin = layer
    scores = torch.stack([consistency_score(*one) for one in zip(r, margin, strict=True)])
    w = consistency_weights(r, torch.ones(r.shape[1]), margin)
    torch.testing.assert_close(scores / scores.sum(0), w, rtol=0, atol=1e-8)


def test_global_routing_of_no_tokens_is_uniform() -> None:
    close(global_routing(torch.full((3, 4), 1 / 3), torch.zeros(3, 4)), [0.25] * 4)


def test_nan_stays_visible() -> None:
    r = torch.tensor([[float("nan"), 0.5], [0.5, 0.5]])
    w = consistency_weights(r, torch.tensor([0.5, 0.5]), torch.ones(2, 2))
    assert w[:, 0].isnan().all()
    assert w[:, 1].tolist() == [0.5, 0.5]
