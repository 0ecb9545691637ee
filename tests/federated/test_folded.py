"""Mixtures of experts, models of texts and methods with a client half: many clients at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.federated.small import tiny
from tests.federated.test_stacked import TOLERANCE, check_same, examples, mlp
from tests.worlds import TinyClassifier, TinyText
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeModel

from sluiceway.core.checkpoints import Checkpoint
from sluiceway.core.round_loop import Record, Result
from sluiceway.core.settings import Training
from sluiceway.errors import InputError
from sluiceway.federated.client import Worker, prepare
from sluiceway.federated.stacked import StackedTrainer
from sluiceway.moe import add_lora, skip_padding
from sluiceway.moe.upcycled import UpcycledExperts, UpcycledMoE, UpcycledRouter
from sluiceway.strategies import FedAlignMoE, Update, strategy
from sluiceway.transport.local import federate

SIZES = (7, 1, 20, 0, 13, 4, 16)
SGD = Training(lr=0.1, batch_size=5, optimizer="sgd")


def upcycled(train: str = "moe") -> TinyClassifier:
    """Trained are the mixture and the head, or with "layer" all of the last layer."""
    model = tiny(dropout=0.0)
    for name, param in model.named_parameters():
        moe = "intermediate." in name and "layer.1" in name
        last = train == "layer" and "layer.1" in name
        param.requires_grad_(moe or last or name.startswith("head"))
    return model


class Images(nn.Module):
    """Positions of images, [B, 4, 4], are tokens of a mixture; no mask comes with them."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        router = UpcycledRouter(torch.randn(3, 4, generator=g), 1, scale=True)
        up, down = (torch.randn(3, *shape, generator=g) for shape in ((6, 4), (4, 6)))
        self.moe = UpcycledMoE(router, UpcycledExperts(up, down, torch.tanh))
        torch.manual_seed(0)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.flatten(0, 1)
        return self.head((hidden + self.moe(hidden)).flatten(1))


def padding_skipped() -> nn.Module:
    model = upcycled()
    skip_padding(model)
    return model


def trained(stacked: int, make: Callable[[], nn.Module], method: Any, **kwargs: Any) -> Result:
    if isinstance(make(), TinyClassifier):
        clients, test = [TinyText(n, i) for i, n in enumerate(SIZES)], TinyText(30, 99)
    else:
        clients, test = [examples(n, i) for i, n in enumerate(SIZES)], examples(30, 99)  # type: ignore[misc, assignment]
    settings = {"rounds": 3, "device": "cpu", "seed": 5, "training": SGD} | kwargs
    chosen = (
        FedAlignMoE(experts="region", gate="region") if method == "region" else strategy(method)
    )
    return federate(make(), clients, test, chosen, stacked=stacked, **settings)


@pytest.mark.parametrize(
    ("make", "method", "settings"),
    [
        *(
            (upcycled, name, {})
            for name in ("fedavg", "fedprox", "fedadam", "usage", "fedmoe", "frozen-gate")
        ),
        *((upcycled, name, {}) for name in ("fedalign-moe", "scaffold", "non-expert")),
        (lambda: upcycled("layer"), "fedalign-moe", {"local_epochs": 2, "momentum": 0.9}),
        (upcycled, "fedalign-moe", {"accumulate": 3, "batch_size": 2, "max_grad_norm": 0}),
        (upcycled, "fc-moe", {}),
        (upcycled, "region", {}),
        (upcycled, "scaffold", {"optimizer": "adamw", "lr": 0.01}),
        (padding_skipped, "usage", {}),
        (lambda: Images(), "fedalign-moe", {}),
        (lambda: tiny(dropout=0.0), "fedavg", {}),
        (lambda: TinyClassifier(experts=0).eval(), "fedavg", {"no dropout": True}),
        (mlp, "scaffold", {"weight_decay": 0.1}),
    ],
)
def test_equal_to_one_after_the_other(
    make: Callable[[], nn.Module], method: str, settings: dict[str, Any]
) -> None:
    def build() -> nn.Module:
        model = make()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    chosen = {n: v for n, v in settings.items() if n != "no dropout"}
    training = Training(**({"lr": 0.1, "batch_size": 5, "optimizer": "sgd"} | chosen))
    exact = trained(0, build, method, training=training, participation=0.8)
    assert any(
        not torch.equal(tensor, build().state_dict()[name])
        for name, tensor in exact.tensors.items()
    )
    for size in (3, 100):
        check_same(exact, trained(size, build, method, training=training, participation=0.8))


