"""What is trained and exchanged, and how a client trains."""

from __future__ import annotations

import pytest
import torch
from tests.worlds import TinyClassifier, TinyText
from torch import nn

from sluiceway.core.parameters import exchanged, frozen_modules
from sluiceway.core.seeds import derive_seed
from sluiceway.core.settings import Training
from sluiceway.federated.client import Worker, prepare
from sluiceway.strategies import FedAvg, NonExpert
from sluiceway.transport.local import federate


def test_frozen_modules_run_in_evaluation_mode(moe_model: TinyClassifier) -> None:
    for name, param in moe_model.named_parameters():
        param.requires_grad_("layer.1.intermediate" in name or name.startswith("head"))
    strategy = FedAvg()
    prepare(moe_model, strategy, 1)
    worker = Worker(moe_model, [TinyText(4, 1)], TinyText(4, 2), strategy, Training())
    worker.training_mode()
    assert moe_model.backbone.embeddings.dropout.training is False
    assert moe_model.backbone.encoder.layer[0].training is False
    assert moe_model.backbone.encoder.layer[1].attention.training is False
    assert moe_model.backbone.encoder.layer[1].intermediate.training is True


def test_batch_norm_statistics_cross_unless_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2))
    model[1].requires_grad_(False)
    assert frozen_modules(model) == [model[1]]
    names = set(exchanged(model))
    assert {"3.running_mean", "3.running_var"} <= names
    assert not any(name.startswith("1.") or "num_batches" in name for name in names)


def test_seeds_differ_and_are_fixed() -> None:
    assert derive_seed(0, 1, 2) == derive_seed(0, 1, 2)
    assert len({derive_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}) == 64


def test_experts_without_a_token_are_left_out(moe_model: TinyClassifier) -> None:
    strategy = FedAvg()
    prepare(moe_model, strategy, 1)
    (block,) = strategy.layout.blocks
    with torch.no_grad():  # one expert that no token can reach
        gate = moe_model.get_parameter(block.gate[0])
        gate.zero_()
        moe_model.backbone.encoder.layer[1].attention.output.LayerNorm.bias.fill_(1.0)
        gate[:3] = 0.1
        gate[3] = -100.0
    tensors = {n: t.detach().clone() for n, t in exchanged(moe_model).items()}
    strategy.setup(tensors, strategy.layout, 1)
    worker = Worker(
        moe_model, [TinyText(16, 1)], TinyText(4, 2), strategy, Training(lr=1e-5, weight_decay=0.1)
    )
    update = worker.train(0, strategy.broadcast(1), {}, personal=False)
    assert float(update.routing[0].load[3]) == 0
    sent = set(update.tensors)
    used = [float(load) > 0 for load in update.routing[0].load]
    assert any(used)
    for e in range(4):
        keys = {piece.key for piece in block.expert(e)}
        assert (keys <= sent) == used[e]
        assert bool(keys & sent) == used[e]


def test_private_experts_stay_with_their_client(moe_model: TinyClassifier) -> None:
    strategy = NonExpert()
    prepare(moe_model, strategy, 2)
    clients = [TinyText(16, 1), TinyText(16, 2)]
    worker = Worker(moe_model, clients, TinyText(9, 3), strategy, Training(lr=0.01))
    name = next(iter(sorted(strategy.layout.expert_params)))
    states: list[dict[str, torch.Tensor]] = [{}, {}]
    for i in (0, 1):
        update = worker.train(i, strategy.broadcast(1), states[i], personal=False)
        assert not any(key.startswith(name) for key in update.tensors)
    first, second = (state[f"private/{name}"] for state in states)
    assert not torch.equal(first, second)
    assert not torch.equal(first, strategy.tensors[name])
    before = first.clone()
    worker.strategy = strategy
    still = Training(lr=1e-30, optimizer="sgd", max_grad_norm=0.0)
    worker.training = still
    worker.train(0, strategy.broadcast(2), states[0], personal=False)
    assert torch.equal(
        states[0][f"private/{name}"], before
    )  # it began from its own, not client 1's


def test_local_training_is_the_plain_loop() -> None:
    """One client, SGD, one epoch: the same as ten lines of PyTorch."""
    data = TinyText(20, 1)
    model, plain = TinyClassifier(), TinyClassifier()
    training = Training(lr=0.05, optimizer="sgd", batch_size=8, max_grad_norm=0.0)
    federate(model, [data], data, rounds=1, training=training, seed=3, device="cpu")
    torch.manual_seed(derive_seed(3, 1, 0))
    plain.train()
    for rows in torch.randperm(20).split(8):
        plain.zero_grad()
        loss = nn.functional.cross_entropy(
            plain(data.ids[rows], data.mask[rows]), data.labels[rows]
        )
        loss.backward()
        with torch.no_grad():
            for param in plain.parameters():
                param -= 0.05 * param.grad
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


def test_nothing_to_train_is_an_error() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        federate(model, [], TinyText(1, 1), device="cpu")


@pytest.mark.parametrize("stacked", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_own_models_are_tested_on_own_test_parts(stacked: int, frozen: bool) -> None:
    """One client's own model is the global one, so that its accuracy can be counted by hand."""
    model = TinyClassifier()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if frozen:  # outputs of frozen layers are kept, also of test parts
        model.backbone.embeddings.requires_grad_(False)
        model.backbone.encoder.layer[0].requires_grad_(False)
    own = TinyText(23, 7)
    clients, tests = [TinyText(30, 1), TinyText(0, 3)], [own, TinyText(0, 3)]
    found = federate(
        model, clients, TinyText(9, 2), rounds=2, local_tests=tests, stacked=stacked, device="cpu"
    )
    batch = {"input_ids": own.ids, "attention_mask": own.mask}
    with torch.no_grad():
        right = (model.eval()(**batch).argmax(-1) == own.labels).sum()
    assert 0 < right < 23
    assert found.personal_accuracy == {0: float(right) / 23}
    none = [TinyText(0, 1), TinyText(0, 2)]
    assert not federate(model, clients, own, rounds=1, local_tests=none).personal_accuracy


def test_own_test_parts_that_do_not_fit(moe_model: TinyClassifier) -> None:
    clients = [TinyText(8, 1), TinyText(8, 2)]
    with pytest.raises(ValueError, match="1 local test sets for 2 clients"):
        federate(moe_model, clients, TinyText(9, 2), rounds=1, local_tests=clients[:1])
    others = [clients[0], TinyText(40, 3, classes=5)]
    with pytest.raises(ValueError, match="the test part of client 1 has the label 4"):
        federate(moe_model, clients, TinyText(9, 2), rounds=1, local_tests=others)
