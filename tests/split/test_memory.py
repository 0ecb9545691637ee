"""Delta coding: both ends read the same of every example, and rounding dies out."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.split.small import SGD, Pictures, local, normed, set_up
from torch import Tensor

from sluiceway.channels import Basis, eigenbasis
from sluiceway.core.messages import WireError
from sluiceway.split import (
    ACPSL,
    BatchId,
    Compressor,
    Delta,
    Expected,
    TopK,
    pack_smashed,
    unpack_smashed,
)
from sluiceway.split.memory import ExampleMemory, crossed, require_room, to_cross
from sluiceway.split.rounds import SplitLoop
from sluiceway.split.selection import every_channel

ID = BatchId(0, 1, 0)


def some_basis(channels: int) -> Basis:
    spread = torch.randn(channels, channels)
    rotation, _ = eigenbasis((spread @ spread.T).double())
    return Basis(
        rotation.float(),
        torch.randn(channels),
        torch.rand(channels) + 0.5,
        torch.rand(channels) + 1,
    )


def one_step(
    link: Compressor,
    ends: tuple[ExampleMemory, ExampleMemory],
    values: Tensor,
    rows: Tensor,
    **at: Any,
) -> Tensor:
    """A batch across the wire, as bytes; returns what the server reads."""
    client, size, basis = at.get("client", 0), at.get("size", 10), at.get("basis")
    before = ends[0].read(client, rows, size, values, basis)
    message, _ = link.up(to_cross(values, basis, before), ID, rows=rows)
    ends[0].write(client, rows, crossed(link.open(message).values, basis, before))
    opened = link.open(bytes(message), examples=size)
    assert opened.rows is not None
    before = ends[1].read(client, opened.rows, size, opened.values, basis)
    found = crossed(opened.values, basis, before)
    ends[1].write(client, opened.rows, found)
    return found


@pytest.mark.parametrize("quantize", ["int4", "dct"])
@pytest.mark.parametrize("with_basis", [False, True])
def test_what_is_read_follows_an_obvious_loop(quantize: str, with_basis: bool) -> None:
    torch.manual_seed(0)
    link = Compressor(quantize=quantize, delta=True)  # type: ignore[arg-type]
    ends, kept = (ExampleMemory(), ExampleMemory()), dict[tuple[int, int], Tensor]()
    for number in range(6):
        basis = some_basis(3) if with_basis else None
        client, rows, values = number % 2, torch.randperm(10)[:4], torch.randn(4, 3, 4, 4)
        # By its definition: each example apart, in float64.
        if number < 2:  # all examples of a client begin at the basis of its first batch
            start = torch.zeros(3) if basis is None else basis.mean
            for row in range(10):
                kept[client, row] = start.view(3, 1, 1).expand(3, 4, 4).double()
        matrix = torch.eye(3).double() if basis is None else basis.matrix.double()
        change = torch.stack(
            [a - kept[client, r] for a, r in zip(values, rows.tolist(), strict=True)]
        )
        sent = torch.einsum("kc,bchw->bkhw", matrix, change)
        read = link.open(link.up(sent.float(), ID)[0]).values.double()
        back = torch.einsum("ck,bkhw->bchw", torch.linalg.inv(matrix), read)
        found = one_step(link, ends, values, rows, client=client, basis=basis)
        for at, row in enumerate(rows.tolist()):
            kept[client, row] = kept[client, row] + back[at]
            torch.testing.assert_close(found[at].double(), kept[client, row], rtol=1e-4, atol=1e-4)
            kept[client, row] = found[at].double()


def test_of_values_that_stay_the_error_dies_out() -> None:
    torch.manual_seed(0)
    link, ends = Delta(ratio=16), (ExampleMemory(), ExampleMemory())
    values = torch.randn(8, 4, 8, 8).relu()
    errors = [
        float((one_step(link, ends, values, torch.arange(8)) - values).square().mean())
        for _ in range(5)
    ]
    assert all(later < 0.8 * sooner for sooner, later in pairwise(errors))


def test_what_was_rounded_before_fills_a_budget_too() -> None:
    # Most of it is as large as the last step's zone of 0, where bytes fall off a cliff.
    torch.manual_seed(0)
    sizes = torch.exp(1.5 * torch.randn(32, 1, 1)) / (1 + torch.arange(64)).view(8, 8)
    values = torch.empty(32, 32, 8, 8).exponential_() * torch.randn(32, 32, 8, 8).sign() * sizes
    link, left = Compressor(quantize="step", ratio=128), values
    for _ in range(6):
        message, _ = link.up(left, ID)
        assert 0.9 < len(message) / (values.numel() * 4 / 128) < 1.1
        left = left - link.open(message).values


def test_the_trained_model_is_used_without_a_memory() -> None:
    values, plain = torch.randn(8, 4, 8, 8).relu(), Compressor(quantize="dct", ratio=16)
    message, _ = Delta(ratio=16).up(values, ID, training=False)
    assert bytes(message) == bytes(plain.up(values, ID)[0])


def together(loop: SplitLoop) -> dict[int, bool]:
    """By client whether both ends have the same of it."""
    assert loop.memory is not None
    server, found = loop.memory.state_dict(), dict[int, bool]()
    for client in local(loop):
        assert client.memory is not None
        own = client.memory.state_dict()
        found[client.client_id] = own.keys() <= server.keys() and all(
            torch.equal(kept, server[name]) for name, kept in own.items()
        )
    return found


@pytest.mark.parametrize(
    "method",
    [
        Delta(quantize="int8"),
        ACPSL(delta=True, warmup=0),
        ACPSL(delta=True, basis="channels", share=0.25, warmup=0, quantize="int8"),
        TopK(delta=True, share=0.2),
    ],
    ids=lambda method: f"{method.name} {method.quantize}",
)
@pytest.mark.parametrize("schedule", ["parallel", "copies"])
def test_both_ends_have_the_same_of_every_example(method: Compressor, schedule: str) -> None:
    sets = [Pictures(50, 1), Pictures(30, 2)]
    loop = set_up(normed(), "conv1", sets, method, training=SGD, schedule=schedule)
    fronts = copy.deepcopy(loop.model.front)
    loop.run_round(1, [0, 1])
    assert together(loop) == {0: True, 1: True}
    assert loop.memory is not None
    if method.name != "delta":
        return
    # What is kept of an example is near what some front of the round made of that very example.
    for number, own in enumerate(sets):
        kept, made = loop.memory.state_dict()[str(number)], fronts(own.tensors[0]).detach()
        nearest = torch.cdist(kept.flatten(1), made.flatten(1)).argmin(1)
        assert float((nearest == torch.arange(len(own))).float().mean()) > 0.9


def test_who_did_not_come_well_through_a_round_begins_anew() -> None:
    loop = set_up(normed(), "conv1", [Pictures(20, 1), Pictures(20, 2)], Delta(quantize="int8"))
    loop.run_round(1, [0, 1])
    broken = local(loop)[1]
    sending, sent = broken.send, 0

    def send(batch_id: BatchId, batch: Any, rows: Tensor) -> Any:
        nonlocal sent
        sent += 1
        if sent == 2:  # its end takes this batch for sent, the server's end does not
            return replace(sending(batch_id, batch, rows), rows=torch.zeros(len(rows)).long())
        return sending(batch_id, batch, rows)

    broken.send = send  # type: ignore[method-assign]
    record = loop.run_round(2, [0, 1])
    assert "numbers of examples: expected each once" in record.rejected[1]
    assert together(loop) == {0: True, 1: False}
    assert loop.unsure == {1}
    loop.run_round(3, [0])  # whoever does not take part stays unsure
    assert loop.unsure == {1}
    record = loop.run_round(4, [0, 1])
    assert not record.rejected
    assert together(loop) == {0: True, 1: True}
    assert not loop.unsure


@given(st.sampled_from([(3, 1), (255, 1), (256, 2), (65_535, 2), (65_536, 4), (2**32 - 1, 4)]))
def test_numbers_of_examples_cross_in_the_fewest_bytes(case: tuple[int, int]) -> None:
    largest, size = case
    values, rows, ours = torch.randn(2, 3, 2, 2), torch.tensor([largest, 1]), every_channel(3)
    link = Compressor(delta=True)
    message, _ = link.up(values, ID, torch.tensor([1, 300]), rows=rows)
    assert len(bytes(message)) == len(message) == link.bytes_up((2, 3, 2, 2), None, 2, size)
    found = link.open(bytes(message), examples=largest + 1)
    assert found.rows is not None
    assert torch.equal(found.rows, rows)
    assert torch.equal(found.values, values)
    assert pack_smashed(values, ours, ID)[0] == bytes(link.up(values, ID)[0])


def test_wrong_numbers_of_examples_are_refused() -> None:
    link, values = Compressor(delta=True), torch.randn(2, 3, 2, 2)
    message = bytes(link.up(values, ID, rows=torch.tensor([4, 300]))[0])
    link.open(message, examples=301)
    with pytest.raises(WireError, match="numbers of examples: expected below 300, got 300"):
        link.open(message, examples=300)
    with pytest.raises(WireError, match="numbers of examples: expected none, got some"):
        link.open(message, examples=0)
    with pytest.raises(WireError, match="numbers of examples: expected some, got none"):
        link.open(bytes(link.up(values, ID)[0]), examples=300)
    for bad, why in (
        (message[:11] + b"\3" + message[12:], "numbers of examples of 3 bytes"),
        (message[:44] + b"\4\0\4\0" + message[48:], "expected 1 bytes each"),
        (message[:44] + b"\4\1\4\1" + message[48:], "expected each once"),
        (message[:5] + b"\3" + message[6:], "a gradient has no labels"),
    ):
        with pytest.raises(WireError, match=why):
            unpack_smashed(bad, expected=Expected())
    for rows in (torch.tensor([0, -1]), torch.tensor([0, 1 << 32]), torch.tensor([1])):
        with pytest.raises(ValueError, match="rows: expected"):
            link.up(values, ID, rows=rows)


def test_more_examples_than_there_is_memory_for() -> None:
    require_room([10, 20], (8, 3, 3), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"all examples take 4000000\.0 GB, and cpu has"):
        require_room([10**12], (10, 10, 10), torch.device("cpu"))