def answers(make: Callable[[], nn.Module], stacked: bool) -> list[Update]:
    model = make()
    method = FedAlignMoE(semantic=True)
    texts = [TinyText(n, i) for i, n in enumerate(SIZES) if n]
    sets: list[Any] = (
        texts if isinstance(model, TinyClassifier) else [examples(n, n) for n in (7, 3)]
    )
    prepare(model, method, len(sets))
    worker = Worker(model, sets, sets[0], method, SGD, seed=3)
    sent, numbers = method.broadcast(1), range(len(sets))
    if stacked:
        found = StackedTrainer(worker).train(sent, numbers, set(), {n: {} for n in numbers})
        return [update for update in found if isinstance(update, Update)]
    updates = []
    for number in numbers:
        update = worker.train(number, sent, {}, personal=False)
        tensors = {name: tensor.clone() for name, tensor in update.tensors.items()}
        updates.append(Update(number, 1, update.examples, tensors, update.routing))
    return updates


@pytest.mark.parametrize("make", [upcycled, lambda: Images()])
def test_each_client_reports_its_own_routing_and_sends_what_it_trained(
    make: Callable[[], nn.Module],
) -> None:
    exact, stacked = answers(make, False), answers(make, True)
    assert len(exact) == len(stacked) > 1
    loads = [update.routing[0].load for update in exact]
    assert not torch.equal(loads[0], loads[1])
    for one, two in zip(exact, stacked, strict=True):
        assert one.tensors.keys() == two.tensors.keys()  # experts without a token are absent
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(two.tensors[name], tensor, **TOLERANCE)
        for a, b in zip(one.routing, two.routing, strict=True):
            assert torch.equal(a.load, b.load)
            assert a.tokens == b.tokens
            assert a.region is not None
            assert b.region is not None
            for x, y in ((a.routing, b.routing), (a.margin, b.margin), (a.region, b.region)):
                torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["scaffold", "non-expert", "fedalign-moe"])
def test_what_clients_keep_lasts_over_a_resume(method: str, tmp_path: Path) -> None:
    whole = trained(4, upcycled, method, rounds=4, participation=0.7)

    def stop(record: Record) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    folder = tmp_path / "checkpoints"
    with pytest.raises(KeyboardInterrupt):
        trained(
            4,
            upcycled,
            method,
            rounds=4,
            participation=0.7,
            on_round=stop,
            checkpoint=Checkpoint(folder, False),
        )
    resumed = trained(
        4, upcycled, method, rounds=4, participation=0.7, checkpoint=Checkpoint(folder, True)
    )
    assert resumed.personal_accuracy == whole.personal_accuracy
    for name, tensor in whole.tensors.items():
        assert torch.equal(resumed.tensors[name], tensor), name


class Unreadable(TinyText):
    """Can be read twice, for the outputs of frozen layers, and not in training."""

    reads = 0

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if self.reads > 2 * len(self):
            raise OSError("disk on fire")
        return super().__getitem__(index)


def test_a_client_that_fails_leaves_the_others_and_what_they_keep() -> None:
    def run(stacked: int) -> Result:
        clients = [TinyText(6, 1), Unreadable(9, 2), TinyText(11, 3)]
        return federate(
            upcycled(),
            clients,
            TinyText(9, 4),
            "scaffold",
            rounds=2,
            seed=1,
            device="cpu",
            training=SGD,
            stacked=stacked,
        )

    exact, stacked = run(0), run(3)
    assert [set(record.failed) for record in stacked.records] == [{1}, {1}]
    for name, tensor in exact.tensors.items():
        torch.testing.assert_close(stacked.tensors[name], tensor, **TOLERANCE)


def olmoe() -> nn.Module:
    """A family of its own, whose experts are no `UpcycledExperts`."""
    torch.manual_seed(0)
    model = TinyClassifier()
    model.backbone = OlmoeModel(
        OlmoeConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )
    return model


def adapted() -> nn.Module:
    model = upcycled()
    experts = {n: p for n, p in model.named_parameters() if "experts" in n and p.requires_grad}
    add_lora(model, experts, 2, 4)
    return model


def tied() -> nn.Module:
    """The head reads the word embeddings past the module that holds them."""

    class Tied(TinyClassifier):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            words = self.backbone.embeddings.word_embeddings.weight
            hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
            return hidden.last_hidden_state[:, 0] @ words[:3].T

    model = Tied()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (olmoe, "holds experts that are not upcycled"),
        (TinyClassifier, r"embeddings.dropout \(Dropout\) is random"),
        (adapted, "the experts of backbone.encoder.layer.1.intermediate have adapters"),
        (tied, "depends on the others of its batch"),
    ],
)
def test_refused_with_a_reason(make: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(InputError, match=f"^run.stacked.*({why})") as caught:
        trained(2, make, "fedavg")
    assert "\n" not in str(caught.value)


def test_a_model_runs_as_before_once_its_training_is_over() -> None:
    model, test = upcycled(), TinyText(9, 2)
    forwards = {name: module.forward for name, module in model.named_modules()}
    federate(model, [TinyText(9, 1)], test, rounds=1, stacked=4, device="cpu", training=SGD)
    assert all(forwards[name] == module.forward for name, module in model.named_modules())
    assert not any(module._forward_hooks for module in model.modules())
