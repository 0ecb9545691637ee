"""`train.aux_loss`: the load-balancing loss in a client's steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.federated.small import tiny
from tests.worlds import TinyClassifier, TinyText
from torch import Tensor, nn

from sluiceway.core.seeds import derive_seed
from sluiceway.core.settings import Training
from sluiceway.errors import InputError
from sluiceway.federated.client import Worker, prepare
from sluiceway.moe import add_lora, moe_layout
from sluiceway.strategies import FedAvg
from sluiceway.transport.local import federate

SGD = Training(lr=0.1, optimizer="sgd", batch_size=8, max_grad_norm=0.0)


def trained(
    model: nn.Module, data: TinyText, training: Training
) -> tuple[Worker, dict[str, float]]:
    strategy = FedAvg()
    prepare(model, strategy, 1)
    worker = Worker(model, [data], TinyText(4, 2), strategy, training, seed=5)
    update = worker.train(0, strategy.broadcast(1), {}, personal=False)
    return worker, dict(update.metrics)


def seen_loss(model: TinyClassifier, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Task loss and 0.5 times the balance, written out, with the routers found by hand."""
    logits: list[Tensor] = []
    hooks = [
        model.get_submodule(block.router).register_forward_hook(
            lambda _m, _i, out: logits.append(out[0].reshape(-1, 4))
        )
        for block in moe_layout(model).blocks
    ]
    loss = F.cross_entropy(model(ids, mask), labels)
    for hook in hooks:
        hook.remove()
    real = mask.reshape(-1) != 0
    for found in logits:
        p = found[real].softmax(-1)
        chosen = F.one_hot(p.topk(moe_layout(model).blocks[0].top_k).indices, 4).double()
        share = chosen.mean((0, 1))
        loss = loss + 0.5 / len(logits) * 4 * (share * p.mean(0)).sum()
    return loss


@pytest.mark.parametrize("batches", [1, 2])
def test_the_step_is_that_of_the_written_loss(batches: int) -> None:
    """With padding; with two batches a step the balance of each counts by its examples."""
    model, plain = tiny(dropout=0.0), tiny(dropout=0.0)
    data = TinyText(8, 1)
    assert not data.mask.all()
    settings = replace(SGD, aux_loss=0.5, batch_size=8 // batches, accumulate=batches)
    _, metrics = trained(model, data, settings)
    assert 0.4 < metrics["penalty"] < 2.0
    torch.manual_seed(derive_seed(5, 1, 0))
    plain.train()
    for rows in torch.randperm(8).split(8 // batches):
        loss = seen_loss(plain, data.ids[rows], data.mask[rows], data.labels[rows])
        (loss / batches).backward()
    with torch.no_grad():
        for param in plain.parameters():
            if param.grad is not None:
                param -= 0.1 * param.grad
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


def test_with_adapters(moe_model: TinyClassifier) -> None:
    params = dict(moe_model.named_parameters())
    add_lora(moe_model, {n: params[n] for n in moe_layout(moe_model).expert_params}, 2, 4)
    _, metrics = trained(moe_model, TinyText(16, 1), replace(SGD, aux_loss=0.01))
    assert 0.005 < metrics["penalty"] < 0.04


def test_beside_a_penalty_of_the_method(moe_model: TinyClassifier) -> None:
    data = [TinyText(16, seed) for seed in range(2)]
    training = replace(SGD, aux_loss=0.01)
    result = federate(moe_model, data, TinyText(8, 9), "fedprox", training=training, rounds=2)
    assert all(not record.failed and not record.rejected for record in result.records)


def test_a_dense_model_is_refused() -> None:
    training = replace(SGD, aux_loss=0.01)
    with pytest.raises(InputError, match=r"train\.aux_loss = 0\.01 has no effect.*experts"):
        federate(TinyClassifier(experts=0), [TinyText(8, 1)], TinyText(4, 2), training=training)


def test_stacked_clients_are_refused(moe_model: TinyClassifier) -> None:
    training = replace(SGD, aux_loss=0.01)
    data = [TinyText(8, seed) for seed in range(2)]
    with pytest.raises(InputError, match=r"run\.stacked: aux_loss = 0\.01"):
        federate(moe_model, data, TinyText(8, 9), training=training, stacked=2, device="cpu")
