"""Lines between a server and its sites for many small messages: frames over mutual TLS.

Split learning sends a message a mini-batch, too many for an engine's own calls. So the sites dial a
port of the server, with the certificates that they were provisioned with, and keep the line open. A
site is who its certificate says: the common name must be one of the run's.

A frame is a fixed header, a JSON object and a body of bytes. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

#: Of the frame layout; the other side refuses any other.
MAGIC: Final = b"SLW1"
HEADER: Final = struct.Struct(">4sIQ")
#: Largest JSON object and largest body in bytes, 1 MiB and 4 GiB.
FACTS_LIMIT: Final = 1 << 20
BODY_LIMIT: Final = 4 << 30
#: Bytes that are read at a time, so that a length alone takes no memory.
PIECE: Final = 1 << 20
#: Seconds for a stranger to prove who he is, and between a site's attempts to dial.
HANDSHAKE: Final = 10.0
PAUSE: Final = 0.5


@dataclass(frozen=True)
class Credentials:
    """Where a party's own certificate, its key, and the root that signed all of them are (PEM)."""

    certificate: Path
    key: Path
    root: Path

    def context(self, server: bool) -> ssl.SSLContext:
        """For one end of a line; both ends must show a certificate of the root, TLS 1.3."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self.certificate, self.key)
        context.load_verify_locations(self.root)
        return context


@dataclass(frozen=True)
class Endpoint:
    """Where the server opens a gate, and where sites find it.

    Attributes:
        keys: the server's.
        host: that sites dial; the server's certificate must be for it.
        port: 0 for any that is free.
        listen: address to listen on.
    """

    keys: Credentials
    host: str
    port: int = 0
    listen: str = "0.0.0.0"


class ConnectionBroken(ConnectionError):
    """A line that has ended, or on which something came that is no frame; one line of text."""


class Connection:
    """One end of a line; used by one thread at a time.

    Args:
        wrapped: connected, and shaken hands on.
    """

    def __init__(self, wrapped: ssl.SSLSocket) -> None:
        self.socket = wrapped
        wrapped.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wrapped.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, facts: Mapping[str, Any], body: bytes = b"") -> None:
        """Send a frame. Raises ConnectionBroken."""
        text = json.dumps(facts).encode()
        try:
            self.socket.sendall(HEADER.pack(MAGIC, len(text), len(body)) + text)
            if body:
                self.socket.sendall(body)
        except OSError as error:
            raise self.ended(error) from None

    def receive(self, timeout: float = 0) -> tuple[dict[str, Any], bytes]:
        """The next frame.

        Args:
            timeout: seconds without a byte, 0 for any.

        Raises:
            ConnectionBroken: none came, or it is none.
        """
        try:
            self.socket.settimeout(timeout or None)
            magic, text, body = HEADER.unpack(self.exactly(HEADER.size))
            if magic != MAGIC or text > FACTS_LIMIT or body > BODY_LIMIT:
                raise ConnectionBroken("what came is no frame")
            facts = json.loads(self.exactly(text))
            if not isinstance(facts, dict):
                raise ConnectionBroken("what came is no frame")
            return facts, self.exactly(body)
        except TimeoutError:
            self.close()
            raise ConnectionBroken(f"no answer within {timeout:g} s") from None
        except ConnectionBroken:
            self.close()
            raise
        except (ValueError, RecursionError):
            self.close()
            raise ConnectionBroken("what came is no frame") from None
        except OSError as error:
            raise self.ended(error) from None

    def exactly(self, count: int) -> bytes:
        """So many bytes."""
        found = bytearray()
        while len(found) < count:
            piece = self.socket.recv(min(count - len(found), PIECE))
            if not piece:
                raise ConnectionError("closed")
            found += piece
        return bytes(found)

    def ended(self, error: OSError) -> ConnectionBroken:
        """The error of a line that is of no use any more."""
        self.close()
        return ConnectionBroken(f"the line is down ({error.strerror or error})")

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class TlsServer:
    """The server's port, and the newest line of each site.

    Args:
        keys: the server's.
        sites: common names that may enter.
        host: address to listen on.
        port: 0 for any that is free.

    Raises:
        OSError: the port cannot be had, or the keys cannot be read.
    """

    def __init__(
        self, keys: Credentials, sites: Collection[str], host: str = "0.0.0.0", port: int = 0
    ) -> None:
        self.context = keys.context(server=True)
        self.sites = frozenset(sites)
        self.lines: dict[str, Connection] = {}
        self.changed = threading.Condition()
        self.listener = socket.create_server((host, port))
        self.port: int = self.listener.getsockname()[1]
        #: The last hundred that were turned away, and why; the newest last.
        self.turned_away: deque[str] = deque(maxlen=100)
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def accept(self) -> None:
        """Let in who dials, until the gate is closed; each in a thread, so that none holds it."""
        while True:
            try:
                raw, address = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.admit, args=(raw, address[0]), daemon=True).start()

    def admit(self, raw: socket.socket, address: str) -> None:
        """Shake hands, and keep the line if its certificate names a site."""
        raw.settimeout(HANDSHAKE)
        try:
            wrapped = self.context.wrap_socket(raw, server_side=True)
        except OSError as error:
            self.turned_away.append(f"{address}: {error.strerror or error}")
            raw.close()
            return
        name = common_name(wrapped)
        if name not in self.sites:
            self.turned_away.append(f"{address}: {name!r} is no site of this run")
            wrapped.close()
            return
        with self.changed:
            if name in self.lines:
                self.lines[name].close()
            self.lines[name] = Connection(wrapped)
            self.changed.notify_all()

    def line(self, site: str, patience: float, old: Connection | None = None) -> Connection:
        """The site's line.

        Args:
            patience: seconds to wait for it to dial.
            old: a line that is of no use any more.

        Raises:
            ConnectionBroken: it has not dialled.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.lines.get(site) not in (None, old), patience)
            found = self.lines.get(site)
        if found is None or found is old:
            raise ConnectionBroken("it has no line to the server")
        return found

    def close(self) -> None:
        """Hang up on all, and listen no more."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        with self.changed:
            for line in self.lines.values():
                line.close()
            self.lines.clear()


def common_name(wrapped: ssl.SSLSocket) -> str:
    """Who the certificate of the other end says it is; "" if it does not."""
    subject: Any = (wrapped.getpeercert() or {}).get("subject", ())
    names = [value for part in subject for key, value in part if key == "commonName"]
    return names[0] if len(names) == 1 else ""


class TlsClient:
    """A site's end: keeps a line to the gate, and answers what comes, until it is closed.

    Args:
        keys: the site's.
        host, port: of the gate; the server's certificate must be for that host.
        answer: from a frame's facts and body to what is sent back; None sends nothing. What it
            raises goes back as the fact "error", in one line.
    """

    def __init__(
        self,
        keys: Credentials,
        host: str,
        port: int,
        answer: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes] | None],
    ) -> None:
        self.context = keys.context(server=False)
        self.host, self.port, self.answer = host, port, answer
        self.closed = threading.Event()
        self.line: Connection | None = None
        #: Why the newest attempt to dial failed; "" if it did not.
        self.fault = ""
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self) -> None:
        """Dial, serve, and dial again."""
        while not self.closed.is_set():
            try:
                raw = socket.create_connection((self.host, self.port), HANDSHAKE)
                line = Connection(self.context.wrap_socket(raw, server_hostname=self.host))
            except OSError as error:
                self.fault = str(error.strerror or error)
                self.closed.wait(PAUSE)
                continue
            self.fault, self.line = "", line
            with contextlib.suppress(ConnectionBroken):
                self.serve(line)
            line.close()
            # One that is turned away after the handshake would else dial without a pause.
            self.closed.wait(PAUSE)

    def serve(self, line: Connection) -> None:
        """Answer until the line ends. Raises ConnectionBroken."""
        while not self.closed.is_set():
            facts, body = line.receive()
            try:
                found = self.answer(facts, body)
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[0]
                found = {"error": first or type(error).__name__}, b""
            if found is not None:
                line.send(*found)

    def close(self) -> None:
        """Hang up."""
        self.closed.set()
        if self.line is not None:
            self.line.close()
        if threading.current_thread() is not self.thread:
            self.thread.join(PAUSE + 1)
