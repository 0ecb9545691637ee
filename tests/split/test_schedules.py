"""One step of every schedule: gradient i belongs to batch i, and labels stay where they should."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from tests.split.small import (
    METHODS_AND_SCHEDULES,
    Pictures,
    local,
    normed,
    plain,
    same,
    set_up,
    tail_of,
    train,
)
from torch import Tensor, nn
from torch.nn import functional

from sluiceway.core.batches import Batch
from sluiceway.core.settings import Optimisation
from sluiceway.split import (
    ACPSL,
    METHODS,
    BatchId,
    Compressor,
    TaylorChannels,
    WireError,
)
from sluiceway.split.client import SplitClient
from sluiceway.split.packing import Encoded
from sluiceway.split.rounds import SplitLoop
from sluiceway.split.schedules import spread

STEP = Optimisation(lr=0.1, batch_size=8, optimizer="sgd")
#: Equal sizes, so that a swap would fit by shape; and one that is smaller.
SIZES = (8, 8, 8, 5)
orders = st.permutations(range(4))
few = settings(max_examples=25, suppress_health_check=list(HealthCheck))


def begun(
    schedule: str, method: Compressor | None = None
) -> tuple[SplitLoop, list[BatchId], list[tuple[Batch, Tensor]]]:
    """Four clients that took the first round's layers, and the first batch and rows of each."""
    sets = [Pictures(size, seed) for seed, size in enumerate(SIZES)]
    built = set_up(
        normed(),
        "conv1",
        sets,
        method or Compressor(),
        schedule=schedule,
        tail_at=tail_of(schedule),
        training=STEP,
    )
    message = built.round_start(1)
    turns = []
    for client in local(built):
        client.begin(1, message, built.masks.mask(client.client_id))
        turns.append(next(client.batches(1)))
    return built, [name for name, _, _ in turns], [(batch, rows) for _, batch, rows in turns]


def wanted_gradients(built: SplitLoop, batches: list[Batch]) -> list[dict[str, Tensor]]:
    """Of each client's own layers, by plain autograd through copies of all layers at once."""
    layers = [copy.deepcopy(client.layers).train() for client in local(built)]
    back = copy.deepcopy(built.model.back).train()
    hidden = back(torch.cat([m["front"](b.inputs) for m, b in zip(layers, batches, strict=True)]))
    parts = hidden.split([len(b.labels) for b in batches])
    total, found = len(hidden), []
    outs = [m["tail"](h) if "tail" in m else h for m, h in zip(layers, parts, strict=True)]
    own = [functional.cross_entropy(o, b.labels) for o, b in zip(outs, batches, strict=True)]
    losses = [loss * len(b.labels) / total for loss, b in zip(own, batches, strict=True)]
    sum(losses, start=torch.zeros(())).backward()
    for module, batch in zip(layers, batches, strict=True):
        # Of its own mean loss: what others' batches are weighted by is taken out again.
        scale = total / len(batch.labels)
        found.append(
            {n: p.grad * scale for n, p in module.named_parameters() if p.grad is not None}
        )
    return found


def due(message: Encoded, size: int = 0) -> tuple[BatchId, int, int]:
    """The batch and the number of rows that a message says it has, and examples of the client."""
    return message.header.batch, message.header.shape[0], size


@pytest.mark.parametrize("schedule", ["parallel", "u"])
@few
@given(sending=orders, receiving=orders)
def test_gradient_i_belongs_to_batch_i(
    schedule: str, sending: list[int], receiving: list[int]
) -> None:
    built, names, batches = begun(schedule)
    before = [{n: p.detach().clone() for n, p in c.params.items()} for c in local(built)]
    wanted = wanted_gradients(built, [batch for batch, _ in batches])
    messages = [local(built)[i].send(names[i], *batches[i]) for i in sending]
    server = built.servers[-1]
    if schedule == "u":
        opened = [server.open(m, *due(m), labels=False) for m in messages]
        replies, refused = server.step_u(
            opened, lambda n, m: local(built)[n.client].tail_gradient(n, m)
        )
        assert refused == {}
    else:
        replies = server.step([server.open(m, *due(m), labels=True) for m in messages])
    answers = dict(zip(sending, replies, strict=True))
    for i in receiving:
        local(built)[i].receive(names[i], answers[i])
    for client, old, gradients in zip(local(built), before, wanted, strict=True):
        for name, gradient in gradients.items():
            # Of the tail it is the mean over the client's own batch as it stands.
            moved = (old[name] - client.params[name].detach()) / STEP.lr
            assert torch.allclose(moved, gradient, rtol=1e-3, atol=2e-5), (client.client_id, name)


@few
@given(swapped=orders)
def test_a_gradient_that_went_astray_is_refused(swapped: list[int]) -> None:
    built, names, batches = begun("parallel")
    messages = [local(built)[i].send(names[i], *batches[i]) for i in range(4)]
    server = built.servers[-1]
    replies = server.step([server.open(m, *due(m), labels=True) for m in messages])
    for i, other in enumerate(swapped):
        if i == other:
            local(built)[i].receive(names[i], replies[other])
            continue
        before = {n: p.detach().clone() for n, p in local(built)[i].params.items()}
        with pytest.raises(WireError):
            local(built)[i].receive(names[i], replies[other])
        assert same(before, {n: p.detach() for n, p in local(built)[i].params.items()})


