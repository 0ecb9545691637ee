"""The server's half of routing alignment: client weights and the global routing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fedalign.loops import close, few, loop_weights, seeds
from torch import Tensor

from sluiceway.fedalign import consistency_score, global_routing

Layer = tuple[Tensor, Tensor]


def layer(seed: int, clients: int, experts: int) -> Layer:
    """r [N, E] and margin [N, E], with zeros among the margins."""
    torch.manual_seed(seed)
    r = torch.rand(clients, experts, dtype=torch.float64) + 0.01
    margin = torch.rand(clients, experts, dtype=torch.float64)
    margin = margin * (torch.rand(clients, experts) > 0.4)
    return r / r.sum(1, keepdim=True), margin


layers = st.builds(layer, seeds, st.integers(1, 6), st.integers(1, 5))


def weights(r: Tensor, margin: Tensor) -> Tensor:
    """The scores of clients, each by itself, in proportion: [N, E], columns sum to one."""
    scores = torch.stack([consistency_score(*one) for one in zip(r, margin, strict=True)])
    return scores / scores.sum(0)


def loop_global(w: Tensor, r: Tensor) -> list[float]:
    clients, experts = r.shape
    mixed = [sum((w[i, e] * r[i, e]).item() for i in range(clients)) for e in range(experts)]
    return [value / sum(mixed) for value in mixed]


def test_weights_by_hand() -> None:
    r = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    margin = torch.tensor([[0.5, 0.3], [0.25, 0.1]], dtype=torch.float64)
    # With r_g = .5, .5: s = .8*.5*.5, .4*.5*.25 = .2, .05;  .2*.5*.3, .6*.5*.1 = .03, .03
    w = weights(r, margin)
    close(w, [[0.8, 0.5], [0.2, 0.5]])
    # mixed = .8*.8 + .2*.4, .5*.2 + .5*.6 = .72, .4
    close(global_routing(w, r), [0.72 / 1.12, 0.4 / 1.12])


@few
@given(layers, seeds)
def test_equals_the_loops_whatever_the_global_routing(given_layer: Layer, seed: int) -> None:
    r, margin = given_layer
    r_g = torch.rand(r.shape[1], generator=torch.Generator().manual_seed(seed)) + 0.01
    w = weights(r, margin)
    close(w, loop_weights(r, r_g.double(), margin), tolerance=1e-8)
    shared = global_routing(w, r)
    close(shared, loop_global(w, r))
    assert shared.sum().item() == pytest.approx(1)


@few
@given(layers)
def test_the_order_of_clients_does_not_matter(given_layer: Layer) -> None:
    r, margin = given_layer
    w = weights(r, margin)
    order = torch.randperm(len(r))
    close(global_routing(w[order], r[order]), global_routing(w, r))


def test_expert_that_nobody_chose_first_falls_back_to_the_routing_then_to_uniform() -> None:
    r = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    nobody = torch.zeros(2, 2)
    close(weights(r, nobody), [[0.75, 0.25], [0.25, 0.75]])
    r[:, 1] = 0
    close(weights(r, nobody), [[0.75, 0.5], [0.25, 0.5]])
    # A client without margin leaves the expert to the others.
    margin = torch.tensor([[0.0, 0.1], [0.2, 0.1]])
    close(weights(r, margin)[:, 0], [0.0, 1.0])


def test_global_routing_of_no_tokens_is_uniform() -> None:
    close(global_routing(torch.full((3, 4), 1 / 3), torch.zeros(3, 4)), [0.25] * 4)


def test_nan_stays_visible() -> None:
    w = weights(torch.tensor([[float("nan"), 0.5], [0.5, 0.5]]), torch.ones(2, 2))
    assert w[:, 0].isnan().all()
    assert w[:, 1].tolist() == [0.5, 0.5]
