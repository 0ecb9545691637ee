"""Every byte of a round is counted, and a budget keeps it below a limit."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save
from tests.split.small import (
    METHODS_AND_SCHEDULES,
    SGD,
    Pictures,
    clients,
    normed,
    records,
    set_up,
    train,
)
from torch import Tensor

from sluiceway.channels import ClassStatistics, fisher, merge_scores, pooled, top
from sluiceway.core.round_loop import Record
from sluiceway.core.settings import SplitTraining
from sluiceway.split import (
    ACPSL,
    METHODS,
    SCHEDULES,
    Compressor,
    L1Channels,
    cut,
)
from sluiceway.strategies import FedAvg, Scaffold, Strategy

schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def between_rounds(model: dict[str, Tensor], part: dict[str, Tensor], facts: object) -> int:
    tensors = {f"model/{name}": tensor for name, tensor in model.items()} | part
    return len(save(tensors, {"sluiceway": json.dumps(facts, sort_keys=True)}))


@pytest.mark.parametrize(
    ("name", "schedule"),
    [pair for pair in METHODS_AND_SCHEDULES if pair[0] not in ("bottleneck", "sl-fac", "delta")],
)
def test_bytes_are_the_lengths_of_all_messages(name: str, schedule: str) -> None:
    model = normed()
    front, back = cut(model, "conv1")
    held = {f"front.{n}": t for n, t in front.state_dict().items()}
    if schedule == "u":
        _, tail = cut(back, "conv4")
        held |= {f"tail.{n}": t for n, t in tail.state_dict().items()}
    exchanged = {n: t for n, t in held.items() if t.is_floating_point()}
    closing = {f"counts/{n}": t for n, t in held.items() if n not in exchanged}
    if schedule == "u":
        closing |= {"loss/examples": torch.tensor(1), "loss/sum": torch.tensor(1.0).double()}
    sets = [*clients()]
    method = ACPSL(preset="paper") if name == "acp-sl" else METHODS[name]()
    sets[1] = Pictures(2, 5)  # one example alone would be left out in two of the schedules
    result = train(method, sets, model=model, schedule=schedule)
    rated = name in ("acp-sl", "l1", "std", "entropy", "taylor")
    for number, record in enumerate(records(result.records), 1):
        up = down = 0
        kept = int(record.kept) if record.mask is not None else None
        for client in (0, 1, 3):
            mask = {"mask/kept": torch.tensor(record.mask)} if rated or name == "ics" else {}
            scores = {"scores/channels": torch.zeros(8)} if rated else {}
            down += between_rounds(exchanged, mask, {"version": 1, "round": number})
            size = len(sets[client])
            facts = {"version": 1, "round": number, "client": client, "examples": size}
            up += between_rounds(exchanged, closing | scores, facts)
            up += method.bytes_up((size, 8, 3, 3), kept, label_bytes=schedule != "u")
            down += method.bytes_down((size, 8, 3, 3), kept)
            if schedule == "u":
                tail_link = Compressor(quantize=method.quantize)
                down += tail_link.bytes_up((size, 16, 1, 1))
                up += tail_link.bytes_down((size, 16, 1, 1))
        assert (record.bytes_up, record.bytes_down) == (up, down)


def test_warm_up_sends_everything_and_the_schedule_shrinks() -> None:
    method = ACPSL(share=0.25, warmup=2, ramp_rounds=3)
    result = train(method, rounds=8)
    kept = [record.kept for record in records(result.records)]
    assert kept[:2] == [8, 8]
    assert all(a >= b for a, b in pairwise(kept))
    assert kept[2] < 8
    assert kept[5:] == [2, 2, 2]
    sent = [record.bytes_up for record in result.records]
    assert all(a >= b for a, b in pairwise(sent))


@pytest.mark.parametrize("masks", ["merged", "client"])
@schedules
def test_without_a_warm_up_nothing_crosses_unpruned(
    schedule: str, masks: Literal["merged"]
) -> None:
    method = ACPSL(share=0.25, warmup=0, ramp_rounds=0, masks=masks)
    sets = [*clients(), Pictures(0, 1)]
    result = train(method, sets, schedule=schedule)
    found = records(result.records)
    assert [record.kept for record in found] == [2, 2, 2]
    # What the clients' scores of the first front take up is in the first round alone.
    more = found[0].bytes_up - found[1].bytes_up
    eligible = sum(len(examples) > 0 for examples in sets)
    rating = len(
        save({"scores/channels": torch.zeros(8)}, {"sluiceway": '{"client": 0, "version": 1}'})
    )
    assert more == (eligible * rating if masks == "merged" else 0)


def test_the_first_mask_is_that_of_the_untrained_front() -> None:
    sets = clients()
    rated = []
    for examples in sets:
        if len(examples):
            front = cut(normed(), "conv1")[0].train()
            A = torch.cat([front(part) for part in examples.tensors[0].split(64)])
            stats = ClassStatistics.of(pooled(A.detach(), 4), examples.labels, 3, cosines=False)
            rated.append((fisher(stats).float(), float(len(examples))))
    scores, weights = zip(*rated, strict=True)
    merged = merge_scores(torch.stack(scores), torch.tensor(weights))
    method = ACPSL(share=0.25, warmup=0, ramp_rounds=0)
    result = train(method, sets, rounds=1)
    (first,) = records(result.records)
    assert first.mask == top(merged, 2).tolist()


def test_methods_of_equal_settings_send_equal_bytes() -> None:
    sent = {}
    for name in ("acp-sl", "l1", "std", "entropy", "taylor", "random"):
        method = METHODS[name](share=0.25, quantize="int8")  # type: ignore[call-arg]
        result = train(method, rounds=6)
        sent[name] = [(record.bytes_up, record.bytes_down) for record in result.records]
    fixed = sent.pop("random")
    assert len({tuple(found) for found in sent.values()}) == 1
    differences = {(a - c, b - d) for (a, b), (c, d) in zip(sent["l1"], fixed, strict=True)}
    # Three clients' scores up, and the mask down to each: the same in every round.
    assert len(differences) == 1
    up, down = differences.pop()
    assert 3 * 4 * 8 <= up <= 3 * (4 * 8 + 90)
    assert 3 * 8 <= down <= 3 * (8 + 90)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "masks", "strategy", "participation"),
    [
        ("sequential", "merged", FedAvg, 1.0),
        ("u", "client", Scaffold, 1.0),
        ("copies", "merged", Scaffold, 0.5),
        ("parallel", "client", FedAvg, 0.5),
    ],
)
def test_a_budget_holds_once_the_ramp_is_over(
    schedule: str, masks: Any, strategy: type[Strategy], participation: float
) -> None:
    sets = [Pictures(30, 1), Pictures(1, 2), Pictures(0, 3), Pictures(17, 4), Pictures(33, 5)]

    def run(method: ACPSL, rounds: int) -> list[Record]:
        settings: dict[str, Any] = {"participation": participation, "training": SGD}
        settings |= {"client_aggregation": strategy(), "schedule": schedule}
        return train(method, sets, rounds=rounds, **settings).records

    least, most = (
        max(r.bytes_up + r.bytes_down for r in run(ACPSL(share=share, ramp_rounds=0), 4)[1:])
        for share in (0.125, 1.0)
    )
    budget = (least + most) / 2e6
    found = run(ACPSL(rule="budget", budget_mb=budget, ramp_rounds=1, masks=masks), 8)
    sent = [r.bytes_up + r.bytes_down for r in found]
    rated = {client for record in found[:4] for client in record.clients}
    late = [n for n, r in enumerate(found) if masks == "client" and not rated >= {*r.clients}]
    assert all(n < 5 or n in late or nbytes <= budget * 1e6 for n, nbytes in enumerate(sent))
    if participation == 1:
        assert 2 <= records(found)[-1].kept < 8
        assert sent[-1] > 0.6 * budget * 1e6


def test_a_budget_knows_the_last_batches_that_are_finer() -> None:
    method, sets = (
        L1Channels(warmup=0, quantize="int4", deployed_quantize="int8"),
        [Pictures(20, 1)],
    )
    lengths = []
    for recalibrate in (0, 2):
        training = SplitTraining(batch_size=8, recalibrate=recalibrate)
        loop = set_up(normed(), "conv1", sets, method, training=training)
        lengths.append(loop.setup.round_bytes([20])(2))
    shapes = (8, 8, 3, 3), (4, 8, 3, 3)
    more = [method.deployed.bytes_up(s, 2) - method.bytes_up(s, 2) for s in shapes]
    assert lengths[1] - lengths[0] == sum(more) > 0


def test_a_budget_below_one_channel_is_refused() -> None:
    method = L1Channels(rule="budget", budget_mb=1e-3)
    with pytest.raises(ValueError, match=r"method.budget_mb = 0.001: a round with one channel"):
        train(method)
