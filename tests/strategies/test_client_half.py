"""What strategies do on the client: loss terms and gradient corrections."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.worlds import TinyClassifier, TinyText
from torch import Tensor

from sluiceway.core.aggregation import aggregate
from sluiceway.core.settings import Training
from sluiceway.errors import InputError
from sluiceway.federated.client import Worker, prepare
from sluiceway.moe import Observer
from sluiceway.strategies import (
    Broadcast,
    FedAlignMoE,
    FedAvg,
    FedProx,
    LocalContext,
    Scaffold,
    Strategy,
)


def client_of(
    strategy: Strategy, model: TinyClassifier, r_g: Tensor | None = None
) -> tuple[LocalContext, Tensor]:
    """A client that has just run one observed forward pass, and its task loss."""
    prepare(model, strategy, 2)
    if r_g is not None:
        assert isinstance(strategy, FedAlignMoE)
        strategy.routing = [r_g]
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    client = LocalContext(
        model=model,
        params=params,
        received={n: p.detach().clone() for n, p in params.items()},
        broadcast=strategy.broadcast(2),
        layout=strategy.layout,
        observer=Observer(model, strategy.layout),
        state={},
    )
    strategy.start_training(client)
    return client, forward(client)


def forward(client: LocalContext) -> Tensor:
    data = TinyText(12, 3)
    model = client.model.eval()
    assert client.observer is not None
    with client.observer.observing(data.mask):
        return F.cross_entropy(model(data.ids, data.mask), data.labels)


def test_fedprox_penalty_and_gradient_by_hand(moe_model: TinyClassifier) -> None:
    client, _ = client_of(FedProx(mu=0.4), moe_model)
    with torch.no_grad():
        for param in client.params.values():
            param.add_(0.5)
    penalty = FedProx(mu=0.4).penalty(client)
    assert penalty is not None
    count = sum(p.numel() for p in client.params.values())
    torch.testing.assert_close(penalty, torch.tensor(0.5 * 0.4 * 0.25 * count))
    penalty.backward()
    for param in client.params.values():
        torch.testing.assert_close(param.grad, torch.full_like(param, 0.4 * 0.5))


@pytest.mark.parametrize("reference", ["marginal", "conditional"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_regulariser_gradient_reaches_the_router_and_is_autograds(
    moe_model: TinyClassifier, reference: str, adaptive: bool
) -> None:
    strategy = FedAlignMoE(align=True, reference=reference, adaptive=adaptive, lambda_=0.3)  # type: ignore[arg-type]
    r_g = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    client, _ = client_of(strategy, moe_model, r_g)
    (name,) = strategy.layout.blocks[0].gate
    params = client.params
    with torch.no_grad():
        params[name].add_(
            torch.randn(params[name].shape, generator=torch.Generator().manual_seed(0))
        )
    forward(client)
    penalty = strategy.penalty(client)
    assert penalty is not None
    assert client.observer is not None
    step = client.observer.last[0]
    assert step is not None
    assert step.mask is not None
    (grad,) = torch.autograd.grad(penalty, params[name], retain_graph=True)
    assert float(grad.abs().max()) > 0

    # The same by hand, from the step's hidden states: one token after the other.
    gate = params[name].detach().clone().requires_grad_()
    hidden = step.hidden.detach()[step.mask.bool()]
    chosen = step.selected[step.mask.bool()]
    p = torch.softmax(hidden @ gate.T, -1)
    received = torch.softmax(hidden @ client.received[name].T, -1)
    r_i = p.detach().mean(0)
    alpha = 1 - (r_i - r_g).abs() / (r_i + r_g) if adaptive else torch.ones(4)
    total = torch.zeros(())
    for t in range(len(hidden)):
        for e in range(4):
            if reference == "conditional":
                total = total + alpha[e] * p[t, e] * (p[t, e] / received[t, e]).log()
            elif e in chosen[t]:
                total = total + alpha[e] * p[t, e] * (p[t, e] / r_g[e]).log()
    by_hand = 0.3 * total / len(hidden)
    torch.testing.assert_close(penalty, by_hand.to(penalty), atol=1e-5, rtol=1e-4)
    (wanted,) = torch.autograd.grad(by_hand, gate)
    torch.testing.assert_close(grad, wanted.to(grad), atol=1e-5, rtol=1e-3)


def test_marginal_reference_waits_for_a_global_routing(moe_model: TinyClassifier) -> None:
    strategy = FedAlignMoE(align=True, reference="marginal")
    client, _ = client_of(strategy, moe_model)
    assert strategy.penalty(client) is None


def test_conditional_reference_is_zero_where_the_gate_is_as_received(
    moe_model: TinyClassifier,
) -> None:
    strategy = FedAlignMoE(align=True, reference="conditional", adaptive=False)
    client, _ = client_of(strategy, moe_model)
    penalty = strategy.penalty(client)
    assert penalty is not None
    assert abs(float(penalty.detach())) < 1e-6


def test_scaffold_control_is_option_two_under_sgd() -> None:
    """c_i_new = c_i - c + (x - y) / (K lr), which for SGD is the mean raw gradient."""
    model, strategy = TinyClassifier(), Scaffold()
    prepare(model, strategy, 2)
    data = TinyText(24, 1)
    training = Training(lr=0.1, optimizer="sgd", batch_size=8, max_grad_norm=0.0)
    worker = Worker(model, [data], TinyText(9, 2), strategy, training)
    g = torch.Generator().manual_seed(0)
    own = {n: 0.01 * torch.randn(p.shape, generator=g) for n, p in worker.params.items()}
    server = {n: 0.01 * torch.randn(p.shape, generator=g) for n, p in worker.params.items()}
    state = {f"control/{n}": c.clone() for n, c in own.items()}
    before = {n: t.clone() for n, t in strategy.tensors.items()}
    extra = {f"control/{n}": c for n, c in server.items()}
    made = worker.train(0, Broadcast(1, before, extra), state, personal=False)
    for name, param in worker.params.items():
        wanted = own[name] - server[name] + (before[name] - param.detach()) / (3 * 0.1)
        torch.testing.assert_close(state[f"control/{name}"], wanted, atol=2e-6, rtol=1e-4)
        change = state[f"control/{name}"] - own[name]
        torch.testing.assert_close(made.extra[f"control/{name}"], change)


def test_scaffold_server_control_is_the_mean_over_all_clients() -> None:
    model, strategy = TinyClassifier(), Scaffold()
    prepare(model, strategy, 4)
    worker = Worker(model, [TinyText(8, 1), TinyText(8, 2)], TinyText(9, 2), strategy, Training())
    updates = [worker.train(i, strategy.broadcast(1), {}, personal=False) for i in range(2)]
    made = [update.extra for update in updates]
    aggregate(strategy, updates)
    for name, control in strategy.control.items():
        wanted = sum(m[f"control/{name}"] for m in made) / 4
        torch.testing.assert_close(control, wanted, atol=1e-7, rtol=1e-5)


def test_frozen_gate_trains_and_sends_no_router(moe_model: TinyClassifier) -> None:
    from sluiceway.strategies import FrozenGate

    strategy = FrozenGate()
    prepare(moe_model, strategy, 1)
    worker = Worker(moe_model, [TinyText(16, 1)], TinyText(9, 2), strategy, Training())
    (name,) = strategy.layout.blocks[0].gate
    before = moe_model.get_parameter(name).detach().clone()
    made = worker.train(0, strategy.broadcast(1), {}, personal=False)
    assert name not in made.tensors
    assert torch.equal(moe_model.get_parameter(name), before)


@pytest.mark.parametrize("parts", ["all", "head,gate", "experts", "other"])
def test_scaffold_controls_the_chosen_parts_alone(parts: str) -> None:
    model, strategy, plain = TinyClassifier(), Scaffold(parts=parts), FedAvg()
    prepare(model, strategy, 2)
    prepare(model, plain, 2)
    layout = strategy.layout
    named = {"head": layout.head, "gate": layout.gate_params, "experts": layout.expert_params}
    known = {name for names in named.values() for name in names}
    named["other"] = set(strategy.tensors) - known
    chosen = [*named] if parts == "all" else parts.split(",")
    wanted = {name for part in chosen for name in named[part]}
    assert wanted
    assert set(strategy.server_extra()) == {f"control/{name}" for name in wanted}
    training = Training(lr=0.1, optimizer="sgd", batch_size=24, max_grad_norm=0.0)
    worker = Worker(model, [TinyText(24, 1)], TinyText(9, 2), strategy, training)
    g = torch.Generator().manual_seed(0)
    control = {n: torch.randn(t.shape, generator=g) for n, t in strategy.server_extra().items()}
    state: dict[str, Tensor] = {}
    made = worker.train(0, Broadcast(1, plain.tensors, control), state, personal=False)
    assert set(made.extra) == set(state) == {f"control/{name}" for name in wanted}
    sent = {key: value.clone() for key, value in made.tensors.items()}
    worker.strategy = plain
    # One step of SGD: a controlled parameter is lr * control further than FedAvg's.
    other = worker.train(0, Broadcast(1, plain.tensors), {}, personal=False)
    for piece in plain.shared_pieces:
        if piece.key in other.tensors:
            gap = torch.zeros_like(sent[piece.key])
            if piece.param in wanted:
                gap = -0.1 * piece.of({piece.param: control[f"control/{piece.param}"]})
            torch.testing.assert_close(sent[piece.key], other.tensors[piece.key] + gap)


@pytest.mark.parametrize("parts", ["", "heads", "head,all", "head, gate"])
def test_scaffold_parts_that_are_none_are_refused(parts: str) -> None:
    with pytest.raises(ValueError, match="must be all, or some of head, gate, experts, other"):
        Scaffold(parts=parts)


def test_scaffold_of_parts_that_a_model_lacks_is_one_line() -> None:
    with pytest.raises(InputError, match=r"method\.parts = 'experts': the model has nothing of it"):
        prepare(TinyClassifier(experts=0), Scaffold(parts="experts"), 2)
