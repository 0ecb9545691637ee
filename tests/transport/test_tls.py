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

from sluiceway.transport.tls import (
    HEADER,
    MAGIC,
    Connection,
    ConnectionBroken,
    TlsClient,
    TlsServer,
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "keys")


@pytest.fixture
def gate(authority: Authority) -> Iterator[TlsServer]:
    with TlsServer(authority.keys("server"), ["one", "two"], "localhost") as opened:
        yield opened


def echo(facts: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes] | None:
    if facts.get("quiet"):
        return None
    if facts.get("fail"):
        raise ValueError("first line\nsecond line")
    return {"back": facts}, body[::-1]


def test_a_question_and_an_answer(gate: TlsServer, authority: Authority) -> None:
    dialler = TlsClient(authority.keys("one"), "localhost", gate.port, echo)
    line = gate.line("one", 10)
    line.send({"a": 1}, b"xyz")
    assert line.receive(10) == ({"back": {"a": 1}}, b"zyx")
    line.send({"quiet": True}, b"none")
    line.send({"fail": True})
    assert line.receive(10) == ({"error": "first line"}, b"")
    body = bytes(5_000_000)
    line.send({}, body)
    assert line.receive(10)[1] == body
    dialler.close()
    with pytest.raises(ConnectionBroken, match="the line is down"):
        line.receive(10)


def test_a_site_dials_again(gate: TlsServer, authority: Authority) -> None:
    dialler = TlsClient(authority.keys("one"), "localhost", gate.port, echo)
    first = gate.line("one", 10)
    first.close()
    second = gate.line("one", 10, first)
    second.send({"b": 2})
    assert second.receive(10)[0] == {"back": {"b": 2}}
    dialler.close()


def until(gate: TlsServer, said: str) -> None:
    for _ in range(200):
        if any(said in why for why in gate.turned_away):
            return
        time.sleep(0.05)
    pytest.fail(f"{gate.turned_away} has no {said!r}")


def test_another_root_does_not_get_in(
    gate: TlsServer, authority: Authority, tmp_path: Path
) -> None:
    strange = Authority(tmp_path / "strange").keys("one")
    trusting = type(strange)(strange.certificate, strange.key, authority.keys("x").root)
    dialler = TlsClient(trusting, "localhost", gate.port, echo)
    until(gate, "certificate")
    with pytest.raises(ConnectionBroken, match="no line to the server"):
        gate.line("one", 0.1)
    dialler.close()


def test_no_certificate_does_not_get_in(gate: TlsServer, authority: Authority) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority.keys("server").root)
    with (
        socket.create_connection(("localhost", gate.port)) as raw,
        pytest.raises(ssl.SSLError),
        context.wrap_socket(raw, server_hostname="localhost") as wrapped,
    ):
        wrapped.recv(1)
    until(gate, "certificate")


def test_a_name_that_is_no_site_does_not_get_in(gate: TlsServer, authority: Authority) -> None:
    dialler = TlsClient(authority.keys("three"), "localhost", gate.port, echo)
    until(gate, "'three' is no site of this run")
    assert not gate.lines
    dialler.close()


def test_a_site_refuses_a_server_of_another_root(authority: Authority, tmp_path: Path) -> None:
    strange = Authority(tmp_path / "strange")
    with TlsServer(strange.keys("server"), ["one"], "localhost") as gate:
        dialler = TlsClient(authority.keys("one"), "localhost", gate.port, echo)
        for _ in range(200):
            if dialler.fault:
                break
            time.sleep(0.05)
        assert "verify" in dialler.fault.lower()
        dialler.close()


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
def test_what_no_frame_is(gate: TlsServer, authority: Authority, sent: bytes) -> None:
    context = authority.keys("two").context(server=False)
    raw = socket.create_connection(("localhost", gate.port))
    with context.wrap_socket(raw, server_hostname="localhost") as wrapped:
        line = gate.line("two", 10)
        wrapped.sendall(sent)
        with pytest.raises(ConnectionBroken, match="no frame"):
            line.receive(5)


def test_half_a_frame_and_silence(gate: TlsServer, authority: Authority) -> None:
    context = authority.keys("two").context(server=False)
    raw = socket.create_connection(("localhost", gate.port))
    with context.wrap_socket(raw, server_hostname="localhost") as wrapped:
        line: Connection = gate.line("two", 10)
        text = json.dumps({"a": 1}).encode()
        wrapped.sendall(HEADER.pack(MAGIC, len(text), 10) + text + b"12345")
        with pytest.raises(ConnectionBroken, match=r"no answer within 0\.2 s"):
            line.receive(0.2)
