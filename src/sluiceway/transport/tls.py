"""Connections between a server and its sites for many small messages: frames over mutual TLS.

Split learning sends a message a mini-batch, too many for an engine's own calls. So sites connect to
a port of the server with the certificates that they were provisioned with, and stay connected. The
certificate says which site it is: its common name must be one of the run's.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from sluiceway.errors import quoted
from sluiceway.transport.framing import HEADER, MAGIC, FrameError, encode, lengths, parse

#: Most bytes that are read at a time, so that a length alone allocates no memory.
READ_SIZE: Final = 1 << 20
#: TLS handshake timeout (s), and pause between a site's attempts to connect (s).
HANDSHAKE_TIMEOUT: Final = 10.0
RECONNECT_PAUSE: Final = 0.5
#: Pause of the server's port when it cannot accept, because files or threads ran out (s).
ACCEPT_PAUSE: Final = 0.1
#: A machine that is gone is noticed after the first of these (s), by `PROBES` probes that are the
#: second apart and unanswered; and by data that are not acknowledged for the sum.
IDLE, PROBE, PROBES = 60, 15, 4


@dataclass(frozen=True)
class Credentials:
    """Paths of a party's certificate, its private key, and the root certificate (PEM)."""

    certificate: Path
    key: Path
    root: Path

    def context(self, server: bool) -> ssl.SSLContext:
        """TLS 1.3, in which both ends must show a certificate that the root signed."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self.certificate, self.key)
        context.load_verify_locations(self.root)
        return context


@dataclass(frozen=True)
class Endpoint:
    """Where the server listens for split learning, and where sites find it.

    Attributes:
        keys: the server's.
        host: that sites connect to; the server's certificate must be for it.
        port: 0 for any that is free.
        listen: address to listen on.
    """

    keys: Credentials
    host: str
    port: int = 0
    listen: str = "0.0.0.0"


class ConnectionBroken(ConnectionError):
    """A connection that has ended, or that brought something else than a frame; one line."""


class Deadline:
    """A moment from which on a message is too late, however steadily its bytes drip in.

    Args:
        timeout: seconds from now, 0 for none.
    """

    def __init__(self, timeout: float) -> None:
        self.end = time.monotonic() + timeout if timeout else None

    def left(self) -> float | None:
        """Seconds until then, None without one. Raises TimeoutError."""
        if self.end is None:
            return None
        if (left := self.end - time.monotonic()) <= 0:
            raise TimeoutError
        return left


class Connection:
    """One end of a connection; used by one thread at a time.

    Args:
        wrapped: connected, after the TLS handshake.
    """

    def __init__(self, wrapped: ssl.SSLSocket) -> None:
        self.socket = wrapped
        wrapped.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wrapped.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", IDLE),
            ("TCP_KEEPINTVL", PROBE),
            ("TCP_KEEPCNT", PROBES),
            ("TCP_USER_TIMEOUT", 1000 * (IDLE + PROBE * PROBES)),
        ):
            if (option := getattr(socket, name, None)) is not None:  # not on every system
                wrapped.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, facts: Mapping[str, Any], body: bytes = b"", timeout: float = 0) -> None:
        """Send a frame.

        Args:
            timeout: seconds until all of it is on its way, 0 for any.

        Raises:
            ConnectionBroken: the other end is gone, or does not take it.
        """
        text, deadline = encode(facts), Deadline(timeout)
        whole = memoryview(HEADER.pack(MAGIC, len(text), len(body)) + text)
        try:
            for data in (whole, memoryview(body)):
                while data:
                    self.socket.settimeout(deadline.left())
                    data = data[self.socket.send(data[:READ_SIZE]) :]
        except TimeoutError:
            self.close()
            raise ConnectionBroken(f"it took no message within {timeout:g} s") from None
        except OSError as error:
            raise self.broken(error) from None

    def receive(self, timeout: float = 0) -> tuple[dict[str, Any], bytes]:
        """The next frame.

        Args:
            timeout: seconds until all of it is here, 0 for any.

        Raises:
            ConnectionBroken: none came, or it is not a frame.
        """
        deadline = Deadline(timeout)
        try:
            text, body = lengths(self.exactly(HEADER.size, deadline))
            return parse(self.exactly(text, deadline)), self.exactly(body, deadline)
        except TimeoutError:
            self.close()
            raise ConnectionBroken(f"no answer within {timeout:g} s") from None
        except FrameError as error:
            self.close()
            raise ConnectionBroken(f"{error}") from None
        except OSError as error:
            raise self.broken(error) from None

    def exactly(self, count: int, deadline: Deadline) -> bytes:
        """The next `count` bytes. Raises TimeoutError after the deadline."""
        found = bytearray()
        while len(found) < count:
            self.socket.settimeout(deadline.left())
            piece = self.socket.recv(min(count - len(found), READ_SIZE))
            if not piece:
                raise ConnectionError("closed")
            found += piece
        return bytes(found)

    def broken(self, error: OSError) -> ConnectionBroken:
        """Close the connection; the error to raise."""
        self.close()
        return ConnectionBroken(f"the connection is down ({error.strerror or error})")

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class TlsServer:
    """The server's port, and the newest connection of each site.

    Args:
        keys: the server's.
        sites: common names that may connect.
        host: address to listen on.
        port: 0 for any that is free.

    Raises:
        OSError: the port is not available, or the keys cannot be read.
    """

    def __init__(
        self, keys: Credentials, sites: Collection[str], host: str = "0.0.0.0", port: int = 0
    ) -> None:
        self.context = keys.context(server=True)
        self.sites = frozenset(sites)
        self.connections: dict[str, Connection] = {}
        self.changed = threading.Condition()
        self.closed = False
        self.listener = socket.create_server((host, port), backlog=128)
        self.port: int = self.listener.getsockname()[1]
        #: The last hundred rejected attempts, with the reason; the newest last.
        self.rejected: deque[str] = deque(maxlen=100)
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def accept(self) -> None:
        """Accept connections until closed; each handshake has a thread and delays no other.

        Where files or threads have run out it goes on as soon as there are some again: those of
        strangers are free after `HANDSHAKE_TIMEOUT`.
        """
        while not self.closed:
            try:
                raw, address = self.listener.accept()
            except OSError as error:
                if not self.closed:
                    self.rejected.append(f"cannot accept: {error.strerror or error}")
                    time.sleep(ACCEPT_PAUSE)
                continue
            try:
                threading.Thread(target=self.admit, args=(raw, address[0]), daemon=True).start()
            except RuntimeError as error:
                self.rejected.append(f"{address[0]}: {error}")
                raw.close()
                time.sleep(ACCEPT_PAUSE)

    def admit(self, raw: socket.socket, address: str) -> None:
        """Do the TLS handshake, and keep the connection if its certificate names a site."""
        raw.settimeout(HANDSHAKE_TIMEOUT)
        try:
            wrapped = self.context.wrap_socket(raw, server_side=True)
        except OSError as error:
            self.rejected.append(f"{address}: {error.strerror or error}")
            raw.close()
            return
        name = common_name(wrapped)
        if name not in self.sites:
            self.rejected.append(f"{address}: {quoted(name)} is not a site of this run")
            wrapped.close()
            return
        with self.changed:
            if name in self.connections:
                self.connections[name].close()
            self.connections[name] = Connection(wrapped)
            self.changed.notify_all()

    def connection(self, site: str, wait: float, old: Connection | None = None) -> Connection:
        """The connection of a site.

        Args:
            wait: seconds to wait until it connects.
            old: a connection that does not count, because it is broken.

        Raises:
            ConnectionBroken: it has not connected.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.connections.get(site) not in (None, old), wait)
            found = self.connections.get(site)
        if found is None or found is old:
            raise ConnectionBroken("it is not connected to the server")
        return found

    def close(self) -> None:
        """Close all connections, and stop listening."""
        self.closed = True
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        with self.changed:
            for connection in self.connections.values():
                connection.close()
            self.connections.clear()


