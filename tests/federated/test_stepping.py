"""Accumulated batches and half precision in a client's training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from tests.federated.small import one_round, tiny, weights
from tests.worlds import TinyText
from torch import Tensor, nn

from sluiceway.core.batches import Batch
from sluiceway.core.messages import read_update, write_update
from sluiceway.core.seeds import derive_seed
from sluiceway.core.settings import Optimisation, Training
from sluiceway.federated.client import Worker, prepare
from sluiceway.federated.stepping import SGD, clip, master_params_of
from sluiceway.strategies import FedAlignMoE, FedAvg, FedProx, Scaffold, Strategy
from sluiceway.transport.local import federate

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_and_clipping_are_those_of_torch_bit_for_bit(momentum: float, decay: float) -> None:
    """Gradients below and above the norm, and a parameter without any in some steps."""
    rng = torch.Generator().manual_seed(0)
    start = [torch.randn(*shape, generator=rng) for shape in ((7, 5), (3,), (2, 4, 9))]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    training = Training(optimizer="sgd", lr=0.03, momentum=momentum, weight_decay=decay)
    mine, plain = SGD(ours, training), training.optimiser(theirs)
    for step in range(6):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if number != step % 4:
                one.grad = torch.randn(one.shape, generator=rng) * 10 ** (step - 3)
                other.grad = one.grad.clone()
        clip([param.grad for param in ours if param.grad is not None], 1.0)
        nn.utils.clip_grad_norm_(theirs, 1.0)
        mine.step()
        plain.step()
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        mine.zero_grad()
        plain.zero_grad()
    assert not torch.equal(ours[0], start[0])
    clip([], 1.0)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"local_epochs": 2}, [6, 2, 6, 2]),
        ({"local_steps": 5, "local_epochs": 9}, [6, 2, 6, 2, 6]),
        ({"local_steps": 1}, [6]),
    ],
)
def test_steps_of_a_round(settings: dict[str, int], sizes: list[int]) -> None:
    model, strategy, data = tiny(), FedAvg(), TinyText(8, 1)
    prepare(model, strategy, 1)
    training = Training(batch_size=3, accumulate=2, **settings)
    worker = Worker(model, [data], data, strategy, training)
    rows = list(worker.steps(data))
    assert [len(step) for step in rows] == sizes
    assert training.steps(8) == len(sizes)
    for epoch in torch.cat(rows).split(8):
        assert len(epoch.unique()) == len(epoch)


def test_defaults_are_the_plain_loop_bit_for_bit() -> None:
    """AdamW, clipping, a penalty, two epochs and dropout, against the same in plain PyTorch."""
    training = Training(lr=0.01, batch_size=8, local_epochs=2, max_grad_norm=0.5)
    made, plain = tiny(), tiny()
    one_round(made, FedProx(mu=0.3), training)
    received, data = weights(plain), TinyText(30, 1)
    params = list(plain.parameters())
    optimiser = torch.optim.AdamW(params, lr=0.01, weight_decay=0.0, fused=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(3, 1, 0))
        plain.train()
        for _ in range(2):
            for rows in torch.randperm(30).split(8):
                optimiser.zero_grad()
                loss = F.cross_entropy(plain(data.ids[rows], data.mask[rows]), data.labels[rows])
                far = [((p - received[n]) ** 2).sum() for n, p in plain.named_parameters()]
                (loss + 0.5 * 0.3 * torch.stack(far).sum()).backward()
                nn.utils.clip_grad_norm_(params, 0.5)
                optimiser.step()
    for name, param in made.named_parameters():
        assert torch.equal(param, plain.get_parameter(name)), name


@pytest.mark.parametrize("method", [FedAvg(), FedProx(mu=0.5), Scaffold()])
def test_accumulated_batches_make_the_step_of_their_union(method: Strategy) -> None:
    """30 examples: steps of 12, 12 and 6, in batches of at most 4, so that sizes differ."""
    one, many = tiny(dropout=0), tiny(dropout=0)
    settings = {"lr": 0.1, "optimizer": "sgd", "local_epochs": 2}
    _, whole = one_round(one, method, Training(**settings, batch_size=12))
    worker, parts = one_round(many, method, Training(**settings, batch_size=4, accumulate=3))
    assert [len(rows) for rows in worker.steps(worker.clients[0])] == [12, 12, 6] * 2
    for name, param in one.named_parameters():
        torch.testing.assert_close(many.get_parameter(name), param, atol=1e-6, rtol=1e-5)
    for name, value in whole.metrics.items():
        assert parts.metrics[name] == pytest.approx(value, abs=1e-6)
    assert torch.equal(parts.routing[0].load, whole.routing[0].load)


def test_settings_out_of_range_or_of_split_runs_are_refused() -> None:
    for bad in ({"accumulate": 0}, {"mixed": "float8"}):
        with pytest.raises(ValidationError):
            Training(**bad)
    with pytest.raises(ValidationError):
        Optimisation(accumulate=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold", "fedalign-moe"])
def test_half_precision_parameters_train(dtype: torch.dtype, name: str) -> None:
    model = tiny(dtype)
    clients, test = [TinyText(40, 1), TinyText(24, 2)], TinyText(60, 9)
    training = Training(lr=0.01, batch_size=8, accumulate=2, local_epochs=3)
    result = federate(model, clients, test, name, rounds=3, training=training, device="cpu")
    losses = [record.train_loss for record in result.records]
    assert losses[-1] < 0.75 * losses[0]
    assert result.rejected == 0
    assert {param.dtype for param in model.parameters()} == {dtype}
    assert {tensor.dtype for tensor in result.tensors.values()} == {dtype}


@pytest.mark.parametrize("mixed", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["fedavg", "fedalign-moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_precision_trains(mixed: str, name: str, checkpointing: bool) -> None:
    model = tiny()
    training = Training(
        lr=0.01,
        batch_size=8,
        local_epochs=3,
        mixed=mixed,
        checkpointing=checkpointing,  # type: ignore[arg-type]
    )
    seen: set[torch.dtype] = set()
    model.head.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    data = TinyText(40, 1)
    result = federate(model, [data], data, name, rounds=3, training=training, device="cpu")
    losses = [record.train_loss for record in result.records]
    assert losses[-1] < 0.75 * losses[0]
    assert seen == {getattr(torch, mixed)}  # evaluation included
    assert {param.dtype for param in model.parameters()} == {torch.float32}


class Telling(FedAlignMoE):
    """Keeps the routing that the strength of the regulariser is made from."""

    name = "telling"
    told: list[Tensor]

    def own_routing(self, *args: Any) -> Tensor:
        self.told.append(super().own_routing(*args))
        return self.told[-1]


def test_the_regulariser_in_mixed_precision() -> None:
    """0 while the gate is as received, which is asked in the same precision; sums are float32."""
    model, method = tiny(), Telling(align=True)
    prepare(model, method, 1)
    method.told, method.routing = [], [torch.tensor([0.7, 0.1, 0.1, 0.1])]
    training = Training(mixed="bfloat16", lr=1e-30, optimizer="sgd")
    worker = Worker(model, [TinyText(30, 1)], TinyText(9, 2), method, training)
    update = worker.train(0, method.broadcast(1), {}, personal=False)
    assert abs(update.metrics["penalty"]) < 1e-7
    assert {told.dtype for told in method.told} == {torch.float32}
    torch.testing.assert_close(method.told[-1].double(), update.routing[0].routing)


class Ones:
    """64 examples of the one feature 1."""

    labels = torch.zeros(64, dtype=torch.int64)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.ones(1, dtype=torch.bfloat16), 0


@pytest.mark.parametrize("master_params", [True, False])
def test_steps_below_rounding_add_up(master_params: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 steps of 1/1024 from 1, whose neighbour in bfloat16 is 1 - 1/256."""
    if not master_params:
        monkeypatch.setattr("sluiceway.federated.client.master_params_of", dict)
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    method = FedAvg()
    prepare(model, method, 1)
    training = Training(lr=2**-10, optimizer="sgd", batch_size=1, max_grad_norm=0)
    worker = Worker(
        model, [Ones()], Ones(), method, training, loss=lambda logits, labels: logits.mean()
    )
    worker.train(0, method.broadcast(1), {}, personal=False)
    assert float(model.weight.detach()) == (1 - 64 / 1024 if master_params else 1.0)


