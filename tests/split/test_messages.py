"""The messages at the start and end of a client's round: what does not belong there is rejected."""

from __future__ import annotations

import pytest
import torch
from tests.split.small import clients, local, normed, set_up
from torch import Tensor

from sluiceway.core.messages import message_of
from sluiceway.split import METHODS, WireError
from sluiceway.split.messages import read_initial_scores, read_round_end, read_round_start

KEPT = torch.tensor([True, False, True])
SCORES = torch.tensor([1.0, 2, 3])
LOSS = {"examples": torch.tensor(5), "sum": torch.tensor(2.5).double()}


def start(mask: Tensor | None = KEPT, round: int = 2) -> bytes:
    parts = {"model": {"w": torch.ones(2)}} | ({} if mask is None else {"mask": {"kept": mask}})
    return message_of(parts, {"round": round})


def end(client: int = 1, round: int = 2, **parts: dict[str, Tensor]) -> bytes:
    parts = {"model": {"w": torch.ones(2)}} | parts
    return message_of(parts, {"client": client, "round": round, "examples": 5})


def scores(values: Tensor, client: int = 1) -> bytes:
    return message_of({"scores": {"channels": values}}, {"client": client})


def test_what_is_read() -> None:
    broadcast, mask, basis = read_round_start(start(), 2, 3)
    assert basis is None
    assert (broadcast.round, list(broadcast.tensors)) == (2, ["w"])
    assert mask is not None
    assert mask.tolist() == KEPT.tolist()
    assert read_round_start(start(None), 2, 3)[1] is None

    plain = read_round_end(end(), 1, 2, 3)
    assert (plain.scores, plain.loss, plain.counts) == (None, (0, 0.0), {})
    counts = {"front.bn.num_batches_tracked": torch.tensor(7)}
    found = read_round_end(end(scores={"channels": SCORES}, counts=counts, loss=LOSS), 1, 2, 3)
    assert found.scores is not None
    assert found.scores.tolist() == [1, 2, 3]
    assert (found.loss, found.counts) == ((5, 2.5), {"front.bn.num_batches_tracked": 7})

    initial = read_initial_scores(scores(SCORES), 1, 3)
    assert initial is not None
    assert initial.tolist() == [1, 2, 3]
    assert read_initial_scores(message_of({}, {"client": 1}), 1, 3) is None


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (start(round=3), r"round is 3; expected 2"),
        (start(~torch.ones(3, dtype=torch.bool)), "at least one channel kept"),
        (start(torch.ones(4, dtype=torch.bool)), r"is bool \[4\]; expected bool \[3\]"),
        (start(torch.ones(3, dtype=torch.uint8)), r"is uint8 \[3\]; expected bool \[3\]"),
        (start()[:-3] + b"\1\2\1", "expected zeros and ones"),
        (start()[:-1], "not a readable message"),
        (message_of({"mask": {"other": KEPT}}, {"round": 2}), "mask/kept' is missing"),
        (message_of({"scores": {"channels": KEPT}}, {"round": 2}), "expected model/"),
        (message_of({}, {}), "round is None; expected an integer"),
        (b"", "not a readable message"),
    ],
)
def test_no_start_of_a_round(message: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        read_round_start(message, 2, 3)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (end(client=2), "client is 2; expected 1"),
        (end(round=3), "round is 3; expected 2"),
        (end(scores={"channels": torch.ones(4)}), r"float32 \[4\]; expected float32 \[3\]"),
        (end(counts={"bn": torch.tensor(-1)}), "counts/bn' is below zero"),
        (end(counts={"bn": torch.tensor(1.0)}), r"counts/bn' is float32 \[\]; expected int64"),
        (
            end(counts={"part": torch.ones(2).long()}),
            r"counts/part' is int64 \[2\]; expected int64",
        ),
        (end(loss={"examples": torch.tensor(5)}), "loss/sum' is missing"),
        (end(loss=LOSS | {"sum": torch.tensor(2.5)}), "loss/sum' is float32"),
        (end(loss=LOSS | {"examples": torch.tensor([5])}), r"loss/examples' is int64 \[1\]"),
        (end(loss=LOSS | {"what": torch.tensor(5)}), "loss/what' is not expected"),
        (end(mask={"kept": KEPT}), "tensor 'mask/kept'; expected model/"),
    ],
)
def test_no_end_of_a_round(message: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        read_round_end(message, 1, 2, 3)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (scores(SCORES, client=2), r"client is 2; expected 1"),
        (scores(torch.ones(4)), r"float32 \[4\]; expected float32 \[3\]"),
        (scores(torch.tensor([1.0, float("nan"), 1])), "NaN or infinity"),
        (message_of({"model": {"w": torch.ones(3)}}, {"client": 1}), "expected scores/"),
        (b"", "not a readable message"),
    ],
)
def test_no_initial_scores(message: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        read_initial_scores(message, 1, 3)


def test_a_client_takes_layers_that_are_its_own_only() -> None:
    run = set_up(normed(), "conv1", clients(), METHODS["acp-sl"]())
    client = local(run)[0]
    before = {name: tensor.clone() for name, tensor in client.owned.items()}
    name = next(iter(before))
    for values, why in (
        (before | {name: torch.ones(1)}, rf"received {name} as float32 \[1\]; expected"),
        (before | {"other": torch.ones(1)}, "received 'other'; no tensor of that name"),
        ({n: t for n, t in before.items() if n != name}, f"received no {name}"),
    ):
        with pytest.raises(WireError, match=why):
            client.begin(1, message_of({"model": values}, {"round": 1}))
    client.begin(1, run.round_start(1))
    assert all(torch.equal(client.owned[n], t) for n, t in before.items())
