"""A client that sends what cannot be trained on does no harm, and is named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.split.small import SGD, Pictures, train
from torch import Tensor, nn

from sluiceway.core.guards import TooFewUpdates
from sluiceway.core.round_loop import Result
from sluiceway.split.schedules import SCHEDULES


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


def bursting(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that is NaN for batches of 5, and so its gradients."""
    loss = nn.functional.cross_entropy(logits, labels)
    return loss * math.nan if len(labels) == 5 else loss


def test_a_tail_that_answers_nan_is_not_believed() -> None:
    result = run([Pictures(32, 1), Pictures(5, 4)], schedule="u", loss=bursting, rounds=2)
    for record in result.records:
        assert record.rejected == {1: "NaN or Inf in the gradient of the tail"}
    assert all(bool(tensor.isfinite().all()) for tensor in result.tensors.values())