def common_name(wrapped: ssl.SSLSocket) -> str:
    """The common name in the other end's certificate; "" unless there is exactly one."""
    subject: Any = (wrapped.getpeercert() or {}).get("subject", ())
    names = [value for part in subject for key, value in part if key == "commonName"]
    return names[0] if len(names) == 1 else ""


class TlsClient:
    """A site's end: stays connected to the server and answers its frames, until it is closed.

    Args:
        keys: the site's.
        host, port: of the server, whose certificate must be for that host.
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
        self.connection: Connection | None = None
        #: Why the newest attempt to connect failed; "" if it did not.
        self.error = ""
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        """Connect, serve, and connect again."""
        while not self.closed.is_set():
            try:
                raw = socket.create_connection((self.host, self.port), HANDSHAKE_TIMEOUT)
                wrapped = self.context.wrap_socket(raw, server_hostname=self.host)
            except OSError as error:
                self.error = str(error.strerror or error)
                self.closed.wait(RECONNECT_PAUSE)
                continue
            self.error, self.connection = "", Connection(wrapped)
            with contextlib.suppress(ConnectionBroken):
                self.serve(self.connection)
            self.connection.close()
            # Else one that is rejected after the handshake would connect again without a pause.
            self.closed.wait(RECONNECT_PAUSE)

    def serve(self, connection: Connection) -> None:
        """Answer until the connection ends. Raises ConnectionBroken."""
        while not self.closed.is_set():
            facts, body = connection.receive()
            try:
                found = self.answer(facts, body)
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[0]
                found = {"error": first or type(error).__name__}, b""
            if found is not None:
                connection.send(*found)

    def close(self) -> None:
        """Disconnect for good."""
        self.closed.set()
        if self.connection is not None:
            self.connection.close()
        if threading.current_thread() is not self.thread:
            self.thread.join(RECONNECT_PAUSE + 1)
