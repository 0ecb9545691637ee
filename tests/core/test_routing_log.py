"""What metrics.jsonl has of routing, against loops over pairs of clients."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from sluiceway.core import routing_log
from sluiceway.core.routing_log import agreement, overlap, routing_record
from sluiceway.moe import BlockRouting


def report(seed: int, region: bool = True) -> BlockRouting:
    g = torch.Generator().manual_seed(seed)
    load = torch.randint(0, 9, (4,), generator=g).double()
    load[seed % 4] = 0
    routing = torch.rand(4, generator=g).double()
    mean = torch.randn(4, 6, generator=g).double() * (load > 0)[:, None]
    margin = torch.rand(4, generator=g).double()
    return BlockRouting(load, routing / routing.sum(), margin, mean if region else None, 9)


def test_against_loops_over_pairs() -> None:
    held = [report(seed) for seed in range(5)]
    routing = torch.stack([one.routing for one in held])
    load = torch.stack([one.load for one in held])
    regions = torch.stack([one.region for one in held if one.region is not None])
    pairs = list(combinations(range(5), 2))
    expected = sum(
        float(min(routing[i, e], routing[j, e])) for i, j in pairs for e in range(4)
    ) / len(pairs)
    assert overlap(routing) == pytest.approx(expected)
    cosines = [
        float(torch.cosine_similarity(regions[i, e], regions[j, e], dim=0))
        for i, j in pairs
        for e in range(4)
        if load[i, e] and load[j, e]
    ]
    assert agreement(regions, load) == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
    (block,) = routing_record({c: [one] for c, one in enumerate(held)})
    assert block["experts"] == pytest.approx((load.sum(0) / load.sum()).tolist(), abs=1e-4)
    assert block["load"]["2"] == pytest.approx((load[2] / load[2].sum()).tolist(), abs=1e-4)
    weights = torch.tensor(list(block["weight"].values()))
    assert torch.allclose(weights.sum(0), torch.ones(4), atol=1e-3)


def test_alike_and_apart() -> None:
    same = torch.tensor([[0.2, 0.8], [0.2, 0.8]]).double()
    assert overlap(same) == pytest.approx(1)
    assert overlap(torch.eye(2).double()) == 0
    assert overlap(same[:1]) == 1
    regions = torch.eye(2).double().reshape(2, 1, 2)
    assert agreement(regions, torch.ones(2, 1)) == 0
    assert agreement(regions, torch.tensor([[1.0], [0.0]])) is None


def test_many_clients_leave_sums_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_log, "MOST", 15)
    reports: dict[int, list[BlockRouting]] = {c: [report(c, region=False)] for c in range(2)}
    (block,) = routing_record(reports)
    assert sorted(block) == ["experts", "overlap"]
    assert routing_record({}) == []
    assert routing_record({0: []}) == []


def test_order_of_clients_changes_nothing() -> None:
    held: list[Tensor] = [report(seed).routing for seed in range(4)]
    assert overlap(torch.stack(held)) == pytest.approx(overlap(torch.stack(held[::-1])))
