"""Delta coding: both ends' values of an example follow each other, and rounding dies out."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from tests.split.small import SGD, Pictures, local, normed, set_up
from torch import Tensor

from sluiceway.split import BatchId, Compressor, Delta


@pytest.mark.parametrize("quantize", ["int4", "dct"])
def test_what_is_read_follows_an_obvious_loop(quantize: str) -> None:
    torch.manual_seed(0)
    method = Delta(quantize=quantize)  # type: ignore[arg-type]
    plain = Compressor(quantize=quantize)  # type: ignore[arg-type]
    kept: dict[tuple[int, int], Tensor] = {}
    for number in range(6):
        client = number % 2
        rows, id_ = torch.randperm(10)[:4], BatchId(client, 1, number)
        values = torch.randn(4, 3, 4, 4)
        method.expect(id_, rows, 10)
        found = method.open(bytes(method.up(values, id_)[0]), None, id_).values
        before = [kept.get((client, row), torch.zeros(3, 4, 4)) for row in rows.tolist()]
        message, _ = plain.up(values - torch.stack(before), id_)
        right = torch.stack(before) + plain.open(bytes(message)).values
        kept |= {(client, row): value for row, value in zip(rows.tolist(), right, strict=True)}
        assert torch.equal(found, right)


def test_of_values_that_stay_the_error_dies_out() -> None:
    torch.manual_seed(0)
    method, values = Delta(ratio=16), torch.randn(8, 4, 8, 8).relu()
    errors = []
    for round in range(1, 6):
        id_ = BatchId(0, round, 0)
        method.expect(id_, torch.arange(8), 8)
        opened = method.open(method.up(values, id_)[0], None, id_)
        errors.append(float((opened.values - values).square().mean()))
    assert all(later < 0.8 * sooner for sooner, later in pairwise(errors))
    # In use nothing crossed before: as the same rounding without a memory.
    once = method.open(method.up(values, BatchId(0, 0, 0), training=False)[0]).values
    again = Compressor(quantize="dct", ratio=16)
    assert torch.equal(once, again.open(again.up(values, BatchId(0, 0, 0))[0]).values)


def test_examples_are_told_apart_in_a_run() -> None:
    sets = [Pictures(50, 1), Pictures(30, 2)]
    loop = set_up(normed(), "conv1", sets, Delta(quantize="int8"), training=SGD)
    fronts = copy.deepcopy(loop.model.front)
    loop.run_round(1, [0, 1])
    link = loop.setup.config.link
    state = link.state_dict()
    assert {name: len(t) for name, t in state.items()} == {"kept/0": 50, "kept/1": 30}
    # What is kept of an example is near what some front of the round made of that very example.
    for client, own in zip(local(loop), sets, strict=True):
        made = fronts(own.tensors[0]).detach()
        kept = state[f"kept/{client.client_id}"]
        nearest = torch.cdist(kept.flatten(1), made.flatten(1)).argmin(1)
        assert float((nearest == torch.arange(len(own))).float().mean()) > 0.9
