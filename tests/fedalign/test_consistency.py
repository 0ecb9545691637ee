"""The server's half of routing alignment: weights, global routing, the gate."""

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sluiceway.fedalign import (
    combine_gate,
    consistency_weights,
    global_routing,
    mean_routing,
    overlap,
)

few = settings(max_examples=25, deadline=None)
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


layers = st.builds(layer, st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5))


def close(got: Tensor, want: Tensor | list[float] | list[list[float]]) -> None:
    wanted = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


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


def loop_gate(w: Tensor, gates: Tensor) -> Tensor:
    out = torch.zeros(gates.shape[1:], dtype=torch.float64)
    for i in range(w.shape[0]):
        for e in range(w.shape[1]):
            out[e] += w[i, e].item() * gates[i, e]
    return out


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
    clients, experts = r.shape
    w = consistency_weights(r, r_g, margin)
    close(w, loop_weights(r, r_g, margin))
    close(global_routing(w, r), loop_global(w, r))
    products = [[(r[i, e] * r_g[e]).item() for e in range(experts)] for i in range(clients)]
    close(overlap(r, r_g), products)
    gates = torch.randn(clients, experts, 3, dtype=torch.float64)
    close(combine_gate(w, gates), loop_gate(w, gates))
    close(combine_gate(w, gates[:, :, 0]), loop_gate(w, gates[:, :, 0]))


@few
@given(layers)
def test_invariants(given_layer: Layer) -> None:
    r, r_g, margin = given_layer
    w = consistency_weights(r, r_g, margin)
    assert (w >= 0).all()
    close(w.sum(0), torch.ones(r.shape[1]).double())
    shared = global_routing(w, r)
    assert (shared >= 0).all()
    assert shared.sum().item() == pytest.approx(1)


@few
@given(layers)
def test_permuting_clients_permutes_weights_only(given_layer: Layer) -> None:
    r, r_g, margin = given_layer
    order = torch.randperm(len(r))
    w = consistency_weights(r, r_g, margin)
    moved = consistency_weights(r[order], r_g, margin[order])
    close(moved, w[order])
    close(global_routing(moved, r[order]), global_routing(w, r))
    gates = torch.randn(*r.shape, 3, dtype=torch.float64)
    close(combine_gate(moved, gates[order]), combine_gate(w, gates))


@few
@given(layers)
def test_permuting_experts_permutes_everything(given_layer: Layer) -> None:
    r, r_g, margin = given_layer
    order = torch.randperm(r.shape[1])
    w = consistency_weights(r, r_g, margin)
    moved = consistency_weights(r[:, order], r_g[order], margin[:, order])
    close(moved, w[:, order])
    close(global_routing(moved, r[:, order]), global_routing(w, r)[order])


@few
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_one_client_has_weight_exactly_one(seed: int, experts: int) -> None:
    r, r_g, margin = (value.float() for value in layer(seed, 1, experts))
    w = consistency_weights(r, r_g, margin)
    assert torch.equal(w, torch.ones(1, experts, dtype=torch.float64))
    gate = torch.randn(1, experts, 3)
    assert torch.equal(combine_gate(w, gate), gate[0])


@few
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_identical_clients_weigh_alike(seed: int, clients: int) -> None:
    r, r_g, margin = layer(seed, 1, 4)
    w = consistency_weights(r.expand(clients, -1), r_g, margin.expand(clients, -1))
    close(w, torch.ones(clients, 4).double() / clients)


def test_expert_that_nobody_chose_first_falls_back_to_overlap_then_to_uniform() -> None:
    r = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    nobody = torch.zeros(2, 2)
    close(consistency_weights(r, torch.tensor([0.5, 0.5]), nobody), [[0.75, 0.25], [0.25, 0.75]])
    close(consistency_weights(r, torch.tensor([1.0, 0.0]), nobody), [[0.75, 0.5], [0.25, 0.5]])
    # A dead reference is uniform too, whatever the margins.
    close(consistency_weights(r, torch.zeros(2), torch.rand(2, 2)), [[0.5, 0.5], [0.5, 0.5]])


def test_a_client_without_margin_yields_the_expert_to_the_others() -> None:
    r = torch.tensor([[0.9], [0.1]], dtype=torch.float64)
    close(consistency_weights(r, torch.ones(1), torch.tensor([[0.0], [0.2]])), [[0.0], [1.0]])


def test_mean_routing() -> None:
    r = torch.tensor([[0.75, 0.25], [0.25, 0.75], [1.0, 0.0]])
    close(mean_routing(r, torch.tensor([3, 1, 0])), [0.625, 0.375])
    close(mean_routing(r[:1], torch.tensor([7])), [0.75, 0.25])
    with pytest.raises(ValueError, match="at least one client with examples"):
        mean_routing(r, torch.zeros(3))


def test_global_routing_of_no_tokens_is_uniform() -> None:
    close(global_routing(torch.full((3, 4), 1 / 3), torch.zeros(3, 4)), [0.25] * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gate_keeps_its_type_and_sums_in_float64(dtype: torch.dtype) -> None:
    gates = torch.nn.Parameter(torch.randn(5, 3, 7).to(dtype))
    w = torch.rand(5, 3, dtype=torch.float64)
    got = combine_gate(w, gates)
    assert got.dtype == dtype
    assert not got.requires_grad
    assert torch.equal(got, loop_gate(w, gates.detach().double()).to(dtype))


def test_nan_stays_visible() -> None:
    r = torch.tensor([[float("nan"), 0.5], [0.5, 0.5]])
    w = consistency_weights(r, torch.tensor([0.5, 0.5]), torch.ones(2, 2))
    assert w[:, 0].isnan().all()
    assert w[:, 1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda r, v: overlap(r, v[:2]), "r_g: expected shape [3], got [2]"),
        (lambda r, v: overlap(v, v), "r: expected shape [N, E], got [3]"),
        (lambda r, v: consistency_weights(r, v, v), "margin: expected shape [2, 3], got [3]"),
        (lambda r, v: mean_routing(r, v), "examples: expected shape [2], got [3]"),
        (lambda r, v: global_routing(r, r.T), "r: expected shape [2, 3], got [3, 2]"),
        (lambda r, v: combine_gate(r, r.T), "gates: expected shape [2, 3], got [3, 2]"),
        (lambda r, v: overlap(r[:0], v), "r: expected shape [N, E], got [0, 3]"),
    ],
)
def test_wrong_shapes_are_named(call: Callable[[Tensor, Tensor], Tensor], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        call(torch.rand(2, 3), torch.rand(3))
