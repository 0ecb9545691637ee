"""Messages: what is packed is what is unpacked, and damage is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sluiceway.core import messages as wire
from sluiceway.core.messages import (
    UPDATE,
    WireError,
    message_of,
    parts_of,
    read_broadcast,
    read_update,
    take_values,
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


def report(experts: int = 2, tokens: int = 3) -> BlockRouting:
    load, routing, margin = (torch.rand(experts).double() for _ in range(3))
    return BlockRouting(load, routing, margin, torch.randn(experts, 5), tokens)


def update_bytes(folder: Path) -> bytes:
    path = folder / "good"
    metrics = {"loss": 0.25}
    write_update(
        path, Update(0, 1, 4, {"w": torch.arange(10.0)}, [report(), report()], {}, metrics)
    )
    return path.read_bytes()


def with_header(message: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The message with another header and the same data."""
    length = 8 + int.from_bytes(message[:8], "little")
    header = json.loads(message[8:length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + message[length:]


def with_facts(message: bytes, **changed: object) -> bytes:
    def change(header: dict[str, Any]) -> None:
        facts = json.loads(header["__metadata__"]["sluiceway"]) | changed
        kept = {name: fact for name, fact in facts.items() if fact is not Ellipsis}
        header["__metadata__"]["sluiceway"] = json.dumps(kept)

    return with_header(message, change)


def refused(folder: Path, message: bytes, why: str) -> None:
    """Both ways of reading give the error, where it is not about what an update is."""
    (folder / "u").write_bytes(message)
    with pytest.raises(WireError, match=why) as caught:
        read_update(folder / "u")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("round", None),
        ("round", True),
        ("round", "1"),
        ("client", 1.0),
        ("client", 1 << 63),
        ("examples", [1]),
        ("examples", Ellipsis),
    ],
)
def test_facts_are_integers(tmp_path: Path, fact: str, value: object) -> None:
    message = with_facts(update_bytes(tmp_path), **{fact: value})
    refused(tmp_path, message, rf"^u: {fact} is .*; expected an integer of 64 bits$")


@pytest.mark.parametrize(
    "metrics", [Ellipsis, None, [1], {"loss": True}, {"loss": "0"}, {"loss": 10**400}]
)
def test_metrics_are_numbers(tmp_path: Path, metrics: object) -> None:
    refused(tmp_path, with_facts(update_bytes(tmp_path), metrics=metrics), r"^u: metrics? .*number")


def test_negative_counts_and_a_lost_loss_are_read(tmp_path: Path) -> None:
    message = with_facts(update_bytes(tmp_path), examples=-3, metrics={"loss": float("nan")})
    (tmp_path / "u").write_bytes(message)
    got = read_update(tmp_path / "u")
    assert got.examples == -3
    assert got.metrics["loss"] != got.metrics["loss"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "facts are \\[\\]; expected a JSON object"),
        ("{", "not a readable message"),
        ("[" * 100_000, "not a readable message"),
        ('{"version": true}', "version True, this side reads 1"),
        ("{}", "version None, this side reads 1"),
        (" " * (wire.FACTS_LIMIT + 1), "the limit is 1048576"),
        (3, "no facts of Sluiceway"),
    ],
)
def test_facts_that_are_not_ours(tmp_path: Path, text: object, why: str) -> None:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"] = {"sluiceway": text}

    message = with_header(update_bytes(tmp_path), change)
    refused(tmp_path, message, why)
    with pytest.raises(WireError, match=why):
        parts_of(message, UPDATE)


@pytest.mark.parametrize(
    ("length", "why"),
    [
        (0, "not a readable message"),
        (1 << 20, "not a readable message"),
        ((1 << 64) - 1, "not a readable message"),
    ],
)
def test_a_hostile_header_length(tmp_path: Path, length: int, why: str) -> None:
    message = length.to_bytes(8, "little") + update_bytes(tmp_path)[8:]
    refused(tmp_path, message, why)
    with pytest.raises(WireError, match=why):
        parts_of(message, UPDATE)


def test_limits_are_checked_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = update_bytes(tmp_path)
    monkeypatch.setattr(wire, "HEADER_LIMIT", 100)
    refused(tmp_path, message, "has a header of .* bytes, the limit is 100")
    monkeypatch.setattr(wire, "MESSAGE_LIMIT", 100)
    refused(tmp_path, message, "has .* bytes, the limit is 100")


