"""Messages in chunks: put together as they were, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluiceway.deploy.nvflare.chunks import Chunk, ChunkError, Inbox, chunk_from, chunks_of


def sent(path: Path, into: Path, size: int) -> Inbox:
    inbox = Inbox(into, path.stat().st_size)
    for chunk in chunks_of(path, size):
        inbox.add(chunk_from(chunk.packed()))
    return inbox


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 1000])
def test_any_length_arrives_whole(tmp_path: Path, length: int) -> None:
    message = tmp_path / "message"
    message.write_bytes(bytes(i % 251 for i in range(length)))
    inbox = sent(message, tmp_path / "copy", 8)
    assert inbox.complete
    assert (tmp_path / "copy").read_bytes() == message.read_bytes()


def test_damaged_swapped_and_surplus_chunks_are_refused(tmp_path: Path) -> None:
    message = tmp_path / "message"
    message.write_bytes(b"abcdefgh")
    first, second = chunks_of(message, 4)
    with pytest.raises(ChunkError, match="damaged after byte 0"):
        Inbox(tmp_path / "copy", 8).add(second)
    with pytest.raises(ChunkError, match="damaged after byte 0"):
        Inbox(tmp_path / "copy", 8).add(Chunk(b"abxd", first.digest))
    inbox = Inbox(tmp_path / "copy", 6)
    inbox.add(first)
    with pytest.raises(ChunkError, match="longer than the 6 bytes"):
        inbox.add(second)


def test_a_message_of_an_impossible_length_is_refused_before_it_comes(tmp_path: Path) -> None:
    for size, why in ((-1, "cannot have"), (1 << 60, "no room")):
        with pytest.raises(ChunkError, match=why):
            Inbox(tmp_path / "copy", size)


@pytest.mark.parametrize("found", [None, b"x", {}, {"data": "x", "digest": b""}, {"data": b""}])
def test_what_is_no_chunk_is_refused(found: object) -> None:
    with pytest.raises(ChunkError):
        chunk_from(found)
