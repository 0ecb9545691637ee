from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra [flower] is not installed")

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from tests.deploy.flower.double import DoubleGrid, Node

from sluiceway.deploy.flower import transport as transports
from sluiceway.deploy.flower.chunks import HEADER, Chunk, ChunkError, array_record
from sluiceway.deploy.flower.client import site_app
from sluiceway.deploy.flower.transport import GridTransport, in_order
from sluiceway.errors import InputError
from sluiceway.transport.protocol import Request, Response
from sluiceway.transport.worker_pool import TaskFailure


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(transports, "TICK", 0.002)


class Doubler:
    """Sends back its file twice over, and says its own name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def answer(self, ask: Request, folder: Path) -> Response:
        assert not list(folder.iterdir())
        if ask.what == "fail":
            raise ValueError("no data here\nand a second line")
        if ask.message is None:
            return Response({"name": self.name, "told": ask.facts["told"]})
        path = folder / "twice"
        path.write_bytes(ask.message.read_bytes() * 2)
        return Response({"name": self.name, "told": ask.facts["told"]}, path)


def world(tmp_path: Path, *names: str) -> DoubleGrid:
    return DoubleGrid(
        {
            100 - number: Node(
                name,
                site_app(
                    lambda context: Doubler(context.node_config["name"]),
                    lambda context: tmp_path / "rooms" / str(context.node_id),
                ),
                {"name": name},
            )
            for number, name in enumerate(names)
        }
    )


def asked(grid: DoubleGrid, tmp_path: Path, asks: dict[int, Request], **more: object) -> dict:
    transport = GridTransport(grid, len(grid.nodes), patience=0, **more)
    folder = tmp_path / "answers"
    folder.mkdir(exist_ok=True)
    return dict(transport.ask(asks, folder, timeout=5))


def test_numbers_follow_names_and_not_ids(tmp_path):
    grid = world(tmp_path, "site-10", "site-2", "site-1")
    found = asked(grid, tmp_path, {n: Request("hi", {"told": n}) for n in range(3)})
    assert {n: (a.facts["name"], a.facts["told"]) for n, a in found.items()} == {
        0: ("site-1", 0),
        1: ("site-2", 1),
        2: ("site-10", 2),
    }
    assert in_order("a10b2") > in_order("a9b3")


@pytest.mark.parametrize("piece", [1 << 20, 7, 3])
@pytest.mark.parametrize("size", [0, 1, 6, 7, 14, 100])
def test_a_file_arrives_whole_whatever_the_pieces(tmp_path, piece, size):
    grid = world(tmp_path, "a", "b")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    asks = {n: Request("hi", {"told": n}, path) for n in range(2)}
    found = asked(grid, tmp_path, asks, piece=piece)
    for number in range(2):
        assert found[number].message.read_bytes() == path.read_bytes() * 2
        assert found[number].facts["told"] == number
    left = [path for path in (tmp_path / "rooms").rglob("*") if path.is_file()]
    assert left == []


def test_pieces_are_no_longer_than_they_should_be(tmp_path):
    grid = world(tmp_path, "a")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(30_000_000))
    found = asked(grid, tmp_path, {0: Request("hi", {"told": 0}, path)}, piece=10_000_000)
    assert found[0].message.stat().st_size == 60_000_000
    assert grid.asked == 3 + 5
    assert 90_000_000 < grid.crossed < 90_100_000


def test_a_fault_is_told_in_one_line_and_leaves_nothing(tmp_path):
    grid = world(tmp_path, "a", "b")
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    found = asked(
        grid, tmp_path, {0: Request("fail", {}, path), 1: Request("hi", {"told": 1}, path)}, piece=2
    )
    assert isinstance(found[0], TaskFailure)
    assert found[0].why.startswith("ValueError: no data here")
    assert "\n" not in found[0].why
    assert found[1].message.read_bytes() == b"1234512345"
    assert not [p for p in (tmp_path / "rooms").rglob("*") if p.is_file()]


def test_lost_sites_are_named_and_the_others_answer(tmp_path):
    grid = world(tmp_path, "a", "b", "c", "d")
    away, gone, deaf, _ = grid.nodes.values()
    transport = GridTransport(grid, 4, patience=0)
    away.online, gone.gone, deaf.deaf = False, True, True
    found = dict(
        transport.ask({n: Request("hi", {"told": n}) for n in range(4)}, tmp_path, timeout=0.5)
    )
    assert found[0].why == "SuperNode a is not connected"
    assert found[1].why == "Flower: Destination Node is not available."
    assert found[2].why == "took longer than 0.5 s"
    assert found[3].facts == {"name": "d", "told": 3}


def test_another_number_of_supernodes_is_refused(tmp_path):
    grid = world(tmp_path, "a", "b")
    with pytest.raises(InputError, match=r"2 SuperNodes are connected \(a, b\); data.clients = 3"):
        GridTransport(grid, 3, patience=0)
    with pytest.raises(InputError, match="two SuperNodes have the same name"):
        GridTransport(world(tmp_path, "a", "a"), 2, patience=0)


def test_a_site_of_another_release_is_refused_in_a_line(tmp_path):
    grid = world(tmp_path, "a")
    [node] = grid.nodes.values()
    plain = node.app

    def other(message, context):
        reply = plain(message, context)
        reply.content[HEADER]["layout"] = 2
        return reply

    node.app = other
    found = asked(grid, tmp_path, {0: Request("hi", {"told": 0})})
    assert found[0].why == (
        "messages of layout 2, this side reads 1: install the same release of Sluiceway on both"
    )


def test_a_message_that_is_none_of_ours_is_refused():
    good = Chunk("0" * 32, "hi", {"a": 1}, 3, piece=b"abc")
    assert Chunk.read(good.packed()) == good
    for content, why in [
        (RecordDict(), "without a header"),
        (RecordDict({HEADER: ArrayRecord()}), "without a header"),
        (with_header(good, size="3"), "other fields"),
        (with_header(good, facts="[1]"), "no table"),
        (with_header(good, facts="{"), "no JSON"),
        (with_header(good, facts="[" * 100_000), "no JSON"),
    ]:
        with pytest.raises(ChunkError, match=why):
            Chunk.read(content)
    content = good.packed()
    content["file"] = ArrayRecord()
    with pytest.raises(ChunkError, match="not one of bytes"):
        Chunk.read(content)
    content["file"] = array_record(b"abc")
    assert Chunk.read(content) == good


def with_header(chunk: Chunk, **fields: object) -> RecordDict:
    content = chunk.packed()
    content[HEADER] = ConfigRecord({**content[HEADER], **fields})
    return content


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"transfer": "../../etc"}, "another name"),
        ({"offset": 2}, "bytes 2 to 5 of a file of 3"),
        ({"size": 2}, "bytes 0 to 3 of a file of 2"),
        ({"size": 1 << 50}, "were announced"),
        ({"most": 0}, "pieces of 0 bytes"),
        ({"more": True, "offset": 1}, "not here"),
    ],
)
def test_a_site_refuses_pieces_that_do_not_fit(tmp_path, change, why):
    grid = world(tmp_path, "a")
    chunk = replace(Chunk("0" * 32, "hi", {"told": 1}, 3, piece=b"abc"), **change)
    key = grid.push(Message(chunk.packed(), next(iter(grid.nodes)), "query.sluiceway"))
    [reply] = grid.pull_messages([key])
    assert why in Chunk.read(reply.content).fault
    assert not (tmp_path / "etc").exists()