def test_fedprox_sees_distances_below_rounding() -> None:
    model, method = nn.Linear(1, 1, bias=False).bfloat16(), FedProx(mu=1)
    nn.init.ones_(model.weight)
    prepare(model, method, 1)
    training = Training(lr=2**-12, optimizer="sgd", batch_size=16, max_grad_norm=0)
    worker = Worker(
        model, [Ones()], Ones(), method, training, loss=lambda logits, labels: logits.mean()
    )
    update = worker.train(0, method.broadcast(1), {}, personal=False)
    assert float(model.weight.detach()) == 1  # four steps of 1/4096
    wanted = sum(0.5 * (step / 4096) ** 2 for step in range(4)) / 4
    assert update.metrics["penalty"] == pytest.approx(wanted, rel=1e-2)


def test_masters_are_the_parameters_unless_of_half_precision() -> None:
    params = {str(t): nn.Parameter(torch.ones(2, dtype=t)) for t in (torch.float32, torch.float64)}
    assert all(master_params_of(params)[name] is param for name, param in params.items())
    for dtype in HALVES:
        master = master_params_of({"w": nn.Parameter(torch.ones(2, dtype=dtype))})["w"]
        assert master.dtype == torch.float32


class Watching(Scaffold):
    """Keeps what `correct` was given."""

    name = "watching"
    seen: list[dict[str, Tensor]]

    def correct(self, client: Any) -> None:
        self.seen.append({n: m.grad.clone() for n, m in client.master_params.items()})
        super().correct(client)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_corrections_see_float32_gradients_without_the_scale(accumulate: int) -> None:
    found = []
    for dtype in (torch.float32, torch.float16):
        method = Watching()
        method.seen = []
        training = Training(
            lr=0.01, optimizer="sgd", batch_size=30 // accumulate, accumulate=accumulate
        )
        one_round(tiny(dtype, dropout=0), method, training)
        (grads,) = method.seen
        assert {grad.dtype for grad in grads.values()} == {torch.float32}
        found.append(torch.cat([grad.flatten() for grad in grads.values()]))
    assert torch.norm(found[0] - found[1]) < 0.02 * torch.norm(found[0])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("setting", ["parameters", "mixed"])
