"""Gradient checkpointing in a client's training: layers that run again in the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.federated.small import one_round, tiny, weights
from tests.worlds import TinyClassifier, TinyText
from torch import Tensor, nn

from sluiceway.core.settings import Training
from sluiceway.federated.client import Worker, prepare
from sluiceway.federated.stepping import checkpointed
from sluiceway.strategies import FedAlignMoE, FedAvg, strategy
from sluiceway.transport.local import federate


@pytest.mark.parametrize("name", ["fedavg", "fedalign-moe"])
def test_checkpointing_changes_neither_weights_nor_routing(name: str) -> None:
    """Dropout is on: the recompute draws the same masks."""
    results, calls = [], []
    for checkpointing in (False, True):
        model = tiny()
        seen: list[int] = []
        layer = model.backbone.encoder.layer[1].attention.self
        layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        training = Training(lr=0.05, batch_size=8, local_epochs=2, checkpointing=checkpointing)
        _, update = one_round(model, strategy(name), training)
        results.append((weights(model), update.routing[0]))
        calls.append(len(seen))
    assert calls == [8, 16]  # it really runs again
    (plain, counted), (recomputed, counted_again) = results
    for key, value in plain.items():
        torch.testing.assert_close(recomputed[key], value, atol=1e-6, rtol=1e-5)
    assert counted.tokens == counted_again.tokens
    assert torch.equal(counted.load, counted_again.load)
    torch.testing.assert_close(counted.routing, counted_again.routing)
    torch.testing.assert_close(counted.region, counted_again.region)


@pytest.mark.parametrize("reference", ["marginal", "conditional"])
def test_the_regularisers_gradient_passes_through_checkpointing(reference: str) -> None:
    """After the first step nothing but the regulariser has a gradient."""
    found = []
    for checkpointing, lambda_ in [(False, 5.0), (True, 5.0), (True, 0.0)]:
        model = tiny(dropout=0)
        method = FedAlignMoE(align=True, reference=reference, lambda_=lambda_)  # type: ignore[arg-type]
        prepare(model, method, 1)
        method.routing = [torch.tensor([0.7, 0.1, 0.1, 0.1])]
        training = Training(
            lr=0.5, batch_size=8, optimizer="sgd", max_grad_norm=0, checkpointing=checkpointing
        )
        clients, loss = [TinyText(30, 1)], kicking()
        worker = Worker(model, clients, TinyText(9, 2), method, training, loss=loss)
        worker.train(0, method.broadcast(1), {}, personal=False)
        found.append(weights(model))
    plain, recomputed, free = found
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, atol=1e-6, rtol=1e-5)
    (gate,) = method.layout.blocks[0].gate
    assert float((plain[gate] - free[gate]).abs().max()) > 1e-3


def kicking() -> Any:
    """A loss that pulls in the first step only: the received gate is no longer the client's."""
    calls: list[int] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return F.cross_entropy(logits, labels) if len(calls) == 1 else 0 * logits.sum()

    return loss


def test_wholly_frozen_layers_run_once_and_need_no_gradient() -> None:
    model = tiny()
    model.backbone.embeddings.requires_grad_(False)
    model.backbone.encoder.layer[0].requires_grad_(False)
    calls: list[bool] = []
    inner = model.backbone.encoder.layer[0].attention.self
    inner.register_forward_hook(lambda *call: calls.append(call[2][0].requires_grad))
    one_round(model, FedAvg(), Training(batch_size=10, checkpointing=True))
    assert calls == [False] * 3


@pytest.mark.parametrize("hooked", [False, True])
def test_the_model_is_left_as_it_was(hooked: bool) -> None:
    model = tiny()
    if hooked:
        model.backbone.enable_input_require_grads()

    def facts() -> list[tuple[int, set[str]]]:
        return [(len(m._forward_hooks), set(m.__dict__)) for m in model.modules()]

    before = facts()
    with checkpointed(model):
        layer = model.backbone.encoder.layer[1]
        assert layer.gradient_checkpointing
        assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is False
    assert facts() == before
    assert not layer.gradient_checkpointing


def test_a_model_without_checkpointing_is_refused_before_the_first_round() -> None:
    model, data = nn.Linear(1, 1), TinyText(4, 1)
    with pytest.raises(ValueError, match="no part of this model"):
        federate(model, [data], data, training=Training(checkpointing=True), device="cpu")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {}])
def test_reentrant_checkpointing_is_refused_where_there_are_experts(kwargs: Any) -> None:
    model, dense = tiny(), TinyClassifier(experts=0)
    for each in (model, dense):
        each.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    with pytest.raises(ValueError, match="detaches the router logits"):
        prepare(model, FedAvg(), 1)
    prepare(dense, FedAvg(), 1)
    kwargs = {"use_reentrant": False}
    model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    prepare(model, FedAvg(), 1)
