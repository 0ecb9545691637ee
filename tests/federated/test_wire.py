"""Messages: what is packed is what is unpacked, and damage is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sluiceway.federated.wire import (
    WireError,
    read_broadcast,
    read_update,
    write_broadcast,
    write_update,
)
from sluiceway.moe import BlockRouting
from sluiceway.strategies import Broadcast, Update


def test_update_round_trip(tmp_path: Path) -> None:
    fused = torch.randn(4, 3, 2)
    routing = BlockRouting(
        torch.tensor([3.0, 0.0]).double(),
        torch.tensor([0.7, 0.3]).double(),
        torch.tensor([0.1, 0.0]).double(),
        torch.randn(2, 5),
        tokens=3,
    )
    sent = Update(
        4,
        2,
        17,
        {"w[0]": fused[0], "w[2]": fused[2], "b": torch.randn(3).bfloat16()},
        [routing],
        extra={"control/b": torch.ones(3)},
        metrics={"loss": 0.25},
    )
    size = write_update(tmp_path / "u", sent)
    got = read_update(tmp_path / "u")
    assert size == got.nbytes == (tmp_path / "u").stat().st_size
    assert (got.client, got.round, got.examples, got.metrics) == (4, 2, 17, {"loss": 0.25})
    assert set(got.tensors) == {"w[0]", "w[2]", "b"}
    for name, tensor in sent.tensors.items():
        assert got.tensors[name].dtype == tensor.dtype
        assert torch.equal(got.tensors[name], tensor)
    assert torch.equal(got.extra["control/b"], torch.ones(3))
    for part in ("load", "routing", "margin", "region"):
        assert torch.equal(getattr(got.routing[0], part), getattr(routing, part))
    assert got.routing[0].tokens == 3


def test_an_update_stays_readable_when_its_file_is_gone(tmp_path: Path) -> None:
    write_update(tmp_path / "u", Update(0, 1, 1, {"w": torch.arange(1000.0)}))
    got = read_update(tmp_path / "u")
    (tmp_path / "u").unlink()
    assert torch.equal(got.tensors["w"], torch.arange(1000.0))


def test_broadcast_round_trip(tmp_path: Path) -> None:
    write_broadcast(tmp_path / "b", Broadcast(7, {"w": torch.ones(2)}, {"x": torch.zeros(1)}))
    got = read_broadcast(tmp_path / "b")
    assert got.round == 7
    assert torch.equal(got.tensors["w"], torch.ones(2))
    assert torch.equal(got.extra["x"], torch.zeros(1))


@pytest.mark.parametrize("length", [0, 5, 30, -4])
def test_a_damaged_message_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "u"
    write_update(path, Update(0, 1, 1, {"w": torch.arange(10.0)}))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(WireError, match="not a readable message"):
        read_update(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b"
    write_broadcast(path, Broadcast(7, {"w": torch.ones(2)}))
    path.write_bytes(path.read_bytes().replace(rb"version\": 1", rb"version\": 9"))
    with pytest.raises(WireError, match="version 9, this side reads 1"):
        read_broadcast(path)
