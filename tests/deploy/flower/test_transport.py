"""Requests over a Flower Grid: order, chunks, sites that fail, and refusals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra [flower] is not installed")

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from tests.deploy.flower.grid import Node, TestGrid

from sluiceway.deploy.chunks import Chunk, ChunkError
from sluiceway.deploy.flower import transport as transports
from sluiceway.deploy.flower.client import site_app
from sluiceway.deploy.flower.records import DATA, HEADER, chunk_of, content_of, header_and_data
from sluiceway.deploy.flower.transport import GridTransport, natural_order
from sluiceway.errors import InputError
from sluiceway.transport.protocol import Request, Response, TaskFailure


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "TICK", 0.002)


class Doubling:
    """Responds with its file twice over, and its own name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def handle(self, request: Request, folder: Path) -> Response:
        if request.what == "fail":
            raise ValueError("no data here\nand a second line")
        facts = {"name": self.name, "n": request.facts["n"]}
        if request.message is None:
            return Response(facts)
        path = folder / "twice"
        path.write_bytes(request.message.read_bytes() * 2)
        return Response(facts, path)


def grid_of(tmp_path: Path, *names: str) -> TestGrid:
    app = site_app(
        lambda context: Doubling(str(context.node_config["name"])),
        lambda context: tmp_path / "transfers" / str(context.node_id),
    )
    nodes = {100 - i: Node(name, app, {"name": name}) for i, name in enumerate(names)}
    return TestGrid(nodes)


def sent(grid: TestGrid, tmp_path: Path, requests: dict[int, Request], **more: Any) -> Any:
    transport = GridTransport(grid, len(grid.nodes), wait=0, **more)
    folder = tmp_path / "responses"
    folder.mkdir(exist_ok=True)
    return dict(transport.send(requests, folder, timeout=5))


def test_numbers_follow_names_and_not_ids(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "site-10", "site-2", "site-1")
    found = sent(grid, tmp_path, {n: Request("hi", {"n": n}) for n in range(3)})
    assert {n: (a.facts["name"], a.facts["n"]) for n, a in found.items()} == {
        0: ("site-1", 0),
        1: ("site-2", 1),
        2: ("site-10", 2),
    }
    assert natural_order("a10b2") > natural_order("a9b3")


def test_files_cross_in_chunks_beside_a_site_that_fails(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "a", "b", "c")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(100))
    requests = {n: Request("hi", {"n": n}, path) for n in range(2)}
    found = sent(grid, tmp_path, {**requests, 2: Request("fail", {}, path)}, chunk=7, concurrent=2)
    for number in range(2):
        assert found[number].message.read_bytes() == path.read_bytes() * 2
    assert found[2] == TaskFailure("ValueError: no data here")
    assert not [path for path in (tmp_path / "transfers").rglob("*") if path.is_file()]


def test_messages_are_no_more_and_no_longer_than_they_should_be(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "a")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(30_000_000))
    found = sent(grid, tmp_path, {0: Request("hi", {"n": 0}, path)}, chunk=10_000_000)
    assert found[0].message.stat().st_size == 60_000_000
    assert grid.asked == 3 + 5
    assert 90_000_000 < grid.crossed < 90_100_000


def test_failed_sites_are_named_and_the_others_respond(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "a", "b", "c", "d")
    away, gone, deaf, _ = grid.nodes.values()
    transport = GridTransport(grid, 4, wait=0)
    away.online, gone.gone, deaf.deaf = False, True, True
    requests = {n: Request("hi", {"n": n}) for n in range(4)}
    found = dict(transport.send(requests, tmp_path, timeout=0.5))
    assert found == {
        0: TaskFailure("SuperNode a is not connected"),
        1: TaskFailure("Flower: Destination Node is not available."),
        2: TaskFailure("took longer than 0.5 s"),
        3: Response({"name": "d", "n": 3}),
    }


def test_another_number_of_supernodes_is_refused(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "a", "b")
    with pytest.raises(InputError, match=r"2 SuperNodes are connected \(a, b\); data.clients = 3"):
        GridTransport(grid, 3, wait=0)
    with pytest.raises(InputError, match="two SuperNodes have the same name"):
        GridTransport(grid_of(tmp_path, "a", "a"), 2, wait=0)


def test_a_site_of_another_release_is_refused_in_a_line(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "a")
    [node] = grid.nodes.values()
    plain = node.app

    def other(message: Message, context: Any) -> Message:
        reply = plain(message, context)
        header, _ = header_and_data(reply.content)
        text = header.replace('"layout": 1', '"layout": 2')
        reply.content[HEADER] = ConfigRecord({"header": text})
        return reply

    node.app = other  # type: ignore[assignment]
    found = sent(grid, tmp_path, {0: Request("hi", {"n": 0})})
    assert found[0].why == (
        "messages of layout 2, this side reads 1: install the same release of Sluiceway on both"
    )


def test_messages_that_are_not_ours(tmp_path: Path) -> None:
    chunk = Chunk("0" * 32, "send", "hi", {"n": 1}, 3, data=b"abc", most=9)
    damaged = content_of(chunk)
    damaged[DATA] = ArrayRecord()
    for content, why in [
        (RecordDict(), "without a header"),
        (RecordDict({HEADER: ArrayRecord()}), "without a header"),
        (damaged, "not one of bytes"),
    ]:
        with pytest.raises(ChunkError, match=why):
            header_and_data(content)
    grid = grid_of(tmp_path, "a")
    [node] = grid.nodes
    key = grid.push(Message(RecordDict(), node, "query.sluiceway"))
    [reply] = grid.pull_messages([key])
    found = chunk_of(reply)
    assert (found.kind, found.facts["why"][:9]) == ("error", "ChunkErro")
