"""One step of every form: gradient i belongs to batch i, and labels stay where they should."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from tests.split.small import Pictures, clients, normed, plain, same, set_up, sides, tail_of
from torch import Tensor, nn
from torch.nn import functional

from sluiceway.core.batches import Batch
from sluiceway.core.settings import Optimisation
from sluiceway.split import (
    ACPSL,
    METHODS,
    SCHEDULES,
    BatchId,
    Compressor,
    TaylorChannels,
    WireError,
    split_train,
)
from sluiceway.split.client import SplitClient
from sluiceway.split.client_proxy import generator
from sluiceway.split.header import Header
from sluiceway.split.rounds import SplitLoop

STEP = Optimisation(lr=0.1, batch_size=8, optimizer="sgd")
#: Equal sizes, so that a swap would fit by shape; and one that is smaller.
SIZES = (8, 8, 8, 5)
orders = st.permutations(range(4))
few = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def begun(
    form: str, method: Compressor | None = None
) -> tuple[SplitLoop, list[BatchId], list[Batch]]:
    """Four clients that took the first round's layers, and the first batch of each."""
    sets = [Pictures(size, seed) for seed, size in enumerate(SIZES)]
    built = set_up(
        normed(),
        "conv1",
        sets,
        method or Compressor(),
        form=form,
        tail_at=tail_of(form),
        training=STEP,
    )
    opening = built.opening(1)
    turns = []
    for client in sides(built):
        client.begin(1, opening, built.strategy, built.masks.mask(client.number))
        turns.append(next(client.batches(1, generator(0, 1, client.number))))
    return built, [name for name, _ in turns], [batch for _, batch in turns]


def wanted_gradients(built: SplitLoop, batches: list[Batch]) -> list[dict[str, Tensor]]:
    """Of each client's own layers, by plain autograd through copies of all layers at once."""
    layers = [copy.deepcopy(client.layers).train() for client in sides(built)]
    back = copy.deepcopy(built.back).train()
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


@pytest.mark.parametrize("form", ["parallel", "u"])
@few
@given(sending=orders, receiving=orders)
def test_gradient_i_belongs_to_batch_i(form: str, sending: list[int], receiving: list[int]) -> None:
    built, names, batches = begun(form)
    before = [{n: p.detach().clone() for n, p in c.params.items()} for c in sides(built)]
    wanted = wanted_gradients(built, batches)
    messages = [sides(built)[i].send(names[i], batches[i]) for i in sending]
    server = built.servers[-1]
    if form == "u":
        opened = [server.open(message, labels=False) for message in messages]
        replies, refused = server.step_u(opened, lambda n, m: sides(built)[n.client].finish(n, m))
        assert refused == {}
    else:
        replies = server.step([server.open(message, labels=True) for message in messages])
    answers = dict(zip(sending, replies, strict=True))
    for i in receiving:
        sides(built)[i].receive(names[i], answers[i])
    for client, old, gradients in zip(sides(built), before, wanted, strict=True):
        for name, gradient in gradients.items():
            # Of the tail it is the mean over the client's own batch as it stands.
            moved = (old[name] - client.params[name].detach()) / STEP.lr
            assert torch.allclose(moved, gradient, rtol=1e-3, atol=2e-5), (client.number, name)


@few
@given(swapped=orders)
def test_a_gradient_that_went_astray_is_refused(swapped: list[int]) -> None:
    built, names, batches = begun("parallel")
    messages = [sides(built)[i].send(names[i], batches[i]) for i in range(4)]
    server = built.servers[-1]
    replies = server.step([server.open(message, labels=True) for message in messages])
    for i, other in enumerate(swapped):
        if i == other:
            sides(built)[i].receive(names[i], replies[other])
            continue
        before = {n: p.detach().clone() for n, p in sides(built)[i].params.items()}
        with pytest.raises(WireError):
            sides(built)[i].receive(names[i], replies[other])
        assert same(before, {n: p.detach() for n, p in sides(built)[i].params.items()})


@few
@given(turns=st.permutations([0] * 3 + [1] * 2 + [2] * 2))
def test_copies_do_not_notice_each_other(turns: list[int]) -> None:
    sets = [Pictures(20, 1), Pictures(12, 2), Pictures(9, 3)]
    one, other = (
        set_up(plain(0), "conv1", sets, TaylorChannels(), form="copies", training=STEP)
        for _ in range(2)
    )
    one.run_round(1, [0, 1, 2])
    opening, steps = other.opening(1), {}
    for client in sides(other):
        client.begin(1, opening, other.strategy)
        steps[client.number] = client.batches(1, generator(0, 1, client.number))
    for number in turns:
        name, batch = next(steps[number])
        client = sides(other)[number]
        server = other.servers[number]
        (reply,) = server.step([server.open(client.send(name, batch), labels=True)])
        client.receive(name, reply)
    for mine, yours in zip(sides(one), sides(other), strict=True):
        assert same(
            {n: t.detach() for n, t in mine.owned.items()},
            {n: t.detach() for n, t in yours.owned.items()},
        )
        assert yours.meter is not None
        assert torch.equal(yours.meter.scores().float(), one.masks.scores[mine.number].float())  # type: ignore[union-attr]