def test_a_step_whose_gradients_overflow_is_left_out(bad: float, setting: str) -> None:
    """The second of four steps; a strategy's control variates do not see it either."""
    calls = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(logits.dtype)
        return F.cross_entropy(logits, labels) * (bad if len(calls) == 2 else 1.0)

    model, method = tiny(torch.float16 if setting == "parameters" else torch.float32), Scaffold()
    training = Training(lr=0.01, batch_size=8, mixed="no" if setting == "parameters" else "float16")
    worker, update = one_round(model, method, training, loss=loss)
    assert calls == [torch.float32] * 4
    assert update.metrics["skipped_steps"] == 1
    assert all(bool(param.isfinite().all()) for param in worker.params.values())
    assert all(bool(c.isfinite().all()) for c in update.extra.values())
    assert {c.dtype for c in update.extra.values()} == {torch.float32}


def test_controls_are_float32_and_survive_a_checkpoint() -> None:
    method = Scaffold()
    one_round(tiny(torch.bfloat16), method, Training())
    assert {c.dtype for c in method.control.values()} == {torch.float32}
    state = method.state_dict()
    method.load_state_dict(state)
    assert {c.dtype for c in method.control.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", HALVES)
def test_updates_cross_in_their_own_type(dtype: torch.dtype, tmp_path: Path) -> None:
    sizes, counts = [], []
    for kind in (torch.float32, dtype):
        _, update = one_round(tiny(kind), FedAvg(), Training())
        sizes.append(write_update(tmp_path / "update", update))
        sent = read_update(tmp_path / "update").tensors
        assert {tensor.dtype for tensor in sent.values()} == {kind}
        counts.append(sum(tensor.numel() for tensor in sent.values()))
    assert counts[0] == counts[1]
    assert sizes[0] - sizes[1] == pytest.approx(2 * counts[0], abs=512)  # 2 bytes less for each


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedalign-moe", "scaffold"])
def test_half_precision_does_not_depend_on_the_number_of_workers(name: str) -> None:
    training = Training(lr=0.01, batch_size=4, accumulate=2, checkpointing=True)
    results = []
    for workers in (1, 2):
        clients = [TinyText(30, 1), TinyText(1, 2), TinyText(17, 4)]
        results.append(
            federate(
                tiny(torch.bfloat16),
                *(clients, TinyText(60, 9), name),
                rounds=2,
                training=training,
                workers=workers,
                threads=1,
                device="cpu",
            )
        )
    for key, value in results[0].tensors.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, results[1].tensors[key]), key
    assert results[0].accuracy_by_round == results[1].accuracy_by_round
    assert results[0].bytes_up == results[1].bytes_up


def test_logits_are_float32_at_least() -> None:
    data = TinyText(4, 1)
    for dtype, wanted in [(torch.float16, torch.float32), (torch.float64, torch.float64)]:
        batch = Batch.of(data, torch.arange(4), torch.device("cpu"))
        assert batch.run(tiny(dtype)).dtype == wanted