@pytest.mark.parametrize(
    ("name", "entry", "why"),
    [
        ("weights", {}, r"tensor 'weights'; expected model/"),
        ("scores/channels", {}, r"tensor 'scores/channels'; expected model/"),
        ("model/", {}, r"tensor 'model/'; expected model/"),
        ("model/a\nb", {"dtype": "F4"}, r"tensor 'model/a\\nb' has type 'F4'; expected F64"),
        ("model/w", {"dtype": []}, r"has type \[\]; expected F64"),
        ("model/w", {"shape": [0, 1 << 60]}, "below 2\\^60"),
        ("model/w", {"shape": [1] * 17}, "at most 16 sizes"),
        ("model/w", {"shape": [-1]}, "sizes from 0"),
        ("model/w", {"shape": [True]}, "sizes from 0"),
        ("model/w", {"data_offsets": [0, 1 << 62]}, "not a readable message"),
        ("routing/x/load", {}, r"routing reports of 3 blocks, but 2/load is missing"),
        ("routing/02/load", {}, r"routing reports of 3 blocks, but 2/load is missing"),
        ("routing/2/load", {}, r"reports of 3 blocks, but 2/margin is missing"),
        ("routing/0/lead", {}, r"routing/0/lead; expected routing/<block>/<field>"),
        ("routing/load", {}, r"routing/load; expected routing/<block>/<field>"),
    ],
)
def test_a_tensor_that_cannot_be(
    tmp_path: Path, name: str, entry: dict[str, Any], why: str
) -> None:
    def change(header: dict[str, Any]) -> None:
        found = header.pop("model/w")
        header[name] = found | entry

    refused(tmp_path, with_header(update_bytes(tmp_path), change), why)


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [
        ("load", torch.ones(3).double(), r"routing/1/routing is float64 \[2\]; .* float64 \[3\]"),
        ("load", torch.ones(2), r"routing/1/load is float32 \[2\]; expected float64 \[2\]"),
        (
            "margin",
            torch.ones(2, 1).double(),
            r"margin is float64 \[2, 1\]; expected float64 \[2\]",
        ),
        ("load", torch.tensor(1.0).double(), r"routing/1/load is float64 \[\]"),
        ("region", torch.ones(3, 5), r"region is float32 \[3, 5\]; expected float32 \[2, width\]"),
        ("tokens", torch.tensor(-1), r"routing/1/tokens is -1; expected int64 \[\], not negative"),
        ("tokens", torch.tensor([1]), r"routing/1/tokens is int64 \[1\]"),
        ("tokens", torch.tensor(1.0), r"routing/1/tokens is float32 \[\]"),
    ],
)
def test_a_routing_report_fits_itself(part: str, value: Tensor, why: str) -> None:
    packed = wire.pack_routing([report(), report()]) | {f"1/{part}": value}
    with pytest.raises(WireError, match=why):
        wire.unpack_routing(packed)


def test_a_missing_field_of_a_routing_report() -> None:
    packed = wire.pack_routing([report(), report()])
    del packed["0/region"]
    assert wire.unpack_routing(packed)[0].region is None
    del packed["0/load"]
    with pytest.raises(WireError, match="2 blocks, but 0/load is missing"):
        wire.unpack_routing(packed)


def test_a_folder_or_nothing_is_no_message(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(WireError, match="not a readable message"):
            read_update(path)


def test_messages_in_memory_are_read_alike() -> None:
    values = {"w": torch.randn(3, 2).bfloat16(), "empty": torch.ones(0, 4)}
    facts, parts = parts_of(message_of({"model": values}, {"round": 2}), UPDATE)
    assert (facts["round"], list(parts)) == (2, list(UPDATE))
    assert set(parts["model"]) == set(values)
    assert all(torch.equal(parts["model"][n], t) for n, t in values.items())


class TestTakingValues:
    def test_values_are_written_into_the_tensors(self) -> None:
        held = {"a": torch.zeros(2), "b": torch.zeros(1)}
        take_values(held, {"a": torch.ones(2)}, needed=["a"])
        assert held["a"].tolist() == [1, 1]
        assert held["b"].tolist() == [0]

    @pytest.mark.parametrize(
        ("values", "why"),
        [
            ({"c": torch.ones(1)}, r"^received 'c'; no tensor of that name is exchanged$"),
            ({"b": torch.ones(1)}, r"^received b as float32 \[1\]; expected float32 \[2, 3\]$"),
            ({"b": torch.ones(2, 3).half()}, r"^received b as float16 \[2, 3\]; expected float32"),
            ({}, r"^received no b; expected float32 \[2, 3\]$"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_nothing_written(
        self, values: dict[str, Tensor], why: str
    ) -> None:
        held = {"a": torch.zeros(2), "b": torch.zeros(2, 3)}
        with pytest.raises(WireError, match=why):
            take_values(held, {"a": torch.ones(2), **values}, needed=["a", "b"])
        assert held["a"].tolist() == [0, 0]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["model", "extra"]),
            st.text(max_size=5),
            st.sampled_from(sorted(wire._NAMES, key=str)),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=9,
    ),
    st.dictionaries(st.text(max_size=4), st.floats() | st.integers()),
)
def test_the_computed_length_is_that_of_the_packed_message(
    drawn: list[tuple[str, str, torch.dtype, list[int]]], facts: dict[str, float]
) -> None:
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "extra": {}}
    for part, name, dtype, shape in drawn:
        parts[part][name] = torch.zeros(shape).to(dtype)
    assert wire.packed_length(parts, facts) == len(wire.message_of(parts, facts))