class Post:
    """Everything that crosses, as it crosses: between rounds, and of batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.between_down: list[bytes] = []
        self.between_up: list[bytes] = []
        self.ups: list[bytes] = []
        self.downs: list[bytes] = []
        begin, end = SplitClient.begin, SplitClient.end
        up, down = Compressor.up, Compressor.down

        def noted(kept: list[bytes], call: Callable[..., bytes]) -> Callable[..., bytes]:
            def noting(*args: Any) -> bytes:
                kept.append(call(*args))
                return kept[-1]

            return noting

        def noted_up(*args: Any, training: bool = True, **named: Any) -> Any:
            message, ticket = up(*args, training=training, **named)
            if training:
                self.ups.append(message)
            return message, ticket

        def noted_begin(client: SplitClient, number: int, message: bytes, *rest: Any) -> None:
            self.between_down.append(message)
            begin(client, number, message, *rest)

        monkeypatch.setattr(SplitClient, "begin", noted_begin)
        monkeypatch.setattr(SplitClient, "end", noted(self.between_up, end))
        monkeypatch.setattr(Compressor, "up", noted_up)
        monkeypatch.setattr(Compressor, "down", noted(self.downs, down))


@pytest.mark.parametrize("form", SCHEDULES)
@pytest.mark.parametrize("name", ["sl", "acp-sl", "random", "topk", "quantize"])
def test_labels_stay_in_a_u_shape_and_all_that_crosses_is_counted(
    form: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    post, method = Post(monkeypatch), METHODS[name]()
    result = split_train(
        normed(), "conv1", clients(), Pictures(9, 1), method, form=form, tail_at=tail_of(form),
        rounds=3, training=STEP,
    )  # fmt: skip
    for message in (*post.between_down, *post.between_up):
        parts = {key.split("/")[0] for key in load(message)}
        assert parts <= {"model", "mask", "scores", "counts", "loss"}
    headers = [Header.parse(memoryview(m), 1 << 20) for m in (*post.ups, *post.downs)]
    sent = [h for h in headers if not h.gradient]
    assert sent
    assert all(bool(h.label_bytes) == (form != "u") for h in sent)
    # In a U-shape both kinds of message go both ways.
    every = [*post.between_down, *post.between_up, *post.ups, *post.downs]
    assert result.bytes_up + result.bytes_down == sum(map(len, every))
    if form != "u":
        assert result.bytes_up == sum(map(len, (*post.between_up, *post.ups)))


def test_a_u_shape_rates_channels_with_labels_as_the_others_do() -> None:
    def run(form: str) -> list[Any]:
        result = split_train(
            normed(), "conv1", [Pictures(30, 1)], Pictures(9, 1), ACPSL(share=0.25), form=form,
            tail_at=tail_of(form), rounds=5, training=STEP,
        )  # fmt: skip
        return [(r.scores, r.mask) for r in result.records]  # type: ignore[attr-defined]

    assert run("u") == run("parallel")
    scores, mask = run("u")[-1]
    assert max(scores) > 0
    assert sum(mask) == 2


def test_a_server_of_a_u_shape_refuses_labels() -> None:
    built, names, batches = begun("parallel")
    message = sides(built)[0].send(names[0], batches[0])
    with pytest.raises(WireError, match="labels: expected none"):
        built.servers[-1].open(message, labels=False)


def test_a_server_refuses_what_is_not_of_its_cut() -> None:
    built, names, batches = begun("parallel")
    wrong = [
        Compressor().up(torch.zeros(2, 8, 4, 4), names[0], torch.zeros(2).long())[0],
        Compressor().up(torch.zeros(2, 8, 3, 3), names[0])[0],
        Compressor().up(torch.zeros(2, 8, 3, 3), names[0], torch.tensor([0, 9]))[0],
        Compressor(quantize="int8").up(torch.zeros(2, 8, 3, 3), names[0], torch.zeros(2).long())[0],
        sides(built)[0].send(names[0], batches[0])[:-1],
    ]
    for message in wrong:
        with pytest.raises(WireError):
            built.servers[-1].open(message, labels=True)


def test_a_layer_that_works_in_place_may_follow_a_cut() -> None:
    for place in (nn.ReLU(inplace=True), nn.ReLU()):
        model = plain(0)
        model.relu1 = place
        result = split_train(model, "conv1", clients(), Pictures(9, 1), rounds=2, training=STEP)
        found = result.tensors
        if place.inplace:
            expected = found
    assert same(expected, found)