@pytest.mark.slow
@few
@given(turns=st.permutations([0] * 3 + [1] * 2 + [2] * 2))
def test_copies_do_not_notice_each_other(turns: list[int]) -> None:
    sets = [Pictures(20, 1), Pictures(12, 2), Pictures(9, 3)]
    one, other = (
        set_up(plain(0), "conv1", sets, TaylorChannels(), schedule="copies", training=STEP)
        for _ in range(2)
    )
    one.run_round(1, [0, 1, 2])
    message, steps = other.round_start(1), {}
    for client in local(other):
        client.begin(1, message)
        steps[client.client_id] = client.batches(1)
    for number in turns:
        name, batch, rows = next(steps[number])
        client = local(other)[number]
        server = other.servers[number]
        opened = server.open(client.send(name, batch, rows), name, len(rows), 0, labels=True)
        (reply,) = server.step([opened])
        client.receive(name, reply)
    for mine, yours in zip(local(one), local(other), strict=True):
        assert same(
            {n: t.detach() for n, t in mine.owned.items()},
            {n: t.detach() for n, t in yours.owned.items()},
        )
        assert yours.scorer is not None
        assert torch.equal(yours.scorer.scores().float(), one.masks.scores[mine.client_id].float())  # type: ignore[union-attr]


class Post:
    """Everything that crosses, as it crosses: between rounds, and of batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.between_down: list[bytes] = []
        self.between_up: list[bytes] = []
        self.ups: list[bytes] = []
        self.downs: list[bytes] = []
        begin, end = SplitClient.begin, SplitClient.end
        up, down = Compressor.up, Compressor.down

        def noted(kept: list[bytes], call: Callable[..., Any]) -> Callable[..., Any]:
            def noting(*args: Any) -> Any:
                found = call(*args)
                kept.append(bytes(found[0] if isinstance(found, tuple) else found))
                return found

            return noting

        def noted_up(*args: Any, training: bool = True, **named: Any) -> Any:
            message, context = up(*args, training=training, **named)
            if training:
                self.ups.append(bytes(message))
            return message, context

        def noted_begin(client: SplitClient, number: int, message: bytes, *rest: Any) -> None:
            self.between_down.append(message)
            begin(client, number, message, *rest)

        monkeypatch.setattr(SplitClient, "begin", noted_begin)
        monkeypatch.setattr(SplitClient, "end", noted(self.between_up, end))
        monkeypatch.setattr(Compressor, "up", noted_up)
        monkeypatch.setattr(Compressor, "down", noted(self.downs, down))


@pytest.mark.parametrize(("name", "schedule"), METHODS_AND_SCHEDULES)
def test_labels_stay_in_a_u_shape_and_all_that_crosses_is_counted(
    schedule: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    post, method = Post(monkeypatch), METHODS[name]()
    result = train(method, schedule=schedule, training=STEP)
    for message in (*post.between_down, *post.between_up):
        parts = {key.split("/")[0] for key in load(message)}
        assert parts <= {"model", "mask", "basis", "scores", "counts", "loss"}
    sent = [message for message in (*post.ups, *post.downs) if message[5] <= 2]
    assert sent
    assert all(bool(message[8]) == (schedule != "u") for message in sent)
    # In a U-shape both kinds of message go both ways.
    every = [*post.between_down, *post.between_up, *post.ups, *post.downs]
    assert result.bytes_up + result.bytes_down == sum(map(len, every))
    if schedule != "u":
        assert result.bytes_up == sum(map(len, (*post.between_up, *post.ups)))


def test_a_u_shape_rates_channels_with_labels_as_the_others_do() -> None:
    def run(schedule: str) -> list[Any]:
        method, sets = ACPSL(share=0.25), [Pictures(30, 1)]
        result = train(method, sets, schedule=schedule, rounds=5, training=STEP)
        return [(r.scores, r.mask) for r in result.records]  # type: ignore[attr-defined]

    assert run("u") == run("parallel")
    scores, mask = run("u")[-1]
    assert max(scores) > 0
    assert sum(mask) == 2


def test_a_server_of_a_u_shape_refuses_labels() -> None:
    built, names, batches = begun("parallel")
    message = local(built)[0].send(names[0], *batches[0])
    with pytest.raises(WireError, match="labels: expected none"):
        built.servers[-1].open(message, *due(message), labels=False)


def test_a_server_refuses_what_is_not_of_its_cut() -> None:
    built, names, batches = begun("parallel")
    wrong = [
        Compressor().up(torch.zeros(2, 8, 4, 4), names[0], torch.zeros(2).long())[0],
        Compressor().up(torch.zeros(2, 8, 3, 3), names[0])[0],
        Compressor().up(torch.zeros(2, 8, 3, 3), names[0], torch.tensor([0, 9]))[0],
        Compressor(quantize="int8").up(torch.zeros(2, 8, 3, 3), names[0], torch.zeros(2).long())[0],
        bytes(local(built)[0].send(names[0], *batches[0]))[:-1],
    ]
    for message in wrong:
        with pytest.raises(WireError):
            built.servers[-1].open(message, names[0], 2, 8, labels=True)


def test_a_layer_that_works_in_place_may_follow_a_cut() -> None:
    for place in (nn.ReLU(inplace=True), nn.ReLU()):
        model = plain(0)
        model.relu1 = place
        result = train(model=model, rounds=2, training=STEP)
        found = result.tensors
        if place.inplace:
            expected = found
    assert same(expected, found)


def test_which_clients_step_by_hand() -> None:
    assert list(spread([4, 2, 0, 1])) == [[0], [0, 1], [0], [0, 1, 3]]
    assert list(spread([])) == list(spread([0, 0])) == []


@given(st.lists(st.integers(0, 30), max_size=8))
def test_every_batch_once_and_evenly(counts: list[int]) -> None:
    steps = list(spread(counts))
    assert len(steps) == max(counts, default=0)
    for i, count in enumerate(counts):
        taken = [i in step for step in steps]
        assert sum(taken) == count
        if not steps:
            continue
        for half in (taken[: len(taken) // 2], taken[len(taken) // 2 :]):
            assert abs(sum(half) - count * len(half) / len(steps)) <= 1
