"""Transfers in chunks: files arrive as they were sent, and what does not fit is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sluiceway.deploy import chunks
from sluiceway.deploy.chunks import Chunk, ChunkError, ChunkHandler, Transfer, append, replied
from sluiceway.transport.protocol import Request, Response, TaskFailure

GOOD = Chunk("0" * 32, "send", "double", {"n": 1}, 3, data=b"abc", most=10)


class Doubling:
    """Responds with its file twice over."""

    def handle(self, request: Request, folder: Path) -> Response:
        assert not list(folder.iterdir())
        if request.what == "fail":
            raise ValueError("no data here\nand a second line")
        if request.message is None:
            return Response({"n": request.facts["n"] * 2})
        path = folder / "twice"
        path.write_bytes(request.message.read_bytes() * 2)
        return Response({"n": request.facts["n"] * 2}, path)


def carried(request: Request, place: Path, size: int, **how: Any) -> Response | TaskFailure:
    """The result of a transfer, whose chunks cross as a header and bytes."""
    handler = ChunkHandler(place / "site", Doubling)
    transfer = Transfer(request, place, size, **how)
    while transfer.result is None:
        chunk = transfer.next()
        assert chunk is not None
        assert len(chunk.data) <= size
        reply = replied(chunk.header(), chunk.data, handler.handle)
        assert len(reply.data) <= size
        transfer.take(Chunk.read(reply.header(), reply.data))
    assert transfer.next() is None
    assert not [path for path in (place / "site").rglob("*") if path.is_file()]
    return transfer.result


@pytest.mark.parametrize("how", [{}, {"first": 2, "eager": False}])
@pytest.mark.parametrize("size", [0, 1, 6, 7, 100])
def test_a_file_arrives_whole(tmp_path: Path, size: int, how: dict[str, Any]) -> None:
    message = tmp_path / "message"
    message.write_bytes(os.urandom(size))
    found = carried(Request("double", {"n": 2}, message), tmp_path, 7, **how)
    assert isinstance(found, Response)
    assert found.facts == {"n": 4}
    assert found.message is not None
    assert found.message.read_bytes() == message.read_bytes() * 2


def test_facts_alone_and_an_error(tmp_path: Path) -> None:
    assert carried(Request("double", {"n": 3}), tmp_path, 7) == Response({"n": 6})
    message = tmp_path / "message"
    message.write_bytes(bytes(20))
    found = carried(Request("fail", {}, message), tmp_path, 7)
    assert found == TaskFailure("ValueError: no data here")


def test_replies_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    transfer = Transfer(Request("double"), tmp_path, 4)
    transfer.next()
    reply = Chunk(transfer.id, "response", size=10, data=b"0123")
    transfer.take(reply)
    transfer.take(replace(reply, offset=8, data=b"89"))
    assert transfer.result is None
    transfer.take(replace(reply, offset=4, data=b"4567"))
    assert isinstance(transfer.result, Response)
    assert transfer.result.message is not None
    assert transfer.result.message.read_bytes() == b"0123456789"
    with pytest.raises(ChunkError, match="another transfer"):
        transfer.take(GOOD)


def test_headers_that_are_not_ours() -> None:
    assert Chunk.read(GOOD.header(), GOOD.data) == GOOD
    fields = json.loads(GOOD.header())
    for header, why in [
        ("", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"a":' * 100_000, "not JSON"),
        (json.dumps({**fields, "layout": 2}), "layout 2, this side reads 1: install the same"),
        (json.dumps({**fields, "size": "3"}), "other fields"),
        (json.dumps({**fields, "more": 1}), "other fields"),
        (json.dumps({**fields, "transfer": "../../etc"}), "not an id"),
        (json.dumps({**fields, "most": 1 << 40}), "at most"),
        (json.dumps({**fields, "digest": "0"}), "damaged after byte 0"),
    ]:
        with pytest.raises(ChunkError, match=why) as caught:
            Chunk.read(header, GOOD.data)
        assert "\n" not in str(caught.value)


def test_chunks_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    for change, why in [
        ({"offset": 2}, "bytes 2 to 5 of a file of 3"),
        ({"size": 2}, "bytes 0 to 3 of a file of 2"),
        ({"size": -1}, "announced"),
        ({"size": 1 << 50}, "announced"),
        ({"size": 1 << 40}, "not enough disk space"),
        ({"data": b""}, "bytes 0 to 0 of a file of 3"),
    ]:
        chunk = replace(GOOD, **change)  # type: ignore[arg-type]
        with pytest.raises(ChunkError, match=why):
            append(path, chunk, chunk.size)
    append(path, replace(GOOD, size=6), 6)
    with pytest.raises(ChunkError, match="a file of 7 bytes, where 6 were announced"):
        append(path, replace(GOOD, size=7, offset=3), 6)
    assert path.read_bytes() == b"abc"
    handler = ChunkHandler(tmp_path / "site", Doubling)
    for kind in ("fetch", "else"):
        with pytest.raises(ChunkError, match=r"not here|kind 'else'"):
            handler.handle(replace(GOOD, kind=kind))
    monkeypatch.setattr(chunks, "STALE", -1)
    handler.handle(replace(GOOD, size=6))
    assert (tmp_path / "site" / GOOD.transfer).exists()
    handler.handle(replace(GOOD, transfer="1" * 32))
    assert not (tmp_path / "site" / GOOD.transfer).exists()
