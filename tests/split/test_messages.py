"""The messages that open and close a client's round: what does not belong there is refused."""

from __future__ import annotations

import pytest
import torch
from tests.split.small import clients as sets
from tests.split.small import local, normed, set_up
from torch import Tensor

from sluiceway.core import messages as wire
from sluiceway.core.messages import message_of
from sluiceway.split import METHODS, WireError
from sluiceway.split.messages import read_initial_scores, read_round_end, read_round_start

KEPT = torch.tensor([True, False, True])


def opening(mask: Tensor | None = KEPT, number: int = 2) -> bytes:
    parts = {"model": {"w": torch.ones(2)}, "extra": {}}
    if mask is not None:
        parts["mask"] = {"kept": mask}
    return message_of(parts, {"round": number})


def closing(scores: Tensor, **facts: object) -> bytes:
    parts = {"model": {"w": torch.ones(2)}, "scores": {"channels": scores}}
    return message_of(parts, {"client": 1, "round": 2, "examples": 5} | facts)


def test_one_class_of_errors() -> None:
    assert WireError is wire.WireError


def test_an_opening_message() -> None:
    broadcast, mask = read_round_start(opening(), 2, 3)
    assert (broadcast.round, list(broadcast.tensors)) == (2, ["w"])
    assert mask is not None
    assert mask.tolist() == KEPT.tolist()
    assert read_round_start(opening(None), 2, 3)[1] is None


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (opening(number=3), r"round is 3; expected 2"),
        (opening(~torch.ones(3, dtype=torch.bool)), "at least one channel kept"),
        (opening(torch.ones(4, dtype=torch.bool)), r"is bool \[4\]; expected bool \[3\]"),
        (opening(torch.ones(3, dtype=torch.uint8)), r"is uint8 \[3\]; expected bool \[3\]"),
        (opening()[:-3] + b"\1\2\1", "expected zeros and ones"),
        (opening()[:-1], "not a readable message"),
        (message_of({"mask": {"other": KEPT}}, {"round": 2}), "mask/kept' is missing"),
        (message_of({"scores": {"channels": KEPT}}, {"round": 2}), "expected model/"),
        (message_of({}, {}), "round is None; expected an integer"),
        (b"", "not a readable message"),
    ],
)
def test_what_no_opening_message_is(message: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        read_round_start(message, 2, 3)


def test_a_closing_message() -> None:
    found = read_round_end(closing(torch.arange(3.0)), 1, 2, 3)
    assert found.scores is not None
    assert found.scores.tolist() == [0, 1, 2]
    assert found.loss == (0, 0.0)
    empty = message_of({"model": {}}, {"client": 1, "round": 2, "examples": 5})
    assert read_round_end(empty, 1, 2, 3).scores is None


def test_counts_and_losses_of_a_closing_message() -> None:
    counts = {"front.bn.num_batches_tracked": torch.tensor(7)}
    loss = {"examples": torch.tensor(5), "sum": torch.tensor(2.5).double()}
    facts = {"client": 1, "round": 2, "examples": 5}
    found = read_round_end(message_of({"counts": counts, "loss": loss}, facts), 1, 2, 3)
    assert found.counts == {"front.bn.num_batches_tracked": 7}
    assert found.loss == (5, 2.5)


@pytest.mark.parametrize("count", [torch.tensor(-1), torch.tensor(1.0), torch.ones(2).long()])
def test_what_no_count_is(count: Tensor) -> None:
    facts = {"client": 1, "round": 2, "examples": 5}
    with pytest.raises(WireError, match="counts/bn' is"):
        read_round_end(message_of({"counts": {"bn": count}}, facts), 1, 2, 3)


@pytest.mark.parametrize(
    "loss",
    [
        {"examples": torch.tensor(5)},
        {"examples": torch.tensor(5), "sum": torch.tensor(2.5)},
        {"examples": torch.tensor(5.0), "sum": torch.tensor(2.5).double()},
        {"examples": torch.tensor([5]), "sum": torch.tensor(2.5).double()},
        {"what": torch.tensor(5)},
    ],
)
def test_what_no_loss_is(loss: dict[str, Tensor]) -> None:
    facts = {"client": 1, "round": 2, "examples": 5}
    with pytest.raises(WireError, match="loss/"):
        read_round_end(message_of({"loss": loss}, facts), 1, 2, 3)


def test_a_client_takes_layers_that_are_its_own_only() -> None:
    run = set_up(normed(), "conv1", sets(), METHODS["acp-sl"]())
    client = local(run)[0]
    before = {name: tensor.clone() for name, tensor in client.owned.items()}
    name = next(iter(before))
    wrong: list[tuple[dict[str, Tensor], str]] = [
        (before | {name: torch.ones(1)}, rf"received {name} as float32 \[1\]; expected"),
        (before | {"other": torch.ones(1)}, "received 'other'; no tensor of that name"),
        ({n: t for n, t in before.items() if n != name}, f"received no {name}"),
    ]
    for values, why in wrong:
        with pytest.raises(WireError, match=why):
            client.begin(1, message_of({"model": values}, {"round": 1}))
    client.begin(1, run.round_start(1))
    assert all(torch.equal(client.owned[n], t) for n, t in before.items())


def rating(scores: Tensor, client: int = 1) -> bytes:
    return message_of({"scores": {"channels": scores}}, {"client": client})


def test_a_rating_message() -> None:
    found = read_initial_scores(rating(torch.tensor([1.0, 2, 3])), 1, 3)
    assert found is not None
    assert found.tolist() == [1, 2, 3]
    assert read_initial_scores(message_of({}, {"client": 1}), 1, 3) is None


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (rating(torch.ones(3), client=2), r"client is 2; expected 1"),
        (rating(torch.ones(4)), r"float32 \[4\]; expected float32 \[3\]"),
        (rating(torch.tensor([1.0, float("nan"), 1])), "NaN or infinity"),
        (message_of({"model": {"w": torch.ones(3)}}, {"client": 1}), "expected scores/"),
        (b"", "not a readable message"),
    ],
)
def test_what_no_rating_message_is(message: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        read_initial_scores(message, 1, 3)
