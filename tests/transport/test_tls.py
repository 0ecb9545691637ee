"""Connections over mutual TLS: who may connect, and what is not a frame."""

from __future__ import annotations

import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.nearby import Authority

from sluiceway.transport.framing import HEADER, MAGIC
from sluiceway.transport.tls import Connection, ConnectionBroken, Credentials, TlsClient, TlsServer


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "keys")


@pytest.fixture
def server(authority: Authority) -> Iterator[TlsServer]:
    with TlsServer(authority.keys("server"), ["one", "two"], "localhost") as opened:
        yield opened


@contextmanager
def client(server: TlsServer, keys: Credentials) -> Iterator[TlsClient]:
    """A client that sends back what comes, until the end of the block."""
    made = TlsClient(keys, "localhost", server.port, echo)
    try:
        yield made
    finally:
        made.close()


def echo(facts: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes] | None:
    if facts.get("quiet"):
        return None
    if facts.get("fail"):
        raise ValueError("first line\nsecond line")
    return {"back": facts}, body[::-1]


def until(said: Callable[[], str], expected: str) -> None:
    deadline = time.monotonic() + 10
    while expected not in said().lower():
        assert time.monotonic() < deadline, f"{said()!r} has no {expected!r}"
        time.sleep(0.05)


def test_requests_and_replies(server: TlsServer, authority: Authority) -> None:
    with client(server, authority.keys("one")):
        connection = server.connection("one", 10)
        connection.send({"a": 1}, b"xyz")
        assert connection.receive(10) == ({"back": {"a": 1}}, b"zyx")
        connection.send({"quiet": True}, b"none")
        connection.send({"fail": True})
        assert connection.receive(10) == ({"error": "first line"}, b"")
        body = bytes(5_000_000)
        connection.send({}, body)
        assert connection.receive(10)[1] == body
    with pytest.raises(ConnectionBroken, match="the connection is down"):
        connection.receive(10)


def test_a_site_connects_again(server: TlsServer, authority: Authority) -> None:
    with client(server, authority.keys("one")):
        first = server.connection("one", 10)
        first.close()
        second = server.connection("one", 10, first)
        second.send({"b": 2})
        assert second.receive(10)[0] == {"back": {"b": 2}}


def test_another_root_or_name_is_rejected(
    server: TlsServer, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other").keys("one")
    trusting = Credentials(other.certificate, other.key, authority.keys("x").root)
    for keys, why in [
        (trusting, "certificate"),
        (authority.keys("three"), "'three' is not a site of this run"),
    ]:
        with client(server, keys):
            until(lambda: " ".join(server.rejected), why)
            with pytest.raises(ConnectionBroken, match="not connected to the server"):
                server.connection("one", 0.1)
    assert not server.connections


def test_no_certificate_is_rejected(server: TlsServer, authority: Authority) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority.keys("server").root)
    with (
        socket.create_connection(("localhost", server.port)) as raw,
        pytest.raises(ssl.SSLError),
        context.wrap_socket(raw, server_hostname="localhost") as wrapped,
    ):
        wrapped.recv(1)
    until(lambda: " ".join(server.rejected), "certificate")


def test_a_site_rejects_a_server_of_another_root(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other").keys("server")
    with (
        TlsServer(other, ["one"], "localhost") as server,
        client(server, authority.keys("one")) as made,
    ):
        until(lambda: made.error, "verify")


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (HEADER.pack(b"HTTP", 2, 0) + b"{}", "not a frame"),
        (HEADER.pack(MAGIC, 1 << 30, 0), "not a frame"),
        (HEADER.pack(MAGIC, 2, 1 << 50) + b"{}", "not a frame"),
        (HEADER.pack(MAGIC, 2, 0) + b"[]", "not a JSON object"),
        (HEADER.pack(MAGIC, 2, 0) + b"{x", "not JSON"),
        (HEADER.pack(MAGIC, 4000, 0) + b'{"a":' * 800, "not JSON"),
        (HEADER.pack(MAGIC, 2, 10) + b"{}12345", r"no answer within 0\.5 s"),
    ],
)
def test_what_is_not_a_frame(
    server: TlsServer, authority: Authority, sent: bytes, why: str
) -> None:
    context = authority.keys("two").context(server=False)
    raw = socket.create_connection(("localhost", server.port))
    with context.wrap_socket(raw, server_hostname="localhost") as wrapped:
        connection: Connection = server.connection("two", 10)
        wrapped.sendall(sent)
        with pytest.raises(ConnectionBroken, match=why):
            connection.receive(0.5)


def test_a_drip_of_bytes_does_not_outlive_the_timeout(
    server: TlsServer, authority: Authority
) -> None:
    context = authority.keys("two").context(server=False)
    raw = socket.create_connection(("localhost", server.port))
    with context.wrap_socket(raw, server_hostname="localhost") as wrapped:
        connection = server.connection("two", 10)
        stopped = threading.Event()

        def drip() -> None:
            for byte in HEADER.pack(MAGIC, 2, 500) + b"{}" + bytes(500):
                if stopped.wait(0.02):
                    return
                wrapped.sendall(bytes([byte]))

        thread = threading.Thread(target=drip)
        thread.start()
        began = time.monotonic()
        with pytest.raises(ConnectionBroken, match=r"no answer within 0\.5 s"):
            connection.receive(0.5)
        took = time.monotonic() - began
        stopped.set()
        thread.join()
    assert took < 2


def test_who_does_not_read_is_given_up(server: TlsServer, authority: Authority) -> None:
    context = authority.keys("two").context(server=False)
    raw = socket.create_connection(("localhost", server.port))
    with context.wrap_socket(raw, server_hostname="localhost"):
        connection = server.connection("two", 10)
        with pytest.raises(ConnectionBroken, match=r"it took no message within 0\.5 s"):
            connection.send({}, bytes(1 << 26), 0.5)


def test_fifty_silent_strangers_keep_nobody_out(server: TlsServer, authority: Authority) -> None:
    strangers = [socket.create_connection(("localhost", server.port)) for _ in range(50)]
    try:
        with client(server, authority.keys("one")):
            connection = server.connection("one", 5)
            connection.send({"a": 1})
            assert connection.receive(5)[0] == {"back": {"a": 1}}
    finally:
        for stranger in strangers:
            stranger.close()


def test_the_port_outlives_a_lack_of_files(server: TlsServer, authority: Authority) -> None:
    keys = authority.keys("one")
    stranger = socket.socket()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (stranger.fileno() + 1, hard))
    try:
        stranger.connect(("127.0.0.1", server.port))
        until(lambda: " ".join(server.rejected), "cannot accept: too many open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        stranger.close()
    with client(server, keys):
        server.connection("one", 10).send({})
