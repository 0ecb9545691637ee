"""What a round's routing reports tell about experts, small enough for metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sluiceway import fedalign
from sluiceway.moe import BlockRouting

#: Numbers of a round at most that name a client and an expert; above them only sums are kept.
MOST = 4096


def routing_record(reports: Mapping[int, Sequence[BlockRouting]]) -> list[dict[str, Any]]:
    """By block, what the clients of a round report.

    Args:
        reports: by client; each has a report of every block.

    Returns:
        For each block, `experts` [E], the share of all tokens that entered each expert;
        `overlap`, see `overlap`; where regions were measured, `agreement`, see `agreement`; and,
        up to `MOST` numbers a round, by client `load` [E], the share of its tokens that entered
        each expert, and `weight` [E], its part of all clients' routing times margin, w_i(e) of
        FedAlign-MoE  [ours].
    """
    clients = sorted(reports)
    blocks = len(reports[clients[0]]) if clients else 0
    numbers = sum(2 * len(clients) * len(reports[clients[0]][b].load) for b in range(blocks))
    found = []
    for block in range(blocks):
        held = [reports[client][block] for client in clients]
        load, routing, margin = (
            torch.stack([getattr(one, name) for one in held]).double()
            for name in ("load", "routing", "margin")
        )
        total = load.sum(0)
        record: dict[str, Any] = {
            "experts": rounded(total / total.sum().clamp_min(1)),
            "overlap": round(overlap(routing), 4),
        }
        if all(one.region is not None for one in held):
            regions = torch.stack([one.region for one in held if one.region is not None])
            record["agreement"] = agreement(regions, load)
        if numbers <= MOST:
            shares = load / load.sum(1, keepdim=True).clamp_min(1)
            scores = fedalign.consistency_score(routing, margin)
            weights = scores / scores.sum(0, keepdim=True).clamp_min(1e-12)
            for name, values in (("load", shares), ("weight", weights)):
                record[name] = {
                    str(client): rounded(row) for client, row in zip(clients, values, strict=True)
                }
        found.append(record)
    return found


def rounded(values: Tensor) -> list[float]:
    """To four digits behind the point."""
    return [round(float(value), 4) for value in values]


def overlap(routing: Tensor) -> float:
    """Mean over pairs of clients of sum_e min(r_i(e), r_j(e)), in [0, 1]; 1 for one client  [ours].

    One minus the total variation of their routing distributions. Sorted by expert, the k-th
    smallest of N values is the smaller one in N - k pairs, so that no pair is formed.

    Args:
        routing: [N, E], rows that sum to 1.
    """
    count = len(routing)
    if count < 2:
        return 1.0
    times = torch.arange(count - 1, -1, -1, dtype=routing.dtype)
    smaller = (routing.sort(0).values * times[:, None]).sum()
    return float(smaller / (count * (count - 1) / 2))


def agreement(regions: Tensor, load: Tensor) -> float | None:
    """Mean cosine of the regions of pairs of clients, over experts that both tell of  [ours].

    Args:
        regions: [N, E, d]; zeros where a client does not tell one. load: [N, E].

    Returns:
        In [-1, 1]; None where two clients tell of no expert.
    """
    told = fedalign.told_regions(regions, load)
    unit = torch.nn.functional.normalize(regions.double(), dim=2) * told.unsqueeze(2)
    used = told.double().sum(0)
    pairs = (used * (used - 1)).sum()
    if not pairs:
        return None
    # sum over pairs of u_i . u_j = |sum_i u_i|^2 - sum_i |u_i|^2
    products = unit.sum(0).pow(2).sum(1) - unit.pow(2).sum((0, 2))
    return round(float(products.sum() / pairs), 4)
