"""Lines over mutual TLS: who gets in, and what no frame is."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.nearby import Authority

from sluiceway.transport.framing import HEADER, MAGIC
from sluiceway.transport.tls import (
    ConnectionBroken,
    TlsClient,
    TlsServer,
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "keys")


@pytest.fixture
def server(authority: Authority) -> Iterator[TlsServer]:
    with TlsServer(authority.keys("server"), ["one", "two"], "localhost") as opened:
        yield opened


def echo(facts: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes] | None:
    if facts.get("quiet"):
        return None
    if facts.get("fail"):
        raise ValueError("first line\nsecond line")
    return {"back": facts}, body[::-1]


def test_a_question_and_an_answer(server: TlsServer, authority: Authority) -> None:
    client = TlsClient(authority.keys("one"), "localhost", server.port, echo)
    connection = server.connection("one", 10)
    connection.send({"a": 1}, b"xyz")
    assert connection.receive(10) == ({"back": {"a": 1}}, b"zyx")
    connection.send({"quiet": True}, b"none")
    connection.send({"fail": True})
    assert connection.receive(10) == ({"error": "first line"}, b"")
    body = bytes(5_000_000)
    connection.send({}, body)
    assert connection.receive(10)[1] == body
    client.close()
    with pytest.raises(ConnectionBroken, match="the connection is down"):
        connection.receive(10)


def test_a_site_dials_again(server: TlsServer, authority: Authority) -> None:
    client = TlsClient(authority.keys("one"), "localhost", server.port, echo)
    first = server.connection("one", 10)
    first.close()
    second = server.connection("one", 10, first)
    second.send({"b": 2})
    assert second.receive(10)[0] == {"back": {"b": 2}}
    client.close()


def until(server: TlsServer, said: str) -> None:
    for _ in range(200):
        if any(said in why for why in server.rejected):
            return
        time.sleep(0.05)
    pytest.fail(f"{server.rejected} has no {said!r}")


def test_another_root_does_not_get_in(
    server: TlsServer, authority: Authority, tmp_path: Path
) -> None:
    strange = Authority(tmp_path / "strange").keys("one")
    trusting = type(strange)(strange.certificate, strange.key, authority.keys("x").root)
    client = TlsClient(trusting, "localhost", server.port, echo)
    until(server, "certificate")
    with pytest.raises(ConnectionBroken, match="not connected to the server"):
        server.connection("one", 0.1)
    client.close()


def test_no_certificate_does_not_get_in(server: TlsServer, authority: Authority) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority.keys("server").root)
    with (
        socket.create_connection(("localhost", server.port)) as raw,
        pytest.raises(ssl.SSLError),
        context.wrap_socket(raw, server_hostname="localhost") as wrapped,
    ):
        wrapped.recv(1)
    until(server, "certificate")


def test_a_name_that_is_no_site_does_not_get_in(server: TlsServer, authority: Authority) -> None:
    client = TlsClient(authority.keys("three"), "localhost", server.port, echo)
    until(server, "'three' is not a site of this run")
    assert not server.connections
    client.close()


def test_a_site_refuses_a_server_of_another_root(authority: Authority, tmp_path: Path) -> None:
    strange = Authority(tmp_path / "strange")
    with TlsServer(strange.keys("server"), ["one"], "localhost") as server:
        client = TlsClient(authority.keys("one"), "localhost", server.port, echo)
        for _ in range(200):
            if client.error:
                break
            time.sleep(0.05)
        assert "verify" in client.error.lower()
        client.close()


@pytest.mark.parametrize(
    "sent",
    [
        HEADER.pack(b"HTTP", 2, 0) + b"{}",
        HEADER.pack(MAGIC, 1 << 30, 0),
        HEADER.pack(MAGIC, 2, 1 << 50) + b"{}",
        HEADER.pack(MAGIC, 2, 0) + b"[]",
        HEADER.pack(MAGIC, 2, 0) + b"{x",
        HEADER.pack(MAGIC, 4000, 0) + b'{"a":' * 800,
    ],
)
def test_what_no_frame_is(server: TlsServer, authority: Authority, sent: bytes) -> None:
    context = authority.keys("two").context(server=False)
    raw = socket.create_connection(("localhost", server.port))
    with context.wrap_socket(raw, server_hostname="localhost") as wrapped:
        connection = server.connection("two", 10)
        wrapped.sendall(sent)
        with pytest.raises(ConnectionBroken, match=r"not (a frame|a JSON|JSON)"):
            connection.receive(5)


def test_half_a_frame_and_silence(server: TlsServer, authority: Authority) -> None:
    context = authority.keys("two").context(server=False)
    raw = socket.create_connection(("localhost", server.port))
    with context.wrap_socket(raw, server_hostname="localhost") as wrapped:
        connection = server.connection("two", 10)
        text = json.dumps({"a": 1}).encode()
        wrapped.sendall(HEADER.pack(MAGIC, len(text), 10) + text + b"12345")
        with pytest.raises(ConnectionBroken, match=r"no answer within 0\.2 s"):
            connection.receive(0.2)
