"""A client that sends what cannot be trained on does no harm, and is named."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.split.small import SGD, Pictures, local, normed, same, set_up, tail_of, train
from torch import Tensor, nn

from sluiceway.core.guards import TooFewUpdates
from sluiceway.core.round_loop import Result
from sluiceway.split import Compressor
from sluiceway.split.client import SplitClient
from sluiceway.split.config import BatchSizes
from sluiceway.split.packing import BatchId, Encoded
from sluiceway.split.schedules import SCHEDULES, spread


class Broken(Pictures):
    """One pixel of each picture is NaN, as from a faulty scanner."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size, seed)
        self.tensors[0][:, 0, 0, 0] = math.nan


def run(sets: list[Pictures], **changed: Any) -> Result:
    return train(
        **{"method": "acp-sl", "sets": sets, "test": Pictures(40, 99), "training": SGD} | changed
    )


@pytest.mark.parametrize(
    ("method", "schedule"), [*(("acp-sl", s) for s in SCHEDULES), ("quantize", "u")]
)
def test_a_client_with_nan_pictures_is_left_out(schedule: str, method: str) -> None:
    result = run(
        [Pictures(30, 1), Broken(24, 2), Pictures(17, 4)], schedule=schedule, method=method
    )
    for record in result.records:
        assert list(record.rejected) == [1]
        assert "(batch 0)" in record.rejected[1]
        assert math.isfinite(record.loss)
    assert result.rejected == 3
    assert all(bool(tensor.isfinite().all()) for tensor in result.tensors.values())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_others_train_as_if_it_were_not_there(schedule: str) -> None:
    if schedule == "sequential":
        pytest.skip("its front is handed on with what was learned before it was refused")
    # The broken one is no longer than the others, so that their batches meet in the same steps.
    with_it = run([Pictures(30, 1), Broken(24, 2), Pictures(17, 4)], schedule=schedule, method="sl")
    without = run(
        [Pictures(30, 1), Pictures(0, 2), Pictures(17, 4)], schedule=schedule, method="sl"
    )
    for name, tensor in without.tensors.items():
        assert torch.equal(with_it.tensors[name], tensor), name


def test_with_too_few_left_the_run_ends() -> None:
    with pytest.raises(TooFewUpdates, match=r"1 of 2 clients could be used, run.min_clients = 2"):
        run([Pictures(30, 1), Broken(24, 2)], min_clients=2)


class Lying(SplitClient):
    """A client whose messages are headed, or cut, as it likes."""

    lie: dict[str, Any]

    def smashed_data(self, batch_id: BatchId) -> Encoded:
        message = super().smashed_data(batch_id)
        rows = self.lie.get("rows")
        batch = batch_id._replace(**{k: v for k, v in self.lie.items() if k != "rows"})
        if rows is None:
            return replace(message, header=replace(message.header, batch=batch))
        values = torch.randn(rows, *self.config.shape)
        labels = None if self.tail else torch.zeros(rows, dtype=torch.int64)
        return self.config.link.up(values, batch, labels)[0]


@pytest.mark.parametrize("schedule", ["parallel", "u", "copies"])
@pytest.mark.parametrize(
    ("lie", "why"),
    [
        ({"client": 0}, "batch: expected BatchId(client=1, round=1, batch=0)"),
        ({"client": 77}, "got BatchId(client=77, round=1, batch=0)"),
        ({"round": 4}, "got BatchId(client=1, round=4, batch=0)"),
        ({"batch": 1}, "got BatchId(client=1, round=1, batch=1)"),
        ({"rows": 160}, "shape: expected [8, 8, 3, 3], got [160, 8, 3, 3]"),
        ({"rows": 1}, "shape: expected [8, 8, 3, 3], got [1, 8, 3, 3]"),
    ],
)
def test_a_batch_is_held_to_what_its_client_was_asked_for(
    schedule: str, lie: dict[str, Any], why: str
) -> None:
    """Nobody learns with another client's labels, ends the run, or weighs more than it should."""
    sets = [Pictures(30, 1), Pictures(24, 2), Pictures(17, 4)]
    loop = set_up(
        normed(), "conv1", sets, Compressor(), schedule=schedule, tail_at=tail_of(schedule)
    )
    liar = local(loop)[1]
    liar.__class__, liar.lie = Lying, lie  # type: ignore[attr-defined]
    record = loop.run_round(1, [0, 1, 2])
    assert list(record.rejected) == [1]
    assert why in record.rejected[1]
    without = [sets[0], Pictures(0, 2), sets[2]]
    honest = set_up(
        normed(), "conv1", without, Compressor(), schedule=schedule, tail_at=tail_of(schedule)
    )
    honest.run_round(1, [0, 2])
    for mine, yours in zip(loop.model.parts(), honest.model.parts(), strict=True):
        assert same(dict(mine.named_parameters()), dict(yours.named_parameters()))  # type: ignore[arg-type]


def test_no_list_is_made_of_the_examples_that_a_client_claims() -> None:
    sizes = BatchSizes(16, 10**12, 3, 2)
    assert (len(sizes), sizes[10**12], sizes[10**12 + 1], sizes[-1]) == (2 * 10**12 + 2, 3, 16, 3)
    assert sizes.counts() == {16: 2 * 10**12, 3: 2}
    assert next(spread([len(sizes), 0, 1])) == [0]
    assert list(BatchSizes(4, 2, 1, 2)) == [4, 4, 1, 4, 4, 1]
    assert list(BatchSizes(4, 2, 0, 2)) == [4, 4, 4, 4]
    assert list(BatchSizes(4, 0, 0, 3)) == []


def bursting(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that is NaN for batches of 5, and so its gradients."""
    loss = nn.functional.cross_entropy(logits, labels)
    return loss * math.nan if len(labels) == 5 else loss


def test_a_tail_that_answers_nan_is_not_believed() -> None:
    sets = [Pictures(32, 1), Pictures(5, 4)]
    result = run(sets, method="sl", schedule="u", loss=bursting, rounds=2)
    for record in result.records:
        assert record.rejected == {1: "NaN or Inf in the gradient of the tail"}
    assert all(bool(tensor.isfinite().all()) for tensor in result.tensors.values())


class Boasting(SplitClient):
    """A client that says of its losses what it likes."""

    told: tuple[int, float]

    def end(self, round: int, crossing: bool) -> tuple[bytes, Tensor | None]:
        self.losses = [(self.told[0], torch.tensor(self.told[1]))]
        return super().end(round, crossing)


@pytest.mark.parametrize("told", [(49, 1.0), (24, math.inf), (-1, 1.0)])
def test_losses_are_of_the_examples_that_a_client_holds(told: tuple[int, float]) -> None:
    sets = [Pictures(30, 1), Pictures(24, 2)]
    loop = set_up(normed(), "conv1", sets, Compressor(), schedule="u", tail_at=tail_of("u"))
    liar = local(loop)[1]
    liar.__class__, liar.told = Boasting, told  # type: ignore[attr-defined]
    record = loop.run_round(1, [0, 1])
    assert list(record.rejected) == [1]
    assert "expected a finite one over at most 48" in record.rejected[1]
    assert record.train_loss is not None
    assert math.isfinite(record.train_loss)
